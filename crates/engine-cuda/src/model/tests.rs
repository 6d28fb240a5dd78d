//! The schedule without a GPU: kernels in plain Rust, results against `mmdit`.

use std::collections::BTreeMap;

use flow_matching::weighted_mse;
use mmdit::{Adapter, Adapters, BaseWeights, LoadOptions, Mmdit, MmditConfig, MmditInput};
use quant::{AdamWConfig, OptimizerKind};
use tensor::device::{cpu, training};
use tensor::{ParameterSpec, Precision, Weights, from_f32, to_f32};

use super::*;
use crate::half_type::Half;
use crate::model::engine::tokens_of;
use crate::plan::{lora_sizes, untrained};
use crate::stream::Stream;

const T: Half = Half::F16;
const LOSS_SCALE: f32 = 256.0;

fn numbers(seed: usize, count: usize, scale: f32) -> Vec<f32> {
    let mut state = seed as u32 * 7919 + 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * scale
    };
    (0..count).map(|_| next()).collect()
}

fn config() -> MmditConfig {
    MmditConfig {
        num_layers: 2,
        num_single_layers: 2,
        num_attention_heads: 2,
        attention_head_dim: 8,
        axes_dims_rope: [2, 2, 4],
        joint_attention_dim: 8,
        pooled_projection_dim: 8,
        guidance_embeds: true,
        in_channels: 8,
        out_channels: 8,
        patch_size: 1,
    }
}

const SHAPE: Shape = Shape {
    b: 2,
    text: 3,
    latent_cells: [4, 6],
};

fn weights() -> BTreeMap<String, Vec<f32>> {
    let parameters = config().parameters().into_iter().enumerate();
    parameters
        .map(|(seed, spec)| {
            let count = spec.num_elements() as usize;
            let values = match spec.shape.as_slice() {
                [_, inputs] => numbers(seed + 1, count, (3.0 / *inputs as f32).sqrt()),
                _ if spec.name.contains(".norm_") => numbers(seed + 1, count, 0.2)
                    .iter()
                    .map(|v| 1.0 + v)
                    .collect(),
                _ => numbers(seed + 1, count, 0.1),
            };
            (spec.name, T.to_f32(&T.from_f32(&values)))
        })
        .collect()
}

fn reference() -> Mmdit {
    let weights = weights();
    let specs = config().parameters().into_iter();
    let weights =
        Weights::from_values(specs.map(|s: ParameterSpec| (s.clone(), weights[&s.name].clone())));
    let options = LoadOptions {
        device: training(&cpu()),
        precision: Precision::F32,
        base: BaseWeights::Plain,
    };
    Mmdit::load(&weights, config(), &options).expect("all parameters are there")
}

fn engine() -> Engine {
    let options = EngineOptions {
        t: T,
        form: WeightForm::Half,
    };
    Engine::load(Stream::host(), &config(), &weights(), options).expect("it loads")
}

fn factors(targets: &[&str]) -> Vec<LoraFactors> {
    let sizes = lora_sizes(&config(), targets, 3);
    let mut factors = untrained(&config(), &sizes, || 0.0);
    for (i, f) in factors.iter_mut().enumerate() {
        f.a = numbers(500 + i, f.a.len(), 0.4);
        f.b = numbers(600 + i, f.b.len(), 0.4);
        f.scale = [1.0, 0.5][i % 2];
    }
    factors
}

struct Batch {
    latents: Vec<f32>,
    noise: Vec<f32>,
    per_sample: Vec<f32>,
    text: Vec<f32>,
    pooled: Vec<f32>,
}

fn batch() -> Batch {
    let count = SHAPE.rows(1) * 8;
    Batch {
        latents: numbers(1, count, 1.0),
        noise: numbers(2, count, 1.0),
        per_sample: vec![0.3, 0.8],
        text: numbers(3, SHAPE.rows(0) * 8, 1.0),
        pooled: numbers(4, SHAPE.b * 8, 1.0),
    }
}

impl Batch {
    fn micro(&self, samples: std::ops::Range<usize>) -> MicroBatch<'_> {
        let part = |values: &'_ [f32]| -> std::ops::Range<usize> {
            let len = values.len() / SHAPE.b;
            samples.start * len..samples.end * len
        };
        MicroBatch {
            shape: Shape {
                b: samples.len(),
                ..SHAPE
            },
            latents: &self.latents[part(&self.latents)],
            noise: &self.noise[part(&self.noise)],
            sigmas: &self.per_sample[part(&self.per_sample)],
            times: &self.per_sample[part(&self.per_sample)],
            weights: &self.per_sample[part(&self.per_sample)],
            text: &self.text[part(&self.text)],
            pooled: &self.pooled[part(&self.pooled)],
            guidance: Some(&self.per_sample[part(&self.per_sample)]),
        }
    }
}

