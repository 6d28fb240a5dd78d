//! AdamW on slices, with states in `f32` or in 8 bits.
//!
//! With `g` the gradient, `t` the step from 1, `c1 = 1 - β1^t`, `c2 = √(1 - β2^t)`:
//!
//! ```text
//! p ← p (1 - lr·wd)        m ← β1 m + (1 - β1) g        v ← β2 v + (1 - β2) g²
//! p ← p - lr / c1 · m / (√v / c2 + ε)
//! ```
//!
//! The three places that upstream computes this in differ only in the order of `f32` operations:
//! `torch.optim.AdamW`, and bitsandbytes' `AdamW8bit` for tensors with 8-bit and with `f32` states.
//!
//! Source: `_single_tensor_adam`, PyTorch 2.15; `backends/cpu/ops.py`, bitsandbytes 0.50.2.

use rayon::prelude::*;

use crate::blockwise::{BLOCK_LEN, dequantize_block, quantize_block};
use crate::{Blockwise, Codebook};

/// Above this the square of a gradient overflows `f32`.
const LARGEST_GRADIENT: f32 = 1.844_674_3e19;

/// The numbers of AdamW, except for the learning rate, which comes with every step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decay of the parameters per unit of learning rate, apart from the gradient.
    pub weight_decay: f64,
}

/// How moments are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptimizerKind {
    /// All in `f32`, as `torch.optim.AdamW`.
    AdamW,
    /// In blocks of 256 8-bit codes, as `bitsandbytes.optim.AdamW8bit`.
    AdamW8bit {
        /// Tensors with fewer elements keep `f32` moments. Upstream's number is 4096.
        min_8bit_size: usize,
    },
}

/// What a step met.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepReport {
    /// Elements whose gradient or its square was not finite.
    pub num_not_finite: usize,
}

/// The moments of one parameter tensor.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Moments {
    Full { first: Vec<f32>, second: Vec<f32> },
    Blockwise { first: Blockwise, second: Blockwise },
}

/// One parameter tensor's name and moments.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Slot {
    pub(crate) name: String,
    pub(crate) len: usize,
    pub(crate) moments: Moments,
}

/// AdamW over a list of parameter tensors.
///
/// An element whose gradient is not finite keeps its parameter and loses its moments, as in the CUDA kernel of
/// bitsandbytes. Its CPU code, followed in everything else, would spoil the block. Two things that the CUDA kernel
/// does and this does not: it decays the parameters after the update, and it moves a first-moment code by one where
/// rounding changed its sign.
#[derive(Clone, Debug, PartialEq)]
pub struct Optimizer {
    kind: OptimizerKind,
    config: AdamWConfig,
    pub(crate) num_steps: u64,
    pub(crate) slots: Vec<Slot>,
}

impl Optimizer {
    /// An optimiser at step 0 for tensors of the given names and element counts.
    ///
    /// # Panics
    ///
    /// If a number of `config` is out of its range, or a name occurs twice.
    pub fn new(kind: OptimizerKind, config: AdamWConfig, parameters: &[(String, usize)]) -> Self {
        let AdamWConfig {
            beta1,
            beta2,
            epsilon,
            weight_decay,
        } = config;
        assert!(
            (0.0..1.0).contains(&beta1),
            "beta1 must be in [0, 1), got {beta1}"
        );
        assert!(
            (0.0..1.0).contains(&beta2),
            "beta2 must be in [0, 1), got {beta2}"
        );
        assert!(
            epsilon >= 0.0 && weight_decay >= 0.0,
            "negative epsilon {epsilon} or weight decay {weight_decay}"
        );
        let mut names: Vec<&str> = parameters.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        assert!(
            names.windows(2).all(|pair| pair[0] != pair[1]),
            "a parameter name occurs twice"
        );
        let slots = parameters
            .iter()
            .map(|(name, len)| Slot {
                name: name.clone(),
                len: *len,
                moments: match kind {
                    OptimizerKind::AdamW8bit { min_8bit_size } if *len >= min_8bit_size => {
                        Moments::Blockwise {
                            first: Blockwise::zeros(*len),
                            second: Blockwise::zeros(*len),
                        }
                    }
                    _ => Moments::Full {
                        first: vec![0.0; *len],
                        second: vec![0.0; *len],
                    },
                },
            })
            .collect();
        Self {
            kind,
            config,
            num_steps: 0,
            slots,
        }
    }

