//! The one place that names Burn's backend: tensors, devices, weights and the layers that models share.
//!
//! Everything above this crate writes `Tensor<3>` and is generic over no backend: Burn's dispatch backend picks the
//! device at run time, so one binary runs on the CPU (`flex`) and, with the feature `cuda`, on NVIDIA cards.
//! When a later Burn drops the backend generic altogether, only the alias below goes away.
//!
//! * [`device`]: which device, and whether operations on it are recorded for differentiation.
//! * [`weights`]: checkpoints by tensor name, checked against what a model expects before anything is built.
//! * [`nn`]: linear layers and norms in the checkpoints' own layout, activations.
#![forbid(unsafe_code)]

pub mod device;
pub mod nn;
pub mod weights;

pub use burn::tensor::{DType, Int, TensorData};
pub use device::{Device, DeviceError, Precision};
pub use weights::{ParameterSpec, Weights, WeightsError};

/// The backend that dispatches on the device at run time.
pub type Backend = burn::Dispatch;

/// A float tensor of `D` axes on any device.
pub type Tensor<const D: usize> = burn::tensor::Tensor<Backend, D>;

/// An integer tensor of `D` axes on any device.
pub type IntTensor<const D: usize> = burn::tensor::Tensor<Backend, D, Int>;

/// Gradients of one backward pass; ask it with [`Tensor::grad`].
pub type Gradients = <Backend as burn::tensor::backend::AutodiffBackend>::Gradients;

/// The values of a tensor as `f32`, row-major, whatever its precision.
///
/// Waits for the device.
pub fn to_f32<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    tensor
        .to_data()
        .convert::<f32>()
        .into_vec::<f32>()
        .expect("data converted to f32 is f32")
}

/// A tensor of the given shape from row-major `f32` values.
///
/// # Panics
///
/// If `values` does not hold exactly as many values as `shape` says.
pub fn from_f32<const D: usize>(values: Vec<f32>, shape: [usize; D], device: &Device) -> Tensor<D> {
    assert_eq!(
        values.len(),
        shape.iter().product::<usize>(),
        "{} values do not fill shape {shape:?}",
        values.len()
    );
    Tensor::from_data(TensorData::new(values, shape), device)
}
