//! Training of all weights: kernels, all gradients against `mmdit` under automatic differentiation, recorded steps
//! against launched ones, learning, restored runs.

use std::collections::BTreeMap;

use engine_cuda::model::engine::tokens_of;
use engine_cuda::model::{Accuracy, FullOptions, FullTrainer, Shape};
use engine_cuda::ops::draw::{Purpose, normals};
use engine_cuda::{Half, Stream};
use flow_matching::weighted_mse;
use mmdit::{Adapters, BaseWeights, LoadOptions, Mmdit, MmditConfig, MmditInput};
use tensor::device::{cpu, training};
use tensor::{ParameterSpec, Precision, Tensor, Weights, from_f32, to_f32};

use crate::cases::{gradient_distance, open, weights};
use crate::report::Report;
use crate::support::{name, numbers};

const ROWS: usize = 5;
const SEED: u64 = 0xfeed_1234_5678;

/// A model, a batch's shape and the tables that batches come from.
struct Setting {
    label: &'static str,
    config: MmditConfig,
    shape: Shape,
}

impl Setting {
    fn tables(&self) -> [Vec<f32>; 4] {
        let config = &self.config;
        let [h, w] = self.shape.latent_cells;
        let latent = config.in_channels / 4 * h * w;
        [
            numbers(1, ROWS * latent, 1.0),
            numbers(2, ROWS * latent, 0.3),
            numbers(3, ROWS * self.shape.text * config.joint_attention_dim, 1.0),
            numbers(4, ROWS * config.pooled_projection_dim, 1.0),
        ]
    }

    fn pictures(&self) -> Vec<u32> {
        (0..self.shape.b)
            .map(|i| ((2 * i + 3) % ROWS) as u32)
            .collect()
    }

    fn texts(&self) -> Vec<u32> {
        (0..self.shape.b)
            .map(|i| ((3 * i + 1) % ROWS) as u32)
            .collect()
    }

    fn sigmas(&self) -> Vec<f32> {
        let b = self.shape.b as f32;
        (0..self.shape.b)
            .map(|i| (i as f32 + 0.6) / (b + 0.5))
            .collect()
    }

    fn picked(&self, table: &[f32], rows: &[u32]) -> Vec<f32> {
        let width = table.len() / ROWS;
        let row = |row: &u32| &table[*row as usize * width..][..width];
        rows.iter().flat_map(row).copied().collect()
    }

    fn trainer(&self, t: Half, weights: &BTreeMap<String, Vec<f32>>) -> FullTrainer {
        let options = FullOptions {
            t,
            shape: self.shape,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.01,
            max_grad_norm: 1.0,
            ema_decay: 0.999,
            guidance: self.config.guidance_embeds.then_some(1.5),
            loss_scale: match t {
                Half::Bf16 => 1.0,
                Half::F16 => 4096.0,
            },
        };
        let mut values = |spec: &ParameterSpec| weights[&spec.name].clone();
        let mut trainer =
            FullTrainer::new(open(), &self.config, &mut values, options).expect("it fits");
        let [mean, deviation, states, pooled] = self.tables();
        trainer
            .set_latents(&mean, &deviation, ROWS)
            .expect("it fits");
        trainer.set_texts(&states, &pooled, ROWS).expect("it fits");
        trainer
    }

    fn step(&self, trainer: &mut FullTrainer, seed: u64) {
        let (pictures, texts, sigmas) = (self.pictures(), self.texts(), self.sigmas());
        // Adam moves all inputs of an output alike: the wider, the smaller its steps must be.
        let learning_rate = 0.15 / self.config.width() as f64;
        trainer
            .step(&pictures, &texts, &sigmas, seed, learning_rate)
            .expect("it runs");
    }

