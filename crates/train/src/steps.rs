//! The steps of a run that are left, with a checkpoint now and then.

use std::collections::BTreeMap;
use std::path::Path;

use console::Job;

use crate::checkpoint::{self, file_name};
use crate::data::TrainingData;
use crate::error::TrainError;
use crate::groups::Group;
use crate::trainer::Trainer;

/// Where checkpoints are kept, and how many.
#[derive(Clone, Copy, Debug)]
pub struct Checkpoints<'a> {
    /// Their folder; made when the first is written.
    pub dir: &'a Path,
    /// Optimiser steps between two.
    pub every: u32,
    /// How many of the newest stay.
    pub keep: usize,
}

/// Takes steps until there are `until` of them. `provenance` says what a LoRA of so many steps tells of itself.
///
/// Returns how many checkpoints were written.
///
/// # Errors
///
/// If data cannot be read, the engine cannot go on, training falls apart, or a checkpoint cannot be written.
pub fn take_steps(
    trainer: &mut Trainer<'_>,
    data: &TrainingData,
    until: u32,
    checkpoints: &Checkpoints<'_>,
    job: &Job,
    provenance: impl Fn(u32) -> BTreeMap<String, String>,
) -> Result<u32, TrainError> {
    let first = trainer.num_groups();
    trainer.groups(data).ahead(first, |next| {
        take_each(trainer, next, until, checkpoints, job, provenance)
    })
}

fn take_each(
    trainer: &mut Trainer<'_>,
    next: &mut dyn FnMut() -> Group,
    until: u32,
    checkpoints: &Checkpoints<'_>,
    job: &Job,
    provenance: impl Fn(u32) -> BTreeMap<String, String>,
) -> Result<u32, TrainError> {
    let mut num_written = 0;
    while trainer.num_steps() < until {
        let row = trainer.step(&mut *next)?;
        job.message(format!("loss {:.4}", row.loss));
        if row.skipped {
            tracing::warn!(
                step = row.step,
                loss_scale = row.loss_scale,
                "gradients not finite, step skipped"
            );
            continue;
        }
        tracing::debug!(
            step = row.step,
            loss = row.loss,
            grad_norm = row.grad_norm,
            "step"
        );
        job.advance(1);
        if trainer.num_steps().is_multiple_of(checkpoints.every) {
            write(trainer, checkpoints, provenance(trainer.num_steps()))?;
            num_written += 1;
        }
    }
    Ok(num_written)
}

fn write(
    trainer: &Trainer<'_>,
    checkpoints: &Checkpoints<'_>,
    metadata: BTreeMap<String, String>,
) -> Result<(), TrainError> {
    let (dir, num_steps) = (checkpoints.dir, trainer.num_steps());
    fs_err::create_dir_all(dir).map_err(TrainError::Checkpoints)?;
    let lora = trainer.lora()?;
    // The LoRA first: where there is a checkpoint, there is its LoRA to draw with.
    let snapshot = format!("lora-{num_steps:06}.safetensors");
    lora.to_file(metadata).write(&dir.join(snapshot))?;
    let path = dir.join(file_name(num_steps));
    trainer.checkpoint()?.write(&path, &lora)?;
    checkpoint::prune(dir, num_steps, checkpoints.keep).map_err(TrainError::Checkpoints)?;
    tracing::debug!(step = num_steps, checkpoint = %path.display(), "checkpoint");
    Ok(())
}
