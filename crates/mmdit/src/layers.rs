//! A linear layer that knows its path (so that LoRA factors find it), and how layers are read from a checkpoint.

use quant::{Nf4, QuantError, StoredFloat};
use tensor::nn::{Linear, RmsNorm};
use tensor::{Device, Precision, Tensor, Weights, WeightsError, from_f32};

use crate::adapters::Adapters;
use crate::config::NORM_EPSILON;
use crate::model::{BaseWeights, MmditError};

/// A frozen linear layer and the path under which adapters are looked up.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    path: String,
    linear: Linear,
}

impl Layer {
    /// `(…, in)` → `(…, out)`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>, adapters: &Adapters) -> Tensor<D> {
        let delta = adapters.delta(&self.path, &x, 0);
        let y = self.linear.forward(x);
        match delta {
            Some(delta) => y + delta,
            None => y,
        }
    }
}

/// A linear layer whose input is two tensors side by side, given apart: `[x, y] Wᵀ + b = x W₁ᵀ + y W₂ᵀ + b`.
///
/// Putting them together would copy the widest activation of the network, and take it apart again going backward.
#[derive(Clone, Debug)]
pub(crate) struct SplitLayer {
    path: String,
    left: Linear,
    right: Tensor<2>,
}

impl SplitLayer {
    /// Divides a layer's inputs after the first `left_features`.
    pub fn new(layer: Layer, left_features: usize) -> Self {
        let [out_features, in_features] = layer.linear.weight.dims();
        let columns = |range| layer.linear.weight.clone().slice([0..out_features, range]);
        Self {
            left: Linear {
                weight: columns(0..left_features),
                bias: layer.linear.bias.clone(),
            },
            right: columns(left_features..in_features),
            path: layer.path,
        }
    }

    /// `(…, in₁)`, `(…, in₂)` → `(…, out)`.
    pub fn forward<const D: usize>(
        &self,
        left: Tensor<D>,
        right: Tensor<D>,
        adapters: &Adapters,
    ) -> Tensor<D> {
        let first_column = left.dims()[D - 1];
        let deltas = [
            adapters.delta(&self.path, &left, 0),
            adapters.delta(&self.path, &right, first_column),
        ];
        let mut y = tensor::nn::matmul_nt(right, self.right.clone()) + self.left.forward(left);
        for delta in deltas.into_iter().flatten() {
            y = y + delta;
        }
        y
    }
}

/// Reads layers from a checkpoint in the form that the base is wanted in.
pub(crate) struct Loader<'a> {
    pub weights: &'a Weights,
    pub device: &'a Device,
    pub precision: Precision,
    pub base: BaseWeights,
}

impl Loader<'_> {
    /// The linear layer at `path`.
    pub fn linear(
        &self,
        path: impl Into<String>,
        in_features: usize,
        out_features: usize,
    ) -> Result<Layer, MmditError> {
        let path = path.into();
        let sizes = [in_features, out_features];
        let linear = match self.base {
            BaseWeights::Plain => Linear::load(
                self.weights,
                &path,
                sizes,
                true,
                self.device,
                self.precision,
            )?,
            BaseWeights::Nf4 { .. } => {
                let [weight, bias] = linear_values(self.weights, self.base, &path, sizes)?;
                let dtype = self.precision.dtype();
                Linear {
                    weight: from_f32(weight, [out_features, in_features], self.device).cast(dtype),
                    bias: Some(from_f32(bias, [out_features], self.device).cast(dtype)),
                }
            }
        };
        Ok(Layer { path, linear })
    }

    /// The RMSNorm at `path`.
    pub fn rms_norm(&self, path: &str, width: usize) -> Result<RmsNorm, WeightsError> {
        RmsNorm::load(
            self.weights,
            path,
            width,
            NORM_EPSILON,
            self.device,
            self.precision,
        )
    }
}

/// Weight `[out, in]`, row-major, and bias of the linear layer at `path`, in the form that the base is wanted in: what
/// an executor of its own builds the layer from. `sizes` are inputs and outputs.
///
/// # Errors
///
/// If they cannot be read, or not be quantised.
pub fn linear_values(
    weights: &Weights,
    base: BaseWeights,
    path: &str,
    [in_features, out_features]: [usize; 2],
) -> Result<[Vec<f32>; 2], MmditError> {
    let weight = weights.values(&format!("{path}.weight"), &[out_features, in_features])?;
    let weight = match base {
        BaseWeights::Plain => weight,
        BaseWeights::Nf4 { double_quant } => {
            nf4_round_trip(&weight, double_quant).map_err(|source| MmditError::Quantize {
                path: path.to_owned(),
                source,
            })?
        }
    };
    let bias = weights.values(&format!("{path}.bias"), &[out_features])?;
    Ok([weight, bias])
}

/// A weight as it is after 4-bit quantisation: blocks of 64 along the flattened tensor.
fn nf4_round_trip(values: &[f32], double_quant: bool) -> Result<Vec<f32>, QuantError> {
    // Half-precision checkpoints are quantised from their exact values, as diffusers does after widening them.
    let nf4 = Nf4::quantize(values, StoredFloat::F32)?;
    let nf4 = if double_quant {
        nf4.double_quantized()
    } else {
        nf4
    };
    Ok(nf4.dequantize())
}
