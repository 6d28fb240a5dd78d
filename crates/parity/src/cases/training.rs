//! `train_micro_*`, `train_opt_*`: crate `train` on given latents, noise and noise levels.

use engine::micro::predict;
use engine::{
    GradientSum, Gradients, Input, LoraOptimizer, LossScaler, MicroBatch, MicroStep, Opening,
    RunError, TrainableLora,
};
use flow_matching::model_time;
use flow_matching::{Scheduler, SchedulerConfig, TrainingPoint, Weighting};
use lora::LoraFile;
use mmdit::{BaseWeights, Mmdit, Rope, unpatchify};
use quant::{AdamWConfig, OptimizerKind, global_norm};
use serde::Deserialize;
use serde_json::Value;
use std::path::Path;
use tensor::device::{cpu, training};
use tensor::from_f32;
use train::batch::{LatentScaling, sample_posterior};

use super::schedules::weighting;
use super::transformer;
use crate::checker::{CaseError, CaseRun};
use crate::compare::Values;
use crate::tolerances::ALL_GRADIENTS;

/// A setting of a case that this program has no counterpart for.
#[derive(Debug, thiserror::Error)]
#[error("`{key}` is {found:?}, expected {expected}")]
struct UnknownSetting {
    key: &'static str,
    found: String,
    expected: &'static str,
}

/// The model, the LoRA of the set in training form, and the training table.
struct Setup {
    model: Mmdit,
    gradients: Box<dyn Gradients>,
    base: BaseWeights,
    lora: TrainableLora,
    scheduler: Scheduler,
    weighting: Weighting,
}

impl Setup {
    fn open(run: &CaseRun, base: &str, scheme: &str) -> Result<Self, CaseError> {
        let base = match base {
            "f32" => BaseWeights::Plain,
            "nf4" => BaseWeights::Nf4 {
                double_quant: false,
            },
            found => {
                return Err(UnknownSetting {
                    key: "base",
                    found: found.to_owned(),
                    expected: "f32 or nf4",
                }
                .into());
            }
        };
        let model = transformer::open(run, &training(&cpu()), base)?;
        let dir = run.set.model().join("transformer");
        let gradients = engine::open_gradients(run.execution.engine, &opening(run, &dir, base))?;
        let file = LoraFile::read(&run.set.lora(), &transformer::targets(model.config()))?;
        let path = run.set.model().join("scheduler/scheduler_config.json");
        Ok(Self {
            model,
            gradients,
            base,
            lora: TrainableLora::from_modules(file.modules),
            scheduler: Scheduler::new(SchedulerConfig::from_file(&path)?),
            weighting: weighting(scheme)?,
        })
    }

    fn points(&self, u: &[f32]) -> Vec<TrainingPoint> {
        u.iter()
            .map(|&u| self.scheduler.training_point(u, self.weighting))
            .collect()
    }

    fn rope(&self, batch: &MicroBatch) -> Rope {
        let [_, _, h, w] = batch.shape;
        self.model.rope(batch.text_shape[0], [h, w])
    }

    /// The factors' names as the fixtures have them.
    fn keys(&self) -> Vec<String> {
        let names = self.lora.names().into_iter();
        names.map(|name| format!("transformer.{name}")).collect()
    }
}

/// The set's transformer in the run's precision; Burn's is on the CPU.
fn opening<'a>(run: &CaseRun<'_>, dir: &'a Path, base: BaseWeights) -> Opening<'a> {
    Opening {
        dir,
        device: cpu(),
        card: 0,
        precision: run.execution.precision,
        base,
    }
}

/// Scale of the loss in 16 bits.
const LOSS_SCALE: f32 = 1024.0;

#[derive(Deserialize)]
struct MicroParams {
    base: String,
    weighting_scheme: String,
    guidance_scale: f32,
    scaling_factor: f32,
    shift_factor: f32,
    #[serde(default)]
    quantised_modules: Value,
}

