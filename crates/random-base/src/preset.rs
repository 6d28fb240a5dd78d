//! The sizes of a base, as the configuration files that say them.
//!
//! A preset is nothing but its JSON files: the models are built from those, so that a base and its sizes cannot
//! disagree. Keys and class names are the ones that diffusers and transformers write.

use std::fmt;
use std::str::FromStr;

use mmdit::MmditConfig;
use serde_json::{Value, json};

/// The diffusers release whose files these are modelled on.
const DIFFUSERS_VERSION: &str = "0.42.1";

/// The transformers release whose files these are modelled on.
const TRANSFORMERS_VERSION: &str = "5.23.0";

/// A set of sizes that has a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// About 4 M parameters, more than half of them in the two vocabularies: the least that has everything FLUX.1 has.
    ///
    /// VAE ÷8 with 16 latent channels, as FLUX.1: a sprite of 32×32 pixels magnified four times is 8×8 tokens.
    Demo,
    /// About 13.6 M parameters: the base that `configs/pretrain-small.toml` trains and the repository ships.
    ///
    /// VAE ÷4, so that a sprite pixel magnified four times is one latent cell; 128×128 pixels are 16×16 tokens. Heads of
    /// 64 channels, which the CUDA engine's fast attention takes.
    Small,
    /// Every part is there and nothing is wide but the vocabularies: for tests.
    Tiny,
}

/// What a preset decides; everything else is the same in all of them.
struct Sizes {
    /// Widths of the text encoders and channels of a latent follow from what it takes.
    transformer: MmditConfig,
    vae_channels: &'static [usize],
    vae_attention: bool,
    clip_layers: usize,
    t5_inner: usize,
    t5_heads: usize,
    t5_layers: usize,
}

/// The name is no preset's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("preset `{0}` is not known: there are `demo`, `small` and `tiny`")]
pub struct UnknownPreset(String);

impl FromStr for Preset {
    type Err = UnknownPreset;

    fn from_str(name: &str) -> Result<Self, UnknownPreset> {
        match name {
            "demo" => Ok(Self::Demo),
            "small" => Ok(Self::Small),
            "tiny" => Ok(Self::Tiny),
            _ => Err(UnknownPreset(name.to_owned())),
        }
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Demo => "demo",
            Self::Small => "small",
            Self::Tiny => "tiny",
        })
    }
}

impl Preset {
    fn sizes(self) -> Sizes {
        match self {
            Self::Demo => Sizes {
                transformer: MmditConfig {
                    num_attention_heads: 3,
                    attention_head_dim: 32,
                    axes_dims_rope: [8, 12, 12],
                    joint_attention_dim: 32,
                    guidance_embeds: true,
                    ..MmditConfig::small()
                },
                vae_channels: &[16, 16, 24, 24],
                vae_attention: true,
                clip_layers: 2,
                t5_inner: 64,
                t5_heads: 2,
                t5_layers: 2,
            },
            Self::Small => Sizes {
                transformer: MmditConfig::small(),
                vae_channels: &[32, 64, 96],
                vae_attention: false,
                clip_layers: 2,
                t5_inner: 256,
                t5_heads: 4,
                t5_layers: 3,
            },
            Self::Tiny => Sizes {
                transformer: MmditConfig {
                    num_layers: 1,
                    num_single_layers: 1,
                    num_attention_heads: 2,
                    attention_head_dim: 16,
                    axes_dims_rope: [4, 6, 6],
                    joint_attention_dim: 4,
                    pooled_projection_dim: 4,
                    in_channels: 16,
                    out_channels: 16,
                    ..MmditConfig::small()
                },
                vae_channels: &[8, 8, 8],
                vae_attention: false,
                clip_layers: 1,
                t5_inner: 8,
                t5_heads: 1,
                t5_layers: 1,
            },
        }
    }

    /// `transformer/config.json`.
    pub fn transformer(self) -> Value {
        let config = self.sizes().transformer;
        json!({
            "_class_name": "FluxTransformer2DModel",
            "_diffusers_version": DIFFUSERS_VERSION,
            "attention_head_dim": config.attention_head_dim,
            "axes_dims_rope": config.axes_dims_rope,
            "guidance_embeds": config.guidance_embeds,
            "in_channels": config.in_channels,
            "joint_attention_dim": config.joint_attention_dim,
            "num_attention_heads": config.num_attention_heads,
            "num_layers": config.num_layers,
            "num_single_layers": config.num_single_layers,
            "out_channels": null,
            "patch_size": config.patch_size,
            "pooled_projection_dim": config.pooled_projection_dim
        })
    }

