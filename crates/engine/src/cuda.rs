//! The engine `cuda`: `engine-cuda`, with the LoRA, its optimiser and the accumulation of gradients on the card.
//!
//! Training is planned for the memory that is free before the network is loaded. A card that fails in the middle of a
//! step (it has fallen off the bus, or somebody else took its memory) ends the run with [`RunError::Card`]: nothing can
//! be gone on with, and the newest checkpoint is where the next run begins.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use engine_cuda::model::{
    self, EngineOptions, LoraFactors, Recompute, SamplerInput, Shape, VelocityInput, WeightForm,
    WeightSource,
};
use engine_cuda::stream::OpenOptions;
use engine_cuda::{CudaError, Half, Stream, gemm};
use flow_matching::model_time;
use mmdit::patches::PATCH_CELLS;
use mmdit::{BaseWeights, MmditConfig, MmditError};
use tensor::Precision;

use crate::batch::MicroBatch;
use crate::choice::EngineName;
use crate::host::Gradients;
use crate::lora_state::TrainableLora;
use crate::micro::MicroStep;
use crate::optimise::{LoraOptimizer, LossScaler, StepOutcome};
use crate::plan::{
    PlanError, TrainingPlan, TrainingRequest, Workload, gigabytes, training_options,
};
use crate::{
    Engine, Factors, ImportError, Input, OpenError, Opening, RunError, StepReport, TrainingEngine,
    TrainingState, Trajectory,
};

/// Kept free of what a plan may use: kernels' code, and what the driver takes for graphs.
const RESERVE_BYTES: usize = 512 << 20;

/// The 16-bit float of a precision.
pub(crate) fn half_of(precision: Precision) -> Option<Half> {
    match precision {
        Precision::F32 => None,
        Precision::Bf16 => Some(Half::Bf16),
        Precision::F16 => Some(Half::F16),
    }
}

/// The form that weights are kept in.
pub(crate) fn form_of(base: BaseWeights) -> WeightForm {
    match base {
        BaseWeights::Plain => WeightForm::Half,
        BaseWeights::Nf4 { double_quant } => WeightForm::Nf4 { double_quant },
    }
}

fn config_of(opening: &Opening<'_>) -> Result<MmditConfig, OpenError> {
    let config = MmditConfig::from_file(&opening.dir.join("config.json"));
    Ok(config.map_err(MmditError::from)?)
}

fn stream_of(opening: &Opening<'_>) -> Result<Stream, CudaError> {
    Stream::open(&OpenOptions {
        device: opening.card,
        kernel_cache: None,
    })
}

fn load(
    opening: &Opening<'_>,
    stream: Stream,
    config: &MmditConfig,
) -> Result<model::Engine, OpenError> {
    let options = options_of(opening)?;
    Ok(model::Engine::open(stream, opening.dir, config, options)?)
}

fn options_of(opening: &Opening<'_>) -> Result<EngineOptions, OpenError> {
    let t = half_of(opening.precision).ok_or(PlanError::Precision {
        found: opening.precision,
    })?;
    Ok(EngineOptions {
        t,
        form: form_of(opening.base),
    })
}

/// How to train in what the card has free, and in at most `limit_bytes`.
fn planned(
    opening: &Opening<'_>,
    config: &MmditConfig,
    stream: &Stream,
    limit_bytes: usize,
    lora: &TrainableLora,
    optimizer: &LoraOptimizer,
    workload: Workload,
) -> Result<TrainingPlan, OpenError> {
    let (free, _) = stream.memory()?;
    // The products' workspace is taken already, and the plan counts it.
    let limit = (free + gemm::WORKSPACE_BYTES).saturating_sub(RESERVE_BYTES);
    let request = TrainingRequest {
        config,
        precision: opening.precision,
        base: opening.base,
        lora,
        optimizer,
        workload,
    };
    Ok(request.choose(limit.min(limit_bytes))?)
}

