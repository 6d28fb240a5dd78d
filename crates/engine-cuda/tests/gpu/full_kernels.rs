//! The kernels of full-weight training alone: sums over rows, drawing, the optimiser, the norms' weights, SiLU.

use engine_cuda::ops::average::{self, AverageConfig, Averaged, NUMBERS};
use engine_cuda::ops::draw::{self, LatentSizes, Purpose, normals};
use engine_cuda::ops::modulated::{self, GateGradients, Modulated, NormGradients};
use engine_cuda::ops::rope::{self, HeadShape};
use engine_cuda::ops::{elementwise, sums};
use engine_cuda::{Half, Stream};

use crate::report::Report;
use crate::support::{Bench, distance, name, numbers, rounding};

const EPS: f32 = 1e-6;

/// Runs all of them.
pub fn run(s: &Stream, report: &mut Report) {
    for t in [Half::Bf16, Half::F16] {
        let bench = Bench { s, t };
        for (rows, columns, stride) in [
            (1, 8, 8),
            (37, 200, 208),
            (5, 264, 264),
            (1003, 1792, 1800),
            (9000, 64, 64),
        ] {
            column_sums(bench, rows, columns, stride, report);
        }
        for [b, n, d] in [
            [1, 3, 8],
            [3, 37, 200],
            [2, 320, 256],
            [5, 1, 72],
            [1, 700, 1032],
        ] {
            modulation_sums(bench, [b, n, d], report);
        }
        // One, two and four vectors a lane, full and not.
        for [b, n, d] in [
            [1, 3, 8],
            [3, 37, 200],
            [2, 320, 256],
            [2, 65, 264],
            [5, 1, 512],
            [3, 50, 776],
            [2, 33, 1024],
        ] {
            narrow_rows(bench, [b, n, d], report);
        }
        for (rows, columns) in [(1, 8), (37, 200), (1003, 1024), (5, 264)] {
            gelu_sums(bench, rows, columns, report);
        }
        for n in [1, 7, 1000, 5003] {
            silu_backward(bench, n, report);
        }
        for (b, c, h, w) in [(3, 2, 6, 10), (1, 3, 2, 2), (5, 16, 32, 32)] {
            drawing(bench, [b, c, h, w], report);
        }
        for (b, width) in [(3, 5), (2, 40), (4, 4096), (3, 2051)] {
            gathering(bench, b, width, report);
        }
        for n in [4, 1000, 100_000] {
            optimiser(bench, n, report);
        }
        for (b, n, n_total, token_offset, h, dh) in [
            (2, 5, 9, 4, 3, 64),
            (7, 90, 90, 0, 4, 64),
            (2, 5, 5, 0, 5, 128),
            (2, 5, 6, 1, 4, 28),
            (3, 40, 44, 4, 8, 32),
            (1, 4, 9, 5, 2, 16),
            (1, 3, 3, 0, 1, 256),
        ] {
            let shape = HeadShape {
                b,
                n,
                n_total,
                token_offset,
                h,
                dh,
                in_stride: 7 * h * dh,
                out_stride: h * dh + 8,
            };
            norm_weights(bench, shape, report);
        }
    }
}

fn column_sums(bench: Bench<'_>, rows: usize, columns: usize, stride: usize, report: &mut Report) {
    let Bench { s, t } = bench;
    let (x, values) = bench.half(&numbers(1, rows * stride, 1.0));
    let out = bench.output(4 * columns);
    let partials = bench.output(4 * sums::partials_len(1, rows, columns, 1));
    let view = partials.view();
    sums::columns(s, t, out.view(), x.view(), stride, rows, columns, view).expect("launch");
    let expected: Vec<f64> = (0..columns)
        .map(|column| (0..rows).map(|row| values[row * stride + column]).sum())
        .collect();
    bench.read::<f32>(&partials);
    let off = distance(&bench.read_f32(&out), &expected);
    let label = format!("column sums {} {rows}x{columns}", name(t));
    report.check(&label, off, 1e-5);
}

/// Mean and `1/σ` of a row.
fn statistics(x: &[f64]) -> [f64; 2] {
    let mean = x.iter().sum::<f64>() / x.len() as f64;
    let variance = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / x.len() as f64;
    [mean, (variance + f64::from(EPS)).sqrt().recip()]
}

