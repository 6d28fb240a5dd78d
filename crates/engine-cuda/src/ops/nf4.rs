//! NF4 on the device, bit for bit as [`quant::Nf4`]. Kernels: `nf4.cu`.
//!
//! A tensor of `n` weights is `n/2` bytes of codes and one f32 scale per 64 weights; doubly quantised scales are one
//! code each, an f32 scale per 256 of them and one f32 offset.

use crate::error::CudaError;
use crate::half_type::Half;
use crate::kernels::{Args, Launch, Module};
use crate::ops::extent::{blocks, elements, vectors};
use crate::stream::Stream;
use crate::view::View;

static NF4: Module = Module {
    name: "nf4",
    source: include_str!("../../kernels/nf4.cu"),
};

/// `NF4_THREADS` of the kernels.
const THREADS: usize = 256;

/// Weights that a block of threads quantises, eight a thread, and dequantises, four times eight.
const QUANTISED_BY_BLOCK: usize = 8 * THREADS;
const DEQUANTISED_BY_BLOCK: usize = 4 * QUANTISED_BY_BLOCK;

/// Doubly quantised scales that share a scale.
const SCALE_BLOCK_LEN: usize = quant::blockwise::BLOCK_LEN;

/// Blocks that sum the scales.
const NUM_SUMS: usize = 64;

/// Bytes of scratch that [`double_quantise`] needs.
pub const DOUBLE_SCRATCH: usize = 8 * NUM_SUMS;

/// The scales of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absmax {
    /// As they are.
    Plain {
        /// f32, one per 64 weights.
        absmax: View,
    },
    /// In 8 bits.
    Double {
        /// One byte per 64 weights.
        codes: View,
        /// f32, one per 256 codes.
        absmax: View,
        /// One f32.
        offset: View,
    },
}

impl Absmax {
    /// The arguments of a kernel that reads the scales of `n` weights.
    pub(super) fn add_to(self, args: Args, n: usize) -> Args {
        let num_blocks = n.div_ceil(quant::nf4::BLOCK_LEN);
        match self {
            Self::Plain { absmax } => args.ptr(elements(absmax, num_blocks, 4, "NF4 scales")),
            Self::Double {
                codes,
                absmax,
                offset,
            } => {
                let nested = num_blocks.div_ceil(SCALE_BLOCK_LEN);
                args.ptr(elements(codes, num_blocks, 1, "codes of scales"))
                    .ptr(elements(absmax, nested, 4, "scales of scales"))
                    .ptr(elements(offset, 1, 4, "the scales' offset"))
            }
        }
    }
}

/// What weights come as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// 32 bits.
    F32,
    /// 16 bits, whatever the network computes in.
    Half(Half),
}

fn launch_of(n: usize, by_block: usize) -> Launch {
    Launch {
        grid: [blocks(n.div_ceil(by_block)), 1, 1],
        block: [THREADS as u32, 1, 1],
        shared_bytes: 0,
    }
}

/// Quantises `n` weights. `not_finite` (one u32) grows by the number of those that are infinite or no numbers.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a view is too short or not aligned to 16 bytes.
pub fn quantise(
    s: &Stream,
    packed: View,
    absmax: View,
    not_finite: View,
    x: View,
    x_type: Source,
    n: usize,
) -> Result<(), CudaError> {
    if n == 0 {
        return Ok(());
    }
    // The f32 kernel is in both modules.
    let (kernel, define, width) = match x_type {
        Source::F32 => ("nf4_quantise_f32", Half::Bf16.define(), 4),
        Source::Half(half) => ("nf4_quantise", half.define(), 2),
    };
    let args = Args::new()
        .ptr(vectors(packed, n.div_ceil(2), 1, "NF4 codes"))
        .ptr(elements(
            absmax,
            n.div_ceil(quant::nf4::BLOCK_LEN),
            4,
            "NF4 scales",
        ))
        .ptr(elements(
            not_finite,
            1,
            4,
            "the count of what is not finite",
        ))
        .ptr(vectors(x, n, width, "weights"))
        .i64(n as i64);
    let launch = launch_of(n, QUANTISED_BY_BLOCK);
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { s.launch(&NF4, &[define], kernel, launch, args) }
}

