//! From the fused product of queries, keys and values to what attention reads, and back. Kernels: `qk_norm_rope.cu`.
//!
//! Every query and key head is normalised (RMSNorm with a weight of one head's width) and turned by its position's
//! angles, pairs being neighbouring channels; values are copied. Two streams are joined on the way: each writes its
//! tokens at its own offset.
//!
//! Source: `FluxAttnProcessor`, `apply_rotary_emb`, diffusers 0.42.

#![allow(clippy::too_many_arguments)] // a kernel's

use crate::error::CudaError;
use crate::half_type::Half;
use crate::kernels::{Args, Launch, Module};
use crate::ops::extent::{blocks, elements, strided, vectors};
use crate::ops::sums;
use crate::stream::Stream;
use crate::view::View;

static ROPE: Module = Module {
    name: "qk_norm_rope",
    source: include_str!("../../kernels/qk_norm_rope.cu"),
};

/// `ROPE_THREADS` of the kernels.
const THREADS: u32 = 128;

/// Warps of such a block, and `ROWS_THREADS` and `ROWS_WARPS` of the kernels that give each row's heads a warp.
const WARPS: usize = 4;
const ROWS_THREADS: u32 = 256;
const ROWS_WARPS: usize = 8;

/// `SUM_THREADS` of the kernels that sum up the weights' gradients, and the most blocks of them: four for each of 132
/// multiprocessors.
const SUM_THREADS: u32 = 256;
const SUM_BLOCKS: usize = 528;

/// The widest head: `PAIRS` of the kernels is 4, for each of 32 lanes.
const MAX_HEAD_WIDTH: usize = 256;

/// Sizes of one stream's tokens and of the sequence that they join.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// Samples.
    pub b: usize,
    /// Tokens per sample of this stream.
    pub n: usize,
    /// Tokens per sample of the joined sequence.
    pub n_total: usize,
    /// Where this stream's tokens begin in the joined sequence.
    pub token_offset: usize,
    /// Heads.
    pub h: usize,
    /// Width of a head, even and at most 256.
    pub dh: usize,
    /// Elements from one row of `qkv_in` (and of its gradient) to the next.
    pub in_stride: usize,
    /// Elements from one row of the outputs (and of their gradients) to the next.
    pub out_stride: usize,
}

impl HeadShape {
    fn check(&self) {
        let Self {
            n,
            n_total,
            token_offset,
            dh,
            ..
        } = *self;
        assert!(
            token_offset + n <= n_total,
            "{n} tokens from {token_offset} do not fit {n_total}"
        );
        assert!(
            dh.is_multiple_of(2) && dh <= MAX_HEAD_WIDTH,
            "a head of {dh} channels; even widths up to {MAX_HEAD_WIDTH} are possible"
        );
        assert!(
            self.in_stride.is_multiple_of(2) && self.out_stride.is_multiple_of(2),
            "odd strides {} and {}",
            self.in_stride,
            self.out_stride
        );
    }

    /// Whether rows suit the kernels that move 16 bytes at a time.
    fn is_fast(&self, views: &[View]) -> bool {
        matches!(self.dh, 64 | 128)
            && self.in_stride.is_multiple_of(8)
            && self.out_stride.is_multiple_of(8)
            && views.iter().all(|view| view.address() % 16 == 0)
    }

    fn width(&self) -> usize {
        self.h * self.dh
    }

    /// Groups of heads that a warp takes at eight channels a lane.
    fn groups(&self) -> usize {
        self.width().div_ceil(256)
    }

    /// The fused rows; `view` begins with the first one's queries.
    fn fused(&self, view: View, what: &str) -> View {
        let reach = strided(self.b * self.n, self.in_stride, 3 * self.width());
        elements(view, reach, 2, what)
    }

    fn joined(&self, view: View, what: &str) -> View {
        let reach = strided(self.b * self.n_total, self.out_stride, self.width());
        elements(view, reach, 2, what)
    }

    fn weight(&self, view: View) -> View {
        elements(view, self.dh, 2, "a norm's weight")
    }

    fn table(&self, view: View) -> View {
        vectors(view, self.n_total * self.dh, 4, "angles")
    }

