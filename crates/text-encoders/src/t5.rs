//! The encoder of T5 v1.1: a caption's ids to one state per position.
//!
//! ```text
//! x = shared[ids]                                              (b, n, d_model)
//! per block:  x += o(softmax(q kᵀ + bias) v)   of  rms_norm(x)   no scaling of q kᵀ
//!             x += wo(gelu_new(wi_0 y) · wi_1 y)  of  y = rms_norm(x)
//! states = rms_norm(x)
//! ```
//!
//! `bias` is one learned number per head and bucket of the distance between key and query; the
//! first block owns it and all blocks use it. No mask: FLUX attends to the padding.
//!
//! In fp16 the sums `x` and the products with `wo` are in f32, as upstream keeps them: T5-XXL's leave fp16's range.
//!
//! Source: `T5EncoderModel` of transformers 5.23, called by `FluxPipeline._get_t5_prompt_embeds`.

use std::path::Path;

use serde::Deserialize;
use tensor::nn::{Linear, RmsNorm, gelu_tanh};
use tensor::{DType, Device, IntTensor, ParameterSpec, Precision, Tensor, TensorData, Weights};

use burn::tensor::activation::softmax;

use crate::config::{EncoderError, check_ids, read_json, size};

/// Sizes of a T5 encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct T5Config {
    /// Rows of the token table.
    pub vocab_size: usize,
    /// Width of a state.
    pub d_model: usize,
    /// Width of one attention head.
    pub d_kv: usize,
    /// Width inside the feed-forward layers.
    pub d_ff: usize,
    /// Number of blocks.
    pub num_layers: usize,
    /// Number of attention heads; `num_heads · d_kv` need not be `d_model`.
    pub num_heads: usize,
    /// Buckets of distances, half of them for each direction.
    pub relative_attention_num_buckets: usize,
    /// Distance from which on all share the last bucket.
    pub relative_attention_max_distance: usize,
    /// Added to the mean square in the norms.
    pub layer_norm_epsilon: f64,
}

/// `config.json`; what transformers leaves out has the value of its `T5Config`.
#[derive(Deserialize)]
struct T5ConfigFile {
    vocab_size: usize,
    d_model: usize,
    d_kv: usize,
    d_ff: usize,
    num_layers: usize,
    num_heads: usize,
    relative_attention_num_buckets: Option<usize>,
    relative_attention_max_distance: Option<usize>,
    layer_norm_epsilon: Option<f64>,
    feed_forward_proj: Option<String>,
}

impl T5Config {
    /// T5 v1.1 XXL, the encoder of FLUX.1.
    pub fn xxl() -> Self {
        Self {
            vocab_size: 32_128,
            d_model: 4096,
            d_kv: 64,
            d_ff: 10_240,
            num_layers: 24,
            num_heads: 64,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
        }
    }

    /// Reads transformers' `config.json`.
    ///
    /// # Errors
    ///
    /// If it is no such file, lacks a size, or describes another T5 than v1.1 (gated GELU).
    pub fn from_file(path: &Path) -> Result<Self, EncoderError> {
        let file: T5ConfigFile = read_json(path)?;
        let refused = |key, expected: &str, found: String| EncoderError::Setting {
            path: path.to_path_buf(),
            key,
            expected: expected.to_owned(),
            found,
        };
        match file.feed_forward_proj.as_deref() {
            Some("gated-gelu") => {}
            other => {
                return Err(refused(
                    "feed_forward_proj",
                    "\"gated-gelu\" (T5 v1.1)",
                    format!("{:?}", other.unwrap_or("relu")),
                ));
            }
        }
        let config = Self {
            vocab_size: size(path, "vocab_size", file.vocab_size)?,
            d_model: size(path, "d_model", file.d_model)?,
            d_kv: size(path, "d_kv", file.d_kv)?,
            d_ff: size(path, "d_ff", file.d_ff)?,
            num_layers: size(path, "num_layers", file.num_layers)?,
            num_heads: size(path, "num_heads", file.num_heads)?,
            relative_attention_num_buckets: file.relative_attention_num_buckets.unwrap_or(32),
            relative_attention_max_distance: file.relative_attention_max_distance.unwrap_or(128),
            layer_norm_epsilon: file.layer_norm_epsilon.unwrap_or(1e-6),
        };
        let buckets = config.relative_attention_num_buckets;
        if buckets < 4 || !buckets.is_multiple_of(4) || buckets > 1 << 16 {
            return Err(refused(
                "relative_attention_num_buckets",
                "a multiple of 4",
                buckets.to_string(),
            ));
        }
        if config.relative_attention_max_distance <= buckets / 4 {
            return Err(refused(
                "relative_attention_max_distance",
                "more than a quarter of the buckets",
                config.relative_attention_max_distance.to_string(),
            ));
        }
        Ok(config)
    }

