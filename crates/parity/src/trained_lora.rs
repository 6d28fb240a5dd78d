//! A LoRA trained and written by us, for diffusers to load.
//!
//! The fixtures hold LoRA files of diffusers that we read. The other direction needs a run of ours first:
//! `examples/train_lora.rs` trains one on a fixture's model and writes it with our velocities, the oracle's
//! Python loads it, and the test keeps what both said (`tests/fixtures/lora-in-diffusers`).

use std::collections::BTreeMap;
use std::path::Path;

use artifacts::{TensorToWrite, write_safetensors};

use crate::cases;
use crate::checker::{CaseError, CaseRun};
use crate::fixture::FixtureSet;

/// The case whose latents, noise and starting values the LoRA is trained from: clipping and 8-bit states act.
pub const TRAINING_CASE: &str = "train_opt_adamw8bit_f32";

/// The case whose inputs velocities are computed on: a batch of two.
pub const VELOCITY_CASE: &str = "transformer_b2";

/// The strengths that velocities are computed at.
pub const STRENGTHS: [f32; 2] = [1.0, 0.7];

/// A velocity under a LoRA at one strength.
#[derive(Clone, Debug, PartialEq)]
pub struct Velocity {
    /// `velocity_<strength>`: its name in files.
    pub name: String,
    /// Its values, row-major.
    pub values: Vec<f32>,
    /// `(b, n, channels)`.
    pub shape: [usize; 3],
}

/// A set that lacks a case.
#[derive(Debug, thiserror::Error)]
#[error("the fixtures have no case `{name}`")]
struct NoSuchCase {
    name: &'static str,
}

/// Trains a LoRA from the values of [`TRAINING_CASE`], step by step as the stage does, and writes it as the stage does.
///
/// # Errors
///
/// If the set lacks the case or its model, or the file cannot be written.
pub fn train(set: &FixtureSet, path: &Path) -> Result<(), CaseError> {
    let lora = cases::trained(&open(set, TRAINING_CASE)?)?;
    let origin = format!("parity: {TRAINING_CASE} of {:?}", set.origin());
    let metadata = BTreeMap::from([("spritelora.origin".to_owned(), origin)]);
    Ok(lora.to_file(metadata).write(path)?)
}

/// Our velocities under a LoRA file, in the order of [`STRENGTHS`].
///
/// # Errors
///
/// If the set lacks [`VELOCITY_CASE`] or its model, or the LoRA does not fit that.
pub fn velocities(set: &FixtureSet, lora: &Path) -> Result<Vec<Velocity>, CaseError> {
    let run = open(set, VELOCITY_CASE)?;
    STRENGTHS
        .iter()
        .map(|&strength| {
            let velocity = cases::velocity(&run, Some((lora, strength)))?;
            Ok(Velocity {
                name: format!("velocity_{strength:.1}"),
                values: tensor::to_f32(&velocity),
                shape: velocity.dims(),
            })
        })
        .collect()
}

/// Our velocity without a LoRA on the same inputs.
///
/// # Errors
///
/// If the set lacks [`VELOCITY_CASE`] or its model.
pub fn velocity_of_base(set: &FixtureSet) -> Result<Vec<f32>, CaseError> {
    let velocity = cases::velocity(&open(set, VELOCITY_CASE)?, None)?;
    Ok(tensor::to_f32(&velocity))
}

/// Writes velocities to a safetensors file.
///
/// # Errors
///
/// If the file cannot be written.
pub fn write_velocities(path: &Path, velocities: &[Velocity]) -> Result<(), CaseError> {
    let tensors: Vec<TensorToWrite<'_>> = velocities
        .iter()
        .map(|velocity| TensorToWrite::f32(&velocity.name, &velocity.shape, &velocity.values))
        .collect();
    Ok(write_safetensors(path, &tensors, &BTreeMap::new())?)
}

fn open<'a>(set: &'a FixtureSet, name: &'static str) -> Result<CaseRun<'a>, CaseError> {
    let case = set.cases().iter().find(|case| case.name == name);
    CaseRun::open(set, case.ok_or(NoSuchCase { name })?)
}
