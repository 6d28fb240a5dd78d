//! Modulated norms and gates, there and back, by where their vectors lie.

use mmdit::config::NORM_EPSILON;

use crate::error::CudaError;
use crate::model::linear::{Cx, Linear};
use crate::ops::modulated::{self, GateGradients, Modulated, NormGradients};
use crate::ops::sums;
use crate::view::View;

/// Modulation vectors of all blocks: f32 `[b, stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Modulations {
    /// All of them.
    pub view: View,
    /// Elements from one sample to the next.
    pub stride: usize,
    /// Where their gradients go, T `[b, stride]`, if they are wanted.
    pub gradient: Option<View>,
}

const EPSILON: f32 = NORM_EPSILON as f32;

/// Samples, tokens of a sample, width.
pub type Samples = [usize; 3];

impl Modulations {
    fn at(&self, offset: usize) -> View {
        self.view.skip(4 * offset)
    }

    fn of(&self, [b, tokens, d]: Samples) -> Modulated {
        Modulated {
            b,
            tokens,
            d,
            stride: self.stride,
            trained: self.gradient.is_some(),
        }
    }

    /// `out = norm(x)·(1 + scale) + shift`; shift and scale are at these elements of a sample.
    pub fn norm(
        &self,
        cx: &Cx<'_>,
        places: [usize; 2],
        out: View,
        stats: Option<View>,
        x: View,
        samples: Samples,
    ) -> Result<(), CudaError> {
        let (vectors, m) = (places.map(|offset| self.at(offset)), self.of(samples));
        modulated::norm(cx.stream, cx.t, out, stats, x, vectors, m, EPSILON)
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
        (x, mut stats): (View, Option<View>),
        samples: Samples,
        accumulate: bool,
    ) -> Result<(), CudaError> {
        let (s, t, m) = (cx.stream, cx.t, self.of(samples));
        let mark = cx.arena.mark();
        let mut gradients = None;
        if let Some(gradient) = self.gradient {
            if stats.is_none() {
                stats = Some(cx.f32(2 * m.b * m.tokens));
                let mark = cx.arena.mark();
                let normed = cx.half(m.b * m.tokens * m.d);
                self.norm(cx, places, normed, stats, x, samples)?;
                cx.arena.release(mark);
            }
            let [shift, scale] = places.map(|offset| gradient.elements_from(offset));
            gradients = Some(NormGradients {
                shift,
                scale,
                partials: cx.f32(sums::partials_len(m.b, m.tokens, m.d, 2)),
            });
        }
        let (of, scale) = ((x, stats), self.at(places[1]));
        modulated::norm_backward(s, t, dx, dy, of, scale, gradients, m, EPSILON, accumulate)?;
        cx.arena.release(mark);
        Ok(())
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
        samples: Samples,
        clip: bool,
    ) -> Result<(), CudaError> {
        let (gate, m) = (self.at(offset), self.of(samples));
        modulated::gate(cx.stream, cx.t, out, residual, gate, y, m, clip)
    }

    /// [`Modulations::gate`] into `sum` without clipping, and [`Modulations::norm`] of that into `out`, with the same
    /// bits. `out` may be `y`.
    #[allow(clippy::too_many_arguments)] // a kernel's
    pub fn gate_and_norm(
        &self,
        cx: &Cx<'_>,
        (gate, places): (usize, [usize; 2]),
        (sum, out): (View, View),
        stats: Option<View>,
        residual: View,
        y: View,
        samples: Samples,
    ) -> Result<(), CudaError> {
        let (s, t, m) = (cx.stream, cx.t, self.of(samples));
        let (gate, vectors) = (self.at(gate), places.map(|offset| self.at(offset)));
        let outputs = [sum, out];
        modulated::gate_and_norm(s, t, outputs, stats, residual, gate, y, vectors, m, EPSILON)
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
        samples: Samples,
    ) -> Result<(), CudaError> {
        let m = self.of(samples);
        let mark = cx.arena.mark();
        let gradients = self.gradient.map(|gradient| GateGradients {
            partials: cx.f32(sums::partials_len(m.b, m.tokens, m.d, 2)),
            gate: gradient.elements_from(offset),
            // A frozen layer's bias has its sum on the way, and nobody reads it.
            bias: match layer.gradients {
                Some(wanted) => wanted.bias,
                None => cx.f32(m.d),
            },
            y: y.expect("what was gated is kept where gradients are wanted"),
        });
        let gate = self.at(offset);
        modulated::gate_backward(cx.stream, cx.t, dy, dout, gate, gradients, m)?;
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
        for d in [48, modulated::MAX_NARROW + 8] {
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
            let view = cx.f32(vectors.len());
            stream.upload(view, &vectors).expect("host");
            let modulations = Modulations {
                view,
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
