//! The LoRA that a run begins with: which layers the recipe's targets are, and their first values.

use std::collections::{BTreeMap, BTreeSet};

use engine::TrainableLora;
use flow_matching::{Purpose, Stream};
use lora::{LoraError, LoraModule, Target};
use mmdit::MmditConfig;
use pipeline::recipe::{LoraInit, TrainRecipe};

use crate::error::TrainError;

/// An untrained LoRA on every layer whose path ends with one of the recipe's targets.
///
/// # Errors
///
/// If a target names no layer, or the rank is too large for one.
pub fn untrained_lora(
    config: &MmditConfig,
    recipe: &TrainRecipe,
) -> Result<TrainableLora, TrainError> {
    let layers = config.linears();
    let is_target = |path: &str, target: &str| {
        path.strip_suffix(target)
            .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    for target in &recipe.targets {
        if !layers.iter().any(|layer| is_target(&layer.path, target)) {
            let known: BTreeSet<String> = layers.iter().map(|layer| ending(&layer.path)).collect();
            return Err(TrainError::NoSuchTarget {
                target: target.clone(),
                known: known.into_iter().collect(),
            });
        }
    }
    let modules: BTreeMap<String, LoraModule> = layers
        .into_iter()
        .filter(|layer| recipe.targets.iter().any(|t| is_target(&layer.path, t)))
        .map(|layer| {
            let mut stream = Stream::new(recipe.seed, Purpose::LoraInit, 0, &layer.path);
            let (rank, alpha) = (recipe.rank, recipe.alpha as f32);
            let target = Target::new(layer.path, layer.in_features, layer.out_features);
            let module = match recipe.lora_init {
                LoraInit::Gaussian => {
                    LoraModule::gaussian(rank, alpha, &target, || stream.normal())
                }
                LoraInit::Kaiming => LoraModule::kaiming(rank, alpha, &target, || stream.uniform()),
            }?;
            Ok((target.path, module))
        })
        .collect::<Result<_, LoraError>>()?;
    Ok(TrainableLora::from_modules(modules))
}

/// What a target for this layer would be called: its last name, with the number before or after it.
fn ending(path: &str) -> String {
    let names: Vec<&str> = path.split('.').collect();
    let is_number = |name: &&str| name.bytes().all(|byte| byte.is_ascii_digit());
    let start = match names.last() {
        Some(last) if is_number(last) => names.len().saturating_sub(2),
        _ => names.len().saturating_sub(1),
    };
    names[start..].join(".")
}

#[cfg(test)]
mod tests {
    use pipeline::{FailureKind, StageError as _};

    use super::*;
    use crate::tests::support::recipe;

    /// The public recipe's targets.
    fn public() -> TrainRecipe {
        let mut train = recipe().train;
        train.targets = ["to_q", "to_k", "to_v", "to_out.0"]
            .map(str::to_owned)
            .to_vec();
        train
    }

    #[test]
    fn the_recipes_targets_are_190_modules_and_4_669_440_numbers_of_flux_dev() {
        let train = TrainRecipe {
            rank: 4,
            ..public()
        };
        let lora = untrained_lora(&MmditConfig::flux_dev(), &train).expect("known");
        assert_eq!(lora.num_modules(), 190);
        assert_eq!(lora.values.iter().map(Vec::len).sum::<usize>(), 4_669_440);
    }

    #[test]
    fn text_projections_do_not_end_in_to_q() {
        let lora = untrained_lora(&MmditConfig::tiny(), &public()).expect("known");
        assert!(lora.names().iter().all(|name| !name.contains("add_")));
        assert!(
            lora.names()
                .contains(&"transformer_blocks.0.attn.to_out.0.lora_A.weight".to_owned())
        );
    }

    #[test]
    fn an_unknown_target_is_refused_with_those_that_there_are() {
        let mut train = recipe().train;
        train.targets = vec!["to_qq".to_owned()];
        let error = untrained_lora(&MmditConfig::tiny(), &train).expect_err("unknown");
        let TrainError::NoSuchTarget { target, known } = error else {
            panic!("{error}")
        };
        assert_eq!(target, "to_qq");
        assert!(known.contains(&"to_out.0".to_owned()) && known.contains(&"to_q".to_owned()));
    }

    #[test]
    fn an_absurd_rank_is_bad_input_that_names_the_layer() {
        let mut train = recipe().train;
        for rank in [1_000_000_000_000, i64::MAX as usize] {
            train.rank = rank;
            let error = untrained_lora(&MmditConfig::tiny(), &train).expect_err("too large");
            assert_eq!(error.kind(), FailureKind::BadInput);
            let message = error.to_string();
            assert!(
                message.contains("attn.to_") && message.contains(&rank.to_string()),
                "{message}"
            );
        }
    }

    #[test]
    fn initial_values_depend_on_the_seed_and_the_path_alone() {
        let mut train = recipe().train;
        let all = untrained_lora(&MmditConfig::tiny(), &train).expect("known");
        train.targets = vec!["to_k".to_owned()];
        let some = untrained_lora(&MmditConfig::tiny(), &train).expect("known");
        let place = all.names().iter().position(|name| *name == some.names()[0]);
        assert_eq!(all.values[place.expect("it is there")], some.values[0]);
        assert!(some.values[1].iter().all(|value| *value == 0.0));
        train.seed += 1;
        let other = untrained_lora(&MmditConfig::tiny(), &train).expect("known");
        assert_ne!(other.values[0], some.values[0]);
    }
}
