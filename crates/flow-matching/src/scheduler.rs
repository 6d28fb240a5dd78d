//! The noise levels of training and sampling.
//!
//! Training: σ = t / 1000 for t = 1000 … 1, so a large index means little noise. Sampling: N values from 1 down to 1/N,
//! shifted towards noise, then 0. The shift is
//!
//! ```text
//! static       s σ / (1 + (s - 1) σ)
//! exponential  e^μ / (e^μ + 1/σ - 1)          linear  μ / (μ + 1/σ - 1)
//! ```
//!
//! where μ grows linearly with the number of image tokens ("dynamic shifting"). A static shift applies to the training
//! table too; a dynamic one does not: FLUX.1-dev trains on unshifted levels.
//!
//! Source: `FlowMatchEulerDiscreteScheduler`, `calculate_shift`, `FluxPipeline.__call__`, diffusers 0.42.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use thiserror::Error;

use crate::Weighting;

/// The class name that a configuration must carry, if it carries one.
const CLASS: &str = "FlowMatchEulerDiscreteScheduler";

/// Largest table that is believed.
const MAX_TRAIN_TIMESTEPS: usize = 1_000_000;

/// Why a scheduler configuration cannot be used.
#[derive(Debug, Error)]
pub enum SchedulerError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not a JSON object with fields of the expected types.
    #[error("{} is not a scheduler configuration", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// Another scheduler.
    #[error("{} configures `{found}`; only `{CLASS}` can be used", path.display())]
    Class {
        /// The file.
        path: PathBuf,
        /// Its class.
        found: String,
    },
    /// A setting that changes the noise levels in a way that is not implemented.
    #[error("{} sets `{key}` to {found}, which is not supported; expected {expected}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The setting.
        key: String,
        /// What can be used.
        expected: &'static str,
        /// What is there.
        found: String,
    },
    /// A number out of its range.
    #[error("{} sets `{key}` to {found}, expected {expected}", path.display())]
    Range {
        /// The file.
        path: PathBuf,
        /// The setting.
        key: &'static str,
        /// What can be used.
        expected: &'static str,
        /// What is there.
        found: String,
    },
}

/// How sampling levels are moved towards noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TimeShift {
    /// By one number, in training too.
    Static {
        /// 1 leaves the levels as they are.
        shift: f64,
    },
    /// By a number that grows with the picture.
    Dynamic {
        /// Whether `e^μ` or `μ` itself is the factor.
        exponential: bool,
        /// μ at `base_image_seq_len` tokens.
        base_shift: f64,
        /// μ at `max_image_seq_len` tokens.
        max_shift: f64,
        /// A number of tokens.
        base_image_seq_len: usize,
        /// A larger number of tokens; the line goes on beyond it.
        max_image_seq_len: usize,
    },
}

/// The settings of a `scheduler_config.json` that matter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SchedulerConfig {
    /// Levels of the training table.
    pub num_train_timesteps: usize,
    /// The shift.
    pub time_shift: TimeShift,
}

/// The file's fields. A missing one has the value that the upstream constructor gives it.
#[derive(Debug, Deserialize)]
struct RawConfig {
    #[serde(rename = "_class_name")]
    class_name: Option<String>,
    num_train_timesteps: Option<usize>,
    shift: Option<f64>,
    use_dynamic_shifting: Option<bool>,
    base_shift: Option<f64>,
    max_shift: Option<f64>,
    base_image_seq_len: Option<usize>,
    max_image_seq_len: Option<usize>,
    time_shift_type: Option<String>,
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

impl SchedulerConfig {
    /// FLUX.1-dev: dynamic, exponential.
    pub fn flux_dev() -> Self {
        Self {
            num_train_timesteps: 1000,
            time_shift: TimeShift::Dynamic {
                exponential: true,
                base_shift: 0.5,
                max_shift: 1.15,
                base_image_seq_len: 256,
                max_image_seq_len: 4096,
            },
        }
    }

    /// FLUX.1-schnell: no shift.
    pub fn flux_schnell() -> Self {
        Self {
            num_train_timesteps: 1000,
            time_shift: TimeShift::Static { shift: 1.0 },
        }
    }

