//! A run, step by step.

use std::time::Instant;

use artifacts::MetricRow;
use engine::{ImportError, RunError, StepReport, TrainableLora, TrainingEngine, TrainingState};
use flow_matching::LearningRateSchedule;
use pipeline::recipe::{Schedule, TrainRecipe};

use crate::checkpoint::{Checkpoint, RunState};
use crate::data::TrainingData;
use crate::error::TrainError;
use crate::groups::{Group, Groups};

/// So many steps in a row without finite gradients and the run is given up. A loss scale of 2¹⁶ that halves so often
/// is far below anything that could still overflow.
const MAX_SKIPPED_IN_A_ROW: usize = 32;

/// Last learning rate of the polynomial schedule (`lr_end` upstream).
const POLYNOMIAL_END: f64 = 1e-7;

/// A training run: the LoRA and the optimiser's state are the engine's, which data come next is known here.
pub struct Trainer<'a> {
    engine: Box<dyn TrainingEngine>,
    recipe: &'a TrainRecipe,
    fingerprint: String,
    schedule: LearningRateSchedule,
    /// Names and shapes; the values are those of the beginning.
    untrained: TrainableLora,
    num_groups: u64,
    metrics: Vec<MetricRow>,
}

impl<'a> Trainer<'a> {
    /// A run at its beginning, with an engine that was given `lora`.
    pub fn new(
        engine: Box<dyn TrainingEngine>,
        recipe: &'a TrainRecipe,
        lora: TrainableLora,
        fingerprint: String,
    ) -> Self {
        Self {
            engine,
            recipe,
            fingerprint,
            schedule: schedule(recipe),
            untrained: lora,
            num_groups: 0,
            metrics: Vec::new(),
        }
    }

    /// Continues from a checkpoint of this run.
    ///
    /// # Errors
    ///
    /// If the optimiser's state does not fit (then nothing has changed), or the engine cannot go on.
    pub fn restore(&mut self, checkpoint: Checkpoint) -> Result<(), ImportError> {
        let RunState {
            num_steps,
            num_groups,
            scaler,
            ..
        } = checkpoint.state;
        self.engine.import(TrainingState {
            num_steps: num_steps.into(),
            lora: checkpoint.lora,
            optimizer: checkpoint.optimizer,
            scaler,
        })?;
        self.num_groups = num_groups;
        self.metrics = checkpoint.metrics;
        Ok(())
    }

    /// What a later run can continue from.
    ///
    /// # Errors
    ///
    /// If the engine cannot go on.
    pub fn checkpoint(&self) -> Result<Checkpoint, RunError> {
        let TrainingState {
            lora,
            optimizer,
            scaler,
            ..
        } = self.engine.export()?;
        Ok(Checkpoint {
            state: RunState::new(
                self.fingerprint.clone(),
                (self.engine.name(), self.engine.at_once()),
                self.num_steps(),
                self.num_groups,
                scaler,
            ),
            lora,
            optimizer,
            metrics: self.metrics.clone(),
        })
    }

    /// Optimiser steps taken.
    pub fn num_steps(&self) -> u32 {
        u32::try_from(self.engine.num_steps()).expect("a recipe's number of steps is 32 bits")
    }

    /// What its steps are taken on, in batches as its engine wants them.
    pub fn groups<'d>(&self, data: &'d TrainingData) -> Groups<'d> {
        Groups::new(data, self.recipe, self.engine.at_once())
    }

    /// Groups of micro-batches taken: steps, and those that were skipped.
    pub fn num_groups(&self) -> u64 {
        self.num_groups
    }

    /// The LoRA as it is now.
    ///
    /// # Errors
    ///
    /// If the engine cannot go on.
    pub fn lora(&self) -> Result<TrainableLora, RunError> {
        let mut lora = self.untrained.clone();
        lora.values = self.engine.lora()?;
        Ok(lora)
    }

    /// What the engine has to say of the run.
    pub fn notes(&self) -> Vec<String> {
        self.engine.notes()
    }

    /// What every step did, skipped ones included.
    pub fn metrics(&self) -> &[MetricRow] {
        &self.metrics
    }

    /// Tries one optimiser step: all batches of group [`Trainer::num_groups`], which `next` gives, and the step
    /// unless a gradient is not finite. Waiting for the group counts as the step's time.
    ///
    /// # Errors
    ///
    /// If data cannot be read, the engine cannot go on, or too many steps in a row could not be taken.
    pub fn step(&mut self, next: impl FnOnce() -> Group) -> Result<MetricRow, TrainError> {
        let started = Instant::now();
        let batches = next()?;
        let TrainRecipe {
            guidance,
            learning_rate,
            ..
        } = *self.recipe;
        let points = batches.iter().flat_map(|batch| &batch.points);
        let sigmas: Vec<f64> = points.map(|point| point.sigma.into()).collect();

        let steps_before = self.num_steps();
        let learning_rate = self.schedule.at(
            learning_rate,
            steps_before.into(),
            self.recipe.warmup_steps.into(),
            self.recipe.steps.into(),
        );
        let StepReport { loss, outcome } =
            self.engine.step(&batches, guidance as f32, learning_rate)?;
        self.num_groups += 1;
        let row = MetricRow {
            step: steps_before + 1,
            loss,
            grad_norm: outcome.grad_norm,
            learning_rate,
            mean_sigma: (sigmas.iter().sum::<f64>() / sigmas.len() as f64) as f32,
            clipped: outcome.clipped,
            skipped: outcome.skipped,
            loss_scale: outcome.loss_scale,
            step_s: started.elapsed().as_secs_f64(),
        };
        self.metrics.push(row);
        let num_skipped = self
            .metrics
            .iter()
            .rev()
            .take_while(|row| row.skipped)
            .count();
        if num_skipped >= MAX_SKIPPED_IN_A_ROW {
            return Err(TrainError::Diverged {
                step: row.step,
                num_skipped,
            });
        }
        Ok(row)
    }
}

fn schedule(recipe: &TrainRecipe) -> LearningRateSchedule {
    match recipe.schedule {
        Schedule::Constant => LearningRateSchedule::Constant,
        Schedule::ConstantWithWarmup => LearningRateSchedule::ConstantWithWarmup,
        Schedule::Linear => LearningRateSchedule::Linear,
        Schedule::Cosine => LearningRateSchedule::Cosine,
        Schedule::CosineWithRestarts => LearningRateSchedule::CosineWithRestarts {
            num_cycles: recipe.schedule_cycles,
        },
        Schedule::Polynomial => LearningRateSchedule::Polynomial {
            power: recipe.schedule_power,
            end: POLYNOMIAL_END,
        },
    }
}
