//! How far the network in 16 bits may be from `f32`: what its tests and the fixtures hold it to.

use mmdit::MmditConfig;

use crate::half_type::Half;

/// Largest relative errors (norm of the difference over the norm) against the reference in `f32`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Accuracy {
    /// Of a velocity.
    pub velocity: f64,
    /// Of all LoRA gradients as one vector.
    pub gradients: f64,
    /// Of the worst single factor's gradient.
    pub gradient: f64,
}

impl Accuracy {
    /// What a network of a width may be off by.
    ///
    /// Velocities and all gradients together are held to the same at every width: fp16 to 2e-3 and 2e-2 (it keeps 11 bits),
    /// bf16 (8 bits) to 1e-2 and 2e-2. What bf16 rounds away averages out over a layer's width: at FLUX.1-dev's 4.8e-3 and
    /// 6.4e-3 were seen, on networks of 48 and 56 channels 8.9e-3 and 1.7e-2, where rounding the weights alone costs up to
    /// 5.3e-3 of a velocity. The gradient of a single small factor was seen at 4.3e-2 there and at 1.3e-2 at FLUX.1-dev's
    /// widths (H100, 2026-11-23).
    pub fn of(t: Half, config: &MmditConfig) -> Self {
        let [velocity, gradients, gradient] = match t {
            Half::F16 => [2e-3, 2e-2, 2e-2],
            Half::Bf16 if config.width() >= 1024 => [1e-2, 2e-2, 2e-2],
            Half::Bf16 => [1e-2, 2e-2, 5e-2],
        };
        Self {
            velocity,
            gradients,
            gradient,
        }
    }
}