    /// Steps taken so far.
    pub fn num_steps(&self) -> u64 {
        self.num_steps
    }

    /// How moments are kept.
    pub fn kind(&self) -> OptimizerKind {
        self.kind
    }

    /// Memory for the moments.
    pub fn num_bytes(&self) -> usize {
        self.slots
            .iter()
            .map(|slot| match &slot.moments {
                Moments::Full { first, .. } => 8 * first.len(),
                Moments::Blockwise { first, .. } => {
                    2 * first.codes().len() + 8 * first.absmax().len()
                }
            })
            .sum()
    }

    /// Moves every parameter tensor by one step. Tensors are in the order given to [`Optimizer::new`].
    ///
    /// # Panics
    ///
    /// If the number or the lengths of the tensors differ from those given to [`Optimizer::new`].
    pub fn step(
        &mut self,
        learning_rate: f64,
        parameters: &mut [Vec<f32>],
        gradients: &[Vec<f32>],
    ) -> StepReport {
        assert_eq!(
            parameters.len(),
            self.slots.len(),
            "number of parameter tensors"
        );
        assert_eq!(
            gradients.len(),
            self.slots.len(),
            "number of gradient tensors"
        );
        self.num_steps += 1;
        let numbers = StepNumbers::new(&self.config, learning_rate, self.num_steps);
        let kind = self.kind;
        let num_not_finite = self
            .slots
            .par_iter_mut()
            .zip(parameters.par_iter_mut())
            .zip(gradients.par_iter())
            .map(|((slot, parameters), gradients)| {
                let name = &slot.name;
                assert_eq!(parameters.len(), slot.len, "elements of parameter `{name}`");
                assert_eq!(
                    gradients.len(),
                    slot.len,
                    "elements of the gradient of `{name}`"
                );
                match &mut slot.moments {
                    Moments::Full { first, second } => match kind {
                        OptimizerKind::AdamW => numbers.torch(parameters, gradients, first, second),
                        OptimizerKind::AdamW8bit { .. } => {
                            numbers.small(parameters, gradients, first, second)
                        }
                    },
                    Moments::Blockwise { first, second } => {
                        numbers.blockwise(parameters, gradients, first, second)
                    }
                }
            })
            .sum(); // of integers: the order does not matter
        StepReport { num_not_finite }
    }
}

/// The scalars of one step: computed in `f64`, then rounded once, as Python does.
#[derive(Clone, Copy, Debug)]
struct StepNumbers {
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    epsilon: f32,
    epsilon_corrected: f32,
    decay: f32,
    correction2: f32,
    /// `-lr / c1`.
    step_size: f32,
    /// `-lr · c2 / c1`.
    step_size_corrected: f32,
}

impl StepNumbers {
    fn new(config: &AdamWConfig, learning_rate: f64, step: u64) -> Self {
        let AdamWConfig {
            beta1,
            beta2,
            epsilon,
            weight_decay,
        } = *config;
        let step = i32::try_from(step).expect("fewer than 2^31 steps");
        let correction1 = 1.0 - beta1.powi(step);
        let correction2 = (1.0 - beta2.powi(step)).sqrt();
        Self {
            beta1: beta1 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            epsilon: epsilon as f32,
            epsilon_corrected: (epsilon * correction2) as f32,
            decay: (1.0 - learning_rate * weight_decay) as f32,
            correction2: correction2 as f32,
            step_size: (-learning_rate / correction1) as f32,
            step_size_corrected: (-learning_rate * correction2 / correction1) as f32,
        }
    }

