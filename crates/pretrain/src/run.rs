//! What all phases share: where a run stands, when it must pause, and what it logs.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use artifacts::{Digest, digest_bytes};
use burn::tensor::backend::Backend as _;
use serde_json::{Value, json};
use tensor::{Backend, Device, ParameterSpec, Tensor, to_f32};

use crate::clock::{HostWork, StepClock};
use crate::recipe::{OptimizerRecipe, PretrainRecipe};
use crate::results::{Ended, Learned, Phase, Results, Values};
use crate::state::{Leaves, TrainState};
use crate::{Corpus, PretrainError};

/// One run on one device.
pub(crate) struct Run<'a> {
    pub recipe: &'a PretrainRecipe,
    pub corpus: &'a Corpus,
    /// Of the tokenizers' files, which decide the captions' ids.
    pub tokenizers: Digest,
    pub device: Device,
    /// Checkpoints and logs.
    pub work: PathBuf,
    /// Phases that are trained if they are not done.
    pub phases: Vec<Phase>,
    /// When to write a checkpoint and leave.
    pub deadline: Option<Instant>,
}

/// What a phase trains, step by step.
pub(crate) trait Training {
    /// Optimiser steps taken.
    fn step(&self) -> u64;

    /// Makes one step and tells the clock what it did before the update; waits for nothing.
    fn advance(&mut self, clock: &mut StepClock) -> Result<(), PretrainError>;

    /// Loss of the last step and norm of its gradients.
    fn figures(&mut self) -> Result<[f32; 2], PretrainError>;

    /// The figure, if one says that the last step broke the weights.
    fn broken(&mut self) -> Result<Option<f32>, PretrainError>;

    /// Waits until the device has done what was asked of it.
    fn wait(&mut self) -> Result<(), PretrainError>;

    /// Writes a checkpoint of a run.
    fn save(&mut self, path: &Path, run: &str) -> Result<(), PretrainError>;

    /// What is kept: the averaged values of each model.
    fn averaged(&mut self) -> Result<Vec<Values>, PretrainError>;
}

/// Training through Burn's autodiff: a state, and what makes a batch's loss of tracked leaves of it.
pub(crate) struct Traced<'t, F> {
    state: TrainState,
    device: Device,
    recipe: &'t OptimizerRecipe,
    loss: F,
    last: Option<[Tensor<1>; 2]>,
}

impl<'t, F> Traced<'t, F>
where
    F: FnMut(&TrainState, &mut StepClock) -> Result<(Leaves, Tensor<1>), PretrainError> + 't,
{
    pub(crate) fn begin(
        run: &Run<'_>,
        state: TrainState,
        recipe: &'t OptimizerRecipe,
        loss: F,
    ) -> Box<dyn Training + 't> {
        Box::new(Self {
            state,
            device: run.device.clone(),
            recipe,
            loss,
            last: None,
        })
    }
}

impl<F> Training for Traced<'_, F>
where
    F: FnMut(&TrainState, &mut StepClock) -> Result<(Leaves, Tensor<1>), PretrainError>,
{
    fn step(&self) -> u64 {
        self.state.step
    }

    fn advance(&mut self, clock: &mut StepClock) -> Result<(), PretrainError> {
        let (leaves, loss) = (self.loss)(&self.state, clock)?;
        clock.did(HostWork::Forward);
        let gradients = loss.backward();
        clock.did(HostWork::Backward);
        let norm = self.state.update(&leaves, &gradients, self.recipe);
        self.last = Some([loss.inner(), norm]);
        Ok(())
    }

    fn figures(&mut self) -> Result<[f32; 2], PretrainError> {
        let [loss, norm] = self.last.as_ref().expect("a step was made");
        Ok([to_f32(loss)[0], to_f32(norm)[0]])
    }

    fn broken(&mut self) -> Result<Option<f32>, PretrainError> {
        let figures = self.figures()?;
        Ok(figures.into_iter().find(|figure| !figure.is_finite()))
    }

    fn wait(&mut self) -> Result<(), PretrainError> {
        Ok(Backend::sync(&self.device)?)
    }

    fn save(&mut self, path: &Path, run: &str) -> Result<(), PretrainError> {
        self.state.save(path, run)
    }

    fn averaged(&mut self) -> Result<Vec<Values>, PretrainError> {
        Ok(self.state.averaged_values())
    }
}

