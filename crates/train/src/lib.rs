//! Stage `train`: latents and text embeddings into a LoRA on a frozen FLUX transformer.
//!
//! ```text
//! captions.parquet ─┐
//! embeddings.parquet ─ TrainingData ─► MicroBatch ─► micro_step ─► gradients ─► LoraOptimizer ─► TrainableLora
//! latents           ─┘   (pairs are verified)      (Burn differentiates)     (clip, loss scale, AdamW)
//! ```
//!
//! An optimiser step is `accumulation` micro-batches. What a micro-batch holds is a function of the seed and of its
//! number alone: every pair of image and caption comes once per epoch, in an order drawn for that epoch, with noise,
//! noise level, view and posterior draw of its own. So a run that was killed and started again continues from its
//! newest checkpoint to the same bytes.
//!
//! * [`data`]: pairs, found to belong together before anything is loaded.
//! * [`batch`]: what one forward pass is given.
//! * [`lora_state`]: the factors being trained.
//! * [`micro`]: one forward and backward pass.
//! * [`optimise`]: gradients into a step, with loss scaling.
//! * [`checkpoint`]: everything that a run continues from, in one file.
//! * [`trainer`]: a run, step by step.
#![forbid(unsafe_code)]

pub mod batch;
pub mod checkpoint;
pub mod data;
mod error;
pub mod lora_state;
pub mod micro;
pub mod optimise;
mod stage;
pub mod trainer;

#[cfg(test)]
mod tests;

pub use batch::MicroBatch;
pub use data::TrainingData;
pub use error::TrainError;
pub use lora_state::TrainableLora;
pub use micro::{MicroStep, micro_step};
pub use optimise::{GradientSum, LoraOptimizer, LossScaler, StepOutcome};
pub use stage::run;
pub use trainer::Trainer;