    /// `vae/config.json`.
    pub fn vae(self) -> Value {
        let sizes = self.sizes();
        json!({
            "_class_name": "AutoencoderKL",
            "_diffusers_version": DIFFUSERS_VERSION,
            "act_fn": "silu",
            "block_out_channels": sizes.vae_channels,
            "down_block_types": vec!["DownEncoderBlock2D"; sizes.vae_channels.len()],
            "force_upcast": true,
            "in_channels": 3,
            "latent_channels": sizes.transformer.in_channels / 4,
            "latents_mean": null,
            "latents_std": null,
            "layers_per_block": 1,
            "mid_block_add_attention": sizes.vae_attention,
            "norm_num_groups": 8,
            "out_channels": 3,
            "sample_size": 128,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "up_block_types": vec!["UpDecoderBlock2D"; sizes.vae_channels.len()],
            "use_post_quant_conv": false,
            "use_quant_conv": false
        })
    }

    /// `text_encoder/config.json`: CLIP.
    pub fn text_encoder(self) -> Value {
        let sizes = self.sizes();
        let width = sizes.transformer.pooled_projection_dim;
        json!({
            "architectures": ["CLIPTextModel"],
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "dtype": "float16",
            // Upstream's marker for "the closing token is the one with the highest id", as FLUX.1 has it.
            "eos_token_id": 2,
            "hidden_act": "quick_gelu",
            "hidden_size": width,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "intermediate_size": 2 * width,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 77,
            "model_type": "clip_text_model",
            "num_attention_heads": 2,
            "num_hidden_layers": sizes.clip_layers,
            "pad_token_id": 1,
            "projection_dim": width,
            "transformers_version": TRANSFORMERS_VERSION,
            "vocab_size": 49408
        })
    }

    /// `text_encoder_2/config.json`: T5.
    pub fn text_encoder_2(self) -> Value {
        let sizes = self.sizes();
        json!({
            "architectures": ["T5EncoderModel"],
            "classifier_dropout": 0.0,
            "d_ff": sizes.t5_inner,
            "d_kv": 16,
            "d_model": sizes.transformer.joint_attention_dim,
            "dense_act_fn": "gelu_new",
            "dropout_rate": 0.1,
            "dtype": "float16",
            "eos_token_id": 1,
            "feed_forward_proj": "gated-gelu",
            "initializer_factor": 1.0,
            "is_decoder": false,
            "is_encoder_decoder": false,
            "is_gated_act": true,
            "layer_norm_epsilon": 1e-6,
            "model_type": "t5",
            "num_decoder_layers": sizes.t5_layers,
            "num_heads": sizes.t5_heads,
            "num_layers": sizes.t5_layers,
            "pad_token_id": 0,
            "relative_attention_max_distance": 128,
            "relative_attention_num_buckets": 32,
            "scale_decoder_outputs": false,
            "tie_word_embeddings": true,
            "transformers_version": TRANSFORMERS_VERSION,
            "use_cache": false,
            "vocab_size": 32128
        })
    }

    /// `scheduler/scheduler_config.json`: FLUX.1-dev's, shifted by the size of the image.
    pub fn scheduler(self) -> Value {
        json!({
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "_diffusers_version": DIFFUSERS_VERSION,
            "base_image_seq_len": 256,
            "base_shift": 0.5,
            "invert_sigmas": false,
            "max_image_seq_len": 4096,
            "max_shift": 1.15,
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "shift_terminal": null,
            "stochastic_sampling": false,
            "time_shift_type": "exponential",
            "use_beta_sigmas": false,
            "use_dynamic_shifting": true,
            "use_exponential_sigmas": false,
            "use_karras_sigmas": false
        })
    }

    /// `model_index.json`; [`crate::UNTRAINED_KEY`] marks the base as untrained.
    pub fn model_index(self) -> Value {
        json!({
            "_class_name": "FluxPipeline",
            "_diffusers_version": DIFFUSERS_VERSION,
            (crate::UNTRAINED_KEY): true,
            "feature_extractor": [null, null],
            "image_encoder": [null, null],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preset_is_found_by_the_name_it_prints() {
        assert_eq!(Preset::Demo.to_string().parse(), Ok(Preset::Demo));
        let error = "xxl"
            .parse::<Preset>()
            .expect_err("there is no such preset");
        assert!(error.to_string().contains("`xxl`"), "{error}");
    }

    #[test]
    fn the_transformer_fits_the_models_around_it() {
        for preset in [Preset::Demo, Preset::Small, Preset::Tiny] {
            fits(preset);
        }
    }

    fn fits(preset: Preset) {
        let (transformer, vae) = (preset.transformer(), preset.vae());
        let (clip, t5) = (preset.text_encoder(), preset.text_encoder_2());
        assert_eq!(transformer["joint_attention_dim"], t5["d_model"]);
        assert_eq!(transformer["pooled_projection_dim"], clip["hidden_size"]);
        let latent_channels = vae["latent_channels"].as_u64().expect("a number");
        assert_eq!(transformer["in_channels"], 4 * latent_channels);
        let axes = transformer["axes_dims_rope"].as_array().expect("a list");
        let axes_sum: u64 = axes.iter().filter_map(Value::as_u64).sum();
        assert_eq!(transformer["attention_head_dim"], axes_sum);
    }
}
