//! Stage `train`: latents and text embeddings into a LoRA on a frozen FLUX transformer.
//!
//! ```text
//! captions.parquet ─┐
//! embeddings.parquet ─ TrainingData ─► MicroBatch ─► micro_step ─► gradients ─► LoraOptimizer ─► TrainableLora
//! latents           ─┘   (pairs are verified)      (whichever engine)        (clip, loss scale, AdamW)
//! ```
//!
//! An optimiser step is `accumulation` micro-batches. What a micro-batch holds is a function of the seed and of its
//! number alone: every pair of image and caption comes once per epoch, in an order drawn for that epoch, with noise,
//! noise level, view and posterior draw of its own. So a run that was killed and started again continues from its
//! newest checkpoint to the same bytes.
//!
//! * [`data`]: pairs, found to belong together before anything is loaded.
//! * [`batch`]: latents as the transformer sees them.
//! * [`groups`]: a step's micro-batches, made while the step before is taken.
//! * [`untrained`]: the LoRA that a run begins with.
//! * [`checkpoint`]: everything that a run continues from, in one file.
//! * [`planning`]: what a run takes on a card, from configurations alone.
//! * [`trainer`]: a run, step by step. One step is an `engine`'s. * [`steps`]: all that are left, with checkpoints.
#![forbid(unsafe_code)]

pub mod batch;
pub mod checkpoint;
pub mod data;
mod error;
pub mod groups;
pub mod planning;
mod stage;
pub mod steps;
pub mod trainer;
pub mod untrained;

#[cfg(test)]
mod tests;

pub use data::TrainingData;
pub use error::TrainError;
pub use groups::Groups;
pub use stage::run;
pub use steps::{Checkpoints, take_steps};
pub use trainer::Trainer;
pub use untrained::untrained_lora;
