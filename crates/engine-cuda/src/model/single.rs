//! A single block, forward and backward: text and image as one sequence, attention and MLP side by side.
//!
//! Kept from forward to backward, per token: the input product (7d: queries, keys and values before the head norms,
//! hidden values before GELU) and attention's output (d). Where modulations are trained, what is gated (d) is kept too;
//! where all weights are, or the backward pass follows at once, everything that it reads.
//!
//! Source: `FluxSingleTransformerBlock`, diffusers 0.42; the backward pass is derived by hand.

use crate::error::CudaError;
use crate::half_type::Half;
use crate::model::joint::{Joint, Qkv};
use crate::model::linear::Cx;
use crate::model::modulations::Modulations;
use crate::model::network::SingleWeights;
use crate::model::pass::Keep;
use crate::ops::elementwise;
use crate::view::View;

/// What a single block keeps.
#[derive(Clone, Copy, Debug)]
pub struct KeptSingle {
    products: View,
    /// Attention's output: by itself, or in `both`, and then with its stride.
    o: View,
    /// The output product's input: attention's output beside the activated hidden values. Where it is not kept, it is made
    /// when it is needed.
    both: Option<View>,
    sums: View,
    /// `x·Aᵀ` of input and output.
    inner: [Option<View>; 2],
    /// Output of the output product, where the gradient of its gate is wanted.
    update: Option<View>,
    all: Option<AllOfSingle>,
}

/// What is kept besides where it pays, so that nothing is computed twice.
#[derive(Clone, Copy, Debug)]
struct AllOfSingle {
    /// The input product's input.
    normed: View,
    /// The norm's statistics, `f32 [rows, 2]`, where gradients of its vectors want them.
    stats: Option<View>,
    /// Queries, keys and values as attention reads them.
    qkv: Qkv,
}

impl SingleWeights {
    /// Memory for what is kept; `gates` says whether the gate's gradient is wanted.
    pub fn keep(&self, cx: &Cx<'_>, joint: &Joint<'_>, gates: bool, keep: Keep) -> KeptSingle {
        let rows = joint.shape.all_rows();
        let products = cx.half(rows * self.input.out_features);
        let inner = [&self.input, &self.output].map(|linear| linear.keep(cx, rows));
        let d = joint.sizes.d;
        let update = gates.then(|| cx.half(rows * d));
        let all_trained = self.norm_gradients.is_some();
        let all = (all_trained || keep == Keep::All).then(|| AllOfSingle {
            normed: cx.half(rows * d),
            stats: all_trained.then(|| cx.f32(2 * rows)),
            qkv: joint.qkv(cx),
        });
        let side_by_side = match keep {
            Keep::Nothing => true,
            Keep::Products | Keep::All => all.is_some() && self.output.needs_input(),
        };
        let both = side_by_side.then(|| cx.half(rows * (d + joint.sizes.mlp)));
        KeptSingle {
            products,
            o: both.unwrap_or_else(|| cx.half(rows * d)),
            both,
            sums: cx.f32(rows * joint.sizes.h),
            inner,
            update,
            all,
        }
    }

    /// Elements from one row of attention's output to the next.
    fn o_stride(joint: &Joint<'_>, kept: &KeptSingle) -> usize {
        match kept.both {
            Some(_) => joint.sizes.d + joint.sizes.mlp,
            None => joint.sizes.d,
        }
    }

    /// T `[rows, d]` → the same in `out` (which may be `x`). Without `out` only what is kept is computed, to the same
    /// bits.
    pub fn forward(
        &self,
        cx: &Cx<'_>,
        joint: &Joint<'_>,
        out: Option<View>,
        x: View,
        kept: &KeptSingle,
        (modulations, offset): (&Modulations, usize),
    ) -> Result<(), CudaError> {
        let d = joint.sizes.d;
        let (rows, width) = (joint.shape.all_rows(), self.input.out_features);
        let places = [offset, offset + d];
        let samples = [joint.shape.b, joint.shape.tokens(), d];
        let mark = cx.arena.mark();
        let y = kept.update.unwrap_or_else(|| cx.half(rows * d));
        let normed = kept.all.map_or(y, |all| all.normed);
        let stats = kept.all.and_then(|all| all.stats);
        modulations.norm(cx, places, normed, stats, x, samples)?;
        self.input
            .forward(cx, kept.products, width, normed, rows, kept.inner[0])?;
        let inside = cx.arena.mark();
        let qkv = kept.all.map_or_else(|| joint.qkv(cx), |all| all.qkv);
        joint.split(cx, qkv, kept.products, self.norms, joint.whole(width))?;
        joint.attend(cx, kept.o, Self::o_stride(joint, kept), kept.sums, qkv)?;
        cx.arena.release(inside);
        if out.is_none() && !self.output.needs_input() && kept.update.is_none() {
            cx.arena.release(mark);
            return Ok(());
        }
        let side_by_side = self.side_by_side(cx, joint, kept)?;
        let inner = kept.inner[1];
        if out.is_none() && kept.update.is_none() {
            self.output.forward_inner(cx, side_by_side, rows, inner)?;
            cx.arena.release(mark);
            return Ok(());
        }
        self.output.forward(cx, y, d, side_by_side, rows, inner)?;
        let Some(out) = out else {
            cx.arena.release(mark);
            return Ok(());
        };
        let clip = cx.t == Half::F16;
        modulations.gate(cx, offset + 2 * d, out, x, y, samples, clip)?;
        cx.arena.release(mark);
        Ok(())
    }