    /// `torch.optim.AdamW`: the first moment moves towards the gradient by a fraction of their distance.
    fn torch(
        &self,
        parameters: &mut [f32],
        gradients: &[f32],
        first: &mut [f32],
        second: &mut [f32],
    ) -> usize {
        each(parameters, gradients, first, second, |p, g, m, v| {
            let distance = g - *m;
            *m = if self.one_minus_beta1 < 0.5 {
                self.one_minus_beta1.mul_add(distance, *m)
            } else {
                g - distance * (1.0 - self.one_minus_beta1)
            };
            *v = self.next_second(g, *v);
            let root = v.sqrt() / self.correction2 + self.epsilon;
            *p = *p * self.decay + self.step_size * *m / root;
        })
    }

    /// bitsandbytes, `f32` states.
    fn small(
        &self,
        parameters: &mut [f32],
        gradients: &[f32],
        first: &mut [f32],
        second: &mut [f32],
    ) -> usize {
        each(parameters, gradients, first, second, |p, g, m, v| {
            *m = self.next_first(g, *m);
            *v = self.next_second(g, *v);
            let update = *m / (v.sqrt() + self.epsilon_corrected);
            *p = update.mul_add(self.step_size_corrected, *p * self.decay);
        })
    }

    /// bitsandbytes, 8-bit states: parameters see the new moments before these are rounded to codes.
    fn blockwise(
        &self,
        parameters: &mut [f32],
        gradients: &[f32],
        first: &mut Blockwise,
        second: &mut Blockwise,
    ) -> usize {
        let (signed, unsigned) = (Codebook::signed_dynamic(), Codebook::unsigned_dynamic());
        let mut num_not_finite = 0;
        let states = first.blocks_mut().zip(second.blocks_mut());
        let values = parameters
            .chunks_mut(BLOCK_LEN)
            .zip(gradients.chunks(BLOCK_LEN));
        for ((parameters, gradients), ((m_codes, m_absmax), (v_codes, v_absmax))) in
            values.zip(states)
        {
            let (mut m_block, mut v_block) = ([0.0; BLOCK_LEN], [0.0; BLOCK_LEN]);
            let (m_block, v_block) = (&mut m_block[..m_codes.len()], &mut v_block[..m_codes.len()]);
            dequantize_block(m_codes, *m_absmax, signed, m_block);
            dequantize_block(v_codes, *v_absmax, unsigned, v_block);
            num_not_finite += each(parameters, gradients, m_block, v_block, |p, g, m, v| {
                *m = self.next_first(g, *m);
                *v = self.next_second(g, *v);
                let root = v.sqrt() / self.correction2 + self.epsilon;
                *p = *p * self.decay + self.step_size * *m / root;
            });
            *m_absmax = quantize_block(m_block, signed, m_codes);
            *v_absmax = quantize_block(v_block, unsigned, v_codes);
        }
        num_not_finite
    }

    fn next_first(&self, gradient: f32, first: f32) -> f32 {
        gradient.mul_add(self.one_minus_beta1, first * self.beta1)
    }

    fn next_second(&self, gradient: f32, second: f32) -> f32 {
        (self.one_minus_beta2 * gradient).mul_add(gradient, second * self.beta2)
    }
}