fn modulation_sums(bench: Bench<'_>, [b, n, d]: [usize; 3], report: &mut Report) {
    let Bench { s, t } = bench;
    let (rows, stride) = (b * n, 3 * d);
    let label = format!("{} {b}x{n}x{d}", name(t));
    let (x, x_values) = bench.half(&numbers(1, rows * d, 1.5));
    let (dy, dy_values) = bench.half(&numbers(2, rows * d, 1.0));
    let (modulation, _) = bench.f32(&numbers(3, b * stride, 0.5));
    let (normed, stats) = (bench.output(2 * rows * d), bench.output(8 * rows));
    let vectors = [0, d].map(|at| modulation.view().skip(4 * at));
    let [x, dy] = [x.view(), dy.view()];
    let m = Modulated {
        b,
        tokens: n,
        d,
        stride,
        trained: true,
    };
    let (out, kept) = (normed.view(), stats.view());
    modulated::norm(s, t, out, Some(kept), x, vectors, m, EPS).expect("launch");
    let sums_out = bench.output(2 * b * stride);
    let partials = bench.output(4 * sums::partials_len(b, n, d, 2));
    let [shift, scale] = [0, d].map(|at| sums_out.view().elements_from(at));
    let gradients = NormGradients {
        shift,
        scale,
        partials: partials.view(),
    };
    sums::norms(s, t, gradients, dy, x, kept, m).expect("launch");
    bench.read::<f32>(&partials);
    let found = bench.read_half(&sums_out);
    let mut expected = vec![0.0; b * stride];
    for row in 0..rows {
        let x = &x_values[row * d..][..d];
        let [mean, r] = statistics(x);
        for i in 0..d {
            let (at, g) = (row / n * stride + i, dy_values[row * d + i]);
            expected[at] += g;
            expected[at + d] += g * (x[i] - mean) * r;
        }
    }
    for (what, first) in [("shift", 0), ("scale", d)] {
        let part = |values: &[f64]| -> Vec<f64> {
            let rows = values.chunks_exact(stride);
            rows.flat_map(|row| row[first..first + d].to_vec())
                .collect()
        };
        let off = distance(&part(&found), &part(&expected));
        report.check(&format!("gradient of {what} {label}"), off, rounding(t));
    }
}

