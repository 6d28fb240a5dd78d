//! Matrix products through cuBLASLt, in row-major terms: `C = α·A·B + β·C (+ bias)`.
//!
//! Operands are 16-bit floats, sums are `f32`, the result is either. Descriptors and the algorithm are looked up once
//! per shape. Reductions over split sums happen in `f32` and in a fixed order, so the same call gives the same bits.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::rc::Rc;

use cudarc::cublaslt::result as lt;
use cudarc::cublaslt::sys as lt_sys;
use cudarc::driver::result as driver;

use crate::error::CudaError;
use crate::half_type::Half;
use crate::stream::{Context, Stream, Work, failed, pointer};
use crate::view::View;

/// Scratch memory of the library. On Hopper its kernels want 32 MiB.
pub const WORKSPACE_BYTES: usize = 64 << 20;

/// A matrix in memory.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// Where it is.
    pub view: View,
    /// Elements from one stored row to the next.
    pub stride: usize,
    /// Whether it is stored the other way round: its columns are the stored rows.
    pub transposed: bool,
}

impl Matrix {
    /// Rows as they are.
    pub fn rows(view: View, stride: usize) -> Self {
        Self {
            view,
            stride,
            transposed: false,
        }
    }

    /// Stored the other way round.
    pub fn transposed(view: View, stride: usize) -> Self {
        Self {
            view,
            stride,
            transposed: true,
        }
    }
}

/// What the result's elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// As the operands.
    Half,
    /// `f32`.
    F32,
}

/// A product: `C[m,n] = α·A[m,k]·B[k,n] + β·C`, plus `bias[n]` in every row.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// Rows of A and C.
    pub m: usize,
    /// Columns of B and C.
    pub n: usize,
    /// What is summed over.
    pub k: usize,
    /// The first operand.
    pub a: Matrix,
    /// The second operand.
    pub b: Matrix,
    /// The result.
    pub c: View,
    /// Elements from one row of the result to the next.
    pub c_stride: usize,
    /// What the result's elements are.
    pub output: Output,
    /// Factor of the product.
    pub alpha: f32,
    /// Factor of what C held before; 0 means that it is not read.
    pub beta: f32,
    /// One number per column, of the operands' type.
    pub bias: Option<View>,
}

/// What descriptors and algorithms depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    half: Half,
    sizes: [usize; 3],
    strides: [usize; 3],
    transposed: [bool; 2],
    output: Output,
    accumulates: bool,
    has_bias: bool,
    /// Largest powers of two (up to 256) that divide the addresses of A, B, C and the bias.
    alignments: [u32; 4],
}

/// Descriptors and algorithm of one key.
struct Prepared {
    description: lt_sys::cublasLtMatmulDesc_t,
    layouts: [lt_sys::cublasLtMatrixLayout_t; 3],
    algorithm: lt_sys::cublasLtMatmulAlgo_t,
}

/// The library's handle, its workspace, and everything prepared so far.
pub(crate) struct Products {
    library: Option<Library>,
    prepared: RefCell<HashMap<Key, Prepared>>,
}

struct Library {
    handle: lt_sys::cublasLtHandle_t,
    workspace: u64,
    /// Keeps the context alive until handle and workspace are gone.
    _context: Rc<Context>,
}

impl Drop for Products {
    fn drop(&mut self) {
        // SAFETY: everything was made by this value and is destroyed once; the context is still alive.
        unsafe {
            for (_, prepared) in self.prepared.borrow_mut().drain() {
                for layout in prepared.layouts {
                    let _ = lt::destroy_matrix_layout(layout);
                }
                let _ = lt::destroy_matmul_desc(prepared.description);
            }
            if let Some(library) = &self.library {
                let _ = driver::stream::synchronize(library._context.stream);
                let _ = lt::destroy_handle(library.handle);
                let _ = driver::free_sync(library.workspace);
            }
        }
    }
}

fn alignment(view: Option<View>) -> u32 {
    view.map_or(256, |view| {
        1 << (view.address() | 256).trailing_zeros().min(8)
    })
}

impl Products {
    pub(crate) fn new(context: &Rc<Context>) -> Result<Self, CudaError> {
        let handle = lt::create_handle().map_err(|error| CudaError::Product {
            product: "anything".to_owned(),
            code: format!("{:?}", error.0),
        })?;
        // SAFETY: the context is current; the memory is freed once, by `drop`.
        let workspace = unsafe { driver::malloc_sync(WORKSPACE_BYTES) }
            .map_err(failed("cuMemAlloc of cuBLASLt's workspace"))?;
        Ok(Self {
            library: Some(Library {
                handle,
                workspace,
                _context: Rc::clone(context),
            }),
            prepared: RefCell::default(),
        })
    }

