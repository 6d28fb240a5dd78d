//! Softmax attention without a mask, forward and backward, for head widths 64 and 128.
//!
//! Two forms, chosen by the device: `attention_sm80.cu` (tensor cores one warp at a time, any GPU from Ampere on) and
//! `attention_sm90.cu` (Hopper's products of a warpgroup, tiles by the copy engine). Both give the same bits for the
//! same input every time, backward included: no sum depends on the order in which blocks finish. For that the backward
//! pass computes probabilities twice, once per block of keys and once per block of queries: 7 products instead of 5.
//!
//! Sources: Dao, FlashAttention-2 (2023); Shah et al., FlashAttention-3 (2024).

#![allow(clippy::too_many_arguments)] // a kernel's

use cudarc::driver::sys;

use crate::error::CudaError;
use crate::half_type::Half;
use crate::kernels::{Args, Launch, Module};
use crate::ops::extent::{blocks, multiples_of_8, vectors};
use crate::stream::{Stream, failed};
use crate::view::View;

static DELTA: Module = Module {
    name: "attention_delta",
    source: include_str!("../../kernels/attention_delta.cu"),
};
static SM80: Module = Module {
    name: "attention_sm80",
    source: include_str!("../../kernels/attention_sm80.cu"),
};
static SM90: Module = Module {
    name: "attention_sm90",
    source: include_str!("../../kernels/attention_sm90.cu"),
};

/// Rows of a block's own tile and of the tiles that it streams: what the kernels are written for.
const AMPERE_ROWS: usize = 64;
const HOPPER_ROWS: usize = 128;
const HOPPER_STREAM_ROWS: usize = 64;
const AMPERE_THREADS: u32 = 128;
const HOPPER_THREADS: u32 = 384;
const HOPPER_FORWARD_STAGES: usize = 2;
/// Statistics of queries are padded to this many.
const PAD: usize = 128;
/// What Hopper's blocks take besides tiles: alignment of the first, barriers.
const HOPPER_EXTRA_BYTES: usize = 1024 + 256;

/// A tensor `[b, n, h, dh]` of T anywhere in memory; the last axis has no gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strided {
    /// From its first element on.
    pub view: View,
    /// Elements from a token to the next, a multiple of 8.
    pub token: usize,
    /// Elements from a head to the next, a multiple of 8.
    pub head: usize,
    /// Elements from a sample to the next, a multiple of 8.
    pub batch: usize,
}

/// Sizes of an attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Samples.
    pub b: usize,
    /// Heads.
    pub h: usize,
    /// Tokens.
    pub n: usize,
    /// Head width.
    pub dh: usize,
    /// What scores are multiplied by before the softmax.
    pub scale: f32,
}

/// Which kernels compute it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `attention_sm80.cu`: any GPU from compute capability 8.0 on.
    Ampere,
    /// `attention_sm90.cu`: compute capability 9.0 alone.
    Hopper,
}

impl Form {
    /// The faster one that the device has.
    pub fn of(s: &Stream) -> Self {
        if s.compute_capability() == (9, 0) {
            Self::Hopper
        } else {
            Self::Ampere
        }
    }
}

/// Whether there are kernels for this head width.
pub fn supports(dh: usize) -> bool {
    matches!(dh, 64 | 128)
}

/// Bytes of `scratch` for [`backward`]: two numbers for each query, padded.
pub fn backward_scratch_bytes(shape: &AttentionShape) -> usize {
    2 * 4 * shape.b * shape.h * shape.n.next_multiple_of(PAD)
}

impl AttentionShape {
    fn check(&self) {
        assert!(supports(self.dh), "head width {} is not 64 or 128", self.dh);
        assert!(
            self.b > 0 && self.h > 0 && self.n > 0,
            "an attention of {} samples, {} heads, {} tokens",
            self.b,
            self.h,
            self.n
        );
    }

    fn sums(&self, lse: View) -> View {
        lse.holds(4 * self.b * self.h * self.n, "sums of attention")
    }

