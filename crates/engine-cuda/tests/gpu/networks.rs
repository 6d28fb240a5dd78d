//! What networks are tested with, and what `mmdit` makes of it in `f32` on the CPU: weights, batches, LoRAs, gradients.
//!
//! Tests on a card and the library's unit tests, which take this file in by its path, share all of it.

use std::collections::BTreeMap;

use engine_cuda::Half;
use engine_cuda::model::engine::tokens_of;
use engine_cuda::model::{Engine, LoraFactors, MicroBatch, Recompute, Shape, TrainingOptions};
use engine_cuda::plan::{LoraSize, untrained};
use flow_matching::weighted_mse;
use mmdit::{Adapter, Adapters, BaseWeights, LoadOptions, Mmdit, MmditConfig, MmditInput};
use quant::{AdamWConfig, OptimizerKind};
use tensor::{Device, ParameterSpec, Precision, Tensor, Weights, from_f32, to_f32};

/// Every layer that tokens go through.
pub const ALL_LINEAR: [&str; 17] = [
    "x_embedder",
    "context_embedder",
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "proj_mlp",
    "single_transformer_blocks.0.proj_out",
    "proj_out",
];

/// The four kinds of modulations, the embedders before them, and some layers behind.
pub const CONDITIONS: [&str; 7] = [
    "norm1.linear",
    "norm1_context.linear",
    "norm.linear",
    "norm_out.linear",
    "linear_1",
    "linear_2",
    "to_q",
];

/// Gradients of half precision are scaled so that small ones stay numbers.
pub const LOSS_SCALE: f32 = 1024.0;

/// Nearly normal numbers: sums of uniform ones from SplitMix64.
pub fn numbers(seed: u64, count: usize, scale: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d;
    let mut uniform = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 24) as f32 - 0.5
    };
    (0..count)
        .map(|_| scale * (uniform() + uniform() + uniform()) * 2.0)
        .collect()
}

/// Weights that are numbers of T and keep activations near 1.
pub fn weights(config: &MmditConfig, t: Half) -> BTreeMap<String, Vec<f32>> {
    let parameters = config.parameters().into_iter().enumerate();
    parameters
        .map(|(seed, spec)| {
            let count = spec.num_elements() as usize;
            let mut values = numbers(seed as u64 + 1, count, 1.0);
            match spec.shape.as_slice() {
                [_, inputs] => {
                    let scale = (*inputs as f32).sqrt().recip();
                    values.iter_mut().for_each(|v| *v *= scale);
                }
                _ if spec.name.contains(".norm_") => {
                    values.iter_mut().for_each(|v| *v = 1.0 + 0.1 * *v);
                }
                _ => values.iter_mut().for_each(|v| *v *= 0.05),
            }
            (spec.name, t.to_f32(&t.from_f32(&values)))
        })
        .collect()
}

pub fn reference(
    config: &MmditConfig,
    weights: &BTreeMap<String, Vec<f32>>,
    device: &Device,
    base: BaseWeights,
) -> Mmdit {
    let shapes: BTreeMap<String, Vec<usize>> = config
        .parameters()
        .into_iter()
        .map(|spec| (spec.name, spec.shape))
        .collect();
    let weights = Weights::from_values(weights.iter().map(|(name, values)| {
        (
            ParameterSpec::new(name.as_str(), shapes[name].clone()),
            values.clone(),
        )
    }));
    let options = LoadOptions {
        device: device.clone(),
        precision: Precision::F32,
        base,
    };
    Mmdit::load(&weights, config.clone(), &options).expect("all parameters are there")
}

/// A batch on the host.
pub struct Batch {
    pub shape: Shape,
    pub latents: Vec<f32>,
    pub noise: Vec<f32>,
    pub sigmas: Vec<f32>,
    pub weights: Vec<f32>,
    pub text: Vec<f32>,
    pub pooled: Vec<f32>,
    pub guidance: Option<Vec<f32>>,
}

impl Batch {
    pub fn new(config: &MmditConfig, shape: Shape) -> Self {
        let b = shape.b;
        let count = shape.rows(1) * config.in_channels;
        let per_sample = |first: f32| (0..b).map(|i| first + 0.21 * i as f32).collect();
        Self {
            shape,
            latents: numbers(901, count, 1.0),
            noise: numbers(902, count, 1.0),
            sigmas: per_sample(0.3),
            weights: per_sample(0.7),
            text: numbers(903, shape.rows(0) * config.joint_attention_dim, 1.0),
            pooled: numbers(904, b * config.pooled_projection_dim, 1.0),
            guidance: config.guidance_embeds.then(|| per_sample(1.5)),
        }
    }

    pub fn micro(&self) -> MicroBatch<'_> {
        MicroBatch {
            shape: self.shape,
            latents: &self.latents,
            noise: &self.noise,
            sigmas: &self.sigmas,
            times: &self.sigmas,
            weights: &self.weights,
            text: &self.text,
            pooled: &self.pooled,
            guidance: self.guidance.as_deref(),
        }
    }

    /// One sample of it.
    pub fn sample(&self, i: usize) -> Self {
        let part = |values: &[f32]| {
            let len = values.len() / self.shape.b;
            values[i * len..(i + 1) * len].to_vec()
        };
        Self {
            shape: Shape { b: 1, ..self.shape },
            latents: part(&self.latents),
            noise: part(&self.noise),
            sigmas: part(&self.sigmas),
            weights: part(&self.weights),
            text: part(&self.text),
            pooled: part(&self.pooled),
            guidance: self.guidance.as_deref().map(part),
        }
    }

    /// Tokens of latents and noise.
    pub fn tokens(&self, config: &MmditConfig) -> [Vec<f32>; 2] {
        let [h, w] = self.shape.latent_cells;
        [&self.latents, &self.noise]
            .map(|values| tokens_of(values, [self.shape.b, config.in_channels / 4, h, w]))
    }
}