    /// Reads a `scheduler_config.json`.
    ///
    /// # Errors
    ///
    /// If the file cannot be read or asks for something that is not implemented.
    pub fn from_file(path: &Path) -> Result<Self, SchedulerError> {
        let text = std::fs::read_to_string(path).map_err(|source| SchedulerError::Read {
            path: path.to_path_buf(),
            source,
        })?;
        Self::from_json(path, &text)
    }

    /// As [`Self::from_file`], from the file's text; `path` is for errors.
    ///
    /// # Errors
    ///
    /// If the text asks for something that is not implemented.
    pub fn from_json(path: &Path, text: &str) -> Result<Self, SchedulerError> {
        let raw: RawConfig =
            serde_json::from_str(text).map_err(|source| SchedulerError::Syntax {
                path: path.to_path_buf(),
                source,
            })?;
        if let Some(found) = raw.class_name.filter(|name| name != CLASS) {
            return Err(SchedulerError::Class {
                path: path.to_path_buf(),
                found,
            });
        }
        // Whatever else is set (Karras, exponential, beta or inverted levels, a terminal, stochastic steps, and what
        // later versions add) changes the levels; off is written as `false` or `null`.
        let is_off = |value: &Value| matches!(value, Value::Null | Value::Bool(false));
        if let Some((key, found)) = raw
            .others
            .iter()
            .find(|(key, value)| !key.starts_with('_') && !is_off(value))
        {
            return Err(SchedulerError::Unsupported {
                path: path.to_path_buf(),
                key: key.clone(),
                expected: "false or null",
                found: found.to_string(),
            });
        }
        let range = |key, expected, found: &dyn ToString, fits: bool| {
            let error = || SchedulerError::Range {
                path: path.to_path_buf(),
                key,
                expected,
                found: found.to_string(),
            };
            if fits { Ok(()) } else { Err(error()) }
        };
        let num_train_timesteps = raw.num_train_timesteps.unwrap_or(1000);
        range(
            "num_train_timesteps",
            "1 to 1000000",
            &num_train_timesteps,
            (1..=MAX_TRAIN_TIMESTEPS).contains(&num_train_timesteps),
        )?;
        let time_shift = if raw.use_dynamic_shifting.unwrap_or(false) {
            let exponential = match raw.time_shift_type.as_deref().unwrap_or("exponential") {
                "exponential" => true,
                "linear" => false,
                found => {
                    return Err(SchedulerError::Unsupported {
                        path: path.to_path_buf(),
                        key: "time_shift_type".to_owned(),
                        expected: "exponential or linear",
                        found: found.to_owned(),
                    });
                }
            };
            let (base_shift, max_shift) =
                (raw.base_shift.unwrap_or(0.5), raw.max_shift.unwrap_or(1.15));
            let base_image_seq_len = raw.base_image_seq_len.unwrap_or(256);
            let max_image_seq_len = raw.max_image_seq_len.unwrap_or(4096);
            range(
                "base_shift",
                "a finite number",
                &base_shift,
                base_shift.is_finite(),
            )?;
            range(
                "max_shift",
                "a finite number",
                &max_shift,
                max_shift.is_finite(),
            )?;
            range(
                "max_image_seq_len",
                "more than base_image_seq_len",
                &max_image_seq_len,
                max_image_seq_len > base_image_seq_len,
            )?;
            TimeShift::Dynamic {
                exponential,
                base_shift,
                max_shift,
                base_image_seq_len,
                max_image_seq_len,
            }
        } else {
            let shift = raw.shift.unwrap_or(1.0);
            range(
                "shift",
                "a finite number above 0",
                &shift,
                shift.is_finite() && shift > 0.0,
            )?;
            TimeShift::Static { shift }
        };
        Ok(Self {
            num_train_timesteps,
            time_shift,
        })
    }
}

/// The noise levels of one sampling run.
#[derive(Clone, Debug, PartialEq)]
pub struct InferenceSchedule {
    /// One more than there are steps; starts at the noisiest level and ends with 0.
    pub sigmas: Vec<f32>,
    /// What the levels are called, one per step: σ times the number of training levels.
    pub timesteps: Vec<f32>,
}

/// One entry of the training table, with the loss's weight there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainingPoint {
    /// Position in the table.
    pub index: usize,
    /// σ times the number of levels.
    pub timestep: f32,
    /// The noise level.
    pub sigma: f32,
    /// What the sample's squared error is multiplied by.
    pub weight: f32,
}

