//! Learning rate by optimiser step, counted from 0.
//!
//! All but [`LearningRateSchedule::Constant`] begin with a warm-up: a straight line from 0 at step 0 to the peak at step
//! `warmup_steps`.
//!
//! Source: `get_scheduler`, diffusers 0.42.

use std::f64::consts::PI;

/// The shape of the learning rate over a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LearningRateSchedule {
    /// The peak throughout, without warm-up.
    Constant,
    /// The peak after the warm-up.
    ConstantWithWarmup,
    /// A straight line down to 0.
    Linear,
    /// Half a cosine down to 0.
    Cosine,
    /// Half cosines down to 0, each starting from the peak again.
    CosineWithRestarts {
        /// How many.
        num_cycles: u32,
    },
    /// A power of the fraction of steps left, down to `end`.
    Polynomial {
        /// The exponent; 1 is a straight line.
        power: f64,
        /// The last learning rate. Upstream's is 1e-7.
        end: f64,
    },
}

impl LearningRateSchedule {
    /// The learning rate of a step. Steps past `total_steps` stay at the end of the shape.
    pub fn at(self, peak: f64, step: u64, warmup_steps: u64, total_steps: u64) -> f64 {
        if self == Self::Constant {
            return peak;
        }
        if step < warmup_steps {
            return peak * step as f64 / warmup_steps as f64;
        }
        let decay_steps = total_steps.saturating_sub(warmup_steps).max(1);
        let progress = ((step - warmup_steps) as f64 / decay_steps as f64).min(1.0);
        match self {
            Self::Constant | Self::ConstantWithWarmup => peak,
            Self::Linear => peak * (1.0 - progress),
            Self::Cosine => peak * 0.5 * (1.0 + (PI * progress).cos()),
            Self::CosineWithRestarts { .. } if progress >= 1.0 => 0.0,
            Self::CosineWithRestarts { num_cycles } => {
                let cycle = (f64::from(num_cycles) * progress).fract();
                peak * 0.5 * (1.0 + (PI * cycle).cos())
            }
            Self::Polynomial { power, end } => {
                let end = end.min(peak);
                (peak - end) * (1.0 - progress).powf(power) + end
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates<const N: usize>(schedule: LearningRateSchedule, steps: [u64; N]) -> [f64; N] {
        steps.map(|step| (schedule.at(1.0, step, 10, 110) * 1e6).round() / 1e6)
    }

    #[test]
    fn every_shape_warms_up_but_the_constant_one() {
        for schedule in [
            LearningRateSchedule::ConstantWithWarmup,
            LearningRateSchedule::Linear,
            LearningRateSchedule::Cosine,
            LearningRateSchedule::CosineWithRestarts { num_cycles: 2 },
            LearningRateSchedule::Polynomial {
                power: 2.0,
                end: 0.0,
            },
        ] {
            assert_eq!(rates(schedule, [0, 5, 10]), [0.0, 0.5, 1.0], "{schedule:?}");
            assert_eq!(schedule.at(1.0, 0, 0, 100), 1.0, "{schedule:?}");
        }
        assert_eq!(rates(LearningRateSchedule::Constant, [0, 5, 200]), [1.0; 3]);
    }

    #[test]
    fn shapes_follow_upstreams_formulas() {
        assert_eq!(
            rates(LearningRateSchedule::ConstantWithWarmup, [60, 500]),
            [1.0, 1.0]
        );
        assert_eq!(
            rates(LearningRateSchedule::Linear, [35, 60, 110, 500]),
            [0.75, 0.5, 0.0, 0.0]
        );
        assert_eq!(
            rates(LearningRateSchedule::Cosine, [35, 60, 110]),
            [0.853_553, 0.5, 0.0]
        );
        let restarts = LearningRateSchedule::CosineWithRestarts { num_cycles: 2 };
        assert_eq!(rates(restarts, [35, 60, 85, 110]), [0.5, 1.0, 0.5, 0.0]);
        let polynomial = LearningRateSchedule::Polynomial {
            power: 2.0,
            end: 0.1,
        };
        assert_eq!(rates(polynomial, [60, 110, 500]), [0.325, 0.1, 0.1]);
    }

    #[test]
    fn a_run_that_is_all_warm_up_does_not_divide_by_zero() {
        for power in [1.0, 2.0] {
            assert_eq!(
                LearningRateSchedule::Polynomial { power, end: 0.0 }.at(1.0, 10, 10, 10),
                1.0
            );
        }
    }
}
