//! The transformer as a whole: loading it in the form it is wanted in, and the forward pass.

use std::path::Path;

use quant::QuantError;
use tensor::nn::silu;
use tensor::{Device, Precision, Tensor, Weights, WeightsError};

use crate::adapters::Adapters;
use crate::blocks::{DoubleBlock, NormOut, SingleBlock};
use crate::config::{ConfigError, MmditConfig};
use crate::embed::TimeTextEmbed;
use crate::layers::{Layer, Loader};
use crate::rope::Rope;

/// What the checkpoint's files are called without their ending.
pub const CHECKPOINT_STEM: &str = "diffusion_pytorch_model";

/// In what form the frozen linear layers are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseWeights {
    /// As the checkpoint has them, in the precision asked for.
    Plain,
    /// Quantised to NF4 (blocks of 64 along the flattened weight) and back: the values that 4-bit training sees.
    ///
    /// Every linear layer is, modulations and embedders included; biases and norms are not.
    Nf4 {
        /// Whether the blocks' scales are themselves quantised to 8 bits.
        double_quant: bool,
    },
}

/// How to load a transformer.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Where it computes; [`tensor::device::training`] of a device where LoRA factors want gradients.
    pub device: Device,
    /// What it computes in. Norms' statistics, rotary angles, sinusoids and softmax are `f32` in any case.
    pub precision: Precision,
    /// In what form the linear layers are kept.
    pub base: BaseWeights,
}

/// Why a transformer cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum MmditError {
    /// Its configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its weights cannot be used.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A weight cannot be quantised.
    #[error("cannot quantise the weight of `{path}`")]
    Quantize {
        /// The layer.
        path: String,
        /// What is wrong with it.
        source: QuantError,
    },
}

/// What goes into one forward pass. Tensors lie on the model's device; any float type will do.
#[derive(Clone, Debug)]
pub struct MmditInput<'a> {
    /// Noisy latents as tokens, `(b, n, in_channels)`; see [`crate::patchify`].
    pub hidden_states: Tensor<3>,
    /// Text tokens, `(b, l, joint_attention_dim)`; all of them are attended, padding included.
    pub encoder_hidden_states: Tensor<3>,
    /// The pooled caption, `(b, pooled_projection_dim)`.
    pub pooled_projections: Tensor<2>,
    /// Noise level σ of each sample, 0 to 1.
    pub timestep: &'a [f32],
    /// Guidance scale of each sample, for models with a guidance embedding and only for them.
    pub guidance: Option<&'a [f32]>,
    /// Positions: text tokens, then image tokens.
    pub rope: &'a Rope,
}

/// What a forward pass went through, in the reference's words.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Time, guidance and pooled caption, `(b, d)`.
    pub temb: Tensor<2>,
    /// After each double block: text `(b, l, d)` and image `(b, n, d)`.
    pub double: Vec<[Tensor<3>; 2]>,
    /// After each single block: text and image.
    pub single: Vec<[Tensor<3>; 2]>,
    /// After the last norm, image only.
    pub norm_out: Tensor<3>,
}

/// FLUX's transformer with frozen weights.
#[derive(Clone, Debug)]
pub struct Mmdit {
    config: MmditConfig,
    device: Device,
    precision: Precision,
    x_embedder: Layer,
    context_embedder: Layer,
    time_text_embed: TimeTextEmbed,
    transformer_blocks: Vec<DoubleBlock>,
    single_transformer_blocks: Vec<SingleBlock>,
    norm_out: NormOut,
    proj_out: Layer,
}

impl Mmdit {
    /// Loads a transformer from a folder in diffusers' layout: `config.json` and the checkpoint beside it.
    ///
    /// # Errors
    ///
    /// If the configuration asks for what this model does not do, or the checkpoint's parameters are not the
    /// configuration's.
    pub fn open(dir: &Path, options: &LoadOptions) -> Result<Self, MmditError> {
        let config = MmditConfig::from_file(&dir.join("config.json"))?;
        let weights = Weights::open(dir, CHECKPOINT_STEM)?;
        Self::load(&weights, config, options)
    }

    /// Builds a transformer from weights that are already open.
    ///
    /// # Errors
    ///
    /// If the weights' names and shapes are not the configuration's, or cannot be read.
    pub fn load(
        weights: &Weights,
        config: MmditConfig,
        options: &LoadOptions,
    ) -> Result<Self, MmditError> {
        weights.check(&config.parameters())?;
        let loader = Loader {
            weights,
            device: &options.device,
            precision: options.precision,
            base: options.base,
        };
        let d = config.width();
        Ok(Self {
            x_embedder: loader.linear("x_embedder", config.in_channels, d)?,
            context_embedder: loader.linear("context_embedder", config.joint_attention_dim, d)?,
            time_text_embed: TimeTextEmbed::load(&loader, &config)?,
            transformer_blocks: (0..config.num_layers)
                .map(|i| DoubleBlock::load(&loader, &config, i))
                .collect::<Result<_, _>>()?,
            single_transformer_blocks: (0..config.num_single_layers)
                .map(|i| SingleBlock::load(&loader, &config, i))
                .collect::<Result<_, _>>()?,
            norm_out: NormOut::load(&loader, d)?,
            proj_out: loader.linear("proj_out", d, config.velocity_channels())?,
            device: options.device.clone(),
            precision: options.precision,
            config,
        })
    }

