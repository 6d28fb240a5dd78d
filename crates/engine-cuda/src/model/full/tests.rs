//! All gradients against `mmdit` under automatic differentiation, and the optimiser against its formulas, without a GPU.

use flow_matching::weighted_mse;
use mmdit::{Adapters, BaseWeights, LoadOptions, Mmdit, MmditConfig, MmditInput};
use tensor::device::{cpu, training};
use tensor::{ParameterSpec, Precision, Tensor, Weights, from_f32, to_f32};

use super::*;
use crate::model::engine::tokens_of;
use crate::ops::draw::{Purpose, normals};

const T: Half = Half::F16;
const SHAPE: Shape = Shape {
    b: 2,
    text: 3,
    latent_cells: [4, 6],
};
const PICTURES: [u32; 2] = [2, 0];
const TEXTS: [u32; 2] = [1, 3];
const SIGMAS: [f32; 2] = [0.3, 0.8];
const ROWS: usize = 4;
const SEED: u64 = 0x1234_5678_9abc;

fn numbers(seed: usize, count: usize, scale: f32) -> Vec<f32> {
    let mut state = seed as u32 * 7919 + 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * scale
    };
    (0..count).map(|_| next()).collect()
}

fn config(guidance_embeds: bool) -> MmditConfig {
    MmditConfig {
        num_layers: 2,
        num_single_layers: 2,
        num_attention_heads: 2,
        attention_head_dim: 8,
        axes_dims_rope: [2, 2, 4],
        joint_attention_dim: 6,
        pooled_projection_dim: 5,
        guidance_embeds,
        in_channels: 8,
        out_channels: 8,
        patch_size: 1,
    }
}

fn initial(spec: &ParameterSpec) -> Vec<f32> {
    let seed = spec
        .name
        .bytes()
        .fold(0, |sum, byte| sum * 31 % 65_521 + byte as usize);
    let count = spec.num_elements() as usize;
    let values = match spec.shape.as_slice() {
        [_, inputs] => numbers(seed, count, (3.0 / *inputs as f32).sqrt()),
        _ if spec.name.contains(".norm_") => {
            numbers(seed, count, 0.2).iter().map(|v| 1.0 + v).collect()
        }
        _ => numbers(seed, count, 0.1),
    };
    T.to_f32(&T.from_f32(&values))
}

fn options(guidance_embeds: bool) -> FullOptions {
    FullOptions {
        t: T,
        shape: SHAPE,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        max_grad_norm: 0.5,
        ema_decay: 0.999,
        guidance: guidance_embeds.then_some(0.7),
        loss_scale: 256.0,
    }
}

/// Means and deviations of latents, text states, pooled captions.
fn tables(config: &MmditConfig) -> [Vec<f32>; 4] {
    let latent = config.in_channels / 4 * SHAPE.latent_cells.iter().product::<usize>();
    [
        numbers(1, ROWS * latent, 1.0),
        numbers(2, ROWS * latent, 0.3)
            .iter()
            .map(|v| v.abs())
            .collect(),
        numbers(3, ROWS * SHAPE.text * config.joint_attention_dim, 1.0),
        numbers(4, ROWS * config.pooled_projection_dim, 1.0),
    ]
}

fn trainer(guidance_embeds: bool) -> FullTrainer {
    let config = config(guidance_embeds);
    let options = options(guidance_embeds);
    let mut trainer =
        FullTrainer::new(Stream::host(), &config, &mut initial, options).expect("there is memory");
    trainer.use_graphs(false);
    let [mean, deviation, states, pooled] = tables(&config);
    trainer
        .set_latents(&mean, &deviation, ROWS)
        .expect("there is memory");
    trainer
        .set_texts(&states, &pooled, ROWS)
        .expect("there is memory");
    trainer
}

fn picked(table: &[f32], rows: &[u32]) -> Vec<f32> {
    let width = table.len() / ROWS;
    let row = |row: &u32| &table[*row as usize * width..][..width];
    rows.iter().flat_map(row).copied().collect()
}

