//! Memory and time before anything is loaded.
//!
//! A plan is a dry run: the code that loads, attaches and trains runs on a stream without a device, whose allocations
//! are counted. So a plan and what is allocated later cannot drift apart. Not part of it: the driver's context and the
//! kernels' code, together about half a gigabyte that no program can do anything about.

use mmdit::MmditConfig;

use crate::error::CudaError;
use crate::gemm::WORKSPACE_BYTES;
use crate::model::{
    Engine, EngineOptions, LoraFactors, NormalWeights, Recompute, Shape, TrainingOptions,
};
use crate::stream::{Rates, Stream, Tally};

/// A LoRA's layer and rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoraSize {
    /// The layer's path.
    pub path: String,
    /// The rank.
    pub rank: usize,
}

/// The layers whose paths end with one of `targets` (whole components), all of one rank.
pub fn lora_sizes(config: &MmditConfig, targets: &[&str], rank: usize) -> Vec<LoraSize> {
    let is_target = |path: &str| {
        targets.iter().any(|target| {
            path.strip_suffix(target)
                .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        })
    };
    config
        .linears()
        .into_iter()
        .filter(|layer| is_target(&layer.path))
        .map(|layer| LoraSize {
            path: layer.path,
            rank,
        })
        .collect()
}

/// Untrained factors of these sizes: A is given by `value`, B is 0.
///
/// # Panics
///
/// If a path is no layer of the model.
pub fn untrained(
    config: &MmditConfig,
    sizes: &[LoraSize],
    mut value: impl FnMut() -> f32,
) -> Vec<LoraFactors> {
    let layers: std::collections::BTreeMap<String, (usize, usize)> = config
        .linears()
        .into_iter()
        .map(|layer| (layer.path, (layer.in_features, layer.out_features)))
        .collect();
    sizes
        .iter()
        .map(|LoraSize { path, rank }| {
            let (inputs, outputs) = layers[path];
            LoraFactors {
                path: path.clone(),
                rank: *rank,
                scale: 1.0,
                a: (0..rank * inputs).map(|_| value()).collect(),
                b: vec![0.0; outputs * rank],
            }
        })
        .collect()
}

/// What is to be trained.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanRequest {
    /// Sizes of the model.
    pub config: MmditConfig,
    /// How it is loaded.
    pub options: EngineOptions,
    /// The LoRA.
    pub lora: Vec<LoraSize>,
    /// Sizes of a micro-batch.
    pub shape: Shape,
    /// How it is trained.
    pub training: TrainingOptions,
}

/// What training takes.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Bytes by part.
    pub parts: Vec<(&'static str, usize)>,
    /// What one micro-step launches, in the order of [`crate::stream::Work::ALL`].
    pub micro_step: [Tally; 4],
}

