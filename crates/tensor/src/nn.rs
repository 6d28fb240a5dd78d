//! Layers that several models share, in the checkpoints' own layout, and the activations by their exact formula.
//!
//! A linear weight stays `[out, in]` as PyTorch stores it, so that names, NF4 blocks and LoRA factors mean the
//! same here as in the published files. Statistics of norms are taken in `f32` whatever the precision.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

use burn::tensor::activation;
use burn::tensor::backend::Backend as _;

use crate::{
    Backend, DType, Device, ParameterSpec, Precision, Tensor, Weights, WeightsError, device,
};

/// `y = x Wᵀ + b` with `W` of shape `[out, in]`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Tensor<2>,
    /// `[out]`.
    pub bias: Option<Tensor<1>>,
}

impl Linear {
    /// The parameters of a layer called `name`.
    pub fn parameters(
        name: &str,
        in_features: usize,
        out_features: usize,
        bias: bool,
    ) -> Vec<ParameterSpec> {
        let mut specs = vec![ParameterSpec::new(
            format!("{name}.weight"),
            [out_features, in_features],
        )];
        if bias {
            specs.push(ParameterSpec::new(format!("{name}.bias"), [out_features]));
        }
        specs
    }

    /// Loads the layer called `name`.
    ///
    /// # Errors
    ///
    /// As [`Weights::tensor`].
    pub fn load(
        weights: &Weights,
        name: &str,
        [in_features, out_features]: [usize; 2],
        bias: bool,
        device: &Device,
        precision: Precision,
    ) -> Result<Self, WeightsError> {
        let weight = weights.tensor(
            &format!("{name}.weight"),
            [out_features, in_features],
            device,
            precision,
        )?;
        let bias = bias
            .then(|| weights.tensor(&format!("{name}.bias"), [out_features], device, precision))
            .transpose()?;
        Ok(Self { weight, bias })
    }

    /// `(…, in)` → `(…, out)`.
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        let output = matmul_nt(input, self.weight.clone());
        match &self.bias {
            Some(bias) => output + bias.clone().unsqueeze(),
            None => output,
        }
    }
}

/// `x Wᵀ` over the last axis: `(…, in)` × `[out, in]` → `(…, out)`.
///
/// One product of matrices on the CPU. On a card the axis before the last stays apart: the gradient of `W` is then
/// a sum of many small products that fill the card, where the one long product has 16 of its 132 processors at work
/// (measured: 0.5 ms against 0.05 ms for 20,480 rows of 256).
///
/// # Panics
///
/// If the last axis of `input` is not as long as `weight`'s.
pub fn matmul_nt<const D: usize>(input: Tensor<D>, weight: Tensor<2>) -> Tensor<D> {
    let mut dims = input.dims();
    let [out_features, in_features] = weight.dims();
    assert_eq!(
        dims[D - 1],
        in_features,
        "a layer with {in_features} inputs was given {dims:?}"
    );
    dims[D - 1] = out_features;
    if D > 2 && !device::is_cpu(&input.device()) {
        let tokens = dims[D - 2];
        let batch = dims[..D - 2].iter().product::<usize>();
        let weight = weight.transpose().unsqueeze::<3>(); // 1 in out
        let input = input.reshape([batch, tokens, in_features]);
        return input.matmul(weight).reshape(dims);
    }
    let rows = dims[..D - 1].iter().product::<usize>();
    let output = input
        .reshape([rows, in_features])
        .matmul(weight.transpose());
    output.reshape(dims)
}

/// LayerNorm over the last axis with scale and shift.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    /// Scale, `[width]`.
    pub weight: Tensor<1>,
    /// Shift, `[width]`.
    pub bias: Tensor<1>,
    /// Added to the variance.
    pub epsilon: f64,
}

impl LayerNorm {
    /// The parameters of a norm called `name`.
    pub fn parameters(name: &str, width: usize) -> Vec<ParameterSpec> {
        vec![
            ParameterSpec::new(format!("{name}.weight"), [width]),
            ParameterSpec::new(format!("{name}.bias"), [width]),
        ]
    }

