//! The network: weights, forward, backward, training step, sampler.
//!
//! * [`error`], [`sizes`]: what can be run. * [`accuracy`]: how exactly.
//! * [`source`], [`linear`], [`network`]: weights and where they come from.
//! * [`factors`]: the LoRA on the device.
//! * [`joint`], [`modulations`], `conditions`, [`double`], [`single`], [`pass`]: the schedule, forward and backward.
//! * [`engine`]: a loaded model; [`train`] and [`sampler`]: its two uses. * [`full`]: training of all weights.

pub mod accuracy;
pub(crate) mod conditions;
pub mod double;
pub mod engine;
pub mod error;
pub mod factors;
pub mod full;
pub mod joint;
pub mod linear;
pub mod modulations;
pub mod network;
pub(crate) mod optimizer;
pub mod pass;
pub mod sampler;
pub mod single;
pub mod sizes;
pub mod source;
#[cfg(test)]
mod tests;
pub mod train;

pub use accuracy::Accuracy;
pub use engine::{Engine, EngineOptions, VelocityInput};
pub use error::ModelError;
pub use factors::LoraFactors;
pub use full::{FullOptions, FullReport, FullState, FullTrainer};
pub use network::WeightForm;
pub use sampler::SamplerInput;
pub use sizes::{Shape, Sizes};
pub use source::{NormalWeights, WeightSource};
pub use train::{MicroBatch, Recompute, StepReport, TrainingOptions};