    fn defines(&self, t: Half) -> [&'static str; 2] {
        let width = match self.dh {
            64 => "-DHEAD_DIM=64",
            _ => "-DHEAD_DIM=128",
        };
        [t.define(), width]
    }

    fn tile_bytes(&self, rows: usize) -> usize {
        2 * rows * self.dh
    }

    /// A block for each `rows` tokens of each head.
    fn grid(&self, rows: usize) -> [u32; 3] {
        [self.n.div_ceil(rows), self.h, self.b].map(blocks)
    }

    fn padded(&self) -> usize {
        self.n.next_multiple_of(PAD)
    }
}

impl Strided {
    /// Its memory, after a comparison with the furthest element that the shape reaches.
    fn checked(&self, shape: &AttentionShape, what: &str) -> View {
        multiples_of_8(&[self.token, self.head, self.batch], what);
        let last =
            (shape.b - 1) * self.batch + (shape.h - 1) * self.head + (shape.n - 1) * self.token;
        vectors(self.view, last + shape.dh, 2, what)
    }

    fn strides(&self, args: Args) -> Args {
        [self.token, self.head, self.batch]
            .into_iter()
            .fold(args, |args, stride| {
                args.i64(i64::try_from(stride).expect("strides are below 2^63"))
            })
    }

    /// Pointer and strides, as the kernels take them.
    fn push(&self, args: Args, shape: &AttentionShape, what: &str) -> Args {
        self.strides(args.ptr(self.checked(shape, what)))
    }

    /// A tensor map with axes (d, token, head, batch) and boxes of 64 values × `rows` tokens of one head, in the
    /// 128-byte swizzle; tokens past the last read as zero.
    fn push_map(
        &self,
        s: &Stream,
        t: Half,
        args: Args,
        shape: &AttentionShape,
        rows: usize,
        what: &str,
    ) -> Result<Args, CudaError> {
        let view = self.checked(shape, what);
        if s.is_dry() {
            return Ok(args.blob(&[0; 128]));
        }
        let data_type = match t {
            Half::Bf16 => sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            Half::F16 => sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        };
        let dims = [shape.dh, shape.n, shape.h, shape.b].map(|size| size as u64);
        // In bytes, from the second axis on. An axis of one element may come with any stride, zero included, and the
        // driver wants 16 bytes at least.
        let strides = [self.token, self.head, self.batch].map(|stride| (2 * stride as u64).max(16));
        let (box_dims, steps) = ([64, rows as u32, 1, 1], [1u32; 4]);
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: all pointers are to local arrays of the rank's length; the view was compared with what the map
        // reaches, and the driver does not read it here.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                data_type,
                4,
                view.address() as *mut std::ffi::c_void,
                dims.as_ptr(),
                strides.as_ptr(),
                box_dims.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(failed("cuTensorMapEncodeTiled"))?;
        let mut bytes = [0; 128];
        bytes.copy_from_slice(bytemuck::cast_slice(&map.opaque));
        Ok(args.blob(&bytes))
    }
}

/// `o = softmax(scale·q·kᵀ)·v`, and `lse`: the logarithm of each softmax's sum, f32 `[b, h, n]`.
///
/// # Errors
///
/// If a kernel cannot be compiled or launched.
///
/// # Panics
///
/// If the head width is not 64 or 128, a size is 0, a view is too short, or strides and addresses are not multiples of
/// 8 elements.
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
    forward_as(Form::of(s), s, t, o, lse, q, k, v, shape)
}