    /// Loads the norm called `name`.
    ///
    /// # Errors
    ///
    /// As [`Weights::tensor`].
    pub fn load(
        weights: &Weights,
        name: &str,
        width: usize,
        epsilon: f64,
        device: &Device,
        precision: Precision,
    ) -> Result<Self, WeightsError> {
        Ok(Self {
            weight: weights.tensor(&format!("{name}.weight"), [width], device, precision)?,
            bias: weights.tensor(&format!("{name}.bias"), [width], device, precision)?,
            epsilon,
        })
    }

    /// `(…, width)` → the same shape.
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        layer_norm(input, self.epsilon) * self.weight.clone().unsqueeze()
            + self.bias.clone().unsqueeze()
    }
}

/// `(x − mean) / √(var + ε)` over the last axis, without scale and shift; statistics in `f32`.
pub fn layer_norm<const D: usize>(input: Tensor<D>, epsilon: f64) -> Tensor<D> {
    let dtype = input.dtype();
    let input = input.cast(DType::F32);
    let centred = input.clone() - input.mean_dim(D - 1);
    let variance = centred.clone().powi_scalar(2).mean_dim(D - 1);
    (centred / (variance + epsilon).sqrt()).cast(dtype)
}

/// RMSNorm over the last axis: `x / √(mean(x²) + ε) · w`.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    /// Scale, `[width]`.
    pub weight: Tensor<1>,
    /// Added to the mean square.
    pub epsilon: f64,
}

impl RmsNorm {
    /// The parameters of a norm called `name`.
    pub fn parameters(name: &str, width: usize) -> Vec<ParameterSpec> {
        vec![ParameterSpec::new(format!("{name}.weight"), [width])]
    }

    /// Loads the norm called `name`.
    ///
    /// # Errors
    ///
    /// As [`Weights::tensor`].
    pub fn load(
        weights: &Weights,
        name: &str,
        width: usize,
        epsilon: f64,
        device: &Device,
        precision: Precision,
    ) -> Result<Self, WeightsError> {
        Ok(Self {
            weight: weights.tensor(&format!("{name}.weight"), [width], device, precision)?,
            epsilon,
        })
    }

    /// `(…, width)` → the same shape, in the scale's precision; statistics in `f32`.
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        let dtype = self.weight.dtype();
        let input = input.cast(DType::F32);
        let mean_square = input.clone().powi_scalar(2).mean_dim(D - 1);
        (input / (mean_square + self.epsilon).sqrt()).cast(dtype) * self.weight.clone().unsqueeze()
    }
}

/// `½x(1 + tanh(√(2/π)(x + 0.044715x³)))`, called `gelu_new` and `gelu-approximate` upstream; computed in `f32`.
///
/// Written as `x·sigmoid(2u)`, which is the same number and needs an exponential instead of a hyperbolic tangent.
pub fn gelu_tanh<const D: usize>(input: Tensor<D>) -> Tensor<D> {
    /// `2√(2/π)`.
    const SLOPE: f64 = 2.0 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2;
    const CUBIC: f64 = 0.044_715;
    let dtype = input.dtype();
    let input = input.cast(DType::F32);
    let x = input.clone().detach();
    let square = x.clone() * x.clone();
    let sigmoid = activation::sigmoid((square.clone() * CUBIC + 1.0) * x.clone() * SLOPE);
    let value = x.clone() * sigmoid.clone();
    if !Backend::ad_enabled(&input.device()) {
        return value.cast(dtype);
    }
    // s + x s (1 − s) 2u′ with u′ = √(2/π)(1 + 3·0.044715x²)
    let rest = sigmoid.clone().neg() + 1.0;
    let inner_slope = (square * (3.0 * CUBIC) + 1.0) * SLOPE;
    let slope = value.clone() * rest * inner_slope + sigmoid;
    with_slope(input, value, slope).cast(dtype)
}

/// `exp(x)`.
///
/// As Burn's, except that differentiating does not compute the exponential a second time.
pub fn exp<const D: usize>(input: Tensor<D>) -> Tensor<D> {
    if !Backend::ad_enabled(&input.device()) {
        return input.exp();
    }
    let value = input.clone().detach().exp();
    with_slope(input, value.clone(), value)
}