/// Loss and gradients of every parameter.
fn expected(config: &MmditConfig) -> (f32, Vec<(ParameterSpec, Vec<f32>)>) {
    let device = training(&cpu());
    let leaves: Vec<(ParameterSpec, Tensor<1>)> = config
        .parameters()
        .into_iter()
        .map(|spec| {
            let values = initial(&spec);
            let len = values.len();
            let leaf = from_f32(values, [len], &device).require_grad();
            (spec, leaf)
        })
        .collect();
    let options = LoadOptions {
        device: device.clone(),
        precision: Precision::F32,
        base: BaseWeights::Plain,
    };
    let weights = Weights::from_tensors(leaves.clone());
    let model = Mmdit::load(&weights, config.clone(), &options).expect("all parameters");
    let [mean, deviation, states, pooled] = tables(config);
    let [h, w] = SHAPE.latent_cells;
    let tokens = |table: &[f32]| {
        tokens_of(
            &picked(table, &PICTURES),
            [SHAPE.b, config.in_channels / 4, h, w],
        )
    };
    let (mean, deviation) = (tokens(&mean), tokens(&deviation));
    let count = mean.len();
    let posterior = normals(SEED, Purpose::Posterior, count);
    let noise = normals(SEED, Purpose::Noise, count);
    let x0: Vec<f32> = (0..count)
        .map(|i| mean[i] + deviation[i] * posterior[i])
        .collect();
    let mix = |i: usize| SIGMAS[i / (count / SHAPE.b)];
    let noisy = (0..count)
        .map(|i| (1.0 - mix(i)) * x0[i] + mix(i) * noise[i])
        .collect();
    let target = (0..count).map(|i| noise[i] - x0[i]).collect();
    let dims = [SHAPE.b, SHAPE.image(), config.in_channels];
    let text = [SHAPE.b, SHAPE.text, config.joint_attention_dim];
    let input = MmditInput {
        hidden_states: from_f32(noisy, dims, &device),
        encoder_hidden_states: from_f32(picked(&states, &TEXTS), text, &device),
        pooled_projections: from_f32(
            picked(&pooled, &TEXTS),
            [SHAPE.b, config.pooled_projection_dim],
            &device,
        ),
        timestep: &SIGMAS,
        guidance: config.guidance_embeds.then_some(&[0.7; 2]),
        rope: &model.rope(SHAPE.text, SHAPE.latent_cells),
    };
    let velocity = model.forward(&input, &Adapters::none());
    let loss = weighted_mse(velocity, from_f32(target, dims, &device), &[1.0; 2]);
    let value = to_f32(&loss)[0];
    let gradients = loss.backward();
    let gradients = leaves
        .into_iter()
        .map(|(spec, leaf)| (spec, to_f32(&leaf.grad(&gradients).expect("a leaf"))))
        .collect();
    (value, gradients)
}

fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
    let difference = norm(&mut found.iter().zip(expected).map(|(f, e)| f - e));
    difference / norm(&mut expected.iter().copied())
}

fn all(tensors: &[(ParameterSpec, Vec<f32>)]) -> Vec<f32> {
    tensors
        .iter()
        .flat_map(|(_, values)| values)
        .copied()
        .collect()
}

#[test]
fn loss_and_the_gradients_of_all_weights_are_those_of_the_portable_network() {
    for guidance in [true, false] {
        let (loss, expected) = expected(&config(guidance));
        let mut trainer = trainer(guidance);
        let (found_loss, found) = trainer
            .gradients(&PICTURES, &TEXTS, &SIGMAS, SEED)
            .expect("it runs");
        assert!(
            (found_loss / loss - 1.0).abs() < 2e-3,
            "{found_loss} {loss}"
        );
        let largest = expected
            .iter()
            .map(|(_, g)| g.iter().fold(0.0f32, |most, v| most.max(v.abs())))
            .fold(0.0, f32::max);
        for ((spec, found), (other, expected)) in found.iter().zip(&expected) {
            assert_eq!(spec, other);
            // A key's bias moves all scores of a query alike: its gradient is nothing but rounding.
            if expected.iter().all(|v| v.abs() < 1e-5 * largest) {
                continue;
            }
            let off = distance(found, expected);
            assert!(off < 2e-2, "{} is off by {off}", spec.name);
        }
        let off = distance(&all(&found), &all(&expected));
        assert!(off < 4e-3, "all together are off by {off}");
    }
}