    /// Every parameter by its published name.
    pub fn parameters(&self) -> Vec<ParameterSpec> {
        let inner = self.num_heads * self.d_kv;
        let (d_model, d_ff) = (self.d_model, self.d_ff);
        let mut specs = vec![ParameterSpec::new(
            "shared.weight",
            [self.vocab_size, d_model],
        )];
        for block in 0..self.num_layers {
            let layer = |i| format!("encoder.block.{block}.layer.{i}");
            let attention = format!("{}.SelfAttention", layer(0));
            for name in ["q", "k", "v"] {
                specs.extend(Linear::parameters(
                    &format!("{attention}.{name}"),
                    d_model,
                    inner,
                    false,
                ));
            }
            specs.extend(Linear::parameters(
                &format!("{attention}.o"),
                inner,
                d_model,
                false,
            ));
            if block == 0 {
                specs.push(ParameterSpec::new(
                    format!("{attention}.relative_attention_bias.weight"),
                    [self.relative_attention_num_buckets, self.num_heads],
                ));
            }
            specs.extend(RmsNorm::parameters(
                &format!("{}.layer_norm", layer(0)),
                d_model,
            ));
            let dense = format!("{}.DenseReluDense", layer(1));
            specs.extend(Linear::parameters(
                &format!("{dense}.wi_0"),
                d_model,
                d_ff,
                false,
            ));
            specs.extend(Linear::parameters(
                &format!("{dense}.wi_1"),
                d_model,
                d_ff,
                false,
            ));
            specs.extend(Linear::parameters(
                &format!("{dense}.wo"),
                d_ff,
                d_model,
                false,
            ));
            specs.extend(RmsNorm::parameters(
                &format!("{}.layer_norm", layer(1)),
                d_model,
            ));
        }
        specs.extend(RmsNorm::parameters("encoder.final_layer_norm", d_model));
        specs
    }
}

/// The encoder of T5 v1.1.
#[derive(Debug)]
pub struct T5Encoder {
    config: T5Config,
    /// `[vocab_size, d_model]`.
    shared: Tensor<2>,
    /// `[buckets, heads]`.
    relative_attention_bias: Tensor<2>,
    blocks: Vec<Block>,
    /// What sums over blocks are in.
    wide: DType,
    final_layer_norm: RmsNorm,
}

#[derive(Debug)]
struct Block {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    attention_norm: RmsNorm,
    wi_0: Linear,
    wi_1: Linear,
    wo: Linear,
    dense_norm: RmsNorm,
}

impl T5Encoder {
    /// Opens `dir`: `config.json` and `model.safetensors`, whole or in shards.
    ///
    /// # Errors
    ///
    /// If the configuration is refused or the weights are not its.
    pub fn open(dir: &Path, device: &Device, precision: Precision) -> Result<Self, EncoderError> {
        let config = T5Config::from_file(&dir.join("config.json"))?;
        Self::load(&Weights::open(dir, "model")?, &config, device, precision)
    }

