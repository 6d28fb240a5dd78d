//! Norm and gate of narrow rows, for activations of up to 1024 channels. Kernels: `rows.cu`.
//!
//! The same formulas as [`crate::ops::norm::ln_modulate`] and [`crate::ops::elementwise::gate_residual`], whose kernels
//! give a block to every row and so leave most of a card idle where rows are short.

#![allow(clippy::too_many_arguments)] // a kernel's

use crate::error::CudaError;
use crate::half_type::Half;
use crate::kernels::{Args, Launch, Module};
use crate::ops::extent::{blocks, multiples_of_8, strided, vectors};
use crate::stream::Stream;
use crate::view::View;

static ROWS: Module = Module {
    name: "rows",
    source: include_str!("../../kernels/rows.cu"),
};

/// `ROWS_THREADS` of the kernels.
const THREADS: u32 = 256;
const WARPS: usize = 8;

/// The widest rows: four vectors of eight for each of 32 lanes.
pub const MAX_WIDTH: usize = 1024;

/// Vectors of a lane that the kernels are made for.
pub(super) fn vectors_of_a_lane(d: usize) -> usize {
    d.div_ceil(256).next_power_of_two()
}

fn modulation(view: View, mod_stride: usize, rows: usize, tokens: usize, d: usize) -> View {
    multiples_of_8(&[mod_stride, d], "stride of modulations and width");
    assert!(
        tokens > 0 && rows.is_multiple_of(tokens),
        "{rows} rows are no samples of {tokens} tokens"
    );
    vectors(
        view,
        strided(rows / tokens, mod_stride, d),
        2,
        "modulations",
    )
}

/// `out = (x − μ)/σ·(1 + scale) + shift`, and (μ, 1/σ) into `stats`, f32 `[rows, 2]`.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a view is too short, a size or an address does not suit 16-byte accesses, or rows are wider than [`MAX_WIDTH`].
pub fn norm_rows(
    s: &Stream,
    t: Half,
    out: View,
    stats: View,
    x: View,
    shift: View,
    scale: View,
    mod_stride: usize,
    rows: usize,
    tokens_per_sample: usize,
    d: usize,
    eps: f32,
) -> Result<(), CudaError> {
    assert!(d <= MAX_WIDTH, "rows of {d} channels; {MAX_WIDTH} at most");
    let args = Args::new()
        .ptr(vectors(out, rows * d, 2, "the norm's output"))
        .ptr(vectors(stats, 2 * rows, 4, "statistics"))
        .ptr(vectors(x, rows * d, 2, "the norm's input"))
        .ptr(modulation(shift, mod_stride, rows, tokens_per_sample, d))
        .ptr(modulation(scale, mod_stride, rows, tokens_per_sample, d))
        .i32(mod_stride)
        .i32(rows)
        .i32(tokens_per_sample)
        .i32(d)
        .f32(eps);
    let launch = Launch {
        grid: [blocks(rows.div_ceil(WARPS).max(1)), 1, 1],
        block: [THREADS, 1, 1],
        shared_bytes: 0,
    };
    let kernel = format!("norm_rows_{}", vectors_of_a_lane(d));
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { s.launch(&ROWS, &[t.define()], &kernel, launch, args) }
}

/// `out = residual + gate·y`, clipped to what f16 holds if `clip`. `out` may be `residual`. Rows may be of any width.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a view is too short, or a size or an address does not suit 16-byte accesses.
pub fn gate_rows(
    s: &Stream,
    t: Half,
    out: View,
    residual: View,
    gate: View,
    mod_stride: usize,
    y: View,
    rows: usize,
    tokens_per_sample: usize,
    d: usize,
    clip: bool,
) -> Result<(), CudaError> {
    let args = Args::new()
        .ptr(vectors(out, rows * d, 2, "the sum"))
        .ptr(vectors(residual, rows * d, 2, "the residual"))
        .ptr(modulation(gate, mod_stride, rows, tokens_per_sample, d))
        .i32(mod_stride)
        .ptr(vectors(y, rows * d, 2, "the update"))
        .i32(rows)
        .i32(tokens_per_sample)
        .i32(d)
        .i32(i32::from(clip));
    let launch = Launch::linear(rows * d / 8, THREADS);
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { s.launch(&ROWS, &[t.define()], "gate_rows", launch, args) }
}
