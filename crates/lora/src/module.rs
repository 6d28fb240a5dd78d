//! The two factors of one linear layer's adapter.

use crate::{LoraError, Target};

/// A factored addition to a linear layer's weight: `alpha / rank · B A`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraModule {
    /// Columns of `B` and rows of `A`.
    pub rank: usize,
    /// The addition's strength, times the rank.
    pub alpha: f32,
    /// Width of the layer's input.
    pub in_features: usize,
    /// Width of the layer's output.
    pub out_features: usize,
    /// `[rank, in]`, row by row.
    pub a: Vec<f32>,
    /// `[out, rank]`, row by row.
    pub b: Vec<f32>,
}

impl LoraModule {
    /// A module from its factors; the rank is what their lengths say.
    ///
    /// # Panics
    ///
    /// If the lengths fit no positive rank, or different ones.
    pub fn new(
        alpha: f32,
        in_features: usize,
        out_features: usize,
        a: Vec<f32>,
        b: Vec<f32>,
    ) -> Self {
        let rank = a.len() / in_features.max(1);
        assert!(
            rank > 0,
            "rank 0: A has {} numbers for {in_features} inputs",
            a.len()
        );
        assert_eq!(
            a.len(),
            rank * in_features,
            "numbers in A for rank {rank} and {in_features} inputs"
        );
        assert_eq!(
            b.len(),
            out_features * rank,
            "numbers in B for rank {rank} and {out_features} outputs"
        );
        Self {
            rank,
            alpha,
            in_features,
            out_features,
            a,
            b,
        }
    }

    /// An untrained module: `A` normal with deviation `1 / rank`, `B` zero.
    ///
    /// `normal` gives draws of the standard normal distribution.
    ///
    /// Source: `init_lora_weights="gaussian"`, peft 0.21.
    ///
    /// # Errors
    ///
    /// If the layer takes no such rank, see [`LoraError::RankTooLarge`].
    ///
    /// # Panics
    ///
    /// If `rank` is 0.
    pub fn gaussian(
        rank: usize,
        alpha: f32,
        target: &Target,
        mut normal: impl FnMut() -> f32,
    ) -> Result<Self, LoraError> {
        let deviation = 1.0 / rank as f32;
        Self::untrained(rank, alpha, target, || normal() * deviation)
    }

    /// An untrained module: `A` uniform between `±1 / √in`, `B` zero.
    ///
    /// `uniform` gives draws from [0, 1).
    ///
    /// Source: `init_lora_weights=True` (Kaiming with `a = √5`), peft 0.21.
    ///
    /// # Errors
    ///
    /// If the layer takes no such rank, see [`LoraError::RankTooLarge`].
    ///
    /// # Panics
    ///
    /// If `rank` is 0.
    pub fn kaiming(
        rank: usize,
        alpha: f32,
        target: &Target,
        mut uniform: impl FnMut() -> f32,
    ) -> Result<Self, LoraError> {
        let bound = 1.0 / (target.in_features as f32).sqrt();
        Self::untrained(rank, alpha, target, || (2.0 * uniform() - 1.0) * bound)
    }

    /// A module with `A` drawn row by row and `B` zero.
    fn untrained(
        rank: usize,
        alpha: f32,
        target: &Target,
        mut draw: impl FnMut() -> f32,
    ) -> Result<Self, LoraError> {
        let (in_features, out_features) = (target.in_features, target.out_features);
        // From the narrower side on a rank adds nothing, but peft takes any, and a recipe's one rank may be right for
        // most layers and more than the inputs of a narrow one (FLUX's `x_embedder` has 64). Beyond the wider side a
        // rank suits no layer of such a size, and cannot be allocated.
        let limit = in_features.max(out_features);
        if rank > limit {
            return Err(LoraError::RankTooLarge {
                module: target.path.clone(),
                rank,
                limit,
            });
        }
        let a = (0..rank * in_features).map(|_| draw()).collect();
        let b = vec![0.0; out_features * rank];
        Ok(Self::new(alpha, in_features, out_features, a, b))
    }

    /// What `B A` is multiplied by.
    pub fn scale(&self) -> f32 {
        self.alpha / self.rank as f32
    }

    /// What is added to the weight: `[out, in]`, row by row.
    pub fn delta(&self) -> Vec<f32> {
        let scale = self.scale();
        let mut delta = vec![0.0; self.out_features * self.in_features];
        for (row, b) in delta
            .chunks_mut(self.in_features)
            .zip(self.b.chunks(self.rank))
        {
            for (b, a) in b.iter().zip(self.a.chunks(self.in_features)) {
                for (sum, a) in row.iter_mut().zip(a) {
                    *sum += b * a;
                }
            }
            row.iter_mut().for_each(|sum| *sum *= scale);
        }
        delta
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_addition_is_b_times_a_times_alpha_over_rank() {
        let module = LoraModule::new(
            1.0,
            3,
            2,
            vec![1.0, 2.0, 3.0, 0.0, 1.0, 0.0],
            vec![1.0, 0.0, 2.0, 4.0],
        );
        assert_eq!(module.rank, 2);
        assert_eq!(module.delta(), [0.5, 1.0, 1.5, 1.0, 4.0, 3.0]);
    }

    #[test]
    fn an_untrained_module_adds_nothing() {
        let target = |inputs| Target::new("to_q", inputs, 4);
        let gaussian = LoraModule::gaussian(4, 8.0, &target(3), || 2.0).expect("a rank");
        assert_eq!(gaussian.a, [0.5; 12]);
        assert_eq!(gaussian.scale(), 2.0);
        assert_eq!(gaussian.delta(), [0.0; 12]);
        let kaiming = LoraModule::kaiming(1, 1.0, &target(4), || 0.75).expect("a rank");
        assert_eq!(kaiming.a, [0.25; 4]);
        assert_eq!(kaiming.b, [0.0; 4]);
    }

    #[test]
    fn a_rank_beyond_the_wider_side_is_refused_before_anything_is_allocated() {
        let target = Target::new("x_embedder", 2, 5);
        let module = LoraModule::gaussian(5, 1.0, &target, || 0.0).expect("peft takes it too");
        assert_eq!(module.rank, 5);
        for rank in [6, 1_000_000_000_000, usize::MAX] {
            for refused in [
                LoraModule::gaussian(rank, 1.0, &target, || 0.0),
                LoraModule::kaiming(rank, 1.0, &target, || 0.0),
            ] {
                let message = refused.expect_err("too large").to_string();
                assert_eq!(
                    message,
                    format!(
                        "`x_embedder` cannot have a LoRA of rank {rank}; its widths allow at most 5"
                    )
                );
            }
        }
    }
}
