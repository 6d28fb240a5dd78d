//! A frozen linear layer, or several of one input side by side, in 16 bits or NF4, with LoRA factors on any of them.
//!
//! Adapted layers of one product share it: their `A` are stacked to `[R, in]` and their `B` put on the diagonal of
//! `[out, R]` (multiplied by their strengths), with `R` filled up to a multiple of 8. So a LoRA costs two thin products
//! going forward and four going backward, however many layers are fused.

use std::cell::Cell;
use std::ops::Range;

use crate::arena::Arena;
use crate::error::CudaError;
use crate::gemm::{Matrix, Output, Product};
use crate::half_type::Half;
use crate::ops::nf4::{self, Absmax};
use crate::ops::product_rows::{self, RowsWeight};
use crate::ops::{elementwise, sums};
use crate::stream::Stream;
use crate::view::View;

/// What a layer needs to compute, for one run through the layers.
pub struct Cx<'a> {
    /// Where it computes.
    pub stream: &'a Stream,
    /// T.
    pub t: Half,
    /// Memory for what lies between layers.
    pub arena: &'a Arena,
    /// Where NF4 weights are brought into 16 bits.
    pub weight_scratch: WeightScratch,
}

/// Memory for two NF4 weights in 16 bits: one of the largest, and one of those that are smaller.
///
/// A single block's two products are of different size, so that what its recomputed forward pass has brought into 16 bits
/// for the larger is still there when its backward pass comes to it.
pub struct WeightScratch {
    /// Small and large.
    slots: [View; 2],
    /// The codes of what lies in the large one.
    held: Cell<Option<View>>,
}

impl WeightScratch {
    /// For weights of at most `[small, large]` elements of T; both 0 where weights are in T.
    pub fn new(arena: &Arena, [small, large]: [usize; 2]) -> Self {
        Self {
            slots: [small, large].map(|elements| arena.take(2 * elements)),
            held: Cell::new(None),
        }
    }

    /// Where a weight of so many elements, whose codes begin with `codes`, is to be, and whether it is there already.
    fn place(&self, elements: usize, codes: View) -> (View, bool) {
        let [small, large] = self.slots;
        if 2 * elements <= small.bytes() {
            return (small.take(2 * elements), false);
        }
        let found = self.held.replace(Some(codes)) == Some(codes);
        (large.take(2 * elements), found)
    }
}

impl Cx<'_> {
    /// Memory for `n` elements of T.
    pub fn half(&self, n: usize) -> View {
        self.arena.take(2 * n)
    }

    /// Memory for `n` elements of `f32`.
    pub fn f32(&self, n: usize) -> View {
        self.arena.take(4 * n)
    }
}

/// One of the layers in a product.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its path, e.g. `transformer_blocks.0.attn.to_q`.
    pub path: String,
    /// Its first output.
    pub row: usize,
    /// Its outputs.
    pub rows: usize,
}

/// A weight, `[out, in]`.
#[derive(Clone, Debug)]
pub enum Weight {
    /// In T.
    Half(View),
    /// In NF4, one entry for each part.
    Nf4(Vec<Nf4Part>),
}

/// The codes of one layer.
#[derive(Clone, Copy, Debug)]
pub struct Nf4Part {
    /// Two codes per byte.
    pub packed: View,
    /// Their scales.
    pub absmax: Absmax,
    /// Number of codes.
    pub n: usize,
}

/// Stacked LoRA factors of one product and their gradients.
#[derive(Clone, Copy, Debug)]
pub struct Factors {
    /// Stacked rank, a multiple of 8.
    pub rank: usize,
    /// The first output that any of them changes.
    pub first_row: usize,
    /// Outputs from there to the last that is changed.
    pub num_rows: usize,
    /// T `[R, in]`.
    pub a: View,
    /// T `[num_rows, R]`, strengths included.
    pub b: View,
    /// Gradients `f32 [R, in]` and `[num_rows, R]`; absent where nothing is trained.
    pub gradients: Option<[View; 2]>,
}

/// Layers of one input as one product.
#[derive(Clone, Debug)]
pub struct Linear {
    /// The layers.
    pub parts: Vec<Part>,
    /// Width of the input.
    pub in_features: usize,
    /// Width of all outputs together.
    pub out_features: usize,
    /// The weights, one below the other.
    pub weight: Weight,
    /// T `[out]`.
    pub bias: View,
    /// LoRA factors, if any part has some.
    pub factors: Option<Factors>,
    /// Where the gradients of weight and bias go, if the layer itself is trained.
    pub gradients: Option<LinearGradients>,
}

