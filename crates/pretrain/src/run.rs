//! What both phases share: where a run stands, when it must pause, and what it logs.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use artifacts::digest_bytes;
use burn::tensor::backend::Backend as _;
use serde_json::json;
use tensor::{Backend, Device, Tensor, to_f32};

use crate::clock::{HostWork, StepClock};
use crate::recipe::{OptimizerRecipe, PretrainRecipe};
use crate::state::TrainState;
use crate::{Corpus, PretrainError};

/// One run on one device.
pub(crate) struct Run<'a> {
    pub recipe: &'a PretrainRecipe,
    pub corpus: &'a Corpus,
    pub device: Device,
    /// Checkpoints and logs.
    pub work: PathBuf,
    /// When to write a checkpoint and leave.
    pub deadline: Option<Instant>,
}

/// How a phase ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Done,
    /// Out of time; the next run goes on.
    Paused,
}

impl Run<'_> {
    /// What a checkpoint of a phase belongs to. `upstream` is what it builds on.
    pub(crate) fn name(&self, phase: &str, upstream: &str) -> String {
        let recipe = self.recipe;
        let said = json!({
            "phase": phase,
            "upstream": upstream,
            "preset": recipe.preset,
            "seed": recipe.seed,
            "corpus": [
                json!(self.corpus.digest.to_string()),
                json!(recipe.corpus.resolution_px),
                json!(recipe.corpus.held_out_share),
                json!(recipe.corpus.synthetic_textures),
            ],
            "settings": if phase == "autoencoder" {
                json!(recipe.autoencoder)
            } else {
                json!([json!(recipe.base), json!(recipe.corpus.variants)])
            },
        });
        digest_bytes(said.to_string().as_bytes()).short()
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
        writeln!(file, "{line}").map_err(PretrainError::Read)
    }

    /// Steps until the recipe's number, the deadline, or a loss that is no number.
    ///
    /// `step` makes one step, tells the clock what it did before the update, and gives its loss and the gradients'
    /// norm. The steps that are logged begin and end with an idle device, so that their times are theirs alone; others wait for nothing.
    pub(crate) fn train(
        &self,
        phase: &'static str,
        name: &str,
        optimizer: &OptimizerRecipe,
        state: &mut TrainState,
        mut step: impl FnMut(&mut TrainState, &mut StepClock) -> Result<[Tensor<1>; 2], PretrainError>,
    ) -> Result<Ended, PretrainError> {
        let path = self.work.join(format!("{phase}.safetensors"));
        let began = Instant::now();
        let (mut since, mut seconds_before) = (state.step, Duration::ZERO);
        let first = state.step;
        let report = |steps: u64| {
            let elapsed_s = began.elapsed().as_secs_f64();
            self.log(&json!({
                "phase": format!("{phase} throughput"), "steps": steps, "batch": optimizer.batch,
                "elapsed_s": elapsed_s,
                "pictures_per_s": (steps * optimizer.batch as u64) as f64 / elapsed_s,
            }))
        };
        while state.step < optimizer.steps {
            let number = state.step;
            let is_last = number + 1 == optimizer.steps;
            let is_logged =
                (number + 1).is_multiple_of(optimizer.log_every) || is_last || number == 0;
            if is_logged {
                Backend::sync(&self.device)?;
            }
            let mut clock = StepClock::start();
            let [loss, norm] = step(state, &mut clock)?;
            clock.did(HostWork::Update);
            if is_logged {
                Backend::sync(&self.device)?;
                let time = clock.device_is_idle();
                let loss = to_f32(&loss)[0];
                let elapsed = began.elapsed();
                let seconds = (elapsed - seconds_before).as_secs_f64();
                let rate = (state.step - since) as f64 / seconds;
                (since, seconds_before) = (state.step, elapsed);
                let mut line = json!({
                    "phase": phase, "step": state.step, "loss": loss,
                    "grad_norm": to_f32(&norm)[0],
                    "learning_rate": optimizer.learning_rate_at(number),
                    "steps_per_s": rate, "pictures_per_s": rate * optimizer.batch as f64,
                    "elapsed_s": elapsed.as_secs_f64(),
                });
                time.put_into(&mut line);
                self.log(&line)?;
                if !loss.is_finite() {
                    return Err(PretrainError::Diverged {
                        phase,
                        step: state.step,
                        loss,
                    });
                }
            }
            let stops = self.is_out_of_time() && !is_last;
            if stops || is_last || state.step.is_multiple_of(optimizer.checkpoint_every) {
                state.save(&path, name)?;
            }
            if stops {
                report(state.step - first)?;
                return Ok(Ended::Paused);
            }
        }
        report(state.step - first)?;
        Ok(Ended::Done)
    }
}
