//! Training of all weights at the small base's shape.

use std::time::Instant;

use mmdit::MmditConfig;
use serde_json::{Map, Value, json};

use super::{Outcome, STEPS, Table, median, open};
use crate::Half;
use crate::model::{FullOptions, FullTrainer, Shape};
use crate::stream::{Rates, Stream, Work};

const ROWS: usize = 512;
/// Steps that one timing is taken over.
const INNER: usize = 10;

fn numbers(count: usize, scale: f32) -> Vec<f32> {
    let mut state = count as u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * scale
    };
    (0..count).map(|_| next()).collect()
}

pub(super) fn rows(table: &mut Table) -> Outcome {
    for b in [64, 128, 256, 512] {
        let line = format!("full_bf16_b{b}");
        table.guarded(&line.clone(), |table| one(table, &line, b));
    }
    Ok(())
}

/// A run at batch `b`, with tables.
fn trainer(stream: Stream, b: usize) -> Outcome<FullTrainer> {
    let config = MmditConfig::small();
    let shape = Shape {
        b,
        text: 64,
        latent_cells: [32, 32],
    };
    let options = FullOptions {
        t: Half::Bf16,
        shape,
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-8,
        weight_decay: 0.01,
        max_grad_norm: 1.0,
        ema_decay: 0.999,
        guidance: None,
        loss_scale: 1.0,
    };
    let mut values = |spec: &tensor::ParameterSpec| {
        let count = spec.num_elements() as usize;
        match spec.name.contains(".norm_") {
            true => vec![1.0; count],
            false => numbers(count, 0.05),
        }
    };
    let mut trainer = FullTrainer::new(stream, &config, &mut values, options)?;
    let latent = ROWS * config.in_channels / 4 * 32 * 32;
    trainer.set_latents(&numbers(latent, 1.0), &numbers(latent, 0.1), ROWS)?;
    let states = numbers(ROWS * shape.text * config.joint_attention_dim, 1.0);
    let pooled = numbers(ROWS * config.pooled_projection_dim, 1.0);
    trainer.set_texts(&states, &pooled, ROWS)?;
    Ok(trainer)
}

fn one(table: &mut Table, line: &str, b: usize) -> Outcome {
    let mut trainer = trainer(open()?, b)?;
    let places: Vec<u32> = (0..b as u32).collect();
    let sigmas: Vec<f32> = (0..b).map(|i| (i as f32 + 0.5) / b as f32).collect();
    let mut seed = 0;
    let mut step = |trainer: &mut FullTrainer| {
        seed += 1;
        trainer.step(&places, &places, &sigmas, seed, 1e-4)
    };
    for _ in 0..3 {
        step(&mut trainer)?;
    }
    let mut steps = Vec::new();
    for _ in 0..STEPS {
        trainer.stream().synchronize()?;
        let start = Instant::now();
        for _ in 0..INNER {
            step(&mut trainer)?;
        }
        trainer.stream().synchronize()?;
        steps.push(start.elapsed().as_secs_f64() / INNER as f64);
    }
    let outcome = trainer.report()?;
    let allocated = trainer.stream().allocated_bytes();
    let counted = trainer.count_step(Rates::H100)?;
    trainer.use_graphs(false);
    step(&mut trainer)?;
    trainer.stream().start_timing();
    step(&mut trainer)?;
    let launches = trainer.stream().stop_timing()?;
    let mut by_name: Map<String, Value> = Map::new();
    for (_, name, ms) in &launches {
        let sum = by_name.get(name).and_then(Value::as_f64).unwrap_or(0.0) + f64::from(*ms);
        by_name.insert(name.clone(), json!(sum));
    }
    let by_kind: Map<String, Value> = Work::ALL
        .iter()
        .zip(counted)
        .map(|(work, tally)| {
            let of = launches.iter().filter(|(kind, ..)| kind == work);
            let ms: f64 = of.map(|(_, _, ms)| f64::from(*ms)).sum();
            let row = json!({
                "ms": ms,
                "planned_ms": tally.seconds * 1e3,
                "launches": tally.launches,
                "tflop": tally.flops / 1e12,
                "gbyte": tally.bytes / 1e9,
            });
            (format!("{work:?}"), row)
        })
        .collect();
    let step_s = median(steps);
    table.row(
        line,
        json!({
            "step_ms": step_s * 1e3,
            "pictures_per_s": b as f64 / step_s,
            "loss": outcome.loss,
            "grad_norm": outcome.grad_norm,
            "allocated_bytes": allocated,
            "launches": launches.len(),
            "by_kind": by_kind,
            "by_name_ms": by_name,
        }),
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_of_the_small_base_is_mostly_reading_and_writing() {
        let trainer = trainer(Stream::dry(), 256).expect("nothing is done");
        let [products, attention, dequantise, elementwise] =
            trainer.count_step(Rates::H100).expect("nothing is done");
        assert_eq!(dequantise.launches, 0);
        assert!((products.flops / 1.95e12 - 1.0).abs() < 0.01);
        assert!((attention.flops / 4.7e11 - 1.0).abs() < 0.01);
        assert!(elementwise.bytes < 18e9, "{elementwise:?}");
    }
}
