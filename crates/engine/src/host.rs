//! Training with an engine that gives gradients: masters, accumulation and optimiser are on the host.

use crate::batch::MicroBatch;
use crate::choice::EngineName;
use crate::lora_state::TrainableLora;
use crate::micro::MicroStep;
use crate::optimise::{GradientSum, LoraOptimizer};
use crate::{ImportError, RunError, StepReport, TrainingEngine, TrainingState};

/// An engine that gives the gradients of one micro-batch.
pub trait Gradients {
    /// Which one it is.
    fn name(&self) -> EngineName;

    /// Loss of one micro-batch, and the gradients of `loss · loss_factor`: the loss scale over the number of
    /// micro-batches in a step.
    ///
    /// # Errors
    ///
    /// If the engine cannot go on.
    ///
    /// # Panics
    ///
    /// If the batch's or the LoRA's sizes are not the network's.
    fn micro_step(
        &mut self,
        lora: &TrainableLora,
        batch: &MicroBatch,
        guidance: f32,
        loss_factor: f32,
    ) -> Result<MicroStep, RunError>;
}

/// A training engine whose LoRA and optimiser are on the host.
pub struct HostEngine {
    gradients: Box<dyn Gradients>,
    lora: TrainableLora,
    optimizer: LoraOptimizer,
}

impl HostEngine {
    /// An optimiser at its beginning.
    pub fn new(
        gradients: Box<dyn Gradients>,
        lora: TrainableLora,
        optimizer: LoraOptimizer,
    ) -> Self {
        Self {
            gradients,
            lora,
            optimizer,
        }
    }
}

impl TrainingEngine for HostEngine {
    fn name(&self) -> EngineName {
        self.gradients.name()
    }

    fn num_steps(&self) -> u64 {
        self.optimizer.num_steps()
    }

    fn step(
        &mut self,
        batches: &[MicroBatch],
        guidance: f32,
        learning_rate: f64,
    ) -> Result<StepReport, RunError> {
        let count = u32::try_from(batches.len()).expect("a recipe's accumulation is 32 bits");
        let loss_factor = self.optimizer.loss_factor(count);
        let mut sum = GradientSum::new();
        for batch in batches {
            sum.add(
                self.gradients
                    .micro_step(&self.lora, batch, guidance, loss_factor)?,
            );
        }
        let loss = sum.mean_loss();
        let (outcome, _) = self.optimizer.step(&mut self.lora, sum, learning_rate);
        Ok(StepReport { loss, outcome })
    }

    fn lora(&self) -> Result<Vec<Vec<f32>>, RunError> {
        Ok(self.lora.values.clone())
    }

    fn export(&self) -> Result<TrainingState, RunError> {
        Ok(TrainingState {
            num_steps: self.optimizer.num_steps(),
            lora: self.lora.values.clone(),
            optimizer: self.optimizer.export(),
            scaler: self.optimizer.scaler(),
        })
    }

    fn import(&mut self, state: TrainingState) -> Result<(), ImportError> {
        self.optimizer
            .import(state.num_steps, state.optimizer, state.scaler)?;
        self.lora.values = state.lora;
        Ok(())
    }
}
