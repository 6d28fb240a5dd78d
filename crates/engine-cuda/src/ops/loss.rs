//! Both ends of the network: noise in, loss and its gradient out, and the sampler's step. Kernels: `loss.cu`.
//!
//! The formulas are `flow_matching::objective`'s. Samples have `per_sample` elements, a multiple of 8.

#![allow(clippy::too_many_arguments)] // a kernel's

use crate::error::CudaError;
use crate::half_type::Half;
use crate::kernels::{Args, Launch, Module};
use crate::ops::extent::{blocks, elements, multiples_of_8, vectors};
use crate::stream::Stream;
use crate::view::View;

static LOSS: Module = Module {
    name: "loss",
    source: include_str!("../../kernels/loss.cu"),
};

/// `LOSS_THREADS` of the kernels; each thread takes eight elements.
const THREADS: usize = 256;

/// Elements (f32) of scratch that [`weighted_mse`] needs: one per block.
pub const LOSS_PARTIALS: usize = 256;

fn linear(num_vectors: usize, most_blocks: usize) -> Launch {
    Launch {
        grid: [
            blocks(num_vectors.div_ceil(THREADS).clamp(1, most_blocks)),
            1,
            1,
        ],
        block: [THREADS as u32, 1, 1],
        shared_bytes: 0,
    }
}

/// `x_t = (1 − σ)x₀ + σε` (T) and `target = ε − x₀` (f32), from f32 `[b, per_sample]` and one σ per sample.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a view is too short, or a size or an address does not suit 16-byte accesses.
pub fn noise_mix(
    s: &Stream,
    t: Half,
    x_t: View,
    target: View,
    x0: View,
    eps: View,
    sigma: View,
    b: usize,
    per_sample: usize,
) -> Result<(), CudaError> {
    multiples_of_8(&[per_sample], "elements of a sample");
    let n = b * per_sample;
    let args = Args::new()
        .ptr(vectors(x_t, n, 2, "the noisy sample"))
        .ptr(vectors(target, n, 4, "the target"))
        .ptr(vectors(x0, n, 4, "the latent"))
        .ptr(vectors(eps, n, 4, "the noise"))
        .ptr(elements(sigma, b, 4, "noise levels"))
        .i32(b)
        .i64(per_sample as i64);
    let launch = linear(n / 8, usize::MAX);
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { s.launch(&LOSS, &[t.define()], "noise_mix", launch, args) }
}

/// `loss += Σ w e²/mean_over` and `dvelocity = loss_factor·2 w e/mean_over` with `e = velocity − target`.
///
/// `loss` is one f32, `velocity` and `dvelocity` T, `target` f32, `weight` one f32 per sample, `partials`
/// [`LOSS_PARTIALS`] f32 of scratch. The order of summation depends on the sizes alone. `dvelocity` may be `velocity`.
///
/// # Errors
///
/// If a launch fails.
///
/// # Panics
///
/// As [`noise_mix`].
pub fn weighted_mse(
    s: &Stream,
    t: Half,
    loss: View,
    dvelocity: View,
    velocity: View,
    target: View,
    weight: View,
    partials: View,
    b: usize,
    per_sample: usize,
    mean_over: usize,
    loss_factor: f32,
) -> Result<(), CudaError> {
    multiples_of_8(&[per_sample], "elements of a sample");
    let n = b * per_sample;
    let launch = linear(n / 8, LOSS_PARTIALS);
    let num_partials = launch.grid[0] as usize;
    let partials = elements(partials, num_partials, 4, "partial sums");
    let args = Args::new()
        .ptr(partials)
        .ptr(vectors(dvelocity, n, 2, "the velocity's gradient"))
        .ptr(vectors(velocity, n, 2, "the velocity"))
        .ptr(vectors(target, n, 4, "the target"))
        .ptr(elements(weight, b, 4, "the loss's weights"))
        .i32(b)
        .i64(per_sample as i64)
        .f32((f64::from(loss_factor) * 2.0 / mean_over as f64) as f32);
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { s.launch(&LOSS, &[t.define()], "weighted_mse", launch, args)? };
    let args = Args::new()
        .ptr(elements(loss, 1, 4, "the loss"))
        .ptr(partials)
        .i32(num_partials)
        .f32(mean_over as f32);
    // SAFETY: as above.
    unsafe { s.launch(&LOSS, &[t.define()], "add_loss", linear(1, 1), args) }
}

/// One Euler step in f32: `sample += (σ′ − σ)·v`, and the new sample into each of the `copies` of `model_input` (T).
///
/// With one copy, `v` is the velocity (T `[n]`); with two, `v₋ + scale·(v₊ − v₋)` of T `[2, n]`, conditional first.
/// `coefficients` are two f32 on the device: σ′ − σ and the guidance scale.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// As [`noise_mix`], or if there are neither one nor two copies.
pub fn euler_cfg(
    s: &Stream,
    t: Half,
    sample: View,
    model_input: View,
    velocity: View,
    coefficients: View,
    n: usize,
    copies: usize,
) -> Result<(), CudaError> {
    multiples_of_8(&[n], "elements of a sample");
    assert!(matches!(copies, 1 | 2), "{copies} copies of a sample");
    let args = Args::new()
        .ptr(vectors(sample, n, 4, "the sample"))
        .ptr(vectors(model_input, copies * n, 2, "the network's input"))
        .ptr(vectors(velocity, copies * n, 2, "the velocity"))
        .ptr(elements(coefficients, 2, 4, "the step's coefficients"))
        .i64(n as i64)
        .i32(copies);
    let launch = linear(n / 8, usize::MAX);
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { s.launch(&LOSS, &[t.define()], "euler_cfg", launch, args) }
}
