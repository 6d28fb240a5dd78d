//! The optimiser over one flat f32 buffer of many tensors, bit for bit as [`quant::Optimizer`]. Kernels: `optimizer.cu`.
//!
//! Nothing is read back within a step: the gradients' norm decides on the device whether the step happens (`flag`), how
//! it is clipped (`factor`), and the step's numbers are computed there from a counter and a learning rate in device
//! memory, so that one CUDA graph serves every step. In order:
//!
//! [`sum_squares`] → [`clip_factor`] → [`step_numbers`] → [`adamw_8bit`] and [`adamw_f32`]
//!
//! A [`TensorTable`] says where tensors lie. Moments of 8 bits lie at the parameters' own offsets, moments of f32
//! tensor after tensor in a buffer of their own.

#![allow(clippy::too_many_arguments)] // a kernel's

use quant::{AdamWConfig, OptimizerKind};

use crate::error::CudaError;
use crate::half_type::Half;
use crate::kernels::{Args, Launch, Module};
use crate::ops::extent::{blocks, elements, vectors};
use crate::stream::Stream;
use crate::view::View;

static OPTIMIZER: Module = Module {
    name: "optimizer",
    source: include_str!("../../kernels/optimizer.cu"),
};

/// `STEP_THREADS` of the kernels: eight warps, each with a block of elements at a time.
const THREADS: u32 = 256;
const WARPS: usize = THREADS as usize / 32;

/// Elements that share a scale.
const BLOCK_LEN: usize = quant::blockwise::BLOCK_LEN;

/// Blocks of threads per multiprocessor: what its registers hold, and few enough that making the maps is cheap.
const BLOCKS_PER_MULTIPROCESSOR: usize = 3;

/// Elements (f64) of scratch that [`sum_squares`] needs.
pub const SQUARES_PARTIALS: usize = 264;

/// Bytes of the numbers of a step.
pub const STEP_NUMBERS_BYTES: usize = 10 * 4;

/// A block of at most 256 elements of one tensor, as the kernels read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::NoUninit)]
#[repr(C)]
pub struct Block {
    start: u32,
    len: u32,
    state: u32,
    scale: u32,
}

/// Where the tensors of the flat buffer lie, block by block, apart by how their moments are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorTable {
    kind: OptimizerKind,
    tensors: Vec<TensorPlace>,
    eight_bit: Vec<Block>,
    full: Vec<Block>,
    len: usize,
    full_len: usize,
}

/// Where one tensor's moments lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TensorPlace {
    /// In f32: elements of the f32 moments' buffers.
    Full {
        /// First element and the one behind the last.
        moments: std::ops::Range<usize>,
    },
    /// In 8 bits: elements of the codes' buffers, and of the scales'.
    EightBit {
        /// First code and the one behind the last.
        codes: std::ops::Range<usize>,
        /// First scale and the one behind the last.
        scales: std::ops::Range<usize>,
    },
}

impl TensorTable {
    /// A table of tensors at `(offset, length)` of the flat buffer.
    ///
    /// # Panics
    ///
    /// If the buffer has 2³² elements or more.
    pub fn new(kind: OptimizerKind, tensors: &[(usize, usize)]) -> Self {
        let mut table = Self {
            kind,
            tensors: Vec::with_capacity(tensors.len()),
            eight_bit: Vec::new(),
            full: Vec::new(),
            len: 0,
            full_len: 0,
        };
        let index = |n: usize| u32::try_from(n).expect("fewer than 2^32 elements are trained");
        for &(offset, len) in tensors {
            table.len = table.len.max(offset + len);
            let in_8_bits =
                matches!(kind, OptimizerKind::AdamW8bit { min_8bit_size } if len >= min_8bit_size);
            let first_scale = table.eight_bit.len();
            for start in (0..len).step_by(BLOCK_LEN) {
                let block = |state, scale| Block {
                    start: index(offset + start),
                    len: index(BLOCK_LEN.min(len - start)),
                    state: index(state),
                    scale: index(scale),
                };
                if in_8_bits {
                    let scale = table.eight_bit.len();
                    table.eight_bit.push(block(offset + start, scale));
                } else {
                    table.full.push(block(table.full_len + start, 0));
                }
            }
            table.tensors.push(if in_8_bits {
                TensorPlace::EightBit {
                    codes: offset..offset + len,
                    scales: first_scale..table.eight_bit.len(),
                }
            } else {
                let first = table.full_len;
                table.full_len += len;
                TensorPlace::Full {
                    moments: first..table.full_len,
                }
            });
        }
        index(table.len);
        table
    }

