//! Modulated layer norm and gates: values and gradients against f64, fused forms against separate ones bit for bit.

use engine_cuda::ops::modulated::{self, Modulated};
use engine_cuda::{Half, Stream};

use crate::report::Report;
use crate::support::{Bench, differing, distance, name, numbers, rounding};

const EPS: f32 = 1e-6;

/// Runs all of them.
pub fn run(s: &Stream, report: &mut Report) {
    for t in [Half::Bf16, Half::F16] {
        // Beyond 4096 channels rows no longer stay in registers.
        for [b, n, d] in [
            [2, 7, 8],
            [3, 5, 200],
            [1, 3, 56],
            [2, 2, 3072],
            [1, 3, 4160],
        ] {
            one(Bench { s, t }, [b, n, d], report);
        }
    }
}

/// `n`, `1/σ` and the modulated norm of a row.
struct Row {
    n: Vec<f64>,
    r: f64,
}

fn normalise(x: &[f64]) -> Row {
    let d = x.len() as f64;
    let mean = x.iter().sum::<f64>() / d;
    let variance = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / d;
    let r = (variance + f64::from(EPS)).sqrt().recip();
    Row {
        n: x.iter().map(|v| (v - mean) * r).collect(),
        r,
    }
}

fn one(bench: Bench<'_>, [b, n, d]: [usize; 3], report: &mut Report) {
    let Bench { s, t } = bench;
    let (rows, stride) = (b * n, 3 * d);
    let label = format!("{} {b}x{n}x{d}", name(t));
    let (x, x_values) = bench.half(&numbers(1, rows * d, 1.5));
    let (dy, dy_values) = bench.half(&numbers(2, rows * d, 1.0));
    let (y, y_values) = bench.half(&numbers(3, rows * d, 1.0));
    let (before, before_values) = bench.half(&numbers(4, rows * d, 1.0));
    let (modulation, modulation_values) = bench.f32(&numbers(5, b * stride, 0.5));
    let [shift, scale, gate] = [0, d, 2 * d].map(|at| modulation.view().skip(4 * at));
    let m = Modulated {
        b,
        tokens: n,
        d,
        stride,
        trained: false,
    };
    let vector = |row: usize, at: usize| &modulation_values[row / n * stride + at..][..d];

    let (mut value, mut gradient, mut sum) = (Vec::new(), Vec::new(), Vec::new());
    for row in 0..rows {
        let part = |values: &[f64]| values[row * d..][..d].to_vec();
        let Row { n: normed, r } = normalise(&part(&x_values));
        let (shift, scale, gate) = (vector(row, 0), vector(row, d), vector(row, 2 * d));
        value.extend((0..d).map(|i| normed[i] * (1.0 + scale[i]) + shift[i]));
        let g: Vec<f64> = part(&dy_values)
            .iter()
            .zip(scale)
            .map(|(g, scale)| g * (1.0 + scale))
            .collect();
        let mean = g.iter().sum::<f64>() / d as f64;
        let product = g.iter().zip(&normed).map(|(g, n)| g * n).sum::<f64>() / d as f64;
        gradient.extend((0..d).map(|i| r * (g[i] - mean - normed[i] * product)));
        let (residual, update) = (part(&x_values), part(&y_values));
        sum.extend((0..d).map(|i| residual[i] + gate[i] * update[i]));
    }

    let half = || bench.output(2 * rows * d);
    let stats = bench.output(8 * rows);
    let vectors = [shift, scale];
    // Rows of any width have the wide form where statistics are not kept, and narrow rows another where they are.
    for stats in [None, Some(stats.view())] {
        let out = half();
        modulated::norm(s, t, out.view(), stats, x.view(), vectors, m, EPS).expect("launch");
        let error = distance(&bench.read_half(&out), &value);
        report.check(&format!("norm {label}"), error, rounding(t));
    }

    let added: Vec<f64> = gradient
        .iter()
        .zip(&before_values)
        .map(|(g, b)| g + b)
        .collect();
    let dx = bench.upload(&bench.read::<u16>(&before));
    for (accumulate, stats, expected) in [
        (false, None, &gradient),
        (false, Some(stats.view()), &gradient),
        (true, None, &added),
    ] {
        s.upload(dx.view(), &bench.read::<u16>(&before))
            .expect("upload");
        let (to, from, of) = (dx.view(), dy.view(), (x.view(), stats));
        modulated::norm_backward(s, t, to, from, of, scale, None, m, EPS, accumulate)
            .expect("launch");
        let error = distance(&bench.read_half(&dx), expected);
        report.check(&format!("norm_backward {label}"), error, rounding(t));
    }

    let gated = half();
    modulated::gate_backward(s, t, gated.view(), dy.view(), gate, None, m).expect("launch");
    let expected: Vec<f64> = (0..rows * d)
        .map(|i| vector(i / d, 2 * d)[i % d] * dy_values[i])
        .collect();
    let error = distance(&bench.read_half(&gated), &expected);
    report.check(&format!("gate_backward {label}"), error, rounding(t));

    let bits = |buffer| bench.read::<u16>(buffer);
    let (separate, normed, fused_sum, fused) = (half(), half(), half(), half());
    let [x, y, sum_view] = [&x, &y, &separate].map(|buffer| buffer.view());
    modulated::gate(s, t, sum_view, x, gate, y, m, false).expect("launch");
    let error = distance(&bench.read_half(&separate), &sum);
    report.check(&format!("gate {label}"), error, rounding(t));
    modulated::norm(s, t, normed.view(), None, sum_view, vectors, m, EPS).expect("launch");
    let outputs = [fused_sum.view(), fused.view()];
    modulated::gate_and_norm(s, t, outputs, None, x, gate, y, vectors, m, EPS).expect("launch");
    let apart =
        differing(&bits(&fused_sum), &bits(&separate)) + differing(&bits(&fused), &bits(&normed));
    report.check(&format!("fused gate and norm {label}"), apart, 0.0);
}