/// One micro-step: posterior draw, noising, prediction, loss, and the gradient of every LoRA tensor.
pub fn micro(run: &mut CaseRun) -> Result<(), CaseError> {
    let params: MicroParams = run.params()?;
    let mut setup = Setup::open(run, &params.base, &params.weighting_scheme)?;
    if let Value::Array(modules) = &params.quantised_modules {
        let mut expected: Vec<&str> = modules.iter().filter_map(Value::as_str).collect();
        let linears = setup.model.config().linears();
        let mut found: Vec<&str> = linears.iter().map(|linear| linear.path.as_str()).collect();
        expected.sort_unstable();
        found.sort_unstable();
        run.text("quantised_modules", &expected.join(" "), &found.join(" "));
    }

    let (mean, shape) = run.f32("in.mean")?;
    let shape: [usize; 4] = run.axes("in.mean", shape)?;
    let (logvar, _) = run.f32("in.logvar")?;
    let (sample_noise, _) = run.f32("in.sample_noise")?;
    let sample = sample_posterior(&mean, &logvar, &sample_noise);
    run.output_f32("sample", sample.clone(), &shape);
    let scaling = LatentScaling {
        shift: params.shift_factor,
        scale: params.scaling_factor,
    };
    let model_input = scaling.apply(sample);
    run.output_f32("model_input", model_input.clone(), &shape);

    let (u, _) = run.f32("in.u")?;
    let points = setup.points(&u);
    let indices = points.iter().map(|point| point.index as i32).collect();
    run.output("index", Values::I32(indices), &[points.len()]);
    let part = |value: fn(&TrainingPoint) -> f32| points.iter().map(value).collect();
    run.output_f32("timestep", part(|point| point.timestep), &[points.len()]);
    run.output_f32("sigma", part(|point| point.sigma), &[points.len()]);
    run.output_f32("weighting", part(|point| point.weight), &[points.len()]);

    let (prompt_embeds, text_shape) = run.f32("in.prompt_embeds")?;
    let [_, num_tokens, width] = run.axes("in.prompt_embeds", text_shape)?;
    let batch = MicroBatch {
        shape,
        model_input,
        noise: run.f32("in.noise")?.0,
        points,
        text_shape: [num_tokens, width],
        prompt_embeds,
        pooled: run.f32("in.pooled_prompt_embeds")?.0,
    };
    let rope = setup.rope(&batch);
    let leaves = setup.lora.leaves(setup.model.device());
    let guidance = params.guidance_scale;
    let prediction = predict(&setup.model, &rope, &leaves.adapters, &batch, guidance);
    run.output_tensor("noisy", &prediction.noisy);
    run.output_tensor("target", &prediction.target);
    let dir = run.set.model().join("transformer");
    let mut engine = engine::open(run.execution.engine, &opening(run, &dir, setup.base))?;
    engine.set_lora(&setup.lora.factors())?;
    let [noisy, _] = batch.noisy_and_target();
    let times = batch.points.iter().map(|point| model_time(point.timestep));
    let has_guidance = engine.config().guidance_embeds;
    let velocity = engine.velocity(&Input {
        hidden_states: &noisy,
        encoder_hidden_states: &batch.prompt_embeds,
        pooled_projections: &batch.pooled,
        timestep: &times.collect::<Vec<f32>>(),
        guidance: has_guidance.then(|| vec![guidance; batch.len()]).as_deref(),
        positions: &batch.positions(),
    })?;
    let [b, _, h, w] = shape;
    let channels = engine.config().velocity_channels();
    let tokens = [b, velocity.len() / (b * channels).max(1), channels];
    run.output_tensor(
        "pred",
        &unpatchify(from_f32(velocity, tokens, &cpu()), h, w),
    );

    let loss_factor = loss_factor(run, &batch);
    let mut step = setup
        .gradients
        .micro_step(&setup.lora, &batch, guidance, loss_factor)?;
    for value in step.gradients.iter_mut().flatten() {
        *value /= loss_factor;
    }
    run.output_f32("loss", vec![step.loss], &[]);
    run.output_f32("grad_norm", vec![global_norm(&step.gradients)], &[]);
    if run.execution.in_half() {
        let mut all = Vec::new();
        for key in setup.keys() {
            all.extend(run.f32(&format!("out.grad.{key}"))?.0);
        }
        let found = step.gradients.concat();
        let shapes = [[all.len()], [found.len()]];
        let (expected, found) = (Values::F32(all), Values::F32(found));
        run.against(ALL_GRADIENTS, (&expected, &shapes[0]), (&found, &shapes[1]));
    }
    output_tensors(run, "grad.", &setup, step.gradients);
    Ok(())
}

