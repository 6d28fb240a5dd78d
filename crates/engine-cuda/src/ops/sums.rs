//! Sums over rows: gradients of biases and of modulation vectors. Kernels: `sums.cu`.
//!
//! Each is taken in two passes whose order depends on the sizes alone: parts of rows, then their sum. Between them lie
//! [`partials_len`] numbers of scratch.

#![allow(clippy::too_many_arguments)] // a kernel's

use crate::error::CudaError;
use crate::half_type::Half;
use crate::kernels::{Args, Launch, Module};
use crate::ops::extent::{blocks, elements, multiples_of_8, strided, vectors};
use crate::ops::modulated::{
    GateGradients, MAX_NARROW, Modulated, NormGradients, vectors_of_a_lane,
};
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

/// What a finishing kernel writes, and bytes of each number.
const HALF: (&str, usize) = ("finish_sums_half", 2);
const F32: (&str, usize) = ("finish_sums_f32", 4);

/// Parts of sums: f32 `[segments, splits, outputs, columns]`.
struct Parts {
    view: View,
    segments: usize,
    splits: usize,
    outputs: usize,
    columns: usize,
}

impl Parts {
    /// Those of sums over the rows of each segment.
    fn of(view: View, [segments, rows, columns]: [usize; 3], outputs: usize) -> Self {
        multiples_of_8(&[columns], "columns");
        let n = partials_len(segments, rows, columns, outputs);
        Self {
            view: vectors(view, n, 4, "partial sums"),
            segments,
            splits: splits(segments, rows, columns),
            outputs,
            columns,
        }
    }

    /// Those of sums over the tokens of each sample.
    fn of_samples(view: View, m: &Modulated, outputs: usize) -> Self {
        Self::of(view, [m.b, m.tokens, m.d], outputs)
    }

    /// The arguments of a kernel that computes them, up to its inputs.
    fn args(&self) -> Args {
        Args::new().ptr(self.view)
    }

    /// Computes them. `args` are the kernel's, but for the sizes.
    fn compute(
        &self,
        s: &Stream,
        t: Half,
        kernel: &str,
        args: Args,
        rows: usize,
    ) -> Result<(), CudaError> {
        let launch = Launch {
            grid: [
                blocks(self.segments * self.splits),
                blocks(self.columns.div_ceil(CHUNK)),
                1,
            ],
            block: [THREADS, 1, 1],
            shared_bytes: 0,
        };
        let args = args.i32(rows).i32(self.columns).i32(self.splits);
        // SAFETY: the callers below give each kernel its arguments, and have compared every view with the sizes.
        unsafe { s.launch(&SUMS, &[t.define()], kernel, launch, args) }
    }

    /// Adds them up, into as many of the outputs as are given: `[segments, columns]` each, rows `stride` elements
    /// apart.
    fn finish(
        &self,
        s: &Stream,
        t: Half,
        (kernel, bytes_each): (&str, usize),
        outputs: &[View],
        stride: usize,
    ) -> Result<(), CudaError> {
        let reach = strided(self.segments, stride, self.columns);
        let output = |view| elements(view, reach, bytes_each, "sums");
        // Kernels take two; the second of one is not written.
        let args = Args::new()
            .ptr(output(outputs[0]))
            .ptr(output(outputs[outputs.len() - 1]))
            .ptr(self.view)
            .i32(self.splits)
            .i32(self.columns)
            .i32(self.outputs)
            .i32(stride);
        let launch = Launch {
            grid: [
                blocks(self.columns.div_ceil(FINISH_COLUMNS)),
                blocks(self.segments),
                blocks(outputs.len()),
            ],
            block: [FINISH_THREADS, 1, 1],
            shared_bytes: 0,
        };
        // SAFETY: the kernel's arguments; every view was compared with the sizes.
        unsafe { s.launch(&SUMS, &[t.define()], kernel, launch, args) }
    }
}

/// Adds up parts of one vector or two: f32 `[parts, outputs, columns]` → `[columns]` each.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a view is too short.
pub(super) fn finish(
    s: &Stream,
    t: Half,
    outputs: &[View],
    partials: View,
    parts: usize,
    columns: usize,
) -> Result<(), CudaError> {
    let n = parts * outputs.len() * columns;
    let parts = Parts {
        view: elements(partials, n, 4, "partial sums"),
        segments: 1,
        splits: parts,
        outputs: outputs.len(),
        columns,
    };
    parts.finish(s, t, F32, outputs, columns)
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
    multiples_of_8(&[stride], "stride of columns");
    let parts = Parts::of(partials, [1, rows, columns], 1);
    let x = vectors(x, strided(rows, stride, columns), 2, "the rows");
    let args = parts.args().ptr(x).i32(stride);
    parts.compute(s, t, "column_sums", args, rows)?;
    parts.finish(s, t, F32, &[out], columns)
}

