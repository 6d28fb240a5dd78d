//! The engine `cpu`: `engine-cpu`, with the loss and its slope on the host.

use engine_cpu::Transformer;
use flow_matching::model_time;
use mmdit::{MmditConfig, MmditError};

use crate::batch::MicroBatch;
use crate::choice::EngineName;
use crate::host::Gradients;
use crate::lora_state::TrainableLora;
use crate::micro::MicroStep;
use crate::{Engine, Factors, Input, Opening, RunError};

/// `engine-cpu` for drawing and for training.
pub struct Cpu {
    transformer: Transformer,
}

impl Cpu {
    /// Loads the network; the device and precision of `opening` are the engine's own.
    ///
    /// # Errors
    ///
    /// If its configuration or weights cannot be used.
    pub fn open(opening: &Opening<'_>) -> Result<Self, MmditError> {
        Ok(Self::new(Transformer::open(opening.dir, opening.base)?))
    }

    /// A network that is loaded already.
    pub fn new(transformer: Transformer) -> Self {
        Self { transformer }
    }
}

impl Engine for Cpu {
    fn name(&self) -> EngineName {
        EngineName::Cpu
    }

    fn config(&self) -> &MmditConfig {
        self.transformer.config()
    }

    fn set_lora(&mut self, factors: &[Factors]) -> Result<(), RunError> {
        self.transformer.set_factors(factors);
        Ok(())
    }

    fn velocity(&mut self, input: &Input<'_>) -> Result<Vec<f32>, RunError> {
        Ok(self.transformer.velocity(input))
    }
}

impl Gradients for Cpu {
    fn name(&self) -> EngineName {
        EngineName::Cpu
    }

    fn micro_step(
        &mut self,
        lora: &TrainableLora,
        batch: &MicroBatch,
        guidance: f32,
        loss_factor: f32,
    ) -> Result<MicroStep, RunError> {
        let [noisy, target] = batch.noisy_and_target();
        let times: Vec<f32> = batch
            .points
            .iter()
            .map(|point| model_time(point.timestep))
            .collect();
        let has_guidance = self.transformer.config().guidance_embeds;
        let guidance = has_guidance.then(|| vec![guidance; batch.len()]);
        let positions = batch.positions();
        self.transformer.set_factors(&lora.factors());
        let mut velocity = self.transformer.velocity_to_train(&Input {
            hidden_states: &noisy,
            encoder_hidden_states: &batch.prompt_embeds,
            pooled_projections: &batch.pooled,
            timestep: &times,
            guidance: guidance.as_deref(),
            positions: &positions,
        });

        // The mean over all elements of weight · error², and its slope, in place of the velocity.
        let count = velocity.len();
        let per_sample = count / batch.len().max(1);
        let mut sum = 0.0;
        let samples = velocity.chunks_mut(per_sample.max(1));
        let targets = target.chunks(per_sample.max(1));
        for ((velocity, target), point) in samples.zip(targets).zip(&batch.points) {
            let slope = 2.0 * point.weight * loss_factor / count as f32;
            for (value, target) in velocity.iter_mut().zip(target) {
                let error = *value - target;
                sum += f64::from(point.weight * error * error);
                *value = slope * error;
            }
        }
        Ok(MicroStep {
            loss: (sum / count as f64) as f32,
            gradients: self
                .transformer
                .gradients(&velocity)
                .into_iter()
                .flatten()
                .collect(),
        })
    }
}