/// `mmdit`'s velocity of tokens, `(b, image, channels)`.
pub fn reference_velocity(
    model: &Mmdit,
    batch: &Batch,
    tokens: Tensor<3>,
    times: &[f32],
    adapters: &Adapters,
) -> Tensor<3> {
    let (config, shape, device) = (model.config(), batch.shape, model.device());
    let text = [shape.b, shape.text, config.joint_attention_dim];
    let pooled = [shape.b, config.pooled_projection_dim];
    let input = MmditInput {
        hidden_states: tokens,
        encoder_hidden_states: from_f32(batch.text.clone(), text, device),
        pooled_projections: from_f32(batch.pooled.clone(), pooled, device),
        timestep: times,
        guidance: batch.guidance.as_deref(),
        rope: &model.rope(shape.text, shape.latent_cells),
    };
    model.forward(&input, adapters)
}

pub fn adapters(model: &Mmdit, factors: &[LoraFactors]) -> Adapters {
    let mut adapters = Adapters::none();
    for f in factors {
        let adapter =
            Adapter::from_values(f.a.clone(), f.b.clone(), f.rank, f.scale, model.device());
        adapters.push(&f.path, adapter);
    }
    adapters
}

/// `mmdit`'s loss and gradients, by name.
pub fn reference_step(
    model: &Mmdit,
    batch: &Batch,
    factors: &[LoraFactors],
) -> (f32, BTreeMap<String, Vec<f32>>) {
    let device = model.device();
    let config = model.config();
    let mut adapters = Adapters::none();
    let mut leaves = Vec::new();
    for f in factors {
        let leaf = |values: &[f32], shape| from_f32(values.to_vec(), shape, device).require_grad();
        let a = leaf(&f.a, [f.rank, f.a.len() / f.rank]);
        let b = leaf(&f.b, [f.b.len() / f.rank, f.rank]);
        leaves.push((format!("{}.lora_A.weight", f.path), a.clone()));
        leaves.push((format!("{}.lora_B.weight", f.path), b.clone()));
        let scale = f.scale;
        adapters.push(&f.path, Adapter { a, b, scale });
    }
    let [latents, noise] = batch.tokens(config);
    let per_sample = latents.len() / batch.shape.b;
    let pairs = || latents.iter().zip(&noise).enumerate();
    let noisy = pairs()
        .map(|(i, (x, e))| {
            let sigma = batch.sigmas[i / per_sample];
            (1.0 - sigma) * x + sigma * e
        })
        .collect();
    let target = pairs().map(|(_, (x, e))| e - x).collect();
    let dims = [batch.shape.b, batch.shape.image(), config.in_channels];
    let noisy = from_f32(noisy, dims, device);
    let velocity = reference_velocity(model, batch, noisy, &batch.sigmas, &adapters);
    let loss = weighted_mse(velocity, from_f32(target, dims, device), &batch.weights);
    let value = to_f32(&loss)[0];
    let gradients = loss.backward();
    let gradients = leaves
        .into_iter()
        .map(|(name, leaf)| {
            let gradient = leaf.grad(&gradients).map(|g| to_f32(&g));
            let zeros = || vec![0.0; leaf.dims().iter().product()];
            (name, gradient.unwrap_or_else(zeros))
        })
        .collect();
    (value, gradients)
}

/// Factors none of which is zero.
pub fn factors(config: &MmditConfig, sizes: &[LoraSize]) -> Vec<LoraFactors> {
    let mut factors = untrained(config, sizes, || 0.0);
    for (i, f) in factors.iter_mut().enumerate() {
        let inputs = (f.a.len() / f.rank) as f32;
        f.a = numbers(7000 + i as u64, f.a.len(), inputs.sqrt().recip());
        f.b = numbers(8000 + i as u64, f.b.len(), 0.3);
        f.scale = [1.0, 0.5][i % 2];
    }
    factors
}

pub fn training_options(recompute: Recompute) -> TrainingOptions {
    TrainingOptions {
        recompute,
        optimizer: OptimizerKind::AdamW8bit { min_8bit_size: 64 },
        adamw: AdamWConfig {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
        },
        max_grad_norm: 1.0,
    }
}

/// The gradients that steps under [`LOSS_SCALE`] have summed up, by name.
pub fn unscaled_gradients(engine: &Engine) -> BTreeMap<String, Vec<f32>> {
    let gradients = engine.gradients().expect("they are there").into_iter();
    gradients
        .map(|(name, g)| (name, g.into_iter().map(|v| v / LOSS_SCALE).collect()))
        .collect()
}

/// `‖found − expected‖/‖expected‖`; infinite if anything is not finite.
pub fn distance<V: Copy + Into<f64>>(found: &[V], expected: &[V]) -> f64 {
    assert_eq!(found.len(), expected.len(), "lengths");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let pairs = found.iter().zip(expected);
    let difference = norm(&mut pairs.map(|(f, e)| (*f).into() - (*e).into()));
    let error = difference / norm(&mut expected.iter().map(|e| (*e).into())).max(f64::MIN_POSITIVE);
    if error.is_finite() {
        error
    } else {
        f64::INFINITY
    }
}
