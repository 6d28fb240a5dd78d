//! Training of every weight of the transformer, for models small enough that weights, moments, average and all
//! activations fit the device.
//!
//! Latents and text states lie on the device; a step copies a few numbers per sample to it and replays one graph: draw
//! latents and noise, forward, mean squared error, backward, clip, AdamW, average. Masters, moments and average are
//! `f32`; the network computes in T. Forward and backward are those of [`crate::model::pass`]; the layers are told
//! where gradients of their own weights go.
//!
//! Source of the optimiser's arithmetic: `pretrain`'s state. Every sum has a fixed order, so a run repeats bit for bit.

mod layout;
#[cfg(test)]
mod tests;
mod work;

use mmdit::MmditConfig;
use tensor::ParameterSpec;

use crate::arena::Arena;
use crate::error::CudaError;
use crate::half_type::Half;
use crate::model::engine::PositionTables;
use crate::model::error::ModelError;
use crate::model::network::{self, Network};
use crate::model::sizes::{Shape, Sizes};
use crate::ops::average::{AverageConfig, NUMBERS};
use crate::ops::elementwise;
use crate::stream::{Buffer, Graph, Rates, Stream, Tally};
use crate::view::View;
use layout::Layout;
use work::Places;

/// Numbers of one copy to the device: larger ones would want as much pinned memory.
const CHUNK: usize = 1 << 24;

/// How a transformer is trained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FullOptions {
    /// What it computes in.
    pub t: Half,
    /// Sizes of every batch.
    pub shape: Shape,
    /// How much of the gradients' mean a step keeps.
    pub beta1: f64,
    /// How much of their squares' mean a step keeps.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Part of a weight that a step of learning rate 1 takes away.
    pub weight_decay: f64,
    /// Largest global norm of the gradients.
    pub max_grad_norm: f64,
    /// How much of the average an old run keeps; a young one keeps `(step + 1)/(step + 10)` at most.
    pub ema_decay: f64,
    /// The guidance scale told to models with a guidance embedding, and only to them.
    pub guidance: Option<f32>,
    /// Factor of the loss on its way back, undone before clipping: f16 loses small gradients without it. 1 for bf16.
    pub loss_scale: f32,
}

/// What became of the last step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FullReport {
    /// Mean squared error of the batch.
    pub loss: f32,
    /// Global norm of the gradients before clipping. If it is not finite, the step changed nothing.
    pub grad_norm: f32,
}

/// Everything that a run goes on from. Flat, in the engine's own order, all of one length.
#[derive(Clone, Debug, PartialEq)]
pub struct FullState {
    /// Steps taken.
    pub step: u64,
    /// The weights.
    pub values: Vec<f32>,
    /// Means of gradients.
    pub first: Vec<f32>,
    /// Means of their squares.
    pub second: Vec<f32>,
    /// The weights' average.
    pub averaged: Vec<f32>,
}

/// Latents on the device: f32 `[rows, c, h, w]`.
struct Latents {
    mean: Buffer,
    deviation: Buffer,
    rows: usize,
}

/// Texts on the device: T `[rows, text, joint_attention_dim]` and `[rows, pooled_projection_dim]`.
struct Texts {
    states: Buffer,
    pooled: Buffer,
    rows: usize,
}

/// A transformer all of whose weights are trained.
pub struct FullTrainer {
    // In the order in which they must go: recorded work before the memory that it touches.
    graph: Option<Graph>,
    activations: Option<Buffer>,
    latents: Option<Latents>,
    texts: Option<Texts>,
    positions: PositionTables,
    network: Network,
    layout: Layout,
    places: Places,
    _memory: Buffer,
    sizes: Sizes,
    options: FullOptions,
    config: AverageConfig,
    step: u64,
    /// Whether a step has run by launches, so that everything is compiled.
    has_run: bool,
    use_graphs: bool,
    stream: Stream,
}

fn check(sizes: &Sizes, shape: Shape) -> Result<(), ModelError> {
    sizes.check_shape(shape)?;
    sizes.check_velocity(shape)?;
    let channels = sizes.config.in_channels;
    if !channels.is_multiple_of(8) {
        return Err(ModelError::Unsupported {
            what: "the latent tokens' channels",
            expected: "a multiple of 8",
            found: channels,
        });
    }
    Ok(())
}

