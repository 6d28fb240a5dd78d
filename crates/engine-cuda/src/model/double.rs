//! A double block, forward and backward: text and image with their own weights, joined in attention.
//!
//! Kept from forward to backward, per token and stream: the products before the head norms (3d), the sum after
//! attention (d) and the MLP's hidden values before GELU (4d); attention's output (d) and sums; `x·Aᵀ` of adapted
//! layers. Everything else is cheap to compute again: norms, GELU, turned queries and keys. Where modulations are
//! trained, what is gated (2d) is kept too; where all weights are, or the backward pass follows at once, everything that
//! it reads.
//!
//! Source: `FluxTransformerBlock`, diffusers 0.42; the backward pass is derived by hand.

use crate::error::CudaError;
use crate::half_type::Half;
use crate::model::joint::{Joint, Qkv};
use crate::model::linear::Cx;
use crate::model::modulations::Modulations;
use crate::model::network::{DoubleStream, DoubleWeights};
use crate::model::pass::Keep;
use crate::model::sizes::STREAMS;
use crate::ops::elementwise;
use crate::view::View;

/// What a stream keeps.
#[derive(Clone, Copy, Debug)]
pub struct KeptStream {
    qkv: View,
    sum: View,
    hidden: View,
    /// `x·Aᵀ` of qkv, out, up, down.
    inner: [Option<View>; 4],
    /// Outputs of out and down, where gradients of their gates are wanted.
    updates: Option<[View; 2]>,
    all: Option<AllOfStream>,
}

/// What a stream keeps besides where it pays, so that nothing is computed twice.
#[derive(Clone, Copy, Debug)]
struct AllOfStream {
    /// Inputs of qkv and up.
    normed: [View; 2],
    /// The norms' statistics, `f32 [rows, 2]`, where gradients of their vectors want them.
    stats: Option<[View; 2]>,
    /// The input of out, where all weights are trained.
    mixed: Option<View>,
    /// The input of down, if that layer is trained.
    activated: Option<View>,
}

/// What a double block keeps.
#[derive(Clone, Copy, Debug)]
pub struct KeptDouble {
    streams: [KeptStream; 2],
    o: View,
    sums: View,
    /// Queries, keys and values as attention reads them, where everything is kept.
    qkv: Option<Qkv>,
}

impl DoubleWeights {
    /// Memory for what is kept; `gates` says whether gradients of the gates are wanted.
    pub fn keep(&self, cx: &Cx<'_>, joint: &Joint<'_>, gates: bool, keep: Keep) -> KeptDouble {
        let (d, all_trained) = (joint.sizes.d, self.all_trained());
        let all = all_trained || keep == Keep::All;
        let streams = STREAMS.map(|s| {
            let rows = joint.shape.rows(s);
            let w = &self.streams[s];
            KeptStream {
                qkv: cx.half(rows * 3 * d),
                sum: cx.half(rows * d),
                hidden: cx.half(rows * joint.sizes.mlp),
                inner: [&w.qkv, &w.out, &w.up, &w.down].map(|linear| linear.keep(cx, rows)),
                updates: gates.then(|| [cx.half(rows * d), cx.half(rows * d)]),
                all: all.then(|| AllOfStream {
                    normed: [cx.half(rows * d), cx.half(rows * d)],
                    stats: all_trained.then(|| [cx.f32(2 * rows), cx.f32(2 * rows)]),
                    mixed: all_trained.then(|| cx.half(rows * d)),
                    activated: (w.down.needs_input()).then(|| cx.half(rows * joint.sizes.mlp)),
                }),
            }
        });
        let rows = joint.shape.all_rows();
        KeptDouble {
            streams,
            o: cx.half(rows * d),
            sums: cx.f32(rows * joint.sizes.h),
            qkv: all.then(|| joint.qkv(cx)),
        }
    }

    /// Whether the weights themselves are trained, and with them the modulations.
    fn all_trained(&self) -> bool {
        self.streams[0].norm_gradients.is_some()
    }

