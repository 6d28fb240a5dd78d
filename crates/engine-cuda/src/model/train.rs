//! Training on the device: micro-batches into gradients, gradients into a step.
//!
//! A micro-step (noise, forward, loss, backward) and an optimiser step are recorded as graphs after they have run once.
//! Several micro-batches may be one batch, or come one after the other: gradients add up until the optimiser step.
//! Only losses, norms and flags come back to the host, once per optimiser step.

use std::collections::HashMap;

use quant::{AdamWConfig, OptimizerKind, StatePart};

use crate::arena::Arena;
use crate::error::CudaError;
use crate::model::conditions::KeptConditions;
use crate::model::engine::{Engine, tokens_of};
use crate::model::error::ModelError;
use crate::model::linear::Cx;
use crate::model::modulations::Modulations;
use crate::model::optimizer::{AdamW, StepHyper};
use crate::model::pass::Conditions;
use crate::model::sizes::{Shape, Sizes};
use crate::ops::{elementwise, loss};
use crate::stream::{Buffer, Graph, Rates, Stream, Tally};
use crate::view::View;

/// Which blocks compute their activations again in the backward pass instead of keeping them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Recompute {
    /// None of them.
    Nothing,
    /// All of them.
    Everything,
    /// The first so many, double blocks first.
    First(usize),
}

impl Recompute {
    /// A flag per block.
    pub fn flags(self, num_blocks: usize) -> Vec<bool> {
        let first = match self {
            Self::Nothing => 0,
            Self::Everything => num_blocks,
            Self::First(count) => count,
        };
        (0..num_blocks).map(|block| block < first).collect()
    }
}

/// How a LoRA is trained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainingOptions {
    /// Which blocks are recomputed.
    pub recompute: Recompute,
    /// How moments are kept.
    pub optimizer: OptimizerKind,
    /// The optimiser's numbers.
    pub adamw: AdamWConfig,
    /// Largest global norm of the gradients.
    pub max_grad_norm: f32,
}

/// One micro-batch. Row-major host values.
#[derive(Clone, Copy, Debug)]
pub struct MicroBatch<'a> {
    /// Sizes of the batch.
    pub shape: Shape,
    /// Latents, `(b, c, h, w)`.
    pub latents: &'a [f32],
    /// Noise, as the latents.
    pub noise: &'a [f32],
    /// Noise level of each sample: how noise is mixed in.
    pub sigmas: &'a [f32],
    /// What the network is told of it, 0 to 1.
    pub times: &'a [f32],
    /// Weight of each sample's squared error.
    pub weights: &'a [f32],
    /// Text states, `(b, text, joint_attention_dim)`.
    pub text: &'a [f32],
    /// Pooled captions, `(b, pooled_projection_dim)`.
    pub pooled: &'a [f32],
    /// Guidance scales, for models with a guidance embedding and only for them.
    pub guidance: Option<&'a [f32]>,
}

/// What became of an optimiser step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Mean loss of the micro-batches since the last step.
    pub loss: f32,
    /// Global norm of the gradients before clipping.
    pub grad_norm: f32,
    /// Whether they were made smaller.
    pub clipped: bool,
    /// Whether nothing was changed, because a gradient was not finite.
    pub skipped: bool,
}

/// A batch on the device, `f32`.
#[derive(Clone, Copy)]
struct Inputs {
    latents: View,
    noise: View,
    sigmas: View,
    times: View,
    guidance: View,
    weights: View,
    text: View,
    pooled: View,
}

impl Inputs {
    fn arrange(arena: &Arena, sizes: &Sizes, shape: Shape) -> Self {
        let f32 = |n: usize| arena.take(4 * n);
        let config = &sizes.config;
        let tokens = shape.rows(1) * config.in_channels;
        let b = shape.b;
        Self {
            latents: f32(tokens),
            noise: f32(tokens),
            sigmas: f32(b),
            times: f32(b),
            guidance: f32(b),
            weights: f32(b),
            text: f32(shape.rows(0) * config.joint_attention_dim),
            pooled: f32(b * config.pooled_projection_dim),
        }
    }
}

/// What is ready for batches of one shape.
struct Prepared {
    /// Dropped before the memory that it touches.
    graph: Option<RecordedMicroStep>,
    inputs: Inputs,
    memory: Buffer,
    peak_bytes: usize,
    runs: u32,
}

/// A micro-step as a graph, and the number that is part of it.
struct RecordedMicroStep {
    graph: Graph,
    loss_factor: f32,
}

/// State of a training run.
pub(crate) struct Training {
    prepared: HashMap<Shape, Prepared>,
    options: TrainingOptions,
    recompute: Vec<bool>,
    optimizer: AdamW,
    /// `f32[1]`: losses summed up.
    loss: Buffer,
    num_micro_steps: u32,
    use_graphs: bool,
}

