//! Layer norm and gates whose vectors each sample has its own of, there and back.
//!
//! Kernels that do the same work are picked among here. `norm.cu` and `elementwise.cu` give a block to every row and so
//! leave most of a card idle where rows are short; `rows.cu` and `sums.cu` give it a warp or less.
//!
//! Statistics are f32 `[b·tokens, 2]`: mean and `1/√(variance + eps)`.
//!
//! Source: `AdaLayerNormZero` and its kin, diffusers 0.42; the sum of a block and its residual, `FluxTransformerBlock`.

#![allow(clippy::too_many_arguments)] // a kernel's

use crate::error::CudaError;
use crate::half_type::Half;
use crate::kernels::{Args, Launch, Module};
use crate::ops::elementwise::launch_rows;
use crate::ops::extent::{blocks, multiples_of_8, strided, vectors};
use crate::ops::sums;
use crate::stream::Stream;
use crate::view::View;

static NORM: Module = Module {
    name: "norm",
    source: include_str!("../../kernels/norm.cu"),
};
static ROWS: Module = Module {
    name: "rows",
    source: include_str!("../../kernels/rows.cu"),
};

/// `NORM_THREADS` of the kernels that give a block to a row.
const NORM_THREADS: u32 = 128;

/// `ROWS_THREADS` and `ROWS_WARPS` of those for narrow rows.
const ROWS_THREADS: u32 = 256;
const ROWS_WARPS: usize = 8;

/// The widest rows of which a warp is enough: four vectors of eight for each of 32 lanes.
pub const MAX_NARROW: usize = 1024;

/// Vectors of a lane that the kernels of narrow rows are made for.
pub(super) fn vectors_of_a_lane(d: usize) -> usize {
    d.div_ceil(256).next_power_of_two()
}

/// Activations T `[b, tokens, d]`, and where the vectors that modulate them lie: `d` f32 per sample. Their gradients are T.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Modulated {
    /// Samples.
    pub b: usize,
    /// Tokens of a sample.
    pub tokens: usize,
    /// Width, a multiple of 8.
    pub d: usize,
    /// Elements from a sample's vector to the next one's, a multiple of 8; those of gradients lie as far apart.
    pub stride: usize,
    /// Whether gradients of the vectors are wanted: rows are then usually short and many, and gates have kernels for
    /// that.
    pub trained: bool,
}

/// Where the gradients of a norm's vectors go.
#[derive(Clone, Copy, Debug)]
pub struct NormGradients {
    /// That of shift.
    pub shift: View,
    /// That of scale.
    pub scale: View,
    /// Scratch: [`sums::partials_len`] f32 for two outputs.
    pub partials: View,
}

/// Where the gradient of a gate goes, and what it is computed from.
#[derive(Clone, Copy, Debug)]
pub struct GateGradients {
    /// That of the gate.
    pub gate: View,
    /// That of a bias which was added to `y`: f32 `[d]`.
    pub bias: View,
    /// What was gated.
    pub y: View,
    /// Scratch: [`sums::partials_len`] f32 for two outputs.
    pub partials: View,
}

impl Modulated {
    fn rows(&self) -> usize {
        self.b * self.tokens
    }

    pub(super) fn activation(&self, view: View, what: &str) -> View {
        vectors(view, self.rows() * self.d, 2, what)
    }

    pub(super) fn vector(&self, view: View, what: &str) -> View {
        multiples_of_8(&[self.stride, self.d], "stride of modulations and width");
        vectors(view, strided(self.b, self.stride, self.d), 4, what)
    }

    pub(super) fn stats(&self, view: View) -> View {
        vectors(view, self.rows() * 2, 4, "statistics")
    }

    fn norm_sizes(&self, args: Args, eps: f32) -> Args {
        args.i32(self.stride)
            .i32(self.rows())
            .i32(self.tokens)
            .i32(self.d)
            .f32(eps)
    }

    /// A block for each row.
    fn launch_norm(&self, s: &Stream, t: Half, kernel: &str, args: Args) -> Result<(), CudaError> {
        if self.rows() == 0 {
            return Ok(());
        }
        let launch = Launch {
            grid: [blocks(self.rows()), 1, 1],
            block: [NORM_THREADS, 1, 1],
            shared_bytes: 0,
        };
        // SAFETY: the callers below give each kernel its arguments, all of which went through this type's checks.
        unsafe { s.launch(&NORM, &[t.define()], kernel, launch, args) }
    }
}

/// `out = (x − μ)/σ·(1 + scale) + shift`; statistics are kept if there is room for them.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a view is too short, or a size or an address does not suit 16-byte accesses.
pub fn norm(
    s: &Stream,
    t: Half,
    out: View,
    stats: Option<View>,
    x: View,
    [shift, scale]: [View; 2],
    m: Modulated,
    eps: f32,
) -> Result<(), CudaError> {
    let args = Args::new()
        .ptr(m.activation(out, "the norm's output"))
        .opt(stats.map(|stats| m.stats(stats)))
        .ptr(m.activation(x, "the norm's input"))
        .ptr(m.vector(shift, "shifts"))
        .ptr(m.vector(scale, "scales"));
    let args = m.norm_sizes(args, eps);
    // The kernel of narrow rows has no form without statistics.
    if stats.is_none() || m.d > MAX_NARROW {
        return m.launch_norm(s, t, "ln_modulate", args);
    }
    let launch = Launch {
        grid: [blocks(m.rows().div_ceil(ROWS_WARPS).max(1)), 1, 1],
        block: [ROWS_THREADS, 1, 1],
        shared_bytes: 0,
    };
    let kernel = format!("norm_rows_{}", vectors_of_a_lane(m.d));
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { s.launch(&ROWS, &[t.define()], &kernel, launch, args) }
}

