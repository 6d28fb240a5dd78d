//! Everything that a run continues from, in one safetensors file that is there whole or not at all.
//!
//! | tensor | content |
//! |---|---|
//! | `lora.<name>` | master values, F32 |
//! | `optimizer.<name>.<role>` | moments, F32 or U8 codes with F32 scales |
//! | `metrics` | one row of nine F64 per step so far |
//!
//! The header entry `spritelora.state` holds the counters and the loss scale as JSON, `spritelora.digest` a digest over
//! the state and all tensors: a file that a broken disk changed is not continued from. Random numbers need no state:
//! they are functions of the seed and of what they are for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use artifacts::{
    ArtifactError, Digest, Dtype, Hasher, MetricRow, SafetensorsFile, TensorToWrite,
    write_safetensors,
};
use engine::{EngineName, LossScaler, TrainableLora};
use quant::{StatePart, StateValues};
use serde::{Deserialize, Serialize};

/// Version of the layout.
const FORMAT: u32 = 3;

const STATE_KEY: &str = "spritelora.state";
const DIGEST_KEY: &str = "spritelora.digest";
const METRICS: &str = "metrics";
const METRIC_COLUMNS: usize = 9;

/// The counters of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunState {
    /// Version of the layout.
    pub format: u32,
    /// Fingerprint of the run, 64 hexadecimal digits: another run's checkpoint is not continued from.
    pub fingerprint: String,
    /// The engine that took the steps: engines agree within rounding only, so no other continues them.
    pub engine: EngineName,
    /// Micro-batches that it computed as one, which decides in what order sums are taken.
    pub at_once: usize,
    /// Optimiser steps taken.
    pub num_steps: u32,
    /// Steps taken or skipped; decides which data come next.
    pub num_groups: u64,
    /// The loss scaler.
    pub scaler: LossScaler,
}

/// What a run continues from.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Counters and loss scale.
    pub state: RunState,
    /// Values of the LoRA, in the order of [`TrainableLora::names`].
    pub lora: Vec<Vec<f32>>,
    /// The optimiser's moments.
    pub optimizer: Vec<StatePart>,
    /// What every step did.
    pub metrics: Vec<MetricRow>,
}

/// Why a file is no checkpoint of this run.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// It cannot be read as a safetensors file.
    #[error(transparent)]
    File(#[from] ArtifactError),
    /// An entry of its header is missing or cannot be read.
    #[error("its header entry `{key}` is missing or cannot be read")]
    Header {
        /// The entry.
        key: &'static str,
    },
    /// It was written by another version.
    #[error("it has layout {found}; this program reads {FORMAT}")]
    Format {
        /// Its layout.
        found: u32,
    },
    /// It is of another run.
    #[error("it is of the run {found}, not of {expected}")]
    OtherRun {
        /// This run.
        expected: String,
        /// Its run.
        found: String,
    },
    /// Its bytes changed.
    #[error("its content has the digest {found}, and {expected} was written")]
    Damaged {
        /// What it says of itself.
        expected: Digest,
        /// What it has.
        found: Digest,
    },
    /// A tensor is of another size.
    #[error("its tensor `{name}` does not fit the LoRA of this run")]
    Tensor {
        /// The tensor.
        name: String,
    },
}

impl RunState {
    /// The counters of a run of this layout.
    pub fn new(
        fingerprint: String,
        (engine, at_once): (EngineName, usize),
        num_steps: u32,
        num_groups: u64,
        scaler: LossScaler,
    ) -> Self {
        Self {
            format: FORMAT,
            fingerprint,
            engine,
            at_once,
            num_steps,
            num_groups,
            scaler,
        }
    }
}

/// File name of the checkpoint after a step.
pub fn file_name(num_steps: u32) -> String {
    format!("step-{num_steps:06}.safetensors")
}

/// The step of a checkpoint's file name.
fn step_of(path: &Path) -> Option<u32> {
    path.file_name()?
        .to_str()?
        .strip_prefix("step-")?
        .strip_suffix(".safetensors")?
        .parse()
        .ok()
}

impl Checkpoint {
    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    ///
    /// If the disk refuses.
    pub fn write(&self, path: &Path, lora: &TrainableLora) -> Result<(), ArtifactError> {
        let metrics: Vec<u8> = self
            .metrics
            .iter()
            .flat_map(|row| to_numbers(row).into_iter().flat_map(f64::to_le_bytes))
            .collect();
        let metrics_shape = [self.metrics.len(), METRIC_COLUMNS];
        let lora_shapes = lora.shapes();
        let lora_names: Vec<String> = lora.names().iter().map(|n| format!("lora.{n}")).collect();
        let part_names: Vec<String> = self
            .optimizer
            .iter()
            .map(|part| format!("optimizer.{}", part.name))
            .collect();
        let part_shapes: Vec<[usize; 1]> = self
            .optimizer
            .iter()
            .map(|part| match &part.values {
                StateValues::F32(values) => [values.len()],
                StateValues::U8(values) => [values.len()],
            })
            .collect();
        let mut tensors = vec![TensorToWrite {
            name: METRICS,
            dtype: Dtype::F64,
            shape: &metrics_shape,
            bytes: &metrics,
        }];
        for ((name, shape), values) in lora_names.iter().zip(&lora_shapes).zip(&self.lora) {
            tensors.push(TensorToWrite::f32(name, shape, values));
        }
        for ((name, shape), part) in part_names.iter().zip(&part_shapes).zip(&self.optimizer) {
            tensors.push(match &part.values {
                StateValues::F32(values) => TensorToWrite::f32(name, shape, values),
                StateValues::U8(bytes) => TensorToWrite {
                    name,
                    dtype: Dtype::U8,
                    shape,
                    bytes,
                },
            });
        }
        let state = serde_json::to_string(&self.state).expect("counters always serialise");
        let contents: BTreeMap<&str, &[u8]> = tensors
            .iter()
            .map(|tensor| (tensor.name, tensor.bytes))
            .collect();
        let digest = digest(&state, contents);
        let metadata = BTreeMap::from([
            (STATE_KEY.to_owned(), state),
            (DIGEST_KEY.to_owned(), digest.to_string()),
        ]);
        write_safetensors(path, &tensors, &metadata)
    }

