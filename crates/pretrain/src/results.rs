//! What a phase has learned, as files have it: in half precision, with the name of its run.
//!
//! A later phase starts from these files and never from a state in memory, so a run that is taken to another machine
//! between two phases (the files below `--work/results`) ends as one that stayed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use artifacts::{Digest, SafetensorsFile, digest_file};
use half::f16;
use tensor::{ParameterSpec, Weights};

use crate::PretrainError;
use crate::export::write_weights;

/// A phase, in the order in which they are trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Encoder and decoder together.
    Autoencoder,
    /// The decoder alone.
    Decoder,
    /// Transformer and text encoders together.
    Base,
    /// The transformer alone.
    Refine,
}

impl Phase {
    /// All of them, in order.
    pub const ALL: [Self; 4] = [Self::Autoencoder, Self::Decoder, Self::Base, Self::Refine];

    /// What files, logs and the command line call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Autoencoder => "autoencoder",
            Self::Decoder => "decoder",
            Self::Base => "base",
            Self::Refine => "refine",
        }
    }
}

/// Values of a model's parameters, in the order of their specifications.
pub(crate) type Values = Vec<(ParameterSpec, Vec<f32>)>;

/// Values by the names of their parameters.
pub(crate) fn by_name(values: &Values) -> BTreeMap<&str, &Vec<f32>> {
    values
        .iter()
        .map(|(spec, values)| (spec.name.as_str(), values))
        .collect()
}

/// How a phase ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Done,
    /// Out of time; the next run goes on.
    Paused,
}

/// What a phase has learned so far.
pub(crate) struct Learned {
    /// One per model of the phase; every value is a half.
    pub models: Vec<Values>,
    /// Optimiser steps taken.
    pub step: u64,
    pub ended: Ended,
}

impl Learned {
    /// Averages as they will be in files.
    pub(crate) fn new(mut models: Vec<Values>, step: u64, ended: Ended) -> Self {
        for value in models.iter_mut().flatten().flat_map(|(_, values)| values) {
            *value = f16::from_f32(*value).to_f32();
        }
        Self {
            models,
            step,
            ended,
        }
    }

    /// One model's weights.
    pub(crate) fn weights(&self, model: usize) -> Weights {
        Weights::from_values(self.models[model].clone())
    }
}

/// The files of finished phases.
pub(crate) struct Results<'a> {
    pub work: &'a Path,
}

impl Results<'_> {
    /// Whether any phase is done.
    pub(crate) fn exist(&self) -> bool {
        self.path(Phase::Autoencoder, 0).exists()
    }

    fn path(&self, phase: Phase, model: usize) -> PathBuf {
        let file = format!("{}-{model}.safetensors", phase.name());
        self.work.join("results").join(file)
    }

    /// What a phase of this name has left, if it is done.
    pub(crate) fn read(
        &self,
        phase: Phase,
        run: &str,
        models: &[Vec<ParameterSpec>],
    ) -> Result<Option<Learned>, PretrainError> {
        let mut read = Vec::new();
        let mut step = 0;
        for (model, specs) in models.iter().enumerate() {
            let path = self.path(phase, model);
            if !path.exists() {
                return Ok(None);
            }
            let file = SafetensorsFile::open(&path)?;
            let other = |detail: String| PretrainError::OtherRun {
                path: path.clone(),
                detail,
            };
            let said = |key: &str| file.metadata().get(key).cloned().unwrap_or_default();
            if said("run") != run {
                return Err(other(format!(
                    "its run is {}, this one is {run}",
                    said("run")
                )));
            }
            step = said("step")
                .parse()
                .map_err(|_| other("it does not say its step".to_owned()))?;
            let mut values = Vec::new();
            for spec in specs {
                let found = file.f32(&spec.name)?;
                if found.len() as u64 != spec.num_elements() {
                    return Err(other(format!(
                        "{} has {} values, expected {}",
                        spec.name,
                        found.len(),
                        spec.num_elements()
                    )));
                }
                values.push((spec.clone(), found));
            }
            read.push(values);
        }
        Ok(Some(Learned::new(read, step, Ended::Done)))
    }

    /// Keeps what a finished phase has learned.
    pub(crate) fn write(
        &self,
        phase: Phase,
        run: &str,
        learned: &Learned,
    ) -> Result<(), PretrainError> {
        let about = BTreeMap::from([
            ("run".to_owned(), run.to_owned()),
            ("step".to_owned(), learned.step.to_string()),
        ]);
        for (model, values) in learned.models.iter().enumerate() {
            write_weights(&self.path(phase, model), values, &about)?;
        }
        Ok(())
    }

    /// Digest of a finished phase's files: what builds on them belongs to them.
    pub(crate) fn digest(&self, phase: Phase, num_models: usize) -> Result<Digest, PretrainError> {
        let mut said = String::new();
        for model in 0..num_models {
            said += &digest_file(&self.path(phase, model))?.to_string();
        }
        Ok(artifacts::digest_bytes(said.as_bytes()))
    }
}
