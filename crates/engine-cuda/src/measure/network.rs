//! The whole network: training by plan, sampling.

use std::time::Instant;

use mmdit::MmditConfig;
use serde_json::{Map, Value, json};

use super::{Outcome, STEPS, TARGETS, Table, median, open, request, shape, within_24_gb};
use crate::Half;
use crate::gemm::WORKSPACE_BYTES;
use crate::model::{
    Engine, EngineOptions, MicroBatch, NormalWeights, Recompute, SamplerInput, Shape, WeightForm,
};
use crate::plan::{PlanRequest, lora_sizes, plan, untrained};
use crate::stream::{Rates, Stream, Work};

/// Random host values of a batch.
pub(super) struct Batch {
    pub(super) shape: Shape,
    pub(super) latents: Vec<f32>,
    per_sample: Vec<f32>,
    pub(super) text: Vec<f32>,
    pub(super) pooled: Vec<f32>,
}

impl Batch {
    pub(super) fn new(config: &MmditConfig, shape: Shape) -> Self {
        let mut state = 1u32;
        let mut numbers = |count: usize| -> Vec<f32> {
            (0..count)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) as f32 / (1 << 23) as f32 - 1.0
                })
                .collect()
        };
        Self {
            shape,
            latents: numbers(shape.rows(1) * config.in_channels),
            per_sample: vec![0.5; shape.b],
            text: numbers(shape.rows(0) * config.joint_attention_dim),
            pooled: numbers(shape.b * config.pooled_projection_dim),
        }
    }

    pub(super) fn micro(&self) -> MicroBatch<'_> {
        MicroBatch {
            shape: self.shape,
            latents: &self.latents,
            noise: &self.latents,
            sigmas: &self.per_sample,
            times: &self.per_sample,
            weights: &self.per_sample,
            text: &self.text,
            pooled: &self.pooled,
            guidance: Some(&self.per_sample),
        }
    }
}

pub(super) fn model_rows(table: &mut Table, name: &str, form: WeightForm) -> Outcome {
    let config = MmditConfig::flux_dev();
    let options = EngineOptions {
        t: Half::Bf16,
        form,
    };
    let stream = open()?;
    let (free_before, _) = stream.memory()?;
    let start = Instant::now();
    let weights = NormalWeights { std: 0.02 };
    let mut engine = Engine::load(stream, &config, &weights, options)?;
    table.row(
        &format!("{name}_load"),
        json!({ "s": start.elapsed().as_secs_f64() }),
    );
    sampling_rows(table, name, &mut engine)?;
    let lora = lora_sizes(&config, &TARGETS, 4);
    engine.attach_lora(&untrained(&config, &lora, || 0.01), true)?;
    let mut lines = vec![
        ("recompute_b1", 1, Recompute::Everything),
        ("keep_b1", 1, Recompute::Nothing),
        ("recompute_b2", 2, Recompute::Everything),
        ("keep_b2", 2, Recompute::Nothing),
        ("recompute_b4", 4, Recompute::Everything),
        ("keep_b4", 4, Recompute::Nothing),
    ];
    if let Some(recompute) = within_24_gb(&config, options, &lora)? {
        lines.push(("within_24GB_b4", 4, recompute));
    }
    for (line, b, recompute) in lines {
        let line = format!("{name}_train_{line}");
        table.guarded(&line.clone(), |table| {
            let request = request(&config, options, &lora, b, recompute);
            training_row(table, &line, &mut engine, &request, free_before)
        });
    }
    Ok(())
}

fn training_row(
    table: &mut Table,
    line: &str,
    engine: &mut Engine,
    request: &PlanRequest,
    free_before: usize,
) -> Outcome {
    let planned = plan(request, Rates::H100)?;
    engine.release_activations()?;
    engine.start_training(request.training)?;
    let batch = Batch::new(&request.config, request.shape);
    let step = |engine: &mut Engine| -> Outcome {
        engine.micro_step(&batch.micro(), 1.0)?;
        engine.optimizer_step(1e-4, 1.0)?;
        Ok(())
    };
    for _ in 0..3 {
        step(engine)?;
    }
    let (mut steps, mut micro_steps) = (Vec::new(), Vec::new());
    for _ in 0..STEPS {
        engine.stream().synchronize()?;
        let start = Instant::now();
        step(engine)?;
        engine.stream().synchronize()?;
        steps.push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        engine.micro_step(&batch.micro(), 1.0)?;
        engine.stream().synchronize()?;
        micro_steps.push(start.elapsed().as_secs_f64());
    }
    let (free, _) = engine.stream().memory()?;
    let allocated = engine.stream().allocated_bytes() + WORKSPACE_BYTES;
    engine.use_graphs(false);
    step(engine)?;
    let overhead_ms = event_overhead_ms(engine.stream())?;
    engine.stream().start_timing();
    engine.micro_step(&batch.micro(), 1.0)?;
    let launches = engine.stream().stop_timing()?;
    let sum = |work: Work| -> f64 {
        let of = launches.iter().filter(|(kind, ..)| *kind == work);
        of.map(|(_, _, ms)| f64::from(*ms)).sum()
    };
    let mut by_name: Map<String, Value> = Map::new();
    for (_, name, ms) in &launches {
        let sum = by_name.get(name).and_then(Value::as_f64).unwrap_or(0.0) + f64::from(*ms);
        by_name.insert(name.clone(), json!(sum));
    }
    let by_kind: Map<String, Value> = Work::ALL
        .iter()
        .map(|work| (format!("{work:?}_ms"), json!(sum(*work))))
        .collect();
    let micro_step_s = median(micro_steps);
    let timed = launches.iter().map(|(work, _, ms)| (*work, f64::from(*ms)));
    let percent = shares(timed, overhead_ms, 1000.0 * micro_step_s);
    table.row(
        line,
        json!({
            "recompute": format!("{:?}", request.training.recompute),
            "step_s": median(steps),
            "micro_step_s": micro_step_s,
            "planned_micro_step_s": planned.micro_step_s(),
            "allocated_bytes": allocated,
            "planned_bytes": planned.total_bytes(),
            "device_bytes": free_before.saturating_sub(free),
            "launches": launches.len(),
            "by_kind": by_kind,
            "percent_of_micro_step": percent,
            "event_overhead_ms": overhead_ms,
            "by_name_ms": by_name,
        }),
    );
    Ok(())
}

