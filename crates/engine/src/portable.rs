//! The engine `portable`: `mmdit` on whatever device Burn computes on, differentiated by Burn.

use mmdit::{Adapter, Adapters, LoadOptions, Mmdit, MmditConfig, MmditError, MmditInput, Rope};
use tensor::device::training;
use tensor::{Device, from_f32, to_f32};

use crate::batch::MicroBatch;
use crate::choice::EngineName;
use crate::host::Gradients;
use crate::lora_state::TrainableLora;
use crate::micro::{MicroStep, micro_step};
use crate::{Engine, Factors, Input, Opening, RunError};

/// `mmdit` for drawing.
pub struct Portable {
    model: Mmdit,
    adapters: Adapters,
    rope: Option<(Vec<[f32; 3]>, Rope)>,
}

/// `mmdit` for training.
pub struct PortableGradients {
    model: Mmdit,
    rope: Option<(Vec<[f32; 3]>, Rope)>,
}

fn load(opening: &Opening<'_>, device: Device) -> Result<Mmdit, MmditError> {
    let options = LoadOptions {
        device,
        precision: opening.precision,
        base: opening.base,
    };
    Mmdit::open(opening.dir, &options)
}

/// The tables of some positions, which are the same from step to step.
fn rope_at<'a>(
    model: &Mmdit,
    cached: &'a mut Option<(Vec<[f32; 3]>, Rope)>,
    positions: &[[f32; 3]],
) -> &'a Rope {
    if cached.as_ref().is_none_or(|(of, _)| of != positions) {
        *cached = None;
    }
    let (_, rope) = cached.get_or_insert_with(|| {
        let rope = Rope::new(model.config(), positions, model.device());
        (positions.to_vec(), rope)
    });
    rope
}

impl Portable {
    /// Loads the network.
    ///
    /// # Errors
    ///
    /// If its configuration or weights cannot be used.
    pub fn open(opening: &Opening<'_>) -> Result<Self, MmditError> {
        Ok(Self::new(load(opening, opening.device.clone())?))
    }

    /// A network that is loaded already, without LoRA.
    pub fn new(model: Mmdit) -> Self {
        Self {
            model,
            adapters: Adapters::none(),
            rope: None,
        }
    }
}

impl Engine for Portable {
    fn name(&self) -> EngineName {
        EngineName::Portable
    }

    fn config(&self) -> &MmditConfig {
        self.model.config()
    }

    fn set_lora(&mut self, factors: &[Factors]) -> Result<(), RunError> {
        let mut adapters = Adapters::none();
        for factors in factors {
            let adapter = Adapter::from_values(
                factors.a.clone(),
                factors.b.clone(),
                factors.rank,
                factors.scale,
                self.model.device(),
            );
            adapters.push(&factors.path, adapter);
        }
        if let Err(error) = adapters.check(self.model.config()) {
            panic!("{error}");
        }
        self.adapters = adapters;
        Ok(())
    }

    fn velocity(&mut self, input: &Input<'_>) -> Result<Vec<f32>, RunError> {
        let (model, config) = (&self.model, self.model.config());
        let b = input.timestep.len();
        let tokens = |values: &[f32], width: usize| {
            let shape = [b, values.len() / (b * width).max(1), width];
            from_f32(values.to_vec(), shape, model.device())
        };
        let pooled = input.pooled_projections.to_vec();
        let given = MmditInput {
            hidden_states: tokens(input.hidden_states, config.in_channels),
            encoder_hidden_states: tokens(input.encoder_hidden_states, config.joint_attention_dim),
            pooled_projections: from_f32(pooled, [b, config.pooled_projection_dim], model.device()),
            timestep: input.timestep,
            guidance: input.guidance,
            rope: rope_at(model, &mut self.rope, input.positions),
        };
        Ok(to_f32(&model.forward(&given, &self.adapters)))
    }
}

impl PortableGradients {
    /// Loads the network on a device that records operations.
    ///
    /// # Errors
    ///
    /// If its configuration or weights cannot be used.
    pub fn open(opening: &Opening<'_>) -> Result<Self, MmditError> {
        Ok(Self::new(load(opening, training(&opening.device))?))
    }

    /// A network that was loaded on a device that records operations.
    pub fn new(model: Mmdit) -> Self {
        Self { model, rope: None }
    }
}

impl Gradients for PortableGradients {
    fn name(&self) -> EngineName {
        EngineName::Portable
    }

    fn micro_step(
        &mut self,
        lora: &TrainableLora,
        batch: &MicroBatch,
        guidance: f32,
        loss_factor: f32,
    ) -> Result<MicroStep, RunError> {
        let rope = rope_at(&self.model, &mut self.rope, &batch.positions());
        Ok(micro_step(
            &self.model,
            rope,
            lora,
            batch,
            guidance,
            loss_factor,
        ))
    }
}