    /// Loss and gradients of `mmdit` in f32.
    fn expected(&self, weights: &BTreeMap<String, Vec<f32>>) -> (f32, BTreeMap<String, Vec<f32>>) {
        let (config, shape, device) = (&self.config, self.shape, training(&cpu()));
        let leaves: Vec<(ParameterSpec, Tensor<1>)> = config
            .parameters()
            .into_iter()
            .map(|spec| {
                let values = weights[&spec.name].clone();
                let len = values.len();
                (spec, from_f32(values, [len], &device).require_grad())
            })
            .collect();
        let options = LoadOptions {
            device: device.clone(),
            precision: Precision::F32,
            base: BaseWeights::Plain,
        };
        let live = Weights::from_tensors(leaves.clone());
        let model = Mmdit::load(&live, config.clone(), &options).expect("all parameters");
        let [mean, deviation, states, pooled] = self.tables();
        let [h, w] = shape.latent_cells;
        let tokens = |table: &[f32]| {
            let sizes = [shape.b, config.in_channels / 4, h, w];
            tokens_of(&self.picked(table, &self.pictures()), sizes)
        };
        let (mean, deviation) = (tokens(&mean), tokens(&deviation));
        let count = mean.len();
        let posterior = normals(SEED, Purpose::Posterior, count);
        let noise = normals(SEED, Purpose::Noise, count);
        let x0: Vec<f32> = (0..count)
            .map(|i| mean[i] + deviation[i] * posterior[i])
            .collect();
        let sigmas = self.sigmas();
        let mix = |i: usize| sigmas[i / (count / shape.b)];
        let noisy = (0..count)
            .map(|i| (1.0 - mix(i)) * x0[i] + mix(i) * noise[i])
            .collect();
        let target = (0..count).map(|i| noise[i] - x0[i]).collect();
        let dims = [shape.b, shape.image(), config.in_channels];
        let text = [shape.b, shape.text, config.joint_attention_dim];
        let pooled_dims = [shape.b, config.pooled_projection_dim];
        let guidance = vec![1.5; shape.b];
        let input = MmditInput {
            hidden_states: from_f32(noisy, dims, &device),
            encoder_hidden_states: from_f32(self.picked(&states, &self.texts()), text, &device),
            pooled_projections: from_f32(self.picked(&pooled, &self.texts()), pooled_dims, &device),
            timestep: &sigmas,
            guidance: config.guidance_embeds.then_some(guidance.as_slice()),
            rope: &model.rope(shape.text, shape.latent_cells),
        };
        let velocity = model.forward(&input, &Adapters::none());
        let target = from_f32(target, dims, &device);
        let loss = weighted_mse(velocity, target, &vec![1.0; shape.b]);
        let value = to_f32(&loss)[0];
        let gradients = loss.backward();
        let gradients = leaves
            .into_iter()
            .map(|(spec, leaf)| {
                let gradient = leaf.grad(&gradients).expect("a leaf");
                (spec.name, to_f32(&gradient))
            })
            .collect();
        (value, gradients)
    }
}

fn settings() -> Vec<Setting> {
    let small = MmditConfig {
        num_layers: 2,
        num_single_layers: 2,
        num_attention_heads: 3,
        attention_head_dim: 16,
        axes_dims_rope: [4, 6, 6],
        joint_attention_dim: 12,
        pooled_projection_dim: 20,
        guidance_embeds: true,
        in_channels: 16,
        out_channels: 16,
        patch_size: 1,
    };
    let shape = |b, text, latent_cells| Shape {
        b,
        text,
        latent_cells,
    };
    vec![
        Setting {
            label: "head 16, guidance",
            config: small.clone(),
            shape: shape(2, 5, [6, 10]),
        },
        Setting {
            label: "head 28, batch 1",
            config: MmditConfig {
                num_layers: 1,
                num_attention_heads: 2,
                attention_head_dim: 28,
                axes_dims_rope: [4, 12, 12],
                guidance_embeds: false,
                ..small.clone()
            },
            shape: shape(1, 21, [4, 6]),
        },
        Setting {
            label: "the small base's widths, head 64",
            config: MmditConfig {
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
            },
            shape: shape(5, 19, [10, 14]),
        },
        Setting {
            label: "head 128",
            config: MmditConfig {
                num_layers: 1,
                num_single_layers: 1,
                num_attention_heads: 3,
                attention_head_dim: 128,
                axes_dims_rope: [16, 56, 56],
                ..small.clone()
            },
            shape: shape(2, 33, [8, 12]),
        },
        Setting {
            label: "width 1152, beyond what a warp takes",
            config: MmditConfig {
                num_layers: 1,
                num_single_layers: 1,
                num_attention_heads: 9,
                attention_head_dim: 128,
                axes_dims_rope: [16, 56, 56],
                ..small
            },
            shape: shape(2, 9, [6, 4]),
        },
    ]
}

