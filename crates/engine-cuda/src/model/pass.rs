//! The whole network: embeddings, modulations, blocks, velocity; and back again.
//!
//! A forward pass for training leaves each block's input, and what the block keeps unless it is to be recomputed, on
//! the arena's stack; the backward pass takes blocks from the top and gives their memory back one by one. Gradients of
//! tokens lie below all that.

use crate::arena::Mark;
use crate::error::CudaError;
use crate::model::double::KeptDouble;
use crate::model::joint::Joint;
use crate::model::linear::{Cx, Linear};
use crate::model::modulations::Modulations;
use crate::model::network::Network;
use crate::model::single::KeptSingle;
use crate::model::sizes::STREAMS;
use crate::view::View;

/// What conditions a pass, one row per sample.
#[derive(Clone, Copy, Debug)]
pub struct Conditions {
    /// Noise levels times 1000, `f32 [rows]`.
    pub times: View,
    /// Guidance scales times 1000, `f32 [rows]`, for models with a guidance embedding.
    pub guidance: Option<View>,
    /// Pooled captions, `f32 [rows, pooled]`.
    pub pooled: View,
}

impl Network {
    /// Modulation vectors of all blocks, f32 `[rows, width]`; nothing is kept for a way back.
    ///
    /// # Panics
    ///
    /// If there is a guidance embedder and no guidance scale.
    pub fn modulate(
        &self,
        cx: &Cx<'_>,
        out: View,
        conditions: &Conditions,
        rows: usize,
    ) -> Result<(), CudaError> {
        let mark = cx.arena.mark();
        self.modulate_kept(cx, out, conditions, rows)?;
        cx.arena.release(mark);
        Ok(())
    }

    /// The layers that give modulation vectors, and at which element of a sample theirs begin.
    pub(crate) fn modulation_layers(&self) -> Vec<(&Linear, usize)> {
        let sizes = &self.sizes;
        let double = self.double.iter().enumerate().flat_map(|(i, block)| {
            let streams = block.streams.iter().enumerate();
            streams.map(move |(s, weights)| {
                let offset = sizes.double_modulation(i) + 6 * s * sizes.d;
                (&weights.norm, offset)
            })
        });
        let single = self.single.iter().enumerate();
        let single = single.map(|(i, block)| (&block.norm, sizes.single_modulation(i)));
        double
            .chain(single)
            .chain([(&self.norm_out, sizes.out_modulation())])
            .collect()
    }
}

/// Tokens that go in: T, text `[b·text, joint_attention_dim]` and image `[b·image, in_channels]`.
pub type Tokens = [View; 2];

/// What a block leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing that a backward pass will read.
    Nothing,
    /// What a backward pass could only compute again with the block's large products.
    Products,
    /// Everything that a backward pass reads. Where all weights are trained, that is always kept.
    All,
}

impl Keep {
    /// In a forward pass before a backward pass, for a block that is computed again there or is not.
    fn of_forward(recompute: bool) -> Self {
        match recompute {
            true => Self::Nothing,
            false => Self::Products,
        }
    }
}

/// One pass over the blocks.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    /// Weights.
    pub network: &'a Network,
    /// Sizes and positions.
    pub joint: Joint<'a>,
    /// Modulation vectors of the batch.
    pub modulations: Modulations,
}

/// What a forward pass leaves for the backward pass.
pub struct Kept {
    tokens: Tokens,
    /// `x·Aᵀ` of the two embedders and of the last layer.
    inner: [Option<View>; 3],
    /// Inputs of double blocks, text and image.
    double_inputs: Vec<[View; 2]>,
    /// Inputs of single blocks, and at last their output.
    single_inputs: Vec<View>,
    double: Vec<Option<KeptDouble>>,
    single: Vec<Option<KeptSingle>>,
    /// The stack's top before each block's memory was taken.
    marks: Vec<Mark>,
    /// Gradients of the joined tokens and of its two streams.
    gradient: View,
    gradients: [View; 2],
    head: Option<AllOfHead>,
}

/// What the last norm keeps where all weights are trained.
#[derive(Clone, Copy)]
struct AllOfHead {
    normed: View,
    stats: View,
}

