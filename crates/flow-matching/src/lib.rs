//! Flow matching: which noise levels there are, how they are drawn, and what is learnt and integrated between them.
//!
//! A noise level is σ in [0, 1]: `x_σ = (1 - σ) x₀ + σ ε` with `x₀` a latent and `ε` normal noise. The network predicts
//! the velocity `ε - x₀`; sampling follows it from σ = 1 to σ = 0.
//!
//! - [`scheduler`]: the tables of σ for training and for sampling, from a `scheduler_config.json`.
//! - [`density`]: from a random number to an entry of the training table.
//! - [`weighting`]: the loss's weight by σ.
//! - [`objective`]: noising, target, loss and Euler step on tensors.
//! - [`learning_rate`]: learning rate by step.
//! - [`noise`]: random numbers that depend on what they are for, and on nothing that happened before.
//!
//! σ is `f32` throughout and computed in the order of operations of diffusers, so that tables agree to the last bit or
//! nearly so. What the model is told as its time is `timestep / 1000` ([`model_time`]).

#![forbid(unsafe_code)]

pub mod density;
pub mod learning_rate;
pub mod noise;
pub mod objective;
pub mod scheduler;
pub mod weighting;

pub use density::Density;
pub use learning_rate::LearningRateSchedule;
pub use noise::{Purpose, Stream};
pub use objective::{add_noise, euler_step, velocity_target, weighted_mse};
pub use scheduler::{
    InferenceSchedule, Scheduler, SchedulerConfig, SchedulerError, TimeShift, TrainingPoint,
};
pub use weighting::Weighting;

/// The time that the transformer is given for a timestep: a thousandth of it.
///
/// Source: `timestep / 1000` in `FluxPipeline` and in the training script, diffusers 0.42.
pub fn model_time(timestep: f32) -> f32 {
    timestep / 1000.0
}

/// Number of image tokens: patches of 2×2 latent cells, each `vae_scale_factor` pixels wide.
///
/// What does not fill a patch is not counted, as in `FluxPipeline`.
pub fn image_seq_len(height_px: usize, width_px: usize, vae_scale_factor: usize) -> usize {
    latent_seq_len(height_px / vae_scale_factor, width_px / vae_scale_factor)
}

/// Number of image tokens of a latent.
pub fn latent_seq_len(latent_height: usize, latent_width: usize) -> usize {
    (latent_height / 2) * (latent_width / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_a_patch_of_two_by_two_latent_cells() {
        assert_eq!(image_seq_len(512, 512, 8), 1024);
        assert_eq!(image_seq_len(96, 160, 8), 60);
        assert_eq!(image_seq_len(48, 80, 4), 60);
        assert_eq!(latent_seq_len(5, 4), 4);
    }
}
