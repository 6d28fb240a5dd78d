//! Latents as the VAE's posterior gives them, and as the transformer sees them.

/// How the VAE's latents become the transformer's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LatentScaling {
    /// Taken off first.
    pub shift: f32,
    /// Multiplied with then.
    pub scale: f32,
}

/// A draw from a posterior: `mean + exp(½ logvar)·noise`, with the log-variance brought into −30 to 20.
///
/// Source: `DiagonalGaussianDistribution`, diffusers 0.42.
///
/// # Panics
///
/// If the lengths differ.
pub fn sample_posterior(mean: &[f32], logvar: &[f32], noise: &[f32]) -> Vec<f32> {
    assert!(
        mean.len() == logvar.len() && mean.len() == noise.len(),
        "{} means, {} variances, {} random numbers",
        mean.len(),
        logvar.len(),
        noise.len()
    );
    mean.iter()
        .zip(logvar)
        .zip(noise)
        .map(|((mean, logvar), noise)| mean + (0.5 * logvar.clamp(-30.0, 20.0)).exp() * noise)
        .collect()
}

impl LatentScaling {
    /// `x₀ = (z − shift)·scale`.
    pub fn apply(self, mut latent: Vec<f32>) -> Vec<f32> {
        for value in &mut latent {
            *value = (*value - self.shift) * self.scale;
        }
        latent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_posterior_draw_is_the_mean_plus_noise_times_the_deviation() {
        let log4 = 4f32.ln();
        let z = sample_posterior(&[1.0, 1.0, 0.0], &[log4, log4, 90.0], &[3.0, 0.0, 1.0]);
        assert_eq!(z[1], 1.0);
        assert!((z[0] - 7.0).abs() < 1e-5);
        assert_eq!(z[2], 10f32.exp(), "a log-variance of 90 counts as 20");
    }

    #[test]
    fn the_shift_comes_before_the_scale() {
        let scaling = LatentScaling {
            shift: 1.0,
            scale: 0.5,
        };
        assert_eq!(scaling.apply(vec![3.0]), [1.0]);
    }
}
