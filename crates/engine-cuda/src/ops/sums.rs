//! Sums over rows: gradients of biases and of modulation vectors. Kernels: `sums.cu`.
//!
//! Each is taken in two passes whose order depends on the sizes alone: parts of rows, then their sum. Between them lie
//! [`partials_len`] numbers of scratch.

#![allow(clippy::too_many_arguments)] // a kernel's

use crate::error::CudaError;
use crate::half_type::Half;
use crate::kernels::{Args, Launch, Module};
use crate::ops::extent::{blocks, elements, multiples_of_8, strided, vectors};
use crate::ops::rows::{MAX_WIDTH, vectors_of_a_lane};
use crate::stream::Stream;
use crate::view::View;

static SUMS: Module = Module {
    name: "sums",
    source: include_str!("../../kernels/sums.cu"),
};

/// `SUM_THREADS` and `CHUNK` of the kernels.
const THREADS: u32 = 256;
const CHUNK: usize = 256;
/// Columns and rows of a block that adds up parts.
const FINISH_COLUMNS: usize = 32;
const FINISH_THREADS: u32 = 1024;

/// Blocks that keep a card of 132 multiprocessors busy, eight to each.
const ENOUGH_BLOCKS: usize = 1056;
/// Fewer rows than this are not cut: each of eight warps would add up fewer than four.
const LEAST_ROWS: usize = 32;

fn splits(segments: usize, rows: usize, columns: usize) -> usize {
    let others = segments * columns.div_ceil(CHUNK);
    (ENOUGH_BLOCKS / others.max(1)).clamp(1, rows.div_ceil(LEAST_ROWS).max(1))
}

/// Numbers of scratch (f32) for sums over `segments` of `rows` rows.
pub fn partials_len(segments: usize, rows: usize, columns: usize, outputs: usize) -> usize {
    segments * splits(segments, rows, columns) * outputs * columns
}

/// Sizes of a sum.
struct Sizes {
    segments: usize,
    rows: usize,
    columns: usize,
    outputs: usize,
}

impl Sizes {
    fn partials(&self, view: View) -> View {
        let n = partials_len(self.segments, self.rows, self.columns, self.outputs);
        vectors(view, n, 4, "partial sums")
    }

    fn splits(&self) -> usize {
        splits(self.segments, self.rows, self.columns)
    }

    fn modulation(&self, view: View, stride: usize) -> View {
        multiples_of_8(&[stride], "stride of modulations");
        let reach = strided(self.segments, stride, self.columns);
        vectors(view, reach, 2, "modulations")
    }

    fn rows(&self, view: View, what: &str) -> View {
        vectors(view, self.segments * self.rows * self.columns, 2, what)
    }

    fn sum(&self, s: &Stream, t: Half, kernel: &str, args: Args) -> Result<(), CudaError> {
        let launch = Launch {
            grid: [
                blocks(self.segments * self.splits()),
                blocks(self.columns.div_ceil(CHUNK)),
                1,
            ],
            block: [THREADS, 1, 1],
            shared_bytes: 0,
        };
        let args = args.i32(self.rows).i32(self.columns).i32(self.splits());
        // SAFETY: the callers below give each kernel its arguments, and have compared every view with the sizes.
        unsafe { s.launch(&SUMS, &[t.define()], kernel, launch, args) }
    }

    fn finish(
        &self,
        s: &Stream,
        t: Half,
        kernel: &str,
        outputs: [View; 2],
        stride: usize,
        bytes_each: usize,
        partials: View,
        wanted: usize,
    ) -> Result<(), CudaError> {
        let reach = strided(self.segments, stride, self.columns);
        let [first, second] = outputs.map(|view| elements(view, reach, bytes_each, "sums"));
        finish(
            s,
            t,
            kernel,
            [first, second],
            partials,
            [
                self.segments,
                self.splits(),
                self.columns,
                stride,
                self.outputs,
            ],
            wanted,
        )
    }
}