impl FullTrainer {
    /// A run before its first step. `values` gives each parameter's beginning.
    ///
    /// # Errors
    ///
    /// If a size is unsupported, or the device has too little memory.
    ///
    /// # Panics
    ///
    /// If a parameter has another number of values, or there is a guidance scale for a model without guidance
    /// embedding or none for one with it.
    pub fn new(
        stream: Stream,
        config: &MmditConfig,
        values: &mut dyn FnMut(&ParameterSpec) -> Vec<f32>,
        options: FullOptions,
    ) -> Result<Self, CudaError> {
        let sizes = Sizes::new(config)?;
        check(&sizes, options.shape)?;
        assert_eq!(
            options.guidance.is_some(),
            config.guidance_embeds,
            "a guidance scale for models with a guidance embedding, and only for them"
        );
        let counting = Arena::counting();
        network::arrange(&counting, &sizes, options.t)?;
        let len = counting.peak_bytes() / 2;
        let counting = Arena::counting();
        Places::arrange(&counting, len, options.shape.b);
        let memory = stream.allocate(counting.peak_bytes(), "weights and moments")?;
        let places = Places::arrange(&Arena::over(memory.view()), len, options.shape.b);
        stream.fill(memory.view(), 0)?;
        let slab = places.state.shadow;
        let mut network = network::arrange(&Arena::over(slab), &sizes, options.t)?;
        layout::train_all(&mut network, slab, places.gradients);
        let layout = Layout::new(&network, slab);
        let mut flat = vec![0.0; len];
        for (spec, range) in &layout.parameters {
            flat[range.clone()].copy_from_slice(&values(spec));
        }
        let positions = PositionTables::new(&stream, &sizes, options.shape)?;
        let b = options.shape.b;
        stream.upload(places.ones, &vec![1.0f32; b])?;
        let guidance = options.guidance.unwrap_or(0.0) * 1000.0;
        stream.upload(places.guidance, &vec![guidance; b])?;
        let trainer = Self {
            graph: None,
            activations: None,
            latents: None,
            texts: None,
            positions,
            network,
            layout,
            places,
            _memory: memory,
            sizes,
            options,
            config: AverageConfig {
                beta1: options.beta1,
                beta2: options.beta2,
                epsilon: options.epsilon,
                weight_decay: options.weight_decay,
                ema_decay: options.ema_decay,
            },
            step: 0,
            has_run: false,
            use_graphs: true,
            stream,
        };
        trainer.upload(trainer.places.state.averaged, &flat)?;
        trainer.set_values(&flat)?;
        Ok(trainer)
    }

    fn upload<V: bytemuck::NoUninit>(&self, to: View, values: &[V]) -> Result<(), CudaError> {
        let mut rest = to;
        for chunk in values.chunks(CHUNK) {
            self.stream.upload(rest, chunk)?;
            rest = rest.skip(size_of_val(chunk));
        }
        Ok(())
    }

    /// Masters, and their copies in T.
    fn set_values(&self, flat: &[f32]) -> Result<(), CudaError> {
        let state = &self.places.state;
        self.upload(state.values, flat)?;
        let (t, n) = (self.options.t, self.layout.len);
        elementwise::to_half(&self.stream, t, state.shadow, state.values, n)
    }

    fn latent_len(&self) -> usize {
        let [h, w] = self.options.shape.latent_cells;
        self.sizes.config.in_channels / 4 * h * w
    }

    /// Puts means and deviations of all latents onto the device: `(rows, c, h, w)` each, as the model sees latents
    /// (`(x − shift)·scale`), in place of any others.
    ///
    /// # Errors
    ///
    /// If memory is short or a copy fails.
    ///
    /// # Panics
    ///
    /// If a slice has another length.
    pub fn set_latents(
        &mut self,
        mean: &[f32],
        deviation: &[f32],
        rows: usize,
    ) -> Result<(), CudaError> {
        let n = rows * self.latent_len();
        assert_eq!([mean.len(), deviation.len()], [n, n], "values of latents");
        self.graph = None;
        self.stream.synchronize()?;
        self.latents = None;
        let latents = Latents {
            mean: self.stream.allocate(4 * n, "latents")?,
            deviation: self.stream.allocate(4 * n, "latents")?,
            rows,
        };
        self.upload(latents.mean.view(), mean)?;
        self.upload(latents.deviation.view(), deviation)?;
        self.latents = Some(latents);
        Ok(())
    }

