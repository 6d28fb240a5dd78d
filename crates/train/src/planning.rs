//! What training a recipe takes on an NVIDIA card, from configurations alone: no weights, no data.

use autoencoder::AutoencoderConfig;
use engine::{
    LoraOptimizer, TrainingPlan, TrainingRequest, Workload, base_weights_of, precision_of,
};
use mmdit::MmditConfig;
use pipeline::WeightPart;
use pipeline::recipe::{Recipe, TrainRecipe};

use crate::error::TrainError;
use crate::untrained::untrained_lora;

/// The sizes that a plan is made for.
#[derive(Clone, Debug)]
pub struct PlannedBase {
    /// The transformer's.
    pub transformer: MmditConfig,
    /// Pixels along one side of a latent cell.
    pub cell_px: usize,
}

impl PlannedBase {
    /// FLUX.1-dev's, which need not be there.
    pub fn flux_dev() -> Self {
        Self {
            transformer: MmditConfig::flux_dev(),
            cell_px: AutoencoderConfig::flux().scale_factor_px(),
        }
    }

    /// Those of the recipe's base, from its `config.json` files.
    ///
    /// # Errors
    ///
    /// If they cannot be used.
    pub fn of(recipe: &Recipe) -> Result<Self, TrainError> {
        let config = |part: WeightPart| recipe.base.path.join(part.folder()).join("config.json");
        Ok(Self {
            transformer: MmditConfig::from_file(&config(WeightPart::Transformer))?,
            cell_px: AutoencoderConfig::from_file(&config(WeightPart::Vae))?.scale_factor_px(),
        })
    }
}

/// Plans training with the engine `cuda` in at most `limit_bytes` of a card's memory.
///
/// # Errors
///
/// If a target names no layer, the engine does not train it or not in the recipe's precision, or it does not fit.
pub fn plan(
    recipe: &Recipe,
    base: &PlannedBase,
    limit_bytes: usize,
) -> Result<TrainingPlan, TrainError> {
    let train = &recipe.train;
    let lora = untrained_lora(&base.transformer, train)?;
    let cells = recipe.cache_latents.resolution_px as usize / base.cell_px;
    let request = TrainingRequest {
        config: &base.transformer,
        precision: precision_of(train.precision),
        base: base_weights_of(train.base_format),
        lora: &lora,
        optimizer: &LoraOptimizer::of(train, &lora),
        workload: workload(train, recipe.embed_text.t5_tokens, [cells, cells], None),
    };
    Ok(request
        .choose(limit_bytes)
        .map_err(engine::OpenError::from)?)
}

/// What one step of a recipe goes over; `at_once` is that of a run that is gone on with.
pub fn workload(
    recipe: &TrainRecipe,
    text_tokens: usize,
    latent_cells: [usize; 2],
    at_once: Option<usize>,
) -> Workload {
    Workload {
        micro_batch: recipe.micro_batch as usize,
        accumulation: recipe.accumulation as usize,
        text_tokens,
        latent_cells,
        at_once,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use pipeline::StageError as _;

    use super::*;

    fn recipe(changes: &[&str]) -> Recipe {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/flux-dev-pixel-art.toml");
        let changes: Vec<_> = changes
            .iter()
            .map(|change| change.parse().expect("a change"))
            .collect();
        Recipe::load(&path, &changes).expect("the shipped recipe is valid")
    }

    #[test]
    fn the_flux_recipe_is_planned_without_its_base() {
        let plan = plan(&recipe(&[]), &PlannedBase::flux_dev(), 23_000_000_000).expect("it fits");
        assert!(
            plan.fused >= 1 && plan.total_bytes() <= 23_000_000_000,
            "{plan:?}"
        );
        assert!(plan.step_s > 0.1, "{plan:?}");
    }

    #[test]
    fn a_base_too_large_for_the_card_is_refused_with_what_would_fit() {
        let recipe = recipe(&["train.base_format=plain"]);
        let error = plan(&recipe, &PlannedBase::flux_dev(), 10_000_000_000).expect_err("24 GB");
        let help = error.help().expect("nf4 fits");
        assert!(
            help.contains("train.base_format=nf4-double-quant"),
            "{help}"
        );
        assert_eq!(error.kind(), pipeline::FailureKind::BadInput);
    }

    #[test]
    fn f32_is_not_the_engines() {
        let recipe = recipe(&["train.precision=f32"]);
        let error = plan(&recipe, &PlannedBase::flux_dev(), 80_000_000_000).expect_err("f32");
        assert!(error.to_string().contains("bf16 and fp16"), "{error}");
    }
}
