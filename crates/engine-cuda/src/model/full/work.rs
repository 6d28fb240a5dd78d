//! What a step launches, and the memory that it finds in fixed places.

use crate::arena::Arena;
use crate::error::CudaError;
use crate::model::full::FullTrainer;
use crate::model::joint::Joint;
use crate::model::linear::{Cx, WeightScratch};
use crate::model::modulations::Modulations;
use crate::model::pass::{Conditions, Pass};
use crate::ops::average::{self, Averaged, NUMBERS};
use crate::ops::draw::{self, LatentSizes};
use crate::ops::elementwise;
use crate::ops::loss;
use crate::ops::optimizer::{self, SQUARES_PARTIALS};
use crate::stream::Stream;
use crate::view::View;

/// Fixed places on the device.
#[derive(Clone, Copy)]
pub(super) struct Places {
    /// Masters, moments, average, and the weights that the network computes with.
    pub(super) state: Averaged,
    pub(super) gradients: View,
    /// `f32` loss and norm, then the `u32` flag.
    pub(super) outcome: View,
    factor: View,
    partials: View,
    /// What is copied to the device at each step: the five views below, one behind the other.
    pub(super) slot: View,
    seed: View,
    numbers: View,
    pictures: View,
    texts: View,
    sigmas: View,
    times: View,
    pub(super) guidance: View,
    pub(super) ones: View,
}

impl Places {
    pub(super) fn arrange(arena: &Arena, len: usize, b: usize) -> Self {
        let f32 = |n: usize| arena.take(4 * n);
        let state = Averaged {
            values: f32(len),
            first: f32(len),
            second: f32(len),
            averaged: f32(len),
            shadow: arena.take(2 * len),
        };
        let slot = arena.take(8 + 4 * (NUMBERS + 4 * b));
        let mut rest = slot;
        let mut next = |bytes: usize| {
            let view = rest.take(bytes);
            rest = rest.skip(bytes);
            view
        };
        Self {
            state,
            gradients: f32(len),
            outcome: arena.take(12),
            factor: f32(1),
            partials: arena.take(8 * SQUARES_PARTIALS),
            slot,
            seed: next(8),
            numbers: next(4 * NUMBERS),
            pictures: next(4 * b),
            texts: next(4 * b),
            sigmas: next(4 * b),
            times: next(4 * b),
            guidance: f32(b),
            ones: f32(b),
        }
    }
}

impl FullTrainer {
    /// Makes room for activations, once.
    pub(super) fn prepare(&mut self) -> Result<(), CudaError> {
        if self.activations.is_none() {
            let (dry, counting) = (Stream::dry(), Arena::counting());
            self.run(&self.cx(&dry, &counting), true)?;
            let bytes = counting.peak_bytes();
            self.activations = Some(self.stream.allocate(bytes, "activations")?);
        }
        Ok(())
    }

    /// The activations' stack, empty.
    pub(super) fn arena(&self) -> Arena {
        let slab = self.activations.as_ref().expect("room was made before");
        Arena::over(slab.view())
    }

    pub(super) fn cx<'a>(&self, stream: &'a Stream, arena: &'a Arena) -> Cx<'a> {
        Cx {
            stream,
            t: self.options.t,
            arena,
            weight_scratch: WeightScratch::new(arena, [0; 2]),
        }
    }

    /// A step on the batch whose numbers lie in the slot; without `update` only its loss and gradients.
    pub(super) fn run(&self, cx: &Cx<'_>, update: bool) -> Result<(), CudaError> {
        let (s, t, places) = (cx.stream, cx.t, &self.places);
        let (shape, config) = (self.options.shape, &self.sizes.config);
        let (latents, texts) = (self.latents(), self.texts());
        let b = shape.b;
        let per_sample = shape.image() * config.in_channels;
        let count = b * per_sample;
        let [h, w] = shape.latent_cells;

        let (noisy, target) = (cx.half(count), cx.f32(count));
        let sizes = LatentSizes {
            b,
            c: config.in_channels / 4,
            h,
            w,
            rows: latents.rows,
        };
        draw::draw(
            s,
            t,
            noisy,
            target,
            latents.mean.view(),
            latents.deviation.view(),
            places.pictures,
            places.sigmas,
            places.seed,
            sizes,
        )?;
        let gathered = |table: View, width: usize| -> Result<View, CudaError> {
            let rows = cx.half(b * width);
            draw::gather(s, t, rows, table, places.texts, b, texts.rows, width)?;
            Ok(rows)
        };
        let text_width = shape.text * config.joint_attention_dim;
        let text = gathered(texts.states.view(), text_width)?;
        let num_pooled = b * config.pooled_projection_dim;
        let pooled = cx.f32(num_pooled);
        let half = gathered(texts.pooled.view(), config.pooled_projection_dim)?;
        elementwise::to_f32(s, t, pooled, half, num_pooled)?;
        let conditions = Conditions {
            times: places.times,
            guidance: config.guidance_embeds.then_some(places.guidance),
            pooled,
        };

        let stride = self.sizes.modulation_width();
        let (vectors, dvectors) = (cx.f32(b * stride), cx.half(b * stride));
        let kept_conditions = self.network.modulate_kept(cx, vectors, &conditions, b)?;
        let pass = Pass {
            network: &self.network,
            joint: Joint {
                sizes: &self.sizes,
                shape,
                rope: self.positions.rope,
            },
            modulations: Modulations {
                view: vectors,
                stride,
                gradient: Some(dvectors),
            },
        };
        let (velocity, dvelocity) = (cx.half(count), cx.half(count));
        let partials = cx.f32(loss::LOSS_PARTIALS);
        let keep_all = vec![false; self.sizes.num_blocks()];
        let kept = pass.forward_kept(cx, velocity, [text, noisy], &keep_all)?;
        let loss = places.outcome.take(4);
        s.fill(loss, 0)?;
        loss::weighted_mse(
            s,
            t,
            loss,
            dvelocity,
            velocity,
            target,
            places.ones,
            partials,
            b,
            per_sample,
            count,
            self.options.loss_scale,
        )?;
        pass.backward(cx, dvelocity, kept)?;
        self.network
            .modulate_backward(cx, dvectors, &kept_conditions, b)?;
        match update {
            true => self.update(s),
            false => Ok(()),
        }
    }

    fn update(&self, s: &Stream) -> Result<(), CudaError> {
        let (places, t, n) = (&self.places, self.options.t, self.layout.len);
        let norm = places.outcome.skip(4).take(4);
        let flag = places.outcome.skip(8);
        let unscale = self.options.loss_scale.recip();
        optimizer::sum_squares(s, norm, places.gradients, n, unscale, places.partials)?;
        let most = self.options.max_grad_norm as f32;
        optimizer::clip_factor(s, places.factor, flag, norm, most, unscale)?;
        average::adamw_average(
            s,
            t,
            &places.state,
            places.gradients,
            places.factor,
            flag,
            places.numbers,
            n,
        )
    }
}