/// One set of factors per layer: several add up, which is one of their joint rank with the strengths in B.
fn merged(factors: &[Factors]) -> Vec<LoraFactors> {
    let mut by_path: BTreeMap<&str, Vec<&Factors>> = BTreeMap::new();
    for one in factors {
        by_path.entry(&one.path).or_default().push(one);
    }
    let of_one_layer = |(path, parts): (&str, Vec<&Factors>)| {
        if let [one] = parts[..] {
            return LoraFactors {
                path: path.to_owned(),
                rank: one.rank,
                scale: one.scale,
                a: one.a.clone(),
                b: one.b.clone(),
            };
        }
        let rank = parts.iter().map(|part| part.rank).sum();
        let rows = parts
            .iter()
            .map(|part| part.b.len() / part.rank.max(1))
            .min();
        let mut b = Vec::new();
        for row in 0..rows.unwrap_or(0) {
            for part in &parts {
                let values = &part.b[row * part.rank..(row + 1) * part.rank];
                b.extend(values.iter().map(|value| value * part.scale));
            }
        }
        LoraFactors {
            path: path.to_owned(),
            rank,
            scale: 1.0,
            a: parts.iter().flat_map(|part| &part.a).copied().collect(),
            b,
        }
    };
    by_path.into_iter().map(of_one_layer).collect()
}

/// Sizes of a batch whose positions are those of text tokens and of a whole picture.
///
/// # Panics
///
/// If they are not.
fn shape_of(b: usize, num_image_tokens: usize, positions: &[[f32; 3]]) -> Shape {
    let text = positions.len().saturating_sub(num_image_tokens);
    let cells = |axis: usize| {
        let last = positions.last().map_or(0.0, |position| position[axis]);
        PATCH_CELLS * (last as usize + 1)
    };
    let latent_cells = [cells(1), cells(2)];
    let mut expected = mmdit::text_ids(text);
    expected.extend(mmdit::image_ids(latent_cells[0], latent_cells[1]));
    assert!(
        positions == expected,
        "{num_image_tokens} image tokens after {text} text tokens are no whole picture"
    );
    Shape {
        b,
        text,
        latent_cells,
    }
}

/// `engine-cuda` for drawing.
pub struct Cuda {
    pub(crate) engine: model::Engine,
}

impl Cuda {
    /// Loads the network onto the opening's card.
    ///
    /// # Errors
    ///
    /// If something that the engine needs is not there, the network's configuration or weights cannot be used, or the
    /// card has too little memory.
    pub fn open(opening: &Opening<'_>) -> Result<Self, OpenError> {
        let config = config_of(opening)?;
        let engine = load(opening, stream_of(opening)?, &config)?;
        Ok(Self { engine })
    }
}

impl Engine for Cuda {
    fn name(&self) -> EngineName {
        EngineName::Cuda
    }

    fn config(&self) -> &MmditConfig {
        self.engine.config()
    }

    fn set_lora(&mut self, factors: &[Factors]) -> Result<(), RunError> {
        let factors = merged(factors);
        if factors.is_empty() {
            self.engine.detach_lora()?;
        } else {
            self.engine.attach_lora(&factors, false)?;
        }
        Ok(())
    }

    fn draw(
        &mut self,
        trajectory: &Trajectory<'_>,
        on_step: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<Option<Vec<f32>>, RunError> {
        let config = self.engine.config();
        let b = trajectory.pooled_projections.len() / config.pooled_projection_dim.max(1);
        let num_image_tokens = trajectory.hidden_states.len() / (b * config.in_channels).max(1);
        self.engine.start_sampling(&SamplerInput {
            shape: shape_of(b, num_image_tokens, trajectory.positions),
            tokens: trajectory.hidden_states,
            sigmas: trajectory.sigmas,
            times: trajectory.times,
            text: trajectory.encoder_hidden_states,
            pooled: trajectory.pooled_projections,
            negative: trajectory.negative,
            guidance: trajectory.guidance,
        })?;
        for step in 0..trajectory.times.len() {
            self.engine.sample_step()?;
            on_step(step, &self.engine.samples()?);
        }
        Ok(Some(self.engine.samples()?))
    }

    fn velocity(&mut self, input: &Input<'_>) -> Result<Vec<f32>, RunError> {
        let b = input.timestep.len();
        let width = self.engine.config().in_channels;
        let num_image_tokens = input.hidden_states.len() / (b * width).max(1);
        Ok(self.engine.velocity(&VelocityInput {
            shape: shape_of(b, num_image_tokens, input.positions),
            tokens: input.hidden_states,
            text: input.encoder_hidden_states,
            pooled: input.pooled_projections,
            times: input.timestep,
            guidance: input.guidance,
        })?)
    }
}

/// The numbers of a batch's samples, as the card wants them.
struct PerSample {
    sigmas: Vec<f32>,
    times: Vec<f32>,
    weights: Vec<f32>,
    guidance: Option<Vec<f32>>,
}

impl PerSample {
    fn of(batch: &MicroBatch, guidance: Option<f32>) -> Self {
        let points = || batch.points.iter();
        Self {
            sigmas: points().map(|point| point.sigma).collect(),
            times: points().map(|point| model_time(point.timestep)).collect(),
            weights: points().map(|point| point.weight).collect(),
            guidance: guidance.map(|scale| vec![scale; batch.len()]),
        }
    }