    /// Its sizes.
    pub fn config(&self) -> &MmditConfig {
        &self.config
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What it computes in.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Positions for text tokens followed by the image tokens of a latent of `h`×`w` cells.
    pub fn rope(&self, num_text_tokens: usize, latent_cells: [usize; 2]) -> Rope {
        Rope::for_latent(&self.config, num_text_tokens, latent_cells, &self.device)
    }

    /// `temb` of each sample: see [`crate::embed`]. `(b, pooled)` → `(b, d)`.
    ///
    /// # Panics
    ///
    /// If guidance is given to a model without guidance embedding, or withheld from one with it.
    pub fn time_text_embed(
        &self,
        timestep: &[f32],
        guidance: Option<&[f32]>,
        pooled: Tensor<2>,
        adapters: &Adapters,
    ) -> Tensor<2> {
        let pooled = pooled.cast(self.precision.dtype());
        self.time_text_embed
            .forward(timestep, guidance, pooled, adapters)
    }

    /// The velocity of each token, in the model's precision: `(b, n, in_channels)` → `(b, n, velocity channels)`.
    ///
    /// # Panics
    ///
    /// If the sizes of the inputs do not agree with one another or with the configuration, or guidance is given to
    /// a model without guidance embedding (or withheld from one with it).
    pub fn forward(&self, input: &MmditInput<'_>, adapters: &Adapters) -> Tensor<3> {
        self.run(input, adapters, false).0
    }

    /// As [`Mmdit::forward`], with everything that parity tests compare.
    pub fn forward_traced(
        &self,
        input: &MmditInput<'_>,
        adapters: &Adapters,
    ) -> (Tensor<3>, Trace) {
        let (velocity, trace) = self.run(input, adapters, true);
        (velocity, trace.expect("a trace was asked for"))
    }

    fn run(
        &self,
        input: &MmditInput<'_>,
        adapters: &Adapters,
        traced: bool,
    ) -> (Tensor<3>, Option<Trace>) {
        self.check(input);
        let dtype = self.precision.dtype();
        let rope = input.rope;
        let hidden_states = input.hidden_states.clone().cast(dtype);
        let encoder_hidden_states = input.encoder_hidden_states.clone().cast(dtype);
        let pooled = input.pooled_projections.clone();

        let mut img = self.x_embedder.forward(hidden_states, adapters);
        let mut txt = self
            .context_embedder
            .forward(encoder_hidden_states, adapters);
        let temb = self.time_text_embed(input.timestep, input.guidance, pooled, adapters);

        // All modulations at once: they depend on nothing that the blocks compute.
        let silu_temb = silu(temb.clone());
        let double_modulations: Vec<_> = self
            .transformer_blocks
            .iter()
            .map(|block| block.modulation(&silu_temb, adapters))
            .collect();
        let single_modulations: Vec<_> = self
            .single_transformer_blocks
            .iter()
            .map(|block| block.modulation(&silu_temb, adapters))
            .collect();
        let out_modulation = self.norm_out.modulation(&silu_temb, adapters);

        let mut double = Vec::new();
        for (block, modulation) in self.transformer_blocks.iter().zip(&double_modulations) {
            [txt, img] = block.forward([txt, img], modulation, rope, adapters);
            if traced {
                double.push([txt.clone(), img.clone()]);
            }
        }

        let [b, n_txt, d] = txt.dims();
        let [_, n_img, _] = img.dims();
        let part = |x: &Tensor<3>, range| x.clone().slice([0..b, range, 0..d]);
        let mut x = Tensor::cat(vec![txt, img], 1); // b n_txt+n_img d
        let mut single = Vec::new();
        for (block, modulation) in self
            .single_transformer_blocks
            .iter()
            .zip(&single_modulations)
        {
            x = block.forward(x, modulation, rope, adapters);
            if traced {
                single.push([part(&x, 0..n_txt), part(&x, n_txt..n_txt + n_img)]);
            }
        }

        let img = part(&x, n_txt..n_txt + n_img);
        let norm_out = self.norm_out.forward(img, &out_modulation);
        let velocity = self.proj_out.forward(norm_out.clone(), adapters);
        let trace = traced.then_some(Trace {
            temb,
            double,
            single,
            norm_out,
        });
        (velocity, trace)
    }

    fn check(&self, input: &MmditInput<'_>) {
        let [b, n, channels] = input.hidden_states.dims();
        let [b_txt, l, width] = input.encoder_hidden_states.dims();
        let [b_pooled, pooled] = input.pooled_projections.dims();
        let config = &self.config;
        assert!(
            channels == config.in_channels
                && width == config.joint_attention_dim
                && pooled == config.pooled_projection_dim,
            "image tokens of {channels}, text tokens of {width}, pooled captions of {pooled} channels \
             do not suit {config:?}"
        );
        assert!(
            b == b_txt
                && b == b_pooled
                && b == input.timestep.len()
                && input.guidance.is_none_or(|g| g.len() == b),
            "{b} images, {b_txt} texts, {b_pooled} pooled captions, {} times, {:?} guidance scales",
            input.timestep.len(),
            input.guidance.map(<[f32]>::len)
        );
        assert_eq!(
            input.rope.num_tokens(),
            l + n,
            "positions for {l} text and {n} image tokens"
        );
    }
}
