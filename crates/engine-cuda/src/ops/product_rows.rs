//! Rows in f32 times weights in T or NF4, for what conditions a network: one row for each sample, shared by all of its
//! tokens, and so not rounded on the way. Kernels: `product_rows.cu`.

use crate::error::CudaError;
use crate::half_type::Half;
use crate::kernels::{Args, Launch, Module};
use crate::ops::extent::{blocks, elements, strided, vectors};
use crate::ops::nf4::Absmax;
use crate::stream::{Stream, Work};
use crate::view::View;

static PRODUCT_ROWS: Module = Module {
    name: "product_rows",
    source: include_str!("../../kernels/product_rows.cu"),
};

/// `PRODUCT_THREADS` of the kernels, and their warps.
const THREADS: usize = 256;
const WARPS: usize = THREADS / 32;

/// Outputs of a warp where weights are read in vectors of eight.
const OUTPUTS: usize = 2;

/// The second size of a grid.
const MAX_GRID_Y: usize = 65535;

/// The most rows of a block.
const MAX_ROWS: usize = 8;

/// A weight, `[n, k]`.
#[derive(Clone, Copy, Debug)]
pub enum RowsWeight {
    /// In T.
    Half(View),
    /// In NF4; `k` must be a multiple of 8.
    Nf4 {
        /// Two codes per byte.
        packed: View,
        /// Their scales.
        absmax: Absmax,
    },
}

/// `y = x·Wᵀ + bias`, or added to `y` with `accumulate`: f32 `[rows, k]` → f32 `[rows, n]`, rows of `y` `y_stride` elements
/// apart; the bias is T `[n]`. A row's numbers do not depend on the others.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a view is too short or not aligned to 16 bytes, or an NF4 weight's rows are no whole vectors of eight.
#[allow(clippy::too_many_arguments)] // a kernel's
pub fn product(
    s: &Stream,
    t: Half,
    (y, y_stride): (View, usize),
    x: View,
    weight: RowsWeight,
    bias: View,
    [rows, n, k]: [usize; 3],
    accumulate: bool,
) -> Result<(), CudaError> {
    if rows == 0 || n == 0 {
        return Ok(());
    }
    let args = Args::new()
        .ptr(elements(y, strided(rows, y_stride, n), 4, "the result"))
        .ptr(vectors(x, rows * k, 4, "the factor"))
        .ptr(elements(bias, n, 2, "the bias"))
        .i32(rows)
        .i32(n)
        .i32(k)
        .i32(y_stride)
        .i32(i32::from(accumulate));
    let in_vectors = k.is_multiple_of(8);
    let rows_of_block = match in_vectors {
        true => rows.next_power_of_two().min(MAX_ROWS),
        false => 1,
    };
    let (form, args) = match weight {
        RowsWeight::Half(view) => {
            let args = args.ptr(vectors(view, n * k, 2, "the weight"));
            (if in_vectors { "half_" } else { "any" }, args)
        }
        RowsWeight::Nf4 { packed, absmax } => {
            assert!(in_vectors, "NF4 weights of rows of {k}");
            let args = args.ptr(vectors(packed, n * k / 2, 1, "NF4 codes"));
            let form = match absmax {
                Absmax::Plain { .. } => "nf4_",
                Absmax::Double { .. } => "double_",
            };
            (form, absmax.add_to(args, n * k))
        }
    };
    let (kernel, outputs) = match in_vectors {
        true => (format!("product_rows_{form}{rows_of_block}"), OUTPUTS),
        false => (format!("product_rows_{form}"), 1),
    };
    let columns = n.div_ceil(outputs * WARPS);
    assert!(columns <= MAX_GRID_Y, "{n} outputs");
    let launch = Launch {
        grid: [blocks(rows.div_ceil(rows_of_block)), blocks(columns), 1],
        block: [THREADS as u32, 1, 1],
        shared_bytes: 0,
    };
    s.count_flops(Work::Product, 2.0 * (rows * n) as f64 * k as f64);
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { s.launch(&PRODUCT_ROWS, &[t.define()], &kernel, launch, args) }
}
