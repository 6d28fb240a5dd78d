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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Arena;
    use crate::half_type::Half;
    use crate::model::linear::WeightScratch;
    use crate::stream::Stream;

    const T: Half = Half::F16;

    fn numbers(seed: u32, count: usize) -> Vec<f32> {
        let mut state = seed * 7919 + 1;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        let values: Vec<f32> = (0..count).map(|_| next()).collect();
        T.to_f32(&T.from_f32(&values))
    }

    fn assert_close(found: &[f32], expected: &[f32], what: &str) {
        assert_eq!(found.len(), expected.len());
        let norm =
            |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
        let off = norm(&mut found.iter().zip(expected).map(|(f, e)| f - e))
            / norm(&mut expected.iter().copied());
        assert!(off < 2e-3, "{what} is off by {off}");
    }

    /// Narrow rows and wide ones go through different kernels; statistics are not kept.
    #[test]
    fn a_norms_vectors_have_gradients_where_no_statistics_were_kept() {
        let [b, tokens] = [2, 3];
        for d in [48, rows::MAX_WIDTH + 8] {
            let stream = Stream::host();
            let memory = stream.allocate(1 << 20, "a test").expect("host memory");
            let arena = Arena::over(memory.view());
            let cx = Cx {
                stream: &stream,
                t: T,
                arena: &arena,
                weight_scratch: WeightScratch::new(&arena, [0; 2]),
            };
            let put = |values: &[f32]| {
                let view = cx.half(values.len());
                stream.upload(view, &T.from_f32(values)).expect("host");
                view
            };
            let get = |view: View, count: usize| {
                T.to_f32(&stream.download::<u16>(view, count).expect("host"))
            };
            let (n, stride) = (b * tokens * d, 2 * d);
            let (x, dy, vectors) = (numbers(1, n), numbers(2, n), numbers(3, b * stride));
            let gradient = cx.half(b * stride);
            let modulations = Modulations {
                view: put(&vectors),
                stride,
                gradient: Some(gradient),
            };
            let dx = cx.half(n);
            let of = (put(&x), None);
            let (places, samples) = ([0, d], [b, tokens, d]);
            modulations
                .norm_backward(&cx, places, dx, put(&dy), of, samples, false)
                .expect("host");

            let mut expected = vec![0.0; b * stride];
            let mut expected_dx = Vec::new();
            for row in 0..b * tokens {
                let at = row / tokens * stride;
                let (x, dy) = (&x[row * d..][..d], &dy[row * d..][..d]);
                let mean = |values: &mut dyn Iterator<Item = f32>| values.sum::<f32>() / d as f32;
                let middle = mean(&mut x.iter().copied());
                let variance = mean(&mut x.iter().map(|v| (v - middle).powi(2)));
                let inverse = (variance + EPSILON).sqrt().recip();
                let normed: Vec<f32> = x.iter().map(|v| (v - middle) * inverse).collect();
                let g: Vec<f32> = (0..d)
                    .map(|i| dy[i] * (1.0 + vectors[at + d + i]))
                    .collect();
                let mean_g = mean(&mut g.iter().copied());
                let mean_gn = mean(&mut g.iter().zip(&normed).map(|(g, n)| g * n));
                for i in 0..d {
                    expected[at + i] += dy[i];
                    expected[at + d + i] += dy[i] * normed[i];
                    expected_dx.push((g[i] - mean_g - normed[i] * mean_gn) * inverse);
                }
            }
            assert_close(&get(gradient, b * stride), &expected, "shift and scale");
            assert_close(&get(dx, n), &expected_dx, "the input");
        }
    }
}
