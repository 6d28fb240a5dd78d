//! What draws and trains with the transformer, whichever execution of the network does the work.
//!
//! | engine | network | device | precision |
//! |---|---|---|---|
//! | `portable` | `mmdit`, differentiated by Burn | any | any |
//! | `cpu` | `engine-cpu`, scheduled by hand | the CPU | f32 |
//! | `cuda` | `engine-cuda`, scheduled by hand | NVIDIA cards | bf16, fp16 |
//!
//! Two traits, everything at their boundary plain row-major `f32`: [`Engine`] says velocities, [`TrainingEngine`] owns
//! a LoRA's master values and the optimiser's state and takes whole steps, so that an engine with memory of its own
//! may keep both there. [`HostEngine`] is the second for engines that only give gradients.
//!
//! Engines agree within rounding and not to the bit, so a checkpoint names the engine that made it.
//!
//! * [`choice`]: which one. * [`batch`]: what a training step is given. * [`lora_state`]: the factors being trained.
//! * [`optimise`]: gradients into a step. * [`host`]: steps of engines that give gradients.
//! * [`failure`]: an engine that cannot go on. * [`micro`], [`portable`]: Burn. * [`cpu`]: the CPU by hand. * [`cuda`]: NVIDIA by hand; [`plan`]: what training
//!   there takes, before anything is loaded.
#![forbid(unsafe_code)]

pub mod batch;
pub mod lora_state;
pub mod optimise;

pub mod choice;
pub mod failure;
pub mod host;

pub mod micro;

pub mod cpu;
pub mod portable;

pub mod cuda;
pub mod plan;

#[cfg(test)]
mod tests;

use std::path::Path;

use engine_cuda::CudaError;
use mmdit::{BaseWeights, MmditConfig, MmditError};
use pipeline::{FailureKind, StageError};
use quant::StatePart;
use tensor::{Device, Precision};

pub use batch::MicroBatch;
pub use choice::{Chosen, EngineError, EngineName, base_weights_of, choose, precision_of};
pub use engine_cpu::{Factors, Input};
pub use failure::{ImportError, RunError};
pub use host::{Gradients, HostEngine};
pub use lora_state::TrainableLora;
pub use micro::MicroStep;
pub use optimise::{GradientSum, LoraOptimizer, LossScaler, StepOutcome};
pub use plan::{PlanError, TrainingPlan, TrainingRequest, Workload};

/// The network with frozen weights, for drawing.
pub trait Engine {
    /// Which one it is.
    fn name(&self) -> EngineName;

    /// The network's sizes.
    fn config(&self) -> &MmditConfig;

    /// Replaces the LoRAs; several on one layer add up.
    ///
    /// # Errors
    ///
    /// If the engine cannot go on.
    ///
    /// # Panics
    ///
    /// If factors are on a layer that the network has not, or are not of its size.
    fn set_lora(&mut self, factors: &[Factors]) -> Result<(), RunError>;

    /// Takes pictures through all their steps, where the engine does that by itself: the pictures as tokens,
    /// `(b, n, in_channels)`, or nothing if it only says velocities. `on_step` sees the number of each step, from 0, and
    /// the tokens behind it.
    ///
    /// # Errors
    ///
    /// If the engine cannot go on.
    ///
    /// # Panics
    ///
    /// As [`Engine::velocity`].
    fn draw(
        &mut self,
        _trajectory: &Trajectory<'_>,
        _on_step: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<Option<Vec<f32>>, RunError> {
        Ok(None)
    }

    /// The velocity of each image token: `(b, n, velocity channels)`, row-major.
    ///
    /// # Errors
    ///
    /// If the engine cannot go on.
    ///
    /// # Panics
    ///
    /// If the sizes of the inputs do not agree with one another or with the network's, or guidance is given to a
    /// network without guidance embedding (or withheld from one with it).
    fn velocity(&mut self, input: &Input<'_>) -> Result<Vec<f32>, RunError>;
}

/// Euler steps from noise to pictures; everything row-major with the sample as first axis.
#[derive(Clone, Copy, Debug)]
pub struct Trajectory<'a> {
    /// Noise as tokens, `(b, n, in_channels)`.
    pub hidden_states: &'a [f32],
    /// Text tokens, `(b, l, joint_attention_dim)`.
    pub encoder_hidden_states: &'a [f32],
    /// Pooled captions, `(b, pooled_projection_dim)`.
    pub pooled_projections: &'a [f32],
    /// For true classifier-free guidance: text tokens and pooled captions of the negative prompt, and the scale.
    pub negative: Option<(&'a [f32], &'a [f32], f32)>,
    /// Guidance scale, for models with a guidance embedding and only for them.
    pub guidance: Option<f32>,
    /// Noise levels, one more than there are steps.
    pub sigmas: &'a [f32],
    /// What the network is told at each step, 0 to 1.
    pub times: &'a [f32],
    /// Positions of one sample's tokens: text, then image.
    pub positions: &'a [[f32; 3]],
}

/// A LoRA in training, its optimiser, and the network under it.
pub trait TrainingEngine {
    /// Which one it is.
    fn name(&self) -> EngineName;

