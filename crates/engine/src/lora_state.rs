//! The factors being trained: `f32` masters in memory, and as tensors that gradients are recorded for.

use std::collections::BTreeMap;

use engine_cpu::Factors;
use lora::{LoraFile, LoraModule};
use mmdit::{Adapter, Adapters};
use tensor::{Device, Tensor, from_f32};

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

    /// The factors as engines outside Burn take them.
    pub fn factors(&self) -> Vec<Factors> {
        self.modules
            .iter()
            .zip(self.values.chunks_exact(2))
            .map(|(module, pair)| Factors {
                path: module.path.clone(),
                rank: module.rank,
                scale: module.alpha / module.rank as f32,
                a: pair[0].clone(),
                b: pair[1].clone(),
            })
            .collect()
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
