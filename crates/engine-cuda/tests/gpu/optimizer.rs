//! Clipping and AdamW on the device against [`quant::Optimizer`], bit for bit, over steps with and without trouble.

use engine_cuda::ops::optimizer::{
    self, EightBitMoments, SQUARES_PARTIALS, STEP_NUMBERS_BYTES, Step, TensorPlace, TensorTable,
};
use engine_cuda::{Half, Stream};
use quant::{AdamWConfig, Optimizer, OptimizerKind, StateValues, clip_global_norm};

use crate::report::Report;
use crate::support::{Bench, Guarded, bits, differing, distance, numbers};

const CONFIG: AdamWConfig = AdamWConfig {
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weight_decay: 0.01,
};

/// Full and short blocks, both sides of the limit of 8-bit moments.
const LENGTHS: [usize; 7] = [256, 4096, 300, 1, 5000, 7, 4097];

const NUM_STEPS: usize = 6;

/// The step whose gradients hold an infinity: it must not happen.
const BAD_STEP: usize = 2;

/// Runs all of them.
pub fn run(s: &Stream, report: &mut Report) {
    let bench = Bench { s, t: Half::Bf16 };
    for kind in [
        OptimizerKind::AdamW,
        OptimizerKind::AdamW8bit {
            min_8bit_size: 4096,
        },
        OptimizerKind::AdamW8bit { min_8bit_size: 1 },
    ] {
        one(bench, kind, report);
    }
}

/// The flat buffer's tensors.
fn split(flat: &[f32]) -> Vec<Vec<f32>> {
    let mut rest = flat;
    LENGTHS
        .iter()
        .map(|len| {
            let (tensor, behind) = rest.split_at(*len);
            rest = behind;
            tensor.to_vec()
        })
        .collect()
}

