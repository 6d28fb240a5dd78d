//! How fast the transformer is, beside the same model in PyTorch, in the same run on the same cores.
//!
//! * [`cpu`]: a training step and a sampling step of the base `small`. * [`peer`]: PyTorch's side of it.
//! * [`flux`]: FLUX.1-dev's shapes on an NVIDIA card. * [`training_run`]: a whole run there.
#![forbid(unsafe_code)]

pub mod cpu;
pub mod flux;
pub mod peer;
pub mod training_run;

pub use cpu::{CpuBench, run};
pub use flux::FluxBench;
