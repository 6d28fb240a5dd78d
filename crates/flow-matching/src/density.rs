//! The density that noise levels are drawn from in training.
//!
//! A raw random number becomes `u`, and `u` an entry of the training table ([`crate::Scheduler::training_point`]), where
//! large `u` means little noise.
//!
//! Source: `compute_density_for_timestep_sampling`, diffusers 0.42.

use std::f32::consts::PI;

use crate::Stream;

/// How `u` is distributed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Density {
    /// Evenly over [0, 1).
    Uniform,
    /// The logistic function of a normal number. A positive mean gives less noise.
    LogitNormal {
        /// The normal number's mean.
        mean: f32,
        /// Its deviation.
        std: f32,
    },
    /// Heavier in the middle: `1 - r - scale (cos²(πr/2) - 1 + r)` with `r` uniform.
    Mode {
        /// 0 is uniform; the usual value is 1.29.
        scale: f32,
    },
}

impl Density {
    /// `u` from a raw number: standard normal for [`Density::LogitNormal`], uniform in [0, 1) for the others.
    pub fn u(self, raw: f32) -> f32 {
        match self {
            Self::Uniform => raw,
            Self::LogitNormal { mean, std } => 1.0 / (1.0 + (-(raw * std + mean)).exp()),
            Self::Mode { scale } => {
                let cosine = (PI * raw / 2.0).cos();
                1.0 - raw - scale * (cosine * cosine - 1.0 + raw)
            }
        }
    }

    /// Draws `u`.
    pub fn draw(self, stream: &mut Stream) -> f32 {
        let raw = match self {
            Self::LogitNormal { .. } => stream.normal(),
            Self::Uniform | Self::Mode { .. } => stream.uniform(),
        };
        self.u(raw)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f32, expected: f64) {
        assert!(
            (f64::from(found) - expected).abs() < 1e-6,
            "{found} instead of {expected}"
        );
    }

    #[test]
    fn logit_normal_is_the_logistic_function_of_a_normal_number() {
        let density = Density::LogitNormal {
            mean: 0.0,
            std: 1.0,
        };
        for (z, u) in [
            (-2.0, 0.119_202_922_022_117_55),
            (0.0, 0.5),
            (1.0, 0.731_058_578_630_004_9),
        ] {
            close(density.u(z), u);
        }
        assert_eq!(
            Density::LogitNormal {
                mean: 1.0,
                std: 2.0
            }
            .u(-0.5),
            0.5
        );
        assert_eq!(density.u(-1e9), 0.0);
    }

    #[test]
    fn mode_runs_from_one_to_zero_through_a_half() {
        let density = Density::Mode { scale: 1.29 };
        for (raw, u) in [
            (0.0, 1.0),
            (0.1, 0.802_568_546_989_625_9),
            (0.5, 0.5),
            (0.999, 0.002_286_817_055_198_477_7),
        ] {
            close(density.u(raw), u);
        }
    }
}
