//! Attention forward and backward, in every form that the device has, against f64; the same bits twice; nothing written
//! between rows. Queries, keys and values are slices of one `[b, n, 3·h·dh]` tensor, as a fused projection leaves them.

use engine_cuda::ops::attention::{
    AttentionShape, Form, Strided, backward_as, backward_scratch_bytes, forward_as,
};
use engine_cuda::{Half, Stream};

use crate::report::Report;
use crate::support::{Bench, Guarded, differing, distance, name, numbers, rounding};

/// Elements between rows of the output, as in a single block, whose output lies beside the MLP's.
const GAP: usize = 64;

/// 16 bits of a poisoned output.
const POISONED: u16 = 0xFFFF;

/// Below this, a gradient that is zero in theory (one key) counts as zero.
const NOTHING: f64 = 1e-3;

/// Runs all of them.
pub fn run(s: &Stream, report: &mut Report) {
    let mut forms = vec![Form::Ampere];
    if Form::of(s) == Form::Hopper {
        forms.push(Form::Hopper);
    }
    for t in [Half::Bf16, Half::F16] {
        for (b, h, n, dh) in [
            (1, 1, 1, 64),
            (2, 3, 1, 128),
            (3, 2, 17, 64),
            (1, 5, 63, 128),
            (2, 1, 64, 64),
            (2, 2, 65, 128),
            (1, 3, 129, 64),
            (1, 2, 129, 128),
            (2, 2, 333, 64),
            (1, 1, 333, 128),
            (1, 1, 1536, 128),
        ] {
            let scale = (dh as f32).sqrt().recip();
            let shape = AttentionShape { b, h, n, dh, scale };
            one(Bench { s, t }, shape, &forms, report);
        }
    }
}

/// Where one head's rows lie in a tensor.
#[derive(Clone, Copy)]
struct Rows<'a> {
    values: &'a [f64],
    stride: usize,
    width: usize,
}

impl Rows<'_> {
    fn row(&self, token: usize) -> &[f64] {
        &self.values[token * self.stride..][..self.width]
    }

    fn dot(&self, token: usize, other: &[f64]) -> f64 {
        self.row(token).iter().zip(other).map(|(a, b)| a * b).sum()
    }
}

/// `Σ weight·row`.
fn weighted(weights: impl Iterator<Item = f64>, rows: Rows<'_>) -> Vec<f64> {
    let mut sum = vec![0.0; rows.width];
    for (token, weight) in weights.enumerate() {
        for (total, value) in sum.iter_mut().zip(rows.row(token)) {
            *total += weight * value;
        }
    }
    sum
}

/// Computes `one(token)` for every token, on as many threads as there are.
fn each<R: Send>(n: usize, one: impl Fn(usize) -> R + Sync) -> Vec<R> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = n.div_ceil(threads);
    std::thread::scope(|scope| {
        let one = &one;
        let workers: Vec<_> = (0..n.div_ceil(share))
            .map(|part| {
                scope.spawn(move || -> Vec<R> {
                    (part * share..((part + 1) * share).min(n))
                        .map(one)
                        .collect()
                })
            })
            .collect();
        workers
            .into_iter()
            .flat_map(|worker| worker.join().expect("a reference does not panic"))
            .collect()
    })
}

/// One head's o, dq, dk, dv (`[n][dh]`) and lse.
struct Head {
    results: [Vec<Vec<f64>>; 4],
    lse: Vec<f64>,
}

fn reference(q: Rows<'_>, k: Rows<'_>, v: Rows<'_>, d_o: Rows<'_>, n: usize, scale: f64) -> Head {
    struct Query {
        p: Vec<f64>,
        ds: Vec<f64>,
        lse: f64,
        o: Vec<f64>,
        dq: Vec<f64>,
    }
    let queries = each(n, |i| {
        let scores: Vec<f64> = (0..n).map(|j| scale * k.dot(j, q.row(i))).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = largest + scores.iter().map(|s| (s - largest).exp()).sum::<f64>().ln();
        let p: Vec<f64> = scores.iter().map(|s| (s - lse).exp()).collect();
        let o = weighted(p.iter().copied(), v);
        let delta = d_o.dot(i, &o);
        let ds: Vec<f64> = (0..n)
            .map(|j| scale * p[j] * (v.dot(j, d_o.row(i)) - delta))
            .collect();
        let dq = weighted(ds.iter().copied(), k);
        Query { p, ds, lse, o, dq }
    });
    let dk = each(n, |j| weighted(queries.iter().map(|query| query.ds[j]), q));
    let dv = each(n, |j| weighted(queries.iter().map(|query| query.p[j]), d_o));
    let lse = queries.iter().map(|query| query.lse).collect();
    let (o, dq) = queries.into_iter().map(|query| (query.o, query.dq)).unzip();
    Head {
        results: [o, dq, dk, dv],
        lse,
    }
}