    fn with<'a>(&'a self, batch: &'a MicroBatch) -> model::MicroBatch<'a> {
        let [b, _, h, w] = batch.shape;
        model::MicroBatch {
            shape: Shape {
                b,
                text: batch.text_shape[0],
                latent_cells: [h, w],
            },
            latents: &batch.model_input,
            noise: &batch.noise,
            sigmas: &self.sigmas,
            times: &self.times,
            weights: &self.weights,
            text: &batch.prompt_embeds,
            pooled: &batch.pooled,
            guidance: self.guidance.as_deref(),
        }
    }
}

/// `engine-cuda` for training.
pub struct CudaTraining {
    pub(crate) engine: model::Engine,
    /// The optimiser's numbers, and what a saved state has to look like; its own moments stay at their beginning.
    template: LoraOptimizer,
    scaler: LossScaler,
    num_steps: u64,
    pub(crate) plan: TrainingPlan,
    /// Ours after the first step.
    pub(crate) measured_bytes: Option<usize>,
}

impl CudaTraining {
    /// Plans for the card's free memory, then loads the network onto it.
    ///
    /// # Errors
    ///
    /// If something that the engine needs is not there, the work does not fit into the card's memory, the LoRA is on
    /// layers that the network has not, or the network's configuration or weights cannot be used.
    pub fn open(
        opening: &Opening<'_>,
        lora: &TrainableLora,
        optimizer: LoraOptimizer,
        workload: Workload,
    ) -> Result<Self, OpenError> {
        let config = config_of(opening)?;
        let stream = stream_of(opening)?;
        let plan = planned(
            opening,
            &config,
            &stream,
            usize::MAX,
            lora,
            &optimizer,
            workload,
        )?;
        let engine = load(opening, stream, &config)?;
        Self::new(engine, lora, optimizer, plan)
    }

    /// As [`CudaTraining::open`] with weights from elsewhere than the opening's folder, which is not looked at, in at most
    /// `limit_bytes` of the card's memory.
    ///
    /// # Errors
    ///
    /// As [`CudaTraining::open`].
    pub fn with_weights(
        opening: &Opening<'_>,
        (config, weights): (&MmditConfig, &dyn WeightSource),
        limit_bytes: usize,
        lora: &TrainableLora,
        optimizer: LoraOptimizer,
        workload: Workload,
    ) -> Result<Self, OpenError> {
        let stream = stream_of(opening)?;
        let plan = planned(
            opening,
            config,
            &stream,
            limit_bytes,
            lora,
            &optimizer,
            workload,
        )?;
        let engine = model::Engine::load(stream, config, weights, options_of(opening)?)?;
        Self::new(engine, lora, optimizer, plan)
    }

    /// Training with a network that is loaded already.
    pub(crate) fn new(
        mut engine: model::Engine,
        lora: &TrainableLora,
        optimizer: LoraOptimizer,
        plan: TrainingPlan,
    ) -> Result<Self, OpenError> {
        engine.attach_lora(&merged(&lora.factors()), true)?;
        engine.start_training(training_options(&optimizer, plan.recompute()))?;
        Ok(Self {
            engine,
            scaler: optimizer.scaler(),
            template: optimizer,
            num_steps: 0,
            plan,
            measured_bytes: None,
        })
    }
}

impl TrainingEngine for CudaTraining {
    fn name(&self) -> EngineName {
        EngineName::Cuda
    }

    fn num_steps(&self) -> u64 {
        self.num_steps
    }

    fn at_once(&self) -> usize {
        self.plan.fused
    }

