//! NF4 on the device against [`quant::Nf4`], bit for bit; and products of f32 rows with weights against sums in f64.

use engine_cuda::ops::nf4::{self, Absmax, Source};
use engine_cuda::ops::product_rows::{self, RowsWeight};
use engine_cuda::{Half, Stream};
use quant::{Nf4, Scales, StoredFloat};

use crate::report::Report;
use crate::support::{Bench, bits, differing, distance, name, numbers};

/// A count of weights that are all zero: a full block of scales and a short one.
const ALL_ZERO: usize = 64 * 257;

/// Ragged tails, odd counts, and enough blocks for two blocks of scales.
const COUNTS: [usize; 10] = [1, 7, 63, 64, 65, 130, 8192, 12_801, ALL_ZERO, 32_805];

/// Runs all of them.
pub fn run(s: &Stream, report: &mut Report) {
    for t in [Half::Bf16, Half::F16] {
        for n in COUNTS {
            for source in [Source::F32, Source::Half(t)] {
                one(Bench { s, t }, n, source, report);
            }
        }
        for (rows, n, k) in [
            (1, 5, 8),
            (2, 33, 200),
            (3, 70, 3072),
            (4, 1, 264),
            (4, 517, 1000),
            (19, 37, 520),
            (3, 21, 100),
        ] {
            product(Bench { s, t }, [rows, n, k], report);
        }
        counts_what_is_not_finite(Bench { s, t }, report);
    }
}

/// Weights with a block of zeros of both signs, one of values on and beside the thresholds, and blocks of subnormal
/// values: the smallest divisor, 1e-38, lies among them.
fn weights(n: usize) -> Vec<f32> {
    if n == ALL_ZERO {
        return vec![0.0; n];
    }
    let mut values = numbers(n as u64, n, 0.02);
    if n >= 8192 {
        values[64..128].fill(0.0);
        values[65..100].fill(-0.0);
        for (i, pair) in quant::nf4::VALUES.windows(2).enumerate() {
            let middle = (pair[0] + pair[1]) / 2.0;
            values[128 + 3 * i] = middle;
            values[129 + 3 * i] = middle.next_up();
            values[130 + 3 * i] = middle.next_down();
        }
        values[191] = 1.0;
        for (block, largest) in [(4, 1.1e-38), (5, 9e-39), (6, 3e-41)] {
            for i in 0..64 {
                values[64 * block + i] = largest * (i as f32 / 31.5 - 1.0);
            }
        }
    }
    values
}

fn one(bench: Bench<'_>, n: usize, source: Source, report: &mut Report) {
    let Bench { s, t } = bench;
    let label = format!("{} {source:?} {n}", name(t));
    let values = weights(n);
    let (x, values) = match source {
        Source::F32 => (bench.upload(&values), values),
        Source::Half(_) => {
            let (x, rounded) = bench.half(&values);
            (x, rounded.into_iter().map(|v| v as f32).collect())
        }
    };
    let stored = match t {
        Half::Bf16 => StoredFloat::Bf16,
        Half::F16 => StoredFloat::F16,
    };
    let reference = Nf4::quantize(&values, stored).expect("finite");
    let Scales::Plain(scales) = reference.scales().clone() else {
        unreachable!("not yet doubly quantised")
    };
    let num_blocks = scales.len();
    let (packed, absmax) = (bench.output(n.div_ceil(2)), bench.output(4 * num_blocks));
    let not_finite = bench.upload(&[0u32]);
    nf4::quantise(
        s,
        packed.view(),
        absmax.view(),
        not_finite.view(),
        x.view(),
        source,
        n,
    )
    .expect("launch");
    let apart = differing(&bench.read::<u8>(&packed), reference.packed())
        + differing(&bits(&bench.read::<f32>(&absmax)), &bits(&scales));
    report.check(&format!("nf4 quantise {label}"), apart, 0.0);

    let out = bench.output(2 * n);
    let dequantise = |absmax, reference: &Nf4| {
        nf4::dequantise(s, t, out.view(), packed.view(), absmax, n).expect("launch");
        let expected = t.from_f32(&reference.dequantize());
        differing(&bench.read::<u16>(&out), &expected)
    };
    let plain = Absmax::Plain {
        absmax: absmax.view(),
    };
    let apart = dequantise(plain, &reference);
    report.check(&format!("nf4 dequantise {label}"), apart, 0.0);

    let reference = reference.double_quantized();
    let Scales::Double { centred, offset } = reference.scales() else {
        unreachable!("doubly quantised")
    };
    let codes = bench.output(num_blocks);
    let nested = bench.output(4 * num_blocks.div_ceil(256));
    let (mean, scratch) = (bench.output(4), bench.output(nf4::DOUBLE_SCRATCH));
    nf4::double_quantise(
        s,
        codes.view(),
        nested.view(),
        mean.view(),
        absmax.view(),
        scratch.view(),
        num_blocks,
    )
    .expect("launch");
    let apart = differing(&bench.read::<u8>(&codes), centred.codes())
        + differing(&bits(&bench.read::<f32>(&nested)), &bits(centred.absmax()))
        + differing(&bits(&bench.read::<f32>(&mean)), &bits(&[*offset]));
    report.check(&format!("nf4 double quantise {label}"), apart, 0.0);
    let double = Absmax::Double {
        codes: codes.view(),
        absmax: nested.view(),
        offset: mean.view(),
    };
    let apart = dequantise(double, &reference);
    report.check(&format!("nf4 dequantise double {label}"), apart, 0.0);
}

