//! Gradients into a step: accumulation, loss scaling, clipping, AdamW.

use pipeline::recipe::{self, TrainRecipe};
use quant::{AdamWConfig, Optimizer, OptimizerKind, StatePart, clip_global_norm};
use serde::{Deserialize, Serialize};

use crate::lora_state::TrainableLora;
use crate::micro::MicroStep;

/// The gradients of one step's micro-batches, added up in their order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GradientSum {
    gradients: Vec<Vec<f32>>,
    loss_sum: f64,
    num_micro_steps: u32,
}

impl GradientSum {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a micro-batch.
    ///
    /// # Panics
    ///
    /// If its gradients are of another LoRA than those before.
    pub fn add(&mut self, micro: MicroStep) {
        self.loss_sum += f64::from(micro.loss);
        self.num_micro_steps += 1;
        if self.gradients.is_empty() {
            self.gradients = micro.gradients;
            return;
        }
        assert_eq!(
            self.gradients.len(),
            micro.gradients.len(),
            "number of gradients"
        );
        for (sum, gradient) in self.gradients.iter_mut().zip(&micro.gradients) {
            assert_eq!(sum.len(), gradient.len(), "length of a gradient");
            for (sum, value) in sum.iter_mut().zip(gradient) {
                *sum += value;
            }
        }
    }

    /// Mean loss of the micro-batches.
    pub fn mean_loss(&self) -> f32 {
        (self.loss_sum / f64::from(self.num_micro_steps.max(1))) as f32
    }
}

/// Keeps half-precision gradients away from both ends of the number range: the loss is multiplied before the backward
/// pass and the gradients divided after it.
///
/// Halves after a step whose gradients are not finite, doubles after a number of steps whose gradients are.
///
/// Source: `GradScaler` (growth 2, backoff ½), PyTorch 2.15.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossScaler {
    /// What the loss is multiplied by; 1 and fixed outside fp16.
    pub scale: f32,
    /// Steps with finite gradients since the scale last changed.
    pub finite_steps: u32,
    /// Finite steps after which the scale doubles; `None` for a fixed scale.
    pub growth_interval: Option<u32>,
}

impl LossScaler {
    /// A scale of 1 that stays so.
    pub fn fixed() -> Self {
        Self {
            scale: 1.0,
            finite_steps: 0,
            growth_interval: None,
        }
    }

    /// What the recipe says: scaling under fp16, none otherwise.
    pub fn of(recipe: &TrainRecipe) -> Self {
        match recipe.precision {
            recipe::PrecisionChoice::Fp16 => Self {
                scale: recipe.initial_loss_scale as f32,
                finite_steps: 0,
                growth_interval: Some(recipe.loss_scale_growth_interval),
            },
            recipe::PrecisionChoice::F32 | recipe::PrecisionChoice::Bf16 => Self::fixed(),
        }
    }

    /// Learns whether a step's gradients were finite.
    pub(crate) fn update(&mut self, finite: bool) {
        let Some(interval) = self.growth_interval else {
            return;
        };
        if !finite {
            self.scale *= 0.5;
            self.finite_steps = 0;
            return;
        }
        self.finite_steps += 1;
        if self.finite_steps == interval {
            // Doubling forever would end at infinity, from which halving does not come back.
            self.scale = (self.scale * 2.0).min(f32::MAX / 2.0);
            self.finite_steps = 0;
        }
    }
}

/// What became of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// Global norm of the gradients before clipping.
    pub grad_norm: f32,
    /// Whether they were made smaller.
    pub clipped: bool,
    /// Whether nothing was changed, because a gradient was not finite.
    pub skipped: bool,
    /// The scale that the loss had.
    pub loss_scale: f32,
}

/// AdamW with clipping and loss scaling, on a LoRA.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraOptimizer {
    optimizer: Optimizer,
    kind: OptimizerKind,
    config: AdamWConfig,
    scaler: LossScaler,
    max_grad_norm: f32,
}

impl LoraOptimizer {
    /// An optimiser at step 0 for a LoRA.
    pub fn new(
        kind: OptimizerKind,
        config: AdamWConfig,
        max_grad_norm: f32,
        scaler: LossScaler,
        lora: &TrainableLora,
    ) -> Self {
        Self {
            optimizer: Optimizer::new(kind, config, &lora.parameters()),
            kind,
            config,
            scaler,
            max_grad_norm,
        }
    }

    /// What the recipe says.
    pub fn of(recipe: &TrainRecipe, lora: &TrainableLora) -> Self {
        let kind = match recipe.optimizer {
            recipe::Optimizer::AdamW => OptimizerKind::AdamW,
            recipe::Optimizer::AdamW8bit => OptimizerKind::AdamW8bit {
                min_8bit_size: recipe.min_8bit_size,
            },
        };
        let config = AdamWConfig {
            beta1: recipe.beta1,
            beta2: recipe.beta2,
            epsilon: recipe.epsilon,
            weight_decay: recipe.weight_decay,
        };
        Self::new(
            kind,
            config,
            recipe.max_grad_norm as f32,
            LossScaler::of(recipe),
            lora,
        )
    }

    /// Steps taken; skipped ones do not count.
    pub fn num_steps(&self) -> u64 {
        self.optimizer.num_steps()
    }

    /// What the loss of a micro-batch has to be multiplied by before its backward pass.
    pub fn loss_factor(&self, num_micro_batches: u32) -> f32 {
        self.scaler.scale / num_micro_batches as f32
    }