/// Norm and gate of narrow rows, there and back with their sums, against the forms that give a block to every row.
fn narrow_rows(bench: Bench<'_>, [b, n, d]: [usize; 3], report: &mut Report) {
    let Bench { s, t } = bench;
    let (rows, stride) = (b * n, 3 * d);
    let label = format!("{} {b}x{n}x{d}", name(t));
    let (x, x_values) = bench.half(&numbers(1, rows * d, 1.5));
    let (dy, dy_values) = bench.half(&numbers(2, rows * d, 1.0));
    let (y, y_values) = bench.half(&numbers(3, rows * d, 1.0));
    let (before, _) = bench.half(&numbers(4, rows * d, 1.0));
    let (modulation, modulation_values) = bench.f32(&numbers(5, b * stride, 0.5));
    let [shift, scale, gate] = [0, d, 2 * d].map(|at| modulation.view().skip(4 * at));
    let [x, dy, y] = [x.view(), dy.view(), y.view()];
    let m = Modulated {
        b,
        tokens: n,
        d,
        stride,
        trained: true,
    };
    let half = || bench.output(2 * rows * d);
    let partials = bench.output(4 * sums::partials_len(b, n, d, 2));
    let scratch = partials.view();
    let mut same = |what: &str, found: &[f64], expected: &[f64], bound: f64| {
        let off = distance(found, expected);
        report.check(&format!("narrow {what} {label}"), off, bound);
    };

    let (outs, stats) = ([half(), half()], bench.output(8 * rows));
    let [out, plain] = outs.each_ref().map(|out| out.view());
    let (kept, vectors) = (stats.view(), [shift, scale]);
    modulated::norm(s, t, out, Some(kept), x, vectors, m, EPS).expect("launch");
    modulated::norm(s, t, plain, None, x, vectors, m, EPS).expect("launch");
    let [found, expected] = outs.each_ref().map(|out| bench.read_half(out));
    same("norm", &found, &expected, rounding(t));
    let expected: Vec<f64> = x_values.chunks_exact(d).flat_map(statistics).collect();
    same(
        "norm's statistics",
        &bench.read_f32(&stats),
        &expected,
        1e-5,
    );

    let outs = [half(), half()];
    let [out, plain] = outs.each_ref().map(|out| out.view());
    modulated::gate(s, t, out, x, gate, y, m, false).expect("launch");
    let frozen = Modulated {
        trained: false,
        ..m
    };
    modulated::gate(s, t, plain, x, gate, y, frozen, false).expect("launch");
    let [found, expected] = outs.each_ref().map(|out| bench.read_half(out));
    same("gate", &found, &expected, rounding(t));

    let wide = || bench.output(2 * b * stride);
    for accumulate in [false, true] {
        let outs = [(); 2].map(|()| bench.upload(&bench.read::<u16>(&before)));
        let [dx, plain] = outs.each_ref().map(|out| out.view());
        let modulations = [wide(), wide()];
        let [found, expected] = modulations.each_ref().map(|out| NormGradients {
            shift: out.view(),
            scale: out.view().elements_from(d),
            partials: scratch,
        });
        for (dx, gradients) in [(dx, Some(found)), (plain, None)] {
            let of = (x, Some(kept));
            modulated::norm_backward(s, t, dx, dy, of, scale, gradients, m, EPS, accumulate)
                .expect("launch");
        }
        sums::norms(s, t, expected, dy, x, kept, m).expect("launch");
        let [found, expected] = outs.each_ref().map(|out| bench.read_half(out));
        same("norm going back", &found, &expected, rounding(t));
        let [found, expected] = modulations.each_ref().map(|out| {
            let values = bench.read_half(out);
            let rows = values.chunks_exact(stride);
            rows.flat_map(|row| row[..2 * d].to_vec())
                .collect::<Vec<f64>>()
        });
        same("shift and scale", &found, &expected, rounding(t));
    }

    let outs = [half(), half()];
    let [out, plain] = outs.each_ref().map(|out| out.view());
    let (gates, bias) = (wide(), bench.output(4 * d));
    let gradients = GateGradients {
        gate: gates.view().elements_from(2 * d),
        bias: bias.view(),
        y,
        partials: scratch,
    };
    modulated::gate_backward(s, t, out, dy, gate, Some(gradients), m).expect("launch");
    modulated::gate_backward(s, t, plain, dy, gate, None, m).expect("launch");
    bench.read::<f32>(&partials);
    let [found, expected] = outs.each_ref().map(|out| bench.read_half(out));
    same("gate going back", &found, &expected, rounding(t));
    let (mut of_gates, mut of_bias) = (vec![0.0; b * d], vec![0.0; d]);
    for row in 0..rows {
        for i in 0..d {
            let g = dy_values[row * d + i];
            of_gates[row / n * d + i] += g * y_values[row * d + i];
            of_bias[i] += modulation_values[row / n * stride + 2 * d + i] * g;
        }
    }
    let found: Vec<f64> = bench
        .read_half(&gates)
        .chunks_exact(stride)
        .flat_map(|row| row[2 * d..].to_vec())
        .collect();
    same("gate's gradient", &found, &of_gates, rounding(t));
    same("bias behind a gate", &bench.read_f32(&bias), &of_bias, 1e-5);
}