/// Runs `update(p, g, m, v)` on every element with a usable gradient and returns the number of the others.
fn each(
    parameters: &mut [f32],
    gradients: &[f32],
    first: &mut [f32],
    second: &mut [f32],
    update: impl Fn(&mut f32, f32, &mut f32, &mut f32),
) -> usize {
    let mut num_not_finite = 0;
    for (((p, g), m), v) in parameters.iter_mut().zip(gradients).zip(first).zip(second) {
        if g.abs() <= LARGEST_GRADIENT {
            update(p, *g, m, v);
        } else {
            (*m, *v) = (0.0, 0.0);
            num_not_finite += 1;
        }
    }
    num_not_finite
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: AdamWConfig = AdamWConfig {
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.0,
    };
    const KINDS: [OptimizerKind; 3] = [
        OptimizerKind::AdamW,
        OptimizerKind::AdamW8bit {
            min_8bit_size: 4096,
        },
        OptimizerKind::AdamW8bit { min_8bit_size: 1 },
    ];

    fn optimizer(kind: OptimizerKind, config: AdamWConfig, len: usize) -> Optimizer {
        Optimizer::new(kind, config, &[("p".to_owned(), len)])
    }

    #[test]
    fn the_first_step_is_the_learning_rate_against_the_gradients_sign() {
        for kind in KINDS {
            let mut parameters = vec![vec![1.0, 1.0, 1.0]];
            optimizer(kind, CONFIG, 3).step(0.25, &mut parameters, &[vec![5.0, -0.01, 3e-5]]);
            for (found, expected) in parameters[0].iter().zip([0.75, 1.25, 0.75]) {
                assert!(
                    (found - expected).abs() < 1e-3,
                    "{kind:?}: {found} instead of {expected}"
                );
            }
        }
    }

    #[test]
    fn an_all_zero_first_gradient_changes_nothing_and_leaves_zero_moments() {
        for kind in KINDS {
            for len in [256, 300] {
                let mut parameters = vec![vec![0.5; len]];
                let mut optimizer = optimizer(kind, CONFIG, len);
                let report = optimizer.step(0.1, &mut parameters, &[vec![0.0; len]]);
                assert_eq!(report, StepReport::default());
                assert_eq!(parameters[0], vec![0.5; len], "{kind:?}");
                optimizer.step(0.1, &mut parameters, &[vec![1.0; len]]);
                assert!(
                    parameters[0].iter().all(|p| p.is_finite() && *p < 0.5),
                    "{kind:?}"
                );
            }
        }
    }

    #[test]
    fn weight_decay_comes_before_the_update_and_is_not_part_of_it() {
        let config = AdamWConfig {
            weight_decay: 0.5,
            ..CONFIG
        };
        for kind in KINDS {
            let mut parameters = vec![vec![2.0]];
            optimizer(kind, config, 1).step(0.1, &mut parameters, &[vec![0.0]]);
            assert_eq!(parameters[0], [2.0 * 0.95f32], "{kind:?}");
        }
    }

    #[test]
    fn an_element_whose_gradient_is_not_finite_stays_and_loses_its_moments() {
        for kind in KINDS {
            let mut parameters = vec![vec![1.0, 1.0, 1.0]];
            let mut optimizer = optimizer(kind, CONFIG, 3);
            optimizer.step(0.1, &mut parameters, &[vec![1.0; 3]]);
            let before = parameters[0].clone();
            let report = optimizer.step(0.1, &mut parameters, &[vec![f32::NAN, 1.0, 1e30]]);
            assert_eq!(report.num_not_finite, 2);
            assert_eq!(parameters[0][0], before[0], "{kind:?}");
            assert!(parameters[0][1] < before[1], "{kind:?}");
            assert_eq!(parameters[0][2], before[2], "{kind:?}");
        }
    }

    #[test]
    fn tensors_below_the_limit_keep_f32_moments() {
        let sizes = [("small".to_owned(), 4095), ("large".to_owned(), 4096)];
        let optimizer = Optimizer::new(
            OptimizerKind::AdamW8bit {
                min_8bit_size: 4096,
            },
            CONFIG,
            &sizes,
        );
        assert!(matches!(optimizer.slots[0].moments, Moments::Full { .. }));
        assert!(matches!(
            optimizer.slots[1].moments,
            Moments::Blockwise { .. }
        ));
        assert_eq!(optimizer.num_bytes(), 8 * 4095 + 2 * 4096 + 8 * 16);
    }
}
