//! Passes over whole activations: GELU, SiLU, sums, conversions, sinusoids. Kernels: `elementwise.cu`.

#![allow(clippy::too_many_arguments)] // a kernel's

use crate::error::CudaError;
use crate::half_type::Half;
use crate::kernels::{Args, Launch, Module};
use crate::ops::extent::{blocks, elements, multiples_of_8, strided, vectors};
use crate::stream::Stream;
use crate::view::View;

static ELEMENTWISE: Module = Module {
    name: "elementwise",
    source: include_str!("../../kernels/elementwise.cu"),
};

/// `ROW_THREADS` and `COLUMN_CHUNK` of the kernels over rows.
const ROW_THREADS: u32 = 192;
const COLUMN_CHUNK: usize = 3072;

/// `FLAT_THREADS` and `FLAT_CHUNK` of the flat kernels.
const FLAT_THREADS: u32 = 256;
const FLAT_CHUNK: usize = 4096;

/// Sinusoids of one time: 128 cosines and 128 sines.
const NUM_SINUSOIDS: usize = 256;

/// A kernel of this file over rows.
///
/// # Errors
///
/// If the launch fails.
///
/// # Safety
///
/// The arguments are the kernel's, and every view is as large as `rows` rows of `columns` need.
pub(super) unsafe fn launch_rows(
    s: &Stream,
    t: Half,
    kernel: &str,
    rows: usize,
    columns: usize,
    args: Args,
) -> Result<(), CudaError> {
    if rows * columns == 0 {
        return Ok(());
    }
    let launch = Launch {
        grid: [blocks(rows), blocks(columns.div_ceil(COLUMN_CHUNK)), 1],
        block: [ROW_THREADS, 1, 1],
        shared_bytes: 0,
    };
    // SAFETY: promised by the caller.
    unsafe { s.launch(&ELEMENTWISE, &[t.define()], kernel, launch, args) }
}

/// # Safety
///
/// The arguments are the kernel's, and every view has `n` elements.
unsafe fn launch_flat(
    s: &Stream,
    t: Half,
    kernel: &str,
    n: usize,
    args: Args,
) -> Result<(), CudaError> {
    if n == 0 {
        return Ok(());
    }
    let launch = Launch {
        grid: [blocks(n.div_ceil(FLAT_CHUNK)), 1, 1],
        block: [FLAT_THREADS, 1, 1],
        shared_bytes: 0,
    };
    // SAFETY: promised by the caller.
    unsafe { s.launch(&ELEMENTWISE, &[t.define()], kernel, launch, args) }
}

/// GELU in its tanh form: T `[rows, cols]` with row strides. `out` may be `x`.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a view is too short, or a size or an address does not suit 16-byte accesses.
pub fn gelu_tanh(
    s: &Stream,
    t: Half,
    out: View,
    x: View,
    rows: usize,
    cols: usize,
    out_stride: usize,
    in_stride: usize,
) -> Result<(), CudaError> {
    multiples_of_8(&[cols, out_stride, in_stride], "columns and strides");
    let args = Args::new()
        .ptr(vectors(out, strided(rows, out_stride, cols), 2, "GELU"))
        .ptr(vectors(x, strided(rows, in_stride, cols), 2, "its input"))
        .i32(cols)
        .i32(out_stride)
        .i32(in_stride);
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { launch_rows(s, t, "gelu_tanh", rows, cols, args) }
}

/// `dx = dy·gelu′(x)`. `dx` may be `dy` or `x`.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// As [`gelu_tanh`].
pub fn gelu_tanh_backward(
    s: &Stream,
    t: Half,
    dx: View,
    dy: View,
    x: View,
    rows: usize,
    cols: usize,
    dx_stride: usize,
    dy_stride: usize,
    x_stride: usize,
) -> Result<(), CudaError> {
    multiples_of_8(
        &[cols, dx_stride, dy_stride, x_stride],
        "columns and strides",
    );
    let part = |view, stride, what| vectors(view, strided(rows, stride, cols), 2, what);
    let args = Args::new()
        .ptr(part(dx, dx_stride, "the gradient of GELU's input"))
        .ptr(part(dy, dy_stride, "the gradient of GELU"))
        .ptr(part(x, x_stride, "GELU's input"))
        .i32(cols)
        .i32(dx_stride)
        .i32(dy_stride)
        .i32(x_stride);
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { launch_rows(s, t, "gelu_tanh_backward", rows, cols, args) }
}