/// A function of single elements whose value and derivative at `input` are known: `value + (x − input)·slope` at
/// `x = input`, so that only the derivative is kept for the backward pass and nothing is computed again there.
fn with_slope<const D: usize>(input: Tensor<D>, value: Tensor<D>, slope: Tensor<D>) -> Tensor<D> {
    let zero = input.clone() - input.detach();
    zero * slope + value
}

/// `x·Φ(x)`, the exact GELU.
pub fn gelu<const D: usize>(input: Tensor<D>) -> Tensor<D> {
    activation::gelu(input)
}

/// `x·sigmoid(1.702x)`, CLIP's `quick_gelu`.
pub fn quick_gelu<const D: usize>(input: Tensor<D>) -> Tensor<D> {
    input.clone() * activation::sigmoid(input * 1.702)
}

/// `x·sigmoid(x)`.
pub fn silu<const D: usize>(input: Tensor<D>) -> Tensor<D> {
    activation::silu(input)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{cpu, training};
    use crate::{from_f32, to_f32};

    fn close(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() < 1e-5, "{found:?} is not {expected:?}");
        }
    }

    #[test]
    fn a_linear_layer_multiplies_by_the_transposed_weight() {
        let layer = Linear {
            weight: from_f32(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [3, 2], &cpu()),
            bias: Some(from_f32(vec![0.5, 0.0, -0.5], [3], &cpu())),
        };
        let output = layer.forward(from_f32(vec![1.0, 10.0], [1, 1, 2], &cpu()));
        assert_eq!(output.dims(), [1, 1, 3]);
        close(&to_f32(&output), &[21.5, 43.0, 64.5]);
    }

    #[test]
    fn a_frozen_weight_gets_no_gradient_and_the_input_does() {
        let device = training(&cpu());
        let weight = from_f32(vec![1.0, 2.0, 3.0, 4.0], [2, 2], &device);
        let input = from_f32(vec![1.0, 1.0], [1, 2], &device).require_grad();
        let gradients = matmul_nt(input.clone(), weight.clone()).sum().backward();
        assert!(weight.grad(&gradients).is_none());
        close(
            &to_f32(&input.grad(&gradients).expect("the input is tracked")),
            &[4.0, 6.0],
        );
    }

    #[test]
    fn layer_norm_divides_by_the_population_deviation() {
        let normed = layer_norm(from_f32(vec![1.0, 3.0], [1, 2], &cpu()), 0.0);
        close(&to_f32(&normed), &[-1.0, 1.0]);
    }

    #[test]
    fn rms_norm_does_not_subtract_the_mean() {
        let norm = RmsNorm {
            weight: from_f32(vec![2.0, 2.0], [2], &cpu()),
            epsilon: 0.0,
        };
        let normed = norm.forward(from_f32(vec![3.0, 3.0], [1, 2], &cpu()));
        close(&to_f32(&normed), &[2.0, 2.0]);
    }

    #[test]
    fn slopes_are_those_of_the_functions() {
        let device = training(&cpu());
        let points = [-6.0f32, -1.5, -0.1, 0.0, 0.7, 3.0];
        let slopes = |function: fn(Tensor<1>) -> Tensor<1>| {
            let x = from_f32(points.to_vec(), [6], &device).require_grad();
            let gradients = function(x.clone()).sum().backward();
            to_f32(&x.grad(&gradients).expect("it is tracked"))
        };
        let tanh_form = |x: f64| {
            0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044_715 * x.powi(3))).tanh())
        };
        let numeric = |f: &dyn Fn(f64) -> f64| {
            points.map(|x| ((f(f64::from(x) + 1e-4) - f(f64::from(x) - 1e-4)) / 2e-4) as f32)
        };
        close(&slopes(gelu_tanh), &numeric(&tanh_form));
        let relative = slopes(exp)
            .into_iter()
            .zip(points)
            .map(|(slope, x)| slope / x.exp());
        close(&relative.collect::<Vec<_>>(), &[1.0; 6]);
    }

    #[test]
    fn activations_have_their_published_values_at_one() {
        let one = || from_f32(vec![1.0], [1], &cpu());
        close(&to_f32(&gelu_tanh(one())), &[0.841_192]);
        close(&to_f32(&gelu(one())), &[0.841_344_7]);
        close(&to_f32(&quick_gelu(one())), &[0.845_795_8]);
        close(&to_f32(&silu(one())), &[0.731_058_6]);
    }
}