/// What the loss is multiplied by before the backward pass. 16 bits keep small gradients numbers so; weightings reach a
/// million, and are taken out again so that large ones stay numbers too.
fn loss_factor(run: &CaseRun<'_>, batch: &MicroBatch) -> f32 {
    if !run.execution.in_half() {
        return 1.0;
    }
    let weights = batch.points.iter().map(|point| point.weight);
    LOSS_SCALE / weights.fold(1.0, f32::max)
}

/// Hands over one array per LoRA tensor.
fn output_tensors(run: &mut CaseRun, prefix: &str, setup: &Setup, values: Vec<Vec<f32>>) {
    let tensors = setup.keys().into_iter().zip(setup.lora.shapes());
    for ((key, shape), values) in tensors.zip(values) {
        run.output_f32(&format!("{prefix}{key}"), values, &shape);
    }
}

#[derive(Deserialize)]
struct OptParams {
    base: String,
    weighting_scheme: String,
    optimizer: String,
    lr: f64,
    weight_decay: f64,
    betas: [f64; 2],
    eps: f64,
    min_8bit_size: Option<usize>,
    accumulation: u32,
    steps: usize,
    max_grad_norm: f32,
    guidance_scale: f32,
}

impl OptParams {
    fn optimizer(
        &self,
        max_grad_norm: f32,
        lora: &TrainableLora,
    ) -> Result<LoraOptimizer, CaseError> {
        let kind = match (self.optimizer.as_str(), self.min_8bit_size) {
            ("torch.optim.AdamW", None) => OptimizerKind::AdamW,
            ("bitsandbytes.optim.AdamW8bit", Some(min_8bit_size)) => {
                OptimizerKind::AdamW8bit { min_8bit_size }
            }
            (found, _) => {
                return Err(UnknownSetting {
                    key: "optimizer",
                    found: found.to_owned(),
                    expected: "torch.optim.AdamW, or bitsandbytes.optim.AdamW8bit with min_8bit_size",
                }
                .into());
            }
        };
        let config = AdamWConfig {
            beta1: self.betas[0],
            beta2: self.betas[1],
            epsilon: self.eps,
            weight_decay: self.weight_decay,
        };
        let scaler = LossScaler::fixed();
        Ok(LoraOptimizer::new(
            kind,
            config,
            max_grad_norm,
            scaler,
            lora,
        ))
    }
}

/// Optimiser steps from given starting values.
///
/// A whole run multiplies small differences (a gradient near zero may change its sign, which Adam turns into a full
/// step; an 8-bit code may fall to its neighbour), so each step is looked at in three ways: as part of the run, its
/// gradients at the reference's weights, and its update from the reference's gradients.
pub fn optimise(run: &mut CaseRun) -> Result<(), CaseError> {
    let params: OptParams = run.params()?;
    let mut setup = open_for_steps(run, &params)?;
    let untrained = setup.lora.clone();
    let batches = micro_batches(run, &setup)?;
    let groups: Vec<&[MicroBatch]> = batches
        .chunks(params.accumulation.max(1) as usize)
        .take(params.steps)
        .collect();

    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    let mut optimizer = params.optimizer(params.max_grad_norm, &setup.lora)?;
    for (step, group) in (1..).zip(&groups) {
        let (step_losses, norm, gradients) = take_step(&mut setup, &mut optimizer, &params, group)?;
        losses.extend(step_losses);
        norms.push(norm);
        output_tensors(
            run,
            &format!("step{step}."),
            &setup,
            setup.lora.values.clone(),
        );
        if has_gradients(run, step) {
            output_tensors(run, &format!("step{step}.clipped_grad."), &setup, gradients);
        }
    }
    run.output_f32("loss", losses.clone(), &[losses.len()]);
    run.output_f32("grad_norm", norms.clone(), &[norms.len()]);

    setup.lora = untrained.clone();
    at_given_weights(run, &params, &mut setup, &groups)?;
    setup.lora = untrained;
    from_given_gradients(run, &params, &mut setup)
}

