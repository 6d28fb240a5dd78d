//! The sizes of a FLUX transformer, read from `config.json` or known by name, and what parameters follow from them.
//!
//! [`MmditConfig::parameters`] is the meta level: names and shapes of all tensors of a 12-billion-parameter model
//! in microseconds, so that a checkpoint can be checked, or memory predicted, before anything is allocated.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tensor::ParameterSpec;
use tensor::nn::Linear;

/// Channels of the sinusoids of time and guidance (`Timesteps(num_channels=256)` upstream).
pub const NUM_SINUSOID_CHANNELS: usize = 256;

/// Width of the MLPs in units of the model's width (`mlp_ratio` upstream).
pub const MLP_RATIO: usize = 4;

/// Added to variances and mean squares in every norm of the model (`eps=1e-6` upstream).
pub const NORM_EPSILON: f64 = 1e-6;

/// Base of the rotary frequencies (`FluxPosEmbed(theta=10000)` upstream).
pub const ROPE_THETA: f64 = 10_000.0;

/// Sizes of a FLUX transformer. Field names are `config.json`'s.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MmditConfig {
    /// Number of double blocks.
    pub num_layers: usize,
    /// Number of single blocks.
    pub num_single_layers: usize,
    /// Attention heads; the width is heads × head width.
    pub num_attention_heads: usize,
    /// Width of one head.
    pub attention_head_dim: usize,
    /// Rotary channels of a head per position axis; they add up to the head's width.
    pub axes_dims_rope: [usize; 3],
    /// Width of a text token (T5's `d_model`).
    pub joint_attention_dim: usize,
    /// Width of the pooled caption (CLIP's `hidden_size`).
    pub pooled_projection_dim: usize,
    /// Whether the guidance scale is an input (FLUX.1-dev: yes, FLUX.1-schnell: no).
    pub guidance_embeds: bool,
    /// Channels of an image token.
    pub in_channels: usize,
    /// Channels of the velocity, before `patch_size²`.
    pub out_channels: usize,
    /// 1 in every published model: latents are cut into 2×2 patches before they come here.
    pub patch_size: usize,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is absent or cannot be read.
    #[error("cannot read the transformer's configuration")]
    Read(#[from] std::io::Error),
    /// The file is no JSON object.
    #[error("{path} is not a JSON object of settings")]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        source: Option<serde_json::Error>,
    },
    /// A setting is absent.
    #[error("{path} has no `{key}`; a FLUX transformer needs it")]
    Missing {
        /// The file.
        path: PathBuf,
        /// The setting.
        key: &'static str,
    },
    /// A setting is there, and is not one that we can follow.
    #[error("{path}: `{key}` is {found}, expected {expected}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The setting.
        key: String,
        /// Its value.
        found: String,
        /// What it could be.
        expected: String,
    },
}

/// One linear layer: where it is and how wide.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearSpec {
    /// The module's path, e.g. `transformer_blocks.0.attn.to_q`; its weight is `<path>.weight`.
    pub path: String,
    /// Width of its input.
    pub in_features: usize,
    /// Width of its output.
    pub out_features: usize,
}

impl MmditConfig {
    /// FLUX.1-dev: 11,901,408,320 parameters.
    pub fn flux_dev() -> Self {
        Self {
            num_layers: 19,
            num_single_layers: 38,
            num_attention_heads: 24,
            attention_head_dim: 128,
            axes_dims_rope: [16, 56, 56],
            joint_attention_dim: 4096,
            pooled_projection_dim: 768,
            guidance_embeds: true,
            in_channels: 64,
            out_channels: 64,
            patch_size: 1,
        }
    }

    /// FLUX.1-schnell: FLUX.1-dev without the guidance embedding.
    pub fn flux_schnell() -> Self {
        Self {
            guidance_embeds: false,
            ..Self::flux_dev()
        }
    }

