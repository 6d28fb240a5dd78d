//! Noise, loss and sampler step against `f32` and `f64` on the host.

use engine_cuda::ops::loss;
use engine_cuda::{Half, Stream};

use crate::report::Report;
use crate::support::{Bench, bits, differing, distance, name, numbers, rounding};

/// Runs all of them.
pub fn run(s: &Stream, report: &mut Report) {
    for t in [Half::Bf16, Half::F16] {
        for (b, per_sample) in [(3, 8), (2, 1000), (4, 4096)] {
            let bench = Bench { s, t };
            let label = format!("{} {b}x{per_sample}", name(t));
            noise_and_loss(bench, b, per_sample, &label, report);
            for copies in [1, 2] {
                euler(bench, b * per_sample, copies, &label, report);
            }
        }
    }
}

fn noise_and_loss(bench: Bench<'_>, b: usize, per_sample: usize, label: &str, report: &mut Report) {
    let Bench { s, t } = bench;
    let n = b * per_sample;
    let (x0, eps) = (numbers(1, n, 1.0), numbers(2, n, 1.0));
    let sigma: Vec<f32> = (0..b).map(|i| (i + 1) as f32 / (b + 1) as f32).collect();
    let (x_t, target) = (bench.output(2 * n), bench.output(4 * n));
    let [d_x0, d_eps, d_sigma] = [&x0, &eps, &sigma].map(|values| bench.upload(values));
    let [v_x0, v_eps, v_sigma] = [d_x0.view(), d_eps.view(), d_sigma.view()];
    let (out, target_view) = (x_t.view(), target.view());
    loss::noise_mix(s, t, out, target_view, v_x0, v_eps, v_sigma, b, per_sample).expect("launch");
    let mixed: Vec<f32> = (0..n)
        .map(|i| {
            let sigma = sigma[i / per_sample];
            (1.0 - sigma) * x0[i] + sigma * eps[i]
        })
        .collect();
    let apart = differing(&bench.read::<u16>(&x_t), &t.from_f32(&mixed));
    report.check(&format!("noise_mix {label}"), apart, 0.0);
    let velocity: Vec<f32> = eps.iter().zip(&x0).map(|(e, x)| e - x).collect();
    let found: Vec<f32> = bench.read(&target);
    let apart = differing(&bits(&found), &bits(&velocity));
    report.check(&format!("target {label}"), apart, 0.0);

    let (prediction, p) = bench.half(&numbers(3, n, 1.0));
    let weights: Vec<f32> = (0..b).map(|i| 0.5 + i as f32).collect();
    let weight = bench.upload(&weights);
    let (sum, gradient) = (bench.upload(&[2.0f32]), bench.output(2 * n));
    let partials = bench.output(4 * loss::LOSS_PARTIALS);
    loss::weighted_mse(
        s,
        t,
        sum.view(),
        gradient.view(),
        prediction.view(),
        target.view(),
        weight.view(),
        partials.view(),
        b,
        per_sample,
        n,
        5.0,
    )
    .expect("launch");
    let error = |i: usize| p[i] - f64::from(velocity[i]);
    let weight = |i: usize| f64::from(weights[i / per_sample]);
    let expected = 2.0 + (0..n).map(|i| weight(i) * error(i).powi(2)).sum::<f64>() / n as f64;
    let distance_of_loss = distance(&bench.read_f32(&sum), &[expected]);
    report.check(&format!("weighted_mse {label}"), distance_of_loss, 1e-6);
    let expected: Vec<f64> = (0..n)
        .map(|i| 10.0 * weight(i) * error(i) / n as f64)
        .collect();
    let found = distance(&bench.read_half(&gradient), &expected);
    report.check(&format!("gradient of the loss {label}"), found, rounding(t));
}

fn euler(bench: Bench<'_>, n: usize, copies: usize, label: &str, report: &mut Report) {
    let Bench { s, t } = bench;
    let start = numbers(4, n, 1.0);
    let (velocity, v) = bench.half(&numbers(5, copies * n, 1.0));
    let (sample, input) = (bench.upload(&start), bench.output(2 * copies * n));
    let [step, scale] = [-0.07f32, 4.5];
    let coefficients = bench.upload(&[step, scale]);
    let (velocity, coefficients) = (velocity.view(), coefficients.view());
    loss::euler_cfg(
        s,
        t,
        sample.view(),
        input.view(),
        velocity,
        coefficients,
        n,
        copies,
    )
    .expect("launch");
    let expected: Vec<f32> = (0..n)
        .map(|i| {
            let first = v[i] as f32;
            let guided = match copies {
                1 => first,
                _ => v[n + i] as f32 + (first - v[n + i] as f32) * scale,
            };
            start[i] + guided * step
        })
        .collect();
    let found: Vec<f32> = bench.read(&sample);
    let apart = differing(&bits(&found), &bits(&expected));
    report.check(&format!("euler_cfg {copies} {label}"), apart, 0.0);
    let copied = t.from_f32(&expected).repeat(copies);
    let apart = differing(&bench.read::<u16>(&input), &copied);
    report.check(&format!("euler_cfg's input {copies} {label}"), apart, 0.0);
}