/// Losses and gradients of every step at the weights that the reference had then.
fn at_given_weights(
    run: &mut CaseRun,
    params: &OptParams,
    setup: &mut Setup,
    groups: &[&[MicroBatch]],
) -> Result<(), CaseError> {
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    for (step, group) in (1..).zip(groups) {
        if step > 1 {
            set_values(run, setup, &format!("out.step{}.", step - 1))?;
        }
        let mut optimizer = params.optimizer(params.max_grad_norm, &setup.lora)?;
        let (step_losses, norm, gradients) = take_step(setup, &mut optimizer, params, group)?;
        losses.extend(step_losses);
        norms.push(norm);
        if has_gradients(run, step) {
            let prefix = format!("step{step}.clipped_grad.");
            against_tensors(run, &prefix, "(given weights)", setup, &gradients)?;
        }
    }
    for (name, found) in [("loss", losses), ("grad_norm", norms)] {
        let (expected, shape) = run.values(&format!("out.{name}"))?;
        let found_shape = [found.len()];
        let name = format!("{name} (given weights)");
        run.against(
            &name,
            (&expected, &shape),
            (&Values::F32(found), &found_shape),
        );
    }
    Ok(())
}

/// The optimiser alone, fed with the reference's clipped gradients as long as there are any.
fn from_given_gradients(
    run: &mut CaseRun,
    params: &OptParams,
    setup: &mut Setup,
) -> Result<(), CaseError> {
    let mut optimizer = params.optimizer(f32::MAX, &setup.lora)?;
    for step in 1..=params.steps {
        if !has_gradients(run, step) {
            break;
        }
        let mut gradients = Vec::new();
        for key in setup.keys() {
            gradients.push(run.f32(&format!("out.step{step}.clipped_grad.{key}"))?.0);
        }
        let mut sum = GradientSum::new();
        sum.add(MicroStep {
            loss: 0.0,
            gradients,
        });
        optimizer.step(&mut setup.lora, sum, params.lr);
        let (prefix, values) = (format!("step{step}."), &setup.lora.values);
        against_tensors(run, &prefix, "(given gradients)", setup, values)?;
    }
    Ok(())
}

fn has_gradients(run: &CaseRun, step: usize) -> bool {
    !run.names(&format!("out.step{step}.clipped_grad."))
        .is_empty()
}

/// Compares one array per LoRA tensor with outputs that are also compared in another way.
fn against_tensors(
    run: &mut CaseRun,
    prefix: &str,
    how: &str,
    setup: &Setup,
    values: &[Vec<f32>],
) -> Result<(), CaseError> {
    let tensors = setup.keys().into_iter().zip(setup.lora.shapes());
    for ((key, found_shape), values) in tensors.zip(values) {
        let (expected, shape) = run.values(&format!("out.{prefix}{key}"))?;
        let found = Values::F32(values.clone());
        let name = format!("{prefix}{key} {how}");
        run.against(&name, (&expected, &shape), (&found, &found_shape));
    }
    Ok(())
}