impl Training {
    pub(crate) fn forget_graphs(&mut self) {
        for prepared in self.prepared.values_mut() {
            prepared.graph = None;
        }
        self.optimizer.forget_graph();
    }
}

impl Engine {
    /// Begins training the attached LoRA from step 0.
    ///
    /// # Errors
    ///
    /// If memory is short.
    ///
    /// # Panics
    ///
    /// If no LoRA was attached for training.
    pub fn start_training(&mut self, options: TrainingOptions) -> Result<(), CudaError> {
        self.training = None;
        self.sampling = None;
        let factors = self.factors.as_ref().expect("a LoRA was attached");
        factors.clear_gradients(&self.stream)?;
        let optimizer = AdamW::new(&self.stream, factors, &options)?;
        let loss = self.stream.allocate(4, "the loss")?;
        self.stream.fill(loss.view(), 0)?;
        self.training = Some(Training {
            prepared: HashMap::new(),
            recompute: options.recompute.flags(self.sizes.num_blocks()),
            options,
            optimizer,
            loss,
            num_micro_steps: 0,
            use_graphs: true,
        });
        Ok(())
    }

    /// Switches recorded graphs off (every launch by itself, for measuring) or on again.
    ///
    /// # Panics
    ///
    /// If training was not started.
    pub fn use_graphs(&mut self, use_graphs: bool) {
        let training = self.training_mut();
        training.use_graphs = use_graphs;
        if !use_graphs {
            training.forget_graphs();
        }
    }

    fn training(&self) -> &Training {
        self.training.as_ref().expect("training was started")
    }

    fn training_mut(&mut self) -> &mut Training {
        self.training.as_mut().expect("training was started")
    }

    /// Adds a micro-batch's gradients, of `loss · loss_factor`, to those since the last optimiser step.
    ///
    /// Returns when everything is launched.
    ///
    /// # Errors
    ///
    /// If memory is short or a launch fails.
    ///
    /// # Panics
    ///
    /// If training was not started, or a slice has not the batch's size.
    pub fn micro_step(
        &mut self,
        batch: &MicroBatch<'_>,
        loss_factor: f32,
    ) -> Result<(), CudaError> {
        let shape = batch.shape;
        self.prepare_micro_step(shape)?;
        self.upload(batch)?;
        let training = self.training();
        let prepared = &training.prepared[&shape];
        let recorded = match &prepared.graph {
            Some(recorded) if recorded.loss_factor == loss_factor => Some(&recorded.graph),
            _ => None,
        };
        if let Some(graph) = recorded {
            self.stream.replay(graph)?;
        } else if training.use_graphs && prepared.runs > 0 {
            let arena = self.arena();
            let graph = self.stream.capture(|| {
                self.run_micro_step(&self.cx(&self.stream, &arena), shape, loss_factor)
            })?;
            self.stream.replay(&graph)?;
            let prepared = self.training_mut().prepared.get_mut(&shape);
            prepared.expect("it was prepared").graph =
                Some(RecordedMicroStep { graph, loss_factor });
        } else {
            let arena = self.arena();
            self.run_micro_step(&self.cx(&self.stream, &arena), shape, loss_factor)?;
        }
        let training = self.training_mut();
        training.num_micro_steps += 1;
        let prepared = training.prepared.get_mut(&shape);
        prepared.expect("it was prepared").runs += 1;
        Ok(())
    }

    /// Makes room for batches of a shape; returns the peak of the activations' memory.
    ///
    /// # Errors
    ///
    /// If memory is short.
    ///
    /// # Panics
    ///
    /// If training was not started.
    pub fn prepare_micro_step(&mut self, shape: Shape) -> Result<usize, CudaError> {
        if let Some(prepared) = self.training().prepared.get(&shape) {
            let bytes = prepared.peak_bytes;
            self.ensure_activations(bytes)?;
            return Ok(bytes);
        }
        self.prepare_rope(shape)?;
        self.sizes.check_velocity(shape)?;
        let counting = Arena::counting();
        Inputs::arrange(&counting, &self.sizes, shape);
        let memory = self.stream.allocate(counting.peak_bytes(), "a batch")?;
        let inputs = Inputs::arrange(&Arena::over(memory.view()), &self.sizes, shape);
        let prepared = Prepared {
            graph: None,
            inputs,
            memory,
            peak_bytes: 0,
            runs: 0,
        };
        self.training_mut().prepared.insert(shape, prepared);
        let bytes = self.peak_of(|cx| self.run_micro_step(cx, shape, 1.0))?;
        let prepared = self.training_mut().prepared.get_mut(&shape);
        prepared.expect("it was just put there").peak_bytes = bytes;
        self.ensure_activations(bytes)?;
        Ok(bytes)
    }

