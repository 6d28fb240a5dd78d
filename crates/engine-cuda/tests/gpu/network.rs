//! The engine against `mmdit` in `f32` on the CPU: velocity, loss, every gradient, steps, trajectories; and against
//! itself: recomputed, recorded and looped passes.

use std::collections::BTreeMap;

use engine_cuda::Half;
use engine_cuda::gemm::WORKSPACE_BYTES;
use engine_cuda::model::{
    Accuracy, Engine, EngineOptions, LoraFactors, Recompute, SamplerInput, VelocityInput,
    WeightForm,
};
use engine_cuda::plan::{PlanRequest, lora_sizes, plan};
use engine_cuda::stream::Rates;
use mmdit::{BaseWeights, Mmdit};
use quant::{Optimizer, clip_global_norm};
use tensor::device::{cpu, training};
use tensor::{from_f32, to_f32};

use crate::cases::{Case, cases, engine, gradient_distance};
use crate::networks::{
    Batch, LOSS_SCALE, adapters, distance, factors, numbers, reference, reference_step,
    reference_velocity, training_options, unscaled_gradients, weights,
};
use crate::report::Report;
use crate::support::name;

/// Runs every case in both types.
pub fn run(report: &mut Report) {
    for case in cases() {
        for t in [Half::Bf16, Half::F16] {
            let label = format!("{} {}", case.label, name(t));
            report.guarded(&label, |report| one(&case, t, report));
        }
    }
}

fn one(case: &Case, t: Half, report: &mut Report) {
    let Case { config, shape, .. } = case;
    let label = format!("{} {}", case.label, name(t));
    let weights = weights(config, t);
    let batch = Batch::new(config, *shape);
    let lora = factors(config, &lora_sizes(config, case.targets, case.rank));
    let plain = reference(config, &weights, &cpu(), BaseWeights::Plain);
    let half = WeightForm::Half;
    let mut engine = engine(config, &weights, t, half);

    // Velocity, without and with the LoRA.
    let [tokens, _] = batch.tokens(config);
    let input = VelocityInput {
        shape: *shape,
        tokens: &tokens,
        text: &batch.text,
        pooled: &batch.pooled,
        times: &batch.sigmas,
        guidance: batch.guidance.as_deref(),
    };
    let expected = |model: &Mmdit, factors: &[LoraFactors]| {
        let dims = [shape.b, shape.image(), config.in_channels];
        let tokens = from_f32(tokens.clone(), dims, model.device());
        let adapters = adapters(model, factors);
        to_f32(&reference_velocity(
            model,
            &batch,
            tokens,
            &batch.sigmas,
            &adapters,
        ))
    };
    let found = engine.velocity(&input).expect("it runs");
    let base = expected(&plain, &[]);
    report.check(
        &format!("{label}: velocity"),
        distance(&found, &base),
        Accuracy::of(t, &case.config).velocity,
    );
    engine.attach_lora(&lora, true).expect("it fits");
    let found = engine.velocity(&input).expect("it runs");
    let adapted = expected(&plain, &lora);
    report.check(
        &format!("{label}: velocity under the LoRA"),
        distance(&found, &adapted),
        Accuracy::of(t, &case.config).velocity,
    );
    report.check(
        &format!("{label}: what the LoRA changes (inverse)"),
        1.0 / distance(&adapted, &base),
        1e3,
    );

    trajectories(case, &label, t, &mut engine, &batch, &plain, &lora, report);
    drop(plain);
    gradients(
        case,
        &label,
        t,
        &mut engine,
        &batch,
        &weights,
        &lora,
        report,
    );
    drop(engine);
    if weights.values().map(Vec::len).sum::<usize>() < 50_000_000 {
        for double_quant in [false, true] {
            let quantised = reference(config, &weights, &cpu(), BaseWeights::Nf4 { double_quant });
            let expected = expected(&quantised, &lora);
            let form = WeightForm::Nf4 { double_quant };
            let mut engine = self::engine(config, &weights, t, form);
            engine.attach_lora(&lora, false).expect("it fits");
            let found = engine.velocity(&input).expect("it runs");
            report.check(
                &format!("{label}: velocity, NF4, double quantised {double_quant}"),
                distance(&found, &expected),
                Accuracy::of(t, &case.config).velocity,
            );
        }
    }
}