/// Gradients by the names of their tensors.
type Gradients = BTreeMap<String, Vec<f32>>;

/// Velocity, loss and gradients.
fn expected(factors: &[LoraFactors]) -> (Vec<f32>, f32, Gradients) {
    let (model, batch) = (reference(), batch());
    let device = model.device();
    let mut adapters = Adapters::none();
    let mut leaves = Vec::new();
    for f in factors {
        let leaf = |v: &[f32], shape| from_f32(v.to_vec(), shape, device).require_grad();
        let a = leaf(&f.a, [f.rank, f.a.len() / f.rank]);
        let b = leaf(&f.b, [f.b.len() / f.rank, f.rank]);
        leaves.push((format!("{}.lora_A.weight", f.path), a.clone()));
        leaves.push((format!("{}.lora_B.weight", f.path), b.clone()));
        let scale = f.scale;
        adapters.push(&f.path, Adapter { a, b, scale });
    }
    let [h, w] = SHAPE.latent_cells;
    let [x0, eps] = [&batch.latents, &batch.noise].map(|v| tokens_of(v, [SHAPE.b, 2, h, w]));
    let per_sample = x0.len() / SHAPE.b;
    let mix = |i: usize| batch.per_sample[i / per_sample];
    let noisy = (0..x0.len())
        .map(|i| (1.0 - mix(i)) * x0[i] + mix(i) * eps[i])
        .collect();
    let target = x0.iter().zip(&eps).map(|(x, e)| e - x).collect();
    let dims = [SHAPE.b, SHAPE.image(), 8];
    let input = MmditInput {
        hidden_states: from_f32(noisy, dims, device),
        encoder_hidden_states: from_f32(batch.text, [SHAPE.b, SHAPE.text, 8], device),
        pooled_projections: from_f32(batch.pooled, [SHAPE.b, 8], device),
        timestep: &batch.per_sample,
        guidance: Some(&batch.per_sample),
        rope: &model.rope(SHAPE.text, SHAPE.latent_cells),
    };
    let velocity = model.forward(&input, &adapters);
    let values = to_f32(&velocity);
    let loss = weighted_mse(velocity, from_f32(target, dims, device), &batch.per_sample);
    let loss_value = to_f32(&loss)[0];
    let gradients = loss.backward();
    let gradients = leaves
        .into_iter()
        .map(|(name, leaf)| (name, to_f32(&leaf.grad(&gradients).expect("a leaf"))))
        .collect();
    (values, loss_value, gradients)
}

fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
    let difference = norm(&mut found.iter().zip(expected).map(|(f, e)| f - e));
    difference / norm(&mut expected.iter().copied())
}

fn start(engine: &mut Engine, recompute: Recompute) {
    let options = TrainingOptions {
        recompute,
        optimizer: OptimizerKind::AdamW,
        adamw: AdamWConfig {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
        },
        max_grad_norm: 1.0,
    };
    engine.start_training(options).expect("it starts");
    engine.use_graphs(false);
}

fn gradients(engine: &Engine) -> Vec<(String, Vec<f32>)> {
    let found = engine.gradients().expect("they are there").into_iter();
    found
        .map(|(name, g)| (name, g.into_iter().map(|v| v / LOSS_SCALE).collect()))
        .collect()
}

