//! All parameters of a phase as one flat tensor, with AdamW, the average that is kept, and checkpoints.
//!
//! One tensor for everything keeps an optimiser step at a dozen launches however many parameters there are. Each
//! parameter begins at a multiple of [`ALIGNMENT`] values, so that kernels may read it in wide loads.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use artifacts::{Dtype, SafetensorsFile, TensorToWrite, write_safetensors};
use tensor::{Device, Gradients, ParameterSpec, Tensor, Weights, from_f32, to_f32};

use crate::PretrainError;
use crate::recipe::OptimizerRecipe;
use crate::results::{Values, by_name};

/// Values between possible beginnings of parameters: 512 bytes.
const ALIGNMENT: usize = 128;

/// Which parameters there are and where they lie. One list per model.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    models: Vec<Vec<(ParameterSpec, Range<usize>)>>,
    length: usize,
}

impl Layout {
    pub(crate) fn new(models: Vec<Vec<ParameterSpec>>) -> Self {
        let mut length = 0;
        let models = models
            .into_iter()
            .map(|specs| {
                specs
                    .into_iter()
                    .map(|spec| {
                        let start = length;
                        let end = start + spec.num_elements() as usize;
                        length = end.next_multiple_of(ALIGNMENT);
                        (spec, start..end)
                    })
                    .collect()
            })
            .collect();
        Self { models, length }
    }

    fn all(&self) -> impl Iterator<Item = &(ParameterSpec, Range<usize>)> {
        self.models.iter().flatten()
    }
}

/// Tracked leaves of every parameter, and the weights that models are built around them from.
pub(crate) struct Leaves {
    /// One per model of the layout.
    pub weights: Vec<Weights>,
    tensors: Vec<Tensor<1>>,
}

/// Parameters, moments, average, and how far they are.
pub(crate) struct TrainState {
    layout: Layout,
    device: Device,
    values: Tensor<1>,
    first: Tensor<1>,
    second: Tensor<1>,
    averaged: Tensor<1>,
    /// Zeros of every length that is between two parameters: made once, they are not made at every step.
    padding: BTreeMap<usize, Tensor<1>>,
    /// Optimiser steps taken.
    pub step: u64,
}

impl TrainState {
    /// A state before the first step. `initial` gives the values of a parameter by model and specification.
    pub(crate) fn new(
        layout: Layout,
        device: &Device,
        initial: impl Fn(usize, &ParameterSpec) -> Vec<f32>,
    ) -> Self {
        let mut values = vec![0.0; layout.length];
        for (model, specs) in layout.models.iter().enumerate() {
            for (spec, range) in specs {
                values[range.clone()].copy_from_slice(&initial(model, spec));
            }
        }
        let values = from_f32(values, [layout.length], device);
        let padding = layout
            .all()
            .map(|(_, range)| range.len().next_multiple_of(ALIGNMENT) - range.len())
            .filter(|length| *length > 0) // a card refuses to fill nothing
            .map(|length| (length, Tensor::zeros([length], device)))
            .collect();
        Self {
            padding,
            first: values.zeros_like(),
            second: values.zeros_like(),
            averaged: values.clone(),
            values,
            step: 0,
            device: device.clone(),
            layout,
        }
    }

    /// A state before the first step, of parameters that are among `values`.
    pub(crate) fn from_values(layout: Layout, device: &Device, values: &Values) -> Self {
        let values = by_name(values);
        Self::new(layout, device, |_, spec| values[spec.name.as_str()].clone())
    }

    /// The parameters as tracked leaves on the training side of the device.
    pub(crate) fn leaves(&self) -> Leaves {
        self.leaves_beside(&[])
    }