#[allow(clippy::too_many_arguments)] // what `one` has at hand
fn gradients(
    case: &Case,
    label: &str,
    t: Half,
    engine: &mut Engine,
    batch: &Batch,
    weights: &BTreeMap<String, Vec<f32>>,
    lora: &[LoraFactors],
    report: &mut Report,
) {
    let model = reference(&case.config, weights, &training(&cpu()), BaseWeights::Plain);
    let (expected_loss, expected) = reference_step(&model, batch, lora);
    drop(model);
    let mut kept = Vec::new();
    for recompute in [
        Recompute::Nothing,
        Recompute::Everything,
        Recompute::First(1),
    ] {
        engine
            .start_training(training_options(recompute))
            .expect("a LoRA is attached");
        // By launches, while being recorded, and replayed.
        for _ in 0..3 {
            engine.clear_gradients().expect("it runs");
            engine
                .micro_step(&batch.micro(), LOSS_SCALE)
                .expect("it runs");
            let (loss, _) = engine.loss_sum().expect("it is there");
            kept.push((loss, unscaled_gradients(engine)));
        }
        planned(case, label, t, engine, recompute, report);
    }
    let (loss, found) = &kept[0];
    let off = f64::from((loss - expected_loss).abs() / expected_loss);
    report.check(
        &format!("{label}: loss"),
        off,
        Accuracy::of(t, &case.config).velocity,
    );
    let (worst, at, all) = gradient_distance(found, &expected);
    report.check(
        &format!("{label}: all gradients together"),
        all,
        Accuracy::of(t, &case.config).gradients,
    );
    report.check(
        &format!("{label}: worst gradient, {at}"),
        worst,
        Accuracy::of(t, &case.config).gradient,
    );
    let others = kept[1..].iter().filter(|other| *other != &kept[0]).count();
    report.check(
        &format!("{label}: recomputed, recorded and replayed steps that differ in a bit"),
        others as f64,
        0.0,
    );

    // One after the other instead of all at once.
    let b = batch.shape.b;
    if b > 1 {
        engine
            .start_training(training_options(Recompute::Nothing))
            .expect("a LoRA is attached");
        for i in 0..b {
            let sample = batch.sample(i);
            engine
                .micro_step(&sample.micro(), LOSS_SCALE / b as f32)
                .expect("it runs");
        }
        let looped = unscaled_gradients(engine);
        let (_, _, apart) = gradient_distance(&looped, found);
        report.check(
            &format!("{label}: samples one by one against a batch"),
            apart,
            Accuracy::of(t, &case.config).velocity,
        );
        let (sum, count) = engine.loss_sum().expect("it is there");
        let off = f64::from((sum / count as f32 - loss).abs() / loss);
        report.check(
            &format!("{label}: loss, one by one"),
            off,
            Accuracy::of(t, &case.config).velocity,
        );
    }
    steps(case, label, engine, batch, report);
}