fn gelu_sums(bench: Bench<'_>, rows: usize, columns: usize, report: &mut Report) {
    let Bench { s, t } = bench;
    let strides = [columns + 8, columns, columns + 16];
    let (dy, _) = bench.half(&numbers(1, rows * strides[1], 1.0));
    let (x, _) = bench.half(&numbers(2, rows * strides[2], 2.0));
    let outs = [(); 2].map(|()| bench.output(2 * rows * strides[0]));
    let [out, plain] = outs.each_ref().map(|out| out.view());
    let (bias, partials) = (
        bench.output(4 * columns),
        bench.output(4 * sums::partials_len(1, rows, columns, 1)),
    );
    let [dx_stride, dy_stride, x_stride] = strides;
    let (to, from, at) = (
        (out, dx_stride),
        (dy.view(), dy_stride),
        (x.view(), x_stride),
    );
    let scratch = partials.view();
    sums::gelu_backward(s, t, bias.view(), to, from, at, rows, columns, scratch).expect("launch");
    elementwise::gelu_tanh_backward(
        s,
        t,
        plain,
        dy.view(),
        x.view(),
        rows,
        columns,
        dx_stride,
        dy_stride,
        x_stride,
    )
    .expect("launch");
    bench.read::<f32>(&partials);
    let [found, expected] = outs.each_ref().map(|out| {
        let values = bench.read_half(out);
        let rows = values.chunks_exact(dx_stride);
        rows.flat_map(|row| row[..columns].to_vec())
            .collect::<Vec<f64>>()
    });
    let label = format!("{} {rows}x{columns}", name(t));
    let off = distance(&found, &expected);
    report.check(
        &format!("GELU going back with sums {label}"),
        off,
        rounding(t),
    );
    let sums: Vec<f64> = (0..columns)
        .map(|column| (0..rows).map(|row| expected[row * columns + column]).sum())
        .collect();
    let off = distance(&bench.read_f32(&bias), &sums);
    report.check(&format!("bias before GELU {label}"), off, rounding(t));
}

fn silu_backward(bench: Bench<'_>, n: usize, report: &mut Report) {
    let Bench { s, t } = bench;
    let (x, x_values) = bench.half(&numbers(1, n, 3.0));
    let (dy, dy_values) = bench.half(&numbers(2, n, 1.0));
    let out = bench.output(2 * n);
    elementwise::silu_backward(s, t, out.view(), dy.view(), x.view(), n).expect("launch");
    let expected: Vec<f64> = x_values
        .iter()
        .zip(&dy_values)
        .map(|(x, g)| {
            let sigmoid = 1.0 / (1.0 + (-x).exp());
            g * sigmoid * (1.0 + x * (1.0 - sigmoid))
        })
        .collect();
    let off = distance(&bench.read_half(&out), &expected);
    report.check(
        &format!("silu_backward {} {n}", name(t)),
        off,
        2.0 * rounding(t),
    );
}

fn drawing(bench: Bench<'_>, [b, c, h, w]: [usize; 4], report: &mut Report) {
    const ROWS: usize = 5;
    let Bench { s, t } = bench;
    let (latent, count) = (c * h * w, b * c * h * w);
    let (mean, deviation) = (
        numbers(1, ROWS * latent, 1.0),
        numbers(2, ROWS * latent, 0.5),
    );
    let pictures: Vec<u32> = (0..b as u32).map(|i| (3 * i + 4) % ROWS as u32).collect();
    let sigma: Vec<f32> = (0..b).map(|i| (i + 1) as f32 / (b + 2) as f32).collect();
    let seed = 0x0123_4567_89ab_cdefu64;
    let (x_t, target) = (bench.output(2 * count), bench.output(4 * count));
    let tables = [&mean, &deviation].map(|values| bench.upload(values));
    let (places, levels, seeds) = (
        bench.upload(&pictures),
        bench.upload(&sigma),
        bench.upload(&[seed]),
    );
    let sizes = LatentSizes {
        b,
        c,
        h,
        w,
        rows: ROWS,
    };
    draw::draw(
        s,
        t,
        x_t.view(),
        target.view(),
        tables[0].view(),
        tables[1].view(),
        places.view(),
        levels.view(),
        seeds.view(),
        sizes,
    )
    .expect("launch");
    let posterior = normals(seed, Purpose::Posterior, count);
    let noise = normals(seed, Purpose::Noise, count);
    let (mut mixed, mut velocity) = (Vec::new(), Vec::new());
    for sample in 0..b {
        let first = pictures[sample] as usize * latent;
        for (row, column) in (0..h)
            .step_by(2)
            .flat_map(|row| (0..w).step_by(2).map(move |column| (row, column)))
        {
            for (channel, k) in (0..c).flat_map(|channel| (0..4).map(move |k| (channel, k))) {
                let at = first + (channel * h + row + k / 2) * w + column + k % 2;
                let i = mixed.len();
                let (n, e) = (f64::from(posterior[i]), f64::from(noise[i]));
                let x = f64::from(mean[at]) + f64::from(deviation[at]) * n;
                let level = f64::from(sigma[sample]);
                mixed.push((1.0 - level) * x + level * e);
                velocity.push(e - x);
            }
        }
    }
    let label = format!("{} {b}x{c}x{h}x{w}", name(t));
    let off = distance(&bench.read_f32(&target), &velocity);
    report.check(&format!("drawn target {label}"), off, 1e-5);
    let off = distance(&bench.read_half(&x_t), &mixed);
    report.check(&format!("drawn mixture {label}"), off, rounding(t));
}