/// The LoRA that a `train_opt_*` case ends with.
pub fn trained(run: &CaseRun) -> Result<TrainableLora, CaseError> {
    let params: OptParams = run.params()?;
    let mut setup = open_for_steps(run, &params)?;
    let batches = micro_batches(run, &setup)?;
    let mut optimizer = params.optimizer(params.max_grad_norm, &setup.lora)?;
    let groups = batches.chunks(params.accumulation.max(1) as usize);
    for group in groups.take(params.steps) {
        take_step(&mut setup, &mut optimizer, &params, group)?;
    }
    Ok(setup.lora)
}

/// The model, and the LoRA at the case's starting values.
fn open_for_steps(run: &CaseRun, params: &OptParams) -> Result<Setup, CaseError> {
    let mut setup = Setup::open(run, &params.base, &params.weighting_scheme)?;
    set_values(run, &mut setup, "in.init.")?;
    Ok(setup)
}

/// Sets the LoRA to tensors of the case's file.
fn set_values(run: &CaseRun, setup: &mut Setup, prefix: &str) -> Result<(), CaseError> {
    let keys = setup.keys();
    for (key, values) in keys.iter().zip(&mut setup.lora.values) {
        *values = run.f32(&format!("{prefix}{key}"))?.0;
    }
    Ok(())
}

/// The losses of a step's micro-batches, the global norm, and the clipped gradients.
type Taken = (Vec<f32>, f32, Vec<Vec<f32>>);

/// One step of training.
fn take_step(
    setup: &mut Setup,
    optimizer: &mut LoraOptimizer,
    params: &OptParams,
    group: &[MicroBatch],
) -> Result<Taken, RunError> {
    let loss_factor = optimizer.loss_factor(params.accumulation);
    let mut losses = Vec::new();
    let mut sum = GradientSum::new();
    for batch in group {
        let guidance = params.guidance_scale;
        let micro = setup
            .gradients
            .micro_step(&setup.lora, batch, guidance, loss_factor)?;
        losses.push(micro.loss);
        sum.add(micro);
    }
    let (outcome, gradients) = optimizer.step(&mut setup.lora, sum, params.lr);
    Ok((losses, outcome.grad_norm, gradients))
}

/// The case's micro-batches in order; prompts are picked from its few by `sample_index`.
fn micro_batches(run: &CaseRun, setup: &Setup) -> Result<Vec<MicroBatch>, CaseError> {
    let (latents, shape) = run.f32("in.model_input")?;
    let [_, b, c, h, w]: [usize; 5] = run.axes("in.model_input", shape)?;
    let (noise, _) = run.f32("in.noise")?;
    let (u, _) = run.f32("in.u")?;
    let (prompts, shape) = run.f32("in.prompt_embeds")?;
    let [num_prompts, num_tokens, width] = run.axes("in.prompt_embeds", shape)?;
    let (pooled, shape) = run.f32("in.pooled_prompt_embeds")?;
    let [_, pooled_width] = run.axes("in.pooled_prompt_embeds", shape)?;
    let (indices, _) = run.i32("in.sample_index")?;
    let row = |values: &[f32], index: usize, len: usize| {
        // Every sample of a micro-batch has the same prompt.
        values[index * len..][..len].repeat(b)
    };
    let latent_len = (b * c * h * w).max(1);
    let mut batches = Vec::new();
    for (((model_input, noise), u), index) in latents
        .chunks_exact(latent_len)
        .zip(noise.chunks_exact(latent_len))
        .zip(u.chunks_exact(b.max(1)))
        .zip(&indices)
    {
        let index = usize::try_from(*index)?;
        if index >= num_prompts {
            return Err(UnknownSetting {
                key: "in.sample_index",
                found: index.to_string(),
                expected: "a row of in.prompt_embeds",
            }
            .into());
        }
        batches.push(MicroBatch {
            shape: [b, c, h, w],
            model_input: model_input.to_vec(),
            noise: noise.to_vec(),
            points: setup.points(u),
            text_shape: [num_tokens, width],
            prompt_embeds: row(&prompts, index, num_tokens * width),
            pooled: row(&pooled, index, pooled_width),
        });
    }
    Ok(batches)
}
