//! AdamW over all factors, with moments in `f32` or 8 bits, recorded as one graph from gradients to stacked factors.
//!
//! Step count and learning rate are read from device memory, so that one recording serves every step.

use std::collections::BTreeMap;

use quant::{AdamWConfig, StatePart, StateValues};

use crate::arena::Arena;
use crate::error::CudaError;
use crate::half_type::Half;
use crate::model::error::ModelError;
use crate::model::factors::DeviceFactors;
use crate::model::train::{ImportError, TrainingOptions};
use crate::ops::optimizer::{
    self, EightBitMoments, SQUARES_PARTIALS, STEP_NUMBERS_BYTES, Step, TensorPlace, TensorTable,
};
use crate::stream::{Buffer, Graph, Stream};
use crate::view::View;

/// The numbers of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct StepHyper {
    pub(crate) learning_rate: f64,
    pub(crate) unscale: f32,
    pub(crate) max_grad_norm: f32,
}

/// Where everything lies.
#[derive(Clone, Copy)]
struct Places {
    table: View,
    numbers: View,
    steps: View,
    learning_rate: View,
    factor: View,
    /// `f32` norm, then the `u32` flag: one copy brings both to the host.
    outcome: View,
    partials: View,
    codes: [View; 2],
    scales: [View; 2],
    full: [View; 2],
}

impl Places {
    fn arrange(arena: &Arena, table: &TensorTable) -> Self {
        let two = |bytes: usize| [arena.take(bytes), arena.take(bytes)];
        let codes = match table.num_scales() {
            0 => 0,
            _ => table.num_elements(),
        };
        Self {
            table: arena.take(table.device_bytes()),
            numbers: arena.take(STEP_NUMBERS_BYTES),
            steps: arena.take(4),
            learning_rate: arena.take(8),
            factor: arena.take(4),
            outcome: arena.take(8),
            partials: arena.take(8 * SQUARES_PARTIALS),
            codes: two(codes),
            scales: two(4 * table.num_scales()),
            full: two(4 * table.num_full_moments()),
        }
    }
}

/// Moments and counters on the device.
pub(crate) struct AdamW {
    /// Dropped before the memory that it touches; the numbers are part of it.
    recorded: Option<(Graph, f32, f32)>,
    config: AdamWConfig,
    table: TensorTable,
    names: Vec<String>,
    places: Places,
    memory: Buffer,
    runs: u32,
}

impl AdamW {
    pub(crate) fn new(
        stream: &Stream,
        factors: &DeviceFactors,
        options: &TrainingOptions,
    ) -> Result<Self, CudaError> {
        let tensors = factors.tensors();
        let ranges: Vec<(usize, usize)> = tensors
            .iter()
            .map(|(_, range)| (range.start, range.len()))
            .collect();
        let table = TensorTable::new(options.optimizer, &ranges);
        let counting = Arena::counting();
        Places::arrange(&counting, &table);
        let memory = stream.allocate(counting.peak_bytes(), "the optimiser")?;
        let places = Places::arrange(&Arena::over(memory.view()), &table);
        stream.fill(memory.view(), 0)?;
        table.upload(stream, places.table)?;
        Ok(Self {
            recorded: None,
            config: options.adamw,
            table,
            names: tensors.into_iter().map(|(name, _)| name).collect(),
            places,
            memory,
            runs: 0,
        })
    }

    pub(crate) fn forget_graph(&mut self) {
        self.recorded = None;
    }

    pub(crate) fn num_bytes(&self) -> usize {
        self.memory.view().bytes()
    }

    /// Moves the factors. Returns the gradients' norm, and whether nothing was changed because it is not finite.
    pub(crate) fn step(
        &mut self,
        stream: &Stream,
        t: Half,
        factors: &DeviceFactors,
        hyper: &StepHyper,
        use_graph: bool,
    ) -> Result<(f32, bool), CudaError> {
        stream.upload(self.places.learning_rate, &[hyper.learning_rate])?;
        let StepHyper {
            unscale,
            max_grad_norm,
            ..
        } = *hyper;
        match &self.recorded {
            Some((graph, u, m)) if (*u, *m) == (unscale, max_grad_norm) => stream.replay(graph)?,
            _ if use_graph && self.runs > 0 => {
                let graph = stream.capture(|| self.run(stream, t, factors, hyper))?;
                stream.replay(&graph)?;
                self.recorded = Some((graph, unscale, max_grad_norm));
            }
            _ => self.run(stream, t, factors, hyper)?,
        }
        self.runs += 1;
        let outcome = stream.download::<u32>(self.places.outcome, 2)?;
        Ok((f32::from_bits(outcome[0]), outcome[1] != 0))
    }