    /// Attention's output beside the activated hidden values: T `[rows, d + mlp]`.
    fn side_by_side(
        &self,
        cx: &Cx<'_>,
        joint: &Joint<'_>,
        kept: &KeptSingle,
    ) -> Result<View, CudaError> {
        let (d, mlp) = (joint.sizes.d, joint.sizes.mlp);
        let (rows, width) = (joint.shape.all_rows(), self.input.out_features);
        let both = match kept.both {
            Some(both) => both,
            None => {
                let both = cx.half(rows * (d + mlp));
                cx.stream
                    .copy_rows(both, 2 * (d + mlp), kept.o, 2 * d, 2 * d, rows)?;
                both
            }
        };
        elementwise::gelu_tanh(
            cx.stream,
            cx.t,
            both.elements_from(d),
            kept.products.elements_from(3 * d),
            rows,
            mlp,
            d + mlp,
            width,
        )?;
        Ok(both)
    }

    /// Turns `gradient` (of the output) into that of the input, and adds the factors' gradients or writes those of
    /// weights and modulations.
    ///
    /// Where `reaches_input` is false, nothing before the block is trained, and `gradient` is left undefined.
    #[allow(clippy::too_many_arguments)] // what the pass has at hand
    pub fn backward(
        &self,
        cx: &Cx<'_>,
        joint: &Joint<'_>,
        gradient: View,
        x: View,
        kept: &KeptSingle,
        (modulations, offset): (&Modulations, usize),
        reaches_input: bool,
    ) -> Result<(), CudaError> {
        let (d, mlp) = (joint.sizes.d, joint.sizes.mlp);
        let (rows, width) = (joint.shape.all_rows(), self.input.out_features);
        let places = [offset, offset + d];
        let samples = [joint.shape.b, joint.shape.tokens(), d];
        let mark = cx.arena.mark();
        let dproducts = cx.half(rows * width);
        let dboth = cx.half(rows * (d + mlp));
        let inside = cx.arena.mark();
        let dy = cx.half(rows * d);
        let y = kept.update;
        let gate = offset + 2 * d;
        modulations.gate_backward(cx, gate, dy, gradient, (y, &self.output), samples)?;
        let both = match (kept.both, self.output.needs_input()) {
            (Some(both), _) => Some(both),
            (None, true) => Some(self.side_by_side(cx, joint, kept)?),
            (None, false) => None,
        };
        self.output
            .backward(cx, Some(dboth), dy, both, rows, kept.inner[1])?;
        cx.arena.release(inside);
        self.input.gelu_backward(
            cx,
            (dproducts.elements_from(3 * d), width),
            (dboth.elements_from(d), d + mlp),
            (kept.products.elements_from(3 * d), width),
            rows,
            3 * d..width,
        )?;
        let inside = cx.arena.mark();
        let whole = joint.whole(width);
        let qkv = match kept.all {
            Some(all) => all.qkv,
            None => {
                let qkv = joint.qkv(cx);
                joint.split(cx, qkv, kept.products, self.norms, whole)?;
                qkv
            }
        };
        let dqkv = joint.qkv(cx);
        let o = (kept.o, Self::o_stride(joint, kept));
        joint.attend_backward(cx, dqkv, (dboth, d + mlp), o, kept.sums, qkv)?;
        let norms = self.norms;
        let gradients = self.input.head_gradients(self.norm_gradients);
        let products = kept.products;
        joint.split_backward(cx, dproducts, dqkv, products, norms, gradients, whole)?;
        cx.arena.release(inside);
        let normed = match (kept.all, self.input.needs_input()) {
            (Some(all), _) => Some(all.normed),
            (None, true) => {
                let normed = cx.half(rows * d);
                modulations.norm(cx, places, normed, None, x, samples)?;
                Some(normed)
            }
            (None, false) => None,
        };
        let dnormed = reaches_input.then(|| cx.half(rows * d));
        self.input
            .backward(cx, dnormed, dproducts, normed, rows, kept.inner[0])?;
        if let Some(dnormed) = dnormed {
            let of = (x, kept.all.and_then(|all| all.stats));
            modulations.norm_backward(cx, places, gradient, dnormed, of, samples, true)?;
        }
        cx.arena.release(mark);
        Ok(())
    }
}