    fn step(
        &mut self,
        batches: &[MicroBatch],
        guidance: f32,
        learning_rate: f64,
    ) -> Result<StepReport, RunError> {
        let loss_scale = self.scaler.scale;
        let guidance = self.engine.config().guidance_embeds.then_some(guidance);
        let loss_factor = loss_scale / batches.len() as f32;
        for batch in batches {
            let numbers = PerSample::of(batch, guidance);
            self.engine.micro_step(&numbers.with(batch), loss_factor)?;
        }
        let report = self
            .engine
            .optimizer_step(learning_rate, 1.0 / loss_scale)?;
        self.scaler.update(!report.skipped);
        if !report.skipped {
            self.num_steps += 1;
        }
        let bytes = self.engine.stream().allocated_bytes() + gemm::WORKSPACE_BYTES;
        self.measured_bytes = self.measured_bytes.max(Some(bytes));
        Ok(StepReport {
            loss: report.loss,
            outcome: StepOutcome {
                grad_norm: report.grad_norm,
                clipped: report.clipped,
                skipped: report.skipped,
                loss_scale,
            },
        })
    }

    fn lora(&self) -> Result<Vec<Vec<f32>>, RunError> {
        let factors = self.engine.lora()?.into_iter();
        Ok(factors.flat_map(|layer| [layer.a, layer.b]).collect())
    }

    fn export(&self) -> Result<TrainingState, RunError> {
        let (num_steps, optimizer) = self.engine.export_optimizer()?;
        Ok(TrainingState {
            num_steps,
            lora: self.lora()?,
            optimizer,
            scaler: self.scaler,
        })
    }

    fn import(&mut self, state: TrainingState) -> Result<(), ImportError> {
        let TrainingState {
            num_steps,
            lora,
            optimizer,
            scaler,
        } = state;
        // The host's optimiser says what is wrong with a state before the card sees any of it.
        self.template
            .clone()
            .import(num_steps, optimizer.clone(), scaler)?;
        self.engine.import_optimizer(num_steps, optimizer)?;
        self.engine.set_lora_values(&lora.concat())?;
        self.num_steps = num_steps;
        self.scaler = scaler;
        Ok(())
    }

    fn notes(&self) -> Vec<String> {
        let predicted = self.plan.total_bytes();
        let mut notes = vec![format!("engine cuda: {}", self.plan.summary())];
        if let Some(measured) = self.measured_bytes {
            notes.push(format!(
                "GPU memory: {} predicted, {} measured ({:+.1} %)",
                gigabytes(predicted),
                gigabytes(measured),
                100.0 * (measured as f64 / predicted as f64 - 1.0)
            ));
        }
        notes
    }
}

/// `engine-cuda` for the gradients of single micro-batches, with every block recomputed.
pub struct CudaGradients {
    engine: model::Engine,
}

impl CudaGradients {
    /// Loads the network onto the opening's card.
    ///
    /// # Errors
    ///
    /// As [`Cuda::open`].
    pub fn open(opening: &Opening<'_>) -> Result<Self, OpenError> {
        let Cuda { engine } = Cuda::open(opening)?;
        Ok(Self { engine })
    }
}

impl Gradients for CudaGradients {
    fn name(&self) -> EngineName {
        EngineName::Cuda
    }

    fn micro_step(
        &mut self,
        lora: &TrainableLora,
        batch: &MicroBatch,
        guidance: f32,
        loss_factor: f32,
    ) -> Result<MicroStep, RunError> {
        let guidance = self.engine.config().guidance_embeds.then_some(guidance);
        let numbers = PerSample::of(batch, guidance);
        let engine = &mut self.engine;
        engine.attach_lora(&merged(&lora.factors()), true)?;
        engine.start_training(model::TrainingOptions {
            recompute: Recompute::Everything,
            // Never asked to take a step.
            optimizer: quant::OptimizerKind::AdamW,
            adamw: quant::AdamWConfig {
                beta1: 0.0,
                beta2: 0.0,
                epsilon: 1.0,
                weight_decay: 0.0,
            },
            max_grad_norm: f32::INFINITY,
        })?;
        engine.micro_step(&numbers.with(batch), loss_factor)?;
        let (loss, _) = engine.loss_sum()?;
        let gradients = engine.gradients()?.into_iter();
        Ok(MicroStep {
            loss,
            gradients: gradients.map(|(_, values)| values).collect(),
        })
    }
}
