//! Modulation vectors with what their backward pass needs, and back to the embedders of time, guidance and caption.
//!
//! All of it has one row per sample, so it is kept whole.

use mmdit::config::NUM_SINUSOID_CHANNELS;

use crate::error::CudaError;
use crate::gemm::{Matrix, Output, Product};
use crate::model::linear::{Cx, Linear};
use crate::model::network::{EmbedderWeights, Network};
use crate::model::pass::Conditions;
use crate::ops::elementwise;
use crate::view::View;

/// What one embedder keeps: its input, the values before and behind SiLU, and `x·Aᵀ` of its layers.
struct KeptEmbedder {
    input: View,
    hidden: View,
    active: View,
    inner: [Option<View>; 2],
}

/// What the conditions keep: their sum before and behind SiLU, T `[rows, d]`, and `x·Aᵀ` of the modulations' layers.
pub(crate) struct KeptConditions {
    embedders: Vec<KeptEmbedder>,
    sum: View,
    active: View,
    inner: Vec<Option<View>>,
}

impl Network {
    /// Whether gradients are wanted of what gives the modulation vectors, and so of these.
    pub(crate) fn trains_conditions(&self) -> bool {
        let mut layers = self.modulation_layers().into_iter();
        self.trains_embedders() || layers.any(|(linear, _)| linear.needs_input())
    }

    /// Whether gradients are wanted of the embedders of time, guidance and caption.
    fn trains_embedders(&self) -> bool {
        let mut embedders = self.embedders();
        embedders.any(|e| {
            [&e.linear_1, &e.linear_2]
                .into_iter()
                .any(Linear::needs_input)
        })
    }

    /// The embedders that there are, in the order in which their outputs are summed.
    fn embedders(&self) -> impl Iterator<Item = &EmbedderWeights> {
        [
            Some(&self.timestep),
            self.guidance.as_ref(),
            Some(&self.pooled),
        ]
        .into_iter()
        .flatten()
    }

    /// Modulation vectors of all blocks, f32 `[rows, width]`: what all tokens of a sample share stays in f32 from the
    /// noise level on. What goes back needs is kept in T.
    ///
    /// # Panics
    ///
    /// If there is a guidance embedder and no guidance scale.
    pub(crate) fn modulate_kept(
        &self,
        cx: &Cx<'_>,
        out: View,
        conditions: &Conditions,
        rows: usize,
    ) -> Result<KeptConditions, CudaError> {
        let (s, t, d) = (cx.stream, cx.t, self.sizes.d);
        let (wide, sum, active) = (cx.f32(rows * d), cx.half(rows * d), cx.half(rows * d));
        let waves = |numbers: View| -> Result<[View; 2], CudaError> {
            let n = rows * NUM_SINUSOID_CHANNELS;
            let waves = [cx.f32(n), cx.half(n)];
            elementwise::sinusoids(s, t, waves[0], waves[1], numbers, rows)?;
            Ok(waves)
        };
        let mut inputs = vec![waves(conditions.times)?];
        if self.guidance.is_some() {
            let guidance = conditions
                .guidance
                .expect("this transformer needs a guidance scale");
            inputs.push(waves(guidance)?);
        }
        let num_pooled = rows * self.pooled.linear_1.in_features;
        let pooled = cx.half(num_pooled);
        elementwise::to_half(s, t, pooled, conditions.pooled, num_pooled)?;
        inputs.push([conditions.pooled, pooled]);
        let mut embedders = Vec::new();
        for (i, (embedder, input)) in self.embedders().zip(inputs).enumerate() {
            let kept = KeptEmbedder {
                input: input[1],
                hidden: cx.half(rows * d),
                active: cx.half(rows * d),
                inner: [&embedder.linear_1, &embedder.linear_2].map(|linear| linear.keep(cx, rows)),
            };
            let (first, second) = (&embedder.linear_1, &embedder.linear_2);
            let hidden = cx.f32(rows * d);
            first.forward_wide(cx, (hidden, d), input, rows, kept.inner[0], false)?;
            let halves = [kept.active, kept.hidden];
            elementwise::silu(s, t, hidden, halves, hidden, rows * d)?;
            let hidden = [hidden, kept.active];
            second.forward_wide(cx, (wide, d), hidden, rows, kept.inner[1], i > 0)?;
            embedders.push(kept);
        }
        elementwise::silu(s, t, wide, [active, sum], wide, rows * d)?;
        let mut inner = Vec::new();
        let stride = self.sizes.modulation_width();
        for (linear, offset) in self.modulation_layers() {
            let kept = linear.keep(cx, rows);
            let to = (out.skip(4 * offset), stride);
            linear.forward_wide(cx, to, [wide, active], rows, kept, false)?;
            inner.push(kept);
        }
        Ok(KeptConditions {
            embedders,
            sum,
            active,
            inner,
        })
    }

    /// From the gradients of all modulation vectors, T `[rows, width]`, to those of every weight before them that is
    /// trained, and of every factor.
    pub(crate) fn modulate_backward(
        &self,
        cx: &Cx<'_>,
        gradient: View,
        kept: &KeptConditions,
        rows: usize,
    ) -> Result<(), CudaError> {
        let (s, t, d) = (cx.stream, cx.t, self.sizes.d);
        let stride = self.sizes.modulation_width();
        let mark = cx.arena.mark();
        let wide = cx.f32(rows * d);
        let (dsum, dhidden) = (cx.half(rows * d), cx.half(rows * d));
        let goes_on = self.trains_embedders();
        for (i, (linear, offset)) in self.modulation_layers().into_iter().enumerate() {
            let dy = gradient.elements_from(offset);
            linear.weight_backward(cx, dy, stride, kept.active, rows)?;
            if !goes_on {
                let (x, inner) = (Some(kept.active), kept.inner[i]);
                linear.factors_backward(cx, None, (dy, stride), x, rows, inner)?;
                continue;
            }
            let product = Product {
                m: rows,
                n: d,
                k: linear.out_features,
                a: Matrix::rows(dy, stride),
                b: Matrix::rows(linear.half_weight(cx)?, d),
                c: wide,
                c_stride: d,
                output: Output::F32,
                alpha: 1.0,
                beta: if i == 0 { 0.0 } else { 1.0 },
                bias: None,
            };
            s.product(t, &product)?;
            let dx = Some((wide, Output::F32));
            let (x, inner) = (Some(kept.active), kept.inner[i]);
            linear.factors_backward(cx, dx, (dy, stride), x, rows, inner)?;
        }
        if !goes_on {
            cx.arena.release(mark);
            return Ok(());
        }
        elementwise::to_half(s, t, dsum, wide, rows * d)?;
        elementwise::silu_backward(s, t, dsum, dsum, kept.sum, rows * d)?;
        for (embedder, kept) in self.embedders().zip(&kept.embedders) {
            let (first, second) = (&embedder.linear_1, &embedder.linear_2);
            let [first_inner, second_inner] = kept.inner;
            let active = Some(kept.active);
            second.backward(cx, Some(dhidden), dsum, active, rows, second_inner)?;
            elementwise::silu_backward(s, t, dhidden, dhidden, kept.hidden, rows * d)?;
            first.backward(cx, None, dhidden, Some(kept.input), rows, first_inner)?;
        }
        cx.arena.release(mark);
        Ok(())
    }
}
