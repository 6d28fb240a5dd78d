//! Clipping of gradients by the norm of all of them together.
//!
//! Source: `torch.nn.utils.clip_grad_norm_`, PyTorch 2.15.

use rayon::prelude::*;

/// The outcome of clipping.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GlobalNorm {
    /// L2 norm over all gradients before clipping. Not finite if any gradient is not.
    pub norm: f32,
    /// What every gradient was multiplied by; 1 if nothing was clipped.
    pub coefficient: f32,
}

impl GlobalNorm {
    /// Whether a step may be taken with these gradients.
    pub fn is_finite(&self) -> bool {
        self.norm.is_finite()
    }

    /// Whether the gradients were made smaller.
    pub fn clipped(&self) -> bool {
        self.coefficient < 1.0
    }
}

/// The L2 norm over all gradients: the norm of the tensors' norms.
///
/// A tensor's squares are summed in `f64`, so that the result depends neither on vector width nor on thread count.
pub fn global_norm(gradients: &[Vec<f32>]) -> f32 {
    let norms: Vec<f32> = gradients
        .par_iter()
        .map(|gradient| l2(gradient) as f32)
        .collect();
    l2(&norms) as f32
}

/// Scales all gradients by `min(1, max_norm / (norm + 1e-6))`.
///
/// Gradients whose norm is not finite are left as they are, with coefficient 1: there is no step to be taken with them.
///
/// # Panics
///
/// If `max_norm` is not positive.
pub fn clip_global_norm(gradients: &mut [Vec<f32>], max_norm: f32) -> GlobalNorm {
    assert!(
        max_norm > 0.0,
        "the largest norm must be positive, got {max_norm}"
    );
    let norm = global_norm(gradients);
    if !norm.is_finite() {
        return GlobalNorm {
            norm,
            coefficient: 1.0,
        };
    }
    let coefficient = (max_norm / (norm + 1e-6)).min(1.0);
    if coefficient < 1.0 {
        gradients
            .par_iter_mut()
            .flatten()
            .for_each(|value| *value *= coefficient);
    }
    GlobalNorm { norm, coefficient }
}

fn l2(values: &[f32]) -> f64 {
    values
        .iter()
        .map(|value| f64::from(*value) * f64::from(*value))
        .sum::<f64>()
        .sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_norm_runs_over_all_tensors() {
        assert_eq!(global_norm(&[vec![3.0], vec![0.0, 4.0]]), 5.0);
    }

    #[test]
    fn gradients_above_the_limit_are_scaled_down() {
        let mut gradients = vec![vec![3.0], vec![0.0, 4.0]];
        let norm = clip_global_norm(&mut gradients, 1.0);
        assert_eq!(
            norm,
            GlobalNorm {
                norm: 5.0,
                coefficient: 1.0 / (5.0 + 1e-6)
            }
        );
        assert!(norm.clipped());
        assert_eq!(
            gradients,
            [
                vec![3.0 * norm.coefficient],
                vec![0.0, 4.0 * norm.coefficient]
            ]
        );
    }

    #[test]
    fn gradients_below_the_limit_are_left_alone() {
        let mut gradients = vec![vec![0.3, -0.4]];
        assert_eq!(clip_global_norm(&mut gradients, 1.0).coefficient, 1.0);
        assert_eq!(gradients, [vec![0.3, -0.4]]);
    }

    #[test]
    fn a_norm_that_is_not_finite_clips_nothing() {
        let mut gradients = vec![vec![f32::NAN, 2.0]];
        let norm = clip_global_norm(&mut gradients, 1.0);
        assert!(!norm.is_finite() && !norm.clipped());
        assert_eq!(gradients[0][1], 2.0);
    }
}
