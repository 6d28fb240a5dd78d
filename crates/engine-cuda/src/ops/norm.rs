//! Layer norm with modulation, alone or together with the gated residual beside it. Kernels: `norm.cu`.
//!
//! `x` is `[rows, d]`, T; a modulation vector is `d` elements of T per sample of `tokens_per_sample` rows, vectors of
//! neighbouring samples `mod_stride` elements apart. Statistics are f32 `[rows, 2]`: mean and `1/√(variance + eps)`.
//!
//! Source: `AdaLayerNormZero` and its kin, diffusers 0.42; the sum of a block and its residual, `FluxTransformerBlock`.

#![allow(clippy::too_many_arguments)] // a kernel's

use crate::error::CudaError;
use crate::half_type::Half;
use crate::kernels::{Args, Launch, Module};
use crate::ops::extent::{blocks, multiples_of_8, strided, vectors};
use crate::stream::Stream;
use crate::view::View;

static NORM: Module = Module {
    name: "norm",
    source: include_str!("../../kernels/norm.cu"),
};

/// `NORM_THREADS` of the kernels.
const THREADS: u32 = 128;

/// Sizes that all kernels here have in common, and the checks of views against them.
struct Rows {
    mod_stride: usize,
    rows: usize,
    tokens: usize,
    d: usize,
}

impl Rows {
    fn new(mod_stride: usize, rows: usize, tokens: usize, d: usize) -> Self {
        multiples_of_8(&[mod_stride, d], "stride of modulations and width");
        assert!(
            tokens > 0 && rows.is_multiple_of(tokens),
            "{rows} rows are no samples of {tokens} tokens"
        );
        Self {
            mod_stride,
            rows,
            tokens,
            d,
        }
    }

    fn activation(&self, view: View, what: &str) -> View {
        vectors(view, self.rows * self.d, 2, what)
    }

    fn modulation(&self, view: View, what: &str) -> View {
        let reach = strided(self.rows / self.tokens, self.mod_stride, self.d);
        vectors(view, reach, 2, what)
    }

    fn stats(&self, view: Option<View>) -> Option<View> {
        view.map(|view| vectors(view, self.rows * 2, 4, "statistics"))
    }

    fn sizes(&self, args: Args, eps: f32) -> Args {
        args.i32(self.mod_stride)
            .i32(self.rows)
            .i32(self.tokens)
            .i32(self.d)
            .f32(eps)
    }

    fn launch(&self, s: &Stream, t: Half, kernel: &str, args: Args) -> Result<(), CudaError> {
        if self.rows == 0 {
            return Ok(());
        }
        let launch = Launch {
            grid: [blocks(self.rows), 1, 1],
            block: [THREADS, 1, 1],
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
pub fn ln_modulate(
    s: &Stream,
    t: Half,
    out: View,
    stats: Option<View>,
    x: View,
    shift: View,
    scale: View,
    mod_stride: usize,
    rows: usize,
    tokens_per_sample: usize,
    d: usize,
    eps: f32,
) -> Result<(), CudaError> {
    let r = Rows::new(mod_stride, rows, tokens_per_sample, d);
    let args = Args::new()
        .ptr(r.activation(out, "the norm's output"))
        .opt(r.stats(stats))
        .ptr(r.activation(x, "the norm's input"))
        .ptr(r.modulation(shift, "shifts"))
        .ptr(r.modulation(scale, "scales"));
    r.launch(s, t, "ln_modulate", r.sizes(args, eps))
}

/// [`crate::ops::elementwise::gate_residual`] and [`ln_modulate`] of its result in one pass, with the same bits.
///
/// `sum = residual + gate·y`, clipped to what f16 holds if `clip`; `out` is its modulated norm. `sum` may be
/// `residual`, and `out` may be `y`.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// As [`ln_modulate`].
pub fn gate_residual_ln_modulate(
    s: &Stream,
    t: Half,
    sum: View,
    out: View,
    stats: Option<View>,
    residual: View,
    gate: View,
    y: View,
    shift: View,
    scale: View,
    mod_stride: usize,
    rows: usize,
    tokens_per_sample: usize,
    d: usize,
    eps: f32,
    clip: bool,
) -> Result<(), CudaError> {
    let r = Rows::new(mod_stride, rows, tokens_per_sample, d);
    let args = Args::new()
        .ptr(r.activation(sum, "the sum"))
        .ptr(r.activation(out, "the norm's output"))
        .opt(r.stats(stats))
        .ptr(r.activation(residual, "the residual"))
        .ptr(r.modulation(gate, "gates"))
        .ptr(r.activation(y, "the update"))
        .ptr(r.modulation(shift, "shifts"))
        .ptr(r.modulation(scale, "scales"));
    let args = r.sizes(args, eps).i32(i32::from(clip));
    r.launch(s, t, "gate_residual_ln_modulate", args)
}

/// The gradient of [`ln_modulate`] with respect to `x`, stored in `dx` or, with `accumulate`, added to it.
///
/// With `g = dy·(1 + scale)` and `n` the norm: `(g − mean(g) − n·mean(g·n))/σ`. Without statistics they are computed
/// again. `dx` may be `dy`.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// As [`ln_modulate`].
pub fn ln_modulate_backward(
    s: &Stream,
    t: Half,
    dx: View,
    dy: View,
    x: View,
    stats: Option<View>,
    scale: View,
    mod_stride: usize,
    rows: usize,
    tokens_per_sample: usize,
    d: usize,
    eps: f32,
    accumulate: bool,
) -> Result<(), CudaError> {
    let r = Rows::new(mod_stride, rows, tokens_per_sample, d);
    let args = Args::new()
        .ptr(r.activation(dx, "the input's gradient"))
        .ptr(r.activation(dy, "the output's gradient"))
        .ptr(r.activation(x, "the norm's input"))
        .opt(r.stats(stats))
        .ptr(r.modulation(scale, "scales"));
    let args = r.sizes(args, eps).i32(i32::from(accumulate));
    r.launch(s, t, "ln_modulate_backward", args)
}