    /// Optimiser steps taken; skipped ones do not count.
    fn num_steps(&self) -> u64;

    /// How many micro-batches it computes as one. Whoever makes a step's batches may make each of so many micro-batches;
    /// that changes rounding alone.
    fn at_once(&self) -> usize {
        1
    }

    /// One optimiser step on some batches of one size: their gradients' mean, clipped, through AdamW, unless one of them is
    /// not finite. After an error the LoRA and the optimiser's state are undefined, and no step can follow.
    ///
    /// # Errors
    ///
    /// If the engine cannot go on.
    ///
    /// # Panics
    ///
    /// If a batch's sizes are not the network's.
    fn step(
        &mut self,
        batches: &[MicroBatch],
        guidance: f32,
        learning_rate: f64,
    ) -> Result<StepReport, RunError>;

    /// The LoRA's values as they are now, in the order of [`TrainableLora::names`].
    ///
    /// # Errors
    ///
    /// If the engine cannot go on.
    fn lora(&self) -> Result<Vec<Vec<f32>>, RunError>;

    /// Everything that a later run continues from.
    ///
    /// # Errors
    ///
    /// If the engine cannot go on.
    fn export(&self) -> Result<TrainingState, RunError>;

    /// Continues from a saved state.
    ///
    /// # Errors
    ///
    /// If the optimiser's arrays are not those of this LoRA and optimiser (then nothing has changed), or the engine
    /// cannot go on.
    fn import(&mut self, state: TrainingState) -> Result<(), ImportError>;

    /// What a person should know of how it went, a line each.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
}

/// What became of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Mean loss of the batches, before the step.
    pub loss: f32,
    /// What the optimiser did.
    pub outcome: StepOutcome,
}

/// What a training engine continues from.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainingState {
    /// Optimiser steps taken.
    pub num_steps: u64,
    /// The LoRA's values, in the order of [`TrainableLora::names`].
    pub lora: Vec<Vec<f32>>,
    /// The optimiser's moments.
    pub optimizer: Vec<StatePart>,
    /// The loss scaler.
    pub scaler: LossScaler,
}

/// Which network, and how it is wanted.
#[derive(Clone, Debug)]
pub struct Opening<'a> {
    /// Its folder in diffusers' layout.
    pub dir: &'a Path,
    /// Where Burn computes.
    pub device: Device,
    /// Number of the card that the engine `cuda` computes on; the others do not look at it.
    pub card: usize,
    /// What it computes in.
    pub precision: Precision,
    /// In what form its linear layers are kept.
    pub base: BaseWeights,
}

/// Why a network cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Its configuration or weights cannot be used.
    #[error(transparent)]
    Network(#[from] MmditError),
    /// Training it does not fit the card, or is not what the engine does.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The card, or what the engine needs beside it, is not there or fails.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

impl StageError for OpenError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::Plan(PlanError::Cuda(error)) | Self::Cuda(error) => failure::kind_of(error),
            _ => FailureKind::BadInput,
        }
    }

    fn help(&self) -> Option<String> {
        match self {
            Self::Network(_) => None,
            Self::Plan(PlanError::Cuda(CudaError::Model(error)))
            | Self::Cuda(CudaError::Model(error)) => failure::advice(error),
            Self::Cuda(_) => None,
            Self::Plan(error) => error.help(),
        }
    }
}

/// Loads the network for drawing.
///
/// # Errors
///
/// If its configuration or weights cannot be used.
pub fn open(name: EngineName, opening: &Opening<'_>) -> Result<Box<dyn Engine>, OpenError> {
    Ok(match name {
        EngineName::Portable => Box::new(portable::Portable::open(opening)?),
        EngineName::Cpu => Box::new(cpu::Cpu::open(opening)?),
        EngineName::Cuda => Box::new(cuda::Cuda::open(opening)?),
    })
}

/// Loads the network to train a LoRA on it, in steps of the workload's sizes.
///
/// # Errors
///
/// If its configuration or weights cannot be used, or the engine cannot train this LoRA here.
pub fn open_training(
    name: EngineName,
    opening: &Opening<'_>,
    lora: TrainableLora,
    optimizer: LoraOptimizer,
    workload: Workload,
) -> Result<Box<dyn TrainingEngine>, OpenError> {
    if name == EngineName::Cuda {
        let training = cuda::CudaTraining::open(opening, &lora, optimizer, workload)?;
        return Ok(Box::new(training));
    }
    let gradients = open_gradients(name, opening)?;
    Ok(Box::new(HostEngine::new(gradients, lora, optimizer)))
}

/// Loads the network for the gradients of single micro-batches.
///
/// # Errors
///
/// If its configuration or weights cannot be used.
pub fn open_gradients(
    name: EngineName,
    opening: &Opening<'_>,
) -> Result<Box<dyn Gradients>, OpenError> {
    Ok(match name {
        EngineName::Portable => Box::new(portable::PortableGradients::open(opening)?),
        EngineName::Cpu => Box::new(cpu::Cpu::open(opening)?),
        EngineName::Cuda => Box::new(cuda::CudaGradients::open(opening)?),
    })
}
