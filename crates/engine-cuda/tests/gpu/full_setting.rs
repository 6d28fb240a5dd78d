//! Training of all weights as it is tested: options, tables that batches come from, `mmdit`'s loss and gradients under
//! automatic differentiation.
//!
//! The library's unit tests keep data of their own, under which their narrower bound holds.

use std::collections::BTreeMap;

use engine_cuda::model::engine::tokens_of;
use engine_cuda::model::{FullOptions, FullTrainer, Shape};
use engine_cuda::ops::draw::{Purpose, normals};
use engine_cuda::{Half, Stream};
use flow_matching::weighted_mse;
use mmdit::{Adapters, BaseWeights, LoadOptions, Mmdit, MmditConfig, MmditInput};
use tensor::device::{cpu, training};
use tensor::{ParameterSpec, Precision, Tensor, Weights, from_f32, to_f32};

use crate::networks::numbers;

const ROWS: usize = 5;
pub const SEED: u64 = 0xfeed_1234_5678;

/// A gradient for each parameter, in the configuration's order.
pub type Gradients = Vec<(ParameterSpec, Vec<f32>)>;

/// A model, a batch's shape and the tables that batches come from.
pub struct Setting {
    pub label: &'static str,
    pub config: MmditConfig,
    pub shape: Shape,
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

    pub fn options(&self, t: Half) -> FullOptions {
        FullOptions {
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
        }
    }

    /// A run from these weights, with its tables.
    pub fn trainer(
        &self,
        stream: Stream,
        options: FullOptions,
        weights: &BTreeMap<String, Vec<f32>>,
    ) -> FullTrainer {
        let mut values = |spec: &ParameterSpec| weights[&spec.name].clone();
        let mut trainer =
            FullTrainer::new(stream, &self.config, &mut values, options).expect("it fits");
        let [mean, deviation, states, pooled] = self.tables();
        trainer
            .set_latents(&mean, &deviation, ROWS)
            .expect("it fits");
        trainer.set_texts(&states, &pooled, ROWS).expect("it fits");
        trainer
    }

    pub fn step(&self, trainer: &mut FullTrainer, seed: u64, learning_rate: f64) {
        let (pictures, texts, sigmas) = (self.pictures(), self.texts(), self.sigmas());
        trainer
            .step(&pictures, &texts, &sigmas, seed, learning_rate)
            .expect("it runs");
    }

    /// Loss and gradients of the weights as they are.
    pub fn gradients(&self, trainer: &mut FullTrainer, seed: u64) -> (f32, Gradients) {
        let (pictures, texts, sigmas) = (self.pictures(), self.texts(), self.sigmas());
        trainer
            .gradients(&pictures, &texts, &sigmas, seed)
            .expect("it runs")
    }

    /// Loss and gradients of `mmdit` in f32, with the noise of [`SEED`].
    pub fn expected(&self, weights: &BTreeMap<String, Vec<f32>>) -> (f32, Gradients) {
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
                (spec, to_f32(&gradient))
            })
            .collect();
        (value, gradients)
    }
}
