//! The factors being trained: `f32` masters in memory, and as tensors that gradients are recorded for.

use std::collections::{BTreeMap, BTreeSet};

use flow_matching::{Purpose, Stream};
use lora::{LoraFile, LoraModule};
use mmdit::{Adapter, Adapters, MmditConfig};
use pipeline::recipe::{LoraInit, TrainRecipe};
use tensor::{Device, Tensor, from_f32};

use crate::error::TrainError;

/// One adapted layer.
#[derive(Clone, Debug, PartialEq)]
struct Module {
    path: String,
    in_features: usize,
    out_features: usize,
    rank: usize,
    alpha: f32,
}

/// A LoRA in training. Its tensors are ordered by path, A before B.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainableLora {
    modules: Vec<Module>,
    /// Row-major values of every tensor, in the order of [`TrainableLora::names`].
    pub values: Vec<Vec<f32>>,
}

/// The factors on a device, recorded for differentiation.
pub struct Leaves {
    /// To be passed into the transformer.
    pub adapters: Adapters,
    /// The same tensors in the order of [`TrainableLora::names`], to ask gradients of.
    pub tensors: Vec<Tensor<2>>,
}

impl TrainableLora {
    /// An untrained LoRA on every layer whose path ends with one of the recipe's targets.
    ///
    /// # Errors
    ///
    /// If a target names no layer.
    pub fn untrained(config: &MmditConfig, recipe: &TrainRecipe) -> Result<Self, TrainError> {
        let layers = config.linears();
        let is_target = |path: &str, target: &str| {
            path.strip_suffix(target)
                .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        for target in &recipe.targets {
            if !layers.iter().any(|layer| is_target(&layer.path, target)) {
                let known: BTreeSet<String> =
                    layers.iter().map(|layer| ending(&layer.path)).collect();
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
                let sizes = (layer.in_features, layer.out_features);
                let module = match recipe.lora_init {
                    LoraInit::Gaussian => {
                        LoraModule::gaussian(rank, alpha, sizes.0, sizes.1, || stream.normal())
                    }
                    LoraInit::Kaiming => {
                        LoraModule::kaiming(rank, alpha, sizes.0, sizes.1, || stream.uniform())
                    }
                };
                (layer.path, module)
            })
            .collect();
        Ok(Self::from_modules(modules))
    }

    /// A LoRA that is trained further.
    pub fn from_modules(modules: BTreeMap<String, LoraModule>) -> Self {
        let mut lora = Self {
            modules: Vec::new(),
            values: Vec::new(),
        };
        for (path, module) in modules {
            lora.modules.push(Module {
                path,
                in_features: module.in_features,
                out_features: module.out_features,
                rank: module.rank,
                alpha: module.alpha,
            });
            lora.values.extend([module.a, module.b]);
        }
        lora
    }

    /// Number of adapted layers.
    pub fn num_modules(&self) -> usize {
        self.modules.len()
    }

    /// Names of the tensors: `<path>.lora_A.weight` and `<path>.lora_B.weight`, by path.
    pub fn names(&self) -> Vec<String> {
        self.modules
            .iter()
            .flat_map(|module| {
                ["A", "B"].map(|factor| format!("{}.lora_{factor}.weight", module.path))
            })
            .collect()
    }

    /// Names and numbers of values, as the optimiser wants them.
    pub fn parameters(&self) -> Vec<(String, usize)> {
        self.names()
            .into_iter()
            .zip(self.values.iter().map(Vec::len))
            .collect()
    }

    /// Shapes of the tensors, in the order of [`TrainableLora::names`].
    pub fn shapes(&self) -> Vec<[usize; 2]> {
        self.modules
            .iter()
            .flat_map(|m| [[m.rank, m.in_features], [m.out_features, m.rank]])
            .collect()
    }

    /// The factors as tensors on a device that records operations.
    pub fn leaves(&self, device: &Device) -> Leaves {
        let tensors: Vec<Tensor<2>> = self
            .values
            .iter()
            .zip(self.shapes())
            .map(|(values, shape)| from_f32(values.clone(), shape, device).require_grad())
            .collect();
        let mut adapters = Adapters::none();
        for (module, pair) in self.modules.iter().zip(tensors.chunks_exact(2)) {
            let adapter = Adapter {
                a: pair[0].clone(),
                b: pair[1].clone(),
                scale: module.alpha / module.rank as f32,
            };
            adapters.push(&module.path, adapter);
        }
        Leaves { adapters, tensors }
    }

    /// The LoRA as a file's content.
    pub fn to_file(&self, metadata: BTreeMap<String, String>) -> LoraFile {
        let modules = self
            .modules
            .iter()
            .zip(self.values.chunks_exact(2))
            .map(|(module, pair)| {
                let (a, b) = (pair[0].clone(), pair[1].clone());
                let lora =
                    LoraModule::new(module.alpha, module.in_features, module.out_features, a, b);
                (module.path.clone(), lora)
            })
            .collect();
        LoraFile::new(modules, metadata)
    }
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
    use super::*;
    use crate::tests::support::recipe;

    #[test]
    fn the_recipes_targets_are_190_modules_and_4_669_440_numbers_of_flux_dev() {
        let mut train = recipe().train;
        train.rank = 4;
        let lora = TrainableLora::untrained(&MmditConfig::flux_dev(), &train).expect("known");
        assert_eq!(lora.num_modules(), 190);
        assert_eq!(lora.values.iter().map(Vec::len).sum::<usize>(), 4_669_440);
    }

    #[test]
    fn text_projections_do_not_end_in_to_q() {
        let lora = TrainableLora::untrained(&MmditConfig::tiny(), &recipe().train).expect("known");
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
        let error = TrainableLora::untrained(&MmditConfig::tiny(), &train).expect_err("unknown");
        let TrainError::NoSuchTarget { target, known } = error else {
            panic!("{error}")
        };
        assert_eq!(target, "to_qq");
        assert!(known.contains(&"to_out.0".to_owned()) && known.contains(&"to_q".to_owned()));
    }

    #[test]
    fn initial_values_depend_on_the_seed_and_the_path_alone() {
        let mut train = recipe().train;
        let all = TrainableLora::untrained(&MmditConfig::tiny(), &train).expect("known");
        train.targets = vec!["to_k".to_owned()];
        let some = TrainableLora::untrained(&MmditConfig::tiny(), &train).expect("known");
        let place = all.names().iter().position(|name| *name == some.names()[0]);
        assert_eq!(all.values[place.expect("it is there")], some.values[0]);
        assert!(some.values[1].iter().all(|value| *value == 0.0));
        train.seed += 1;
        let other = TrainableLora::untrained(&MmditConfig::tiny(), &train).expect("known");
        assert_ne!(other.values[0], some.values[0]);
    }
}