impl Run<'_> {
    /// What checkpoints and results of a phase belong to. `upstream` is what it builds on, `settings` all that decides
    /// what it learns from that.
    pub(crate) fn name(&self, phase: Phase, upstream: &str, settings: &Value) -> String {
        let recipe = self.recipe;
        let said = json!({
            "phase": phase.name(),
            "upstream": upstream,
            "preset": recipe.preset,
            "seed": recipe.seed,
            "corpus": [
                json!(self.corpus.digest.to_string()),
                json!(recipe.corpus.resolution_px),
                json!(recipe.corpus.held_out_share),
                json!(recipe.corpus.synthetic_textures),
            ],
            "settings": settings,
        });
        digest_bytes(said.to_string().as_bytes()).short()
    }

    pub(crate) fn results(&self) -> Results<'_> {
        Results { work: &self.work }
    }

    pub(crate) fn checkpoint(&self, phase: Phase) -> PathBuf {
        self.work.join(format!("{}.safetensors", phase.name()))
    }

    /// What a phase has left; or, if it is wanted, what it has learned when it is done or out of time. `begin` takes up
    /// its checkpoint, if there is one.
    pub(crate) fn learn<'t>(
        &self,
        phase: Phase,
        name: &str,
        optimizer: &OptimizerRecipe,
        models: &[Vec<ParameterSpec>],
        begin: impl FnOnce() -> Result<Box<dyn Training + 't>, PretrainError>,
    ) -> Result<Option<Learned>, PretrainError> {
        if let Some(learned) = self.results().read(phase, name, models)? {
            return Ok(Some(learned));
        }
        if !self.phases.contains(&phase) {
            return Ok(None);
        }
        let mut training = begin()?;
        let ended = self.train(phase, name, optimizer, training.as_mut())?;
        let averaged = training.averaged()?;
        let values = || averaged.iter().flatten().flat_map(|(_, values)| values);
        if let Some(value) = values().find(|value| !value.is_finite()) {
            return Err(PretrainError::Diverged {
                phase: phase.name(),
                step: training.step(),
                loss: *value,
            });
        }
        let learned = Learned::new(averaged, training.step(), ended);
        if ended == Ended::Done {
            self.results().write(phase, name, &learned)?;
            let checkpoint = self.checkpoint(phase);
            if checkpoint.exists() {
                fs_err::remove_file(checkpoint).map_err(PretrainError::Read)?;
            }
        }
        Ok(Some(learned))
    }

    pub(crate) fn is_out_of_time(&self) -> bool {
        self.deadline
            .is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// Appends a line to `metrics.jsonl` and tells it.
    pub(crate) fn log(&self, line: &serde_json::Value) -> Result<(), PretrainError> {
        eprintln!("{line}");
        let path = self.work.join("metrics.jsonl");
        let mut file = fs_err::OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .map_err(PretrainError::Read)?;
        // At once: processes that train phases side by side append to one file.
        file.write_all(format!("{line}\n").as_bytes())
            .map_err(PretrainError::Read)
    }

    /// Steps until the recipe's number, the deadline, or a loss that is no number.
    ///
    /// The steps that are logged begin and end with an idle device, so that their times are theirs alone; others wait
    /// for nothing.
    fn train(
        &self,
        phase: Phase,
        name: &str,
        optimizer: &OptimizerRecipe,
        training: &mut dyn Training,
    ) -> Result<Ended, PretrainError> {
        let path = self.checkpoint(phase);
        let phase = phase.name();
        let began = Instant::now();
        let first = training.step();
        let (mut since, mut seconds_before) = (first, Duration::ZERO);
        let report = |steps: u64| {
            let elapsed_s = began.elapsed().as_secs_f64();
            self.log(&json!({
                "phase": format!("{phase} throughput"), "steps": steps, "batch": optimizer.batch,
                "elapsed_s": elapsed_s,
                "pictures_per_s": (steps * optimizer.batch as u64) as f64 / elapsed_s,
            }))
        };
        while training.step() < optimizer.steps {
            let number = training.step();
            let is_last = number + 1 == optimizer.steps;
            let is_logged =
                (number + 1).is_multiple_of(optimizer.log_every) || is_last || number == 0;
            if is_logged {
                training.wait()?;
            }
            let mut clock = StepClock::start();
            training.advance(&mut clock)?;
            clock.did(HostWork::Update);
            let step = training.step();
            if is_logged {
                training.wait()?;
                let time = clock.device_is_idle();
                let [loss, grad_norm] = training.figures()?;
                let elapsed = began.elapsed();
                let seconds = (elapsed - seconds_before).as_secs_f64();
                let rate = (step - since) as f64 / seconds;
                (since, seconds_before) = (step, elapsed);
                let mut line = json!({
                    "phase": phase, "step": step, "loss": loss, "grad_norm": grad_norm,
                    "learning_rate": optimizer.learning_rate_at(number),
                    "steps_per_s": rate, "pictures_per_s": rate * optimizer.batch as f64,
                    "elapsed_s": elapsed.as_secs_f64(),
                });
                time.put_into(&mut line);
                self.log(&line)?;
                if !loss.is_finite() {
                    return Err(PretrainError::Diverged { phase, step, loss });
                }
            }
            let stops = self.is_out_of_time() && !is_last;
            if stops || (!is_last && step.is_multiple_of(optimizer.checkpoint_every)) {
                // What fell apart is not kept over what is sound.
                if let Some(loss) = training.broken()? {
                    return Err(PretrainError::Diverged { phase, step, loss });
                }
                training.save(&path, name)?;
            }
            if stops {
                report(step - first)?;
                return Ok(Ended::Paused);
            }
        }
        report(training.step() - first)?;
        Ok(Ended::Done)
    }
}