const ALL: [&str; 17] = [
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

#[test]
fn loss_and_every_gradient_are_those_of_the_portable_network() {
    for targets in [ALL.as_slice(), &["to_v"], &["ff.net.2", "to_q", "proj_mlp"]] {
        let factors = factors(targets);
        let (_, loss, expected) = expected(&factors);
        let mut engine = engine();
        engine.attach_lora(&factors, true).expect("it fits");
        start(&mut engine, Recompute::Nothing);
        engine
            .micro_step(&batch().micro(0..2), LOSS_SCALE)
            .expect("it runs");
        let (found_loss, _) = engine.loss_sum().expect("it is there");
        assert!(
            (found_loss / loss - 1.0).abs() < 5e-3,
            "{found_loss} {loss}"
        );
        let found = gradients(&engine);
        assert_eq!(found.len(), expected.len());
        for (name, found) in &found {
            let expected = &expected[name];
            let off = distance(found, expected);
            assert!(off < 2e-2, "{name} is off by {off}");
        }
    }
}

#[test]
fn recomputed_blocks_and_samples_one_by_one_give_the_same_gradients() {
    let factors = factors(&ALL);
    let mut engine = engine();
    engine.attach_lora(&factors, true).expect("it fits");
    let batch = batch();
    let mut all = Vec::new();
    for recompute in [
        Recompute::Nothing,
        Recompute::Everything,
        Recompute::First(3),
    ] {
        start(&mut engine, recompute);
        engine
            .micro_step(&batch.micro(0..2), LOSS_SCALE)
            .expect("it runs");
        all.push(gradients(&engine));
    }
    assert!(all[0] == all[1] && all[0] == all[2], "not the same bits");
    start(&mut engine, Recompute::Everything);
    for i in 0..2 {
        engine
            .micro_step(&batch.micro(i..i + 1), LOSS_SCALE / 2.0)
            .expect("it runs");
    }
    for ((name, found), (_, expected)) in gradients(&engine).iter().zip(&all[0]) {
        let off = distance(found, expected);
        assert!(off < 1e-2, "{name} is off by {off}");
    }
}

#[test]
fn the_velocity_and_a_guided_step_are_those_of_the_portable_network() {
    let factors = factors(&ALL);
    let (velocity, ..) = expected(&factors);
    let mut engine = engine();
    engine.attach_lora(&factors, false).expect("it fits");
    let batch = batch();
    let [h, w] = SHAPE.latent_cells;
    let [x0, eps] = [&batch.latents, &batch.noise].map(|v| tokens_of(v, [SHAPE.b, 2, h, w]));
    let per_sample = x0.len() / SHAPE.b;
    let mix = |i: usize| batch.per_sample[i / per_sample];
    let noisy: Vec<f32> = (0..x0.len())
        .map(|i| (1.0 - mix(i)) * x0[i] + mix(i) * eps[i])
        .collect();
    let input = VelocityInput {
        shape: SHAPE,
        tokens: &noisy,
        text: &batch.text,
        pooled: &batch.pooled,
        times: &batch.per_sample,
        guidance: Some(&batch.per_sample),
    };
    let found = engine.velocity(&input).expect("it runs");
    let off = distance(&found, &velocity);
    assert!(off < 5e-3, "{off}");

    // Two velocities, put together by hand, against one guided step.
    let other_text = numbers(70, batch.text.len(), 1.0);
    let velocity = |engine: &mut Engine, text: &[f32]| {
        let input = VelocityInput {
            text,
            times: &[0.5; 2],
            guidance: Some(&[2.0; 2]),
            ..input
        };
        engine.velocity(&input).expect("it runs")
    };
    let plus = velocity(&mut engine, &batch.text);
    let minus = velocity(&mut engine, &other_text);
    let expected: Vec<f32> = (0..noisy.len())
        .map(|i| noisy[i] - 0.5 * (minus[i] + 3.0 * (plus[i] - minus[i])))
        .collect();
    let sampler = SamplerInput {
        shape: SHAPE,
        tokens: &noisy,
        sigmas: &[0.5, 0.0],
        times: &[0.5],
        text: &batch.text,
        pooled: &batch.pooled,
        negative: Some((&other_text, &batch.pooled, 3.0)),
        guidance: Some(2.0),
    };
    engine.start_sampling(&sampler).expect("it fits");
    assert!(!engine.sample_step().expect("it runs"));
    let found = engine.samples().expect("they are there");
    let off = distance(&found, &expected);
    assert!(off < 1e-3, "{off}");
}

/// Layers before the blocks' modulation vectors.
const CONDITIONS: [&str; 8] = [
    "norm1.linear",
    "norm1_context.linear",
    "norm.linear",
    "norm_out.linear",
    "timestep_embedder.linear_1",
    "guidance_embedder.linear_1",
    "text_embedder.linear_1",
    "linear_2",
];

#[test]
fn factors_on_modulations_and_their_embedders_have_the_portable_networks_gradients() {
    let every: Vec<&str> = ALL.iter().chain(&CONDITIONS).copied().collect();
    // Modulations alone do not go on to the embedders; one layer alone is reached through all blocks.
    for targets in [
        every.as_slice(),
        &CONDITIONS[..4],
        &["norm1.linear"],
        &["timestep_embedder.linear_1"],
        &["to_q", "norm_out.linear"],
    ] {
        let factors = factors(targets);
        let (_, _, expected) = expected(&factors);
        let mut engine = engine();
        engine.attach_lora(&factors, true).expect("it fits");
        let mut first = None;
        for recompute in [Recompute::Nothing, Recompute::Everything] {
            start(&mut engine, recompute);
            engine
                .micro_step(&batch().micro(0..2), LOSS_SCALE)
                .expect("it runs");
            let found = gradients(&engine);
            assert_eq!(found.len(), expected.len());
            for (name, found) in &found {
                let off = distance(found, &expected[name]);
                assert!(off < 2e-2, "{name} of {targets:?} is off by {off}");
            }
            let before = first.get_or_insert_with(|| found.clone());
            assert!(*before == found, "not the same bits");
        }
    }
}
