//! A loaded transformer on one device: weights, an adapter, and memory for the passes.

use std::collections::HashMap;
use std::path::Path;

use artifacts::Checkpoint;
use mmdit::MmditConfig;
use mmdit::model::CHECKPOINT_STEM;
use mmdit::patches::{image_ids, text_ids};
use mmdit::rope::angles;

use crate::arena::Arena;
use crate::error::CudaError;
use crate::gemm::WORKSPACE_BYTES;
use crate::half_type::Half;
use crate::model::error::ModelError;
use crate::model::factors::{DeviceFactors, LoraFactors};
use crate::model::joint::{Joint, Rope};
use crate::model::linear::{Cx, WeightScratch};
use crate::model::modulations::Modulations;
use crate::model::network::{self, Network, WeightForm};
use crate::model::pass::{Conditions, Pass};
use crate::model::sampler::Sampling;
use crate::model::sizes::{Shape, Sizes};
use crate::model::source::WeightSource;
use crate::model::train::Training;
use crate::ops::elementwise;
use crate::stream::{Buffer, Stream};
use crate::view::View;

/// How a transformer is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// What it computes in.
    pub t: Half,
    /// In what form linear layers are kept.
    pub form: WeightForm,
}

/// A transformer on a device.
pub struct Engine {
    // In the order in which they must go: recorded work before the memory that it touches.
    pub(crate) training: Option<Training>,
    pub(crate) sampling: Option<Sampling>,
    pub(crate) activations: Option<Buffer>,
    pub(crate) factors: Option<DeviceFactors>,
    pub(crate) ropes: HashMap<(usize, [usize; 2]), PositionTables>,
    pub(crate) network: Network,
    weights: Buffer,
    pub(crate) sizes: Sizes,
    pub(crate) options: EngineOptions,
    pub(crate) stream: Stream,
}

/// Cosines and sines on the device.
pub(crate) struct PositionTables {
    pub(crate) rope: Rope,
    _memory: Buffer,
}

impl PositionTables {
    /// The tables for a batch's text and image tokens.
    pub(crate) fn new(stream: &Stream, sizes: &Sizes, shape: Shape) -> Result<Self, CudaError> {
        let [h, w] = shape.latent_cells;
        let mut ids = text_ids(shape.text);
        ids.extend(image_ids(h, w));
        let tables = angles(&sizes.config, &ids);
        let bytes = crate::arena::aligned(4 * tables[0].len());
        let memory = stream.allocate(2 * bytes, "positions")?;
        let [cos, sin] = [0, 1].map(|i| memory.view().skip(i * bytes).take(4 * tables[i].len()));
        stream.upload(cos, &tables[0])?;
        stream.upload(sin, &tables[1])?;
        Ok(Self {
            rope: Rope { cos, sin },
            _memory: memory,
        })
    }
}

/// What one velocity is computed from. Row-major host values.
#[derive(Clone, Copy, Debug)]
pub struct VelocityInput<'a> {
    /// Sizes of the batch.
    pub shape: Shape,
    /// Noisy latents as tokens, `(b, image, in_channels)`.
    pub tokens: &'a [f32],
    /// Text states, `(b, text, joint_attention_dim)`.
    pub text: &'a [f32],
    /// Pooled captions, `(b, pooled_projection_dim)`.
    pub pooled: &'a [f32],
    /// Noise levels, 0 to 1, one per sample.
    pub times: &'a [f32],
    /// Guidance scales, for models with a guidance embedding and only for them.
    pub guidance: Option<&'a [f32]>,
}

impl Engine {
    /// Loads a transformer from a folder in diffusers' layout.
    ///
    /// # Errors
    ///
    /// If the checkpoint is not the configuration's, a size is unsupported, or the device has too little memory.
    pub fn open(
        stream: Stream,
        dir: &Path,
        config: &MmditConfig,
        options: EngineOptions,
    ) -> Result<Self, CudaError> {
        let checkpoint = Checkpoint::open(dir, CHECKPOINT_STEM).map_err(ModelError::from)?;
        let expected: Vec<(String, Vec<usize>)> = config
            .parameters()
            .into_iter()
            .map(|spec| (spec.name, spec.shape))
            .collect();
        checkpoint.check(&expected).map_err(ModelError::from)?;
        Self::load(stream, config, &checkpoint, options)
    }

