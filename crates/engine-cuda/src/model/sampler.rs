//! Sampling on the device: velocity, true guidance and Euler step as one recorded graph, replayed for every step.
//!
//! All noise levels are known before the first step, so the modulation vectors of all steps are computed in one go:
//! their weights, a quarter of the model, are read once per picture instead of once per step.

use crate::arena::Arena;
use crate::error::CudaError;
use crate::model::engine::Engine;
use crate::model::linear::Cx;
use crate::model::modulations::Modulations;
use crate::model::sizes::Shape;
use crate::ops::{elementwise, loss};
use crate::stream::{Buffer, Graph};
use crate::view::View;

/// What pictures are drawn from. Row-major host values.
#[derive(Clone, Copy, Debug)]
pub struct SamplerInput<'a> {
    /// Number of pictures, text tokens, latent cells.
    pub shape: Shape,
    /// What sampling starts from, as tokens `(b, image, in_channels)`.
    pub tokens: &'a [f32],
    /// Noise levels, one more than there are steps; the last is where sampling ends.
    pub sigmas: &'a [f32],
    /// What the network is told at each step, 0 to 1.
    pub times: &'a [f32],
    /// Text states, `(b, text, joint_attention_dim)`.
    pub text: &'a [f32],
    /// Pooled captions, `(b, pooled_projection_dim)`.
    pub pooled: &'a [f32],
    /// For true guidance: text states and pooled captions of the negative prompt, and the scale.
    pub negative: Option<(&'a [f32], &'a [f32], f32)>,
    /// The embedded guidance scale, for models that have one and only for them.
    pub guidance: Option<f32>,
}

/// A picture in the making.
pub(crate) struct Sampling {
    /// Dropped before the memory that it touches.
    graph: Option<Graph>,
    shape: Shape,
    copies: usize,
    scale: f32,
    sigmas: Vec<f32>,
    step: usize,
    runs: u32,
    places: Places,
    _memory: Buffer,
}

/// What lies beside the activations.
#[derive(Clone, Copy)]
struct Places {
    sample: View,
    model_input: View,
    text: View,
    /// Modulation vectors of all steps, and of the present one.
    all_modulations: View,
    modulations: View,
    coefficients: View,
}

impl Sampling {
    pub(crate) fn forget_graph(&mut self) {
        self.graph = None;
    }

    /// The batch as the network sees it.
    fn batch(&self) -> Shape {
        Shape {
            b: self.copies * self.shape.b,
            ..self.shape
        }
    }
}

