//! The two text encoders of FLUX.1, from a caption to what the transformer is conditioned on.
//!
//! ```text
//! caption ── ClipTokenizer ─► ids (b, 77)  ── ClipTextModel ─► pooled (b, width)
//!         └─ T5Tokenizer ───► ids (b, n)   ── T5Encoder ─────► states (b, n, d_model)
//! ```
//!
//! Both models are general in every size and read the layout that transformers writes
//! (`config.json` and `model.safetensors`, whole or in shards). Sizes of the published encoders
//! exist by name ([`T5Config::xxl`], [`ClipConfig::clip_l`]) and list their parameters without
//! allocating them.

#![forbid(unsafe_code)]

pub mod clip;
mod config;
pub mod t5;
pub mod tokenizers;

pub use clip::{ClipConfig, ClipOutput, ClipTextModel, HiddenActivation};
pub use config::EncoderError;
pub use t5::{T5Config, T5Encoder};
pub use tokenizers::{ClipTokenizer, T5Tokenizer, TokenIds, TokenizerError};