/// Milliseconds between two events with nothing between them, which every timed launch has on top of its own.
fn event_overhead_ms(stream: &Stream) -> Outcome<f64> {
    let events = (0..101)
        .map(|_| stream.event())
        .collect::<Outcome<Vec<_>>>()?;
    let pairs = events.windows(2);
    let times = pairs.map(|pair| Ok(f64::from(pair[1].milliseconds_since(&pair[0])?)));
    Ok(median(times.collect::<Outcome<Vec<_>>>()?))
}

/// What each kind of work is of a micro-step's wall time, in per cent, and what is left: the card idle.
///
/// The launches are timed one by one, each with `overhead_ms` of the events around it, which is taken off; the wall time
/// is that of the recorded step. Where launches overlap in the recording, `Idle` comes out below 0.
fn shares(
    launches: impl Iterator<Item = (Work, f64)>,
    overhead_ms: f64,
    wall_ms: f64,
) -> Map<String, Value> {
    let mut by_kind = [0.0; Work::ALL.len()];
    for (work, ms) in launches {
        by_kind[work as usize] += (ms - overhead_ms).max(0.0);
    }
    let percent = |ms: f64| json!(100.0 * ms / wall_ms);
    let kinds = Work::ALL.iter().zip(by_kind);
    let mut shares: Map<String, Value> = kinds
        .map(|(work, ms)| (format!("{work:?}"), percent(ms)))
        .collect();
    let busy: f64 = by_kind.iter().sum();
    shares.insert("Idle".to_owned(), percent(wall_ms - busy));
    shares
}

fn sampling_rows(table: &mut Table, name: &str, engine: &mut Engine) -> Outcome {
    const SAMPLER_STEPS: usize = 12;
    let config = engine.config().clone();
    let sigmas: Vec<f32> = (0..=SAMPLER_STEPS)
        .map(|i| 1.0 - i as f32 / SAMPLER_STEPS as f32)
        .collect();
    for pixels in [512, 1024] {
        let mut times = Vec::new();
        for guided in [false, true] {
            let batch = Batch::new(&config, shape(1, pixels));
            let input = SamplerInput {
                shape: batch.shape,
                tokens: &batch.latents,
                sigmas: &sigmas,
                times: &sigmas[..SAMPLER_STEPS],
                text: &batch.text,
                pooled: &batch.pooled,
                negative: guided.then_some((batch.text.as_slice(), batch.pooled.as_slice(), 4.0)),
                guidance: Some(3.5),
            };
            let start = Instant::now();
            engine.start_sampling(&input)?;
            engine.stream().synchronize()?;
            let prepared_s = start.elapsed().as_secs_f64();
            for _ in 0..3 {
                engine.sample_step()?;
            }
            let mut steps = Vec::new();
            for _ in 3..SAMPLER_STEPS {
                engine.stream().synchronize()?;
                let start = Instant::now();
                engine.sample_step()?;
                engine.stream().synchronize()?;
                steps.push(start.elapsed().as_secs_f64());
            }
            times.push((median(steps), prepared_s));
        }
        table.row(
            &format!("{name}_sample_{pixels}"),
            json!({
                "step_s": times[0].0,
                "true_guidance_step_s": times[1].0,
                "true_guidance_ratio": times[1].0 / times[0].0,
                "prepare_s": times[0].1,
            }),
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_launch_fills_is_idle() {
        let launches = [
            (Work::ALL[0], 4.1),
            (Work::ALL[0], 2.1),
            (Work::ALL[3], 1.1),
            (Work::ALL[3], 0.05),
        ];
        let shares = shares(launches.into_iter(), 0.1, 10.0);
        let percent = |name: &str| shares[name].as_f64().expect("a number").round();
        let first = format!("{:?}", Work::ALL[0]);
        let last = format!("{:?}", Work::ALL[3]);
        assert_eq!([&first, &last, "Idle"].map(percent), [60.0, 10.0, 30.0]);
        assert_eq!(shares.len(), Work::ALL.len() + 1);
    }

    #[test]
    fn a_dry_stream_has_no_events_to_wait_for() {
        assert_eq!(event_overhead_ms(&Stream::dry()).expect("no card"), 0.0);
    }
}