    fn run(
        &self,
        stream: &Stream,
        t: Half,
        factors: &DeviceFactors,
        hyper: &StepHyper,
    ) -> Result<(), CudaError> {
        let p = &self.places;
        let (norm, flag) = (p.outcome.take(4), p.outcome.skip(4));
        let gradients = factors.gradients();
        let n = factors.num_parameters();
        factors.collect_gradients(stream, t)?;
        optimizer::sum_squares(stream, norm, gradients, n, hyper.unscale, p.partials)?;
        optimizer::clip_factor(
            stream,
            p.factor,
            flag,
            norm,
            hyper.max_grad_norm,
            hyper.unscale,
        )?;
        optimizer::step_numbers(
            stream,
            p.numbers,
            p.steps,
            flag,
            p.learning_rate,
            &self.config,
        )?;
        let step = Step {
            parameters: factors.masters(),
            shadow: None,
            gradients,
            table: p.table,
            factor: p.factor,
            flag,
            numbers: p.numbers,
        };
        let moments = EightBitMoments {
            first: p.codes[0],
            first_absmax: p.scales[0],
            second: p.codes[1],
            second_absmax: p.scales[1],
        };
        optimizer::adamw_8bit(stream, t, &self.table, &step, &moments)?;
        optimizer::adamw_f32(stream, t, &self.table, &step, p.full[0], p.full[1])?;
        factors.pack(stream, t)
    }

    /// Steps taken and all moments.
    pub(crate) fn export(&self, stream: &Stream) -> Result<(u64, Vec<StatePart>), CudaError> {
        let steps = stream.download::<u32>(self.places.steps, 1)?[0];
        let mut parts = Vec::new();
        for (name, place) in self.names.iter().zip(self.table.places()) {
            for (i, role) in ["first", "second"].into_iter().enumerate() {
                let mut push = |name, values| parts.push(StatePart { name, values });
                match place {
                    TensorPlace::Full { moments } => {
                        let view = self.places.full[i].skip(4 * moments.start);
                        let values = stream.download(view, moments.len())?;
                        push(format!("{name}.{role}"), StateValues::F32(values));
                    }
                    TensorPlace::EightBit { codes, scales } => {
                        let view = self.places.codes[i].skip(codes.start);
                        let values = stream.download(view, codes.len())?;
                        push(format!("{name}.{role}"), StateValues::U8(values));
                        let view = self.places.scales[i].skip(4 * scales.start);
                        let values = stream.download(view, scales.len())?;
                        push(format!("{name}.{role}.absmax"), StateValues::F32(values));
                    }
                }
            }
        }
        Ok((u64::from(steps), parts))
    }

    /// Takes over saved moments. On an error nothing has changed.
    pub(crate) fn import(
        &mut self,
        stream: &Stream,
        num_steps: u64,
        parts: Vec<StatePart>,
    ) -> Result<(), ImportError> {
        let wrong = |part: &str, expected: String, found: String| {
            ImportError::State(ModelError::State {
                part: part.to_owned(),
                expected,
                found,
            })
        };
        let mut by_name: BTreeMap<String, StateValues> = parts
            .into_iter()
            .map(|part| (part.name, part.values))
            .collect();
        let mut copies: Vec<(View, StateValues)> = Vec::new();
        for (name, place) in self.names.iter().zip(self.table.places()) {
            for (i, role) in ["first", "second"].into_iter().enumerate() {
                let mut wanted: Vec<(String, View, usize, bool)> = Vec::new();
                match place {
                    TensorPlace::Full { moments } => {
                        let view = self.places.full[i].skip(4 * moments.start);
                        wanted.push((format!("{name}.{role}"), view, moments.len(), false));
                    }
                    TensorPlace::EightBit { codes, scales } => {
                        let view = self.places.codes[i].skip(codes.start);
                        wanted.push((format!("{name}.{role}"), view, codes.len(), true));
                        let view = self.places.scales[i].skip(4 * scales.start);
                        wanted.push((format!("{name}.{role}.absmax"), view, scales.len(), false));
                    }
                }
                for (part, view, len, in_bytes) in wanted {
                    let expected =
                        format!("{len} numbers ({})", ["f32", "u8"][usize::from(in_bytes)]);
                    let values = by_name
                        .remove(&part)
                        .ok_or_else(|| wrong(&part, expected.clone(), "nothing".to_owned()))?;
                    let found = match &values {
                        StateValues::F32(values) => (values.len(), false),
                        StateValues::U8(values) => (values.len(), true),
                    };
                    if found != (len, in_bytes) {
                        let kind = ["f32", "u8"][usize::from(found.1)];
                        return Err(wrong(
                            &part,
                            expected,
                            format!("{} numbers ({kind})", found.0),
                        ));
                    }
                    copies.push((view, values));
                }
            }
        }
        if let Some((part, _)) = by_name.pop_first() {
            return Err(wrong(&part, "no such part".to_owned(), "one".to_owned()));
        }
        let steps = u32::try_from(num_steps).map_err(|_| {
            wrong(
                "number of steps",
                "fewer than 2^32".to_owned(),
                num_steps.to_string(),
            )
        })?;
        for (view, values) in &copies {
            match values {
                StateValues::F32(values) => stream.upload(*view, values),
                StateValues::U8(values) => stream.upload(*view, values),
            }
            .map_err(ImportError::Cuda)?;
        }
        stream
            .upload(self.places.steps, &[steps])
            .map_err(ImportError::Cuda)
    }
}
