//! What training on the card takes, before anything is loaded: how many micro-batches go through as one, which blocks
//! are recomputed, how many bytes that needs, how long a step takes.
//!
//! Only configurations and sizes are needed. The arithmetic is `engine_cuda::plan`, a dry run of the code that trains.

use engine_cuda::CudaError;
use engine_cuda::model::sizes::MAX_TOKENS;
use engine_cuda::model::{EngineOptions, Recompute, Shape, TrainingOptions};
use engine_cuda::plan::{LoraSize, PlanRequest, fit, most_frugal};
use engine_cuda::stream::Rates;
use mmdit::{BaseWeights, MmditConfig};
use tensor::Precision;

use crate::cuda::{form_of, half_of};
use crate::lora_state::TrainableLora;
use crate::optimise::LoraOptimizer;

/// What a plan leaves of a card's memory to the driver: its context, kernels' code, recorded graphs.
pub const RESERVED_BYTES: usize = 1 << 30;

/// Name and memory in bytes of a card, counted from 0, if the engine `cuda` can use it.
pub fn card(index: usize) -> Option<(String, usize)> {
    let facts = engine_cuda::device::probe(index).ok()?;
    Some((facts.name, facts.total_bytes))
}

/// What one optimiser step goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Samples of a micro-batch.
    pub micro_batch: usize,
    /// Micro-batches of a step.
    pub accumulation: usize,
    /// Text tokens of a sample.
    pub text_tokens: usize,
    /// Rows and columns of a latent.
    pub latent_cells: [usize; 2],
    /// The number of micro-batches that go through as one, if a run is gone on with that began so: another number adds
    /// up in another order, and the run would end with other bytes. `None` leaves it to the plan.
    pub at_once: Option<usize>,
}

/// What is to be trained.
#[derive(Clone, Debug)]
pub struct TrainingRequest<'a> {
    /// The network's sizes.
    pub config: &'a MmditConfig,
    /// What it computes in: bf16 or fp16.
    pub precision: Precision,
    /// In what form its linear layers are kept.
    pub base: BaseWeights,
    /// The LoRA's layers and ranks; its values do not matter.
    pub lora: &'a TrainableLora,
    /// The optimiser.
    pub optimizer: &'a LoraOptimizer,
    /// What a step goes over.
    pub workload: Workload,
}

/// How training is done, and what that takes.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainingPlan {
    /// Micro-batches that go through as one batch; divides the accumulation.
    pub fused: usize,
    /// Blocks whose activations are computed again in the backward pass.
    pub recomputed_blocks: usize,
    /// Blocks of the network.
    pub num_blocks: usize,
    /// Predicted peak bytes by part.
    pub parts: Vec<(&'static str, usize)>,
    /// Predicted seconds of an optimiser step on an H100, without the optimiser itself (below a millisecond).
    pub step_s: f64,
}

/// A change of the recipe after which training fits.
#[derive(Clone, Debug, PartialEq)]
pub struct Nearest {
    /// Values of the recipe, as `--set` takes them.
    pub changes: Vec<String>,
    /// Predicted peak bytes with them.
    pub total_bytes: usize,
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The precision is none of the engine's.
    #[error("the engine `cuda` trains in bf16 and fp16, and {found:?} is wanted")]
    Precision {
        /// What is wanted.
        found: Precision,
    },
    /// Too little memory, however it is done.
    #[error("training needs {} of GPU memory however much is recomputed, and {} are to be had", gigabytes(*needed), gigabytes(*limit))]
    DoesNotFit {
        /// Bytes of the most frugal way.
        needed: usize,
        /// Bytes that there are.
        limit: usize,
        /// The smallest change of the recipe that fits, if one does.
        nearest: Option<Nearest>,
    },
    /// Too little memory to go on as the run began.
    #[error("the run began with {at_once} micro-batches at once, which needs {} of GPU memory however much is recomputed, and {} are to be had", gigabytes(*needed), gigabytes(*limit))]
    CannotGoOn {
        /// Micro-batches at once.
        at_once: usize,
        /// Bytes of the most frugal way with so many.
        needed: usize,
        /// Bytes that there are.
        limit: usize,
    },
    /// The engine does not do what is wanted.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

impl PlanError {
    /// What to do about it.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Precision { .. } => {
                Some("set train.precision to \"bf16\" or \"fp16\"".to_owned())
            }
            Self::DoesNotFit {
                nearest: Some(nearest),
                ..
            } => Some(format!(
                "the nearest that fits, with {}: --set {}",
                gigabytes(nearest.total_bytes),
                nearest.changes.join(" --set ")
            )),
            Self::DoesNotFit { .. } => Some(
                "a smaller cache_latents.resolution_px or embed_text.t5_tokens, or a larger card"
                    .to_owned(),
            ),
            Self::CannotGoOn { .. } => Some(
                "end what else takes memory of the card, or begin again with --force: fewer at once would end with \
                 other bytes"
                    .to_owned(),
            ),
            Self::Cuda(_) => None,
        }
    }
}