impl Pass<'_> {
    /// Whether gradients of gates are wanted.
    fn gates(&self) -> bool {
        self.modulations.gradient.is_some()
    }

    fn embedders(&self) -> [&Linear; 2] {
        [&self.network.context_embedder, &self.network.x_embedder]
    }

    /// Velocity without anything kept: T `[b·image, velocity channels]`.
    pub fn forward(&self, cx: &Cx<'_>, velocity: View, tokens: Tokens) -> Result<(), CudaError> {
        let (joint, network) = (&self.joint, self.network);
        let d = joint.sizes.d;
        let mark = cx.arena.mark();
        let joined = cx.half(joint.shape.all_rows() * d);
        let x = STREAMS.map(|s| joint.room(cx, joined, s));
        for s in STREAMS {
            let rows = joint.shape.rows(s);
            let mark = cx.arena.mark();
            let embedder = self.embedders()[s];
            let inner = embedder.keep(cx, rows);
            embedder.forward(cx, x[s], d, tokens[s], rows, inner)?;
            cx.arena.release(mark);
        }
        for (i, block) in network.double.iter().enumerate() {
            let mark = cx.arena.mark();
            let kept = block.keep(cx, joint, self.gates(), Keep::Nothing);
            let offset = joint.sizes.double_modulation(i);
            block.forward(cx, joint, Some(x), x, &kept, (&self.modulations, offset))?;
            cx.arena.release(mark);
        }
        for s in STREAMS {
            joint.put(cx, joined, x[s], s)?;
        }
        for (i, block) in network.single.iter().enumerate() {
            let mark = cx.arena.mark();
            let kept = block.keep(cx, joint, self.gates(), Keep::Nothing);
            let offset = joint.sizes.single_modulation(i);
            let modulations = (&self.modulations, offset);
            block.forward(cx, joint, Some(joined), joined, &kept, modulations)?;
            cx.arena.release(mark);
        }
        let inner = network.proj_out.keep(cx, joint.shape.rows(1));
        self.head(cx, velocity, joined, inner, None)?;
        cx.arena.release(mark);
        Ok(())
    }

    /// The last norm of the image tokens and the velocity.
    fn head(
        &self,
        cx: &Cx<'_>,
        velocity: View,
        joined: View,
        inner: Option<View>,
        all: Option<AllOfHead>,
    ) -> Result<(), CudaError> {
        let rows = self.joint.shape.rows(1);
        let channels = self.joint.sizes.config.velocity_channels();
        let mark = cx.arena.mark();
        let normed = self.head_norm(cx, joined, all)?;
        self.network
            .proj_out
            .forward(cx, velocity, channels, normed, rows, inner)?;
        cx.arena.release(mark);
        Ok(())
    }

    /// Where shift and scale of the last norm lie: its layer gives the scale first.
    fn head_places(&self) -> [usize; 2] {
        let offset = self.joint.sizes.out_modulation();
        [offset + self.joint.sizes.d, offset]
    }

    fn head_norm(
        &self,
        cx: &Cx<'_>,
        joined: View,
        all: Option<AllOfHead>,
    ) -> Result<View, CudaError> {
        let (joint, d) = (&self.joint, self.joint.sizes.d);
        let rows = joint.shape.rows(1);
        let image = joint.part(cx, joined, 1)?;
        let normed = all.map_or_else(|| cx.half(rows * d), |all| all.normed);
        let (stats, samples) = (all.map(|all| all.stats), joint.samples(1));
        self.modulations
            .norm(cx, self.head_places(), normed, stats, image, samples)?;
        Ok(normed)
    }

    /// Velocity, and what the backward pass needs. `recompute` has a flag per block, double ones first.
    ///
    /// # Panics
    ///
    /// If there is not one flag per block.
    pub fn forward_kept(
        &self,
        cx: &Cx<'_>,
        velocity: View,
        tokens: Tokens,
        recompute: &[bool],
    ) -> Result<Kept, CudaError> {
        let (joint, network) = (&self.joint, self.network);
        assert_eq!(
            recompute.len(),
            joint.sizes.num_blocks(),
            "one flag per block"
        );
        let (recompute_double, recompute_single) = recompute.split_at(network.double.len());
        let d = joint.sizes.d;
        let all = joint.shape.all_rows() * d;
        let gradient = cx.half(all);
        let gradients = STREAMS.map(|s| joint.room(cx, gradient, s));
        let mut inner = [None; 3];
        let last = network.proj_out.keep(cx, joint.shape.rows(1));
        let mut x = STREAMS.map(|s| cx.half(joint.shape.rows(s) * d));
        for s in STREAMS {
            let rows = joint.shape.rows(s);
            let embedder = self.embedders()[s];
            inner[s] = embedder.keep(cx, rows);
            embedder.forward(cx, x[s], d, tokens[s], rows, inner[s])?;
        }
        inner[2] = last;
        let mut kept = Kept {
            tokens,
            inner,
            double_inputs: Vec::new(),
            single_inputs: Vec::new(),
            double: Vec::new(),
            single: Vec::new(),
            marks: Vec::new(),
            gradient,
            gradients,
            head: None,
        };
        for (i, (block, &recompute)) in network.double.iter().zip(recompute_double).enumerate() {
            kept.marks.push(cx.arena.mark());
            kept.double_inputs.push(x);
            let out = STREAMS.map(|s| cx.half(joint.shape.rows(s) * d));
            let mark = cx.arena.mark();
            let keep = Keep::of_forward(recompute);
            let kept_block = block.keep(cx, joint, self.gates(), keep);
            let offset = joint.sizes.double_modulation(i);
            block.forward(
                cx,
                joint,
                Some(out),
                x,
                &kept_block,
                (&self.modulations, offset),
            )?;
            if recompute {
                cx.arena.release(mark);
            }
            kept.double.push((!recompute).then_some(kept_block));
            x = out;
        }
        let mut joined = cx.half(all);
        for s in STREAMS {
            let (to, stride, width) = joint.rectangle(joined, s);
            cx.stream
                .copy_rows(to, stride, x[s], width, width, joint.shape.b)?;
        }
        for (i, (block, &recompute)) in network.single.iter().zip(recompute_single).enumerate() {
            kept.marks.push(cx.arena.mark());
            kept.single_inputs.push(joined);
            let out = cx.half(all);
            let mark = cx.arena.mark();
            let keep = Keep::of_forward(recompute);
            let kept_block = block.keep(cx, joint, self.gates(), keep);
            let offset = joint.sizes.single_modulation(i);
            let modulations = (&self.modulations, offset);
            block.forward(cx, joint, Some(out), joined, &kept_block, modulations)?;
            if recompute {
                cx.arena.release(mark);
            }
            kept.single.push((!recompute).then_some(kept_block));
            joined = out;
        }
        kept.single_inputs.push(joined);
        kept.head = network.proj_out.gradients.map(|_| {
            let rows = joint.shape.rows(1);
            AllOfHead {
                normed: cx.half(rows * d),
                stats: cx.f32(2 * rows),
            }
        });
        self.head(cx, velocity, joined, last, kept.head)?;
        Ok(kept)
    }

    /// From the velocity's gradient to those of all factors, which are added to what is there, or of weights and
    /// modulations, which are overwritten.
    pub fn backward(&self, cx: &Cx<'_>, dvelocity: View, mut kept: Kept) -> Result<(), CudaError> {
        let (joint, network) = (&self.joint, self.network);
        self.head_backward(cx, dvelocity, &kept)?;
        let trained_embedders = self.embedders().map(Linear::needs_input);
        // The first norms' vectors have gradients too.
        let reaches_start =
            trained_embedders.contains(&true) || self.modulations.gradient.is_some();
        for i in (0..network.single.len()).rev() {
            let block = &network.single[i];
            let x = kept.single_inputs[i];
            let modulations = (&self.modulations, joint.sizes.single_modulation(i));
            let kept_block = match kept.single[i] {
                Some(kept_block) => kept_block,
                None => {
                    let kept_block = block.keep(cx, joint, self.gates(), Keep::All);
                    // The output is known: the products behind what is kept are left out.
                    block.forward(cx, joint, None, x, &kept_block, modulations)?;
                    kept_block
                }
            };
            let reaches = reaches_start || i > 0 || !network.double.is_empty();
            block.backward(
                cx,
                joint,
                kept.gradient,
                x,
                &kept_block,
                modulations,
                reaches,
            )?;
            release_last(cx, &mut kept.marks);
        }
        for s in STREAMS {
            joint.fetch(cx, kept.gradients[s], kept.gradient, s)?;
        }
        for i in (0..network.double.len()).rev() {
            let block = &network.double[i];
            let x = kept.double_inputs[i];
            let modulations = (&self.modulations, joint.sizes.double_modulation(i));
            let kept_block = match kept.double[i] {
                Some(kept_block) => kept_block,
                None => {
                    let kept_block = block.keep(cx, joint, self.gates(), Keep::All);
                    block.forward(cx, joint, None, x, &kept_block, modulations)?;
                    kept_block
                }
            };
            let reaches = reaches_start || i > 0;
            block.backward(
                cx,
                joint,
                kept.gradients,
                x,
                &kept_block,
                modulations,
                reaches,
            )?;
            release_last(cx, &mut kept.marks);
        }
        for s in STREAMS {
            if trained_embedders[s] {
                let rows = joint.shape.rows(s);
                let (gradient, x) = (kept.gradients[s], kept.tokens[s]);
                self.embedders()[s].backward(cx, None, gradient, Some(x), rows, kept.inner[s])?;
            }
        }
        Ok(())
    }

    /// From the velocity's gradient to that of the last block's output; text has none.
    fn head_backward(&self, cx: &Cx<'_>, dvelocity: View, kept: &Kept) -> Result<(), CudaError> {
        let (joint, d) = (&self.joint, self.joint.sizes.d);
        let rows = joint.shape.rows(1);
        let joined = *kept.single_inputs.last().expect("the last output is there");
        let mark = cx.arena.mark();
        let dnormed = cx.half(rows * d);
        let proj_out = &self.network.proj_out;
        let normed = match (kept.head, proj_out.needs_input()) {
            (Some(all), _) => Some(all.normed),
            (None, true) => Some(self.head_norm(cx, joined, None)?),
            (None, false) => None,
        };
        proj_out.backward(cx, Some(dnormed), dvelocity, normed, rows, kept.inner[2])?;
        let image = joint.part(cx, joined, 1)?;
        cx.stream.fill(kept.gradient, 0)?;
        let of = (image, kept.head.map(|all| all.stats));
        let (dx, samples) = (kept.gradients[1], joint.samples(1));
        self.modulations
            .norm_backward(cx, self.head_places(), dx, dnormed, of, samples, false)?;
        joint.put(cx, kept.gradient, kept.gradients[1], 1)?;
        cx.arena.release(mark);
        Ok(())
    }
}

fn release_last(cx: &Cx<'_>, marks: &mut Vec<Mark>) {
    cx.arena.release(marks.pop().expect("one mark per block"));
}