/// Brings `num_blocks` f32 scales into 8 bits. `scratch` has [`DOUBLE_SCRATCH`] bytes.
///
/// # Errors
///
/// If a launch fails.
///
/// # Panics
///
/// If a view is too short.
pub fn double_quantise(
    s: &Stream,
    codes: View,
    absmax8: View,
    offset: View,
    absmax: View,
    scratch: View,
    num_blocks: usize,
) -> Result<(), CudaError> {
    if num_blocks == 0 {
        return Ok(());
    }
    let define = Half::Bf16.define(); // no 16-bit value is touched
    let absmax = elements(absmax, num_blocks, 4, "NF4 scales");
    let offset = elements(offset, 1, 4, "the scales' offset");
    let sums = elements(scratch, NUM_SUMS, 8, "sums of scales");
    let launch = launch_of(NUM_SUMS, 1);
    let args = Args::new().ptr(sums).ptr(absmax).i64(num_blocks as i64);
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { s.launch(&NF4, &[define], "nf4_sum_scales", launch, args)? };
    let one_thread = Launch {
        grid: [1; 3],
        block: [1; 3],
        shared_bytes: 0,
    };
    let args = Args::new()
        .ptr(offset)
        .ptr(sums)
        .i32(NUM_SUMS)
        .i64(num_blocks as i64);
    // SAFETY: as above.
    unsafe { s.launch(&NF4, &[define], "nf4_offset", one_thread, args)? };
    let nested = num_blocks.div_ceil(SCALE_BLOCK_LEN);
    let args = Args::new()
        .ptr(elements(codes, num_blocks, 1, "codes of scales"))
        .ptr(elements(absmax8, nested, 4, "scales of scales"))
        .ptr(absmax)
        .ptr(offset)
        .i64(num_blocks as i64);
    let launch = launch_of(num_blocks, SCALE_BLOCK_LEN);
    // SAFETY: as above.
    unsafe { s.launch(&NF4, &[define], "nf4_double_quantise", launch, args) }
}

/// The `n` weights that codes and scales stand for, rounded to T.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a view is too short or not aligned to 16 bytes.
pub fn dequantise(
    s: &Stream,
    t: Half,
    out: View,
    packed: View,
    absmax: Absmax,
    n: usize,
) -> Result<(), CudaError> {
    if n == 0 {
        return Ok(());
    }
    let args = Args::new().ptr(vectors(out, n, 2, "weights")).ptr(vectors(
        packed,
        n.div_ceil(2),
        1,
        "NF4 codes",
    ));
    let kernel = match absmax {
        Absmax::Plain { .. } => "nf4_dequantise",
        Absmax::Double { .. } => "nf4_dequantise_double",
    };
    let args = absmax.add_to(args, n).i64(n as i64);
    let launch = launch_of(n, DEQUANTISED_BY_BLOCK);
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { s.launch(&NF4, &[t.define()], kernel, launch, args) }
}

#[cfg(test)]
mod tests {
    use quant::Codebook;

    /// The numbers of a table in the kernels' shared header.
    fn table(name: &str) -> Vec<f32> {
        let header = include_str!("../../kernels/common.cuh");
        let start = header
            .find(&format!("{name}["))
            .expect("the header has the table");
        let (_, rest) = header[start..].split_once('{').expect("it has values");
        let (values, _) = rest.split_once('}').expect("they end");
        let numbers = values
            .split(',')
            .map(|value| value.trim().trim_end_matches('f'));
        numbers
            .map(|number| number.parse().expect("a number"))
            .collect()
    }

    #[test]
    fn the_kernels_tables_are_the_reference_forms() {
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        for (name, expected) in [
            ("SIGNED_MAP", Codebook::signed_dynamic().values()),
            ("UNSIGNED_MAP", Codebook::unsigned_dynamic().values()),
            ("NF4_VALUES", &quant::nf4::VALUES),
        ] {
            assert_eq!(bits(&table(name)), bits(expected), "{name}");
        }
    }
}