/// `out = residual + gate·y`, clipped to what f16 holds if `clip`. `out` may be `residual`.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// As [`norm`].
pub fn gate(
    s: &Stream,
    t: Half,
    out: View,
    residual: View,
    gate: View,
    y: View,
    m: Modulated,
    clip: bool,
) -> Result<(), CudaError> {
    let args = Args::new()
        .ptr(m.activation(out, "the sum"))
        .ptr(m.activation(residual, "the residual"))
        .ptr(m.vector(gate, "gates"))
        .i32(m.stride)
        .ptr(m.activation(y, "the update"));
    let args = if m.trained { args.i32(m.rows()) } else { args };
    let args = args.i32(m.tokens).i32(m.d).i32(i32::from(clip));
    // SAFETY: the kernels' arguments; every view was compared with the sizes.
    unsafe {
        if m.trained {
            let launch = Launch::linear(m.rows() * m.d / 8, ROWS_THREADS);
            s.launch(&ROWS, &[t.define()], "gate_rows", launch, args)
        } else {
            launch_rows(s, t, "gate_residual", m.rows(), m.d, args)
        }
    }
}

/// [`gate`] into `sum` without clipping and [`norm`] of that into `out`, with the same bits; in one pass where no
/// gradients of the vectors are wanted. `sum` may be `residual`, and `out` may be `y`.
///
/// # Errors
///
/// If a launch fails.
///
/// # Panics
///
/// As [`norm`].
pub fn gate_and_norm(
    s: &Stream,
    t: Half,
    [sum, out]: [View; 2],
    stats: Option<View>,
    residual: View,
    gates: View,
    y: View,
    [shift, scale]: [View; 2],
    m: Modulated,
    eps: f32,
) -> Result<(), CudaError> {
    if m.trained {
        gate(s, t, sum, residual, gates, y, m, false)?;
        return norm(s, t, out, stats, sum, [shift, scale], m, eps);
    }
    let args = Args::new()
        .ptr(m.activation(sum, "the sum"))
        .ptr(m.activation(out, "the norm's output"))
        .opt(stats.map(|stats| m.stats(stats)))
        .ptr(m.activation(residual, "the residual"))
        .ptr(m.vector(gates, "gates"))
        .ptr(m.activation(y, "the update"))
        .ptr(m.vector(shift, "shifts"))
        .ptr(m.vector(scale, "scales"));
    let args = m.norm_sizes(args, eps).i32(i32::from(false)); // no clipping
    m.launch_norm(s, t, "gate_residual_ln_modulate", args)
}

/// The gradient of [`norm`] with respect to `x`, stored in `dx` or, with `accumulate`, added to it; and those of its
/// vectors, if they are wanted. Without statistics they are computed again. `dx` may be `dy`.
///
/// With `g = dy·(1 + scale)` and `n` the norm: `(g − mean(g) − n·mean(g·n))/σ`.
///
/// # Errors
///
/// If a launch fails.
///
/// # Panics
///
/// As [`norm`], and if the vectors' gradients are wanted without statistics.
pub fn norm_backward(
    s: &Stream,
    t: Half,
    dx: View,
    dy: View,
    (x, stats): (View, Option<View>),
    scale: View,
    gradients: Option<NormGradients>,
    m: Modulated,
    eps: f32,
    accumulate: bool,
) -> Result<(), CudaError> {
    if let Some(gradients) = gradients {
        let stats = stats.expect("the vectors' gradients are computed from statistics");
        if m.d <= MAX_NARROW {
            return sums::norms_backward(s, t, gradients, dx, dy, x, stats, scale, m, accumulate);
        }
        sums::norms(s, t, gradients, dy, x, stats, m)?;
    }
    let args = Args::new()
        .ptr(m.activation(dx, "the input's gradient"))
        .ptr(m.activation(dy, "the output's gradient"))
        .ptr(m.activation(x, "the norm's input"))
        .opt(stats.map(|stats| m.stats(stats)))
        .ptr(m.vector(scale, "scales"));
    let args = m.norm_sizes(args, eps).i32(i32::from(accumulate));
    m.launch_norm(s, t, "ln_modulate_backward", args)
}

/// `dy = gate·dout`: the gradient of [`gate`] with respect to `y`; and those of the gate and of a bias, if they are
/// wanted. `dy` may be `dout`.
///
/// # Errors
///
/// If a launch fails.
///
/// # Panics
///
/// As [`norm`].
pub fn gate_backward(
    s: &Stream,
    t: Half,
    dy: View,
    dout: View,
    gate: View,
    gradients: Option<GateGradients>,
    m: Modulated,
) -> Result<(), CudaError> {
    if let Some(gradients) = gradients {
        return sums::gate_backward(s, t, gradients, dy, dout, gate, m);
    }
    let args = Args::new()
        .ptr(m.activation(dy, "the update's gradient"))
        .ptr(m.activation(dout, "the sum's gradient"))
        .ptr(m.vector(gate, "gates"))
        .i32(m.stride)
        .i32(m.tokens)
        .i32(m.d);
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { launch_rows(s, t, "gate_backward", m.rows(), m.d, args) }
}
