//! `nf4`, `adamw8bit`: crate `quant` alone, on given numbers.

use std::collections::BTreeMap;

use artifacts::Dtype;
use quant::{
    AdamWConfig, Codebook, Nf4, Optimizer, OptimizerKind, Scales, StateValues, StoredFloat,
};
use serde::Deserialize;

use crate::checker::{CaseError, CaseRun};
use crate::compare::Values;

/// Quantises every matrix of the case, plainly and doubly, and dequantises it again.
pub fn nf4(run: &mut CaseRun) -> Result<(), CaseError> {
    run.output_f32("code", quant::nf4::VALUES.to_vec(), &[16]);
    let nested = Codebook::signed_dynamic().values().to_vec();
    let num_codes = nested.len();
    run.output_f32("dq.nested_code", nested, &[num_codes]);
    for name in run.names("in.") {
        let (values, shape) = run.f32(&name)?;
        let stored = match run.dtype(&name)? {
            Dtype::BF16 => StoredFloat::Bf16,
            Dtype::F16 => StoredFloat::F16,
            _ => StoredFloat::F32,
        };
        let name = &name["in.".len()..];
        let plain = Nf4::quantize(&values, stored)?;
        let packed = plain.packed().to_vec();
        let num_bytes = packed.len();
        run.output(&format!("{name}.packed"), Values::U8(packed), &[num_bytes]);
        let absmax = plain.scales().to_f32();
        let num_blocks = absmax.len();
        run.output_f32(&format!("{name}.absmax"), absmax, &[num_blocks]);
        run.output_f32(&format!("{name}.dequant"), plain.dequantize(), &shape);

        let double = plain.double_quantized();
        let dequantised = double.dequantize();
        if let Scales::Double { centred, offset } = double.scales() {
            let codes = Values::U8(centred.codes().to_vec());
            run.output(&format!("{name}.dq.absmax_codes"), codes, &[num_blocks]);
            let nested = centred.absmax().to_vec();
            let num_nested = nested.len();
            run.output_f32(&format!("{name}.dq.nested_absmax"), nested, &[num_nested]);
            run.output_f32(&format!("{name}.dq.offset"), vec![*offset], &[1]);
        }
        run.output_f32(&format!("{name}.dq.dequant"), dequantised, &shape);
    }
    Ok(())
}

#[derive(Deserialize)]
struct AdamWParams {
    lr: f64,
    weight_decay: f64,
    betas: [f64; 2],
    eps: f64,
    steps: u64,
    min_8bit_size: usize,
}

/// Steps the optimiser with the given gradients, and looks at parameters and moments where the reference did.
pub fn adamw8bit(run: &mut CaseRun) -> Result<(), CaseError> {
    let params: AdamWParams = run.params()?;
    for (name, map) in [
        ("qmap1", Codebook::signed_dynamic()),
        ("qmap2", Codebook::unsigned_dynamic()),
    ] {
        let values = map.values().to_vec();
        let num_codes = values.len();
        run.output_f32(name, values, &[num_codes]);
    }
    let mut parameters = Vec::new();
    let mut shapes = BTreeMap::new();
    let mut sizes = Vec::new();
    for full in run.names("in.init.") {
        let (values, shape) = run.f32(&full)?;
        let name = full["in.init.".len()..].to_owned();
        sizes.push((name.clone(), values.len()));
        shapes.insert(name, (parameters.len(), shape));
        parameters.push(values);
    }
    let kind = OptimizerKind::AdamW8bit {
        min_8bit_size: params.min_8bit_size,
    };
    let config = AdamWConfig {
        beta1: params.betas[0],
        beta2: params.betas[1],
        epsilon: params.eps,
        weight_decay: params.weight_decay,
    };
    let mut optimizer = Optimizer::new(kind, config, &sizes);
    for step in 1..=params.steps {
        let mut gradients = Vec::new();
        for (name, _) in &sizes {
            gradients.push(run.f32(&format!("in.step{step}.grad.{name}"))?.0);
        }
        optimizer.step(params.lr, &mut parameters, &gradients);
        let moments: BTreeMap<String, StateValues> = optimizer
            .export()
            .into_iter()
            .map(|part| (part.name, part.values))
            .collect();
        for full in run.names(&format!("out.step{step}.")) {
            let output = &full["out.".len()..];
            let Some((role, name)) = output
                .split_once('.')
                .and_then(|(_, rest)| rest.split_once('.'))
            else {
                continue; // not compared, so it ends as a failure
            };
            let Some((index, shape)) = shapes.get(name) else {
                continue;
            };
            let part = match role {
                "param" => {
                    run.output_f32(output, parameters[*index].clone(), shape);
                    continue;
                }
                "state1" => "first",
                "state2" => "second",
                "absmax1" => "first.absmax",
                "absmax2" => "second.absmax",
                _ => continue,
            };
            match moments.get(&format!("{name}.{part}")) {
                Some(StateValues::U8(codes)) => {
                    run.output(output, Values::U8(codes.clone()), shape);
                }
                Some(StateValues::F32(values)) if role.starts_with("state") => {
                    run.output_f32(output, values.clone(), shape);
                }
                Some(StateValues::F32(values)) => {
                    run.output_f32(output, values.clone(), &[values.len()]);
                }
                None => run.failed(output, "the optimiser has no such state".to_owned()),
            }
        }
    }
    Ok(())
}