    /// Builds the encoder from its weights, after a check of all names and shapes.
    ///
    /// transformers may write the token table a second time, as `encoder.embed_tokens.weight`:
    /// that copy is accepted, alone or beside `shared.weight`.
    ///
    /// # Errors
    ///
    /// If weights are unknown, missing or misshapen, or cannot be read.
    pub fn load(
        weights: &Weights,
        config: &T5Config,
        device: &Device,
        precision: Precision,
    ) -> Result<Self, EncoderError> {
        const TABLE: &str = "shared.weight";
        const COPY: &str = "encoder.embed_tokens.weight";
        let mut expected = config.parameters();
        let mut table = TABLE;
        if weights.contains(COPY) {
            expected.push(ParameterSpec::new(
                COPY,
                [config.vocab_size, config.d_model],
            ));
            if !weights.contains(TABLE) {
                expected.retain(|spec| spec.name != TABLE);
                table = COPY;
            }
        }
        weights.check(&expected)?;

        let (d_model, d_ff) = (config.d_model, config.d_ff);
        let inner = config.num_heads * config.d_kv;
        let linear_in = |name: String, features: [usize; 2], precision: Precision| {
            Linear::load(weights, &name, features, false, device, precision)
        };
        let linear = |name: String, features| linear_in(name, features, precision);
        let wide = match precision {
            Precision::F16 => Precision::F32,
            other => other,
        };
        let norm = |name: String| {
            RmsNorm::load(
                weights,
                &name,
                d_model,
                config.layer_norm_epsilon,
                device,
                precision,
            )
        };
        let mut blocks = Vec::with_capacity(config.num_layers);
        for block in 0..config.num_layers {
            let layer = |i| format!("encoder.block.{block}.layer.{i}");
            let attention = |name| format!("{}.SelfAttention.{name}", layer(0));
            let dense = |name| format!("{}.DenseReluDense.{name}", layer(1));
            blocks.push(Block {
                q: linear(attention("q"), [d_model, inner])?,
                k: linear(attention("k"), [d_model, inner])?,
                v: linear(attention("v"), [d_model, inner])?,
                o: linear(attention("o"), [inner, d_model])?,
                attention_norm: norm(format!("{}.layer_norm", layer(0)))?,
                wi_0: linear(dense("wi_0"), [d_model, d_ff])?,
                wi_1: linear(dense("wi_1"), [d_model, d_ff])?,
                wo: linear_in(dense("wo"), [d_ff, d_model], wide)?,
                dense_norm: norm(format!("{}.layer_norm", layer(1)))?,
            });
        }
        Ok(Self {
            shared: weights.tensor(table, [config.vocab_size, d_model], device, precision)?,
            relative_attention_bias: weights.tensor(
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                [config.relative_attention_num_buckets, config.num_heads],
                device,
                precision,
            )?,
            blocks,
            wide: wide.dtype(),
            final_layer_norm: norm("encoder.final_layer_norm".to_owned())?,
            config: config.clone(),
        })
    }

    /// The sizes that it was built with.
    pub fn config(&self) -> &T5Config {
        &self.config
    }

    /// States of a batch of texts: `b` rows of `n` ids → `(b, n, d_model)`.
    ///
    /// # Panics
    ///
    /// If rows differ in length or an id is outside the vocabulary.
    pub fn encode(&self, ids: &[Vec<u32>]) -> Tensor<3> {
        let (b, n) = check_ids(ids, self.config.vocab_size);
        let device = self.shared.device();
        let flat: Vec<i32> = ids.iter().flatten().map(|&id| id as i32).collect();
        let flat = IntTensor::<1>::from_data(TensorData::new(flat, [b * n]), &device);
        let bias = self.position_bias(n);
        let mut states = self
            .shared
            .clone()
            .select(0, flat) // (b n) d_model
            .reshape([b, n, self.config.d_model]) // b n d_model
            .cast(self.wide);
        for block in &self.blocks {
            let normed = block.attention_norm.forward(states.clone());
            let attended = block.attend(normed, bias.clone(), self.config.num_heads);
            states = states + attended.cast(self.wide);
            let normed = block.dense_norm.forward(states.clone());
            let gate = gelu_tanh(block.wi_0.forward(normed.clone()));
            let inner = gate * block.wi_1.forward(normed);
            states = states + block.wo.forward(inner.cast(self.wide));
        }
        self.final_layer_norm.forward(states)
    }

    /// What is added to the attention logits, in `f32`: `(1, heads, n, n)`.
    fn position_bias(&self, n: usize) -> Tensor<4> {
        let config = &self.config;
        let mut buckets = Vec::with_capacity(n * n);
        for query in 0..n as i64 {
            for key in 0..n as i64 {
                buckets.push(relative_position_bucket(
                    key - query,
                    config.relative_attention_num_buckets,
                    config.relative_attention_max_distance,
                ) as i32);
            }
        }
        let device = self.shared.device();
        let buckets = IntTensor::<1>::from_data(TensorData::new(buckets, [n * n]), &device);
        self.relative_attention_bias
            .clone()
            .cast(DType::F32)
            .select(0, buckets) // (n n) h
            .reshape([1, n, n, config.num_heads]) // 1 n n h
            .permute([0, 3, 1, 2]) // 1 h n n
    }
}