/// A few rows times weights in T and of both kinds of scales, into a wider matrix; twice, so that it is added to.
fn product(bench: Bench<'_>, [rows, n, k]: [usize; 3], report: &mut Report) {
    let Bench { s, t } = bench;
    let stored = match t {
        Half::Bf16 => StoredFloat::Bf16,
        Half::F16 => StoredFloat::F16,
    };
    let values = numbers(1, n * k, 0.02);
    let (half, _) = bench.half(&values);
    let mut forms = vec![("half", RowsWeight::Half(half.view()), values.clone())];
    let quantised = || Nf4::quantize(&values, stored).expect("finite");
    let (plain, double) = (quantised(), quantised().double_quantized());
    let packed = bench.upload(plain.packed());
    let (x, x_values) = bench.f32(&numbers(2, rows * k, 1.0));
    let (bias, bias_values) = bench.half(&numbers(3, n, 0.1));
    let Scales::Plain(scales) = plain.scales() else {
        unreachable!("not yet doubly quantised")
    };
    let Scales::Double { centred, offset } = double.scales() else {
        unreachable!("doubly quantised")
    };
    let (scales, codes) = (bench.upload(scales), bench.upload(centred.codes()));
    let (nested, offset) = (bench.upload(centred.absmax()), bench.upload(&[*offset]));
    let double_scales = Absmax::Double {
        codes: codes.view(),
        absmax: nested.view(),
        offset: offset.view(),
    };
    let plain_scales = Absmax::Plain {
        absmax: scales.view(),
    };
    if k.is_multiple_of(8) {
        let packed = packed.view();
        let nf4 = |absmax| RowsWeight::Nf4 { packed, absmax };
        forms.push(("nf4", nf4(plain_scales), plain.dequantize()));
        forms.push(("nf4 double", nf4(double_scales), double.dequantize()));
    }
    for (what, weight, weights) in forms {
        let weights: Vec<f32> = t.to_f32(&t.from_f32(&weights));
        let stride = n + 3;
        let out = bench.upload(&vec![0f32; rows * stride]);
        let to = (out.view(), stride);
        let (x, bias) = (x.view(), bias.view());
        for accumulate in [false, true] {
            product_rows::product(s, t, to, x, weight, bias, [rows, n, k], accumulate)
                .expect("launch");
        }
        let mut expected = vec![0.0; rows * stride];
        for row in 0..rows {
            for column in 0..n {
                let products =
                    (0..k).map(|i| x_values[row * k + i] * f64::from(weights[column * k + i]));
                let sum = bias_values[column] + products.sum::<f64>();
                expected[row * stride + column] = 2.0 * sum;
            }
        }
        let off = distance(&bench.read_f32(&out), &expected);
        let label = format!("rows times {what} {} {rows}x{n}x{k}", name(t));
        report.check(&label, off, 2e-6);
    }
}

fn counts_what_is_not_finite(bench: Bench<'_>, report: &mut Report) {
    let n = 300;
    let mut values = numbers(1, n, 1.0);
    values[5] = f32::INFINITY;
    values[70] = f32::NEG_INFINITY;
    values[299] = f32::NAN;
    let (x, _) = bench.half(&values);
    let (packed, absmax) = (bench.output(150), bench.output(4 * 5));
    let not_finite = bench.upload(&[0u32]);
    nf4::quantise(
        bench.s,
        packed.view(),
        absmax.view(),
        not_finite.view(),
        x.view(),
        Source::Half(bench.t),
        n,
    )
    .expect("launch");
    let missed = differing(&bench.read::<u32>(&not_finite), &[3]);
    report.check("nf4 counts what is not finite", missed, 0.0);
}