/// The plan's bytes against what is allocated.
fn planned(
    case: &Case,
    label: &str,
    t: Half,
    engine: &Engine,
    recompute: Recompute,
    report: &mut Report,
) {
    let request = PlanRequest {
        config: case.config.clone(),
        options: EngineOptions {
            t,
            form: WeightForm::Half,
        },
        lora: lora_sizes(&case.config, case.targets, case.rank),
        shape: case.shape,
        training: training_options(recompute),
    };
    let planned = plan(&request, Rates::H100).expect("it can be planned");
    // What is left of other passes on the same engine is not part of the plan.
    let activations = |parts: &[(&'static str, usize)]| {
        let found = parts.iter().find(|(part, _)| *part == "activations");
        found.map_or(0, |(_, bytes)| *bytes)
    };
    let have = activations(&engine.used_bytes());
    let surplus = have.saturating_sub(activations(&planned.parts));
    let measured = engine.stream().allocated_bytes() + WORKSPACE_BYTES - surplus;
    let off = planned.total_bytes().abs_diff(measured) as f64 / measured as f64;
    report.check(&format!("{label}: planned bytes, {recompute:?}"), off, 1e-2);
}

/// Optimiser steps against the reference optimiser, fed with the engine's own gradients.
fn steps(case: &Case, label: &str, engine: &mut Engine, batch: &Batch, report: &mut Report) {
    let options = training_options(Recompute::Everything);
    engine.start_training(options).expect("a LoRA is attached");
    let tensors = |engine: &Engine| -> Vec<Vec<f32>> {
        let lora = engine.lora().expect("it is there").into_iter();
        lora.flat_map(|f| [f.a, f.b]).collect()
    };
    let before = engine.lora().expect("it is there");
    let mut masters = tensors(engine);
    let names = engine.gradients().expect("they are there");
    let sizes: Vec<(String, usize)> = names.into_iter().map(|(n, g)| (n, g.len())).collect();
    let mut reference = Optimizer::new(options.optimizer, options.adamw, &sizes);
    let (mut norm_off, mut apart) = (0.0f64, 0.0f64);
    for _ in 0..3 {
        engine
            .micro_step(&batch.micro(), LOSS_SCALE)
            .expect("it runs");
        let gradients = engine.gradients().expect("they are there");
        let mut gradients: Vec<Vec<f32>> = gradients
            .into_iter()
            .map(|(_, g)| g.into_iter().map(|v| v * (1.0 / LOSS_SCALE)).collect())
            .collect();
        let norm = clip_global_norm(&mut gradients, options.max_grad_norm);
        reference.step(1e-2, &mut masters, &gradients);
        let outcome = engine
            .optimizer_step(1e-2, 1.0 / LOSS_SCALE)
            .expect("it runs");
        norm_off = norm_off.max(f64::from((outcome.grad_norm - norm.norm).abs() / norm.norm));
        apart = apart.max(distance(&tensors(engine).concat(), &masters.concat()));
    }
    report.check(&format!("{label}: norm of gradients"), norm_off, 1e-6);
    report.check(&format!("{label}: factors after three steps"), apart, 1e-6);

    // A state that is taken out and put back continues to the same bits.
    let (num_steps, parts) = engine.export_optimizer().expect("it is there");
    let now = engine.lora().expect("it is there");
    let mut next = || {
        engine
            .micro_step(&batch.micro(), LOSS_SCALE)
            .expect("it runs");
        engine
            .optimizer_step(1e-2, 1.0 / LOSS_SCALE)
            .expect("it runs");
        engine.lora().expect("it is there")
    };
    let straight = next();
    engine.attach_lora(&now, true).expect("it fits");
    engine.start_training(options).expect("a LoRA is attached");
    engine
        .import_optimizer(num_steps, parts)
        .expect("own state");
    engine
        .micro_step(&batch.micro(), LOSS_SCALE)
        .expect("it runs");
    engine
        .optimizer_step(1e-2, 1.0 / LOSS_SCALE)
        .expect("it runs");
    let resumed = engine.lora().expect("it is there");
    report.check(
        &format!("{label}: a restored run differs"),
        f64::from(u8::from(resumed != straight)),
        0.0,
    );
    engine.attach_lora(&before, true).expect("it fits");
    let _ = case;
}

/// Six sampler steps, without and with true guidance.
#[allow(clippy::too_many_arguments)] // what `one` has at hand
fn trajectories(
    case: &Case,
    label: &str,
    t: Half,
    engine: &mut Engine,
    batch: &Batch,
    model: &Mmdit,
    lora: &[LoraFactors],
    report: &mut Report,
) {
    const STEPS: usize = 6;
    let (config, shape) = (&case.config, case.shape);
    let sigmas: Vec<f32> = (0..=STEPS).map(|i| 1.0 - i as f32 / STEPS as f32).collect();
    let [_, start] = batch.tokens(config);
    let negative = Batch {
        text: numbers(905, batch.text.len(), 1.0),
        pooled: numbers(906, batch.pooled.len(), 1.0),
        ..Batch::new(config, shape)
    };
    let guidance = config.guidance_embeds.then_some(3.5);
    let adapters = adapters(model, lora);
    let dims = [shape.b, shape.image(), config.in_channels];
    for scale in [None, Some(3.0)] {
        let input = SamplerInput {
            shape,
            tokens: &start,
            sigmas: &sigmas,
            times: &sigmas[..STEPS],
            text: &batch.text,
            pooled: &batch.pooled,
            negative: scale.map(|s| (negative.text.as_slice(), negative.pooled.as_slice(), s)),
            guidance,
        };
        engine.start_sampling(&input).expect("it fits");
        while engine.sample_step().expect("it runs") {}
        let found = engine.samples().expect("they are there");

        let mut sample = start.clone();
        for pair in sigmas.windows(2) {
            let times = vec![pair[0]; shape.b];
            let velocity = |of: &Batch| {
                let with_guidance = Batch {
                    guidance: guidance.map(|scale| vec![scale; shape.b]),
                    text: of.text.clone(),
                    pooled: of.pooled.clone(),
                    ..Batch::new(config, shape)
                };
                let tokens = from_f32(sample.clone(), dims, model.device());
                to_f32(&reference_velocity(
                    model,
                    &with_guidance,
                    tokens,
                    &times,
                    &adapters,
                ))
            };
            let mut v = velocity(batch);
            if let Some(scale) = scale {
                for (v, n) in v.iter_mut().zip(velocity(&negative)) {
                    *v = n + scale * (*v - n);
                }
            }
            for (x, v) in sample.iter_mut().zip(v) {
                *x += v * (pair[1] - pair[0]);
            }
        }
        report.check(
            &format!("{label}: {STEPS} sampler steps, true guidance {scale:?}"),
            distance(&found, &sample),
            // Guidance multiplies the difference of two velocities, and with it their rounding.
            Accuracy::of(t, &case.config).velocity * f64::from(scale.unwrap_or(1.0)),
        );
    }
}