impl Block {
    /// `(b, n, d_model)` → the same, with `bias` of shape `(1, heads, n, n)`.
    fn attend(&self, input: Tensor<3>, bias: Tensor<4>, heads: usize) -> Tensor<3> {
        let [b, n, _] = input.dims();
        let dtype = input.dtype();
        let split = |projected: Tensor<3>| {
            let [_, _, inner] = projected.dims();
            projected
                .reshape([b, n, heads, inner / heads]) // b n h d
                .swap_dims(1, 2) // b h n d
        };
        let q = split(self.q.forward(input.clone()));
        let k = split(self.k.forward(input.clone()));
        let v = split(self.v.forward(input));
        let logits = q.matmul(k.transpose()).cast(DType::F32) + bias; // b h n n
        let mixed = softmax(logits, 3).cast(dtype).matmul(v); // b h n d
        let [_, _, _, d] = mixed.dims();
        self.o
            .forward(mixed.swap_dims(1, 2).reshape([b, n, heads * d])) // b n d_model
    }
}

/// The bucket of a distance `key − query`.
///
/// Half of the buckets are for keys behind the query. In each half, the first half of it takes one
/// distance each, the rest grows logarithmically up to `max_distance`. The logarithm is taken in
/// `f32`, in the reference's order, since distances lie exactly on bucket bounds.
///
/// Source: `T5Attention._relative_position_bucket`, transformers 5.23.
fn relative_position_bucket(distance: i64, num_buckets: usize, max_distance: usize) -> usize {
    let half = num_buckets / 2;
    let offset = if distance > 0 { half } else { 0 };
    let distance = distance.unsigned_abs() as usize;
    let max_exact = half / 2;
    if distance < max_exact {
        return offset + distance;
    }
    let span = (max_distance as f64 / max_exact as f64).ln() as f32;
    let position = (distance as f32 / max_exact as f32).ln() / span * (half - max_exact) as f32;
    offset + (max_exact + position as usize).min(half - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::device::cpu;
    use tensor::to_f32;
    use tensor::weights::num_parameters;

    fn tiny() -> T5Config {
        T5Config {
            vocab_size: 3,
            d_model: 2,
            d_kv: 1,
            d_ff: 1,
            num_layers: 1,
            num_heads: 1,
            relative_attention_num_buckets: 4,
            relative_attention_max_distance: 8,
            layer_norm_epsilon: 1e-6,
        }
    }

    /// Every parameter filled by a rule of its name.
    fn weights(config: &T5Config, rule: impl Fn(&str) -> f32) -> Weights {
        Weights::from_values(config.parameters().into_iter().map(|spec| {
            let mut values = vec![rule(&spec.name); spec.num_elements() as usize];
            if spec.name == "shared.weight" {
                values = vec![1.0, 0.0, 0.0, 1.0, 3.0, 4.0];
            } else if spec.name.contains("relative_attention_bias") {
                values = vec![0.0, -100.0, -100.0, -100.0];
            }
            (spec, values)
        }))
    }

    fn close(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() < 1e-4, "{found:?} is not {expected:?}");
        }
    }

    #[test]
    fn xxl_has_the_published_number_of_parameters() {
        assert_eq!(num_parameters(&T5Config::xxl().parameters()), 4_762_310_656);
    }

    #[test]
    fn buckets_are_those_of_the_reference() {
        // From `_relative_position_bucket` of transformers 5.23 on torch 2.
        let distances = [1, 2, 7, 8, 9, 12, 16, 23, 32, 46, 64, 65, 91, 128];
        for (sizes, expected) in [
            (
                (32, 128),
                [17, 18, 23, 24, 24, 25, 26, 27, 28, 29, 30, 30, 31, 31],
            ),
            (
                (16, 64),
                [9, 10, 12, 13, 13, 13, 14, 14, 15, 15, 15, 15, 15, 15],
            ),
            ((8, 20), [5, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7]),
        ] {
            for (&distance, &bucket) in distances.iter().zip(&expected) {
                let (num_buckets, max_distance) = sizes;
                let found = |d| relative_position_bucket(d, num_buckets, max_distance);
                assert_eq!(found(distance), bucket, "{distance} of {sizes:?}");
                assert_eq!(
                    found(-distance),
                    bucket - num_buckets / 2,
                    "-{distance} of {sizes:?}"
                );
            }
        }
        assert_eq!(relative_position_bucket(0, 32, 128), 0);
    }

    #[test]
    fn without_layers_that_add_the_states_are_normed_rows_of_the_table() {
        let config = tiny();
        let rule = |name: &str| {
            if name.ends_with("norm.weight") {
                1.0
            } else {
                0.0
            }
        };
        let encoder = T5Encoder::load(&weights(&config, rule), &config, &cpu(), Precision::F32)
            .expect("all weights are there");
        let states = encoder.encode(&[vec![2, 0]]);
        assert_eq!(states.dims(), [1, 2, 2]);
        // rms of (3, 4) is 5/√2; of (1, 0) it is 1/√2.
        close(&to_f32(&states), &[0.848_528, 1.131_371, 2f32.sqrt(), 0.0]);
    }

    #[test]
    fn a_strong_bias_on_distance_zero_lets_a_position_see_itself_only() {
        let config = tiny();
        let rule = |name: &str| {
            if name.contains("DenseReluDense") {
                0.0
            } else {
                1.0
            }
        };
        let encoder = T5Encoder::load(&weights(&config, rule), &config, &cpu(), Precision::F32)
            .expect("all weights are there");
        let alone = to_f32(&encoder.encode(&[vec![2]]));
        let both = to_f32(&encoder.encode(&[vec![2, 1]]));
        close(&both[..2], &alone);
    }

    #[test]
    fn rows_of_a_batch_do_not_touch_each_other() {
        let config = tiny();
        let rule = |name: &str| if name.contains(".q.") { 0.3 } else { 0.7 };
        let encoder = T5Encoder::load(&weights(&config, rule), &config, &cpu(), Precision::F32)
            .expect("all weights are there");
        let alone = to_f32(&encoder.encode(&[vec![0, 2, 1]]));
        let batch = to_f32(&encoder.encode(&[vec![1, 1, 1], vec![0, 2, 1]]));
        close(&batch[6..], &alone);
    }

    #[test]
    fn sums_beyond_the_range_of_fp16_are_no_matter() {
        let config = tiny();
        // The inner value is 4e4, and `wo` makes 4e6 of it.
        let rule = |name: &str| {
            if name.contains("DenseReluDense") {
                100.0
            } else {
                1.0
            }
        };
        let encode = |precision| {
            let encoder = T5Encoder::load(&weights(&config, rule), &config, &cpu(), precision)
                .expect("all weights are there");
            let states = encoder.encode(&[vec![2, 0]]);
            assert_eq!(states.dtype(), precision.dtype());
            to_f32(&states)
        };
        let exact = encode(Precision::F32);
        for (found, exact) in encode(Precision::F16).iter().zip(&exact) {
            assert!((found - exact).abs() < 1e-2, "{found} {exact}");
        }
    }

    #[test]
    fn the_second_copy_of_the_table_serves_when_it_is_alone() {
        let config = tiny();
        let only_copy = Weights::from_values(config.parameters().into_iter().map(|mut spec| {
            if spec.name == "shared.weight" {
                spec.name = "encoder.embed_tokens.weight".to_owned();
            }
            let values = vec![1.0; spec.num_elements() as usize];
            (spec, values)
        }));
        T5Encoder::load(&only_copy, &config, &cpu(), Precision::F32).expect("the copy will do");
    }

    #[test]
    fn an_ungated_t5_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("config.json");
        let sizes = r#""vocab_size":8,"d_model":2,"d_kv":1,"d_ff":1,"num_layers":1,"num_heads":1"#;
        fs_err::write(&path, format!("{{{sizes},\"feed_forward_proj\":\"relu\"}}"))
            .expect("the test directory can be written");
        let error = T5Config::from_file(&path).expect_err("T5 v1.0").to_string();
        assert!(
            error.contains("feed_forward_proj") && error.contains("relu"),
            "{error}"
        );
    }
}
