//! FLUX's transformer: noisy latents, text and time in, velocity out.
//!
//! A multimodal diffusion transformer (MMDiT): double blocks keep text and image tokens in two streams that
//! attend to each other, single blocks treat them as one sequence, text first. Every block is modulated by one
//! vector made of time, guidance and the pooled caption (adaLN-Zero).
//!
//! Parameter names are the keys of the published checkpoints in diffusers' layout. LoRA factors are no part of
//! the model: [`Adapters`] are passed into [`Mmdit::forward`], so one frozen base serves several of them.
//!
//! Source: `FluxTransformer2DModel`, diffusers 0.42.
//!
//! * [`config`]: sizes, and the list of parameters without allocating any.
//! * [`patches`]: latents to tokens and back, and where a token stands in the image.
//! * [`rope`]: rotary position embedding.
//! * [`embed`]: time, guidance and pooled text as one vector.
//! * [`adapters`]: LoRA factors by the path of the layer that they change.
//! * [`model`]: loading and the forward pass.
#![forbid(unsafe_code)]

pub mod adapters;
mod attention;
mod blocks;
pub mod config;
pub mod embed;
mod layers;
pub mod model;
pub mod patches;
pub mod rope;

#[cfg(test)]
mod tests;

pub use adapters::{Adapter, AdapterError, Adapters};
pub use config::{ConfigError, LinearSpec, MmditConfig};
pub use layers::linear_values;
pub use model::{BaseWeights, LoadOptions, Mmdit, MmditError, MmditInput, Trace};
pub use patches::{image_ids, patchify, text_ids, unpatchify};
pub use rope::Rope;
