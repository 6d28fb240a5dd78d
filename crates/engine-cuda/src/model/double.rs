//! A double block, forward and backward: text and image with their own weights, joined in attention.
//!
//! Kept from forward to backward, per token and stream: the products before the head norms (3d), the sum after
//! attention (d) and the MLP's hidden values before GELU (4d); attention's output (d) and sums; `x·Aᵀ` of adapted
//! layers. Everything else is cheap to compute again: norms, GELU, turned queries and keys.
//!
//! Source: `FluxTransformerBlock`, diffusers 0.42; the backward pass is derived by hand.

use mmdit::config::NORM_EPSILON;

use crate::error::CudaError;
use crate::half_type::Half;
use crate::model::joint::Joint;
use crate::model::linear::Cx;
use crate::model::network::{DoubleStream, DoubleWeights};
use crate::model::sizes::STREAMS;
use crate::ops::{elementwise, norm};
use crate::view::View;

/// Modulation vectors of all blocks: T `[b, stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Modulations {
    /// All of them.
    pub view: View,
    /// Elements from one sample to the next.
    pub stride: usize,
}

impl Modulations {
    /// `N` vectors of `d` elements, the first at element `offset` of a sample.
    pub fn vectors<const N: usize>(&self, offset: usize, d: usize) -> [View; N] {
        std::array::from_fn(|i| self.view.elements_from(offset + i * d))
    }
}

/// What a stream keeps.
#[derive(Clone, Copy, Debug)]
pub struct KeptStream {
    qkv: View,
    sum: View,
    hidden: View,
    /// `x·Aᵀ` of qkv, out, up, down.
    inner: [Option<View>; 4],
}

/// What a double block keeps.
#[derive(Clone, Copy, Debug)]
pub struct KeptDouble {
    streams: [KeptStream; 2],
    o: View,
    sums: View,
}

impl DoubleWeights {
    /// Memory for what is kept.
    pub fn keep(&self, cx: &Cx<'_>, joint: &Joint<'_>) -> KeptDouble {
        let d = joint.sizes.d;
        let streams = STREAMS.map(|s| {
            let rows = joint.shape.rows(s);
            let w = &self.streams[s];
            KeptStream {
                qkv: cx.half(rows * 3 * d),
                sum: cx.half(rows * d),
                hidden: cx.half(rows * joint.sizes.mlp),
                inner: [&w.qkv, &w.out, &w.up, &w.down].map(|linear| linear.keep(cx, rows)),
            }
        });
        let (o, sums) = joint.output(cx);
        KeptDouble { streams, o, sums }
    }

    /// T `[rows, d]` of text and image → the same in `out` (which may be `x`). Without `out` only what is kept is
    /// computed, to the same bits.
    pub fn forward(
        &self,
        cx: &Cx<'_>,
        joint: &Joint<'_>,
        out: Option<[View; 2]>,
        x: [View; 2],
        kept: &KeptDouble,
        (modulations, offset): (&Modulations, usize),
    ) -> Result<(), CudaError> {
        let d = joint.sizes.d;
        let vectors = |s: usize| modulations.vectors::<6>(offset + 6 * s * d, d);
        let mark = cx.arena.mark();
        let qkv = joint.qkv(cx);
        for s in STREAMS {
            let rows = joint.shape.rows(s);
            let w = &self.streams[s];
            let mark = cx.arena.mark();
            let normed = cx.half(rows * d);
            self.normed(cx, joint, s, normed, x[s], modulations, &vectors(s)[..2])?;
            let [inner, ..] = kept.streams[s].inner;
            w.qkv
                .forward(cx, kept.streams[s].qkv, 3 * d, normed, rows, inner)?;
            joint.split(cx, qkv, kept.streams[s].qkv, w.norms, joint.stream(s))?;
            cx.arena.release(mark);
        }
        joint.attend(cx, kept.o, d, kept.sums, qkv)?;
        cx.arena.release(mark);

        for s in STREAMS {
            let rows = joint.shape.rows(s);
            let per_sample = rows / joint.shape.b;
            let (w, kept_s) = (&self.streams[s], &kept.streams[s]);
            let [_, _, gate_msa, shift_mlp, scale_mlp, gate_mlp] = vectors(s);
            let [_, inner_out, inner_up, inner_down] = kept_s.inner;
            let mark = cx.arena.mark();
            let mixed = joint.part(cx, kept.o, s)?;
            let y = cx.half(rows * d);
            w.out.forward(cx, y, d, mixed, rows, inner_out)?;
            let stride = modulations.stride;
            let gated = |out, residual, gate, clip| {
                elementwise::gate_residual(
                    cx.stream, cx.t, out, residual, gate, stride, y, rows, per_sample, d, clip,
                )
            };
            gated(kept_s.sum, x[s], gate_msa, false)?;
            // From here on `y` holds the normed sum, and at last the MLP's output.
            let shifts = [shift_mlp, scale_mlp];
            self.normed(cx, joint, s, y, kept_s.sum, modulations, &shifts)?;
            let mlp = joint.sizes.mlp;
            w.up.forward(cx, kept_s.hidden, mlp, y, rows, inner_up)?;
            if out.is_none() && !w.down.needs_input() {
                cx.arena.release(mark);
                continue;
            }
            let hidden = cx.half(rows * mlp);
            elementwise::gelu_tanh(cx.stream, cx.t, hidden, kept_s.hidden, rows, mlp, mlp, mlp)?;
            let Some(out) = out else {
                w.down.forward_inner(cx, hidden, rows, inner_down)?;
                cx.arena.release(mark);
                continue;
            };
            w.down.forward(cx, y, d, hidden, rows, inner_down)?;
            // Upstream clips the text stream only: it is the one that overflows.
            let clip = s == 0 && cx.t == Half::F16;
            gated(out[s], kept_s.sum, gate_mlp, clip)?;
            cx.arena.release(mark);
        }
        Ok(())
    }