/// Gradients of a layer's own weight and bias. They are overwritten, not added to.
#[derive(Clone, Copy, Debug)]
pub struct LinearGradients {
    /// `f32 [out, in]`.
    pub weight: View,
    /// `f32 [out]`.
    pub bias: View,
    /// Whether [`Linear::backward`] sums up the bias's gradient. Otherwise it falls out where the gradient of the output
    /// is made: behind a gate, GELU or head norms.
    pub sums_bias: bool,
}

impl Linear {
    /// Whether the backward pass needs the layer's input.
    pub fn needs_input(&self) -> bool {
        self.gradients.is_some()
            || self
                .factors
                .is_some_and(|factors| factors.gradients.is_some())
    }

    /// Gradients of weight and bias, where the layer itself is trained: of `y` (rows `dy_stride` elements apart) and
    /// of the input `x`.
    pub fn weight_backward(
        &self,
        cx: &Cx<'_>,
        dy: View,
        dy_stride: usize,
        x: View,
        rows: usize,
    ) -> Result<(), CudaError> {
        let Some(LinearGradients {
            weight,
            bias,
            sums_bias,
        }) = self.gradients
        else {
            return Ok(());
        };
        let (out, width) = (self.out_features, self.in_features);
        let product = Product {
            m: out,
            n: width,
            k: rows,
            a: Matrix::transposed(dy, dy_stride),
            b: Matrix::rows(x, width),
            c: weight,
            c_stride: width,
            output: Output::F32,
            alpha: 1.0,
            beta: 0.0,
            bias: None,
        };
        cx.stream.product(cx.t, &product)?;
        if !sums_bias {
            return Ok(());
        }
        let mark = cx.arena.mark();
        let partials = cx.f32(sums::partials_len(1, rows, out, 1));
        let (s, t) = (cx.stream, cx.t);
        sums::columns(s, t, bias, dy, dy_stride, rows, out, partials)?;
        cx.arena.release(mark);
        Ok(())
    }

    /// Where gradients of the head norms' weights and of this layer's bias go, if all of it is trained: the layer's
    /// first outputs are what the norms see.
    pub fn head_gradients(&self, norms: Option<[View; 2]>) -> Option<([View; 2], View)> {
        Some((norms?, self.gradients?.bias))
    }

    /// `dx = dy·gelu′(x)`, each with its row stride, where `x` are these outputs of the layer; and the gradient of
    /// their bias, if the layer itself is trained. `dx` may be `dy`.
    pub fn gelu_backward(
        &self,
        cx: &Cx<'_>,
        (dx, dx_stride): (View, usize),
        (dy, dy_stride): (View, usize),
        (x, x_stride): (View, usize),
        rows: usize,
        outputs: Range<usize>,
    ) -> Result<(), CudaError> {
        let (s, t, n) = (cx.stream, cx.t, outputs.len());
        let Some(LinearGradients { bias, .. }) = self.gradients else {
            return elementwise::gelu_tanh_backward(
                s, t, dx, dy, x, rows, n, dx_stride, dy_stride, x_stride,
            );
        };
        let mark = cx.arena.mark();
        let partials = cx.f32(sums::partials_len(1, rows, n, 1));
        let bias = bias.skip(4 * outputs.start);
        let (dx, dy, x) = ((dx, dx_stride), (dy, dy_stride), (x, x_stride));
        sums::gelu_backward(s, t, bias, dx, dy, x, rows, n, partials)?;
        cx.arena.release(mark);
        Ok(())
    }

    /// Memory for `x·Aᵀ`, to be kept from forward to backward.
    pub fn keep(&self, cx: &Cx<'_>, rows: usize) -> Option<View> {
        self.factors.map(|factors| cx.half(rows * factors.rank))
    }

    /// The weight in T.
    pub(crate) fn half_weight(&self, cx: &Cx<'_>) -> Result<View, CudaError> {
        match &self.weight {
            Weight::Half(view) => Ok(*view),
            Weight::Nf4(parts) => {
                let elements = self.in_features * self.out_features;
                let (weight, is_there) = cx.weight_scratch.place(elements, parts[0].packed);
                if is_there {
                    return Ok(weight);
                }
                let mut rest = weight;
                for part in parts {
                    let out = rest.take(2 * part.n);
                    nf4::dequantise(cx.stream, cx.t, out, part.packed, part.absmax, part.n)?;
                    rest = rest.skip(2 * part.n);
                }
                Ok(weight)
            }
        }
    }