impl Plan {
    /// Peak bytes of all parts.
    pub fn total_bytes(&self) -> usize {
        self.parts.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Predicted time of a micro-step.
    pub fn micro_step_s(&self) -> f64 {
        self.micro_step.iter().map(|tally| tally.seconds).sum()
    }
}

/// Plans a training run.
///
/// # Errors
///
/// If the engine cannot run the model or train the LoRA.
pub fn plan(request: &PlanRequest, rates: Rates) -> Result<Plan, CudaError> {
    let source = NormalWeights { std: 0.02 };
    let mut engine = Engine::load(Stream::dry(), &request.config, &source, request.options)?;
    let factors = untrained(&request.config, &request.lora, || 0.0);
    engine.attach_lora(&factors, true)?;
    engine.start_training(request.training)?;
    let micro_step = engine.count_micro_step(request.shape, rates)?;
    let mut parts: Vec<(&'static str, usize)> = engine.used_bytes().to_vec();
    parts.extend(engine.training_bytes());
    let known: usize = parts.iter().map(|(_, bytes)| bytes).sum();
    // Positions, the loss, and what alignment adds.
    let all = engine.stream().allocated_bytes() + WORKSPACE_BYTES;
    parts.push(("rest", all.saturating_sub(known)));
    Ok(Plan { parts, micro_step })
}

/// A plan with the first `count` blocks recomputed.
fn recomputing(
    request: &PlanRequest,
    count: usize,
    rates: Rates,
) -> Result<(Recompute, Plan), CudaError> {
    let recompute = match count {
        0 => Recompute::Nothing,
        all if all == num_blocks(request) => Recompute::Everything,
        some => Recompute::First(some),
    };
    let request = PlanRequest {
        training: TrainingOptions {
            recompute,
            ..request.training
        },
        ..request.clone()
    };
    plan(&request, rates).map(|plan| (recompute, plan))
}

fn num_blocks(request: &PlanRequest) -> usize {
    request.config.num_layers + request.config.num_single_layers
}

/// The way that takes the least memory: all blocks but the last are recomputed, or that too.
///
/// The last block's turn comes first in the backward pass, when all that the others kept is there still. Recomputed, it
/// needs room for its whole inside at that moment; kept, it shares that with the forward pass, and takes less as a rule.
///
/// # Errors
///
/// As [`plan`].
pub fn most_frugal(request: &PlanRequest, rates: Rates) -> Result<(Recompute, Plan), CudaError> {
    let all = num_blocks(request);
    let but_last = recomputing(request, all.saturating_sub(1), rates)?;
    let everything = recomputing(request, all, rates)?;
    Ok(
        match everything.1.total_bytes() < but_last.1.total_bytes() {
            true => everything,
            false => but_last,
        },
    )
}

/// The choice of recomputed blocks that fits into `limit_bytes` and recomputes the fewest.
///
/// # Errors
///
/// As [`plan`]. `Ok(None)` if not even [`most_frugal`]'s fits.
pub fn fit(
    request: &PlanRequest,
    limit_bytes: usize,
    rates: Rates,
) -> Result<Option<(Recompute, Plan)>, CudaError> {
    // More recomputed blocks take less memory, up to the last but one: the smallest sufficient number can be bisected.
    let (mut low, mut high) = (0, num_blocks(request).saturating_sub(1));
    let mut best = recomputing(request, high, rates)?;
    if best.1.total_bytes() > limit_bytes {
        let most_frugal = most_frugal(request, rates)?;
        return Ok((most_frugal.1.total_bytes() <= limit_bytes).then_some(most_frugal));
    }
    while low < high {
        let middle = (low + high) / 2;
        let candidate = recomputing(request, middle, rates)?;
        if candidate.1.total_bytes() <= limit_bytes {
            (high, best) = (middle, candidate);
        } else {
            low = middle + 1;
        }
    }
    Ok(Some(best))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::half_type::Half;
    use crate::model::WeightForm;
    use quant::{AdamWConfig, OptimizerKind};

    const TARGETS: [&str; 4] = ["to_q", "to_k", "to_v", "to_out.0"];

    fn request(form: WeightForm, b: usize, recompute: Recompute) -> PlanRequest {
        let config = MmditConfig::flux_dev();
        PlanRequest {
            lora: lora_sizes(&config, &TARGETS, 4),
            config,
            options: EngineOptions {
                t: Half::Bf16,
                form,
            },
            shape: Shape {
                b,
                text: 512,
                latent_cells: [64, 64],
            },
            training: TrainingOptions {
                recompute,
                optimizer: OptimizerKind::AdamW8bit {
                    min_8bit_size: 4096,
                },
                adamw: AdamWConfig {
                    beta1: 0.9,
                    beta2: 0.999,
                    epsilon: 1e-8,
                    weight_decay: 0.01,
                },
                max_grad_norm: 1.0,
            },
        }
    }

    const NF4: WeightForm = WeightForm::Nf4 { double_quant: true };

    fn gigabytes(plan: &Plan) -> f64 {
        plan.total_bytes() as f64 / 1e9
    }

    #[test]
    fn the_recipe_has_190_modules_on_flux_dev() {
        let config = MmditConfig::flux_dev();
        let sizes = lora_sizes(&config, &TARGETS, 4);
        assert_eq!(sizes.len(), 190);
        let numbers: usize = untrained(&config, &sizes, || 0.0)
            .iter()
            .map(|f| f.a.len() + f.b.len())
            .sum();
        assert_eq!(numbers, 4_669_440);
    }

    #[test]
    fn what_takes_least_is_found_and_fits_into_just_that() {
        let request = request(NF4, 1, Recompute::Nothing);
        let (_, least) = most_frugal(&request, Rates::H100).expect("it runs");
        for count in [0, 30, 56, 57] {
            let (_, plan) = recomputing(&request, count, Rates::H100).expect("it runs");
            assert!(plan.total_bytes() >= least.total_bytes(), "{count}");
        }
        let fits = |limit| {
            fit(&request, limit, Rates::H100)
                .expect("it runs")
                .is_some()
        };
        assert!(fits(least.total_bytes()) && !fits(least.total_bytes() - 1));
    }

    #[test]
    fn nf4_with_recompute_fits_in_eight_gigabytes_and_keeping_takes_more() {
        let less = plan(&request(NF4, 1, Recompute::Everything), Rates::H100).expect("it runs");
        let more = plan(&request(NF4, 1, Recompute::Nothing), Rates::H100).expect("it runs");
        assert!((6.0..8.0).contains(&gigabytes(&less)), "{less:?}");
        assert!((10.0..14.0).contains(&gigabytes(&more)), "{more:?}");
        assert!(less.micro_step_s() > 1.2 * more.micro_step_s());
    }

    #[test]
    fn a_plan_recomputes_no_more_than_memory_asks_for() {
        let request = request(NF4, 4, Recompute::Nothing);
        let limit = 24_000_000_000;
        let fitted = fit(&request, limit, Rates::H100).expect("it runs");
        let (recompute, plan) = fitted.expect("it fits");
        assert!(
            matches!(recompute, Recompute::First(count) if count < 57),
            "{recompute:?}"
        );
        assert!(plan.total_bytes() <= limit);
        let none = fit(&request, 1_000_000_000, Rates::H100).expect("it runs");
        assert_eq!(none, None);
    }

    #[test]
    fn a_step_without_recompute_has_three_times_the_products_of_a_forward_pass() {
        let plan = plan(
            &request(WeightForm::Half, 1, Recompute::Nothing),
            Rates::H100,
        )
        .expect("it runs");
        // 2 · 8.7e9 weights of the blocks · 1536 tokens, shared by two streams in the double blocks: 17.8e12 forward
        // and as much backward.
        let flops = plan.micro_step[0].flops;
        assert!((30e12..40e12).contains(&flops), "{flops}");
    }
}