/// `out = x/(1 + e⁻ˣ)`, `n` elements of f32; and `[out, x]` rounded to T in `halves`, for the way back. `out` may be `x`.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a view is too short or not aligned to 16 bytes.
pub fn silu(
    s: &Stream,
    t: Half,
    out: View,
    halves: [View; 2],
    x: View,
    n: usize,
) -> Result<(), CudaError> {
    let args = Args::new()
        .ptr(vectors(out, n, 4, "SiLU"))
        .ptr(vectors(halves[0], n, 2, "SiLU in 16 bits"))
        .ptr(vectors(halves[1], n, 2, "its input in 16 bits"))
        .ptr(vectors(x, n, 4, "its input"))
        .i64(n as i64);
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { launch_flat(s, t, "silu", n, args) }
}

/// `dx = dy·silu′(x)`, `n` elements of T. `dx` may be `dy`.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// As [`silu`].
pub fn silu_backward(
    s: &Stream,
    t: Half,
    dx: View,
    dy: View,
    x: View,
    n: usize,
) -> Result<(), CudaError> {
    let args = Args::new()
        .ptr(vectors(dx, n, 2, "the gradient of SiLU's input"))
        .ptr(vectors(dy, n, 2, "the gradient of SiLU"))
        .ptr(vectors(x, n, 2, "SiLU's input"))
        .i64(n as i64);
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { launch_flat(s, t, "silu_backward", n, args) }
}

/// `n` elements of f32 rounded to T.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// As [`silu`].
pub fn to_half(s: &Stream, t: Half, out: View, x_f32: View, n: usize) -> Result<(), CudaError> {
    let args = Args::new()
        .ptr(vectors(out, n, 2, "16-bit values"))
        .ptr(vectors(x_f32, n, 4, "f32 values"))
        .i64(n as i64);
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { launch_flat(s, t, "cast_to_half", n, args) }
}

/// `n` elements of T as f32.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// As [`silu`].
pub fn to_f32(s: &Stream, t: Half, out_f32: View, x: View, n: usize) -> Result<(), CudaError> {
    let args = Args::new()
        .ptr(vectors(out_f32, n, 4, "f32 values"))
        .ptr(vectors(x, n, 2, "16-bit values"))
        .i64(n as i64);
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { launch_flat(s, t, "cast_to_f32", n, args) }
}

/// Sinusoids of `b` times (f32, 0 to 1000): f32 `[b, 256]`, 128 cosines and then 128 sines, as `mmdit::embed` has them; and
/// the same in T.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a view is too short.
pub fn sinusoids(
    s: &Stream,
    t: Half,
    out: View,
    out_half: View,
    times_f32: View,
    b: usize,
) -> Result<(), CudaError> {
    if b == 0 {
        return Ok(());
    }
    let args = Args::new()
        .ptr(elements(out, b * NUM_SINUSOIDS, 4, "sinusoids"))
        .ptr(elements(
            out_half,
            b * NUM_SINUSOIDS,
            2,
            "sinusoids in 16 bits",
        ))
        .ptr(elements(times_f32, b, 4, "times"));
    let launch = Launch {
        grid: [blocks(b), 1, 1],
        block: [NUM_SINUSOIDS as u32 / 2, 1, 1],
        shared_bytes: 0,
    };
    // SAFETY: the kernel's arguments; both views were compared with the sizes.
    unsafe { s.launch(&ELEMENTWISE, &[t.define()], "sinusoids", launch, args) }
}

/// `n` normal numbers of standard deviation `std`, T, that depend on `seed` and position alone.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// As [`silu`].
pub fn fill_normal(
    s: &Stream,
    t: Half,
    out: View,
    n: usize,
    seed: u64,
    std: f32,
) -> Result<(), CudaError> {
    let args = Args::new()
        .ptr(vectors(out, n, 2, "normal numbers"))
        .i64(n as i64)
        .u64(seed)
        .f32(std);
    // SAFETY: the kernel's arguments; the view was compared with the size.
    unsafe { launch_flat(s, t, "fill_normal", n, args) }
}
