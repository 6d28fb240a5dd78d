//! Sizes of an autoencoder, from `config.json` or by name, and the list of its parameters.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use tensor::{ParameterSpec, Tensor, WeightsError};

use crate::layers::{attention_parameters, conv_parameters, norm_parameters, resnet_parameters};

/// Why an autoencoder cannot be had, or cannot take a picture.
#[derive(Debug, thiserror::Error)]
pub enum AutoencoderError {
    /// The configuration could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The configuration does not parse, or lacks a size.
    #[error("{path} is not the configuration of an AutoencoderKL")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: serde_json::Error,
    },
    /// The configuration asks for something that is not built.
    #[error("{path}: `{key}` is {found}, expected {expected}")]
    Setting {
        /// The file.
        path: PathBuf,
        /// The field.
        key: &'static str,
        /// What would do.
        expected: String,
        /// What the file says.
        found: String,
    },
    /// A picture does not divide into latent cells.
    #[error(
        "a picture of {width_px}×{height_px} pixels cannot be encoded: both sides must be positive multiples of {multiple_px}"
    )]
    Size {
        /// Its width.
        width_px: usize,
        /// Its height.
        height_px: usize,
        /// Pixels per latent cell along one side.
        multiple_px: usize,
    },
    /// The weights are absent, damaged, or another model's.
    #[error(transparent)]
    Weights(#[from] WeightsError),
}

/// Sizes of an autoencoder, and how its latents are scaled for the transformer.
#[derive(Clone, Debug, PartialEq)]
pub struct AutoencoderConfig {
    /// Channels of a picture going in.
    pub in_channels: usize,
    /// Channels of a picture coming out.
    pub out_channels: usize,
    /// Channels of each level, from pixels to latents; every level but the last halves the sides.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of each level of the encoder; the decoder has one more.
    pub layers_per_block: usize,
    /// Channels of a latent.
    pub latent_channels: usize,
    /// Groups of the group norms; divides every level's channels.
    pub norm_num_groups: usize,
    /// `x₀ = (z − shift)·scale`.
    pub scaling_factor: f64,
    /// `x₀ = (z − shift)·scale`.
    pub shift_factor: f64,
    /// Whether a 1×1 convolution follows the encoder.
    pub use_quant_conv: bool,
    /// Whether a 1×1 convolution precedes the decoder.
    pub use_post_quant_conv: bool,
    /// Whether the middle blocks attend.
    pub mid_block_add_attention: bool,
}

/// `config.json`; what diffusers leaves out has the value of its `AutoencoderKL.__init__`.
#[derive(Deserialize)]
struct ConfigFile {
    in_channels: Option<usize>,
    out_channels: Option<usize>,
    down_block_types: Option<Vec<String>>,
    up_block_types: Option<Vec<String>>,
    block_out_channels: Vec<usize>,
    layers_per_block: Option<usize>,
    act_fn: Option<String>,
    latent_channels: Option<usize>,
    norm_num_groups: Option<usize>,
    scaling_factor: Option<f64>,
    shift_factor: Option<f64>,
    latents_mean: Option<serde_json::Value>,
    latents_std: Option<serde_json::Value>,
    use_quant_conv: Option<bool>,
    use_post_quant_conv: Option<bool>,
    mid_block_add_attention: Option<bool>,
}