    /// Where the moments of each tensor lie, in the order given.
    pub fn places(&self) -> &[TensorPlace] {
        &self.tensors
    }

    /// Elements of the flat buffer up to the end of the last tensor; each of the two code buffers has as many bytes.
    pub fn num_elements(&self) -> usize {
        self.len
    }

    /// Scales (f32) of each of the two buffers of codes; none if no tensor has 8-bit moments.
    pub fn num_scales(&self) -> usize {
        self.eight_bit.len()
    }

    /// Elements (f32) of each of the two buffers of f32 moments.
    pub fn num_full_moments(&self) -> usize {
        self.full_len
    }

    /// Bytes of the table on the device.
    pub fn device_bytes(&self) -> usize {
        (self.eight_bit.len() + self.full.len()) * size_of::<Block>()
    }

    /// Puts the table into `view`, from which [`adamw_8bit`] and [`adamw_f32`] read it.
    ///
    /// # Errors
    ///
    /// If the copy fails.
    ///
    /// # Panics
    ///
    /// If `view` is shorter than [`Self::device_bytes`].
    pub fn upload(&self, s: &Stream, view: View) -> Result<(), CudaError> {
        let all: Vec<Block> = self.eight_bit.iter().chain(&self.full).copied().collect();
        s.upload(view.take(self.device_bytes()), &all)
    }

    fn eight_bit_blocks(&self, table: View) -> View {
        elements(table, self.eight_bit.len(), size_of::<Block>(), "the table")
    }

    fn full_blocks(&self, table: View) -> View {
        let before = self.eight_bit.len() * size_of::<Block>();
        elements(
            table.skip(before),
            self.full.len(),
            size_of::<Block>(),
            "the table",
        )
    }
}

fn grid(s: &Stream, num_blocks: usize) -> Launch {
    let most = BLOCKS_PER_MULTIPROCESSOR * s.multiprocessors().max(1) as usize;
    Launch {
        grid: [blocks(num_blocks.div_ceil(WARPS).clamp(1, most)), 1, 1],
        block: [THREADS, 1, 1],
        shared_bytes: 0,
    }
}

const ONE_THREAD: Launch = Launch {
    grid: [1; 3],
    block: [1; 3],
    shared_bytes: 0,
};

/// The kernels that touch no 16-bit value are in both modules.
const ANY_HALF: Half = Half::Bf16;

/// `norm` (one f32) `= ‖unscale·g‖₂`, summed in f64 in an order that depends on `n` alone; `partials` is scratch of
/// [`SQUARES_PARTIALS`] f64.
///
/// # Errors
///
/// If a launch fails.
///
/// # Panics
///
/// If a view is too short or not aligned to 16 bytes.
pub fn sum_squares(
    s: &Stream,
    norm: View,
    g: View,
    n: usize,
    unscale: f32,
    partials: View,
) -> Result<(), CudaError> {
    let num_partials = n.div_ceil(4 * THREADS as usize).clamp(1, SQUARES_PARTIALS);
    let partials = elements(partials, num_partials, 8, "partial sums");
    let launch = |num_blocks: usize| Launch {
        grid: [blocks(num_blocks), 1, 1],
        block: [THREADS, 1, 1],
        shared_bytes: 0,
    };
    let args = Args::new()
        .ptr(partials)
        .ptr(vectors(g, n, 4, "gradients"))
        .i64(n as i64)
        .f32(unscale);
    let defines = [ANY_HALF.define()];
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe {
        s.launch(
            &OPTIMIZER,
            &defines,
            "sum_squares",
            launch(num_partials),
            args,
        )?
    };
    let args = Args::new()
        .ptr(elements(norm, 1, 4, "the norm"))
        .ptr(partials)
        .i32(num_partials);
    // SAFETY: as above.
    unsafe { s.launch(&OPTIMIZER, &defines, "finish_norm", launch(1), args) }
}