/// As [`forward`], with kernels of the caller's choice.
///
/// # Errors
///
/// As [`forward`], and if the device does not have what the form needs.
///
/// # Panics
///
/// As [`forward`].
pub fn forward_as(
    form: Form,
    s: &Stream,
    t: Half,
    o: Strided,
    lse: View,
    q: Strided,
    k: Strided,
    v: Strided,
    shape: AttentionShape,
) -> Result<(), CudaError> {
    shape.check();
    let args = o
        .push(Args::new(), &shape, "attention's output")
        .ptr(shape.sums(lse));
    let (module, launch, args) = match form {
        Form::Ampere => {
            let args = q.push(args, &shape, "queries");
            let args = k.push(args, &shape, "keys");
            let args = v.push(args, &shape, "values");
            let launch = Launch {
                grid: shape.grid(AMPERE_ROWS),
                block: [AMPERE_THREADS, 1, 1],
                shared_bytes: 5 * shape.tile_bytes(AMPERE_ROWS) as u32,
            };
            (&SM80, launch, args)
        }
        Form::Hopper => {
            let args = q.push_map(s, t, args, &shape, HOPPER_ROWS, "queries")?;
            let args = k.push_map(s, t, args, &shape, HOPPER_ROWS, "keys")?;
            let args = v.push_map(s, t, args, &shape, HOPPER_ROWS, "values")?;
            let tiles = 1 + 2 * HOPPER_FORWARD_STAGES;
            let launch = Launch {
                grid: shape.grid(HOPPER_ROWS),
                block: [HOPPER_THREADS, 1, 1],
                shared_bytes: (tiles * shape.tile_bytes(HOPPER_ROWS) + HOPPER_EXTRA_BYTES) as u32,
            };
            (&SM90, launch, args)
        }
    };
    let args = args.i32(shape.n).f32(shape.scale);
    // SAFETY: every view was compared with the furthest element that its strides reach.
    unsafe { s.launch(module, &shape.defines(t), "attention_forward", launch, args) }
}

/// Gradients of queries, keys and values from that of the output. `o` and `lse` are what [`forward`] wrote. No output
/// may overlap an input: both are in use at the same time.
///
/// # Errors
///
/// If a kernel cannot be compiled or launched.
///
/// # Panics
///
/// As [`forward`], and if `scratch` has fewer bytes than [`backward_scratch_bytes`] or is not aligned to 16.
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
    let form = Form::of(s);
    backward_as(form, s, t, dq, dk, dv, d_o, o, lse, q, k, v, scratch, shape)
}