    /// Loads a transformer from any source of weights, whose tensors have the configuration's sizes.
    ///
    /// # Errors
    ///
    /// If a tensor is missing, a size is unsupported, or the device has too little memory.
    ///
    /// # Panics
    ///
    /// If a tensor has another size.
    pub fn load(
        stream: Stream,
        config: &MmditConfig,
        source: &dyn WeightSource,
        options: EngineOptions,
    ) -> Result<Self, CudaError> {
        let sizes = Sizes::new(config)?;
        let loaded = network::load(&stream, source, &sizes, options.t, options.form)?;
        Ok(Self {
            training: None,
            sampling: None,
            activations: None,
            factors: None,
            ropes: HashMap::new(),
            network: loaded.network,
            weights: loaded.slab,
            sizes,
            options,
            stream,
        })
    }

    /// The stream that everything is done on.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// The configuration.
    pub fn config(&self) -> &MmditConfig {
        &self.sizes.config
    }

    /// Puts a LoRA onto the layers, in place of any other. With `trained` its gradients can be had.
    ///
    /// # Errors
    ///
    /// If a path is no layer, or factors have another size.
    pub fn attach_lora(&mut self, factors: &[LoraFactors], trained: bool) -> Result<(), CudaError> {
        self.detach_lora()?;
        let attached = DeviceFactors::attach(
            &self.stream,
            &mut self.network,
            factors,
            self.options.t,
            trained,
        )?;
        self.factors = Some(attached);
        Ok(())
    }

    /// Takes the LoRA off.
    ///
    /// # Errors
    ///
    /// If work that is still running fails.
    pub fn detach_lora(&mut self) -> Result<(), CudaError> {
        self.training = None;
        self.sampling = None;
        self.stream.synchronize()?;
        if let Some(factors) = self.factors.take() {
            factors.detach(&mut self.network);
        }
        Ok(())
    }

    /// The LoRA's factors as they are now; none without a LoRA.
    ///
    /// # Errors
    ///
    /// If the copy fails.
    pub fn lora(&self) -> Result<Vec<LoraFactors>, CudaError> {
        match &self.factors {
            Some(factors) => factors.download(&self.stream),
            None => Ok(Vec::new()),
        }
    }

    /// Replaces the values of the LoRA's factors, whose layers and ranks stay: all tensors one behind the other, A and
    /// B of each layer, layers by path, as [`Engine::lora`] has them. Training goes on.
    ///
    /// # Errors
    ///
    /// If a copy or a launch fails.
    ///
    /// # Panics
    ///
    /// If there is no LoRA, or it has another number of values.
    pub fn set_lora_values(&mut self, values: &[f32]) -> Result<(), CudaError> {
        let factors = self.factors.as_ref().expect("a LoRA was attached");
        factors.upload(&self.stream, self.options.t, values)
    }