    /// `y = x Wᵀ + bias + (x Aᵀ) Bᵀ`: T `[rows, in]` → `[rows, out]`, rows of `y` `y_stride` elements apart.
    ///
    /// `inner` is what [`Linear::keep`] gave.
    pub fn forward(
        &self,
        cx: &Cx<'_>,
        y: View,
        y_stride: usize,
        x: View,
        rows: usize,
        inner: Option<View>,
    ) -> Result<(), CudaError> {
        let (n, k) = (self.out_features, self.in_features);
        let product = Product {
            m: rows,
            n,
            k,
            a: Matrix::rows(x, k),
            b: Matrix::transposed(self.half_weight(cx)?, k),
            c: y,
            c_stride: y_stride,
            output: Output::Half,
            alpha: 1.0,
            beta: 0.0,
            bias: Some(self.bias),
        };
        cx.stream.product(cx.t, &product)?;
        self.forward_factors(cx, (y, y_stride), Output::Half, x, rows, inner)
    }

    /// [`Linear::forward`] in f32, for the rows that condition a network: f32 `[rows, in]` → `[rows, out]`, added to `y`
    /// with `accumulate`. Factors are given the input in T, `x_half`.
    #[allow(clippy::too_many_arguments)] // a product's
    pub fn forward_wide(
        &self,
        cx: &Cx<'_>,
        (y, y_stride): (View, usize),
        [x, x_half]: [View; 2],
        rows: usize,
        inner: Option<View>,
        accumulate: bool,
    ) -> Result<(), CudaError> {
        let k = self.in_features;
        let product = |weight: RowsWeight, first: usize, n: usize| {
            let to = (y.skip(4 * first), y_stride);
            let (s, t, bias) = (cx.stream, cx.t, self.bias.elements_from(first));
            product_rows::product(s, t, to, x, weight, bias, [rows, n, k], accumulate)
        };
        match &self.weight {
            Weight::Nf4(stored) if k.is_multiple_of(8) => {
                for (part, &Nf4Part { packed, absmax, .. }) in self.parts.iter().zip(stored) {
                    product(RowsWeight::Nf4 { packed, absmax }, part.row, part.rows)?;
                }
            }
            _ => product(
                RowsWeight::Half(self.half_weight(cx)?),
                0,
                self.out_features,
            )?,
        }
        self.forward_factors(cx, (y, y_stride), Output::F32, x_half, rows, inner)
    }

    /// Adds `(x Aᵀ) Bᵀ` to `y`, which is of the type that stands beside it.
    fn forward_factors(
        &self,
        cx: &Cx<'_>,
        (y, y_stride): (View, usize),
        output: Output,
        x: View,
        rows: usize,
        inner: Option<View>,
    ) -> Result<(), CudaError> {
        let Some(Factors {
            rank,
            first_row,
            num_rows,
            b,
            ..
        }) = self.factors
        else {
            return Ok(());
        };
        let inner = inner.expect("a layer with factors was given memory for x·Aᵀ");
        self.forward_inner(cx, x, rows, Some(inner))?;
        let bytes_each = match output {
            Output::Half => 2,
            Output::F32 => 4,
        };
        let add = Product {
            m: rows,
            n: num_rows,
            k: rank,
            a: Matrix::rows(inner, rank),
            b: Matrix::transposed(b, rank),
            c: y.skip(bytes_each * first_row),
            c_stride: y_stride,
            output,
            alpha: 1.0,
            beta: 1.0,
            bias: None,
        };
        cx.stream.product(cx.t, &add)
    }

    /// Only `x·Aᵀ`, which the backward pass wants; nothing without factors.
    pub fn forward_inner(
        &self,
        cx: &Cx<'_>,
        x: View,
        rows: usize,
        inner: Option<View>,
    ) -> Result<(), CudaError> {
        let (Some(Factors { rank, a, .. }), Some(inner)) = (self.factors, inner) else {
            return Ok(());
        };
        let k = self.in_features;
        let thin = Product {
            m: rows,
            n: rank,
            k,
            a: Matrix::rows(x, k),
            b: Matrix::transposed(a, k),
            c: inner,
            c_stride: rank,
            output: Output::Half,
            alpha: 1.0,
            beta: 0.0,
            bias: None,
        };
        cx.stream.product(cx.t, &thin)
    }

