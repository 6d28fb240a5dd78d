//! The autoencoder of FLUX.1 (`AutoencoderKL`): pictures to latents and back.
//!
//! ```text
//! picture (b, 3, H, W) in [-1, 1] ── Autoencoder::encode ─► Posterior (mean, logvar) (b, c, H/f, W/f)
//!         ◄── Autoencoder::decode ── z = Posterior::sample
//! z ── AutoencoderConfig::to_model ─► x₀ = (z − shift)·scale, what the transformer sees
//! ```
//!
//! General in channels, levels (`f = 2^(levels − 1)`), layers and latent channels; reads the layout
//! that diffusers writes. [`AutoencoderConfig::flux`] lists the published parameters without
//! allocating them.

#![forbid(unsafe_code)]

mod config;
mod layers;
mod model;
pub mod pixels;

pub use config::{AutoencoderConfig, AutoencoderError};
pub use model::{Autoencoder, Posterior};