/// Adds up the parts of the first `wanted` outputs; all views are compared with the sizes by the callers.
fn finish(
    s: &Stream,
    t: Half,
    kernel: &str,
    [first, second]: [View; 2],
    partials: View,
    [segments, splits, columns, stride, outputs]: [usize; 5],
    wanted: usize,
) -> Result<(), CudaError> {
    let args = Args::new()
        .ptr(first)
        .ptr(second)
        .ptr(partials)
        .i32(splits)
        .i32(columns)
        .i32(outputs)
        .i32(stride);
    let launch = Launch {
        grid: [
            blocks(columns.div_ceil(FINISH_COLUMNS)),
            blocks(segments),
            blocks(wanted),
        ],
        block: [FINISH_THREADS, 1, 1],
        shared_bytes: 0,
    };
    // SAFETY: promised by the callers.
    unsafe { s.launch(&SUMS, &[t.define()], kernel, launch, args) }
}

/// Adds up `parts` of two vectors: f32 `[parts, 2, columns]` → two of `columns`.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a view is too short.
pub(super) fn finish_pair(
    s: &Stream,
    t: Half,
    outputs: [View; 2],
    partials: View,
    parts: usize,
    columns: usize,
) -> Result<(), CudaError> {
    let outputs = outputs.map(|view| elements(view, columns, 4, "sums"));
    let partials = elements(partials, parts * 2 * columns, 4, "partial sums");
    let sizes = [1, parts, columns, columns, 2];
    finish(s, t, "finish_sums_f32", outputs, partials, sizes, 2)
}

/// Adds up `parts` of one vector: f32 `[parts, columns]` → `[columns]`.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a view is too short.
pub(super) fn finish_one(
    s: &Stream,
    t: Half,
    out: View,
    partials: View,
    parts: usize,
    columns: usize,
) -> Result<(), CudaError> {
    let out = elements(out, columns, 4, "sums");
    let partials = elements(partials, parts * columns, 4, "partial sums");
    let sizes = [1, parts, columns, columns, 1];
    finish(s, t, "finish_sums_f32", [out; 2], partials, sizes, 1)
}

/// `out = Σ_rows x`: T `[rows, columns]`, rows `stride` elements apart → f32 `[columns]`.
///
/// # Errors
///
/// If a launch fails.
///
/// # Panics
///
/// If a view is too short, or a size or an address does not suit 16-byte accesses.
pub fn columns(
    s: &Stream,
    t: Half,
    out: View,
    x: View,
    stride: usize,
    rows: usize,
    columns: usize,
    partials: View,
) -> Result<(), CudaError> {
    multiples_of_8(&[columns, stride], "columns and their stride");
    let sizes = Sizes {
        segments: 1,
        rows,
        columns,
        outputs: 1,
    };
    let partials = sizes.partials(partials);
    let args = Args::new()
        .ptr(partials)
        .ptr(vectors(x, strided(rows, stride, columns), 2, "the rows"))
        .i32(stride);
    sizes.sum(s, t, "column_sums", args)?;
    sizes.finish(s, t, "finish_sums_f32", [out; 2], columns, 4, partials, 1)
}

/// `out = Σ_tokens a·b` for each sample: T `[segments·rows, d]` → T `[segments, d]`, rows `out_stride` elements apart.
///
/// # Errors
///
/// If a launch fails.
///
/// # Panics
///
/// As [`columns`].
pub fn products(
    s: &Stream,
    t: Half,
    out: View,
    out_stride: usize,
    a: View,
    b: View,
    segments: usize,
    rows: usize,
    d: usize,
    partials: View,
) -> Result<(), CudaError> {
    multiples_of_8(&[d], "columns");
    let sizes = Sizes {
        segments,
        rows,
        columns: d,
        outputs: 1,
    };
    let partials = sizes.partials(partials);
    let n = segments * rows * d;
    let args = Args::new()
        .ptr(partials)
        .ptr(vectors(a, n, 2, "a factor"))
        .ptr(vectors(b, n, 2, "a factor"));
    sizes.sum(s, t, "product_sums", args)?;
    sizes.finish(
        s,
        t,
        "finish_sums_half",
        [out; 2],
        out_stride,
        2,
        partials,
        1,
    )
}

