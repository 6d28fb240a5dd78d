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
    /// fp16 keeps 11 bits and holds 2e-3 and 2e-2 everywhere: the arithmetic is right. bf16 keeps 8, and what its layers
    /// round away averages out over their width: at FLUX.1-dev's 1e-2 and 2e-2 hold for velocity and all
    /// gradients, networks of 48 and 56 channels were seen at 1.5e-2 and 2.6e-2 (H100, 2026-11-23; diffusers in bf16 is off by
    /// up to 0.49 on them, and rounding their weights alone costs 5.3e-3). The gradient of a single
    /// small factor was seen at 6.2e-2 there and at 4.4e-2 at FLUX.1-dev's widths.
    pub fn of(t: Half, config: &MmditConfig) -> Self {
        let [velocity, gradients, gradient] = match t {
            Half::F16 => [2e-3, 2e-2, 2e-2],
            Half::Bf16 if config.width() >= 1024 => [1e-2, 2e-2, 6e-2],
            Half::Bf16 => [1.5e-2, 3e-2, 8e-2],
        };
        Self {
            velocity,
            gradients,
            gradient,
        }
    }
}