fn one(bench: Bench<'_>, kind: OptimizerKind, report: &mut Report) {
    let Bench { s, t } = bench;
    let n: usize = LENGTHS.iter().sum();
    let mut offset = 0;
    let places: Vec<(usize, usize)> = LENGTHS
        .iter()
        .map(|len| {
            offset += len;
            (offset - len, *len)
        })
        .collect();
    let table = TensorTable::new(kind, &places);
    let names: Vec<(String, usize)> = LENGTHS
        .iter()
        .enumerate()
        .map(|(i, len)| (i.to_string(), *len))
        .collect();
    let mut reference = Optimizer::new(kind, CONFIG, &names);
    let start = numbers(1, n, 0.1);
    let mut expected = split(&start);

    let zeros = |bytes: usize| bench.upload(&vec![0u8; bytes]);
    let parameters = bench.upload(&start);
    let shadow = bench.output(2 * n);
    let blocks = bench.output(table.device_bytes());
    table.upload(s, blocks.view()).expect("upload");
    let codes = [(); 2].map(|()| zeros(n));
    let scales = [(); 2].map(|()| zeros(4 * table.num_scales()));
    let full = [(); 2].map(|()| zeros(4 * table.num_full_moments()));
    let (norm, factor, flag) = (zeros(4), zeros(4), zeros(4));
    let (numbers_of_step, steps) = (zeros(STEP_NUMBERS_BYTES), zeros(4));
    let partials = bench.output(8 * SQUARES_PARTIALS);

    for step in 0..NUM_STEPS {
        let learning_rate = 1e-3 * (step + 1) as f64;
        let unscale = 0.5f32.powi(step as i32);
        // Small enough in some steps that nothing is clipped.
        let mut flat = numbers(10 + step as u64, n, if step % 2 == 0 { 1e-2 } else { 1e-3 });
        for value in &mut flat {
            *value /= unscale;
        }
        if step == BAD_STEP {
            flat[10] = f32::INFINITY;
        }
        let gradients = bench.upload(&flat);
        let rate = bench.upload(&[learning_rate]);
        optimizer::sum_squares(
            s,
            norm.view(),
            gradients.view(),
            n,
            unscale,
            partials.view(),
        )
        .expect("launch");
        optimizer::clip_factor(s, factor.view(), flag.view(), norm.view(), 1.0, unscale)
            .expect("launch");
        optimizer::step_numbers(
            s,
            numbers_of_step.view(),
            steps.view(),
            flag.view(),
            rate.view(),
            &CONFIG,
        )
        .expect("launch");
        let args = Step {
            parameters: parameters.view(),
            shadow: Some(shadow.view()),
            gradients: gradients.view(),
            table: blocks.view(),
            factor: factor.view(),
            flag: flag.view(),
            numbers: numbers_of_step.view(),
        };
        let moments = EightBitMoments {
            first: codes[0].view(),
            first_absmax: scales[0].view(),
            second: codes[1].view(),
            second_absmax: scales[1].view(),
        };
        optimizer::adamw_8bit(s, t, &table, &args, &moments).expect("launch");
        optimizer::adamw_f32(s, t, &table, &args, full[0].view(), full[1].view()).expect("launch");

        for value in &mut flat {
            *value *= unscale;
        }
        let mut tensors = split(&flat);
        let clipped = clip_global_norm(&mut tensors, 1.0);
        if clipped.is_finite() {
            // The reference rounds the norm of every tensor and this rounds once, so factors may differ in the last
            // bit. The device's own is used from here on, so that everything else can be compared bit for bit.
            let found = distance(&bench.read_f32(&norm), &[f64::from(clipped.norm)]);
            report.check("global norm", found, 2e-7);
            let found = bench.read::<f32>(&factor)[0] / unscale;
            let expected_factor = f64::from(clipped.coefficient);
            let error = distance(&[f64::from(found)], &[expected_factor]);
            report.check("clipping factor", error, 2e-7);
            let gradients: Vec<f32> = flat.iter().map(|value| value * found).collect();
            reference.step(learning_rate, &mut expected, &split(&gradients));
        }
        let skipped = u32::from(step == BAD_STEP);
        let flagged = differing(&bench.read::<u32>(&flag), &[skipped]);
        report.check("a step that is not finite is skipped", flagged, 0.0);
        compare(
            bench,
            &parameters,
            &expected.concat(),
            &format!("{kind:?} step {step}"),
            report,
        );
        if step != BAD_STEP {
            let apart = differing(
                &bench.read::<u16>(&shadow),
                &t.from_f32(&bench.read::<f32>(&parameters)),
            );
            report.check("parameters in 16 bits", apart, 0.0);
        }
    }
    let counted = bench.read::<u32>(&steps);
    report.check(
        "steps",
        differing(&counted, &[reference.num_steps() as u32]),
        0.0,
    );

    let codes = codes.each_ref().map(|buffer| bench.read::<u8>(buffer));
    let [scales, full] =
        [&scales, &full].map(|pair| pair.each_ref().map(|buffer| bench.read::<f32>(buffer)));
    for part in reference.export() {
        let (tensor, role) = part.name.split_once('.').expect("named above");
        let tensor: usize = tensor.parse().expect("named above");
        let which = usize::from(role.starts_with("second"));
        match (&table.places()[tensor], &part.values) {
            (TensorPlace::EightBit { codes: range, .. }, StateValues::U8(values)) => {
                let apart = differing(&codes[which][range.clone()], values);
                report.check(&format!("{kind:?} codes"), apart, 0.0);
            }
            (TensorPlace::EightBit { scales: range, .. }, StateValues::F32(values)) => {
                let apart = differing(&bits(&scales[which][range.clone()]), &bits(values));
                report.check(&format!("{kind:?} scales"), apart, 0.0);
            }
            (TensorPlace::Full { moments }, StateValues::F32(values)) => {
                let apart = differing(&bits(&full[which][moments.clone()]), &bits(values));
                report.check(&format!("{kind:?} moments"), apart, 0.0);
            }
            (TensorPlace::Full { .. }, StateValues::U8(_)) => {
                report.check(&format!("{kind:?} kind of moments"), f64::INFINITY, 0.0);
            }
        }
    }
}

fn compare(bench: Bench<'_>, found: &Guarded, expected: &[f32], label: &str, report: &mut Report) {
    let apart = differing(&bits(&bench.read(found)), &bits(expected));
    report.check(&format!("adamw {label}"), apart, 0.0);
}