    /// Puts all text states `(rows, text, joint_attention_dim)` and pooled captions `(rows, pooled_projection_dim)`
    /// onto the device, rounded to T, in place of any others.
    ///
    /// # Errors
    ///
    /// If memory is short or a copy fails.
    ///
    /// # Panics
    ///
    /// If a slice has another length.
    pub fn set_texts(
        &mut self,
        states: &[f32],
        pooled: &[f32],
        rows: usize,
    ) -> Result<(), CudaError> {
        let config = &self.sizes.config;
        let width = self.options.shape.text * config.joint_attention_dim;
        let lens = [rows * width, rows * config.pooled_projection_dim];
        assert_eq!([states.len(), pooled.len()], lens, "values of texts");
        self.graph = None;
        self.stream.synchronize()?;
        self.texts = None;
        let texts = Texts {
            states: self.stream.allocate(2 * lens[0], "text states")?,
            pooled: self.stream.allocate(2 * lens[1], "pooled captions")?,
            rows,
        };
        let largest = lens[0].max(lens[1]).min(CHUNK);
        let staging = self.stream.allocate(4 * largest, "loading texts")?;
        for (buffer, values) in [(&texts.states, states), (&texts.pooled, pooled)] {
            let mut rest = buffer.view();
            for chunk in values.chunks(CHUNK) {
                let n = chunk.len();
                self.stream.upload(staging.view(), chunk)?;
                let (t, wide) = (self.options.t, staging.view());
                elementwise::to_half(&self.stream, t, rest, wide, n)?;
                rest = rest.skip(2 * n);
            }
        }
        self.stream.synchronize()?;
        self.texts = Some(texts);
        Ok(())
    }

    /// One step on the pictures and texts of these places in the tables. Returns when it is launched.
    ///
    /// Latents and noise are [`crate::ops::draw::normals`] of `noise_seed`.
    ///
    /// # Errors
    ///
    /// If memory is short or a launch fails.
    ///
    /// # Panics
    ///
    /// If a slice has not one entry per sample, a place is not in its table, or there are no tables.
    pub fn step(
        &mut self,
        pictures: &[u32],
        texts: &[u32],
        sigmas: &[f32],
        noise_seed: u64,
        learning_rate: f64,
    ) -> Result<(), CudaError> {
        self.prepare()?;
        let numbers = self.config.numbers(self.step, learning_rate);
        self.upload_batch(pictures, texts, sigmas, noise_seed, &numbers)?;
        if self.use_graphs && self.has_run {
            if self.graph.is_none() {
                let arena = self.arena();
                let graph = self
                    .stream
                    .capture(|| self.run(&self.cx(&self.stream, &arena), true))?;
                self.graph = Some(graph);
            }
            let graph = self.graph.as_ref().expect("it was recorded above");
            self.stream.replay(graph)?;
        } else {
            let arena = self.arena();
            self.run(&self.cx(&self.stream, &arena), true)?;
            self.has_run = true;
        }
        self.step += 1;
        Ok(())
    }

    fn upload_batch(
        &self,
        pictures: &[u32],
        texts: &[u32],
        sigmas: &[f32],
        noise_seed: u64,
        numbers: &[f32; NUMBERS],
    ) -> Result<(), CudaError> {
        let b = self.options.shape.b;
        assert_eq!(
            [pictures.len(), texts.len(), sigmas.len()],
            [b; 3],
            "one picture, text and noise level per sample"
        );
        let inside = |places: &[u32], rows: usize, what: &str| {
            let largest = places.iter().copied().max().unwrap_or(0) as usize;
            assert!(largest < rows, "{what} {largest} of {rows}");
        };
        inside(pictures, self.latents().rows, "picture");
        inside(texts, self.texts().rows, "text");
        let mut bytes: Vec<u8> = Vec::with_capacity(self.places.slot.bytes());
        bytes.extend(noise_seed.to_le_bytes());
        bytes.extend(bytemuck::cast_slice::<f32, u8>(numbers));
        bytes.extend(bytemuck::cast_slice::<u32, u8>(pictures));
        bytes.extend(bytemuck::cast_slice::<u32, u8>(texts));
        bytes.extend(bytemuck::cast_slice::<f32, u8>(sigmas));
        let times: Vec<f32> = sigmas.iter().map(|sigma| sigma * 1000.0).collect();
        bytes.extend(bytemuck::cast_slice::<f32, u8>(&times));
        self.stream.upload(self.places.slot, &bytes)
    }

    fn latents(&self) -> &Latents {
        self.latents.as_ref().expect("latents were set")
    }