/// Runs everything.
pub fn run(s: &Stream, report: &mut Report) {
    report.guarded("full: kernels", |report| {
        crate::full_kernels::run(s, report)
    });
    for setting in settings() {
        for t in [Half::Bf16, Half::F16] {
            let label = format!("full: {} {}", setting.label, name(t));
            report.guarded(&label, |report| one(&setting, t, &label, report));
        }
    }
}

fn one(setting: &Setting, t: Half, label: &str, report: &mut Report) {
    let weights = weights(&setting.config, t);
    let (expected_loss, expected) = setting.expected(&weights);
    let mut trainer = setting.trainer(t, &weights);
    let (pictures, texts, sigmas) = (setting.pictures(), setting.texts(), setting.sigmas());
    let mut gradients = || {
        let (loss, found) = trainer
            .gradients(&pictures, &texts, &sigmas, SEED)
            .expect("it runs");
        let named = found.into_iter().map(|(spec, g)| (spec.name, g));
        (loss, named.collect::<BTreeMap<_, _>>())
    };
    let (loss, found) = gradients();
    let again = gradients();
    report.check(
        &format!("{label}: a repeated pass differs in a bit"),
        f64::from(u8::from(again != (loss, found.clone()))),
        0.0,
    );
    let off = f64::from((loss - expected_loss).abs() / expected_loss);
    report.check(
        &format!("{label}: loss"),
        off,
        Accuracy::of(t, &setting.config).velocity,
    );
    let (worst, at, all) = gradient_distance(&found, &expected);
    let bound = match t {
        Half::Bf16 => 2e-2,
        Half::F16 => 4e-3,
    };
    report.check(&format!("{label}: all gradients together"), all, bound);
    // Small tensors of a deep network collect the rounding of everything before them.
    report.check(
        &format!("{label}: worst gradient, {at}"),
        worst,
        3.0 * bound,
    );

    // Recorded steps against launched ones.
    let run = |graphs: bool| {
        let mut trainer = setting.trainer(t, &weights);
        trainer.use_graphs(graphs);
        for seed in 0..4 {
            setting.step(&mut trainer, SEED + seed);
        }
        let outcome = trainer.report().expect("it ran");
        (trainer.state().expect("it is there"), outcome, trainer)
    };
    let (state, outcome, mut trainer) = run(true);
    let (launched, launched_outcome, _) = run(false);
    report.check(
        &format!("{label}: recorded steps differ from launched ones"),
        f64::from(u8::from(state != launched || outcome != launched_outcome)),
        0.0,
    );

    // A state that is taken out and put back goes on to the same bits.
    setting.step(&mut trainer, SEED + 9);
    let straight = trainer.state().expect("it is there");
    let mut resumed = setting.trainer(t, &weights);
    resumed.restore(&state).expect("it is of this model");
    setting.step(&mut resumed, SEED + 9);
    report.check(
        &format!("{label}: a restored run differs"),
        f64::from(u8::from(resumed.state().expect("it is there") != straight)),
        0.0,
    );

    // One batch again and again.
    let mut trainer = setting.trainer(t, &weights);
    let mut losses = Vec::new();
    for _ in 0..30 {
        setting.step(&mut trainer, SEED);
        losses.push(trainer.report().expect("it ran").loss);
    }
    report.check(
        &format!("{label}: loss after 30 steps on one batch against the first"),
        f64::from(losses[29] / losses[0]),
        0.7,
    );
}