    /// Velocity of every image token: `(b, image, velocity channels)`.
    ///
    /// # Errors
    ///
    /// If memory is short or a launch fails.
    ///
    /// # Panics
    ///
    /// If a slice has not the batch's size.
    pub fn velocity(&mut self, input: &VelocityInput<'_>) -> Result<Vec<f32>, CudaError> {
        let VelocityInput { shape, .. } = *input;
        self.prepare_rope(shape)?;
        let config = self.sizes.config.clone();
        let channels = config.velocity_channels();
        let count = shape.b * shape.image() * channels;
        let work = |cx: &Cx<'_>, this: &Self| {
            let b = shape.b;
            let velocity = cx.half(count);
            let wide = cx.f32(count);
            let conditions = this.conditions(cx, input.times, input.guidance, input.pooled, b)?;
            let text =
                this.half_tokens(cx, input.text, shape.rows(0) * config.joint_attention_dim)?;
            let image = this.half_tokens(cx, input.tokens, shape.rows(1) * config.in_channels)?;
            let modulations = this.modulations(cx, &conditions, b)?;
            let pass = this.pass(shape, modulations);
            pass.forward(cx, velocity, [text, image])?;
            elementwise::to_f32(cx.stream, cx.t, wide, velocity, count)?;
            cx.stream.download::<f32>(wide, count)
        };
        let bytes = self.peak_of(|cx| work(cx, self).map(drop))?;
        self.ensure_activations(bytes)?;
        let arena = self.arena();
        work(&self.cx(&self.stream, &arena), self)
    }

    /// Bytes in use by part: weights, LoRA, activations, cuBLASLt's workspace.
    pub fn used_bytes(&self) -> [(&'static str, usize); 4] {
        let of = |buffer: &Buffer| buffer.view().bytes();
        [
            ("weights", of(&self.weights)),
            (
                "lora",
                self.factors.as_ref().map_or(0, DeviceFactors::num_bytes),
            ),
            ("activations", self.activations.as_ref().map_or(0, of)),
            ("workspace", WORKSPACE_BYTES),
        ]
    }

    /// Gives back the activations' memory, and forgets work that was recorded on it.
    ///
    /// # Errors
    ///
    /// If work that is still running fails.
    pub fn release_activations(&mut self) -> Result<(), CudaError> {
        self.training = None;
        self.sampling = None;
        self.stream.synchronize()?;
        self.activations = None;
        Ok(())
    }

    /// The peak of a schedule's memory, found by running it dry.
    pub(crate) fn peak_of(
        &self,
        work: impl FnOnce(&Cx<'_>) -> Result<(), CudaError>,
    ) -> Result<usize, CudaError> {
        let (dry, counting) = (Stream::dry(), Arena::counting());
        work(&self.cx(&dry, &counting))?;
        Ok(counting.peak_bytes())
    }

    /// Makes the activations' slab at least so large. Recorded work that used a smaller one is forgotten.
    pub(crate) fn ensure_activations(&mut self, bytes: usize) -> Result<(), CudaError> {
        let have = self
            .activations
            .as_ref()
            .map_or(0, |slab| slab.view().bytes());
        if have >= bytes {
            return Ok(());
        }
        if let Some(training) = &mut self.training {
            training.forget_graphs();
        }
        if let Some(sampling) = &mut self.sampling {
            sampling.forget_graph();
        }
        self.activations = None;
        self.activations = Some(self.stream.allocate(bytes, "activations")?);
        Ok(())
    }

    /// The activations' stack, empty.
    pub(crate) fn arena(&self) -> Arena {
        let slab = self.activations.as_ref().expect("the slab was made before");
        Arena::over(slab.view())
    }

    /// What layers need, with room for two 16-bit weights at the bottom of the stack where weights are NF4.
    pub(crate) fn cx<'a>(&self, stream: &'a Stream, arena: &'a Arena) -> Cx<'a> {
        let largest = match self.options.form {
            WeightForm::Half => [0; 2],
            WeightForm::Nf4 { .. } => self.network.largest_weights(),
        };
        Cx {
            stream,
            t: self.options.t,
            arena,
            weight_scratch: WeightScratch::new(arena, largest),
        }
    }

    /// Makes the tables of positions for a shape, unless they are there. Whatever goes through the blocks comes by here
    /// first, so this is where its shape is checked.
    pub(crate) fn prepare_rope(&mut self, shape: Shape) -> Result<(), CudaError> {
        self.sizes.check_shape(shape)?;
        let key = (shape.text, shape.latent_cells);
        if self.ropes.contains_key(&key) {
            return Ok(());
        }
        let tables = PositionTables::new(&self.stream, &self.sizes, shape)?;
        self.ropes.insert(key, tables);
        Ok(())
    }

    /// A pass over the blocks for a shape whose positions are prepared.
    pub(crate) fn pass(&self, shape: Shape, modulations: Modulations) -> Pass<'_> {
        let tables = &self.ropes[&(shape.text, shape.latent_cells)];
        Pass {
            network: &self.network,
            joint: Joint {
                sizes: &self.sizes,
                shape,
                rope: tables.rope,
            },
            modulations,
        }
    }

    /// Conditions on the stack from host values.
    pub(crate) fn conditions(
        &self,
        cx: &Cx<'_>,
        times: &[f32],
        guidance: Option<&[f32]>,
        pooled: &[f32],
        rows: usize,
    ) -> Result<Conditions, CudaError> {
        assert_eq!(times.len(), rows, "one noise level per sample");
        assert_eq!(
            guidance.is_some(),
            self.sizes.config.guidance_embeds,
            "guidance scales for models with a guidance embedding, and only for them"
        );
        let thousandfold = |values: &[f32]| -> Result<View, CudaError> {
            assert_eq!(values.len(), rows, "one number per sample");
            let view = cx.f32(rows);
            let values: Vec<f32> = values.iter().map(|value| value * 1000.0).collect();
            cx.stream.upload(view, &values)?;
            Ok(view)
        };
        let wide = cx.f32(rows * self.sizes.config.pooled_projection_dim);
        assert_eq!(4 * pooled.len(), wide.bytes(), "bytes of pooled captions");
        cx.stream.upload(wide, pooled)?;
        Ok(Conditions {
            times: thousandfold(times)?,
            guidance: guidance.map(thousandfold).transpose()?,
            pooled: wide,
        })
    }

    /// Host values on the stack in T.
    pub(crate) fn half_tokens(
        &self,
        cx: &Cx<'_>,
        values: &[f32],
        count: usize,
    ) -> Result<View, CudaError> {
        assert_eq!(values.len(), count, "values of a batch");
        let half = cx.half(count);
        let mark = cx.arena.mark();
        let wide = cx.f32(count);
        cx.stream.upload(wide, values)?;
        elementwise::to_half(cx.stream, cx.t, half, wide, count)?;
        cx.arena.release(mark);
        Ok(half)
    }

    /// Modulation vectors on the stack, one row per sample.
    pub(crate) fn modulations(
        &self,
        cx: &Cx<'_>,
        conditions: &Conditions,
        rows: usize,
    ) -> Result<Modulations, CudaError> {
        let stride = self.sizes.modulation_width();
        let view = cx.f32(rows * stride);
        self.network.modulate(cx, view, conditions, rows)?;
        Ok(Modulations {
            view,
            stride,
            gradient: None,
        })
    }
}

