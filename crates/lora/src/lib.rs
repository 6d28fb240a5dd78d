//! LoRA adapters in factored form, and the files that they are published in.
//!
//! An adapter adds `alpha / rank · B A` to a linear layer's weight, with `A` of shape `[rank, in]` and `B` of shape
//! `[out, rank]`. Modules are called by their diffusers paths, e.g. `transformer_blocks.0.attn.to_q`.
//!
//! - [`LoraModule`]: the factors of one layer, their initial values, their product.
//! - [`LoraFile`]: all modules of a file; reading ([`LoraFile::read`]), writing ([`LoraFile::write`]) and stacking
//!   ([`LoraFile::combine`]).
//!
//! | read | keys | alpha |
//! |---|---|---|
//! | diffusers, peft | `transformer.<path>.lora_{A,B}.weight` | header entry `lora_adapter_metadata`, else `.alpha` tensors, else the rank |
//! | kohya | `lora_unet_<path with _>.lora_{down,up}.weight` | `.alpha` tensors, else the rank |
//! | ComfyUI, Black Forest Labs | `diffusion_model.<path>.lora_{A,B,down,up}.weight` | `.alpha` tensors, else the rank |
//!
//! Paths may be diffusers' or Black Forest Labs' (`double_blocks.0.img_attn.qkv`), whose fused layers are split
//! without loss. A key that leads to no module of the model is an error: a file that is applied in part looks
//! like one that was trained badly.

#![forbid(unsafe_code)]

mod adapter_metadata;
mod combine;
mod error;
mod keys;
mod module;
mod read;
mod split;
mod write;

use std::collections::BTreeMap;

pub use error::{LoraError, UnknownKey};
pub use module::LoraModule;

/// A linear layer of the model that an adapter may sit on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its diffusers path.
    pub path: String,
    /// Width of its input.
    pub in_features: usize,
    /// Width of its output.
    pub out_features: usize,
}

impl Target {
    /// A layer of the given path and widths.
    pub fn new(path: impl Into<String>, in_features: usize, out_features: usize) -> Self {
        Self {
            path: path.into(),
            in_features,
            out_features,
        }
    }
}

/// Where the alphas of a file come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AlphaSource {
    /// The header's `lora_adapter_metadata`.
    Metadata,
    /// `.alpha` tensors.
    Tensors,
    /// Nowhere, for one module at least: its alpha is taken to be the rank, as every reader does. Worth a warning.
    AssumedRank,
}

/// The adapter of a whole model.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraFile {
    /// By diffusers path.
    pub modules: BTreeMap<String, LoraModule>,
    /// Header entries apart from `format` and `lora_adapter_metadata`, e.g. where the adapter comes from.
    ///
    /// Our own keys start with `spritelora.`.
    pub metadata: BTreeMap<String, String>,
    /// Where the alphas come from.
    pub alpha_source: AlphaSource,
}

impl LoraFile {
    /// An adapter whose alphas are known.
    pub fn new(modules: BTreeMap<String, LoraModule>, metadata: BTreeMap<String, String>) -> Self {
        Self {
            modules,
            metadata,
            alpha_source: AlphaSource::Metadata,
        }
    }

    /// Numbers in all factors together.
    pub fn num_parameters(&self) -> usize {
        self.modules
            .values()
            .map(|module| module.a.len() + module.b.len())
            .sum()
    }
}