/// `factor` (one f32) `= min(1, max_norm/(norm + 1e-6))·unscale` and `flag` (one u32) `= 0`; if the norm is not finite,
/// `factor = 0` and `flag = 1`.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a view is too short.
pub fn clip_factor(
    s: &Stream,
    factor: View,
    flag: View,
    norm: View,
    max_norm: f32,
    unscale: f32,
) -> Result<(), CudaError> {
    let args = Args::new()
        .ptr(elements(factor, 1, 4, "the clipping factor"))
        .ptr(elements(flag, 1, 4, "the flag"))
        .ptr(elements(norm, 1, 4, "the norm"))
        .f32(max_norm)
        .f32(unscale);
    let defines = [ANY_HALF.define()];
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { s.launch(&OPTIMIZER, &defines, "clip_factor", ONE_THREAD, args) }
}

/// Counts a step in `steps` (one u32) and writes its numbers ([`STEP_NUMBERS_BYTES`]), unless `flag` is set.
///
/// `learning_rate` is one f64 on the device.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a view is too short.
pub fn step_numbers(
    s: &Stream,
    numbers: View,
    steps: View,
    flag: View,
    learning_rate: View,
    config: &AdamWConfig,
) -> Result<(), CudaError> {
    let args = Args::new()
        .ptr(elements(
            numbers,
            STEP_NUMBERS_BYTES,
            1,
            "the step's numbers",
        ))
        .ptr(elements(steps, 1, 4, "the step counter"))
        .ptr(elements(flag, 1, 4, "the flag"))
        .ptr(elements(learning_rate, 1, 8, "the learning rate"))
        // A `double` is passed as its bits.
        .u64(config.beta1.to_bits())
        .u64(config.beta2.to_bits())
        .u64(config.epsilon.to_bits())
        .u64(config.weight_decay.to_bits());
    let defines = [ANY_HALF.define()];
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { s.launch(&OPTIMIZER, &defines, "step_numbers", ONE_THREAD, args) }
}

/// What both kinds of step read and write, on the device.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// The parameters, f32, flat.
    pub parameters: View,
    /// Where the new parameters go in T as well, flat, at the same offsets.
    pub shadow: Option<View>,
    /// The gradients, f32, flat, still scaled and not clipped.
    pub gradients: View,
    /// The table, uploaded.
    pub table: View,
    /// From [`clip_factor`].
    pub factor: View,
    /// From [`clip_factor`].
    pub flag: View,
    /// From [`step_numbers`].
    pub numbers: View,
}

impl Step {
    fn flat(&self, table: &TensorTable) -> [View; 2] {
        [self.parameters, self.gradients].map(|view| elements(view, table.len, 4, "flat tensors"))
    }

    fn shadow(&self, table: &TensorTable) -> Option<View> {
        self.shadow
            .map(|view| elements(view, table.len, 2, "parameters in 16 bits"))
    }

    fn decisions(&self, args: Args) -> Args {
        args.ptr(elements(self.factor, 1, 4, "the clipping factor"))
            .ptr(elements(self.flag, 1, 4, "the flag"))
            .ptr(elements(
                self.numbers,
                STEP_NUMBERS_BYTES,
                1,
                "the step's numbers",
            ))
    }
}

