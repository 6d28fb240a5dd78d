//! The text model of CLIP: a caption's ids to one state per position and one pooled vector.
//!
//! ```text
//! x = token_embedding[ids] + position_embedding            (b, n, hidden_size)
//! per layer:  x += out_proj(softmax(q kᵀ / √d + causal) v)  of  layer_norm1(x)
//!             x += fc2(act(fc1(layer_norm2(x))))
//! states = final_layer_norm(x);  pooled = states at the end token
//! ```
//!
//! Source: `CLIPTextModel` of transformers 5.23, called by `FluxPipeline._get_clip_prompt_embeds`.

use std::path::Path;

use serde::Deserialize;
use tensor::nn::{LayerNorm, Linear, gelu, quick_gelu};
use tensor::{DType, Device, IntTensor, ParameterSpec, Precision, Tensor, TensorData, Weights};

use burn::tensor::activation::softmax;

use crate::config::{EncoderError, check_ids, read_json, size};

/// The activation inside the feed-forward layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HiddenActivation {
    /// `x·sigmoid(1.702x)`: the published CLIP models.
    QuickGelu,
    /// The exact GELU: later trainings such as OpenCLIP's.
    Gelu,
}

/// Sizes of a CLIP text model.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipConfig {
    /// Rows of the token table.
    pub vocab_size: usize,
    /// Width of a state and of the pooled vector.
    pub hidden_size: usize,
    /// Width inside the feed-forward layers.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of attention heads; divides `hidden_size`.
    pub num_attention_heads: usize,
    /// Longest text.
    pub max_position_embeddings: usize,
    /// The activation.
    pub hidden_act: HiddenActivation,
    /// Added to the variance in the norms.
    pub layer_norm_eps: f64,
    /// Which token the pooled vector is taken at; 2 means the greatest id (see [`pooled_position`]).
    pub eos_token_id: u32,
}

/// `config.json`; what transformers leaves out has the value of its `CLIPTextConfig`.
#[derive(Deserialize)]
struct ClipConfigFile {
    vocab_size: Option<usize>,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    max_position_embeddings: Option<usize>,
    hidden_act: Option<String>,
    layer_norm_eps: Option<f64>,
    eos_token_id: Option<u32>,
}

impl ClipConfig {
    /// The text model of CLIP ViT-L/14, as published with FLUX.1.
    pub fn clip_l() -> Self {
        Self {
            vocab_size: 49_408,
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            max_position_embeddings: 77,
            hidden_act: HiddenActivation::QuickGelu,
            layer_norm_eps: 1e-5,
            eos_token_id: 2,
        }
    }

    /// Reads transformers' `config.json`.
    ///
    /// # Errors
    ///
    /// If it is no such file, lacks a size, or asks for an activation that is not built.
    pub fn from_file(path: &Path) -> Result<Self, EncoderError> {
        let file: ClipConfigFile = read_json(path)?;
        let refused = |key, expected: &str, found: String| EncoderError::Setting {
            path: path.to_path_buf(),
            key,
            expected: expected.to_owned(),
            found,
        };
        let hidden_act = match file.hidden_act.as_deref() {
            None | Some("quick_gelu") => HiddenActivation::QuickGelu,
            Some("gelu") => HiddenActivation::Gelu,
            Some(other) => {
                return Err(refused(
                    "hidden_act",
                    "\"quick_gelu\" or \"gelu\"",
                    format!("{other:?}"),
                ));
            }
        };
        let config = Self {
            vocab_size: size(path, "vocab_size", file.vocab_size.unwrap_or(49_408))?,
            hidden_size: size(path, "hidden_size", file.hidden_size)?,
            intermediate_size: size(path, "intermediate_size", file.intermediate_size)?,
            num_hidden_layers: size(path, "num_hidden_layers", file.num_hidden_layers)?,
            num_attention_heads: size(path, "num_attention_heads", file.num_attention_heads)?,
            max_position_embeddings: size(
                path,
                "max_position_embeddings",
                file.max_position_embeddings.unwrap_or(77),
            )?,
            hidden_act,
            layer_norm_eps: file.layer_norm_eps.unwrap_or(1e-5),
            eos_token_id: file.eos_token_id.unwrap_or(49_407),
        };
        if !config
            .hidden_size
            .is_multiple_of(config.num_attention_heads)
        {
            return Err(refused(
                "num_attention_heads",
                &format!("a divisor of hidden_size = {}", config.hidden_size),
                config.num_attention_heads.to_string(),
            ));
        }
        Ok(config)
    }