/// The training table, and the making of sampling schedules.
#[derive(Clone, Debug, PartialEq)]
pub struct Scheduler {
    config: SchedulerConfig,
    sigmas: Vec<f32>,
    timesteps: Vec<f32>,
}

impl Scheduler {
    /// Computes the training table.
    pub fn new(config: SchedulerConfig) -> Self {
        let count = config.num_train_timesteps as f32;
        let sigmas: Vec<f32> = (1..=config.num_train_timesteps)
            .rev()
            .map(|timestep| {
                let sigma = timestep as f32 / count;
                match config.time_shift {
                    TimeShift::Static { shift } => shift_static(sigma, shift),
                    TimeShift::Dynamic { .. } => sigma,
                }
            })
            .collect();
        let timesteps = sigmas.iter().map(|sigma| sigma * count).collect();
        Self {
            config,
            sigmas,
            timesteps,
        }
    }

    /// The settings.
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// σ of the training table, descending.
    pub fn train_sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// Timesteps of the training table, descending.
    pub fn train_timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    /// The training table's entry for `u` in [0, 1], large `u` meaning little noise.
    pub fn training_point(&self, u: f32, weighting: Weighting) -> TrainingPoint {
        let index = self.index(u);
        let sigma = self.sigmas[index];
        TrainingPoint {
            index,
            timestep: self.timesteps[index],
            sigma,
            weight: weighting.weight(sigma),
        }
    }

    /// `⌊u · levels⌋`, brought into the table: upstream's `mode` density can give `u = 1`.
    pub fn index(&self, u: f32) -> usize {
        ((u * self.sigmas.len() as f32) as usize).min(self.sigmas.len() - 1)
    }

    /// The levels of `num_steps` steps for a picture of `image_seq_len` tokens.
    ///
    /// # Panics
    ///
    /// If `num_steps` is 0.
    pub fn inference(&self, num_steps: usize, image_seq_len: usize) -> InferenceSchedule {
        assert!(num_steps > 0, "sampling needs at least one step");
        let last = 1.0 / num_steps as f64;
        let stride = if num_steps > 1 {
            (last - 1.0) / (num_steps - 1) as f64
        } else {
            0.0
        };
        let mut sigmas: Vec<f32> = (0..num_steps)
            .map(|step| {
                let is_last = step > 0 && step + 1 == num_steps;
                let sigma = if is_last {
                    last
                } else {
                    1.0 + step as f64 * stride
                };
                self.shifted(sigma as f32, image_seq_len)
            })
            .collect();
        let timesteps = sigmas
            .iter()
            .map(|sigma| sigma * self.sigmas.len() as f32)
            .collect();
        sigmas.push(0.0);
        InferenceSchedule { sigmas, timesteps }
    }

    fn shifted(&self, sigma: f32, image_seq_len: usize) -> f32 {
        match self.config.time_shift {
            TimeShift::Static { shift } => shift_static(sigma, shift),
            TimeShift::Dynamic { exponential, .. } => {
                let mu = self.config.time_shift.mu(image_seq_len);
                let factor = (if exponential { mu.exp() } else { mu }) as f32;
                factor / (factor + (1.0 / sigma - 1.0))
            }
        }
    }
}

impl TimeShift {
    /// μ for a picture of that many tokens; 0 without dynamic shifting.
    pub fn mu(&self, image_seq_len: usize) -> f64 {
        match *self {
            Self::Static { .. } => 0.0,
            Self::Dynamic {
                base_shift,
                max_shift,
                base_image_seq_len,
                max_image_seq_len,
                ..
            } => {
                let slope =
                    (max_shift - base_shift) / (max_image_seq_len - base_image_seq_len) as f64;
                let offset = base_shift - slope * base_image_seq_len as f64;
                image_seq_len as f64 * slope + offset
            }
        }
    }
}

fn shift_static(sigma: f32, shift: f64) -> f32 {
    shift as f32 * sigma / (1.0 + (shift - 1.0) as f32 * sigma)
}

#[cfg(test)]
mod tests;