/// Gradients of a modulated norm's shift, `Σ_tokens dy`, and scale, `Σ_tokens dy·(x − μ)/σ`, for each sample: T
/// `[segments·rows, d]` → T `[segments, d]` each, rows `out_stride` elements apart. `stats` are the norm's.
///
/// # Errors
///
/// If a launch fails.
///
/// # Panics
///
/// As [`columns`].
pub fn norms(
    s: &Stream,
    t: Half,
    shift: View,
    scale: View,
    out_stride: usize,
    dy: View,
    x: View,
    stats: View,
    segments: usize,
    rows: usize,
    d: usize,
    partials: View,
) -> Result<(), CudaError> {
    multiples_of_8(&[d], "columns");
    let sizes = Sizes {
        segments,
        rows,
        columns: d,
        outputs: 2,
    };
    let partials = sizes.partials(partials);
    let n = segments * rows * d;
    let args = Args::new()
        .ptr(partials)
        .ptr(vectors(dy, n, 2, "the norm's gradient"))
        .ptr(vectors(x, n, 2, "the norm's input"))
        .ptr(vectors(stats, 2 * segments * rows, 4, "statistics"));
    sizes.sum(s, t, "norm_sums", args)?;
    sizes.finish(
        s,
        t,
        "finish_sums_half",
        [shift, scale],
        out_stride,
        2,
        partials,
        2,
    )
}

/// [`norms`] and, in the same pass, the gradient of the norm's input, which is stored in `dx` or, with `accumulate`,
/// added to it. `scale` is the modulation; its rows and those of the outputs are `stride` elements apart.
///
/// # Errors
///
/// If a launch fails.
///
/// # Panics
///
/// As [`columns`], or if rows are wider than [`MAX_WIDTH`].
pub fn norms_backward(
    s: &Stream,
    t: Half,
    [dshift, dscale]: [View; 2],
    dx: View,
    dy: View,
    x: View,
    stats: View,
    scale: View,
    stride: usize,
    segments: usize,
    rows: usize,
    d: usize,
    accumulate: bool,
    partials: View,
) -> Result<(), CudaError> {
    multiples_of_8(&[d], "columns");
    assert!(d <= MAX_WIDTH, "rows of {d} channels; {MAX_WIDTH} at most");
    let sizes = Sizes {
        segments,
        rows,
        columns: d,
        outputs: 2,
    };
    let partials = sizes.partials(partials);
    let args = Args::new()
        .ptr(partials)
        .ptr(sizes.rows(dx, "the input's gradient"))
        .ptr(sizes.rows(dy, "the norm's gradient"))
        .ptr(sizes.rows(x, "the norm's input"))
        .ptr(vectors(stats, 2 * segments * rows, 4, "statistics"))
        .ptr(sizes.modulation(scale, stride))
        .i32(stride)
        .i32(i32::from(accumulate))
        .i32(rows)
        .i32(d)
        .i32(sizes.splits());
    let width = vectors_of_a_lane(d);
    let launch = Launch {
        grid: [blocks(segments * sizes.splits()), 1, 1],
        // The widest form has half as many warps: its sums would not fit shared memory.
        block: [if width == 4 { THREADS / 2 } else { THREADS }, 1, 1],
        shared_bytes: 0,
    };
    let kernel = format!("norm_backward_sums_{width}");
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { s.launch(&SUMS, &[t.define()], &kernel, launch, args)? };
    let outputs = [dshift, dscale];
    sizes.finish(s, t, "finish_sums_half", outputs, stride, 2, partials, 2)
}