    /// Every parameter by its published name.
    pub fn parameters(&self) -> Vec<ParameterSpec> {
        self.parameters_under(PREFIX)
    }

    fn parameters_under(&self, prefix: &str) -> Vec<ParameterSpec> {
        let (width, inner) = (self.hidden_size, self.intermediate_size);
        let mut specs = vec![
            ParameterSpec::new(
                format!("{prefix}embeddings.token_embedding.weight"),
                [self.vocab_size, width],
            ),
            ParameterSpec::new(
                format!("{prefix}embeddings.position_embedding.weight"),
                [self.max_position_embeddings, width],
            ),
        ];
        for layer in 0..self.num_hidden_layers {
            let name = |part: &str| format!("{prefix}encoder.layers.{layer}.{part}");
            specs.extend(LayerNorm::parameters(&name("layer_norm1"), width));
            for part in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                let part = format!("self_attn.{part}");
                specs.extend(Linear::parameters(&name(&part), width, width, true));
            }
            specs.extend(LayerNorm::parameters(&name("layer_norm2"), width));
            specs.extend(Linear::parameters(&name("mlp.fc1"), width, inner, true));
            specs.extend(Linear::parameters(&name("mlp.fc2"), inner, width, true));
        }
        specs.extend(LayerNorm::parameters(
            &format!("{prefix}final_layer_norm"),
            width,
        ));
        specs
    }
}

/// In front of every published key; transformers 5 may leave it out.
const PREFIX: &str = "text_model.";

/// What the model gives for a batch of `b` texts of `n` ids.
#[derive(Clone, Debug)]
pub struct ClipOutput {
    /// `(b, n, hidden_size)`, after the final norm.
    pub last_hidden_state: Tensor<3>,
    /// `(b, hidden_size)`: the state at the end of each text.
    pub pooled: Tensor<2>,
}

/// The text model of CLIP.
#[derive(Debug)]
pub struct ClipTextModel {
    config: ClipConfig,
    /// `[vocab_size, hidden_size]`.
    token_embedding: Tensor<2>,
    /// `[max_position_embeddings, hidden_size]`.
    position_embedding: Tensor<2>,
    layers: Vec<Layer>,
    final_layer_norm: LayerNorm,
}

#[derive(Debug)]
struct Layer {
    layer_norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

impl ClipTextModel {
    /// Opens `dir`: `config.json` and `model.safetensors`, whole or in shards.
    ///
    /// # Errors
    ///
    /// If the configuration is refused or the weights are not its.
    pub fn open(dir: &Path, device: &Device, precision: Precision) -> Result<Self, EncoderError> {
        let config = ClipConfig::from_file(&dir.join("config.json"))?;
        Self::load(&Weights::open(dir, "model")?, &config, device, precision)
    }

    /// Builds the model from its weights, after a check of all names and shapes.
    ///
    /// Accepted besides the published keys: keys without `text_model.` in front, and the list
    /// `embeddings.position_ids` that older files carry.
    ///
    /// # Errors
    ///
    /// If weights are unknown, missing or misshapen, or cannot be read.
    pub fn load(
        weights: &Weights,
        config: &ClipConfig,
        device: &Device,
        precision: Precision,
    ) -> Result<Self, EncoderError> {
        let published = weights.names().any(|name| name.starts_with(PREFIX))
            || !weights.contains("final_layer_norm.weight");
        let prefix = if published { PREFIX } else { "" };
        let mut expected = config.parameters_under(prefix);
        let position_ids = format!("{prefix}embeddings.position_ids");
        if weights.contains(&position_ids) {
            expected.push(ParameterSpec::new(
                position_ids,
                [1, config.max_position_embeddings],
            ));
        }
        weights.check(&expected)?;

        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let linear = |name: String, features: [usize; 2]| {
            Linear::load(weights, &name, features, true, device, precision)
        };
        let norm = |name: String| {
            LayerNorm::load(
                weights,
                &name,
                width,
                config.layer_norm_eps,
                device,
                precision,
            )
        };
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for layer in 0..config.num_hidden_layers {
            let name = |part| format!("{prefix}encoder.layers.{layer}.{part}");
            layers.push(Layer {
                layer_norm1: norm(name("layer_norm1"))?,
                q_proj: linear(name("self_attn.q_proj"), [width, width])?,
                k_proj: linear(name("self_attn.k_proj"), [width, width])?,
                v_proj: linear(name("self_attn.v_proj"), [width, width])?,
                out_proj: linear(name("self_attn.out_proj"), [width, width])?,
                layer_norm2: norm(name("layer_norm2"))?,
                fc1: linear(name("mlp.fc1"), [width, inner])?,
                fc2: linear(name("mlp.fc2"), [inner, width])?,
            });
        }
        Ok(Self {
            token_embedding: weights.tensor(
                &format!("{prefix}embeddings.token_embedding.weight"),
                [config.vocab_size, width],
                device,
                precision,
            )?,
            position_embedding: weights.tensor(
                &format!("{prefix}embeddings.position_embedding.weight"),
                [config.max_position_embeddings, width],
                device,
                precision,
            )?,
            layers,
            final_layer_norm: norm(format!("{prefix}final_layer_norm"))?,
            config: config.clone(),
        })
    }

