//! AdamW over one flat buffer of parameters, their average, and their copies in T. Kernel: `adamw_average.cu`.
//!
//! The arithmetic is that of `pretrain`'s state: moments without bias correction, weight decay apart from them, and an
//! average that forgets faster while it is young.

use crate::error::CudaError;
use crate::half_type::Half;
use crate::kernels::{Args, Launch, Module};
use crate::ops::extent::{blocks, elements, vectors};
use crate::stream::Stream;
use crate::view::View;

static AVERAGE: Module = Module {
    name: "adamw_average",
    source: include_str!("../../kernels/adamw_average.cu"),
};

/// `AVERAGE_THREADS` of the kernel; each thread takes four elements.
const THREADS: usize = 256;

/// The optimiser's numbers that do not change from step to step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AverageConfig {
    /// How much of the gradients' mean is kept.
    pub beta1: f64,
    /// How much of the squares' mean is kept.
    pub beta2: f64,
    /// Added to the root.
    pub epsilon: f64,
    /// Part of the values that a step of rate 1 takes away.
    pub weight_decay: f64,
    /// How much of the average an old run keeps.
    pub ema_decay: f64,
}

/// Numbers that one step reads: [`AverageConfig::numbers`].
pub const NUMBERS: usize = 10;

impl AverageConfig {
    /// What step `step` (the first is 0) computes with, for one upload.
    pub fn numbers(&self, step: u64, learning_rate: f64) -> [f32; NUMBERS] {
        let count = i32::try_from(step + 1).unwrap_or(i32::MAX);
        // Young averages forget faster, so that nothing of the random beginning stays in them.
        let decay = self.ema_decay.min((step + 1) as f64 / (step + 10) as f64);
        [
            self.beta1,
            1.0 - self.beta1,
            self.beta2,
            1.0 - self.beta2,
            1.0 - self.beta2.powi(count),
            self.epsilon,
            learning_rate / (1.0 - self.beta1.powi(count)),
            1.0 - learning_rate * self.weight_decay,
            decay,
            1.0 - decay,
        ]
        .map(|number| number as f32)
    }
}

/// What a step changes: f32 `[n]` each, and T `[n]`.
#[derive(Clone, Copy, Debug)]
pub struct Averaged {
    /// The parameters.
    pub values: View,
    /// Means of gradients.
    pub first: View,
    /// Means of their squares.
    pub second: View,
    /// The parameters' average.
    pub averaged: View,
    /// The parameters in T.
    pub shadow: View,
}

/// One step, unless `flag` (u32) is set. `gradients` are f32 `[n]`, multiplied by `factor` (one f32); `numbers` are
/// [`NUMBERS`] f32 on the device; `n` is a multiple of 4.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a view is too short or not aligned, or `n` is no multiple of 4.
#[allow(clippy::too_many_arguments)] // a kernel's
pub fn adamw_average(
    s: &Stream,
    t: Half,
    state: &Averaged,
    gradients: View,
    factor: View,
    flag: View,
    numbers: View,
    n: usize,
) -> Result<(), CudaError> {
    assert!(n.is_multiple_of(4), "{n} values are no multiple of 4");
    let args = Args::new()
        .ptr(vectors(state.values, n, 4, "parameters"))
        .ptr(vectors(state.first, n, 4, "first moments"))
        .ptr(vectors(state.second, n, 4, "second moments"))
        .ptr(vectors(state.averaged, n, 4, "the average"))
        .ptr(vectors(state.shadow, n, 2, "parameters in 16 bits"))
        .ptr(vectors(gradients, n, 4, "gradients"))
        .ptr(elements(factor, 1, 4, "the clipping factor"))
        .ptr(elements(flag, 1, 4, "the flag"))
        .ptr(elements(numbers, NUMBERS, 4, "the step's numbers"))
        .i64(n as i64);
    let launch = Launch {
        grid: [blocks((n / 4).div_ceil(THREADS).max(1)), 1, 1],
        block: [THREADS as u32, 1, 1],
        shared_bytes: 0,
    };
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { s.launch(&AVERAGE, &[t.define()], "adamw_average", launch, args) }
}