    fn launch(
        &self,
        s: &Stream,
        t: Half,
        kernel: &str,
        fast: bool,
        args: Args,
        eps: f32,
    ) -> Result<(), CudaError> {
        if self.b * self.n == 0 {
            return Ok(());
        }
        let args = args
            .i32(self.n)
            .i32(self.n_total)
            .i32(self.token_offset)
            .i32(self.h);
        let (kernel, args) = match fast {
            true => (format!("{kernel}_{}", self.dh), args),
            false => (format!("{kernel}_any"), args.i32(self.dh)),
        };
        let args = args.i32(self.in_stride).i32(self.out_stride).f32(eps);
        let launch = Launch {
            grid: [blocks(self.b * self.n), 1, 1],
            block: [THREADS, 1, 1],
            shared_bytes: 0,
        };
        // SAFETY: both callers give the kernel its arguments, all of which went through this type's checks.
        unsafe { s.launch(&ROPE, &[t.define()], &kernel, launch, args) }
    }
}

/// `qkv_in` `[b·n, in_stride]`, queries at 0, keys at `h·dh`, values behind them → rows `token_offset..` of `q_out`,
/// `k_out`, `v_out`, each `[b, n_total, out_stride]`.
///
/// `wq`, `wk` are T `[dh]`; `cos`, `sin` f32 `[n_total, dh]`, every value twice. Outputs may lie in `qkv_in` if rows
/// and strides are the same.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a view is too short or a size is not one that [`HeadShape`] allows.
pub fn qk_norm_rope(
    s: &Stream,
    t: Half,
    q_out: View,
    k_out: View,
    v_out: View,
    qkv_in: View,
    wq: View,
    wk: View,
    cos: View,
    sin: View,
    shape: HeadShape,
    eps: f32,
) -> Result<(), CudaError> {
    shape.check();
    let fast = shape.is_fast(&[q_out, k_out, v_out, qkv_in, wq, wk]);
    let args = Args::new()
        .ptr(shape.joined(q_out, "queries"))
        .ptr(shape.joined(k_out, "keys"))
        .ptr(shape.joined(v_out, "values"))
        .ptr(shape.fused(qkv_in, "queries, keys and values"))
        .ptr(shape.weight(wq))
        .ptr(shape.weight(wk))
        .ptr(shape.table(cos))
        .ptr(shape.table(sin));
    let groups = shape.groups();
    let rows = shape.b * shape.n;
    if !fast || groups >= WARPS || rows == 0 {
        return shape.launch(s, t, "qk_norm_rope", fast, args, eps);
    }
    // A block to a row would leave warps idle.
    let args = args
        .i32(rows)
        .i32(shape.n)
        .i32(shape.n_total)
        .i32(shape.token_offset)
        .i32(shape.h)
        .i32(shape.in_stride)
        .i32(shape.out_stride)
        .f32(eps);
    let launch = Launch {
        grid: [blocks((rows * groups).div_ceil(ROWS_WARPS)), 1, 1],
        block: [ROWS_THREADS, 1, 1],
        shared_bytes: 0,
    };
    let kernel = format!("qk_norm_rope_rows_{}", shape.dh);
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { s.launch(&ROPE, &[t.define()], &kernel, launch, args) }
}

/// The gradient of [`qk_norm_rope`] with respect to `qkv_in`: columns `0..3·h·dh` of each row of `dqkv`, whose stride
/// is `in_stride`.
///
/// `dq`, `dk`, `dv` lie as the outputs did; `qkv_in` is what the forward pass saw.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// As [`qk_norm_rope`].
pub fn qk_norm_rope_backward(
    s: &Stream,
    t: Half,
    dqkv: View,
    dq: View,
    dk: View,
    dv: View,
    qkv_in: View,
    wq: View,
    wk: View,
    cos: View,
    sin: View,
    shape: HeadShape,
    eps: f32,
) -> Result<(), CudaError> {
    shape.check();
    let fast = shape.is_fast(&[dqkv, dq, dk, dv, qkv_in, wq, wk]);
    let args = Args::new()
        .ptr(shape.fused(dqkv, "gradients of queries, keys and values"))
        .ptr(shape.joined(dq, "gradients of queries"))
        .ptr(shape.joined(dk, "gradients of keys"))
        .ptr(shape.joined(dv, "gradients of values"))
        .ptr(shape.fused(qkv_in, "queries, keys and values"))
        .ptr(shape.weight(wq))
        .ptr(shape.weight(wk))
        .ptr(shape.table(cos))
        .ptr(shape.table(sin));
    shape.launch(s, t, "qk_norm_rope_backward", fast, args, eps)
}