    /// The sizes that it was built with.
    pub fn config(&self) -> &ClipConfig {
        &self.config
    }

    /// States and pooled vectors of a batch of texts: `b` rows of `n` ids.
    ///
    /// # Panics
    ///
    /// If rows differ in length, are longer than the model has positions, or an id is outside the
    /// vocabulary.
    pub fn encode(&self, ids: &[Vec<u32>]) -> ClipOutput {
        let config = &self.config;
        let (b, n) = check_ids(ids, config.vocab_size);
        assert!(
            n <= config.max_position_embeddings,
            "{n} ids are more than the {} positions",
            config.max_position_embeddings
        );
        let device = self.token_embedding.device();
        let width = config.hidden_size;
        let flat: Vec<i32> = ids.iter().flatten().map(|&id| id as i32).collect();
        let flat = IntTensor::<1>::from_data(TensorData::new(flat, [b * n]), &device);
        let positions = self.position_embedding.clone().slice([0..n, 0..width]);
        let mut states = self
            .token_embedding
            .clone()
            .select(0, flat) // (b n) width
            .reshape([b, n, width]) // b n width
            + positions.unsqueeze();
        let mask = causal_mask(n, &device);
        for layer in &self.layers {
            let normed = layer.layer_norm1.forward(states.clone());
            states = states + layer.attend(normed, mask.clone(), config.num_attention_heads);
            let inner = layer.fc1.forward(layer.layer_norm2.forward(states.clone()));
            let inner = match config.hidden_act {
                HiddenActivation::QuickGelu => quick_gelu(inner),
                HiddenActivation::Gelu => gelu(inner),
            };
            states = states + layer.fc2.forward(inner);
        }
        let last_hidden_state = self.final_layer_norm.forward(states);
        let ends: Vec<i32> = ids
            .iter()
            .enumerate()
            .map(|(row, ids)| (row * n + pooled_position(ids, config.eos_token_id)) as i32)
            .collect();
        let ends = IntTensor::<1>::from_data(TensorData::new(ends, [b]), &device);
        let pooled = last_hidden_state
            .clone()
            .reshape([b * n, width]) // (b n) width
            .select(0, ends); // b width
        ClipOutput {
            last_hidden_state,
            pooled,
        }
    }
}

impl Layer {
    /// `(b, n, width)` → the same, with `mask` of shape `(1, 1, n, n)`.
    fn attend(&self, input: Tensor<3>, mask: Tensor<4>, heads: usize) -> Tensor<3> {
        let [b, n, width] = input.dims();
        let dtype = input.dtype();
        let d = width / heads;
        let split = |projected: Tensor<3>| {
            projected
                .reshape([b, n, heads, d]) // b n h d
                .swap_dims(1, 2) // b h n d
        };
        let q = split(self.q_proj.forward(input.clone())) * (d as f64).powf(-0.5);
        let k = split(self.k_proj.forward(input.clone()));
        let v = split(self.v_proj.forward(input));
        let logits = q.matmul(k.transpose()).cast(DType::F32) + mask; // b h n n
        let mixed = softmax(logits, 3).cast(dtype).matmul(v); // b h n d
        self.out_proj
            .forward(mixed.swap_dims(1, 2).reshape([b, n, width])) // b n width
    }
}

/// 0 where a query may look, −∞ at the positions after it: `(1, 1, n, n)` in `f32`.
fn causal_mask(n: usize, device: &Device) -> Tensor<4> {
    let mut mask = vec![0.0; n * n];
    for (query, row) in mask.chunks_exact_mut(n).enumerate() {
        row[query + 1..].fill(f32::NEG_INFINITY);
    }
    tensor::from_f32(mask, [1, 1, n, n], device)
}

/// Where the pooled vector is taken: the first end token, or position 0 without any.
///
/// Configurations written before transformers' #24773 say `eos_token_id = 2`, which is no end token
/// of CLIP's vocabulary (FLUX.1's own is one of them): there the end is the first place of the
/// greatest id.
///
/// Source: `CLIPTextTransformer.forward`, transformers 5.23.
pub fn pooled_position(ids: &[u32], eos_token_id: u32) -> usize {
    let end = if eos_token_id == 2 {
        ids.iter().max().copied()
    } else {
        Some(eos_token_id)
    };
    ids.iter().position(|&id| Some(id) == end).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::device::cpu;
    use tensor::to_f32;
    use tensor::weights::num_parameters;

    fn tiny(eos_token_id: u32) -> ClipConfig {
        ClipConfig {
            vocab_size: 5,
            hidden_size: 4,
            intermediate_size: 3,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            max_position_embeddings: 6,
            hidden_act: HiddenActivation::QuickGelu,
            layer_norm_eps: 1e-5,
            eos_token_id,
        }
    }

    /// Different, reproducible values for every parameter.
    fn weights(specs: Vec<ParameterSpec>) -> Weights {
        let mut state = 1u32;
        Weights::from_values(specs.into_iter().map(|spec| {
            let values = (0..spec.num_elements())
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) as f32 / (1 << 23) as f32 - 1.0
                })
                .collect();
            (spec, values)
        }))
    }

    fn model(eos_token_id: u32) -> ClipTextModel {
        let config = tiny(eos_token_id);
        ClipTextModel::load(
            &weights(config.parameters()),
            &config,
            &cpu(),
            Precision::F32,
        )
        .expect("all weights are there")
    }

    #[test]
    fn clip_l_has_the_published_number_of_parameters() {
        assert_eq!(
            num_parameters(&ClipConfig::clip_l().parameters()),
            123_060_480
        );
    }

    #[test]
    fn the_end_is_the_first_end_token_or_the_first_greatest_id() {
        assert_eq!(pooled_position(&[9, 3, 7, 7], 7), 2);
        assert_eq!(pooled_position(&[9, 3, 7, 7], 2), 0);
        assert_eq!(pooled_position(&[1, 3, 9, 9], 2), 2);
        assert_eq!(pooled_position(&[1, 3, 4], 7), 0);
    }

    #[test]
    fn the_pooled_vector_is_the_state_at_the_end_of_each_text() {
        let output = model(4).encode(&[vec![0, 1, 4, 4], vec![0, 4, 2, 3]]);
        let states = to_f32(&output.last_hidden_state);
        let pooled = to_f32(&output.pooled);
        assert_eq!(pooled[..4], states[8..12]);
        assert_eq!(pooled[4..], states[20..24]);
    }

    #[test]
    fn a_position_does_not_see_what_follows() {
        let model = model(2);
        let one = to_f32(&model.encode(&[vec![0, 1, 2, 3]]).last_hidden_state);
        let other = to_f32(&model.encode(&[vec![0, 1, 4, 0]]).last_hidden_state);
        for (a, b) in one[..8].iter().zip(&other[..8]) {
            assert!((a - b).abs() < 1e-6, "{one:?} against {other:?}");
        }
        assert!((one[8] - other[8]).abs() > 1e-3);
    }

    #[test]
    fn keys_without_their_prefix_load_as_well() {
        let config = tiny(2);
        let bare = weights(config.parameters_under(""));
        ClipTextModel::load(&bare, &config, &cpu(), Precision::F32)
            .expect("only the prefix is off");
    }

    #[test]
    fn heads_that_do_not_divide_the_width_are_refused_by_name() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("config.json");
        fs_err::write(
            &path,
            r#"{"hidden_size":4,"intermediate_size":3,"num_hidden_layers":1,"num_attention_heads":3}"#,
        )
        .expect("the test directory can be written");
        let error = ClipConfig::from_file(&path)
            .expect_err("3 does not divide 4")
            .to_string();
        assert!(
            error.contains("num_attention_heads") && error.contains('4'),
            "{error}"
        );
    }
}