/// Going back through a gate: `dy = gate·dout`, the gate's gradient `Σ_tokens dout·y` of each sample (T, rows `stride`
/// elements apart, as the gate's), and `bias = Σ dy` over everything (f32 `[d]`): the gradient of a bias that was added
/// to `y`.
///
/// # Errors
///
/// If a launch fails.
///
/// # Panics
///
/// As [`columns`].
pub fn gate_backward(
    s: &Stream,
    t: Half,
    dgate: View,
    bias: View,
    dy: View,
    dout: View,
    y: View,
    gate: View,
    stride: usize,
    segments: usize,
    rows: usize,
    d: usize,
    partials: View,
) -> Result<(), CudaError> {
    multiples_of_8(&[d], "columns");
    let sizes = Sizes {
        segments,
        rows,
        columns: d,
        outputs: 2,
    };
    let partials = sizes.partials(partials);
    let gate = sizes.modulation(gate, stride);
    let args = Args::new()
        .ptr(partials)
        .ptr(sizes.rows(dy, "the update's gradient"))
        .ptr(sizes.rows(dout, "the sum's gradient"))
        .ptr(sizes.rows(y, "the update"))
        .ptr(gate)
        .i32(stride);
    sizes.sum(s, t, "gate_backward_sums", args)?;
    let outputs = [dgate; 2];
    sizes.finish(s, t, "finish_sums_half", outputs, stride, 2, partials, 1)?;
    let args = Args::new()
        .ptr(elements(bias, d, 4, "the bias's gradient"))
        .ptr(partials)
        .ptr(gate)
        .i32(stride)
        .i32(segments)
        .i32(sizes.splits())
        .i32(d);
    let launch = Launch {
        grid: [blocks(d.div_ceil(FINISH_COLUMNS)), 1, 1],
        block: [FINISH_THREADS, 1, 1],
        shared_bytes: 0,
    };
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { s.launch(&SUMS, &[t.define()], "finish_gated", launch, args) }
}

/// Going back through GELU: `dx = dy·gelu′(x)` (T `[rows, columns]` with row strides; `dx` may be `dy`), and
/// `bias = Σ_rows dx` (f32 `[columns]`): the gradient of a bias that is part of `x`.
///
/// # Errors
///
/// If a launch fails.
///
/// # Panics
///
/// As [`columns`].
pub fn gelu_backward(
    s: &Stream,
    t: Half,
    bias: View,
    (dx, dx_stride): (View, usize),
    (dy, dy_stride): (View, usize),
    (x, x_stride): (View, usize),
    rows: usize,
    columns: usize,
    partials: View,
) -> Result<(), CudaError> {
    multiples_of_8(
        &[columns, dx_stride, dy_stride, x_stride],
        "columns and strides",
    );
    let sizes = Sizes {
        segments: 1,
        rows,
        columns,
        outputs: 1,
    };
    let partials = sizes.partials(partials);
    let part = |view, stride, what| vectors(view, strided(rows, stride, columns), 2, what);
    let args = Args::new()
        .ptr(partials)
        .ptr(part(dx, dx_stride, "the gradient of GELU's input"))
        .ptr(part(dy, dy_stride, "the gradient of GELU"))
        .ptr(part(x, x_stride, "GELU's input"))
        .i32(dx_stride)
        .i32(dy_stride)
        .i32(x_stride);
    sizes.sum(s, t, "gelu_backward_sums", args)?;
    let outputs = [bias; 2];
    sizes.finish(s, t, "finish_sums_f32", outputs, columns, 4, partials, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_cut_until_the_card_is_busy_and_no_further() {
        assert_eq!(splits(256, 256, 256), 4);
        assert_eq!(splits(1, 81920, 1792), 150);
        assert_eq!(splits(1, 40, 8), 2);
        assert_eq!(splits(5000, 256, 256), 1);
    }
}