    fn texts(&self) -> &Texts {
        self.texts.as_ref().expect("texts were set")
    }

    /// Loss and gradients of a batch; nothing is changed. Weights are those of the last step.
    ///
    /// # Errors
    ///
    /// If memory is short or a launch fails.
    ///
    /// # Panics
    ///
    /// As [`FullTrainer::step`].
    #[allow(clippy::type_complexity)] // a loss and tensors by specification
    pub fn gradients(
        &mut self,
        pictures: &[u32],
        texts: &[u32],
        sigmas: &[f32],
        noise_seed: u64,
    ) -> Result<(f32, Vec<(ParameterSpec, Vec<f32>)>), CudaError> {
        self.prepare()?;
        self.upload_batch(pictures, texts, sigmas, noise_seed, &[0.0; NUMBERS])?;
        let arena = self.arena();
        self.run(&self.cx(&self.stream, &arena), false)?;
        let loss = self.stream.download::<f32>(self.places.outcome, 1)?[0];
        let flat = self.download(self.places.gradients)?;
        Ok((
            loss,
            self.layout.split(&flat, self.options.loss_scale.recip()),
        ))
    }

    /// Loss and norm of the last step, when it is done.
    ///
    /// # Errors
    ///
    /// If the step failed.
    pub fn report(&mut self) -> Result<FullReport, CudaError> {
        let outcome = self.stream.download::<f32>(self.places.outcome, 2)?;
        Ok(FullReport {
            loss: outcome[0],
            grad_norm: outcome[1],
        })
    }

    /// Steps taken.
    pub fn num_steps(&self) -> u64 {
        self.step
    }

    fn download(&self, view: View) -> Result<Vec<f32>, CudaError> {
        self.stream.download(view, self.layout.len)
    }

    /// All weights, or their average, in the order of the configuration's parameters.
    ///
    /// # Errors
    ///
    /// If the copy fails.
    pub fn weights(&mut self, averaged: bool) -> Result<Vec<(ParameterSpec, Vec<f32>)>, CudaError> {
        let state = &self.places.state;
        let flat = self.download(match averaged {
            true => state.averaged,
            false => state.values,
        })?;
        Ok(self.layout.split(&flat, 1.0))
    }

    /// Everything that the run goes on from.
    ///
    /// # Errors
    ///
    /// If a copy fails.
    pub fn state(&mut self) -> Result<FullState, CudaError> {
        let state = &self.places.state;
        Ok(FullState {
            step: self.step,
            values: self.download(state.values)?,
            first: self.download(state.first)?,
            second: self.download(state.second)?,
            averaged: self.download(state.averaged)?,
        })
    }

    /// Goes on from a state of the same configuration.
    ///
    /// # Errors
    ///
    /// If a part has another length, or a copy fails.
    pub fn restore(&mut self, from: &FullState) -> Result<(), CudaError> {
        let state = self.places.state;
        let parts = [
            ("first", &from.first, state.first),
            ("second", &from.second, state.second),
            ("averaged", &from.averaged, state.averaged),
            ("values", &from.values, state.values),
        ];
        for (part, values, _) in &parts {
            if values.len() != self.layout.len {
                return Err(ModelError::State {
                    part: (*part).to_owned(),
                    expected: format!("{} numbers", self.layout.len),
                    found: format!("{} numbers", values.len()),
                }
                .into());
            }
        }
        for (_, values, view) in &parts[..3] {
            self.upload(*view, values)?;
        }
        self.set_values(&from.values)?;
        self.step = from.step;
        Ok(())
    }

    /// Switches the recorded graph off (every launch by itself, for measuring) or on again.
    pub fn use_graphs(&mut self, use_graphs: bool) {
        self.use_graphs = use_graphs;
        self.graph = None;
    }

    /// The stream that everything is done on.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// What a step launches, by kind of work, at these rates.
    ///
    /// # Errors
    ///
    /// If memory is short.
    ///
    /// # Panics
    ///
    /// If there are no tables.
    pub fn count_step(&self, rates: Rates) -> Result<[Tally; 4], CudaError> {
        let (dry, counting) = (Stream::dry(), Arena::counting());
        dry.start_counting_at(rates);
        self.run(&self.cx(&dry, &counting), true)?;
        Ok(dry.tallies())
    }
}

impl Drop for FullTrainer {
    fn drop(&mut self) {
        // Nothing may run on memory that is given back; what fails here has failed before.
        let _ = self.stream.synchronize();
    }
}
