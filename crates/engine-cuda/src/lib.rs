//! FLUX's transformer scheduled by hand for NVIDIA: the network of `mmdit` with an explicit backward pass.
//!
//! One [`Stream`] carries everything: cuBLASLt products, our own kernels (compiled by NVRTC at the first use, kept on
//! disk), copies. Driver, NVRTC and cuBLASLt are found at run time, so the crate builds anywhere; where one of them is
//! missing, [`Stream::open`] says which. Activations lie in one [`Arena`] with stack discipline. The schedule is written
//! once: on a [`Stream::dry`] stream the same code runs without a GPU and only counts bytes and operations, and that is
//! the [`plan`].
//!
//! Weights are 16-bit floats or NF4. Where LoRA factors are trained, the backward pass computes gradients of inputs and
//! of factors and nothing else; [`model::FullTrainer`] trains every weight of a small transformer on the same schedule.
//!
//! * [`device`]: which card there is. * [`error`], [`view`], [`stream`], [`meter`], [`kernels`], [`gemm`], [`arena`]: the machine.
//! * [`ops`]: one typed wrapper per kernel.
//! * [`model`]: weights, forward, backward, training step, sampler.
//! * [`plan`]: memory and time before anything is loaded. * [`measure`]: both, as they are.
//!
//! The schedule is tested without a GPU too: in unit tests a stream may run the kernels' plain forms on host memory, and
//! velocity, loss, every gradient, recomputing and accumulation are compared with `mmdit`.
//!
//! `unsafe` stands in three places: calls of the driver's C functions ([`device`], [`stream`] and its handles, [`kernels`], [`gemm`]), launches in
//! [`ops`] (whose wrappers assert the sizes of all views first), and nowhere else.

// The name by which files that unit tests share with tests on a card call the crate.
#[cfg(test)]
extern crate self as engine_cuda;

pub mod arena;
pub mod device;
pub mod error;
pub mod gemm;
pub mod half_type;
mod handles;
#[cfg(test)]
mod host;
pub mod kernels;
mod libraries;
pub mod measure;
pub mod meter;
pub mod model;
#[cfg(test)]
#[path = "../tests/gpu/networks.rs"]
mod networks;
pub mod ops;
pub mod plan;
pub mod stream;
pub mod view;

pub use arena::Arena;
pub use error::CudaError;
pub use half_type::Half;
pub use stream::{Buffer, Graph, Stream};
pub use view::View;
