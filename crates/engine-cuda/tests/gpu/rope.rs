//! Norm and rotation of heads: values and gradients against f64, at widths for both forms of the kernels.

use engine_cuda::ops::rope::{HeadShape, qk_norm_rope, qk_norm_rope_backward};
use engine_cuda::{Half, Stream};

use crate::report::Report;
use crate::support::{Bench, distance, name, numbers, rounding};

const EPS: f32 = 1e-6;

/// Runs all of them.
pub fn run(s: &Stream, report: &mut Report) {
    for t in [Half::Bf16, Half::F16] {
        for (b, n, n_total, token_offset, h, dh) in [
            (2, 5, 9, 4, 3, 64),
            (2, 5, 5, 0, 5, 128),
            (1, 3, 4, 0, 24, 128),
            (2, 5, 6, 1, 3, 28),
            (1, 4, 9, 5, 2, 16),
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
            one(Bench { s, t }, shape, report);
        }
    }
}

/// Norm and rotation of one head, and the gradient with respect to it of `Σ gradient·output`.
fn head(x: &[f64], w: &[f64], cos: &[f64], sin: &[f64], gradient: &[f64]) -> [Vec<f64>; 2] {
    let d = x.len();
    let r = (x.iter().map(|v| v * v).sum::<f64>() / d as f64 + f64::from(EPS))
        .sqrt()
        .recip();
    let (mut value, mut g) = (vec![0.0; d], vec![0.0; d]);
    for i in (0..d).step_by(2) {
        let (even, odd) = (x[i] * r * w[i], x[i + 1] * r * w[i + 1]);
        value[i] = even * cos[i] - odd * sin[i];
        value[i + 1] = odd * cos[i] + even * sin[i];
        g[i] = (gradient[i] * cos[i] + gradient[i + 1] * sin[i]) * w[i];
        g[i + 1] = (gradient[i + 1] * cos[i] - gradient[i] * sin[i]) * w[i + 1];
    }
    let product = g.iter().zip(x).map(|(g, x)| g * x).sum::<f64>() / d as f64 * r * r;
    let dx = g
        .iter()
        .zip(x)
        .map(|(g, x)| r * (g - x * product))
        .collect();
    [value, dx]
}

fn one(bench: Bench<'_>, shape: HeadShape, report: &mut Report) {
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
    let (cos, sin) = (table(f32::cos), table(f32::sin));
    let wide = |v: &[f32]| -> Vec<f64> { v.iter().map(|v| f64::from(*v)).collect() };
    let (cos_values, sin_values) = (wide(&cos), wide(&sin));
    let (cos, sin) = (bench.upload(&cos), bench.upload(&sin));
    let gradients = [5, 6, 7].map(|seed| bench.half(&numbers(seed, b * n_total * out_stride, 1.0)));

    let outputs = [(); 3].map(|()| bench.output(2 * b * n_total * out_stride));
    let dqkv = bench.output(2 * b * n * in_stride);
    let [q, k, v] = outputs.each_ref().map(|o| o.view());
    let [dq, dk, dv] = gradients.each_ref().map(|(g, _)| g.view());
    let [wq, wk] = weights.each_ref().map(|(w, _)| w.view());
    let (cos, sin) = (cos.view(), sin.view());
    qk_norm_rope(s, t, q, k, v, qkv.view(), wq, wk, cos, sin, shape, EPS).expect("launch");
    qk_norm_rope_backward(
        s,
        t,
        dqkv.view(),
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
    let found = outputs.each_ref().map(|o| bench.read_half(o));
    let found_gradient = bench.read_half(&dqkv);
    for part in 0..3 {
        let (mut values, mut expected) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
        for row in 0..b * n {
            let position = token_offset + row % n;
            let out_row = row / n * n_total + position;
            for head_index in 0..h {
                let input = row * in_stride + part * d + head_index * dh;
                let output = out_row * out_stride + head_index * dh;
                let gradient = &gradients[part].1[output..][..dh];
                let [value, dx] = match part {
                    2 => [x[input..][..dh].to_vec(), gradient.to_vec()],
                    _ => {
                        let at = position * dh;
                        let angles = [&cos_values[at..][..dh], &sin_values[at..][..dh]];
                        head(
                            &x[input..][..dh],
                            &weights[part].1,
                            angles[0],
                            angles[1],
                            gradient,
                        )
                    }
                };
                expected[0].extend(value);
                expected[1].extend(dx);
                values[0].extend_from_slice(&found[part][output..][..dh]);
                values[1].extend_from_slice(&found_gradient[input..][..dh]);
            }
        }
        for (what, index) in [("", 0), ("gradient of ", 1)] {
            let error = distance(&values[index], &expected[index]);
            let label = format!(
                "rope {what}{} {} h{h} dh{dh}",
                ["q", "k", "v"][part],
                name(t)
            );
            report.check(&label, error, rounding(t));
        }
    }
    // Columns and rows that are not this stream's.
    let touched = (0..b * n).any(|row| {
        found_gradient[row * in_stride + 3 * d..][..4 * d]
            .iter()
            .any(|v| !v.is_nan())
    });
    report.check(
        &format!("rope keeps to its columns {}", name(t)),
        f64::from(touched),
        0.0,
    );
}
