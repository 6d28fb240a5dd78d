//! Modulation vectors with what their backward pass needs, and back to the embedders of time, guidance and caption.
//!
//! All of it has one row per sample, so it is kept whole.

use mmdit::config::NUM_SINUSOID_CHANNELS;

use crate::error::CudaError;
use crate::gemm::{Matrix, Output, Product};
use crate::model::linear::Cx;
use crate::model::network::{EmbedderWeights, Network};
use crate::model::pass::Conditions;
use crate::ops::elementwise;
use crate::view::View;

/// What one embedder keeps: its input, and the values before and behind SiLU.
struct KeptEmbedder {
    input: View,
    hidden: View,
    active: View,
}

/// What the conditions keep: their sum before and behind SiLU, T `[rows, d]`.
pub(super) struct KeptConditions {
    embedders: Vec<KeptEmbedder>,
    sum: View,
    active: View,
}

impl Network {
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

    /// As [`Network::modulate`], to the same bits.
    ///
    /// # Panics
    ///
    /// If there is a guidance embedder and no guidance scale.
    pub(super) fn modulate_kept(
        &self,
        cx: &Cx<'_>,
        out: View,
        conditions: &Conditions,
        rows: usize,
    ) -> Result<KeptConditions, CudaError> {
        let (s, t, d) = (cx.stream, cx.t, self.sizes.d);
        let (sum, active) = (cx.half(rows * d), cx.half(rows * d));
        let waves = |numbers: View| -> Result<View, CudaError> {
            let waves = cx.half(rows * NUM_SINUSOID_CHANNELS);
            elementwise::sinusoids(s, t, waves, numbers, rows)?;
            Ok(waves)
        };
        let mut inputs = vec![waves(conditions.times)?];
        if self.guidance.is_some() {
            let guidance = conditions
                .guidance
                .expect("this transformer needs a guidance scale");
            inputs.push(waves(guidance)?);
        }
        inputs.push(conditions.pooled);
        let mut embedders = Vec::new();
        for (i, (embedder, input)) in self.embedders().zip(inputs).enumerate() {
            let kept = KeptEmbedder {
                input,
                hidden: cx.half(rows * d),
                active: cx.half(rows * d),
            };
            let (first, second) = (&embedder.linear_1, &embedder.linear_2);
            first.forward(cx, kept.hidden, d, input, rows, None)?;
            elementwise::silu(s, t, kept.active, kept.hidden, rows * d)?;
            if i == 0 {
                second.forward(cx, sum, d, kept.active, rows, None)?;
            } else {
                // `active` is not needed before the sum stands.
                second.forward(cx, active, d, kept.active, rows, None)?;
                elementwise::add(s, t, sum, active, rows * d)?;
            }
            embedders.push(kept);
        }
        elementwise::silu(s, t, active, sum, rows * d)?;
        self.modulations_of(cx, out, active, rows)?;
        Ok(KeptConditions {
            embedders,
            sum,
            active,
        })
    }

    /// From the gradients of all modulation vectors, T `[rows, width]`, to those of every weight before them.
    pub(super) fn modulate_backward(
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
        for (i, (linear, offset)) in self.modulation_layers().into_iter().enumerate() {
            let dy = gradient.elements_from(offset);
            linear.weight_backward(cx, dy, stride, kept.active, rows)?;
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
        }
        elementwise::to_half(s, t, dsum, wide, rows * d)?;
        elementwise::silu_backward(s, t, dsum, dsum, kept.sum, rows * d)?;
        for (embedder, kept) in self.embedders().zip(&kept.embedders) {
            let (first, second) = (&embedder.linear_1, &embedder.linear_2);
            second.backward(cx, Some(dhidden), dsum, Some(kept.active), rows, None)?;
            elementwise::silu_backward(s, t, dhidden, dhidden, kept.hidden, rows * d)?;
            first.backward(cx, None, dhidden, Some(kept.input), rows, None)?;
        }
        cx.arena.release(mark);
        Ok(())
    }
}