impl AutoencoderConfig {
    /// The autoencoder of FLUX.1-dev and FLUX.1-schnell.
    pub fn flux() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: 2,
            latent_channels: 16,
            norm_num_groups: 32,
            scaling_factor: 0.3611,
            shift_factor: 0.1159,
            use_quant_conv: false,
            use_post_quant_conv: false,
            mid_block_add_attention: true,
        }
    }

    /// Reads diffusers' `config.json`.
    ///
    /// # Errors
    ///
    /// If it is no such file, lacks the channels, or asks for blocks, activations or latent
    /// statistics that are not built.
    pub fn from_file(path: &Path) -> Result<Self, AutoencoderError> {
        let bytes = fs_err::read(path).map_err(|source| AutoencoderError::Read {
            path: path.to_path_buf(),
            source,
        })?;
        let file: ConfigFile =
            serde_json::from_slice(&bytes).map_err(|source| AutoencoderError::Json {
                path: path.to_path_buf(),
                source,
            })?;
        let refused = |key, expected: &str, found: String| {
            Err(AutoencoderError::Setting {
                path: path.to_path_buf(),
                key,
                expected: expected.to_owned(),
                found,
            })
        };
        let levels = file.block_out_channels.len();
        for (key, types, only) in [
            (
                "down_block_types",
                &file.down_block_types,
                "DownEncoderBlock2D",
            ),
            ("up_block_types", &file.up_block_types, "UpDecoderBlock2D"),
        ] {
            let Some(types) = types else { continue };
            if types.len() != levels || types.iter().any(|name| name != only) {
                return refused(
                    key,
                    &format!("{levels} times \"{only}\""),
                    format!("{types:?}"),
                );
            }
        }
        if let Some(act_fn) = file.act_fn.filter(|name| name != "silu" && name != "swish") {
            return refused("act_fn", "\"silu\"", format!("{act_fn:?}"));
        }
        for (key, value) in [
            ("latents_mean", file.latents_mean),
            ("latents_std", file.latents_std),
        ] {
            if let Some(value) = value.filter(|value| !value.is_null()) {
                return refused(key, "null", value.to_string());
            }
        }
        let config = Self {
            in_channels: file.in_channels.unwrap_or(3),
            out_channels: file.out_channels.unwrap_or(3),
            block_out_channels: file.block_out_channels,
            layers_per_block: file.layers_per_block.unwrap_or(1),
            latent_channels: file.latent_channels.unwrap_or(4),
            norm_num_groups: file.norm_num_groups.unwrap_or(32),
            scaling_factor: file.scaling_factor.unwrap_or(0.182_15),
            shift_factor: file.shift_factor.unwrap_or(0.0),
            use_quant_conv: file.use_quant_conv.unwrap_or(true),
            use_post_quant_conv: file.use_post_quant_conv.unwrap_or(true),
            mid_block_add_attention: file.mid_block_add_attention.unwrap_or(true),
        };
        if !(1..=16).contains(&levels) {
            return refused("block_out_channels", "1 to 16 levels", levels.to_string());
        }
        for (key, found) in [
            ("in_channels", config.in_channels),
            ("out_channels", config.out_channels),
            ("layers_per_block", config.layers_per_block),
            ("latent_channels", config.latent_channels),
            ("norm_num_groups", config.norm_num_groups),
        ] {
            if !(1..=1 << 16).contains(&found) {
                return refused(key, "a size between 1 and 65536", found.to_string());
            }
        }
        let groups = config.norm_num_groups;
        for &channels in &config.block_out_channels {
            if !(1..=1 << 16).contains(&channels) || !channels.is_multiple_of(groups) {
                return refused(
                    "block_out_channels",
                    &format!("positive multiples of norm_num_groups = {groups}, at most 65536"),
                    channels.to_string(),
                );
            }
        }
        let (scale, shift) = (config.scaling_factor, config.shift_factor);
        if !scale.is_finite() || scale == 0.0 || !shift.is_finite() {
            return refused("scaling_factor", "a finite number but 0", scale.to_string());
        }
        Ok(config)
    }

    /// Pixels per latent cell along one side: 8 for FLUX.1.
    pub fn scale_factor_px(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }

    /// Accepts pictures that divide into latent cells.
    ///
    /// # Errors
    ///
    /// If a side is 0 or no multiple of [`Self::scale_factor_px`].
    pub fn check_size(&self, width_px: usize, height_px: usize) -> Result<(), AutoencoderError> {
        let multiple_px = self.scale_factor_px();
        let fits = |side: usize| side > 0 && side.is_multiple_of(multiple_px);
        if fits(width_px) && fits(height_px) {
            Ok(())
        } else {
            Err(AutoencoderError::Size {
                width_px,
                height_px,
                multiple_px,
            })
        }
    }

    /// From the autoencoder's latents to the transformer's: `(z − shift)·scale`.
    pub fn to_model<const D: usize>(&self, z: Tensor<D>) -> Tensor<D> {
        (z - self.shift_factor) * self.scaling_factor
    }

    /// From the transformer's latents to the autoencoder's: `x₀/scale + shift`.
    pub fn from_model<const D: usize>(&self, x0: Tensor<D>) -> Tensor<D> {
        x0 / self.scaling_factor + self.shift_factor
    }

    /// Every parameter by its published name.
    pub fn parameters(&self) -> Vec<ParameterSpec> {
        let channels = &self.block_out_channels;
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let z = self.latent_channels;
        let mut specs = conv_parameters("encoder.conv_in", self.in_channels, first, 3);
        let mut previous = first;
        for (level, &width) in channels.iter().enumerate() {
            let block = format!("encoder.down_blocks.{level}");
            for layer in 0..self.layers_per_block {
                specs.extend(resnet_parameters(
                    &format!("{block}.resnets.{layer}"),
                    previous,
                    width,
                ));
                previous = width;
            }
            if level + 1 < channels.len() {
                specs.extend(conv_parameters(
                    &format!("{block}.downsamplers.0.conv"),
                    width,
                    width,
                    3,
                ));
            }
        }
        specs.extend(self.mid_parameters("encoder.mid_block", last));
        specs.extend(norm_parameters("encoder.conv_norm_out", last));
        specs.extend(conv_parameters("encoder.conv_out", last, 2 * z, 3));
        if self.use_quant_conv {
            specs.extend(conv_parameters("quant_conv", 2 * z, 2 * z, 1));
        }
        if self.use_post_quant_conv {
            specs.extend(conv_parameters("post_quant_conv", z, z, 1));
        }
        specs.extend(conv_parameters("decoder.conv_in", z, last, 3));
        specs.extend(self.mid_parameters("decoder.mid_block", last));
        let mut previous = last;
        for (level, &width) in channels.iter().rev().enumerate() {
            let block = format!("decoder.up_blocks.{level}");
            for layer in 0..=self.layers_per_block {
                specs.extend(resnet_parameters(
                    &format!("{block}.resnets.{layer}"),
                    previous,
                    width,
                ));
                previous = width;
            }
            if level + 1 < channels.len() {
                specs.extend(conv_parameters(
                    &format!("{block}.upsamplers.0.conv"),
                    width,
                    width,
                    3,
                ));
            }
        }
        specs.extend(norm_parameters("decoder.conv_norm_out", first));
        specs.extend(conv_parameters(
            "decoder.conv_out",
            first,
            self.out_channels,
            3,
        ));
        specs
    }

    fn mid_parameters(&self, name: &str, width: usize) -> Vec<ParameterSpec> {
        let mut specs = resnet_parameters(&format!("{name}.resnets.0"), width, width);
        if self.mid_block_add_attention {
            specs.extend(attention_parameters(&format!("{name}.attentions.0"), width));
        }
        specs.extend(resnet_parameters(
            &format!("{name}.resnets.1"),
            width,
            width,
        ));
        specs
    }
}