    pub(crate) fn dry() -> Self {
        Self {
            library: None,
            prepared: RefCell::default(),
        }
    }
}

impl Stream {
    /// Computes a product.
    ///
    /// # Errors
    ///
    /// If cuBLASLt has no algorithm for it, or fails.
    ///
    /// # Panics
    ///
    /// If a view is shorter than its matrix.
    pub fn product(&self, half: Half, product: &Product) -> Result<(), CudaError> {
        let Product {
            m, n, k, a, b, c, ..
        } = *product;
        if m == 0 || n == 0 {
            return Ok(());
        }
        let reach = |rows: usize, columns: usize, stride: usize| {
            assert!(
                stride >= columns,
                "rows of {columns} elements, {stride} apart"
            );
            (rows - 1) * stride + columns
        };
        let stored = |matrix: Matrix, rows: usize, columns: usize| match matrix.transposed {
            false => reach(rows, columns, matrix.stride),
            true => reach(columns, rows, matrix.stride),
        };
        let element = match product.output {
            Output::Half => 2,
            Output::F32 => 4,
        };
        let (a_elements, b_elements) = (stored(a, m, k), stored(b, k, n));
        a.view.holds(2 * a_elements, "A");
        b.view.holds(2 * b_elements, "B");
        c.holds(element * reach(m, n, product.c_stride), "C");
        if let Some(bias) = product.bias {
            bias.holds(2 * n, "the bias");
        }
        let reads = if product.beta == 0.0 { 1 } else { 2 };
        let bytes = 2 * (m * k + k * n) + reads * element * m * n;
        let flops = 2.0 * m as f64 * n as f64 * k as f64;
        // Which of many products is slow can be told from its sizes alone.
        let name = format!("product {m}x{n}x{k}");
        self.metered(Work::Product, &name, flops, bytes as f64, |stream| {
            #[cfg(test)]
            if self.is_host() {
                crate::host::product(half, product);
            }
            let (Some(stream), Some(library)) = (stream, &self.products().library) else {
                return Ok(());
            };
            let key = Key {
                half,
                sizes: [m, n, k],
                strides: [a.stride, b.stride, product.c_stride],
                transposed: [a.transposed, b.transposed],
                output: product.output,
                accumulates: product.beta != 0.0,
                has_bias: product.bias.is_some(),
                alignments: [Some(a.view), Some(b.view), Some(c), product.bias].map(alignment),
            };
            let refused = |error: lt::CublasError| CudaError::Product {
                product: format!("{key:?}"),
                code: format!("{:?}", error.0),
            };
            let mut prepared = self.products().prepared.borrow_mut();
            let prepared = match prepared.entry(key) {
                std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::hash_map::Entry::Vacant(entry) => {
                    let prepared = prepare(library.handle, &key, product.bias).map_err(refused)?;
                    entry.insert(prepared)
                }
            };
            // Row-major C is column-major Cᵀ = Bᵀ·Aᵀ, so the library's first operand is our second.
            // SAFETY: handle, descriptors and workspace are alive, and the views hold their matrices as asserted.
            unsafe {
                if let Some(bias) = product.bias {
                    let address = pointer(bias);
                    set(
                        prepared.description,
                        lt_sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                        &address,
                    )
                    .map_err(refused)?;
                }
                lt::matmul(
                    library.handle,
                    prepared.description,
                    (&raw const product.alpha).cast(),
                    (&raw const product.beta).cast(),
                    pointer(b.view),
                    prepared.layouts[0],
                    pointer(a.view),
                    prepared.layouts[1],
                    pointer(c),
                    prepared.layouts[2],
                    pointer(c),
                    prepared.layouts[2],
                    &prepared.algorithm,
                    library.workspace as *mut c_void,
                    WORKSPACE_BYTES,
                    stream.cast(),
                )
            }
            .map_err(refused)
        })
    }
}

/// # Safety
///
/// The descriptor is alive and the attribute's type is `V`.
unsafe fn set<V>(
    description: lt_sys::cublasLtMatmulDesc_t,
    attribute: lt_sys::cublasLtMatmulDescAttributes_t,
    value: &V,
) -> Result<(), lt::CublasError> {
    // SAFETY: the library copies the value.
    unsafe {
        lt::set_matmul_desc_attribute(
            description,
            attribute,
            (&raw const *value).cast(),
            size_of::<V>(),
        )
    }
}

