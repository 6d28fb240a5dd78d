//! Weights by name: what a model expects, what a checkpoint holds, and the difference said in full.
//!
//! A model's configuration lists its parameters as [`ParameterSpec`]s without allocating any (the meta level);
//! [`Weights::check`] compares that list with a checkpoint before one tensor is read. Reading goes through
//! `burn-store` (the successor of burn-import's weight import) over memory-mapped safetensors files, whose
//! headers `artifacts` has verified.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use artifacts::{ArtifactError, Checkpoint};
use burn::tensor::TensorData;
use burn_store::{ModuleStore, SafetensorsStore, TensorSnapshot};

use crate::{DType, Device, Precision, Tensor};

/// Name and shape of one parameter of a model, e.g. `x_embedder.weight`, `[3072, 64]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParameterSpec {
    /// The key in the published checkpoint.
    pub name: String,
    /// Sizes of its axes, in the checkpoint's order.
    pub shape: Vec<usize>,
}

impl ParameterSpec {
    /// A specification from its parts.
    pub fn new(name: impl Into<String>, shape: impl Into<Vec<usize>>) -> Self {
        Self {
            name: name.into(),
            shape: shape.into(),
        }
    }

    /// Number of values.
    pub fn num_elements(&self) -> u64 {
        self.shape.iter().map(|&size| size as u64).product()
    }
}

/// Number of values in all parameters together.
pub fn num_parameters(parameters: &[ParameterSpec]) -> u64 {
    parameters.iter().map(ParameterSpec::num_elements).sum()
}

/// Why weights cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The files are absent, damaged, or hold other parameters than the model has.
    #[error(transparent)]
    Checkpoint(#[from] ArtifactError),
    /// A tensor was announced but could not be read.
    #[error("cannot read tensor `{name}` in {path}: {detail}")]
    Unreadable {
        /// Where it should be.
        path: PathBuf,
        /// The tensor's key.
        name: String,
        /// What the reader said.
        detail: String,
    },
}

/// The tensors of one model's checkpoint, read one at a time as they are asked for.
pub struct Weights {
    origin: PathBuf,
    checkpoint: Option<Checkpoint>,
    tensors: BTreeMap<String, TensorSnapshot>,
    live: BTreeMap<String, LiveTensor>,
}

/// A parameter that is on its device already, flat, and the shape that models see it in.
#[derive(Clone, Debug)]
struct LiveTensor {
    flat: Tensor<1>,
    shape: Vec<usize>,
}

impl Weights {
    /// Opens the checkpoint `stem` (`diffusion_pytorch_model`, `model`) in `dir`, one file or sharded.
    ///
    /// Only headers are read.
    ///
    /// # Errors
    ///
    /// If no such checkpoint is there, or a file's header or the shard index is damaged.
    pub fn open(dir: &Path, stem: &str) -> Result<Self, WeightsError> {
        let checkpoint = Checkpoint::open(dir, stem)?;
        let mut tensors = BTreeMap::new();
        // The index of a sharded checkpoint is among its files, and holds no tensors.
        let is_shard = |path: &PathBuf| path.extension().is_some_and(|e| e == "safetensors");
        for path in checkpoint.files().into_iter().filter(is_shard) {
            let mut store = SafetensorsStore::from_file(path.clone());
            let snapshots =
                store
                    .get_all_snapshots()
                    .map_err(|error| WeightsError::Unreadable {
                        path: path.clone(),
                        name: "*".to_owned(),
                        detail: error.to_string(),
                    })?;
            tensors.extend(snapshots.iter().map(|(k, v)| (k.clone(), v.clone())));
        }
        Ok(Self {
            origin: dir.to_owned(),
            checkpoint: Some(checkpoint),
            tensors,
            live: BTreeMap::new(),
        })
    }

    /// Weights held in memory, `f32`.
    pub fn from_values(values: impl IntoIterator<Item = (ParameterSpec, Vec<f32>)>) -> Self {
        let tensors = values
            .into_iter()
            .map(|(spec, values)| {
                let data = TensorData::new(values, spec.shape);
                let path = spec.name.split('.').map(str::to_owned).collect();
                let snapshot =
                    TensorSnapshot::from_data(data, path, vec![], burn::module::ParamId::new());
                (spec.name, snapshot)
            })
            .collect();
        Self {
            origin: PathBuf::from("<memory>"),
            checkpoint: None,
            tensors,
            live: BTreeMap::new(),
        }
    }

    /// Parameters that are on a device already, each as a flat tensor: what a model is built around to train all of it.
    ///
    /// [`Weights::tensor`] gives them in their shape and in the precision asked for; a tracked tensor stays tracked
    /// through both, so gradients arrive at the flat one.
    ///
    /// # Panics
    ///
    /// If a tensor does not hold as many values as its shape says.
    pub fn from_tensors(tensors: impl IntoIterator<Item = (ParameterSpec, Tensor<1>)>) -> Self {
        let live = tensors
            .into_iter()
            .map(|(spec, flat)| {
                assert_eq!(
                    flat.dims()[0] as u64,
                    spec.num_elements(),
                    "values of `{}`, shape {:?}",
                    spec.name,
                    spec.shape
                );
                let shape = spec.shape;
                (spec.name, LiveTensor { flat, shape })
            })
            .collect();
        Self {
            origin: PathBuf::from("<device>"),
            checkpoint: None,
            tensors: BTreeMap::new(),
            live,
        }
    }

    /// The directory that the weights come from.
    pub fn origin(&self) -> &Path {
        &self.origin
    }