    /// The base that ships, as `configs/pretrain-small.toml` trains it: 4 heads of 64, no guidance.
    pub fn small() -> Self {
        Self {
            num_layers: 2,
            num_single_layers: 3,
            num_attention_heads: 4,
            attention_head_dim: 64,
            axes_dims_rope: [16, 24, 24],
            joint_attention_dim: 64,
            pooled_projection_dim: 32,
            guidance_embeds: false,
            in_channels: 64,
            out_channels: 64,
            patch_size: 1,
        }
    }

    /// A model for tests: every part is there, nothing is wide.
    pub fn tiny() -> Self {
        Self {
            num_layers: 1,
            num_single_layers: 2,
            num_attention_heads: 2,
            attention_head_dim: 8,
            axes_dims_rope: [2, 2, 4],
            joint_attention_dim: 6,
            pooled_projection_dim: 5,
            guidance_embeds: true,
            in_channels: 8,
            out_channels: 8,
            patch_size: 1,
        }
    }

    /// Reads `config.json` of a transformer in diffusers' layout.
    ///
    /// `out_channels` and `axes_dims_rope` may be absent, as in the published repositories: then they are
    /// `in_channels` and `[16, 56, 56]`.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, is of another class, lacks a size, or says anything that this model does not do.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text = fs_err::read_to_string(path)?;
        let value: Value = serde_json::from_str(&text).map_err(|source| ConfigError::Json {
            path: path.to_owned(),
            source: Some(source),
        })?;
        Self::from_json(path, &value)
    }

    fn from_json(path: &Path, value: &Value) -> Result<Self, ConfigError> {
        let Value::Object(settings) = value else {
            return Err(ConfigError::Json {
                path: path.to_owned(),
                source: None,
            });
        };
        let mut reader = Reader {
            path,
            left: settings.iter().map(|(k, v)| (k.as_str(), v)).collect(),
        };
        if let Some(class) = reader.left.remove("_class_name")
            && class != "FluxTransformer2DModel"
        {
            return Err(reader.unsupported("_class_name", class, "\"FluxTransformer2DModel\""));
        }
        let in_channels = reader.size("in_channels")?;
        let config = Self {
            num_layers: reader.count("num_layers")?,
            num_single_layers: reader.count("num_single_layers")?,
            num_attention_heads: reader.size("num_attention_heads")?,
            attention_head_dim: reader.size("attention_head_dim")?,
            axes_dims_rope: reader.axes()?,
            joint_attention_dim: reader.size("joint_attention_dim")?,
            pooled_projection_dim: reader.size("pooled_projection_dim")?,
            guidance_embeds: reader.flag("guidance_embeds")?,
            in_channels,
            out_channels: reader.optional_size("out_channels")?.unwrap_or(in_channels),
            patch_size: reader.optional_size("patch_size")?.unwrap_or(1),
        };
        let sum: usize = config.axes_dims_rope.iter().sum();
        if sum != config.attention_head_dim || config.axes_dims_rope.iter().any(|d| d % 2 != 0) {
            return Err(ConfigError::Unsupported {
                path: path.to_owned(),
                key: "axes_dims_rope".to_owned(),
                found: format!("{:?}", config.axes_dims_rope),
                expected: format!(
                    "even numbers that add up to attention_head_dim = {}",
                    config.attention_head_dim
                ),
            });
        }
        // Keys that start with `_` are diffusers' remarks about the file; anything else changes the network.
        if let Some((key, value)) = reader.left.iter().find(|(key, _)| !key.starts_with('_')) {
            return Err(reader.unsupported(key, value, "no such setting"));
        }
        Ok(config)
    }

    /// Width of the model: heads × head width (`inner_dim` upstream).
    pub fn width(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Channels of one token of the predicted velocity.
    pub fn velocity_channels(&self) -> usize {
        self.patch_size * self.patch_size * self.out_channels
    }

    /// Every linear layer, in the order of the forward pass. All of them have a bias.
    pub fn linears(&self) -> Vec<LinearSpec> {
        let d = self.width();
        let mlp = MLP_RATIO * d;
        let mut linears = Vec::new();
        let mut add = |path: String, in_features: usize, out_features: usize| {
            linears.push(LinearSpec {
                path,
                in_features,
                out_features,
            });
        };
        add("x_embedder".into(), self.in_channels, d);
        add("context_embedder".into(), self.joint_attention_dim, d);
        let mut embedders = vec![("timestep_embedder", NUM_SINUSOID_CHANNELS)];
        if self.guidance_embeds {
            embedders.push(("guidance_embedder", NUM_SINUSOID_CHANNELS));
        }
        embedders.push(("text_embedder", self.pooled_projection_dim));
        for (name, in_features) in embedders {
            add(format!("time_text_embed.{name}.linear_1"), in_features, d);
            add(format!("time_text_embed.{name}.linear_2"), d, d);
        }
        for i in 0..self.num_layers {
            let block = format!("transformer_blocks.{i}");
            add(format!("{block}.norm1.linear"), d, 6 * d);
            add(format!("{block}.norm1_context.linear"), d, 6 * d);
            for name in ["to_q", "to_k", "to_v", "to_out.0"] {
                add(format!("{block}.attn.{name}"), d, d);
            }
            for name in ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"] {
                add(format!("{block}.attn.{name}"), d, d);
            }
            for name in ["ff", "ff_context"] {
                add(format!("{block}.{name}.net.0.proj"), d, mlp);
                add(format!("{block}.{name}.net.2"), mlp, d);
            }
        }
        for i in 0..self.num_single_layers {
            let block = format!("single_transformer_blocks.{i}");
            add(format!("{block}.norm.linear"), d, 3 * d);
            for name in ["to_q", "to_k", "to_v"] {
                add(format!("{block}.attn.{name}"), d, d);
            }
            add(format!("{block}.proj_mlp"), d, mlp);
            add(format!("{block}.proj_out"), d + mlp, d);
        }
        add("norm_out.linear".into(), d, 2 * d);
        add("proj_out".into(), d, self.velocity_channels());
        linears
    }

    /// Names and shapes of all parameters, without allocating any of them.
    pub fn parameters(&self) -> Vec<ParameterSpec> {
        let mut specs: Vec<ParameterSpec> = self
            .linears()
            .iter()
            .flat_map(|l| Linear::parameters(&l.path, l.in_features, l.out_features, true))
            .collect();
        let norm = |name: String| ParameterSpec::new(name, [self.attention_head_dim]);
        for i in 0..self.num_layers {
            for name in ["norm_q", "norm_k", "norm_added_q", "norm_added_k"] {
                specs.push(norm(format!("transformer_blocks.{i}.attn.{name}.weight")));
            }
        }
        for i in 0..self.num_single_layers {
            for name in ["norm_q", "norm_k"] {
                specs.push(norm(format!(
                    "single_transformer_blocks.{i}.attn.{name}.weight"
                )));
            }
        }
        specs
    }
}