/// Gradients of a modulated norm's shift, `Σ_tokens dy`, and scale, `Σ_tokens dy·(x − μ)/σ`, for each sample. `stats`
/// are the norm's.
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
    gradients: NormGradients,
    dy: View,
    x: View,
    stats: View,
    m: Modulated,
) -> Result<(), CudaError> {
    let parts = Parts::of_samples(gradients.partials, &m, 2);
    let args = parts
        .args()
        .ptr(m.activation(dy, "the norm's gradient"))
        .ptr(m.activation(x, "the norm's input"))
        .ptr(m.stats(stats));
    parts.compute(s, t, "norm_sums", args, m.tokens)?;
    let outputs = [gradients.shift, gradients.scale];
    parts.finish(s, t, HALF, &outputs, m.stride)
}

/// [`norms`] and, in the same pass, the gradient of the norm's input, which is stored in `dx` or, with `accumulate`,
/// added to it.
///
/// # Errors
///
/// If a launch fails.
///
/// # Panics
///
/// As [`columns`], or if rows are wider than [`MAX_NARROW`].
pub(super) fn norms_backward(
    s: &Stream,
    t: Half,
    gradients: NormGradients,
    dx: View,
    dy: View,
    x: View,
    stats: View,
    scale: View,
    m: Modulated,
    accumulate: bool,
) -> Result<(), CudaError> {
    let Modulated {
        tokens, d, stride, ..
    } = m;
    assert!(
        d <= MAX_NARROW,
        "rows of {d} channels; {MAX_NARROW} at most"
    );
    let parts = Parts::of_samples(gradients.partials, &m, 2);
    let args = parts
        .args()
        .ptr(m.activation(dx, "the input's gradient"))
        .ptr(m.activation(dy, "the norm's gradient"))
        .ptr(m.activation(x, "the norm's input"))
        .ptr(m.stats(stats))
        .ptr(m.vector(scale, "scales"))
        .i32(stride)
        .i32(i32::from(accumulate))
        .i32(tokens)
        .i32(d)
        .i32(parts.splits);
    let width = vectors_of_a_lane(d);
    let launch = Launch {
        grid: [blocks(parts.segments * parts.splits), 1, 1],
        // The widest form has half as many warps: its sums would not fit shared memory.
        block: [if width == 4 { THREADS / 2 } else { THREADS }, 1, 1],
        shared_bytes: 0,
    };
    let kernel = format!("norm_backward_sums_{width}");
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { s.launch(&SUMS, &[t.define()], &kernel, launch, args)? };
    let outputs = [gradients.shift, gradients.scale];
    parts.finish(s, t, HALF, &outputs, stride)
}

/// Going back through a gate: `dy = gate·dout`, the gate's gradient `Σ_tokens dout·y` of each sample, and the bias's,
/// `Σ dy` over everything.
///
/// # Errors
///
/// If a launch fails.
///
/// # Panics
///
/// As [`columns`].
pub(super) fn gate_backward(
    s: &Stream,
    t: Half,
    gradients: GateGradients,
    dy: View,
    dout: View,
    gate: View,
    m: Modulated,
) -> Result<(), CudaError> {
    let parts = Parts::of_samples(gradients.partials, &m, 2);
    let gate = m.vector(gate, "gates");
    let args = parts
        .args()
        .ptr(m.activation(dy, "the update's gradient"))
        .ptr(m.activation(dout, "the sum's gradient"))
        .ptr(m.activation(gradients.y, "the update"))
        .ptr(gate)
        .i32(m.stride);
    parts.compute(s, t, "gate_backward_sums", args, m.tokens)?;
    parts.finish(s, t, HALF, &[gradients.gate], m.stride)?;
    let args = Args::new()
        .ptr(elements(gradients.bias, m.d, 4, "the bias's gradient"))
        .ptr(parts.view)
        .ptr(gate)
        .i32(m.stride)
        .i32(m.b)
        .i32(parts.splits)
        .i32(m.d);
    let launch = Launch {
        grid: [blocks(m.d.div_ceil(FINISH_COLUMNS)), 1, 1],
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
    multiples_of_8(&[dx_stride, dy_stride, x_stride], "strides");
    let parts = Parts::of(partials, [1, rows, columns], 1);
    let part = |view, stride, what| vectors(view, strided(rows, stride, columns), 2, what);
    let args = parts
        .args()
        .ptr(part(dx, dx_stride, "the gradient of GELU's input"))
        .ptr(part(dy, dy_stride, "the gradient of GELU"))
        .ptr(part(x, x_stride, "GELU's input"))
        .i32(dx_stride)
        .i32(dy_stride)
        .i32(x_stride);
    parts.compute(s, t, "gelu_backward_sums", args, rows)?;
    parts.finish(s, t, F32, &[bias], columns)
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
