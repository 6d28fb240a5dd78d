//! FLUX's transformer for CPUs, scheduled by hand: the velocity, and the gradients of LoRA factors.
//!
//! The same network as `mmdit`, which is its specification and its test. What is different is the order of the work.
//! Everything that belongs to a few dozen tokens (norm, modulation, products, GELU, residual) is done for those tokens
//! before the next are looked at, so that only a block's inputs and outputs leave the cache; threads meet twice per
//! block, before and after attention. Nothing is recorded: the backward pass is written out, needs no gradient of a
//! weight, and stops at the lowest layer that has factors.
//!
//! Results are the same bits for any number of threads, and differ between instruction sets by rounding.
//!
//! * [`matmul`]: products. * [`kernels`]: what lies between them. * [`attention`]: one head.
//! * [`linear`]: a layer with its factors. * [`model`]: all layers. * [`conditioning`]: modulations.
//! * [`workspace`]: who owns which numbers. * [`forward`], [`backward`]: the two passes.
#![forbid(unsafe_code)]
#![allow(rustdoc::private_intra_doc_links)]

mod aligned;

mod matmul;

mod kernels;

mod attention;
mod linear;

mod model;

mod conditioning;
mod workspace;

mod backward;
mod forward;

#[cfg(test)]
mod tests;

use std::path::Path;

use macerator::Arch;
use mmdit::model::CHECKPOINT_STEM;
use mmdit::{BaseWeights, MmditConfig, MmditError};
use tensor::Weights;

use crate::backward::Reach;
use crate::conditioning::{Condition, Conditioning};
use crate::model::Model;
use crate::workspace::{IMAGE, Sizes, Workspace};

pub use crate::linear::Factors;

/// What goes into one forward pass; everything row-major with the sample as first axis.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// Noisy latents as tokens, `(b, n, in_channels)`.
    pub hidden_states: &'a [f32],
    /// Text tokens, `(b, l, joint_attention_dim)`; all of them are attended, padding included.
    pub encoder_hidden_states: &'a [f32],
    /// The pooled caption, `(b, pooled_projection_dim)`.
    pub pooled_projections: &'a [f32],
    /// Noise level σ of each sample, 0 to 1.
    pub timestep: &'a [f32],
    /// Guidance scale of each sample, for models with a guidance embedding and only for them.
    pub guidance: Option<&'a [f32]>,
    /// Positions of one sample's tokens: text, then image.
    pub positions: &'a [[f32; 3]],
}

/// The transformer with frozen weights, and the factors that are on it.
#[derive(Debug)]
pub struct Transformer {
    model: Model,
    num_factors: usize,
    num_gradients: usize,
    workspace: Option<Workspace>,
    conditioning: Conditioning,
}

impl Transformer {
    /// Loads a transformer from a folder in diffusers' layout: `config.json` and the checkpoint beside it.
    ///
    /// # Errors
    ///
    /// If the configuration asks for what this model does not do, or the checkpoint's parameters are not the
    /// configuration's.
    pub fn open(dir: &Path, base: BaseWeights) -> Result<Self, MmditError> {
        let config = MmditConfig::from_file(&dir.join("config.json"))?;
        Self::load(&Weights::open(dir, CHECKPOINT_STEM)?, config, base)
    }

    /// Builds a transformer from weights that are already open.
    ///
    /// # Errors
    ///
    /// If the weights' names and shapes are not the configuration's, or cannot be read.
    pub fn load(
        weights: &Weights,
        config: MmditConfig,
        base: BaseWeights,
    ) -> Result<Self, MmditError> {
        Self::load_for(Arch::new(), weights, config, base)
    }

    fn load_for(
        arch: Arch,
        weights: &Weights,
        config: MmditConfig,
        base: BaseWeights,
    ) -> Result<Self, MmditError> {
        Ok(Self {
            model: Model::load(weights, config, base, arch)?,
            num_factors: 0,
            num_gradients: 0,
            workspace: None,
            conditioning: Conditioning::default(),
        })
    }

    /// Its sizes.
    pub fn config(&self) -> &MmditConfig {
        &self.model.config
    }

    /// Replaces the LoRA factors; several on one layer add up.
    ///
    /// # Panics
    ///
    /// If factors are on a layer that there is not, or are not of its size.
    pub fn set_factors(&mut self, factors: &[Factors]) {
        self.num_gradients = self.model.adapt(factors);
        self.num_factors = factors.len();
    }

    /// The velocity of each token: `(b, n, velocity channels)`, row-major.
    ///
    /// # Panics
    ///
    /// If the sizes of the inputs do not agree with one another or with the configuration.
    pub fn velocity(&mut self, input: &Input<'_>) -> Vec<f32> {
        self.forward(input, false)
    }