fn one(bench: Bench<'_>, shape: AttentionShape, forms: &[Form], report: &mut Report) {
    let Bench { s, t } = bench;
    let AttentionShape { b, h, n, dh, scale } = shape;
    let d = h * dh;
    let (fused, separate) = (3 * d, d + GAP);
    let (qkv, qkv_values) = bench.half(&numbers(1, b * n * fused, 1.0));
    let (d_o, do_values) = bench.half(&numbers(2, b * n * separate, 1.0));
    let place = |tensor: &Guarded, part: usize, token: usize| Strided {
        view: tensor.view().elements_from(part * d),
        token,
        head: dh,
        batch: n * token,
    };

    let (mut expected, mut sums) = ([const { Vec::new() }; 4], Vec::new());
    for sample in 0..b {
        for head in 0..h {
            let rows = |values, stride, part| {
                let values: &[f64] = values;
                Rows {
                    values: &values[sample * n * stride + part * d + head * dh..],
                    stride,
                    width: dh,
                }
            };
            let [q, k, v] = [0, 1, 2].map(|part| rows(&qkv_values, fused, part));
            let found = reference(q, k, v, rows(&do_values, separate, 0), n, f64::from(scale));
            for (all, rows) in expected.iter_mut().zip(found.results) {
                all.push(rows.concat());
            }
            sums.extend(found.lse);
        }
    }

    for form in forms {
        let compute = || {
            let (o, gradients) = (
                bench.output(2 * b * n * separate),
                bench.output(2 * b * n * fused),
            );
            let lse = bench.output(4 * b * h * n);
            let scratch = bench.output(backward_scratch_bytes(&shape));
            let [q, k, v] = [0, 1, 2].map(|part| place(&qkv, part, fused));
            let [dq, dk, dv] = [0, 1, 2].map(|part| place(&gradients, part, fused));
            let o_place = place(&o, 0, separate);
            forward_as(*form, s, t, o_place, lse.view(), q, k, v, shape).expect("forward");
            let d_o = place(&d_o, 0, separate);
            backward_as(
                *form,
                s,
                t,
                dq,
                dk,
                dv,
                d_o,
                o_place,
                lse.view(),
                q,
                k,
                v,
                scratch.view(),
                shape,
            )
            .expect("backward");
            bench.read::<u8>(&scratch); // compares its guards
            let [o_bits, gradient_bits] = [&o, &gradients].map(|tensor| bench.read::<u16>(tensor));
            (o_bits, gradient_bits, bench.read::<f32>(&lse))
        };
        let (o, gradients, lse) = compute();
        let label = |what: &str| {
            format!(
                "attention {form:?} {what} {} b {b} h {h} n {n} dh {dh}",
                name(t)
            )
        };

        // One head after the other, as the reference has them.
        let gather = |bits: &[u16], stride: usize, part: usize| -> Vec<f64> {
            let values = t.to_f32(bits);
            let mut heads = Vec::with_capacity(b * n * d);
            for sample in 0..b {
                for head in 0..h {
                    for token in 0..n {
                        let at = (sample * n + token) * stride + part * d + head * dh;
                        heads.extend(values[at..at + dh].iter().map(|value| f64::from(*value)));
                    }
                }
            }
            heads
        };
        let found = [
            ("o", gather(&o, separate, 0)),
            ("dq", gather(&gradients, fused, 0)),
            ("dk", gather(&gradients, fused, 1)),
            ("dv", gather(&gradients, fused, 2)),
        ];
        for ((what, found), expected) in found.iter().zip(&expected) {
            let expected = expected.concat();
            let largest = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
            if largest < 1e-9 {
                let found = found
                    .iter()
                    .fold(0.0f64, |m, v| if v.is_nan() { *v } else { m.max(v.abs()) });
                report.check(&label(what), found, NOTHING);
            } else {
                // Probabilities, their gradients and the result are rounded, and o before that.
                report.check(&label(what), distance(found, &expected), 2.0 * rounding(t));
            }
        }
        let worst = lse
            .iter()
            .zip(&sums)
            .map(|(found, expected)| (f64::from(*found) - expected).abs())
            .fold(0.0, |m: f64, e| if e.is_nan() { e } else { m.max(e) });
        report.check(&label("lse"), worst, 1e-4);
        let gaps = o.chunks(separate).flat_map(|row| &row[d..]);
        let written = gaps.filter(|bits| **bits != POISONED).count();
        report.check(&label("gaps written"), written as f64, 0.0);

        let (o_again, gradients_again, lse_again) = compute();
        let changed = differing(&o, &o_again)
            + differing(&gradients, &gradients_again)
            + differing(&lse, &lse_again);
        report.check(&label("values that differ in a second run"), changed, 0.0);
    }
}
