//! What is learnt, and how it is integrated, on tensors whose first axis is the batch.
//!
//! Levels and weights are given per sample. The loss and the Euler step compute in `f32` whatever the network does.

use tensor::{DType, Device, Tensor};

/// `(1 - σ) x₀ + σ ε`.
///
/// # Panics
///
/// If there is not one level per sample, or the shapes differ.
pub fn add_noise<const D: usize>(
    latents: Tensor<D>,
    noise: Tensor<D>,
    sigmas: &[f32],
) -> Tensor<D> {
    assert_eq!(latents.dims(), noise.dims(), "shapes of latents and noise");
    let (device, dtype) = (latents.device(), latents.dtype());
    let rest: Vec<f32> = sigmas.iter().map(|sigma| 1.0 - sigma).collect();
    let sigmas = per_sample::<D>(sigmas, latents.dims()[0], &device).cast(dtype);
    let rest = per_sample::<D>(&rest, latents.dims()[0], &device).cast(dtype);
    rest * latents + sigmas * noise
}

/// The velocity to be predicted: `ε - x₀`.
///
/// # Panics
///
/// If the shapes differ.
pub fn velocity_target<const D: usize>(latents: Tensor<D>, noise: Tensor<D>) -> Tensor<D> {
    assert_eq!(latents.dims(), noise.dims(), "shapes of latents and noise");
    noise - latents
}

/// The mean over samples and elements of the weighted squared error, in `f32`, as a tensor of one element.
///
/// # Panics
///
/// If there is not one weight per sample, or the shapes differ.
pub fn weighted_mse<const D: usize>(
    prediction: Tensor<D>,
    target: Tensor<D>,
    weights: &[f32],
) -> Tensor<1> {
    assert_eq!(
        prediction.dims(),
        target.dims(),
        "shapes of prediction and target"
    );
    let weights = per_sample::<D>(weights, prediction.dims()[0], &prediction.device());
    let error = prediction.cast(DType::F32) - target.cast(DType::F32);
    (weights * error.clone() * error).mean()
}

/// One step along the velocity, from `sigma` to `next_sigma`, in `f32`.
///
/// Source: `FlowMatchEulerDiscreteScheduler.step`, diffusers 0.42, which then rounds to the network's precision; this
/// does not, so that rounding does not add up over the steps.
pub fn euler_step<const D: usize>(
    sample: Tensor<D>,
    velocity: Tensor<D>,
    sigma: f32,
    next_sigma: f32,
) -> Tensor<D> {
    sample.cast(DType::F32) + velocity.cast(DType::F32) * (next_sigma - sigma)
}

/// `f32` values along the first axis: `(b)` → `(b, 1, …)`.
fn per_sample<const D: usize>(values: &[f32], batch: usize, device: &Device) -> Tensor<D> {
    assert_eq!(values.len(), batch, "one value per sample");
    let mut shape = [1; D];
    shape[0] = batch;
    tensor::from_f32(values.to_vec(), shape, device).cast(DType::F32)
}

#[cfg(test)]
mod tests {
    use tensor::device::{cpu, training};
    use tensor::{from_f32, to_f32};

    use super::*;

    fn rows(values: &[f32]) -> Tensor<2> {
        from_f32(values.to_vec(), [2, values.len() / 2], &cpu())
    }

    #[test]
    fn noise_is_mixed_in_by_each_samples_own_level() {
        let noisy = add_noise(
            rows(&[1.0, 2.0, 3.0, 4.0]),
            rows(&[5.0, 6.0, 7.0, 8.0]),
            &[0.25, 1.0],
        );
        assert_eq!(to_f32(&noisy), [2.0, 3.0, 7.0, 8.0]);
    }

    #[test]
    fn the_target_points_from_the_latent_to_the_noise() {
        let target = velocity_target(rows(&[1.0, 2.0]), rows(&[5.0, -2.0]));
        assert_eq!(to_f32(&target), [4.0, -4.0]);
    }

    #[test]
    fn the_loss_weighs_samples_and_averages_over_all_elements() {
        let loss = weighted_mse(
            rows(&[1.0, 2.0, 3.0, 4.0]),
            rows(&[0.0, 0.0, 3.0, 2.0]),
            &[1.0, 10.0],
        );
        assert_eq!(to_f32(&loss), [(1.0 + 4.0 + 40.0) / 4.0]);
    }

    #[test]
    fn the_loss_of_a_half_precision_prediction_does_not_overflow() {
        let prediction = rows(&[300.0; 4]).cast(DType::F16);
        let loss = weighted_mse(prediction, rows(&[0.0; 4]), &[1e6, 1e6]);
        assert_eq!(to_f32(&loss), [9e10]);
    }

    #[test]
    fn the_losss_gradient_is_twice_the_weighted_error_over_the_count() {
        let device = training(&cpu());
        let prediction = Tensor::<1>::from_floats([3.0, 1.0], &device).require_grad();
        let target = Tensor::<1>::from_floats([1.0, 1.5], &device);
        let gradients = weighted_mse(prediction.clone(), target, &[2.0, 4.0]).backward();
        let gradient = prediction.grad(&gradients).expect("it was required");
        assert_eq!(
            gradient.into_data().to_vec::<f32>().expect("f32"),
            [4.0, -2.0]
        );
    }

    #[test]
    fn a_step_to_zero_along_the_true_velocity_recovers_the_latent() {
        let (latents, noise) = (rows(&[1.0, 2.0]), rows(&[5.0, -2.0]));
        let noisy = add_noise(latents.clone(), noise.clone(), &[0.5, 0.5]);
        let recovered = euler_step(noisy, velocity_target(latents, noise), 0.5, 0.0);
        assert_eq!(to_f32(&recovered), [1.0, 2.0]);
    }

    #[test]
    #[should_panic(expected = "one value per sample")]
    fn a_missing_level_panics() {
        let _ = add_noise(rows(&[1.0, 2.0]), rows(&[5.0, -2.0]), &[0.5]);
    }
}
