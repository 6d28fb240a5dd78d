//! One forward and backward pass: a micro-batch into a loss and the gradients of the LoRA.

use flow_matching::{add_noise, model_time, velocity_target, weighted_mse};
use mmdit::{Adapters, Mmdit, MmditInput, Rope, patchify, unpatchify};
use tensor::{Tensor, from_f32, to_f32};

use crate::batch::MicroBatch;
use crate::lora_state::TrainableLora;

/// What a forward pass made of a micro-batch, latents unpacked.
pub struct Prediction {
    /// `(1 − σ) x₀ + σ ε`.
    pub noisy: Tensor<4>,
    /// `ε − x₀`.
    pub target: Tensor<4>,
    /// The velocity that the network says, in its precision.
    pub velocity: Tensor<4>,
    /// Mean weighted squared error, in `f32`.
    pub loss: Tensor<1>,
}

/// Loss and gradients of one micro-batch.
#[derive(Clone, Debug, PartialEq)]
pub struct MicroStep {
    /// Mean weighted squared error, not multiplied with anything.
    pub loss: f32,
    /// Gradients of `loss · factor`, in the order of [`TrainableLora::names`].
    pub gradients: Vec<Vec<f32>>,
}

/// Noises a micro-batch, predicts its velocity and compares.
///
/// # Panics
///
/// If the batch's sizes are not the model's.
pub fn predict(
    model: &Mmdit,
    rope: &Rope,
    adapters: &Adapters,
    batch: &MicroBatch,
    guidance: f32,
) -> Prediction {
    let device = model.device();
    let [b, _, h, w] = batch.shape;
    let [tokens, width] = batch.text_shape;
    let latents = from_f32(batch.model_input.clone(), batch.shape, device);
    let noise = from_f32(batch.noise.clone(), batch.shape, device);
    let sigmas: Vec<f32> = batch.points.iter().map(|point| point.sigma).collect();
    let times: Vec<f32> = batch
        .points
        .iter()
        .map(|point| model_time(point.timestep))
        .collect();
    let weights: Vec<f32> = batch.points.iter().map(|point| point.weight).collect();
    let guidance = model.config().guidance_embeds.then(|| vec![guidance; b]);

    let noisy = add_noise(latents.clone(), noise.clone(), &sigmas);
    let target = velocity_target(latents, noise);
    let input = MmditInput {
        hidden_states: patchify(noisy.clone()),
        encoder_hidden_states: from_f32(batch.prompt_embeds.clone(), [b, tokens, width], device),
        pooled_projections: from_f32(
            batch.pooled.clone(),
            [b, batch.pooled.len() / b.max(1)],
            device,
        ),
        timestep: &times,
        guidance: guidance.as_deref(),
        rope,
    };
    let velocity = unpatchify(model.forward(&input, adapters), h, w);
    let loss = weighted_mse(velocity.clone(), target.clone(), &weights);
    Prediction {
        noisy,
        target,
        velocity,
        loss,
    }
}

/// One forward and backward pass. Gradients are those of `loss · loss_factor`: the loss scale over the number of
/// micro-batches in a step.
///
/// The model must have been loaded on a device that records operations ([`tensor::device::training`]).
///
/// # Panics
///
/// If the batch's or the LoRA's sizes are not the model's, or the model's device does not record operations.
pub fn micro_step(
    model: &Mmdit,
    rope: &Rope,
    lora: &TrainableLora,
    batch: &MicroBatch,
    guidance: f32,
    loss_factor: f32,
) -> MicroStep {
    let leaves = lora.leaves(model.device());
    let loss = predict(model, rope, &leaves.adapters, batch, guidance).loss;
    let value = to_f32(&loss)[0];
    let gradients = (loss * loss_factor).backward();
    let gradients = leaves
        .tensors
        .iter()
        .zip(&lora.values)
        .map(|(leaf, values)| match leaf.grad(&gradients) {
            Some(gradient) => to_f32(&gradient),
            None => vec![0.0; values.len()], // a layer that no output depends on
        })
        .collect();
    MicroStep {
        loss: value,
        gradients,
    }
}
