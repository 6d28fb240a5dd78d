//! The loss's weight by noise level.
//!
//! Weights are `f32`, from σ in `f32`, whatever the network computes in: in half precision `σ⁻²` overflows for the three
//! smallest levels.
//!
//! Source: `compute_loss_weighting_for_sd3`, diffusers 0.42.

use std::f32::consts::PI;

/// How much a sample's squared error counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weighting {
    /// 1. Also what upstream's schemes `logit_normal` and `mode` weigh; these change the density only.
    None,
    /// `σ⁻²`, called `sigma_sqrt` upstream.
    SigmaSqrt,
    /// `2 / (π (1 - 2σ + 2σ²))`.
    Cosmap,
}

impl Weighting {
    /// The weight at a noise level.
    pub fn weight(self, sigma: f32) -> f32 {
        match self {
            Self::None => 1.0,
            Self::SigmaSqrt => 1.0 / (sigma * sigma),
            Self::Cosmap => 2.0 / (PI * (1.0 - 2.0 * sigma + 2.0 * (sigma * sigma))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_those_of_the_formulas() {
        for (sigma, sigma_sqrt, cosmap) in [
            (0.001f32, 1e6, 0.637_894_285_149_309_7),
            (0.25, 16.0, 1.018_591_635_788_130_2),
            (0.5, 4.0, 1.273_239_544_735_162_8),
            (1.0, 1.0, std::f64::consts::FRAC_2_PI),
        ] {
            for (weighting, expected) in [
                (Weighting::SigmaSqrt, sigma_sqrt),
                (Weighting::Cosmap, cosmap),
            ] {
                let error = f64::from(weighting.weight(sigma)) / expected - 1.0;
                assert!(
                    error.abs() < 5e-7,
                    "{weighting:?} at {sigma} is off by {error}"
                );
            }
            assert_eq!(Weighting::None.weight(sigma), 1.0);
        }
    }

    #[test]
    fn the_smallest_level_has_a_finite_weight() {
        assert!(Weighting::SigmaSqrt.weight(0.001).is_finite());
        assert!(half_overflows(Weighting::SigmaSqrt.weight(0.003)));
    }

    fn half_overflows(value: f32) -> bool {
        value > 65_504.0
    }
}