/// Moves the tensors whose moments are f32: `first` and `second` are [`TensorTable::num_full_moments`] f32.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a view is too short.
pub fn adamw_f32(
    s: &Stream,
    t: Half,
    table: &TensorTable,
    step: &Step,
    first: View,
    second: View,
) -> Result<(), CudaError> {
    if table.full.is_empty() {
        return Ok(());
    }
    let [parameters, gradients] = step.flat(table);
    let moments = |view| elements(view, table.full_len, 4, "f32 moments");
    let args = Args::new()
        .ptr(parameters)
        .opt(step.shadow(table))
        .ptr(moments(first))
        .ptr(moments(second))
        .ptr(gradients)
        .ptr(table.full_blocks(step.table))
        .i32(table.full.len());
    let small = matches!(table.kind, OptimizerKind::AdamW8bit { .. });
    let args = step.decisions(args).i32(i32::from(small));
    let launch = grid(s, table.full.len());
    // SAFETY: the kernel's arguments; every view was compared with the table, whose blocks stay within its lengths.
    unsafe { s.launch(&OPTIMIZER, &[t.define()], "adamw_f32", launch, args) }
}

/// Codes and scales of the two moments: [`TensorTable::num_elements`] bytes and [`TensorTable::num_scales`] f32 each.
/// A fresh state is all zeros.
#[derive(Clone, Copy, Debug)]
pub struct EightBitMoments {
    /// Codes of the first moment.
    pub first: View,
    /// Scales of the first moment.
    pub first_absmax: View,
    /// Codes of the second moment.
    pub second: View,
    /// Scales of the second moment.
    pub second_absmax: View,
}

/// Moves the tensors whose moments are in 8 bits.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a view is too short.
pub fn adamw_8bit(
    s: &Stream,
    t: Half,
    table: &TensorTable,
    step: &Step,
    moments: &EightBitMoments,
) -> Result<(), CudaError> {
    if table.eight_bit.is_empty() {
        return Ok(());
    }
    let [parameters, gradients] = step.flat(table);
    let codes = |view| elements(view, table.len, 1, "codes of moments");
    let scales = |view| elements(view, table.eight_bit.len(), 4, "scales of moments");
    let args = Args::new()
        .ptr(parameters)
        .opt(step.shadow(table))
        .ptr(codes(moments.first))
        .ptr(scales(moments.first_absmax))
        .ptr(codes(moments.second))
        .ptr(scales(moments.second_absmax))
        .ptr(gradients)
        .ptr(table.eight_bit_blocks(step.table))
        .i32(table.eight_bit.len());
    let args = step.decisions(args);
    let launch = grid(s, table.eight_bit.len());
    // SAFETY: the kernel's arguments; every view was compared with the table, whose blocks stay within its lengths.
    unsafe { s.launch(&OPTIMIZER, &[t.define()], "adamw_8bit", launch, args) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_never_cross_tensors_and_small_tensors_keep_f32_moments() {
        let kind = OptimizerKind::AdamW8bit { min_8bit_size: 300 };
        let table = TensorTable::new(kind, &[(0, 300), (300, 10), (310, 512)]);
        let block = |start, len, state, scale| Block {
            start,
            len,
            state,
            scale,
        };
        assert_eq!(
            table.eight_bit,
            [
                block(0, 256, 0, 0),
                block(256, 44, 256, 1),
                block(310, 256, 310, 2),
                block(566, 256, 566, 3)
            ]
        );
        assert_eq!(table.full, [block(300, 10, 0, 0)]);
        assert_eq!(
            table.places()[2],
            TensorPlace::EightBit {
                codes: 310..822,
                scales: 2..4
            }
        );
        assert_eq!((table.num_elements(), table.num_full_moments()), (822, 10));
    }

    #[test]
    fn plain_adamw_keeps_everything_in_f32() {
        let table = TensorTable::new(OptimizerKind::AdamW, &[(0, 5000), (5000, 3)]);
        assert_eq!((table.num_scales(), table.num_full_moments()), (0, 5003));
    }
}