    /// `norm(x)·(1 + scale) + shift`.
    #[allow(clippy::too_many_arguments)] // a kernel's
    fn normed(
        &self,
        cx: &Cx<'_>,
        joint: &Joint<'_>,
        stream: usize,
        out: View,
        x: View,
        modulations: &Modulations,
        shift_and_scale: &[View],
    ) -> Result<(), CudaError> {
        let rows = joint.shape.rows(stream);
        norm::ln_modulate(
            cx.stream,
            cx.t,
            out,
            None,
            x,
            shift_and_scale[0],
            shift_and_scale[1],
            modulations.stride,
            rows,
            rows / joint.shape.b,
            joint.sizes.d,
            NORM_EPSILON as f32,
        )
    }

    /// Turns `gradient` (of both outputs) into that of both inputs, and adds the factors' gradients.
    ///
    /// Where `reaches_input` is false, nothing before the block is trained, and `gradient` is left undefined.
    #[allow(clippy::too_many_arguments)] // what the pass has at hand
    pub fn backward(
        &self,
        cx: &Cx<'_>,
        joint: &Joint<'_>,
        gradient: [View; 2],
        x: [View; 2],
        kept: &KeptDouble,
        (modulations, offset): (&Modulations, usize),
        reaches_input: bool,
    ) -> Result<(), CudaError> {
        let d = joint.sizes.d;
        let vectors = |s: usize| modulations.vectors::<6>(offset + 6 * s * d, d);
        for s in STREAMS {
            self.mlp_backward(cx, joint, s, gradient[s], kept, modulations, vectors(s))?;
        }

        let mark = cx.arena.mark();
        let d_o = cx.half(joint.shape.all_rows() * d);
        for s in STREAMS {
            let rows = joint.shape.rows(s);
            let w: &DoubleStream = &self.streams[s];
            let [_, _, gate_msa, ..] = vectors(s);
            let room = joint.room(cx, d_o, s);
            let inside = cx.arena.mark();
            let dy = cx.half(rows * d);
            elementwise::gate_backward(
                cx.stream,
                cx.t,
                dy,
                gradient[s],
                gate_msa,
                modulations.stride,
                rows,
                rows / joint.shape.b,
                d,
            )?;
            let mixed = match w.out.needs_input() {
                true => Some(joint.part(cx, kept.o, s)?),
                false => None,
            };
            let inner = kept.streams[s].inner[1];
            w.out.backward(cx, Some(room), dy, mixed, rows, inner)?;
            joint.put(cx, d_o, room, s)?;
            cx.arena.release(inside);
        }
        let qkv = joint.qkv(cx);
        for s in STREAMS {
            let norms = self.streams[s].norms;
            joint.split(cx, qkv, kept.streams[s].qkv, norms, joint.stream(s))?;
        }
        let dqkv = joint.qkv(cx);
        joint.attend_backward(cx, dqkv, (d_o, d), (kept.o, d), kept.sums, qkv)?;
        for s in STREAMS {
            let rows = joint.shape.rows(s);
            let w = &self.streams[s];
            let inside = cx.arena.mark();
            let dproducts = cx.half(rows * 3 * d);
            let saved = kept.streams[s].qkv;
            joint.split_backward(cx, dproducts, dqkv, saved, w.norms, joint.stream(s))?;
            let [shift, scale, ..] = vectors(s);
            let normed = match w.qkv.needs_input() {
                true => {
                    let normed = cx.half(rows * d);
                    self.normed(cx, joint, s, normed, x[s], modulations, &[shift, scale])?;
                    Some(normed)
                }
                false => None,
            };
            let dnormed = reaches_input.then(|| cx.half(rows * d));
            let inner = kept.streams[s].inner[0];
            w.qkv
                .backward(cx, dnormed, dproducts, normed, rows, inner)?;
            if let Some(dnormed) = dnormed {
                self.normed_backward(cx, joint, s, gradient[s], dnormed, x[s], modulations, scale)?;
            }
            cx.arena.release(inside);
        }
        cx.arena.release(mark);
        Ok(())
    }