    /// From the gradient of `y` (rows contiguous) to that of `x` (left out if `dx` is `None`), and to those of the
    /// factors, which are added to what is there, or of weight and bias, which are overwritten. `x` is needed where
    /// [`Linear::needs_input`].
    pub fn backward(
        &self,
        cx: &Cx<'_>,
        dx: Option<View>,
        dy: View,
        x: Option<View>,
        rows: usize,
        inner: Option<View>,
    ) -> Result<(), CudaError> {
        let (out, width) = (self.out_features, self.in_features);
        if let Some(dx) = dx {
            let product = Product {
                m: rows,
                n: width,
                k: out,
                a: Matrix::rows(dy, out),
                b: Matrix::rows(self.half_weight(cx)?, width),
                c: dx,
                c_stride: width,
                output: Output::Half,
                alpha: 1.0,
                beta: 0.0,
                bias: None,
            };
            cx.stream.product(cx.t, &product)?;
        }
        if self.gradients.is_some() {
            let x = x.expect("a trained layer is given its input");
            self.weight_backward(cx, dy, out, x, rows)?;
        }
        let dx = dx.map(|dx| (dx, Output::Half));
        self.factors_backward(cx, dx, (dy, out), x, rows, inner)
    }

    /// The factors' part of [`Linear::backward`]: what goes through them is added to `dx`, which is of the type that
    /// stands beside it, and their gradients to what is there. Rows of `dy` are `dy_stride` elements apart.
    pub fn factors_backward(
        &self,
        cx: &Cx<'_>,
        dx: Option<(View, Output)>,
        (dy, dy_stride): (View, usize),
        x: Option<View>,
        rows: usize,
        inner: Option<View>,
    ) -> Result<(), CudaError> {
        let width = self.in_features;
        let Some(Factors {
            rank,
            first_row,
            num_rows,
            a,
            b,
            gradients,
        }) = self.factors
        else {
            return Ok(());
        };
        let mark = cx.arena.mark();
        let dinner = cx.half(rows * rank);
        let changed = dy.elements_from(first_row);
        let plain = Product {
            m: rows,
            n: rank,
            k: num_rows,
            a: Matrix::rows(changed, dy_stride),
            b: Matrix::rows(b, rank),
            c: dinner,
            c_stride: rank,
            output: Output::Half,
            alpha: 1.0,
            beta: 0.0,
            bias: None,
        };
        cx.stream.product(cx.t, &plain)?;
        if let Some((dx, output)) = dx {
            cx.stream.product(
                cx.t,
                &Product {
                    n: width,
                    k: rank,
                    a: Matrix::rows(dinner, rank),
                    b: Matrix::rows(a, width),
                    c: dx,
                    c_stride: width,
                    output,
                    beta: 1.0,
                    ..plain
                },
            )?;
        }
        if let Some([da, db]) = gradients {
            let x = x.expect("a trained layer is given its input");
            let inner = inner.expect("a layer with factors kept x·Aᵀ");
            let gradient = Product {
                k: rows,
                output: Output::F32,
                beta: 1.0,
                ..plain
            };
            cx.stream.product(
                cx.t,
                &Product {
                    m: rank,
                    n: width,
                    a: Matrix::transposed(dinner, rank),
                    b: Matrix::rows(x, width),
                    c: da,
                    c_stride: width,
                    ..gradient
                },
            )?;
            cx.stream.product(
                cx.t,
                &Product {
                    m: num_rows,
                    n: rank,
                    a: Matrix::transposed(changed, dy_stride),
                    b: Matrix::rows(inner, rank),
                    c: db,
                    c_stride: rank,
                    ..gradient
                },
            )?;
        }
        cx.arena.release(mark);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_weight_stays_until_another_large_one_comes() {
        let arena = Arena::counting();
        let scratch = WeightScratch::new(&arena, [100, 300]);
        let [a, b] = [1, 2].map(|address| View::new(256 * address, 150));
        let (place, found) = scratch.place(300, a);
        assert!(!found);
        // A small one has its own place, and is never taken to be there.
        for _ in 0..2 {
            let (small, found) = scratch.place(100, b);
            assert!(!found && small.address() != place.address());
        }
        assert_eq!(scratch.place(300, a), (place, true));
        assert!(!scratch.place(200, b).1);
        assert!(!scratch.place(300, a).1);
    }
}