    /// Clips the gradients and moves the LoRA, unless a gradient is not finite. Returns the clipped gradients too.
    ///
    /// # Panics
    ///
    /// If the gradients are of another LoRA.
    pub fn step(
        &mut self,
        lora: &mut TrainableLora,
        sum: GradientSum,
        learning_rate: f64,
    ) -> (StepOutcome, Vec<Vec<f32>>) {
        let loss_scale = self.scaler.scale;
        let mut gradients = sum.gradients;
        if loss_scale != 1.0 {
            let unscale = 1.0 / loss_scale;
            for value in gradients.iter_mut().flatten() {
                *value *= unscale;
            }
        }
        let norm = clip_global_norm(&mut gradients, self.max_grad_norm);
        let finite = norm.is_finite();
        if finite {
            self.optimizer
                .step(learning_rate, &mut lora.values, &gradients);
        }
        self.scaler.update(finite);
        let outcome = StepOutcome {
            grad_norm: norm.norm,
            clipped: norm.clipped(),
            skipped: !finite,
            loss_scale,
        };
        (outcome, gradients)
    }

    /// How its moments are kept.
    pub fn kind(&self) -> OptimizerKind {
        self.kind
    }

    /// Its numbers.
    pub fn config(&self) -> AdamWConfig {
        self.config
    }

    /// The largest global norm of gradients that it does not make smaller.
    pub fn max_grad_norm(&self) -> f32 {
        self.max_grad_norm
    }

    /// Its loss scaler.
    pub fn scaler(&self) -> LossScaler {
        self.scaler
    }

    /// Its moments as named arrays.
    pub fn export(&self) -> Vec<StatePart> {
        self.optimizer.export()
    }

    /// Takes over a saved state. On an error nothing has changed.
    ///
    /// # Errors
    ///
    /// If an array is missing, left over or of another kind than this optimiser's.
    pub fn import(
        &mut self,
        num_steps: u64,
        parts: Vec<StatePart>,
        scaler: LossScaler,
    ) -> Result<(), quant::QuantError> {
        self.optimizer.import(num_steps, parts)?;
        self.scaler = scaler;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lora::LoraModule;
    use std::collections::BTreeMap;

    fn lora() -> TrainableLora {
        let module = LoraModule::new(1.0, 1, 1, vec![1.0], vec![2.0]);
        TrainableLora::from_modules(BTreeMap::from([("layer".to_owned(), module)]))
    }

    fn optimizer(scaler: LossScaler, lora: &TrainableLora) -> LoraOptimizer {
        let config = AdamWConfig {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
        };
        LoraOptimizer::new(OptimizerKind::AdamW, config, 1.0, scaler, lora)
    }

    fn gradient(a: f32, b: f32) -> GradientSum {
        let mut sum = GradientSum::new();
        sum.add(MicroStep {
            loss: 1.0,
            gradients: vec![vec![a], vec![b]],
        });
        sum
    }

    fn doubling(scale: f32, interval: u32) -> LossScaler {
        LossScaler {
            scale,
            finite_steps: 0,
            growth_interval: Some(interval),
        }
    }

    #[test]
    fn micro_batches_add_up_and_their_losses_average() {
        let mut sum = gradient(1.0, 2.0);
        sum.add(MicroStep {
            loss: 4.0,
            gradients: vec![vec![0.5], vec![-1.0]],
        });
        assert_eq!(sum.gradients, [vec![1.5], vec![1.0]]);
        assert_eq!(sum.mean_loss(), 2.5);
    }

    #[test]
    fn an_overflow_is_no_optimiser_step_and_halves_the_scale() {
        let mut lora = lora();
        let before = lora.clone();
        let mut optimizer = optimizer(doubling(8.0, 2), &lora);
        let (outcome, _) = optimizer.step(&mut lora, gradient(f32::INFINITY, 0.0), 0.1);
        assert!(outcome.skipped && !outcome.clipped);
        assert_eq!(outcome.loss_scale, 8.0);
        assert_eq!((lora, optimizer.num_steps()), (before, 0));
        assert_eq!(optimizer.scaler().scale, 4.0);
    }

    #[test]
    fn the_scale_doubles_after_enough_finite_steps() {
        let mut lora = lora();
        let mut optimizer = optimizer(doubling(8.0, 2), &lora);
        let _ = optimizer.step(&mut lora, gradient(0.1, 0.1), 0.1);
        assert_eq!(optimizer.scaler().scale, 8.0);
        let _ = optimizer.step(&mut lora, gradient(0.1, 0.1), 0.1);
        assert_eq!(optimizer.scaler(), doubling(16.0, 2));
    }

    #[test]
    fn a_loss_scale_leaves_no_trace_in_the_step() {
        let (mut plain, mut scaled) = (lora(), lora());
        let mut one = optimizer(LossScaler::fixed(), &plain);
        let mut other = optimizer(doubling(1024.0, 9), &scaled);
        let (a, _) = one.step(&mut plain, gradient(3.0, 4.0), 0.1);
        let (b, _) = other.step(&mut scaled, gradient(3072.0, 4096.0), 0.1);
        assert_eq!(plain, scaled);
        assert_eq!((a.grad_norm, a.clipped), (5.0, true));
        assert_eq!((b.grad_norm, b.clipped), (5.0, true));
    }
}