fn gathering(bench: Bench<'_>, b: usize, width: usize, report: &mut Report) {
    const ROWS: usize = 4;
    let Bench { s, t } = bench;
    let (table, values) = bench.half(&numbers(1, ROWS * width, 1.0));
    let rows: Vec<u32> = (0..b as u32).map(|i| (i + 3) % ROWS as u32).collect();
    let (places, out) = (bench.upload(&rows), bench.output(2 * b * width));
    let (to, from) = (out.view(), table.view());
    draw::gather(s, t, to, from, places.view(), b, ROWS, width).expect("launch");
    let expected: Vec<f64> = rows
        .iter()
        .flat_map(|row| values[*row as usize * width..][..width].to_vec())
        .collect();
    let off = distance(&bench.read_half(&out), &expected);
    report.check(&format!("gather {} {b}x{width}", name(t)), off, 0.0);
}

fn optimiser(bench: Bench<'_>, n: usize, report: &mut Report) {
    let Bench { s, t } = bench;
    let config = AverageConfig {
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        ema_decay: 0.99,
    };
    let mut values = numbers(1, n, 1.0);
    let (mut first, mut averaged) = (numbers(2, n, 0.1), numbers(3, n, 1.0));
    let mut second: Vec<f32> = numbers(4, n, 0.1).iter().map(|v| v * v).collect();
    let gradients = numbers(5, n, 1.0);
    let numbers: [f32; NUMBERS] = config.numbers(6, 3e-3);
    let buffers = [&values, &first, &second, &averaged].map(|values| bench.upload(values));
    let (shadow, gradient) = (bench.output(2 * n), bench.upload(&gradients));
    let (factor, device_numbers) = (bench.upload(&[0.3f32]), bench.upload(&numbers));
    let state = Averaged {
        values: buffers[0].view(),
        first: buffers[1].view(),
        second: buffers[2].view(),
        averaged: buffers[3].view(),
        shadow: shadow.view(),
    };
    // The second call is one that a flag forbids.
    for flag in [0u32, 1] {
        let flag = bench.upload(&[flag]);
        average::adamw_average(
            s,
            t,
            &state,
            gradient.view(),
            factor.view(),
            flag.view(),
            device_numbers.view(),
            n,
        )
        .expect("launch");
        s.synchronize().expect("it ran");
    }
    let [b1, r1, b2, r2, c2, epsilon, rate, kept, decay, rest] = numbers;
    for i in 0..n {
        let g = gradients[i] * 0.3;
        first[i] = first[i] * b1 + g * r1;
        second[i] = second[i] * b2 + g * g * r2;
        let root = (second[i] / c2).sqrt() + epsilon;
        values[i] = values[i] * kept - first[i] / root * rate;
        averaged[i] = averaged[i] * decay + values[i] * rest;
    }
    let expected = [&values, &first, &second, &averaged];
    for (i, what) in ["values", "first", "second", "average"]
        .into_iter()
        .enumerate()
    {
        let wide: Vec<f64> = expected[i].iter().map(|v| f64::from(*v)).collect();
        let off = distance(&bench.read_f32(&buffers[i]), &wide);
        let label = format!("adamw_average's {what} {} {n}", name(t));
        report.check(&label, off, 1e-6);
    }
    let rounded: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
    let off = distance(&bench.read_half(&shadow), &rounded);
    let label = format!("adamw_average's 16 bits {} {n}", name(t));
    report.check(&label, off, rounding(t));
}