    /// From the gradient of a stream's output to that of the sum after attention, in place.
    #[allow(clippy::too_many_arguments)] // what the block has at hand
    fn mlp_backward(
        &self,
        cx: &Cx<'_>,
        joint: &Joint<'_>,
        s: usize,
        gradient: View,
        kept: &KeptDouble,
        modulations: &Modulations,
        [_, _, _, shift, scale, gate]: [View; 6],
    ) -> Result<(), CudaError> {
        let (d, mlp) = (joint.sizes.d, joint.sizes.mlp);
        let rows = joint.shape.rows(s);
        let (w, kept) = (&self.streams[s], &kept.streams[s]);
        let [_, _, inner_up, inner_down] = kept.inner;
        let mark = cx.arena.mark();
        let dy = cx.half(rows * d);
        elementwise::gate_backward(
            cx.stream,
            cx.t,
            dy,
            gradient,
            gate,
            modulations.stride,
            rows,
            rows / joint.shape.b,
            d,
        )?;
        let dhidden = cx.half(rows * mlp);
        let inside = cx.arena.mark();
        let activated = match w.down.needs_input() {
            true => {
                let activated = cx.half(rows * mlp);
                elementwise::gelu_tanh(
                    cx.stream,
                    cx.t,
                    activated,
                    kept.hidden,
                    rows,
                    mlp,
                    mlp,
                    mlp,
                )?;
                Some(activated)
            }
            false => None,
        };
        w.down
            .backward(cx, Some(dhidden), dy, activated, rows, inner_down)?;
        cx.arena.release(inside);
        elementwise::gelu_tanh_backward(
            cx.stream,
            cx.t,
            dhidden,
            dhidden,
            kept.hidden,
            rows,
            mlp,
            mlp,
            mlp,
            mlp,
        )?;
        let normed = match w.up.needs_input() {
            true => {
                let normed = cx.half(rows * d);
                self.normed(cx, joint, s, normed, kept.sum, modulations, &[shift, scale])?;
                Some(normed)
            }
            false => None,
        };
        // `dy` is used up: it now takes the gradient of the normed sum.
        w.up.backward(cx, Some(dy), dhidden, normed, rows, inner_up)?;
        self.normed_backward(cx, joint, s, gradient, dy, kept.sum, modulations, scale)?;
        cx.arena.release(mark);
        Ok(())
    }

    /// Adds the gradient of a norm's input.
    #[allow(clippy::too_many_arguments)] // a kernel's
    fn normed_backward(
        &self,
        cx: &Cx<'_>,
        joint: &Joint<'_>,
        stream: usize,
        gradient: View,
        dnormed: View,
        x: View,
        modulations: &Modulations,
        scale: View,
    ) -> Result<(), CudaError> {
        let rows = joint.shape.rows(stream);
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
            rows / joint.shape.b,
            joint.sizes.d,
            NORM_EPSILON as f32,
            true,
        )
    }
}