impl Engine {
    /// Begins pictures.
    ///
    /// # Errors
    ///
    /// If memory is short or a launch fails.
    ///
    /// # Panics
    ///
    /// If a slice has not its size.
    pub fn start_sampling(&mut self, input: &SamplerInput<'_>) -> Result<(), CudaError> {
        self.sampling = None;
        let shape = input.shape;
        let num_steps = input.times.len();
        assert_eq!(
            input.sigmas.len(),
            num_steps + 1,
            "levels of {num_steps} steps"
        );
        let copies = if input.negative.is_some() { 2 } else { 1 };
        let rows = copies * shape.b;
        let batch = Shape { b: rows, ..shape };
        self.prepare_rope(batch)?;
        self.sizes.check_velocity(shape)?;
        let config = self.sizes.config.clone();
        let count = shape.rows(1) * config.in_channels;
        assert_eq!(input.tokens.len(), count, "values to start from");
        let width = self.sizes.modulation_width();
        let arrange = |arena: &Arena| Places {
            sample: arena.take(4 * count),
            model_input: arena.take(2 * copies * count),
            text: arena.take(2 * copies * shape.rows(0) * config.joint_attention_dim),
            all_modulations: arena.take(4 * num_steps * rows * width),
            modulations: arena.take(4 * rows * width),
            coefficients: arena.take(8),
        };
        let counting = Arena::counting();
        arrange(&counting);
        let memory = self.stream.allocate(counting.peak_bytes(), "sampling")?;
        let places = arrange(&Arena::over(memory.view()));

        let pooled = [
            Some(input.pooled),
            input.negative.map(|(_, pooled, _)| pooled),
        ];
        let pooled: Vec<f32> = pooled.into_iter().flatten().flatten().copied().collect();
        let texts = [Some(input.text), input.negative.map(|(text, _, _)| text)];
        let text: Vec<f32> = texts.into_iter().flatten().flatten().copied().collect();
        let times: Vec<f32> = input
            .times
            .iter()
            .flat_map(|&time| vec![time; rows])
            .collect();
        let guidance = input.guidance.map(|scale| vec![scale; num_steps * rows]);
        let pooled: Vec<f32> = (0..num_steps).flat_map(|_| pooled.clone()).collect();
        let prepare = |cx: &Cx<'_>, this: &Self| -> Result<(), CudaError> {
            let mark = cx.arena.mark();
            let all = num_steps * rows;
            let conditions = this.conditions(cx, &times, guidance.as_deref(), &pooled, all)?;
            this.network
                .modulate(cx, places.all_modulations, &conditions, all)?;
            cx.arena.release(mark);
            let half = this.half_tokens(cx, &text, places.text.bytes() / 2)?;
            cx.stream.copy_rows(
                places.text,
                half.bytes(),
                half,
                half.bytes(),
                half.bytes(),
                1,
            )?;
            cx.arena.release(mark);
            let wide = cx.f32(count);
            cx.stream.upload(wide, input.tokens)?;
            cx.stream.upload(places.sample, input.tokens)?;
            for copy in 0..copies {
                let part = places.model_input.elements_from(copy * count);
                elementwise::to_half(cx.stream, cx.t, part.take(2 * count), wide, count)?;
            }
            cx.arena.release(mark);
            Ok(())
        };
        let sampling = Sampling {
            graph: None,
            shape,
            copies,
            scale: input.negative.map_or(1.0, |(_, _, scale)| scale),
            sigmas: input.sigmas.to_vec(),
            step: 0,
            runs: 0,
            places,
            _memory: memory,
        };
        let first = self.peak_of(|cx| prepare(cx, self))?;
        let each = self.peak_of(|cx| self.run_sample_step(cx, &sampling))?;
        self.ensure_activations(first.max(each))?;
        let arena = self.arena();
        prepare(&self.cx(&self.stream, &arena), self)?;
        self.sampling = Some(sampling);
        Ok(())
    }

    /// Takes one step; returns whether there are more. Returns when everything is launched.
    ///
    /// # Errors
    ///
    /// If a launch fails.
    ///
    /// # Panics
    ///
    /// If no picture was begun, or it is finished.
    pub fn sample_step(&mut self) -> Result<bool, CudaError> {
        let sampling = self.sampling.as_ref().expect("sampling was started");
        let (step, places) = (sampling.step, sampling.places);
        let [sigma, next] = [sampling.sigmas[step], sampling.sigmas[step + 1]];
        self.stream
            .upload(places.coefficients, &[next - sigma, sampling.scale])?;
        let bytes = places.modulations.bytes();
        let row = places.all_modulations.skip(step * bytes).take(bytes);
        self.stream
            .copy_rows(places.modulations, bytes, row, bytes, bytes, 1)?;
        let arena = self.arena();
        let mut recorded = None;
        match &sampling.graph {
            Some(graph) => self.stream.replay(graph)?,
            None if sampling.runs > 0 => {
                let graph = self
                    .stream
                    .capture(|| self.run_sample_step(&self.cx(&self.stream, &arena), sampling))?;
                self.stream.replay(&graph)?;
                recorded = Some(graph);
            }
            None => self.run_sample_step(&self.cx(&self.stream, &arena), sampling)?,
        }
        let sampling = self.sampling.as_mut().expect("sampling was started");
        if recorded.is_some() {
            sampling.graph = recorded;
        }
        sampling.runs += 1;
        sampling.step += 1;
        Ok(sampling.step + 1 < sampling.sigmas.len())
    }

    fn run_sample_step(&self, cx: &Cx<'_>, sampling: &Sampling) -> Result<(), CudaError> {
        let places = sampling.places;
        let batch = sampling.batch();
        let count = sampling.shape.rows(1) * self.sizes.config.in_channels;
        let velocity = cx.half(sampling.copies * count);
        let modulations = Modulations {
            view: places.modulations,
            stride: self.sizes.modulation_width(),
            gradient: None,
        };
        let pass = self.pass(batch, modulations);
        pass.forward(cx, velocity, [places.text, places.model_input])?;
        loss::euler_cfg(
            cx.stream,
            cx.t,
            places.sample,
            places.model_input,
            velocity,
            places.coefficients,
            count,
            sampling.copies,
        )
    }

    /// The pictures as they are now, as tokens `(b, image, in_channels)`.
    ///
    /// # Errors
    ///
    /// If the copy fails.
    ///
    /// # Panics
    ///
    /// If no picture was begun.
    pub fn samples(&self) -> Result<Vec<f32>, CudaError> {
        let sampling = self.sampling.as_ref().expect("sampling was started");
        let sample = sampling.places.sample;
        self.stream.download(sample, sample.bytes() / 4)
    }
}