fn norm_weights(bench: Bench<'_>, shape: HeadShape, report: &mut Report) {
    let Bench { s, t } = bench;
    let HeadShape {
        b,
        n,
        n_total,
        token_offset,
        h,
        dh,
        in_stride,
        out_stride,
    } = shape;
    let d = h * dh;
    let (qkv, x) = bench.half(&numbers(1, b * n * in_stride, 1.0));
    let weight = |seed| -> Vec<f32> { numbers(seed, dh, 0.3).iter().map(|w| w + 1.0).collect() };
    let weights = [bench.half(&weight(2)), bench.half(&weight(3))];
    let angles: Vec<f32> = numbers(4, n_total * dh / 2, 3.0);
    let table =
        |f: fn(f32) -> f32| -> Vec<f32> { angles.iter().flat_map(|a| [f(*a); 2]).collect() };
    let (cos_values, sin_values) = (table(f32::cos), table(f32::sin));
    let (cos, sin) = (bench.upload(&cos_values), bench.upload(&sin_values));
    let gradients = [5, 6, 7].map(|seed| bench.half(&numbers(seed, b * n_total * out_stride, 1.0)));
    let outputs = [(); 2].map(|()| bench.output(2 * b * n * in_stride));
    let dw = [(); 2].map(|()| bench.output(4 * dh));
    let bias = bench.output(4 * 3 * d);
    let partials = bench.output(4 * rope::sums_len(&shape));
    let [dq, dk, dv] = gradients.each_ref().map(|(g, _)| g.view());
    let [wq, wk] = weights.each_ref().map(|(w, _)| w.view());
    let (cos, sin) = (cos.view(), sin.view());
    let plain = outputs[0].view();
    rope::qk_norm_rope_backward(
        s,
        t,
        plain,
        dq,
        dk,
        dv,
        qkv.view(),
        wq,
        wk,
        cos,
        sin,
        shape,
        EPS,
    )
    .expect("launch");
    rope::qk_norm_rope_backward_sums(
        s,
        t,
        outputs[1].view(),
        dw.each_ref().map(|w| w.view()),
        bias.view(),
        [dq, dk, dv],
        qkv.view(),
        [wq, wk],
        cos,
        sin,
        partials.view(),
        shape,
        EPS,
    )
    .expect("launch");
    bench.read::<f32>(&partials);
    let label = format!("{} b{b} h{h} dh{dh}", name(t));
    let written = outputs.each_ref().map(|output| {
        let values = bench.read_half(output);
        let rows = values.chunks_exact(in_stride);
        rows.flat_map(|row| row[..3 * d].to_vec())
            .collect::<Vec<f64>>()
    });
    let off = distance(&written[1], &written[0]);
    report.check(
        &format!("rope with sums against without {label}"),
        off,
        rounding(t),
    );
    let mut expected = vec![0.0; 3 * d];
    for row in written[0].chunks_exact(3 * d) {
        expected.iter_mut().zip(row).for_each(|(sum, v)| *sum += v);
    }
    let off = distance(&bench.read_f32(&bias), &expected);
    report.check(
        &format!("gradient of the bias before the head norms {label}"),
        off,
        2.0 * rounding(t),
    );
    for part in 0..2 {
        let mut expected = vec![0.0; dh];
        for row in 0..b * n {
            let position = token_offset + row % n;
            let out_row = (row / n * n_total + position) * out_stride;
            for head in 0..h {
                let x = &x[row * in_stride + part * d + head * dh..][..dh];
                let g = &gradients[part].1[out_row + head * dh..][..dh];
                let squares = x.iter().map(|v| v * v).sum::<f64>() / dh as f64;
                let r = (squares + f64::from(EPS)).sqrt().recip();
                for i in 0..dh {
                    let c = f64::from(cos_values[position * dh + i]);
                    let s = f64::from(sin_values[position * dh + i]);
                    let turned = match i % 2 {
                        0 => g[i] * c + g[i + 1] * s,
                        _ => g[i] * c - g[i - 1] * s,
                    };
                    expected[i] += turned * x[i] * r;
                }
            }
        }
        let off = distance(&bench.read_f32(&dw[part]), &expected);
        let which = ["queries", "keys"][part];
        report.check(
            &format!("gradient of the norm's weight of {which} {label}"),
            off,
            1e-5,
        );
    }
}