impl TrainingPlan {
    /// Predicted peak bytes.
    pub fn total_bytes(&self) -> usize {
        self.parts.iter().map(|(_, bytes)| bytes).sum()
    }

    /// One line: what is chosen, and the memory that it is predicted to take.
    pub fn summary(&self) -> String {
        format!(
            "{} micro-batch(es) at once, {} of {} blocks recomputed, {} of GPU memory",
            self.fused,
            self.recomputed_blocks,
            self.num_blocks,
            gigabytes(self.total_bytes())
        )
    }

    /// As the engine wants to hear it.
    pub(crate) fn recompute(&self) -> Recompute {
        match self.recomputed_blocks {
            0 => Recompute::Nothing,
            all if all == self.num_blocks => Recompute::Everything,
            some => Recompute::First(some),
        }
    }
}

impl TrainingRequest<'_> {
    /// The fastest way that takes at most `limit_bytes`: the most fused and the least recomputed that fits.
    ///
    /// # Errors
    ///
    /// [`PlanError::DoesNotFit`] with the nearest recipe that does, or if the engine cannot run the network or train
    /// the LoRA's layers.
    pub fn choose(&self, limit_bytes: usize) -> Result<TrainingPlan, PlanError> {
        match self.fitting(limit_bytes)? {
            Some(plan) => Ok(plan),
            None => Err(match self.workload.at_once {
                Some(at_once) => PlanError::CannotGoOn {
                    at_once,
                    needed: self.least_bytes()?,
                    limit: limit_bytes,
                },
                None => PlanError::DoesNotFit {
                    needed: self.least_bytes()?,
                    limit: limit_bytes,
                    nearest: self.nearest(limit_bytes)?,
                },
            }),
        }
    }

    fn fitting(&self, limit_bytes: usize) -> Result<Option<TrainingPlan>, PlanError> {
        let Workload {
            accumulation,
            at_once,
            ..
        } = self.workload;
        let mut best: Option<TrainingPlan> = None;
        let divisors = (1..=accumulation).rev();
        let countable = |fused: usize| {
            let shape = self.shape(fused);
            shape.tokens().saturating_mul(shape.b) <= MAX_TOKENS
        };
        let allowed = |fused: &usize| {
            accumulation.is_multiple_of(*fused)
                && at_once.is_none_or(|wanted| wanted == *fused)
                && countable(*fused)
        };
        for fused in divisors.filter(allowed) {
            let request = self.of_fused(fused, Recompute::Nothing)?;
            let Some((recompute, plan)) = fit(&request, limit_bytes, Rates::H100)? else {
                continue;
            };
            let num_blocks = self.config.num_layers + self.config.num_single_layers;
            let flags = recompute.flags(num_blocks);
            let candidate = TrainingPlan {
                fused,
                recomputed_blocks: flags.iter().filter(|again| **again).count(),
                num_blocks,
                step_s: plan.micro_step_s() * (accumulation / fused) as f64,
                parts: plan.parts,
            };
            if best
                .as_ref()
                .is_none_or(|best| candidate.step_s < best.step_s)
            {
                best = Some(candidate);
            }
            if recompute == Recompute::Nothing {
                break; // fewer at once is never faster when nothing had to be recomputed
            }
        }
        Ok(best)
    }

    fn least_bytes(&self) -> Result<usize, PlanError> {
        let fused = self.workload.at_once.unwrap_or(1);
        let request = self.of_fused(fused, Recompute::Nothing)?;
        let (_, plan) = most_frugal(&request, Rates::H100)?;
        Ok(plan.total_bytes())
    }

    /// The first of some changes, from the one that changes results least, that fits.
    fn nearest(&self, limit_bytes: usize) -> Result<Option<Nearest>, PlanError> {
        let images = self.workload.micro_batch * self.workload.accumulation;
        let quantised = BaseWeights::Nf4 { double_quant: true };
        let mut changes = Vec::new();
        let mut request = self.clone();
        let mut try_next = |request: &Self, change: String| -> Result<Option<Nearest>, PlanError> {
            changes.push(change);
            let total_bytes = request.least_bytes()?;
            Ok((total_bytes <= limit_bytes).then(|| Nearest {
                changes: changes.clone(),
                total_bytes,
            }))
        };
        if self.workload.micro_batch > 1 {
            request.workload.micro_batch = 1;
            request.workload.accumulation = images;
            let change = format!("train.micro_batch=1 --set train.accumulation={images}");
            if let Some(nearest) = try_next(&request, change)? {
                return Ok(Some(nearest));
            }
        }
        if self.base != quantised {
            request.base = quantised;
            let change = "train.base_format=nf4-double-quant".to_owned();
            if let Some(nearest) = try_next(&request, change)? {
                return Ok(Some(nearest));
            }
        }
        Ok(None)
    }

    fn shape(&self, fused: usize) -> Shape {
        Shape {
            b: self.workload.micro_batch.saturating_mul(fused),
            text: self.workload.text_tokens,
            latent_cells: self.workload.latent_cells,
        }
    }

    fn of_fused(&self, fused: usize, recompute: Recompute) -> Result<PlanRequest, PlanError> {
        let t = half_of(self.precision).ok_or(PlanError::Precision {
            found: self.precision,
        })?;
        let lora = self.lora.factors().into_iter();
        Ok(PlanRequest {
            config: self.config.clone(),
            options: EngineOptions {
                t,
                form: form_of(self.base),
            },
            lora: lora
                .map(|factors| LoraSize {
                    path: factors.path,
                    rank: factors.rank,
                })
                .collect(),
            shape: self.shape(fused),
            training: training_options(self.optimizer, recompute),
        })
    }
}