/// Latents `(b, c, h, w)` as tokens `(b, h/2·w/2, 4c)`; a token lists its 2×2 patch channel by channel.
///
/// Source: `FluxPipeline._pack_latents`, diffusers 0.42.
///
/// # Panics
///
/// If the number of values is not the sizes' product, or a side is odd.
pub fn tokens_of(latents: &[f32], [b, c, h, w]: [usize; 4]) -> Vec<f32> {
    assert!(
        h.is_multiple_of(2) && w.is_multiple_of(2) && latents.len() == b * c * h * w,
        "{} values are no {b} latents of {c}×{h}×{w}",
        latents.len()
    );
    let mut tokens = Vec::with_capacity(latents.len());
    for sample in latents.chunks_exact(c * h * w) {
        for row in (0..h).step_by(2) {
            for column in (0..w).step_by(2) {
                for channel in sample.chunks_exact(h * w) {
                    for r in [row, row + 1] {
                        tokens.extend_from_slice(&channel[r * w + column..r * w + column + 2]);
                    }
                }
            }
        }
    }
    tokens
}

/// Tokens `(b, h/2·w/2, 4c)` as latents `(b, c, h, w)`: the inverse of [`tokens_of`].
///
/// # Panics
///
/// If the number of values is not the sizes' product.
pub fn latents_of(tokens: &[f32], [b, c, h, w]: [usize; 4]) -> Vec<f32> {
    assert_eq!(tokens.len(), b * c * h * w, "values of tokens");
    let mut latents = vec![0.0; tokens.len()];
    let mut values = tokens.iter();
    for sample in 0..b {
        for row in (0..h).step_by(2) {
            for column in (0..w).step_by(2) {
                for channel in 0..c {
                    for (r, col) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                        let place = ((sample * c + channel) * h + row + r) * w + column + col;
                        latents[place] = *values.next().expect("as many values as places");
                    }
                }
            }
        }
    }
    latents
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_lists_its_patch_channel_by_channel() {
        let latents: Vec<f32> = (0..16).map(|i| i as f32).collect();
        let tokens = tokens_of(&latents, [1, 2, 2, 4]);
        assert_eq!(tokens[..8], [0.0, 1.0, 4.0, 5.0, 8.0, 9.0, 12.0, 13.0]);
        assert_eq!(latents_of(&tokens, [1, 2, 2, 4]), latents);
    }
}