fn prepare(
    handle: lt_sys::cublasLtHandle_t,
    key: &Key,
    bias: Option<View>,
) -> Result<Prepared, lt::CublasError> {
    use lt_sys::cublasLtMatmulDescAttributes_t as Attribute;
    use lt_sys::cublasLtMatmulPreferenceAttributes_t as Preference;
    let half = match key.half {
        Half::Bf16 => lt_sys::cudaDataType_t::CUDA_R_16BF,
        Half::F16 => lt_sys::cudaDataType_t::CUDA_R_16F,
    };
    let f32 = lt_sys::cudaDataType_t::CUDA_R_32F;
    let output = match key.output {
        Output::Half => half,
        Output::F32 => f32,
    };
    let [m, n, k] = key.sizes.map(|size| size as u64);
    let [a_stride, b_stride, c_stride] = key.strides.map(|stride| stride as i64);
    let [a_transposed, b_transposed] = key.transposed;
    let compute = lt_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
    let description = lt::create_matmul_desc(compute, f32)?;
    // `CUBLAS_OP_N` is 0 and `CUBLAS_OP_T` is 1; the bindings of cuBLASLt alone do not name them.
    let operation = i32::from;
    // As stored, seen column by column: row-major rows × columns is column-major columns × rows.
    let b_layout = match b_transposed {
        false => lt::create_matrix_layout(half, n, k, b_stride)?,
        true => lt::create_matrix_layout(half, k, n, b_stride)?,
    };
    let a_layout = match a_transposed {
        false => lt::create_matrix_layout(half, k, m, a_stride)?,
        true => lt::create_matrix_layout(half, m, k, a_stride)?,
    };
    let c_layout = lt::create_matrix_layout(output, n, m, c_stride)?;
    // SAFETY: all descriptors were made above; attributes have the types that the library documents.
    let algorithm = unsafe {
        set(
            description,
            Attribute::CUBLASLT_MATMUL_DESC_TRANSA,
            &operation(b_transposed),
        )?;
        set(
            description,
            Attribute::CUBLASLT_MATMUL_DESC_TRANSB,
            &operation(a_transposed),
        )?;
        if let Some(bias) = bias {
            let epilogue = lt_sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as i32;
            set(
                description,
                Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE,
                &epilogue,
            )?;
            set(
                description,
                Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE,
                &(half as i32),
            )?;
            set(
                description,
                Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                &pointer(bias),
            )?;
        }
        let preference = lt::create_matmul_pref()?;
        let prefer = |attribute, value: *const c_void, size| {
            lt::set_matmul_pref_attribute(preference, attribute, value, size)
        };
        let workspace = WORKSPACE_BYTES;
        prefer(
            Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            (&raw const workspace).cast(),
            size_of::<usize>(),
        )?;
        let reduction =
            lt_sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        prefer(
            Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
            (&raw const reduction).cast(),
            4,
        )?;
        let [a, b, c, _] = key.alignments;
        for (attribute, alignment) in [
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, b),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, c),
        ] {
            prefer(attribute, (&raw const alignment).cast(), 4)?;
        }
        let found = lt::get_matmul_algo_heuristic(
            handle,
            description,
            b_layout,
            a_layout,
            c_layout,
            c_layout,
            preference,
        );
        lt::destroy_matmul_pref(preference)?;
        found?.algo
    };
    Ok(Prepared {
        description,
        layouts: [b_layout, a_layout, c_layout],
        algorithm,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn product(stream: &Stream, elements: usize) -> Result<(), CudaError> {
        let buffer = stream.allocate(2 * elements, "a test").expect("a dry run");
        let view = buffer.view();
        stream.product(
            Half::Bf16,
            &Product {
                m: 3,
                n: 4,
                k: 5,
                a: Matrix::rows(view, 5),
                b: Matrix::transposed(view, 5),
                c: view,
                c_stride: 4,
                output: Output::Half,
                alpha: 1.0,
                beta: 0.0,
                bias: None,
            },
        )
    }

    #[test]
    fn a_dry_product_counts_its_arithmetic() {
        let stream = Stream::dry();
        product(&stream, 20).expect("a dry run");
        assert_eq!(stream.tallies()[Work::Product as usize].flops, 120.0);
    }

    #[test]
    #[should_panic(expected = "B needs 40 bytes and has 38")]
    fn a_matrix_that_is_too_short_panics() {
        let _ = product(&Stream::dry(), 19);
    }

    #[test]
    fn alignment_is_the_largest_power_of_two_up_to_256() {
        let of = |address| alignment(Some(View::new(address, 1)));
        assert_eq!(
            [of(2), of(24), of(256), of(1024), of(768)],
            [2, 8, 256, 256, 256]
        );
    }
}