    /// As [`TrainState::leaves`], in weights that also hold other values, on the same side and untracked.
    pub(crate) fn leaves_beside(&self, rest: &[(ParameterSpec, Tensor<1>)]) -> Leaves {
        let mut tensors = Vec::new();
        let mut weights = Vec::new();
        for specs in &self.layout.models {
            let leaves: Vec<(ParameterSpec, Tensor<1>)> = specs
                .iter()
                .map(|(spec, range)| {
                    let value = self.values.clone().slice([range.clone()]);
                    (spec.clone(), Tensor::from_inner(value).require_grad())
                })
                .collect();
            tensors.extend(leaves.iter().map(|(_, leaf)| leaf.clone()));
            weights.push(Weights::from_tensors(
                leaves.into_iter().chain(rest.iter().cloned()),
            ));
        }
        Leaves { weights, tensors }
    }

    /// The averaged parameters of each model, on the host.
    pub(crate) fn averaged_values(&self) -> Vec<Values> {
        let all = to_f32(&self.averaged);
        let values = |specs: &Vec<(ParameterSpec, Range<usize>)>| {
            let of = |(spec, range): &(ParameterSpec, Range<usize>)| {
                (spec.clone(), all[range.clone()].to_vec())
            };
            specs.iter().map(of).collect()
        };
        self.layout.models.iter().map(values).collect()
    }

    /// One step of AdamW with clipping by the global norm, which is given back. Nothing waits for the device.
    pub(crate) fn update(
        &mut self,
        leaves: &Leaves,
        gradients: &Gradients,
        recipe: &OptimizerRecipe,
    ) -> Tensor<1> {
        let mut parts = Vec::with_capacity(2 * leaves.tensors.len());
        for ((_, range), leaf) in self.layout.all().zip(&leaves.tensors) {
            let length = range.len();
            parts.push(match leaf.grad(gradients) {
                Some(gradient) => gradient,
                None => Tensor::zeros([length], &self.device),
            });
            let padding = length.next_multiple_of(ALIGNMENT) - length;
            if padding > 0 {
                parts.push(self.padding[&padding].clone());
            }
        }
        let gradient = Tensor::cat(parts, 0);
        let norm = gradient.clone().powi_scalar(2).sum().sqrt();
        let shrink = ((norm.clone() + 1e-6).recip() * recipe.max_grad_norm).clamp_max(1.0);
        let gradient = gradient * shrink;

        let OptimizerRecipe { beta1, beta2, .. } = *recipe;
        let learning_rate = recipe.learning_rate_at(self.step);
        let count = (self.step + 1) as i32;
        self.first = self.first.clone() * beta1 + gradient.clone() * (1.0 - beta1);
        self.second = self.second.clone() * beta2 + gradient.powi_scalar(2) * (1.0 - beta2);
        let root = (self.second.clone() / (1.0 - beta2.powi(count))).sqrt() + recipe.epsilon;
        let update = self.first.clone() / root * (learning_rate / (1.0 - beta1.powi(count)));
        let kept = 1.0 - learning_rate * recipe.weight_decay;
        self.values = self.values.clone() * kept - update;
        // Young averages forget faster, so that nothing of the random beginning stays in them.
        let decay = recipe
            .ema_decay
            .min((self.step + 1) as f64 / (self.step + 10) as f64);
        self.averaged = self.averaged.clone() * decay + self.values.clone() * (1.0 - decay);
        self.step += 1;
        norm
    }

    /// Writes a checkpoint.
    pub(crate) fn save(&self, path: &Path, run: &str) -> Result<(), PretrainError> {
        let parts = [&self.values, &self.first, &self.second, &self.averaged].map(to_f32);
        Snapshot {
            step: self.step,
            parts,
        }
        .write(path, run)
    }

    /// Takes over a checkpoint if there is one.
    pub(crate) fn resume(&mut self, path: &Path, run: &str) -> Result<(), PretrainError> {
        if let Some(snapshot) = Snapshot::read(path, run, self.layout.length)? {
            let parts = snapshot
                .parts
                .map(|values| from_f32(values, [self.layout.length], &self.device));
            [self.values, self.first, self.second, self.averaged] = parts;
            self.step = snapshot.step;
        }
        Ok(())
    }
}