    /// T `[rows, d]` of text and image → the same in `out` (which may be `x`). Without `out` only what is kept is
    /// computed, to the same bits.
    pub fn forward(
        &self,
        cx: &Cx<'_>,
        joint: &Joint<'_>,
        out: Option<[View; 2]>,
        x: [View; 2],
        kept: &KeptDouble,
        (modulations, offset): (&Modulations, usize),
    ) -> Result<(), CudaError> {
        let d = joint.sizes.d;
        let mark = cx.arena.mark();
        let qkv = kept.qkv.unwrap_or_else(|| joint.qkv(cx));
        for s in STREAMS {
            let rows = joint.shape.rows(s);
            let w = &self.streams[s];
            let mark = cx.arena.mark();
            let all = kept.streams[s].all;
            let normed = all.map_or_else(|| cx.half(rows * d), |all| all.normed[0]);
            let stats = all.and_then(|all| all.stats).map(|[first, _]| first);
            let places = [0, 1].map(|i| offset + (6 * s + i) * d);
            modulations.norm(cx, places, normed, stats, x[s], joint.samples(s))?;
            let [inner, ..] = kept.streams[s].inner;
            w.qkv
                .forward(cx, kept.streams[s].qkv, 3 * d, normed, rows, inner)?;
            joint.split(cx, qkv, kept.streams[s].qkv, w.norms, joint.stream(s))?;
            cx.arena.release(mark);
        }
        joint.attend(cx, kept.o, d, kept.sums, qkv)?;
        cx.arena.release(mark);

        for s in STREAMS {
            let rows = joint.shape.rows(s);
            let samples = joint.samples(s);
            let (w, kept_s) = (&self.streams[s], &kept.streams[s]);
            let [_, _, gate_msa, shift_mlp, scale_mlp, gate_mlp] =
                std::array::from_fn(|i| offset + (6 * s + i) * d);
            let [_, inner_out, inner_up, inner_down] = kept_s.inner;
            let mark = cx.arena.mark();
            let all = kept_s.all;
            let mixed = match all.and_then(|all| all.mixed) {
                None => joint.part(cx, kept.o, s)?,
                Some(mixed) => joint.fetch_into(cx, mixed, kept.o, s)?,
            };
            let updates = kept_s.updates;
            let y = updates.map_or_else(|| cx.half(rows * d), |[y, _]| y);
            w.out.forward(cx, y, d, mixed, rows, inner_out)?;
            // Unless it is kept, `y` is used again for the normed sum, and at last for the MLP's output.
            let normed = match (all, updates) {
                (Some(all), _) => all.normed[1],
                (None, Some(_)) => cx.half(rows * d),
                (None, None) => y,
            };
            let stats = all.and_then(|all| all.stats).map(|[_, second]| second);
            let shifts = [shift_mlp, scale_mlp];
            modulations.gate_and_norm(
                cx,
                (gate_msa, shifts),
                (kept_s.sum, normed),
                stats,
                x[s],
                y,
                samples,
            )?;
            let mlp = joint.sizes.mlp;
            w.up.forward(cx, kept_s.hidden, mlp, normed, rows, inner_up)?;
            if out.is_none() && !w.down.needs_input() && updates.is_none() {
                cx.arena.release(mark);
                continue;
            }
            let activated = all.and_then(|all| all.activated);
            let hidden = activated.unwrap_or_else(|| cx.half(rows * mlp));
            elementwise::gelu_tanh(cx.stream, cx.t, hidden, kept_s.hidden, rows, mlp, mlp, mlp)?;
            if out.is_none() && updates.is_none() {
                w.down.forward_inner(cx, hidden, rows, inner_down)?;
                cx.arena.release(mark);
                continue;
            }
            let y = updates.map_or(y, |[_, y]| y);
            w.down.forward(cx, y, d, hidden, rows, inner_down)?;
            let Some(out) = out else {
                cx.arena.release(mark);
                continue;
            };
            // Upstream clips the text stream only: it is the one that overflows.
            let clip = s == 0 && cx.t == Half::F16;
            modulations.gate(cx, gate_mlp, out[s], kept_s.sum, y, samples, clip)?;
            cx.arena.release(mark);
        }
        Ok(())
    }

