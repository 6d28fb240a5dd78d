//! Low-bit numbers in reference form: what a quantised weight or optimiser state means, bit for bit.
//!
//! Everything works on `f32` slices and knows neither tensors nor files. The numbers are those of bitsandbytes 0.50
//! (NF4 weights, block-wise 8-bit AdamW) and PyTorch 2.15 (AdamW, clipping by global norm) on their plain CPU paths,
//! including the order of the `f32` operations, because a code that falls next to a threshold shows every other order.
//! The CUDA kernels of bitsandbytes differ in two points that are described at [`Optimizer`].
//!
//! - [`codebook`]: the tables that codes index, and the search for the nearest entry.
//! - [`blockwise`]: 8-bit codes with one scale per block.
//! - [`nf4`]: 4-bit weights.
//! - [`clip`]: clipping by global norm.
//! - [`adamw`]: AdamW with `f32` or 8-bit states; [`state`] turns its states into named arrays and back.
//!
//! Parallel loops write disjoint slices and never reduce across threads, so results do not depend on the thread count.

#![forbid(unsafe_code)]

pub mod adamw;
pub mod blockwise;
pub mod clip;
pub mod codebook;
mod error;
pub mod nf4;
pub mod state;
mod stored_float;

pub use adamw::{AdamWConfig, Optimizer, OptimizerKind, StepReport};
pub use blockwise::Blockwise;
pub use clip::{GlobalNorm, clip_global_norm, global_norm};
pub use codebook::Codebook;
pub use error::QuantError;
pub use nf4::{Nf4, Scales};
pub use state::{StatePart, StateValues};
pub use stored_float::StoredFloat;