/// Numbers of scratch (f32) for [`qk_norm_rope_backward_sums`].
pub fn sums_len(shape: &HeadShape) -> usize {
    let (rows, columns) = (shape.b * shape.n, 3 * shape.width());
    let fast = sum_parts(shape) * columns;
    weight_sums_len(shape) + fast.max(sums::partials_len(1, rows, columns, 1))
}

/// Those of the weights' sums, which come first: a multiple of 64.
fn weight_sums_len(shape: &HeadShape) -> usize {
    (2 * shape.dh * sum_blocks(shape).max(sum_parts(shape) * shape.groups())).next_multiple_of(64)
}

/// Blocks of the form for any width; each of a block's eight warps has at least four heads' rows.
fn sum_blocks(shape: &HeadShape) -> usize {
    (shape.b * shape.n * shape.h)
        .div_ceil(32)
        .clamp(1, SUM_BLOCKS)
}

/// Parts of rows in the other forms; each of a block's eight warps has at least four rows.
fn sum_parts(shape: &HeadShape) -> usize {
    let most = (SUM_BLOCKS / shape.groups().max(1)).max(1);
    (shape.b * shape.n).div_ceil(32).clamp(1, most)
}

/// [`qk_norm_rope_backward`]; and the gradients of both norms' weights, `dwq`, `dwk`, f32 `[dh]`, and of the bias that
/// is part of `qkv_in`, f32 `[3·h·dh]`. They are overwritten.
///
/// `partials` are [`sums_len`] f32 of scratch. The order of summation depends on the sizes alone.
///
/// # Errors
///
/// If a launch fails.
///
/// # Panics
///
/// As [`qk_norm_rope`]; the form for any width asks that rows are multiples of 8.
pub fn qk_norm_rope_backward_sums(
    s: &Stream,
    t: Half,
    dqkv: View,
    [dwq, dwk]: [View; 2],
    bias: View,
    [dq, dk, dv]: [View; 3],
    qkv_in: View,
    [wq, wk]: [View; 2],
    cos: View,
    sin: View,
    partials: View,
    shape: HeadShape,
    eps: f32,
) -> Result<(), CudaError> {
    shape.check();
    let fast = shape.is_fast(&[dqkv, dq, dk, dv, qkv_in, wq, wk]);
    let partials = vectors(partials, sums_len(&shape), 4, "partial sums");
    let bias_partials = partials.skip(4 * weight_sums_len(&shape));
    let (rows, columns) = (shape.b * shape.n, 3 * shape.width());
    let args = Args::new()
        .ptr(shape.fused(dqkv, "gradients of queries, keys and values"))
        .ptr(partials);
    let args = if fast { args.ptr(bias_partials) } else { args };
    let args = args
        .ptr(shape.joined(dq, "gradients of queries"))
        .ptr(shape.joined(dk, "gradients of keys"))
        .ptr(shape.joined(dv, "gradients of values"))
        .ptr(shape.fused(qkv_in, "queries, keys and values"))
        .ptr(shape.weight(wq))
        .ptr(shape.weight(wk))
        .ptr(shape.table(cos))
        .ptr(shape.table(sin))
        .i32(rows)
        .i32(shape.n)
        .i32(shape.n_total)
        .i32(shape.token_offset)
        .i32(shape.h);
    let (kernel, args, grid) = match fast {
        true => (
            format!("qk_norm_rope_backward_sums_{}", shape.dh),
            args,
            [sum_parts(&shape), shape.groups()],
        ),
        false => (
            "qk_norm_rope_backward_sums_any".to_owned(),
            args.i32(shape.dh),
            [sum_blocks(&shape), 1],
        ),
    };
    let args = args.i32(shape.in_stride).i32(shape.out_stride).f32(eps);
    let launch = Launch {
        grid: [blocks(grid[0]), blocks(grid[1]), 1],
        block: [SUM_THREADS, 1, 1],
        shared_bytes: 0,
    };
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { s.launch(&ROPE, &[t.define()], &kernel, launch, args)? };
    let parts = grid[0] * grid[1];
    sums::finish(s, t, &[dwq, dwk], partials, parts, shape.dh)?;
    match fast {
        true => sums::finish(s, t, &[bias], bias_partials, grid[0], columns),
        false => {
            let stride = shape.in_stride;
            sums::columns(s, t, bias, dqkv, stride, rows, columns, bias_partials)
        }
    }
}