/// A checkpoint: all values, first and second moments, and averages, flat.
pub(crate) struct Snapshot {
    /// Optimiser steps taken.
    pub step: u64,
    /// In the order of [`PARTS`].
    pub parts: [Vec<f32>; 4],
}

/// Names of a checkpoint's tensors.
const PARTS: [&str; 4] = ["values", "first", "second", "averaged"];

impl Snapshot {
    /// Writes it for a run of a name.
    pub(crate) fn write(&self, path: &Path, run: &str) -> Result<(), PretrainError> {
        let shape = [self.parts[0].len()];
        let tensors: Vec<TensorToWrite> = PARTS
            .into_iter()
            .zip(&self.parts)
            .map(|(name, values)| TensorToWrite {
                name,
                dtype: Dtype::F32,
                shape: &shape,
                bytes: bytemuck::cast_slice(values),
            })
            .collect();
        let metadata = BTreeMap::from([
            ("step".to_owned(), self.step.to_string()),
            ("run".to_owned(), run.to_owned()),
        ]);
        write_safetensors(path, &tensors, &metadata)?;
        Ok(())
    }

    /// Reads the checkpoint of a run of that name, if there is one, with `length` values in each part.
    pub(crate) fn read(
        path: &Path,
        run: &str,
        length: usize,
    ) -> Result<Option<Self>, PretrainError> {
        if !path.exists() {
            return Ok(None);
        }
        let file = SafetensorsFile::open(path)?;
        let other = |detail: String| PretrainError::OtherRun {
            path: path.to_owned(),
            detail,
        };
        let found = file.metadata().get("run").cloned().unwrap_or_default();
        if found != run {
            return Err(other(format!("its run is {found}, this one is {run}")));
        }
        let step = file
            .metadata()
            .get("step")
            .and_then(|step| step.parse().ok());
        let step = step.ok_or_else(|| other("it does not say its step".to_owned()))?;
        let mut parts: [Vec<f32>; 4] = Default::default();
        for (part, name) in parts.iter_mut().zip(PARTS) {
            *part = file.f32(name)?;
            if part.len() != length {
                return Err(other(format!(
                    "{name} has {} values, expected {length}",
                    part.len(),
                )));
            }
        }
        Ok(Some(Self { step, parts }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::tiny_recipe;
    use tensor::device::cpu;

    #[test]
    fn the_first_step_of_adam_moves_every_value_by_the_learning_rate() {
        let layout = Layout::new(vec![
            vec![ParameterSpec::new("a", [2, 1])],
            vec![ParameterSpec::new("b", [1])],
        ]);
        let mut state = TrainState::new(layout, &cpu(), |model, spec| {
            vec![model as f32 + 1.0; spec.num_elements() as usize]
        });
        let recipe = OptimizerRecipe {
            learning_rate: 0.5,
            warmup_steps: 0,
            weight_decay: 0.0,
            max_grad_norm: 1e9,
            ..tiny_recipe().base.optimizer
        };
        let leaves = state.leaves();
        let device = tensor::device::training(&cpu());
        let a: Tensor<2> = leaves.weights[0]
            .tensor("a", [2, 1], &device, tensor::Precision::F32)
            .expect("it is there");
        let b: Tensor<1> = leaves.weights[1]
            .tensor("b", [1], &device, tensor::Precision::F32)
            .expect("it is there");
        let gradients = (a.sum() * 3.0 - b.sum() * 4.0).backward();
        let norm = to_f32(&state.update(&leaves, &gradients, &recipe));
        assert!((norm[0] - 34f32.sqrt()).abs() < 1e-5, "{norm:?}");
        let values = to_f32(&state.values);
        for (place, expected) in [(0, 0.5), (1, 0.5), (128, 2.5)] {
            assert!(
                (values[place] - expected).abs() < 1e-5,
                "{:?}",
                &values[..2]
            );
        }
    }
}