    /// Turns `gradient` (of both outputs) into that of both inputs, and adds the factors' gradients or writes those of
    /// weights and modulations.
    ///
    /// Where `reaches_input` is false, nothing before the block is trained, and `gradient` is left undefined.
    #[allow(clippy::too_many_arguments)] // what the pass has at hand
    pub fn backward(
        &self,
        cx: &Cx<'_>,
        joint: &Joint<'_>,
        gradient: [View; 2],
        x: [View; 2],
        kept: &KeptDouble,
        (modulations, offset): (&Modulations, usize),
        reaches_input: bool,
    ) -> Result<(), CudaError> {
        let d = joint.sizes.d;
        for s in STREAMS {
            let of = (modulations, offset + 6 * s * d);
            self.mlp_backward(cx, joint, s, gradient[s], kept, of)?;
        }

        let mark = cx.arena.mark();
        let d_o = cx.half(joint.shape.all_rows() * d);
        for s in STREAMS {
            let rows = joint.shape.rows(s);
            let w: &DoubleStream = &self.streams[s];
            let room = joint.room(cx, d_o, s);
            let inside = cx.arena.mark();
            let dy = cx.half(rows * d);
            let gate = offset + (6 * s + 2) * d;
            let y = kept.streams[s].updates.map(|[y, _]| y);
            modulations.gate_backward(cx, gate, dy, gradient[s], (y, &w.out), joint.samples(s))?;
            let mixed = kept.streams[s].all.and_then(|all| all.mixed);
            let mixed = match (mixed, w.out.needs_input()) {
                (Some(mixed), _) => Some(mixed),
                (None, true) => Some(joint.part(cx, kept.o, s)?),
                (None, false) => None,
            };
            let inner = kept.streams[s].inner[1];
            w.out.backward(cx, Some(room), dy, mixed, rows, inner)?;
            joint.put(cx, d_o, room, s)?;
            cx.arena.release(inside);
        }
        let qkv = match kept.qkv {
            Some(qkv) => qkv,
            None => {
                let qkv = joint.qkv(cx);
                for s in STREAMS {
                    let norms = self.streams[s].norms;
                    joint.split(cx, qkv, kept.streams[s].qkv, norms, joint.stream(s))?;
                }
                qkv
            }
        };
        let dqkv = joint.qkv(cx);
        joint.attend_backward(cx, dqkv, (d_o, d), (kept.o, d), kept.sums, qkv)?;
        for s in STREAMS {
            let rows = joint.shape.rows(s);
            let w = &self.streams[s];
            let inside = cx.arena.mark();
            let dproducts = cx.half(rows * 3 * d);
            let saved = kept.streams[s].qkv;
            let (norms, gradients) = (w.norms, w.qkv.head_gradients(w.norm_gradients));
            let shape = joint.stream(s);
            joint.split_backward(cx, dproducts, dqkv, saved, norms, gradients, shape)?;
            let places = [0, 1].map(|i| offset + (6 * s + i) * d);
            let samples = joint.samples(s);
            let all = kept.streams[s].all;
            let normed = match (all, w.qkv.needs_input()) {
                (Some(all), _) => Some(all.normed[0]),
                (None, true) => {
                    let normed = cx.half(rows * d);
                    modulations.norm(cx, places, normed, None, x[s], samples)?;
                    Some(normed)
                }
                (None, false) => None,
            };
            let dnormed = reaches_input.then(|| cx.half(rows * d));
            let inner = kept.streams[s].inner[0];
            w.qkv
                .backward(cx, dnormed, dproducts, normed, rows, inner)?;
            if let Some(dnormed) = dnormed {
                let stats = all.and_then(|all| all.stats).map(|[first, _]| first);
                let of = (x[s], stats);
                modulations.norm_backward(cx, places, gradient[s], dnormed, of, samples, true)?;
            }
            cx.arena.release(inside);
        }
        cx.arena.release(mark);
        Ok(())
    }

    /// From the gradient of a stream's output to that of the sum after attention, in place.
    #[allow(clippy::too_many_arguments)] // what the block has at hand
    fn mlp_backward(
        &self,
        cx: &Cx<'_>,
        joint: &Joint<'_>,
        s: usize,
        gradient: View,
        kept: &KeptDouble,
        (modulations, offset): (&Modulations, usize),
    ) -> Result<(), CudaError> {
        let (d, mlp) = (joint.sizes.d, joint.sizes.mlp);
        let rows = joint.shape.rows(s);
        let (w, kept) = (&self.streams[s], &kept.streams[s]);
        let [_, _, inner_up, inner_down] = kept.inner;
        let mark = cx.arena.mark();
        let dy = cx.half(rows * d);
        let samples = joint.samples(s);
        let y = kept.updates.map(|[_, y]| y);
        modulations.gate_backward(cx, offset + 5 * d, dy, gradient, (y, &w.down), samples)?;
        let dhidden = cx.half(rows * mlp);
        let inside = cx.arena.mark();
        let activated = match (kept.all.and_then(|all| all.activated), w.down.needs_input()) {
            (Some(activated), _) => Some(activated),
            (None, true) => {
                let activated = cx.half(rows * mlp);
                elementwise::gelu_tanh(
                    cx.stream,
                    cx.t,
                    activated,
                    kept.hidden,
                    rows,
                    mlp,
                    mlp,
                    mlp,
                )?;
                Some(activated)
            }
            (None, false) => None,
        };
        w.down
            .backward(cx, Some(dhidden), dy, activated, rows, inner_down)?;
        cx.arena.release(inside);
        w.up.gelu_backward(
            cx,
            (dhidden, mlp),
            (dhidden, mlp),
            (kept.hidden, mlp),
            rows,
            0..mlp,
        )?;
        let places = [3, 4].map(|i| offset + i * d);
        let normed = match (kept.all, w.up.needs_input()) {
            (Some(all), _) => Some(all.normed[1]),
            (None, true) => {
                let normed = cx.half(rows * d);
                modulations.norm(cx, places, normed, None, kept.sum, samples)?;
                Some(normed)
            }
            (None, false) => None,
        };
        // `dy` is used up: it now takes the gradient of the normed sum.
        w.up.backward(cx, Some(dy), dhidden, normed, rows, inner_up)?;
        let stats = kept.all.and_then(|all| all.stats);
        let of = (kept.sum, stats.map(|[_, second]| second));
        modulations.norm_backward(cx, places, gradient, dy, of, samples, true)?;
        cx.arena.release(mark);
        Ok(())
    }
}