    /// As [`Transformer::velocity`], keeping what [`Transformer::gradients`] needs.
    ///
    /// # Panics
    ///
    /// As [`Transformer::velocity`].
    pub fn velocity_to_train(&mut self, input: &Input<'_>) -> Vec<f32> {
        self.model.prepare_backward();
        self.forward(input, true)
    }

    /// Gradients of A and B of all factors, in their order, given that of the velocity.
    ///
    /// # Panics
    ///
    /// If it does not follow [`Transformer::velocity_to_train`], or `d_velocity` is not of the velocity's length.
    pub fn gradients(&mut self, d_velocity: &[f32]) -> Vec<[Vec<f32>; 2]> {
        let channels = self.model.config.velocity_channels();
        let space = self
            .workspace
            .as_mut()
            .filter(|space| space.sizes.keeps)
            .expect("a forward pass that keeps its activations comes first");
        let Sizes {
            num_samples,
            num_text,
            num_image,
            ..
        } = space.sizes;
        assert_eq!(
            d_velocity.len(),
            num_samples * num_image * channels,
            "a gradient for {num_samples} times {num_image} tokens of {channels}"
        );
        for tile in space.tiles.iter_mut().filter(|tile| tile.stream == IMAGE) {
            let first = tile.sample * num_image + tile.first - num_text;
            let rows = &d_velocity[first * channels..(first + tile.rows) * channels];
            tile.d_velocity.clear();
            tile.d_velocity.extend_from_slice(rows);
        }
        let reach = Reach::of(&self.model);
        let all = backward::run(
            &self.model,
            &self.conditioning,
            space,
            reach,
            self.num_gradients,
        );
        self.model.gradients(&all, self.num_factors)
    }

    fn forward(&mut self, input: &Input<'_>, keeps: bool) -> Vec<f32> {
        let sizes = self.sizes(input, keeps);
        let model = &self.model;
        self.conditioning = Conditioning::new(
            model,
            Condition {
                timestep: input.timestep,
                guidance: input.guidance,
                pooled: input.pooled_projections,
            },
        );
        if self
            .workspace
            .as_ref()
            .is_none_or(|space| space.sizes != sizes)
        {
            self.workspace = None; // the old one's memory first
        }
        let space = self
            .workspace
            .get_or_insert_with(|| Workspace::new(model, sizes));
        if space.positions != input.positions {
            [space.cos, space.sin] = mmdit::rope::angles(&model.config, input.positions);
            space.positions = input.positions.to_vec();
        }
        for tile in &mut space.tiles {
            let (values, count, width, start) = match tile.stream {
                IMAGE => (
                    input.hidden_states,
                    sizes.num_image,
                    model.config.in_channels,
                    sizes.num_text,
                ),
                _ => (
                    input.encoder_hidden_states,
                    sizes.num_text,
                    model.config.joint_attention_dim,
                    0,
                ),
            };
            let first = tile.sample * count + tile.first - start;
            tile.input.clear();
            tile.input
                .extend_from_slice(&values[first * width..(first + tile.rows) * width]);
        }
        let keeps_updates = keeps && Reach::of(model).modulations;
        forward::run(model, &self.conditioning, space, keeps_updates);
        let image_tiles = space.tiles.iter().filter(|tile| tile.stream == IMAGE);
        image_tiles
            .flat_map(|tile| &tile.velocity)
            .copied()
            .collect()
    }

    fn sizes(&self, input: &Input<'_>, keeps: bool) -> Sizes {
        let config = &self.model.config;
        let b = input.timestep.len();
        let count = |values: &[f32], width: usize| values.len() / (b * width).max(1);
        let sizes = Sizes {
            num_samples: b,
            num_text: count(input.encoder_hidden_states, config.joint_attention_dim),
            num_image: count(input.hidden_states, config.in_channels),
            keeps,
        };
        assert!(
            input.hidden_states.len() == b * sizes.num_image * config.in_channels
                && input.encoder_hidden_states.len()
                    == b * sizes.num_text * config.joint_attention_dim
                && input.pooled_projections.len() == b * config.pooled_projection_dim
                && input.guidance.is_none_or(|guidance| guidance.len() == b)
                && input.positions.len() == sizes.num_tokens(),
            "{} image, {} text and {} pooled numbers, {b} times and {} positions do not suit {config:?}",
            input.hidden_states.len(),
            input.encoder_hidden_states.len(),
            input.pooled_projections.len(),
            input.positions.len()
        );
        sizes
    }
}
