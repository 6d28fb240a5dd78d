//! `metrics.parquet`: one row per training step.

use std::path::Path;

use crate::error::Result;
use crate::parquet_read::ParquetFile;
use crate::parquet_write::{Footer, column, write_table};

/// What one optimiser step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MetricRow {
    /// The step, counted from 1.
    pub step: u32,
    /// Mean weighted loss of its micro-batches.
    pub loss: f32,
    /// Global norm of the gradients before clipping.
    pub grad_norm: f32,
    /// Learning rate used.
    pub learning_rate: f64,
    /// Mean noise level of its samples.
    pub mean_sigma: f32,
    /// Whether the gradients were clipped.
    pub clipped: bool,
    /// Whether the step was skipped because a gradient was not finite.
    pub skipped: bool,
    /// Loss scale used; 1 outside fp16.
    pub loss_scale: f32,
    /// Wall-clock time.
    pub step_s: f64,
}

/// Writes the table, whole or not at all.
///
/// # Errors
///
/// If the file cannot be written.
pub fn write(path: &Path, rows: &[MetricRow], footer: &Footer) -> Result<()> {
    write_table(
        path,
        vec![
            column("step", rows.iter().map(|r| r.step)),
            column("loss", rows.iter().map(|r| r.loss)),
            column("grad_norm", rows.iter().map(|r| r.grad_norm)),
            column("learning_rate", rows.iter().map(|r| r.learning_rate)),
            column("mean_sigma", rows.iter().map(|r| r.mean_sigma)),
            column("clipped", rows.iter().map(|r| r.clipped)),
            column("skipped", rows.iter().map(|r| r.skipped)),
            column("loss_scale", rows.iter().map(|r| r.loss_scale)),
            column("step_s", rows.iter().map(|r| r.step_s)),
        ],
        footer,
    )
}

/// Reads the table.
///
/// # Errors
///
/// If the file cannot be read, or a column is missing or of another type.
pub fn read(path: &Path) -> Result<Vec<MetricRow>> {
    let file = ParquetFile::open(path)?;
    let mut step = file.u32s("step")?.into_iter();
    let mut loss = file.f32s("loss")?.into_iter();
    let mut grad_norm = file.f32s("grad_norm")?.into_iter();
    let mut learning_rate = file.f64s("learning_rate")?.into_iter();
    let mut mean_sigma = file.f32s("mean_sigma")?.into_iter();
    let mut clipped = file.bools("clipped")?.into_iter();
    let mut skipped = file.bools("skipped")?.into_iter();
    let mut loss_scale = file.f32s("loss_scale")?.into_iter();
    let mut step_s = file.f64s("step_s")?.into_iter();
    let row = || {
        Some(MetricRow {
            step: step.next()?,
            loss: loss.next()?,
            grad_norm: grad_norm.next()?,
            learning_rate: learning_rate.next()?,
            mean_sigma: mean_sigma.next()?,
            clipped: clipped.next()?,
            skipped: skipped.next()?,
            loss_scale: loss_scale.next()?,
            step_s: step_s.next()?,
        })
    };
    Ok(std::iter::from_fn(row).collect())
}
