//! Modulated norms and gates, there and back, by where their vectors lie.
//!
//! Where the vectors' gradients are wanted, rows are usually short and many, and other kernels do the same work.

use mmdit::config::NORM_EPSILON;

use crate::error::CudaError;
use crate::model::linear::{Cx, Linear};
use crate::ops::{elementwise, norm, rows, sums};
use crate::view::View;

/// Modulation vectors of all blocks: T `[b, stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Modulations {
    /// All of them.
    pub view: View,
    /// Elements from one sample to the next.
    pub stride: usize,
    /// Where their gradients go, as `view`, if they are wanted.
    pub gradient: Option<View>,
}

const EPSILON: f32 = NORM_EPSILON as f32;

/// Samples, tokens of a sample, width.
pub type Samples = [usize; 3];

impl Modulations {
    fn at(&self, offset: usize) -> View {
        self.view.elements_from(offset)
    }

    /// `out = norm(x)·(1 + scale) + shift`; shift and scale are at these elements of a sample.
    pub fn norm(
        &self,
        cx: &Cx<'_>,
        places: [usize; 2],
        out: View,
        stats: Option<View>,
        x: View,
        [b, tokens, d]: Samples,
    ) -> Result<(), CudaError> {
        let [shift, scale] = places.map(|offset| self.at(offset));
        let (s, t, stride, rows) = (cx.stream, cx.t, self.stride, b * tokens);
        match stats {
            Some(stats) if d <= rows::MAX_WIDTH => rows::norm_rows(
                s, t, out, stats, x, shift, scale, stride, rows, tokens, d, EPSILON,
            ),
            _ => norm::ln_modulate(
                s, t, out, stats, x, shift, scale, stride, rows, tokens, d, EPSILON,
            ),
        }
    }

    /// The gradient of a norm's input `x` from that of its output, stored in `dx` or, with `accumulate`, added to it;
    /// and those of shift and scale, if they are wanted. Statistics that were not kept are computed again.
    #[allow(clippy::too_many_arguments)] // a kernel's
    pub fn norm_backward(
        &self,
        cx: &Cx<'_>,
        places: [usize; 2],
        dx: View,
        dy: View,
        (x, stats): (View, Option<View>),
        [b, tokens, d]: Samples,
        accumulate: bool,
    ) -> Result<(), CudaError> {
        let (s, t, stride, rows) = (cx.stream, cx.t, self.stride, b * tokens);
        let scale = self.at(places[1]);
        if let Some(gradient) = self.gradient {
            let outputs = places.map(|offset| gradient.elements_from(offset));
            let mark = cx.arena.mark();
            let stats = match stats {
                Some(stats) => stats,
                None => {
                    let stats = cx.f32(2 * rows);
                    let mark = cx.arena.mark();
                    let normed = cx.half(rows * d);
                    self.norm(cx, places, normed, Some(stats), x, [b, tokens, d])?;
                    cx.arena.release(mark);
                    stats
                }
            };
            let partials = cx.f32(sums::partials_len(b, tokens, d, 2));
            if d <= rows::MAX_WIDTH {
                sums::norms_backward(
                    s, t, outputs, dx, dy, x, stats, scale, stride, b, tokens, d, accumulate,
                    partials,
                )?;
                cx.arena.release(mark);
                return Ok(());
            }
            let [dshift, dscale] = outputs;
            sums::norms(
                s, t, dshift, dscale, stride, dy, x, stats, b, tokens, d, partials,
            )?;
            let stats = Some(stats);
            norm::ln_modulate_backward(
                s, t, dx, dy, x, stats, scale, stride, rows, tokens, d, EPSILON, accumulate,
            )?;
            cx.arena.release(mark);
            return Ok(());
        }
        norm::ln_modulate_backward(
            s, t, dx, dy, x, stats, scale, stride, rows, tokens, d, EPSILON, accumulate,
        )
    }

    /// `out = residual + gate·y`, clipped to what f16 holds if `clip`; the gate is at this element of a sample.
    #[allow(clippy::too_many_arguments)] // a kernel's
    pub fn gate(
        &self,
        cx: &Cx<'_>,
        offset: usize,
        out: View,
        residual: View,
        y: View,
        [b, tokens, d]: Samples,
        clip: bool,
    ) -> Result<(), CudaError> {
        let (s, t, stride, rows) = (cx.stream, cx.t, self.stride, b * tokens);
        let gate = self.at(offset);
        match self.gradient {
            None => elementwise::gate_residual(
                s, t, out, residual, gate, stride, y, rows, tokens, d, clip,
            ),
            Some(_) => rows::gate_rows(s, t, out, residual, gate, stride, y, rows, tokens, d, clip),
        }
    }

    /// [`Modulations::gate`] into `sum` without clipping, and [`Modulations::norm`] of that into `out`, with the same bits;
    /// in one pass where no gradients are wanted of the vectors. `out` may be `y`.
    #[allow(clippy::too_many_arguments)] // a kernel's
    pub fn gate_and_norm(
        &self,
        cx: &Cx<'_>,
        (gate, places): (usize, [usize; 2]),
        (sum, out): (View, View),
        stats: Option<View>,
        residual: View,
        y: View,
        [b, tokens, d]: Samples,
    ) -> Result<(), CudaError> {
        if self.gradient.is_some() {
            self.gate(cx, gate, sum, residual, y, [b, tokens, d], false)?;
            return self.norm(cx, places, out, stats, sum, [b, tokens, d]);
        }
        let [gate, shift, scale] = [gate, places[0], places[1]].map(|offset| self.at(offset));
        let (s, t, stride, rows) = (cx.stream, cx.t, self.stride, b * tokens);
        norm::gate_residual_ln_modulate(
            s, t, sum, out, stats, residual, gate, y, shift, scale, stride, rows, tokens, d,
            EPSILON, false,
        )
    }

    /// `dy = gate·dout`; and, if they are wanted, the gradients of the gate and of the bias of the layer that gave `y`,
    /// if that is trained.
    ///
    /// # Panics
    ///
    /// If they are wanted and `y` was not kept.
    pub fn gate_backward(
        &self,
        cx: &Cx<'_>,
        offset: usize,
        dy: View,
        dout: View,
        (y, layer): (Option<View>, &Linear),
        [b, tokens, d]: Samples,
    ) -> Result<(), CudaError> {
        let (s, t, stride) = (cx.stream, cx.t, self.stride);
        let gate = self.at(offset);
        let Some(gradient) = self.gradient else {
            let rows = b * tokens;
            return elementwise::gate_backward(s, t, dy, dout, gate, stride, rows, tokens, d);
        };
        let y = y.expect("what was gated is kept where gradients are wanted");
        let mark = cx.arena.mark();
        let partials = cx.f32(sums::partials_len(b, tokens, d, 2));
        let dgate = gradient.elements_from(offset);
        // A frozen layer's bias has its sum on the way, and nobody reads it.
        let bias = match layer.gradients {
            Some(wanted) => wanted.bias,
            None => cx.f32(d),
        };
        sums::gate_backward(
            s, t, dgate, bias, dy, dout, y, gate, stride, b, tokens, d, partials,
        )?;
        cx.arena.release(mark);
        Ok(())
    }
}