    /// Whether a tensor of this name is there.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name) || self.live.contains_key(name)
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors
            .keys()
            .chain(self.live.keys())
            .map(String::as_str)
    }

    /// Compares the checkpoint with what a model expects.
    ///
    /// # Errors
    ///
    /// If parameters are unknown, missing or misshapen: all of them are listed, with the nearest names.
    pub fn check(&self, expected: &[ParameterSpec]) -> Result<(), WeightsError> {
        if let Some(checkpoint) = &self.checkpoint {
            let expected: Vec<(String, Vec<usize>)> = expected
                .iter()
                .map(|p| (p.name.clone(), p.shape.clone()))
                .collect();
            checkpoint.check(&expected)?;
        }
        Ok(())
    }

    /// The values of one tensor as `f32`, row-major.
    ///
    /// # Errors
    ///
    /// If there is no such tensor, its shape is not `shape`, or its bytes cannot be read.
    pub fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, WeightsError> {
        if let Some(live) = self.live(name, shape)? {
            return Ok(crate::to_f32(&live.flat));
        }
        let data = self.data(name, shape)?;
        Ok(data
            .convert::<f32>()
            .into_vec::<f32>()
            .expect("data converted to f32 is f32"))
    }

    /// One tensor on `device`, converted to `precision`.
    ///
    /// # Errors
    ///
    /// As [`Weights::values`].
    pub fn tensor<const D: usize>(
        &self,
        name: &str,
        shape: [usize; D],
        device: &Device,
        precision: Precision,
    ) -> Result<Tensor<D>, WeightsError> {
        if let Some(live) = self.live(name, &shape)? {
            let tensor = live.flat.clone().reshape(shape);
            return Ok(if tensor.dtype() == precision.dtype() {
                tensor
            } else {
                tensor.cast(precision.dtype())
            });
        }
        let data = self.data(name, &shape)?.convert_dtype(precision.dtype());
        Ok(Tensor::from_data(data, (device, precision.dtype())))
    }

    fn live(&self, name: &str, shape: &[usize]) -> Result<Option<&LiveTensor>, WeightsError> {
        match self.live.get(name) {
            Some(live) if live.shape != shape => Err(WeightsError::Unreadable {
                path: self.origin.clone(),
                name: name.to_owned(),
                detail: format!("expected shape {shape:?}, found {:?}", live.shape),
            }),
            live => Ok(live),
        }
    }

    fn data(&self, name: &str, shape: &[usize]) -> Result<TensorData, WeightsError> {
        let unreadable = |detail: String| WeightsError::Unreadable {
            path: self.origin.clone(),
            name: name.to_owned(),
            detail,
        };
        let snapshot = self
            .tensors
            .get(name)
            .ok_or_else(|| unreadable("there is no such tensor".to_owned()))?;
        let found: Vec<usize> = snapshot.shape.iter().copied().collect();
        if found != shape {
            return Err(unreadable(format!(
                "expected shape {shape:?}, found {found:?}"
            )));
        }
        match snapshot.dtype {
            DType::F64 | DType::F32 | DType::F16 | DType::BF16 => {}
            other => return Err(unreadable(format!("expected floats, found {other:?}"))),
        }
        snapshot
            .to_data()
            .map_err(|error| unreadable(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu;

    fn two_by_three() -> Weights {
        let values = (0..6).map(|i| i as f32).collect();
        Weights::from_values([(ParameterSpec::new("a.weight", [2, 3]), values)])
    }

    #[test]
    fn a_tensor_keeps_its_row_major_order() {
        let tensor = two_by_three()
            .tensor("a.weight", [2, 3], &cpu(), Precision::F32)
            .expect("it is there");
        assert_eq!(crate::to_f32(&tensor), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    }

    #[test]
    fn another_shape_is_an_error_that_says_both() {
        let error = two_by_three()
            .values("a.weight", &[3, 2])
            .expect_err("the shape differs")
            .to_string();
        assert!(
            error.contains("[3, 2]") && error.contains("[2, 3]"),
            "{error}"
        );
    }

    #[test]
    fn half_precision_rounds_the_values() {
        let weights =
            Weights::from_values([(ParameterSpec::new("x", [1]), vec![1.0 + 1.0 / 4096.0])]);
        let tensor: Tensor<1> = weights
            .tensor("x", [1], &cpu(), Precision::F16)
            .expect("it is there");
        assert_eq!(tensor.dtype(), DType::F16);
        assert_eq!(crate::to_f32(&tensor), [1.0]);
    }

    #[test]
    fn a_tensor_on_its_device_keeps_its_gradient_through_shape_and_precision() {
        let device = crate::device::training(&cpu());
        let flat = crate::from_f32(vec![1.0, 2.0], [2], &device).require_grad();
        let weights = Weights::from_tensors([(ParameterSpec::new("w", [2, 1]), flat.clone())]);
        let tensor: Tensor<2> = weights
            .tensor("w", [2, 1], &device, Precision::Bf16)
            .expect("it is there");
        assert_eq!(tensor.dtype(), DType::BF16);
        let gradients = (tensor.cast(DType::F32) * 3.0).sum().backward();
        let gradient = flat.grad(&gradients).expect("it is tracked");
        assert_eq!(crate::to_f32(&gradient), [3.0, 3.0]);
        assert!(weights.values("w", &[2]).is_err());
    }

    #[test]
    fn parameters_are_counted_without_allocation() {
        let specs = [
            ParameterSpec::new("w", [1 << 20, 1 << 20]),
            ParameterSpec::new("b", [3]),
        ];
        assert_eq!(num_parameters(&specs), (1 << 40) + 3);
    }
}