/// How a LoRA is trained, as the engine wants to hear it.
pub(crate) fn training_options(optimizer: &LoraOptimizer, recompute: Recompute) -> TrainingOptions {
    TrainingOptions {
        recompute,
        optimizer: optimizer.kind(),
        adamw: optimizer.config(),
        max_grad_norm: optimizer.max_grad_norm(),
    }
}

/// Bytes as people read them, e.g. `7.42 GB`.
pub fn gigabytes(bytes: usize) -> String {
    format!("{:.2} GB", bytes as f64 / 1e9)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use lora::LoraModule;
    use quant::{AdamWConfig, OptimizerKind};

    use super::*;
    use crate::optimise::LossScaler;

    fn lora(config: &MmditConfig, ending: &str) -> TrainableLora {
        let layers = config.linears().into_iter();
        let modules: BTreeMap<String, LoraModule> = layers
            .filter(|layer| layer.path.ends_with(ending))
            .map(|layer| {
                let (i, o) = (layer.in_features, layer.out_features);
                let module = LoraModule::new(4.0, i, o, vec![0.0; 4 * i], vec![0.0; 4 * o]);
                (layer.path, module)
            })
            .collect();
        TrainableLora::from_modules(modules)
    }

    fn optimizer(lora: &TrainableLora) -> LoraOptimizer {
        let config = AdamWConfig {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 1e-4,
        };
        let kind = OptimizerKind::AdamW8bit {
            min_8bit_size: 4096,
        };
        LoraOptimizer::new(kind, config, 1.0, LossScaler::fixed(), lora)
    }

    fn with<R>(
        base: BaseWeights,
        micro_batch: usize,
        work: impl FnOnce(&TrainingRequest<'_>) -> R,
    ) -> R {
        let config = MmditConfig::flux_dev();
        let lora = lora(&config, "to_q");
        work(&TrainingRequest {
            config: &config,
            precision: Precision::Bf16,
            base,
            lora: &lora,
            optimizer: &optimizer(&lora),
            workload: Workload {
                micro_batch,
                accumulation: 4,
                text_tokens: 512,
                latent_cells: [64, 64],
                at_once: None,
            },
        })
    }

    const NF4: BaseWeights = BaseWeights::Nf4 { double_quant: true };

    #[test]
    fn much_memory_fuses_all_micro_batches_and_recomputes_nothing() {
        let plan = with(NF4, 1, |request| request.choose(80_000_000_000)).expect("it fits");
        assert_eq!(
            (plan.fused, plan.recomputed_blocks, plan.num_blocks),
            (4, 0, 57)
        );
        assert!(plan.total_bytes() > 20_000_000_000, "{plan:?}");
        assert_eq!(plan.recompute(), Recompute::Nothing);
    }

    #[test]
    fn little_memory_recomputes_and_keeps_the_limit() {
        let limit = 8_000_000_000;
        let plan = with(NF4, 1, |request| request.choose(limit)).expect("it fits");
        assert!(
            plan.recomputed_blocks > 0 && plan.total_bytes() <= limit,
            "{plan:?}"
        );
        let generous = with(NF4, 1, |request| request.choose(80_000_000_000)).expect("it fits");
        assert!(plan.step_s > generous.step_s);
    }

    #[test]
    fn a_run_is_gone_on_with_as_many_at_once_as_it_began_with_or_not_at_all() {
        let begun_with = |at_once: usize, limit: usize| {
            with(NF4, 1, |request| {
                let mut request = request.clone();
                request.workload.at_once = Some(at_once);
                request.choose(limit)
            })
        };
        // Where four would fit too, and where they fit only with all blocks recomputed.
        for (at_once, limit) in [(2, 80_000_000_000), (4, 10_500_000_000)] {
            assert_eq!(
                begun_with(at_once, limit).map(|plan| plan.fused).ok(),
                Some(at_once)
            );
        }
        let error = begun_with(4, 8_000_000_000).expect_err("only fewer fit");
        assert!(
            matches!(error, PlanError::CannotGoOn { at_once: 4, .. }),
            "{error}"
        );
        assert!(error.help().is_some_and(|help| help.contains("--force")));
    }

    #[test]
    fn what_cannot_fit_is_refused_with_the_nearest_that_does() {
        let error = with(BaseWeights::Plain, 2, |request| {
            request.choose(10_000_000_000)
        })
        .expect_err("24 GB of weights");
        let help = error.help().expect("there is a way");
        assert!(error.to_string().contains("10.00 GB"), "{error}");
        assert!(
            help.contains("train.micro_batch=1 --set train.accumulation=8")
                && help.contains("train.base_format=nf4-double-quant"),
            "{help}"
        );
        let hopeless = with(NF4, 1, |request| request.choose(1_000_000_000));
        assert!(
            matches!(hopeless, Err(PlanError::DoesNotFit { nearest: None, .. })),
            "{hopeless:?}"
        );
    }

    #[test]
    fn modulations_are_planned_and_other_precisions_refused_before_anything_is_loaded() {
        let config = MmditConfig::flux_dev();
        let lora = lora(&config, "norm1.linear");
        let mut request = TrainingRequest {
            config: &config,
            precision: Precision::F16,
            base: NF4,
            lora: &lora,
            optimizer: &optimizer(&lora),
            workload: Workload {
                micro_batch: 1,
                accumulation: 1,
                text_tokens: 77,
                latent_cells: [64, 64],
                at_once: None,
            },
        };
        let plan = request
            .choose(80_000_000_000)
            .expect("every layer is trained");
        assert_eq!(plan.recomputed_blocks, 0, "{plan:?}");
        request.precision = Precision::F32;
        let error = request
            .choose(80_000_000_000)
            .expect_err("not the engine's");
        assert!(error.to_string().contains("F32"), "{error}");
    }
}
