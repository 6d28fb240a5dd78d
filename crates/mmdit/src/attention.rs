//! Scaled dot-product attention over joined text and image tokens.

use burn::tensor::backend::Backend as _;
use burn::tensor::module::attention as fused_attention;
use burn::tensor::ops::AttentionModuleOptions;
use tensor::nn::{RmsNorm, exp};
use tensor::{Backend, DType, Tensor};

/// Splits the last axis into heads and normalises each: `(b, n, h·d)` → `(b, n, h, d)`.
pub(crate) fn heads(x: Tensor<3>, num_heads: usize, norm: Option<&RmsNorm>) -> Tensor<4> {
    let [b, n, width] = x.dims();
    let x = x.reshape([b, n, num_heads, width / num_heads]);
    match norm {
        Some(norm) => norm.forward(x),
        None => x,
    }
}

/// Joins the heads again: `(b, h, n, d)` → `(b, n, h·d)`.
pub(crate) fn join_heads(x: Tensor<4>) -> Tensor<3> {
    let [b, h, n, d] = x.dims();
    x.swap_dims(1, 2) // b n h d
        .reshape([b, n, h * d])
}

/// `softmax(QKᵀ/√d) V`: three times `(b, h, n, d)` → `(b, h, n, d)`. No mask: padding is attended.
///
/// Where operations are recorded for differentiation, it is written out in operations that Burn can differentiate;
/// elsewhere the backend's fused operation runs.
pub(crate) fn attend(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
    if Backend::ad_enabled(&q.device()) {
        attend_differentiably(q, k, v)
    } else {
        let options = AttentionModuleOptions {
            scale: None, // 1/√d
            softcap: None,
            is_causal: false,
        };
        fused_attention(q, k, v, None, None, options)
    }
}

/// The exponentials are divided by their sum after the product with V: that is one pass over n·d values instead of
/// two over n·n, going forward, and as much going backward.
fn attend_differentiably(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
    let [_, _, _, d] = q.dims();
    let dtype = v.dtype();
    let scores = (q * (d as f64).sqrt().recip())
        .matmul(k.swap_dims(2, 3)) // b h n n
        .cast(DType::F32);
    let max = scores.clone().detach().max_dim(3);
    let exponentials = exp(scores - max);
    let sums = exponentials.clone().sum_dim(3); // b h n 1
    let mixed = exponentials.cast(dtype).matmul(v); // b h n d
    (mixed.cast(DType::F32) / sums).cast(dtype)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::device::{cpu, training};
    use tensor::{from_f32, to_f32};

    fn values(seed: u32, count: usize) -> Vec<f32> {
        (0..count as u32)
            .map(|i| ((i * 37 + seed * 11) % 29) as f32 / 14.0 - 1.0)
            .collect()
    }

    #[test]
    fn equal_scores_average_the_values() {
        let zeros = || from_f32(vec![0.0; 4], [1, 1, 2, 2], &cpu());
        let v = from_f32(vec![1.0, 10.0, 3.0, 30.0], [1, 1, 2, 2], &cpu());
        let mixed = to_f32(&attend(zeros(), zeros(), v));
        for (m, e) in mixed.iter().zip([2.0, 20.0, 2.0, 20.0]) {
            assert!((m - e).abs() < 1e-5, "{mixed:?}");
        }
    }

    #[test]
    fn the_fused_and_the_differentiable_form_agree() {
        let shape = [2, 3, 5, 4];
        let run = |device| {
            let make = |seed| from_f32(values(seed, 120), shape, &device);
            to_f32(&attend(make(1) * 4.0, make(2), make(3)))
        };
        let (fused, written_out) = (run(cpu()), run(training(&cpu())));
        for (f, w) in fused.iter().zip(&written_out) {
            assert!((f - w).abs() < 1e-5, "{f} is not {w}");
        }
    }

    #[test]
    fn joining_undoes_splitting_into_heads() {
        let x = from_f32(values(4, 24), [1, 3, 8], &cpu());
        let again = join_heads(heads(x.clone(), 2, None).swap_dims(1, 2));
        assert_eq!(to_f32(&again), to_f32(&x));
    }
}
