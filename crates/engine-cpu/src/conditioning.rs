//! Time, guidance and pooled text of each sample, and all modulations that follow from them.
//!
//! They depend on nothing that the blocks compute, so all are there before the first block, and their gradients are
//! summed up and taken back after the last.

use macerator::Arch;
use mmdit::embed::sinusoids;
use rayon::prelude::*;

use crate::kernels::{silu, silu_slope};
use crate::linear::{Inner, Linear, input_gradient};
use crate::model::{Model, Pair};

/// Rows per sample on the way to the modulations.
#[derive(Debug, Default)]
pub(crate) struct Conditioning {
    num_samples: usize,
    /// Per embedder: its input, its hidden layer before SiLU and after it.
    embedders: Vec<[Vec<f32>; 3]>,
    temb: Vec<f32>,
    silu_temb: Vec<f32>,
    /// Outputs of [`Model::modulations`], a row per sample.
    modulations: Vec<Vec<f32>>,
}

/// What is conditioned on, a row or a number per sample.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Condition<'a> {
    pub timestep: &'a [f32],
    pub guidance: Option<&'a [f32]>,
    pub pooled: &'a [f32],
}

impl Conditioning {
    /// # Panics
    ///
    /// If guidance is given to a model without guidance embedding, or withheld from one with it.
    pub fn new(model: &Model, condition: Condition<'_>) -> Self {
        let num_samples = condition.timestep.len();
        let waves = |values: &[f32]| {
            let thousandfold: Vec<f32> = values.iter().map(|v| v * 1000.0).collect();
            sinusoids(&thousandfold)
        };
        let mut inputs = vec![waves(condition.timestep)];
        match (&model.guidance_embedder, condition.guidance) {
            (Some(_), Some(guidance)) => inputs.push(waves(guidance)),
            (None, None) => {}
            (Some(_), None) => panic!("this transformer needs a guidance scale"),
            (None, Some(_)) => panic!("this transformer has no guidance embedding"),
        }
        inputs.push(condition.pooled.to_vec());

        let mut temb = vec![0.0; num_samples * model.config.width()];
        let mut inner = Inner::default();
        let embedders = model
            .embedders()
            .zip(inputs)
            .map(|(pair, input)| {
                let mut run = |layer: &Linear, x: &[f32]| {
                    let mut out = vec![0.0; num_samples * layer.out_features];
                    layer.forward(model.arch, num_samples, x, &mut out, &mut inner);
                    out
                };
                let hidden = run(&pair.first, &input);
                let active: Vec<f32> = hidden.iter().copied().map(silu).collect();
                add(&mut temb, &run(&pair.second, &active));
                [input, hidden, active]
            })
            .collect();
        let silu_temb: Vec<f32> = temb.iter().copied().map(silu).collect();
        let modulations = model
            .modulations()
            .par_iter()
            .map(|layer| {
                let mut out = vec![0.0; num_samples * layer.out_features];
                layer.forward(
                    model.arch,
                    num_samples,
                    &silu_temb,
                    &mut out,
                    &mut Inner::default(),
                );
                out
            })
            .collect();
        Self {
            num_samples,
            embedders,
            temb,
            silu_temb,
            modulations,
        }
    }

    /// The vectors of width `d` that modulation layer `layer` gives a sample.
    pub fn vectors<const N: usize>(&self, layer: usize, sample: usize, d: usize) -> [&[f32]; N] {
        let row = &self.modulations[layer][sample * N * d..(sample + 1) * N * d];
        std::array::from_fn(|i| &row[i * d..(i + 1) * d])
    }

    /// Adds the gradients of all factors up to the modulations, given those of the modulations.
    pub fn backward(&self, model: &Model, d_modulations: &[Vec<f32>], gradients: &mut [f32]) {
        let arch = model.arch;
        let mut d_temb = vec![0.0; self.temb.len()];
        for (layer, dy) in model.modulations().into_iter().zip(d_modulations) {
            add(
                &mut d_temb,
                &self.step_back(arch, layer, [&self.silu_temb, dy], gradients),
            );
        }
        for (d, x) in d_temb.iter_mut().zip(&self.temb) {
            *d *= silu_slope(*x);
        }
        for (Pair { first, second }, [input, hidden, active]) in
            model.embedders().zip(&self.embedders)
        {
            let mut d = self.step_back(arch, second, [active, &d_temb], gradients);
            for (d, x) in d.iter_mut().zip(hidden) {
                *d *= silu_slope(*x);
            }
            first.factor_gradients(
                arch,
                self.num_samples,
                [input, &d],
                gradients,
                &mut Inner::default(),
            );
        }
    }

    fn step_back(
        &self,
        arch: Arch,
        layer: &Linear,
        [x, dy]: [&[f32]; 2],
        gradients: &mut [f32],
    ) -> Vec<f32> {
        let mut inner = Inner::default();
        layer.factor_gradients(arch, self.num_samples, [x, dy], gradients, &mut inner);
        let mut dx = vec![0.0; self.num_samples * layer.in_features];
        input_gradient(
            arch,
            self.num_samples,
            [layer.backward_terms(dy, &inner)],
            &mut dx,
        );
        dx
    }
}

fn add(sums: &mut [f32], values: &[f32]) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += value;
    }
}