#[test]
fn a_step_is_pretrains_arithmetic_on_the_same_gradients() {
    let mut trainer = trainer(false);
    let o = options(false);
    let mut values = all(&trainer.weights(false).expect("they are there"));
    let (mut first, mut second) = (vec![0.0f32; values.len()], vec![0.0f32; values.len()]);
    let mut averaged = values.clone();
    for step in 0..3u64 {
        let (_, gradients) = trainer
            .gradients(&PICTURES, &TEXTS, &SIGMAS, SEED + step)
            .expect("it runs");
        let gradients = all(&gradients);
        let rate = 1e-2 / (step + 1) as f64;
        trainer
            .step(&PICTURES, &TEXTS, &SIGMAS, SEED + step, rate)
            .expect("it runs");
        let norm = gradients.iter().map(|g| g * g).sum::<f32>().sqrt();
        assert!(norm > o.max_grad_norm as f32, "{norm} is not clipped");
        let report = trainer.report().expect("it ran");
        assert!((report.grad_norm / norm - 1.0).abs() < 1e-4);
        assert!(report.loss.is_finite());
        let shrink = (o.max_grad_norm as f32 / (norm + 1e-6)).min(1.0);
        let count = step as i32 + 1;
        let decay = o.ema_decay.min((step + 1) as f64 / (step + 10) as f64);
        for i in 0..values.len() {
            let g = gradients[i] * shrink;
            first[i] = first[i] * o.beta1 as f32 + g * (1.0 - o.beta1) as f32;
            second[i] = second[i] * o.beta2 as f32 + g * g * (1.0 - o.beta2) as f32;
            let corrected = second[i] / (1.0 - o.beta2.powi(count)) as f32;
            let root = corrected.sqrt() + o.epsilon as f32;
            let update = first[i] / root * (rate / (1.0 - o.beta1.powi(count))) as f32;
            values[i] = values[i] * (1.0 - rate * o.weight_decay) as f32 - update;
            averaged[i] = averaged[i] * decay as f32 + values[i] * (1.0 - decay) as f32;
        }
        let found = all(&trainer.weights(false).expect("they are there"));
        let off = distance(&found, &values);
        assert!(off < 1e-5, "weights after step {step} are off by {off}");
        let found = all(&trainer.weights(true).expect("they are there"));
        let off = distance(&found, &averaged);
        assert!(off < 1e-5, "the average after step {step} is off by {off}");
        // The next step starts where the device is: differences of rounding do not add up.
        values = all(&trainer.weights(false).expect("they are there"));
    }
}

#[test]
fn thirty_steps_on_one_batch_make_the_loss_fall() {
    let mut trainer = trainer(false);
    let mut losses = Vec::new();
    for _ in 0..30 {
        trainer
            .step(&PICTURES, &TEXTS, &SIGMAS, SEED, 3e-3)
            .expect("it runs");
        losses.push(trainer.report().expect("it ran").loss);
    }
    assert!(losses[29] < 0.8 * losses[0], "{losses:?}");
}

#[test]
fn a_restored_run_goes_on_to_the_same_bits() {
    let mut straight = trainer(true);
    let step = |trainer: &mut FullTrainer| {
        let seed = SEED + trainer.num_steps();
        trainer
            .step(&PICTURES, &TEXTS, &SIGMAS, seed, 1e-2)
            .expect("it runs");
    };
    step(&mut straight);
    let kept = straight.state().expect("it is there");
    step(&mut straight);
    let mut resumed = trainer(true);
    resumed.restore(&kept).expect("it is of this model");
    step(&mut resumed);
    assert!(resumed.state().expect("it is there") == straight.state().expect("it is there"));
    let short = FullState {
        first: vec![0.0],
        ..kept
    };
    let error = resumed.restore(&short).expect_err("one number");
    assert!(error.to_string().contains("`first`"), "{error}");
}