    /// Runs a micro-step's schedule dry: what it launches, by kind of work.
    ///
    /// # Errors
    ///
    /// If memory is short.
    ///
    /// # Panics
    ///
    /// If training was not started.
    pub fn count_micro_step(
        &mut self,
        shape: Shape,
        rates: Rates,
    ) -> Result<[Tally; 4], CudaError> {
        self.prepare_micro_step(shape)?;
        let (dry, counting) = (Stream::dry(), Arena::counting());
        dry.start_counting_at(rates);
        self.run_micro_step(&self.cx(&dry, &counting), shape, 1.0)?;
        Ok(dry.tallies())
    }

    /// Bytes of batches, moments and whatever else training has besides activations and factors.
    pub fn training_bytes(&self) -> [(&'static str, usize); 2] {
        let training = self.training.as_ref();
        let batches = training.map_or(0, |training| {
            let batches = training.prepared.values();
            batches.map(|prepared| prepared.memory.view().bytes()).sum()
        });
        let optimizer = training.map_or(0, |training| training.optimizer.num_bytes());
        [("batches", batches), ("optimizer", optimizer)]
    }

    fn upload(&self, batch: &MicroBatch<'_>) -> Result<(), CudaError> {
        let MicroBatch { shape, .. } = *batch;
        let inputs = &self.training().prepared[&shape].inputs;
        let config = &self.sizes.config;
        let [h, w] = shape.latent_cells;
        let latent = [shape.b, config.in_channels / 4, h, w];
        let put = |view: View, values: &[f32], what: &str| {
            assert_eq!(4 * values.len(), view.bytes(), "bytes of {what}");
            self.stream.upload(view, values)
        };
        put(inputs.latents, &tokens_of(batch.latents, latent), "latents")?;
        put(inputs.noise, &tokens_of(batch.noise, latent), "noise")?;
        put(inputs.sigmas, batch.sigmas, "noise levels")?;
        put(inputs.weights, batch.weights, "weights")?;
        put(inputs.text, batch.text, "text states")?;
        put(inputs.pooled, batch.pooled, "pooled captions")?;
        let thousandfold =
            |values: &[f32]| -> Vec<f32> { values.iter().map(|value| value * 1000.0).collect() };
        put(inputs.times, &thousandfold(batch.times), "times")?;
        assert_eq!(
            batch.guidance.is_some(),
            config.guidance_embeds,
            "guidance scales for models with a guidance embedding, and only for them"
        );
        match batch.guidance {
            Some(guidance) => put(inputs.guidance, &thousandfold(guidance), "guidance scales"),
            None => Ok(()),
        }
    }

    /// Noise, forward, loss, backward, for the batch that lies on the device.
    fn run_micro_step(&self, cx: &Cx<'_>, shape: Shape, loss_factor: f32) -> Result<(), CudaError> {
        let training = self.training();
        let inputs = training.prepared[&shape].inputs;
        let (s, t, b) = (cx.stream, cx.t, shape.b);
        let config = &self.sizes.config;
        let per_sample = shape.image() * config.in_channels;
        let count = b * per_sample;
        let conditions = Conditions {
            times: inputs.times,
            guidance: config.guidance_embeds.then_some(inputs.guidance),
            pooled: inputs.pooled,
        };
        let num_text = inputs.text.bytes() / 4;
        let text = cx.half(num_text);
        elementwise::to_half(s, t, text, inputs.text, num_text)?;
        let (noisy, target) = (cx.half(count), cx.f32(count));
        let (latents, noise, sigmas) = (inputs.latents, inputs.noise, inputs.sigmas);
        loss::noise_mix(s, t, noisy, target, latents, noise, sigmas, b, per_sample)?;
        let (modulations, kept_conditions) = self.modulations_to_train(cx, &conditions, b)?;
        let (velocity, dvelocity) = (cx.half(count), cx.half(count));
        let partials = cx.f32(loss::LOSS_PARTIALS);
        let pass = self.pass(shape, modulations);
        let kept = pass.forward_kept(cx, velocity, [text, noisy], &training.recompute)?;
        loss::weighted_mse(
            s,
            t,
            training.loss.view(),
            dvelocity,
            velocity,
            target,
            inputs.weights,
            partials,
            b,
            per_sample,
            count,
            loss_factor,
        )?;
        pass.backward(cx, dvelocity, kept)?;
        match (modulations.gradient, kept_conditions) {
            (Some(gradient), Some(kept)) => self.network.modulate_backward(cx, gradient, &kept, b),
            _ => Ok(()),
        }
    }

    /// Modulation vectors on the stack, one row per sample; with room for their gradients and what those need, if
    /// factors are trained on the layers before them.
    fn modulations_to_train(
        &self,
        cx: &Cx<'_>,
        conditions: &Conditions,
        rows: usize,
    ) -> Result<(Modulations, Option<KeptConditions>), CudaError> {
        if !self.network.trains_conditions() {
            return Ok((self.modulations(cx, conditions, rows)?, None));
        }
        let stride = self.sizes.modulation_width();
        let (view, gradient) = (cx.f32(rows * stride), cx.half(rows * stride));
        let kept = self.network.modulate_kept(cx, view, conditions, rows)?;
        let modulations = Modulations {
            view,
            stride,
            gradient: Some(gradient),
        };
        Ok((modulations, Some(kept)))
    }

    /// The gradients summed up so far, tensor after tensor as [`Engine::lora`] has them: A and B of each layer.
    ///
    /// # Errors
    ///
    /// If a launch or the copy fails.
    ///
    /// # Panics
    ///
    /// If no LoRA was attached for training.
    pub fn gradients(&self) -> Result<Vec<(String, Vec<f32>)>, CudaError> {
        let factors = self.factors.as_ref().expect("a LoRA was attached");
        factors.collect_gradients(&self.stream, self.options.t)?;
        let flat = self
            .stream
            .download::<f32>(factors.gradients(), factors.num_parameters())?;
        let tensors = factors.tensors().into_iter();
        Ok(tensors
            .map(|(name, range)| (name, flat[range].to_vec()))
            .collect())
    }

    /// The sum of losses since the last optimiser step, and of how many micro-batches.
    ///
    /// # Errors
    ///
    /// If the copy fails.
    ///
    /// # Panics
    ///
    /// If training was not started.
    pub fn loss_sum(&self) -> Result<(f32, u32), CudaError> {
        let training = self.training();
        let loss = self.stream.download::<f32>(training.loss.view(), 1)?[0];
        Ok((loss, training.num_micro_steps))
    }

    /// Forgets gradients and losses since the last optimiser step.
    ///
    /// # Errors
    ///
    /// If a launch fails.
    ///
    /// # Panics
    ///
    /// If training was not started.
    pub fn clear_gradients(&mut self) -> Result<(), CudaError> {
        let factors = self.factors.as_ref().expect("a LoRA was attached");
        factors.clear_gradients(&self.stream)?;
        self.stream.fill(self.training().loss.view(), 0)?;
        self.training_mut().num_micro_steps = 0;
        Ok(())
    }

    /// Clips the gradients, moves the LoRA by one step (unless a gradient is not finite) and forgets them.
    ///
    /// `unscale` undoes a loss scale that was part of the micro-steps' factors.
    ///
    /// # Errors
    ///
    /// If a launch fails.
    ///
    /// # Panics
    ///
    /// If training was not started.
    pub fn optimizer_step(
        &mut self,
        learning_rate: f64,
        unscale: f32,
    ) -> Result<StepReport, CudaError> {
        let factors = self.factors.as_ref().expect("a LoRA was attached");
        let training = self.training.as_mut().expect("training was started");
        let hyper = StepHyper {
            learning_rate,
            unscale,
            max_grad_norm: training.options.max_grad_norm,
        };
        let (norm, skipped) = training.optimizer.step(
            &self.stream,
            self.options.t,
            factors,
            &hyper,
            training.use_graphs,
        )?;
        let loss = self.stream.download::<f32>(training.loss.view(), 1)?[0];
        let count = training.num_micro_steps.max(1);
        self.clear_gradients()?;
        Ok(StepReport {
            loss: loss / count as f32,
            grad_norm: norm,
            clipped: !skipped && norm + 1e-6 > hyper.max_grad_norm,
            skipped,
        })
    }

    /// Steps taken (skipped ones do not count) and all moments, named as the tensors of the LoRA.
    ///
    /// # Errors
    ///
    /// If the copy fails.
    ///
    /// # Panics
    ///
    /// If training was not started.
    pub fn export_optimizer(&self) -> Result<(u64, Vec<StatePart>), CudaError> {
        self.training().optimizer.export(&self.stream)
    }

    /// Takes over saved moments and their number of steps.
    ///
    /// # Errors
    ///
    /// If a part is missing, left over, or of another kind or length.
    ///
    /// # Panics
    ///
    /// If training was not started.
    pub fn import_optimizer(
        &mut self,
        num_steps: u64,
        parts: Vec<StatePart>,
    ) -> Result<(), CudaError> {
        let training = self.training.as_mut().expect("training was started");
        training
            .optimizer
            .import(&self.stream, num_steps, parts)
            .map_err(|error| match error {
                ImportError::State(error) => error.into(),
                ImportError::Cuda(error) => error,
            })
    }
}

/// Why moments cannot be taken over.
pub(crate) enum ImportError {
    /// They are of another run.
    State(ModelError),
    /// The copy failed.
    Cuda(CudaError),
}
