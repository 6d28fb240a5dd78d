//! A single block, forward and backward: text and image as one sequence, attention and MLP side by side.
//!
//! Kept from forward to backward, per token: the input product (7d: queries, keys and values before the head norms,
//! hidden values before GELU) and attention's output (d).
//!
//! Source: `FluxSingleTransformerBlock`, diffusers 0.42; the backward pass is derived by hand.

use mmdit::config::NORM_EPSILON;

use crate::error::CudaError;
use crate::half_type::Half;
use crate::model::double::Modulations;
use crate::model::joint::Joint;
use crate::model::linear::Cx;
use crate::model::network::SingleWeights;
use crate::ops::{elementwise, norm};
use crate::view::View;

/// What a single block keeps.
#[derive(Clone, Copy, Debug)]
pub struct KeptSingle {
    products: View,
    o: View,
    sums: View,
    /// `x·Aᵀ` of input and output.
    inner: [Option<View>; 2],
}

impl SingleWeights {
    /// Memory for what is kept.
    pub fn keep(&self, cx: &Cx<'_>, joint: &Joint<'_>) -> KeptSingle {
        let rows = joint.shape.all_rows();
        let products = cx.half(rows * self.input.out_features);
        let (o, sums) = joint.output(cx);
        KeptSingle {
            products,
            o,
            sums,
            inner: [&self.input, &self.output].map(|linear| linear.keep(cx, rows)),
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
        let [shift, scale, gate] = modulations.vectors::<3>(offset, d);
        let mark = cx.arena.mark();
        let y = cx.half(rows * d);
        self.normed(cx, joint, y, x, modulations, [shift, scale])?;
        self.input
            .forward(cx, kept.products, width, y, rows, kept.inner[0])?;
        let inside = cx.arena.mark();
        let qkv = joint.qkv(cx);
        joint.split(cx, qkv, kept.products, self.norms, joint.whole(width))?;
        joint.attend(cx, kept.o, d, kept.sums, qkv)?;
        cx.arena.release(inside);
        if out.is_none() && !self.output.needs_input() {
            cx.arena.release(mark);
            return Ok(());
        }
        let side_by_side = self.side_by_side(cx, joint, kept)?;
        let Some(out) = out else {
            let inner = kept.inner[1];
            self.output.forward_inner(cx, side_by_side, rows, inner)?;
            cx.arena.release(mark);
            return Ok(());
        };
        self.output
            .forward(cx, y, d, side_by_side, rows, kept.inner[1])?;
        let clip = cx.t == Half::F16;
        elementwise::gate_residual(
            cx.stream,
            cx.t,
            out,
            x,
            gate,
            modulations.stride,
            y,
            rows,
            joint.shape.tokens(),
            d,
            clip,
        )?;
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
        let both = cx.half(rows * (d + mlp));
        cx.stream
            .copy_rows(both, 2 * (d + mlp), kept.o, 2 * d, 2 * d, rows)?;
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

    fn normed(
        &self,
        cx: &Cx<'_>,
        joint: &Joint<'_>,
        out: View,
        x: View,
        modulations: &Modulations,
        [shift, scale]: [View; 2],
    ) -> Result<(), CudaError> {
        norm::ln_modulate(
            cx.stream,
            cx.t,
            out,
            None,
            x,
            shift,
            scale,
            modulations.stride,
            joint.shape.all_rows(),
            joint.shape.tokens(),
            joint.sizes.d,
            NORM_EPSILON as f32,
        )
    }

    /// Turns `gradient` (of the output) into that of the input, and adds the factors' gradients.
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
        let [shift, scale, gate] = modulations.vectors::<3>(offset, d);
        let mark = cx.arena.mark();
        let dproducts = cx.half(rows * width);
        let dboth = cx.half(rows * (d + mlp));
        let inside = cx.arena.mark();
        let dy = cx.half(rows * d);
        elementwise::gate_backward(
            cx.stream,
            cx.t,
            dy,
            gradient,
            gate,
            modulations.stride,
            rows,
            joint.shape.tokens(),
            d,
        )?;
        let both = match self.output.needs_input() {
            true => Some(self.side_by_side(cx, joint, kept)?),
            false => None,
        };
        self.output
            .backward(cx, Some(dboth), dy, both, rows, kept.inner[1])?;
        cx.arena.release(inside);
        elementwise::gelu_tanh_backward(
            cx.stream,
            cx.t,
            dproducts.elements_from(3 * d),
            dboth.elements_from(d),
            kept.products.elements_from(3 * d),
            rows,
            mlp,
            width,
            d + mlp,
            width,
        )?;
        let inside = cx.arena.mark();
        let qkv = joint.qkv(cx);
        joint.split(cx, qkv, kept.products, self.norms, joint.whole(width))?;
        let dqkv = joint.qkv(cx);
        joint.attend_backward(cx, dqkv, (dboth, d + mlp), (kept.o, d), kept.sums, qkv)?;
        let whole = joint.whole(width);
        joint.split_backward(cx, dproducts, dqkv, kept.products, self.norms, whole)?;
        cx.arena.release(inside);
        let normed = match self.input.needs_input() {
            true => {
                let normed = cx.half(rows * d);
                self.normed(cx, joint, normed, x, modulations, [shift, scale])?;
                Some(normed)
            }
            false => None,
        };
        let dnormed = reaches_input.then(|| cx.half(rows * d));
        self.input
            .backward(cx, dnormed, dproducts, normed, rows, kept.inner[0])?;
        if let Some(dnormed) = dnormed {
            norm::ln_modulate_backward(
                cx.stream,
                cx.t,
                gradient,
                dnormed,
                x,
                None,
                scale,
                modulations.stride,
                rows,
                joint.shape.tokens(),
                d,
                NORM_EPSILON as f32,
                true,
            )?;
        }
        cx.arena.release(mark);
        Ok(())
    }
}