/// Takes settings out one by one, so that what is left over is known.
struct Reader<'a> {
    path: &'a Path,
    left: BTreeMap<&'a str, &'a Value>,
}

impl Reader<'_> {
    fn unsupported(&self, key: &str, found: &Value, expected: &str) -> ConfigError {
        ConfigError::Unsupported {
            path: self.path.to_owned(),
            key: key.to_owned(),
            found: found.to_string(),
            expected: expected.to_owned(),
        }
    }

    fn number(&mut self, key: &'static str, least: u64) -> Result<Option<usize>, ConfigError> {
        // Larger numbers are damage, not models; they must not overflow a product of three sizes.
        const MOST: u64 = 1 << 20;
        match self.left.remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_u64() {
                Some(n) if (least..=MOST).contains(&n) => Ok(Some(n as usize)),
                _ => Err(self.unsupported(key, value, &format!("a number from {least} to {MOST}"))),
            },
        }
    }

    fn missing(&self, key: &'static str) -> ConfigError {
        ConfigError::Missing {
            path: self.path.to_owned(),
            key,
        }
    }

    fn optional_size(&mut self, key: &'static str) -> Result<Option<usize>, ConfigError> {
        self.number(key, 1)
    }

    fn size(&mut self, key: &'static str) -> Result<usize, ConfigError> {
        self.number(key, 1)?.ok_or_else(|| self.missing(key))
    }

    fn count(&mut self, key: &'static str) -> Result<usize, ConfigError> {
        self.number(key, 0)?.ok_or_else(|| self.missing(key))
    }

    fn flag(&mut self, key: &'static str) -> Result<bool, ConfigError> {
        match self.left.remove(key) {
            None | Some(Value::Null) => Err(self.missing(key)),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => Err(self.unsupported(key, value, "true or false")),
        }
    }

    fn axes(&mut self) -> Result<[usize; 3], ConfigError> {
        let key = "axes_dims_rope";
        let Some(value) = self.left.remove(key) else {
            return Ok([16, 56, 56]);
        };
        value
            .as_array()
            .and_then(|axes| {
                let sizes: Option<Vec<usize>> = axes
                    .iter()
                    .map(|v| v.as_u64().filter(|&n| n <= 1 << 20).map(|n| n as usize))
                    .collect();
                sizes?.try_into().ok()
            })
            .ok_or_else(|| self.unsupported(key, value, "three numbers"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tensor::weights::num_parameters;

    fn published() -> Value {
        json!({
            "_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.30.0.dev0",
            "attention_head_dim": 128, "guidance_embeds": true, "in_channels": 64,
            "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 19,
            "num_single_layers": 38, "patch_size": 1, "pooled_projection_dim": 768
        })
    }

    fn read(value: &Value) -> Result<MmditConfig, ConfigError> {
        MmditConfig::from_json(Path::new("config.json"), value)
    }

    #[test]
    fn flux_dev_has_11_901_408_320_parameters() {
        assert_eq!(
            num_parameters(&MmditConfig::flux_dev().parameters()),
            11_901_408_320
        );
    }

    #[test]
    fn flux_schnell_lacks_the_guidance_embedder() {
        assert_eq!(
            num_parameters(&MmditConfig::flux_schnell().parameters()),
            11_891_178_560
        );
    }

    #[test]
    fn linear_layers_hold_11_898_322_944_of_the_weights_and_biases_of_flux_dev() {
        // What `bitsandbytes` replaces are the weights; the published figure counts them alone.
        let weights: u64 = MmditConfig::flux_dev()
            .linears()
            .iter()
            .map(|l| (l.in_features * l.out_features) as u64)
            .sum();
        assert_eq!(weights, 11_898_322_944);
    }

    #[test]
    fn the_published_configuration_is_flux_dev() {
        assert_eq!(read(&published()).expect("valid"), MmditConfig::flux_dev());
    }

    #[test]
    fn parameter_names_are_distinct() {
        let mut names: Vec<String> = MmditConfig::flux_dev()
            .parameters()
            .into_iter()
            .map(|p| p.name)
            .collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn an_unknown_setting_is_refused_by_name() {
        let mut value = published();
        value["quantization_config"] = json!({"load_in_4bit": true});
        let error = read(&value).expect_err("unknown").to_string();
        assert!(error.contains("`quantization_config`"), "{error}");
    }

    #[test]
    fn a_missing_size_is_named() {
        let mut value = published();
        value.as_object_mut().expect("object").remove("num_layers");
        let error = read(&value).expect_err("missing").to_string();
        assert!(error.contains("`num_layers`"), "{error}");
    }

    #[test]
    fn rotary_axes_must_fill_the_head() {
        let mut value = published();
        value["axes_dims_rope"] = json!([16, 56, 54]);
        let error = read(&value).expect_err("too short").to_string();
        assert!(
            error.contains("add up to attention_head_dim = 128"),
            "{error}"
        );
    }

    #[test]
    fn sizes_that_are_no_sizes_are_refused() {
        for bad in [
            json!(0),
            json!(-1),
            json!(1.5),
            json!("8"),
            json!(1u64 << 40),
        ] {
            let mut value = published();
            value["num_attention_heads"] = bad;
            assert!(read(&value).is_err());
        }
    }
}