    /// Reads a file and checks all of it.
    ///
    /// # Errors
    ///
    /// If it is damaged, or of another run or another LoRA.
    pub fn read(
        path: &Path,
        fingerprint: &str,
        lora: &TrainableLora,
    ) -> Result<Self, CheckpointError> {
        let file = SafetensorsFile::open(path)?;
        let entry = |key| {
            file.metadata()
                .get(key)
                .ok_or(CheckpointError::Header { key })
        };
        let text = entry(STATE_KEY)?;
        let state: RunState =
            serde_json::from_str(text).map_err(|_| CheckpointError::Header { key: STATE_KEY })?;
        if state.format != FORMAT {
            return Err(CheckpointError::Format {
                found: state.format,
            });
        }
        if state.fingerprint != fingerprint {
            return Err(CheckpointError::OtherRun {
                expected: fingerprint.to_owned(),
                found: state.fingerprint,
            });
        }
        let expected: Digest = entry(DIGEST_KEY)?
            .parse()
            .map_err(|_| CheckpointError::Header { key: DIGEST_KEY })?;
        let contents = file
            .names()
            .map(|name| Ok((name, file.bytes(name)?)))
            .collect::<Result<BTreeMap<_, _>, ArtifactError>>()?;
        let found = digest(text, contents);
        if found != expected {
            return Err(CheckpointError::Damaged { expected, found });
        }

        let wrong = |name: &str| CheckpointError::Tensor {
            name: name.to_owned(),
        };
        let mut values = Vec::new();
        for (name, shape) in lora.names().iter().zip(lora.shapes()) {
            let name = format!("lora.{name}");
            if file.info(&name)?.shape != shape {
                return Err(wrong(&name));
            }
            values.push(file.f32(&name)?);
        }
        let mut optimizer = Vec::new();
        for name in file.names() {
            let Some(part) = name.strip_prefix("optimizer.") else {
                continue;
            };
            let values = match file.info(name)?.dtype {
                Dtype::U8 => StateValues::U8(file.u8(name)?),
                Dtype::F32 => StateValues::F32(file.f32(name)?),
                _ => return Err(wrong(name)),
            };
            optimizer.push(StatePart {
                name: part.to_owned(),
                values,
            });
        }
        let info = file.info(METRICS)?;
        if info.dtype != Dtype::F64 || info.shape.get(1) != Some(&METRIC_COLUMNS) {
            return Err(wrong(METRICS));
        }
        let metrics = file
            .bytes(METRICS)?
            .as_chunks::<{ 8 * METRIC_COLUMNS }>()
            .0
            .iter()
            .map(from_bytes)
            .collect();
        Ok(Self {
            state,
            lora: values,
            optimizer,
            metrics,
        })
    }
}

/// Over the state and every tensor with its name, sorted.
fn digest(state: &str, contents: BTreeMap<&str, &[u8]>) -> Digest {
    let mut hasher = Hasher::new();
    hasher.field(state.as_bytes());
    for (name, bytes) in contents {
        hasher.field(name.as_bytes());
        hasher.field(bytes);
    }
    hasher.finish()
}

/// Exact: every column fits a double.
fn to_numbers(row: &MetricRow) -> [f64; METRIC_COLUMNS] {
    [
        f64::from(row.step),
        f64::from(row.loss),
        f64::from(row.grad_norm),
        row.learning_rate,
        f64::from(row.mean_sigma),
        f64::from(u8::from(row.clipped)),
        f64::from(u8::from(row.skipped)),
        f64::from(row.loss_scale),
        row.step_s,
    ]
}

fn from_bytes(bytes: &[u8; 8 * METRIC_COLUMNS]) -> MetricRow {
    let numbers = bytes.as_chunks::<8>().0;
    let number = |column: usize| f64::from_le_bytes(numbers[column]);
    MetricRow {
        step: number(0) as u32,
        loss: number(1) as f32,
        grad_norm: number(2) as f32,
        learning_rate: number(3),
        mean_sigma: number(4) as f32,
        clipped: number(5) != 0.0,
        skipped: number(6) != 0.0,
        loss_scale: number(7) as f32,
        step_s: number(8),
    }
}

/// The checkpoints in a directory, newest first. A directory that is not there has none.
///
/// # Errors
///
/// If the directory cannot be read.
pub fn list(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let mut found: Vec<(u32, PathBuf)> = fs_err::read_dir(dir)?
        .map(|entry| {
            let path = entry?.path();
            Ok(step_of(&path).map(|step| (step, path)))
        })
        .filter_map(Result::transpose)
        .collect::<std::io::Result<_>>()?;
    found.sort_unstable_by(|a, b| b.cmp(a));
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// Removes all but the `keep` newest checkpoints up to a step. (Later ones are damaged and will be written again.)
///
/// # Errors
///
/// If the directory cannot be read or a file not removed.
pub fn prune(dir: &Path, num_steps: u32, keep: usize) -> std::io::Result<()> {
    list(dir)?
        .iter()
        .filter(|path| step_of(path).is_some_and(|step| step <= num_steps))
        .skip(keep)
        .try_for_each(fs_err::remove_file)
}
