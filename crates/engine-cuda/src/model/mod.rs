//! The network: weights, forward, backward, training step, sampler.
//!
//! * [`error`]: why a model cannot be made as asked.

pub mod error;

pub use error::ModelError;