/// As [`backward`], with kernels of the caller's choice.
///
/// # Errors
///
/// As [`backward`], and if the device does not have what the form needs.
///
/// # Panics
///
/// As [`backward`].
pub fn backward_as(
    form: Form,
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
    shape.check();
    let scratch = vectors(
        scratch,
        backward_scratch_bytes(&shape),
        1,
        "scratch of attention",
    );
    let defines = shape.defines(t);
    let sizes = |args: Args| args.i32(shape.n).i32(shape.padded());

    let args = d_o.push(Args::new().ptr(scratch), &shape, "the output's gradient");
    let args = sizes(
        o.push(args, &shape, "attention's output")
            .ptr(shape.sums(lse)),
    );
    let launch = Launch {
        grid: [shape.padded() * shape.dh / (8 * 128), shape.h, shape.b].map(blocks), // 8 values a thread, 128 threads
        block: [128, 1, 1],
        shared_bytes: 0,
    };
    // SAFETY: every view was compared with the furthest element that its strides reach, here and below.
    unsafe { s.launch(&DELTA, &defines, "attention_delta", launch, args)? };

    let keys = |args| {
        dv.push(
            dk.push(args, &shape, "gradients of keys"),
            &shape,
            "gradients of values",
        )
    };
    let queries = |args| dq.push(args, &shape, "gradients of queries");
    match form {
        Form::Ampere => {
            let inputs = |args| {
                let args = d_o.push(args, &shape, "the output's gradient");
                let args = q.push(args, &shape, "queries");
                let args = k.push(args, &shape, "keys");
                let args = v.push(args, &shape, "values").ptr(scratch);
                sizes(args).f32(shape.scale)
            };
            let statistics = 2 * 2 * 4 * AMPERE_ROWS; // two numbers for each query of two tiles
            let launch = Launch {
                grid: shape.grid(AMPERE_ROWS),
                block: [AMPERE_THREADS, 1, 1],
                shared_bytes: (6 * shape.tile_bytes(AMPERE_ROWS) + statistics) as u32,
            };
            for (kernel, args) in [
                ("attention_backward_keys", inputs(keys(Args::new()))),
                ("attention_backward_queries", inputs(queries(Args::new()))),
            ] {
                // SAFETY: as above.
                unsafe { s.launch(&SM80, &defines, kernel, launch, args)? };
            }
            Ok(())
        }
        Form::Hopper => {
            let mut args = keys(queries(Args::new()));
            for (x, what) in [
                (q, "queries"),
                (k, "keys"),
                (v, "values"),
                (d_o, "the output's gradient"),
            ] {
                args = x.push_map(s, t, args, &shape, HOPPER_STREAM_ROWS, what)?;
            }
            let args = sizes(args.ptr(scratch).i32(shape.b).i32(shape.h)).f32(shape.scale);
            let own = 2 * shape.tile_bytes(HOPPER_ROWS);
            let statistics = 2 * 4 * HOPPER_STREAM_ROWS;
            let stage = 2 * shape.tile_bytes(HOPPER_STREAM_ROWS) + statistics;
            let stages = if shape.dh == 64 { 6 } else { 4 };
            let launch = Launch {
                // As many blocks for keys as for queries.
                grid: [
                    blocks(2 * shape.n.div_ceil(HOPPER_ROWS) * shape.h * shape.b),
                    1,
                    1,
                ],
                block: [HOPPER_THREADS, 1, 1],
                shared_bytes: (own + stages * stage + HOPPER_EXTRA_BYTES) as u32,
            };
            // SAFETY: as above.
            unsafe { s.launch(&SM90, &defines, "attention_backward", launch, args) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: AttentionShape = AttentionShape {
        b: 2,
        h: 3,
        n: 129,
        dh: 64,
        scale: 0.125,
    };

    /// `[b, n, 3, h, dh]`: queries, keys and values of one product.
    fn fused(s: &Stream, part: usize) -> (crate::Buffer, Strided) {
        let token = 3 * SHAPE.h * SHAPE.dh;
        let buffer = s
            .allocate(2 * SHAPE.b * SHAPE.n * token, "a test")
            .expect("a dry stream has room");
        let strided = Strided {
            view: buffer.view().elements_from(part * SHAPE.h * SHAPE.dh),
            token,
            head: SHAPE.dh,
            batch: SHAPE.n * token,
        };
        (buffer, strided)
    }

    #[test]
    fn the_last_slice_of_a_fused_tensor_ends_where_its_memory_ends() {
        let s = Stream::dry();
        let (buffer, last) = fused(&s, 2);
        let reached = last.checked(&SHAPE, "x");
        assert_eq!(
            reached.address() + reached.bytes() as u64,
            buffer.view().address() + buffer.view().bytes() as u64
        );
    }

    #[test]
    fn both_forms_check_and_launch_everything_in_a_dry_run() {
        let s = Stream::dry();
        let parts: Vec<_> = (0..3).map(|part| fused(&s, part)).collect();
        let [q, k, v] = [0, 1, 2].map(|part| parts[part].1);
        let lse = s
            .allocate(4 * SHAPE.b * SHAPE.h * SHAPE.n, "a test")
            .expect("room");
        let scratch = s
            .allocate(backward_scratch_bytes(&SHAPE), "a test")
            .expect("room");
        for (form, launches) in [(Form::Ampere, 4), (Form::Hopper, 3)] {
            s.start_counting();
            forward_as(form, &s, Half::Bf16, q, lse.view(), q, k, v, SHAPE).expect("a dry run");
            backward_as(
                form,
                &s,
                Half::Bf16,
                q,
                k,
                v,
                q,
                q,
                lse.view(),
                q,
                k,
                v,
                scratch.view(),
                SHAPE,
            )
            .expect("a dry run");
            let total: u64 = s.tallies().iter().map(|tally| tally.launches).sum();
            assert_eq!(total, launches, "{form:?}");
        }
    }

    #[test]
    #[should_panic(expected = "queries needs")]
    fn a_tensor_that_ends_too_early_panics() {
        let s = Stream::dry();
        let (_buffer, mut q) = fused(&s, 0);
        q.view = q.view.take(q.view.bytes() / 2);
        q.checked(&SHAPE, "queries");
    }
}
