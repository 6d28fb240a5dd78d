//! Activations, sums, conversions and sinusoids against f64.

use engine_cuda::ops::elementwise;
use engine_cuda::ops::modulated::{self, Modulated};
use engine_cuda::{Half, Stream};

use crate::report::Report;
use crate::support::{Bench, bits, differing, distance, name, numbers, rounding};

/// Runs all of them.
pub fn run(s: &Stream, report: &mut Report) {
    for t in [Half::Bf16, Half::F16] {
        let bench = Bench { s, t };
        for (rows, cols, in_stride, out_stride) in
            [(3, 8, 8, 8), (5, 104, 112, 120), (2, 12288, 21504, 15360)]
        {
            gelu(bench, [rows, cols, in_stride, out_stride], report);
        }
        for n in [5, 8, 13, 5003] {
            flat(bench, n, report);
        }
        sinusoids(bench, report);
        clip(bench, report);
        normal(bench, report);
    }
}

fn gelu(bench: Bench<'_>, [rows, cols, in_stride, out_stride]: [usize; 4], report: &mut Report) {
    let Bench { s, t } = bench;
    let (x, x_values) = bench.half(&numbers(1, rows * in_stride, 3.0));
    let (dy, dy_values) = bench.half(&numbers(2, rows * out_stride, 1.0));
    let (out, dx) = (
        bench.output(2 * rows * out_stride),
        bench.output(2 * rows * in_stride),
    );
    elementwise::gelu_tanh(
        s,
        t,
        out.view(),
        x.view(),
        rows,
        cols,
        out_stride,
        in_stride,
    )
    .expect("launch");
    elementwise::gelu_tanh_backward(
        s,
        t,
        dx.view(),
        dy.view(),
        x.view(),
        rows,
        cols,
        in_stride,
        out_stride,
        in_stride,
    )
    .expect("launch");
    let (found, found_dx) = (bench.read_half(&out), bench.read_half(&dx));
    let mut lists = [(); 4].map(|()| Vec::new());
    for row in 0..rows {
        for i in 0..cols {
            let x = x_values[row * in_stride + i];
            let u = 0.797_884_560_802_865_4 * (x + 0.044_715 * x.powi(3));
            let slope_u = 0.797_884_560_802_865_4 * (1.0 + 3.0 * 0.044_715 * x * x);
            let slope = 0.5 * (1.0 + u.tanh()) + 0.5 * x * (1.0 - u.tanh().powi(2)) * slope_u;
            lists[0].push(found[row * out_stride + i]);
            lists[1].push(0.5 * x * (1.0 + u.tanh()));
            lists[2].push(found_dx[row * in_stride + i]);
            lists[3].push(dy_values[row * out_stride + i] * slope);
        }
    }
    let [value, expected, gradient, expected_gradient] = &lists;
    let label = format!("{} {rows}x{cols}", name(t));
    report.check(
        &format!("gelu {label}"),
        distance(value, expected),
        rounding(t),
    );
    let error = distance(gradient, expected_gradient);
    report.check(&format!("gelu backward {label}"), error, rounding(t));
}

fn flat(bench: Bench<'_>, n: usize, report: &mut Report) {
    let Bench { s, t } = bench;
    let label = format!("{} {n}", name(t));
    let (x, x_values) = bench.half(&numbers(3, n, 3.0));
    let (y, y_values) = bench.f32(&numbers(4, n, 3.0));
    let out = bench.output(2 * n);
    let (wide, rounded) = (bench.output(4 * n), bench.output(2 * n));
    let halves = [out.view(), rounded.view()];
    elementwise::silu(s, t, wide.view(), halves, y.view(), n).expect("launch");
    let expected: Vec<f64> = y_values.iter().map(|y| y / (1.0 + (-y).exp())).collect();
    let error = distance(&bench.read_f32(&wide), &expected);
    report.check(&format!("silu {label}"), error, 1e-6);
    let apart = |half, wide: Vec<f64>| {
        let wide: Vec<f32> = wide.into_iter().map(|value| value as f32).collect();
        differing(&bench.read::<u16>(half), &t.from_f32(&wide))
    };
    let apart = apart(&out, bench.read_f32(&wide)) + apart(&rounded, y_values);
    report.check(&format!("silu in 16 bits {label}"), apart, 0.0);

    elementwise::to_f32(s, t, wide.view(), x.view(), n).expect("launch");
    report.check(
        &format!("to_f32 {label}"),
        differing(&bench.read_f32(&wide), &x_values),
        0.0,
    );
    let values = numbers(5, n, 50.0);
    let source = bench.upload(&values);
    elementwise::to_half(s, t, out.view(), source.view(), n).expect("launch");
    let apart = differing(&bench.read::<u16>(&out), &t.from_f32(&values));
    report.check(&format!("to_half {label}"), apart, 0.0);
}

fn sinusoids(bench: Bench<'_>, report: &mut Report) {
    let times = [0.0, 1.0, 37.5, 999.0, 1000.0f32];
    let source = bench.upload(&times);
    let (wide, out) = (bench.output(4 * 5 * 256), bench.output(2 * 5 * 256));
    let (to, half) = (wide.view(), out.view());
    elementwise::sinusoids(bench.s, bench.t, to, half, source.view(), 5).expect("launch");
    let expected: Vec<f64> = mmdit::embed::sinusoids(&times)
        .into_iter()
        .map(f64::from)
        .collect();
    let label = name(bench.t);
    let error = distance(&bench.read_f32(&wide), &expected);
    report.check(&format!("sinusoids {label}"), error, 1e-5);
    let error = distance(&bench.read_half(&out), &expected);
    report.check(
        &format!("sinusoids in 16 bits {label}"),
        error,
        rounding(bench.t),
    );
}

fn clip(bench: Bench<'_>, report: &mut Report) {
    let (x, _) = bench.half(&[60_000.0; 8]);
    let (gate, _) = bench.f32(&[2.0; 8]);
    let out = bench.output(16);
    let (x, gate) = (x.view(), gate.view());
    let m = Modulated {
        b: 1,
        tokens: 1,
        d: 8,
        stride: 8,
        trained: false,
    };
    modulated::gate(bench.s, bench.t, out.view(), x, gate, x, m, true).expect("launch");
    let largest = bench.t.to_f32(&bench.t.from_f32(&[65_504.0]))[0];
    let expected = [f64::from(largest); 8];
    report.check(
        &format!("clip {}", name(bench.t)),
        distance(&bench.read_half(&out), &expected),
        0.0,
    );
}

fn normal(bench: Bench<'_>, report: &mut Report) {
    let n = 1_000_003;
    let out = bench.output(2 * n);
    elementwise::fill_normal(bench.s, bench.t, out.view(), n, 7, 0.02).expect("launch");
    let values = bench.read_half(&out);
    let moment = |power| values.iter().map(|v| (v / 0.02).powi(power)).sum::<f64>() / n as f64;
    report.check("mean of normal numbers", moment(1).abs(), 4e-3);
    report.check("variance of normal numbers", (moment(2) - 1.0).abs(), 8e-3);
    report.check("kurtosis of normal numbers", (moment(4) - 3.0).abs(), 6e-2);
    let values: Vec<f32> = values.into_iter().map(|v| v as f32).collect();
    let again = bench.output(2 * n);
    elementwise::fill_normal(bench.s, bench.t, again.view(), n, 7, 0.02).expect("launch");
    let again: Vec<f32> = bench
        .read_half(&again)
        .into_iter()
        .map(|v| v as f32)
        .collect();
    report.check(
        "normal numbers repeat",
        differing(&bits(&values), &bits(&again)),
        0.0,
    );
}
