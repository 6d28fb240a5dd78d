//! Attention for head widths that the fast kernels are not written for: correct and slow.

use crate::error::CudaError;
use crate::half_type::Half;
use crate::kernels::{Args, Launch, Module};
use crate::ops::attention::{AttentionShape, Strided};
use crate::stream::Stream;
use crate::view::View;

static ATTENTION_ANY: Module = Module {
    name: "attention_any",
    source: include_str!("../../kernels/attention_any.cu"),
};

/// Most tokens that a row of scores in shared memory holds.
pub const MOST_TOKENS: usize = 12_000;

const THREADS: u32 = 128;

fn launch(shape: &AttentionShape, rows_in_shared: usize) -> Launch {
    assert!(
        shape.n <= MOST_TOKENS && shape.dh <= 256,
        "{} tokens, head width {}",
        shape.n,
        shape.dh
    );
    Launch {
        grid: [shape.n as u32, shape.h as u32, shape.b as u32],
        block: [THREADS, 1, 1],
        shared_bytes: (4 * shape.n * rows_in_shared) as u32,
    }
}

fn held(x: Strided, shape: &AttentionShape, what: &str) -> View {
    let last = (shape.b - 1) * x.batch + (shape.h - 1) * x.head + (shape.n - 1) * x.token;
    x.view.holds(2 * (last + shape.dh), what)
}

fn strides(args: Args, all: &[Strided]) -> Args {
    all.iter().fold(args, |args, x| {
        args.i32(x.token).i32(x.head).i64(x.batch as i64)
    })
}

/// Bytes of `scratch` for [`backward`].
pub fn backward_scratch_bytes(shape: &AttentionShape) -> usize {
    4 * shape.b * shape.h * shape.n
}

/// `softmax(scale·QKᵀ)·V` and the logarithms of the sums, `f32 [b, h, n]`.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a view is too short.
#[allow(clippy::too_many_arguments)] // the kernel's
pub fn forward(
    s: &Stream,
    t: Half,
    o: Strided,
    lse: View,
    q: Strided,
    k: Strided,
    v: Strided,
    shape: AttentionShape,
) -> Result<(), CudaError> {
    lse.holds(4 * shape.b * shape.h * shape.n, "sums of attention");
    let args = Args::new()
        .ptr(held(o, &shape, "attention's output"))
        .ptr(lse)
        .ptr(held(q, &shape, "queries"))
        .ptr(held(k, &shape, "keys"))
        .ptr(held(v, &shape, "values"));
    let args = strides(args, &[o, q, k, v])
        .i32(shape.n)
        .i32(shape.dh)
        .f32(shape.scale);
    let launch = launch(&shape, 1);
    // SAFETY: every view was compared with the furthest element that its strides reach.
    unsafe {
        s.launch(
            &ATTENTION_ANY,
            &[t.define()],
            "attention_any_forward",
            launch,
            args,
        )
    }
}

/// Gradients of queries, keys and values.
///
/// # Errors
///
/// If a launch fails.
///
/// # Panics
///
/// If a view is too short.
#[allow(clippy::too_many_arguments)] // the kernel's
pub fn backward(
    s: &Stream,
    t: Half,
    dq: Strided,
    dk: Strided,
    dv: Strided,
    d_o: Strided,
    o: Strided,
    lse: View,
    q: Strided,
    k: Strided,
    v: Strided,
    scratch: View,
    shape: AttentionShape,
) -> Result<(), CudaError> {
    lse.holds(4 * shape.b * shape.h * shape.n, "sums of attention");
    let delta = scratch.holds(backward_scratch_bytes(&shape), "scratch of attention");
    let ptr = |args: Args, x, what| args.ptr(held(x, &shape, what));
    let args = ptr(Args::new(), dq, "gradients of queries").ptr(delta);
    let args = ptr(args, d_o, "the output's gradient");
    let args = ptr(args, o, "attention's output").ptr(lse);
    let args = ptr(args, q, "queries");
    let args = ptr(args, k, "keys");
    let args = ptr(args, v, "values");
    let args = strides(args, &[dq, d_o, o, q, k, v])
        .i32(shape.n)
        .i32(shape.dh)
        .f32(shape.scale);
    let defines = [t.define()];
    // SAFETY: every view was compared with the furthest element that its strides reach.
    unsafe {
        s.launch(
            &ATTENTION_ANY,
            &defines,
            "attention_any_backward_q",
            launch(&shape, 1),
            args,
        )?;
    }
    let args = ptr(Args::new(), dk, "gradients of keys");
    let args = ptr(args, dv, "gradients of values").ptr(delta);
    let args = ptr(args, d_o, "the output's gradient").ptr(lse);
    let args = ptr(args, q, "queries");
    let args = ptr(args, k, "keys");
    let args = ptr(args, v, "values");
    let args = strides(args, &[dk, dv, d_o, q, k, v])
        .i32(shape.n)
        .i32(shape.dh)
        .f32(shape.scale);
    // SAFETY: as above.
    unsafe {
        s.launch(
            &ATTENTION_ANY,
            &defines,
            "attention_any_backward_kv",
            launch(&shape, 2),
            args,
        )
    }
}
