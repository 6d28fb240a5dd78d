//! The backward pass: the same turns from the last to the first, down to the lowest factors and no further.
//!
//! Weights are frozen, so only gradients of rows are taken through the layers; every tile adds up its own share in the
//! gradients of the factors, and the shares are summed in the order of the tiles.

use rayon::prelude::*;

use crate::conditioning::Conditioning;
use crate::forward::{Shared, each_tile};
use crate::kernels::{
    Shift, add_products, gated, gelu, gelu_backward, modulate, modulate_backward,
    modulation_gradients, norm_and_turn_backward,
};
use crate::linear::{Linear, input_gradient};
use crate::model::{Block, Model, Projections};
use crate::workspace::{Head, IMAGE, SCRATCH, Scratch, TEXT, Tile, Workspace, sized};

/// How far gradients have to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reach {
    /// The lowest block that has to be gone through; the number of blocks if none.
    pub first_block: usize,
    /// Whether the embedders of tokens have factors.
    pub embedders: bool,
    /// Whether any modulation, or what they are made of, has factors.
    pub modulations: bool,
}

impl Reach {
    pub fn of(model: &Model) -> Self {
        let has = |layer: &Linear| layer.adapter.is_some();
        let embedders = has(&model.x_embedder) || has(&model.context_embedder);
        let conditioned = model
            .embedders()
            .any(|pair| has(&pair.first) || has(&pair.second));
        let attn = |p: &Projections| has(&p.q) || has(&p.k) || has(&p.v);
        let is_adapted = |block: &Block| match block {
            Block::Double(streams) => streams.iter().any(|stream| {
                let mlp = has(&stream.mlp.first) || has(&stream.mlp.second);
                attn(&stream.attn) || has(&stream.out) || has(&stream.norm) || mlp
            }),
            Block::Single(single) => {
                attn(&single.attn)
                    || [&single.norm, &single.mlp, &single.out]
                        .into_iter()
                        .any(has)
            }
        };
        let num_blocks = model.blocks.len();
        let first_block = if embedders || conditioned {
            0
        } else {
            model
                .blocks
                .iter()
                .position(is_adapted)
                .unwrap_or(num_blocks)
        };
        Self {
            first_block,
            embedders,
            modulations: conditioned || model.modulations().into_iter().any(has),
        }
    }

    /// Whether the gradient has to pass a block's first norm.
    fn passes(&self, block: usize) -> bool {
        block > self.first_block || self.embedders || self.modulations
    }
}

/// Gradients of all factors, given every image tile's `d_velocity` after a forward pass that kept its activations.
pub(crate) fn run(
    model: &Model,
    conditioning: &Conditioning,
    space: &mut Workspace,
    reach: Reach,
    num_gradients: usize,
) -> Vec<f32> {
    let per_sample = space.num_tiles_per_sample();
    let shared = Shared {
        model,
        conditioning,
        sizes: space.sizes,
        cos: &space.cos,
        sin: &space.sin,
        keeps_updates: reach.modulations,
    };
    let widths: Vec<usize> = model
        .modulations()
        .iter()
        .map(|layer| layer.out_features)
        .collect();
    let num_modulations = if reach.modulations {
        widths.iter().sum()
    } else {
        0
    };
    let back = Backward {
        shared,
        reach,
        offsets: widths
            .iter()
            .scan(0, |next, width| {
                *next += width;
                Some(*next - width)
            })
            .collect(),
    };
    let num_blocks = model.blocks.len();
    for block in (reach.first_block..=num_blocks).rev() {
        let heads = &space.heads;
        each_tile(&mut space.tiles, |tile, scratch| {
            if block == num_blocks {
                tile.gradients.clear();
                sized(&mut tile.gradients, num_gradients);
                tile.d_modulations.clear();
                sized(&mut tile.d_modulations, num_modulations);
                back.finish(tile, scratch);
            } else {
                back.enter(block, tile, heads, scratch);
            }
            if block > reach.first_block {
                back.leave(block - 1, tile, heads, scratch);
            } else if reach.embedders {
                back.embed(tile, scratch);
            }
        });
        if block > reach.first_block {
            let tiles = &space.tiles;
            space.heads.par_iter_mut().with_max_len(1).for_each(|head| {
                let tiles = &tiles[head.sample * per_sample..][..per_sample];
                SCRATCH.with_borrow_mut(|scratch| back.attend(block - 1, head, tiles, scratch));
            });
        }
    }

    let mut gradients = vec![0.0; num_gradients];
    for tile in &space.tiles {
        for (sum, share) in gradients.iter_mut().zip(&tile.gradients) {
            *sum += share;
        }
    }
    if reach.modulations {
        let mut d_modulations: Vec<Vec<f32>> = widths
            .iter()
            .map(|width| vec![0.0; width * space.sizes.num_samples])
            .collect();
        for tile in &space.tiles {
            let mut shares = &tile.d_modulations[..];
            for (sums, &width) in d_modulations.iter_mut().zip(&widths) {
                let (share, rest) = shares.split_at(width);
                shares = rest;
                let sums = &mut sums[tile.sample * width..(tile.sample + 1) * width];
                for (sum, share) in sums.iter_mut().zip(share) {
                    *sum += share;
                }
            }
        }
        conditioning.backward(model, &d_modulations, &mut gradients);
    }
    gradients
}

struct Backward<'a> {
    shared: Shared<'a>,
    reach: Reach,
    /// First number of each modulation layer among a tile's.
    offsets: Vec<usize>,
}

impl Backward<'_> {
    /// A tile's share in the gradient of vectors `range` of a block's modulation.
    fn shares<'t>(
        &self,
        block: usize,
        stream: usize,
        range: std::ops::Range<usize>,
        all: &'t mut [f32],
    ) -> &'t mut [f32] {
        let d = self.shared.width();
        let offset = self.offsets[self.shared.model.modulation_of(block, stream)];
        &mut all[offset + range.start * d..offset + range.end * d]
    }

    fn finish(&self, tile: &mut Tile, scratch: &mut Scratch) {
        let (arch, d) = (self.shared.arch(), self.shared.width());
        let size = tile.rows * d;
        sized(&mut tile.d_x, size).fill(0.0);
        if tile.stream != IMAGE {
            return;
        }
        let layer = &self.shared.model.proj_out;
        let x = &tile.x[self.shared.model.blocks.len()];
        let shift = self.shared.last_shift(tile);
        let inner = &mut scratch.inner[0];
        if layer.adapter.is_some() {
            let normed = scratch.normed.at_least(size);
            modulate(arch, x, shift, normed);
            layer.factor_gradients(
                arch,
                tile.rows,
                [normed, &tile.d_velocity],
                &mut tile.gradients,
                inner,
            );
        }
        if self.reach.first_block == self.shared.model.blocks.len() && !self.reach.modulations {
            return;
        }
        let d_normed = scratch.narrow.at_least(size);
        input_gradient(
            arch,
            tile.rows,
            [layer.backward_terms(&tile.d_velocity, inner)],
            d_normed,
        );
        modulate_backward(arch, x, shift, d_normed, &mut tile.d_x);
        if self.reach.modulations {
            let sums = scratch.narrow_too.at_least(2 * d);
            sums.fill(0.0);
            modulation_gradients(arch, x, d_normed, sums);
            let first = self.offsets[self.offsets.len() - 1];
            let (shift, scale) = sums.split_at(d);
            tile.d_modulations[first..first + d].copy_from_slice(scale);
            tile.d_modulations[first + d..first + 2 * d].copy_from_slice(shift);
        }
    }

    /// From a block's end back to attention's output.
    fn leave(&self, block: usize, tile: &mut Tile, heads: &[Head], scratch: &mut Scratch) {
        if !self.shared.model.is_read(block, tile.stream) {
            return;
        }
        match &self.shared.model.blocks[block] {
            Block::Double(streams) => {
                self.leave_double(block, &streams[tile.stream], tile, heads, scratch)
            }
            Block::Single(single) => self.leave_single(block, &single.out, tile, heads, scratch),
        }
    }

    fn leave_double(
        &self,
        block: usize,
        stream: &crate::model::Stream,
        tile: &mut Tile,
        heads: &[Head],
        scratch: &mut Scratch,
    ) {
        let shared = &self.shared;
        let (arch, rows, d) = (shared.arch(), tile.rows, shared.width());
        let size = rows * d;
        let kept = &tile.kept[shared.sizes.place(block)];
        let [_, _, gate_attn, shift, scale, gate_mlp] = shared.vectors::<6>(block, tile);
        let shift = Shift { shift, scale };
        let (first, second) = (&stream.mlp.first, &stream.mlp.second);
        let wide = first.out_features;
        let d_update = scratch.narrow.at_least(size);
        let d_wide = scratch.wide.at_least(rows * wide);
        let d_hidden = scratch.wide_too.at_least(rows * wide);
        let inner = &mut scratch.inner[0];

        gated(arch, &tile.d_x, gate_mlp, d_update);
        if second.adapter.is_some() {
            gelu(arch, &kept.hidden, wide, d_wide, wide);
            second.factor_gradients(arch, rows, [d_wide, d_update], &mut tile.gradients, inner);
        }
        input_gradient(arch, rows, [second.backward_terms(d_update, inner)], d_wide);
        gelu_backward(arch, &kept.hidden, wide, d_wide, wide, d_hidden);
        if first.adapter.is_some() {
            let normed = scratch.normed.at_least(size);
            modulate(arch, &kept.middle, shift, normed);
            first.factor_gradients(arch, rows, [normed, d_hidden], &mut tile.gradients, inner);
        }
        let d_normed = scratch.narrow_too.at_least(size);
        input_gradient(
            arch,
            rows,
            [first.backward_terms(d_hidden, inner)],
            d_normed,
        );
        if self.reach.modulations {
            let gate = self.shares(block, tile.stream, 5..6, &mut tile.d_modulations);
            add_products(arch, &tile.d_x, &kept.updates[1], gate);
            let sums = self.shares(block, tile.stream, 3..5, &mut tile.d_modulations);
            modulation_gradients(arch, &kept.middle, d_normed, sums);
        }
        modulate_backward(arch, &kept.middle, shift, d_normed, &mut tile.d_x);

        gated(arch, &tile.d_x, gate_attn, d_update);
        if self.reach.modulations {
            let gate = self.shares(block, tile.stream, 2..3, &mut tile.d_modulations);
            add_products(arch, &tile.d_x, &kept.updates[0], gate);
        }
        if stream.out.adapter.is_some() {
            let attended = scratch.normed.at_least(size);
            shared.attended(block, tile, heads, d, attended);
            stream.out.factor_gradients(
                arch,
                rows,
                [attended, d_update],
                &mut tile.gradients,
                inner,
            );
        }
        let terms = [stream.out.backward_terms(d_update, inner)];
        input_gradient(arch, rows, terms, sized(&mut tile.d_attn, size));
    }

    fn leave_single(
        &self,
        block: usize,
        out: &Linear,
        tile: &mut Tile,
        heads: &[Head],
        scratch: &mut Scratch,
    ) {
        let shared = &self.shared;
        let (arch, rows, d) = (shared.arch(), tile.rows, shared.width());
        let size = rows * d;
        let (both_width, wide) = (out.in_features, out.in_features - d);
        let [_, _, gate] = shared.vectors::<3>(block, tile);
        let d_update = scratch.narrow.at_least(size);
        let both = scratch.wide.at_least(rows * both_width);
        let inner = &mut scratch.inner[0];

        gated(arch, &tile.d_x, gate, d_update);
        if self.reach.modulations {
            let kept = &tile.kept[shared.sizes.place(block)];
            let gate = self.shares(block, tile.stream, 2..3, &mut tile.d_modulations);
            add_products(arch, &tile.d_x, &kept.updates[0], gate);
        }
        if out.adapter.is_some() {
            shared.mixed(block, tile, heads, both_width, both);
            out.factor_gradients(arch, rows, [both, d_update], &mut tile.gradients, inner);
        }
        input_gradient(arch, rows, [out.backward_terms(d_update, inner)], both);
        let d_attn = sized(&mut tile.d_attn, size);
        for (d_attn, both) in d_attn
            .chunks_exact_mut(d)
            .zip(both.chunks_exact(both_width))
        {
            d_attn.copy_from_slice(&both[..d]);
        }
        let hidden = &tile.kept[shared.sizes.place(block)].hidden;
        let d_hidden = sized(&mut tile.d_hidden, rows * wide);
        gelu_backward(arch, hidden, wide, &both[d..], both_width, d_hidden);
    }

    /// Attention of one head.
    fn attend(&self, block: usize, head: &mut Head, tiles: &[Tile], scratch: &mut Scratch) {
        let shared = &self.shared;
        let place = shared.sizes.place(block);
        let shape = shared.shape(block);
        let (d, dim) = (shared.width(), shape.dim);
        let attention = &mut scratch.attention;
        shared.gather(head.head, tiles, place, shape, attention);
        let d_out = attention.d_out.at_least(shape.num_tokens * dim);
        for tile in tiles.iter().filter(|tile| tile.first >= shape.first_query) {
            let rows = d_out[tile.first * dim..].chunks_exact_mut(dim);
            for (out, row) in rows.zip(tile.d_attn.chunks_exact(d)) {
                out.copy_from_slice(&row[head.head * dim..(head.head + 1) * dim]);
            }
        }
        let (_, softmax) = &head.kept[place];
        let [dq, dk, dv] = &mut head.gradients;
        attention.backward(shared.arch(), shape, softmax, [dq, dk, dv]);
    }

    /// From queries, keys and values back to a block's beginning.
    fn enter(&self, block: usize, tile: &mut Tile, heads: &[Head], scratch: &mut Scratch) {
        let shared = &self.shared;
        let (arch, rows, d) = (shared.arch(), tile.rows, shared.width());
        let size = rows * d;
        let is_read = shared.model.is_read(block, tile.stream);
        let (attn, mlp, shift) = match &shared.model.blocks[block] {
            Block::Double(streams) => {
                let [shift, scale, ..] = shared.vectors::<6>(block, tile);
                (&streams[tile.stream].attn, None, Shift { shift, scale })
            }
            Block::Single(single) => {
                let [shift, scale, _] = shared.vectors::<3>(block, tile);
                (&single.attn, Some(&single.mlp), Shift { shift, scale })
            }
        };
        let Projections { q, k, v, .. } = attn;
        let mlp = mlp.filter(|_| is_read);
        let layers = [Some(q).filter(|_| is_read), Some(k), Some(v), mlp];
        let passes = self.reach.passes(block);
        let is_adapted = layers
            .into_iter()
            .flatten()
            .any(|layer| layer.adapter.is_some());
        if !passes && !is_adapted {
            return;
        }

        let kept = &tile.kept[shared.sizes.place(block)];
        let [dq, dk, dv] = scratch.gradients.each_mut().map(|rows| rows.at_least(size));
        for (part, rows) in [(0, &mut *dq), (1, &mut *dk), (2, &mut *dv)] {
            if part > 0 || is_read {
                self.gather_gradients(part, tile, heads, rows);
            }
        }
        if is_read {
            norm_and_turn_backward(arch, &kept.raw_q, shared.turn(&attn.norm_q, tile), d, dq);
        }
        norm_and_turn_backward(arch, &kept.raw_k, shared.turn(&attn.norm_k, tile), d, dk);

        let normed = scratch.normed.at_least(size);
        if is_adapted {
            modulate(arch, &tile.x[block], shift, normed);
        }
        let d_outputs: [&[f32]; 4] = [dq, dk, dv, &tile.d_hidden];
        for ((layer, dy), inner) in layers.into_iter().zip(d_outputs).zip(&mut scratch.inner) {
            if let Some(layer) = layer {
                layer.factor_gradients(arch, rows, [normed, dy], &mut tile.gradients, inner);
            }
        }
        if !passes {
            return;
        }
        let d_normed = scratch.narrow.at_least(size);
        let [inner_q, inner_k, inner_v, inner_mlp] = &scratch.inner;
        let k_and_v = [k.backward_terms(dk, inner_k), v.backward_terms(dv, inner_v)];
        match (is_read, mlp) {
            (false, _) => input_gradient(arch, rows, k_and_v, d_normed),
            (true, None) => {
                let terms = [q.backward_terms(dq, inner_q), k_and_v[0], k_and_v[1]];
                input_gradient(arch, rows, terms, d_normed);
            }
            (true, Some(mlp)) => {
                let mlp = mlp.backward_terms(&tile.d_hidden, inner_mlp);
                let terms = [q.backward_terms(dq, inner_q), k_and_v[0], k_and_v[1], mlp];
                input_gradient(arch, rows, terms, d_normed);
            }
        }
        if self.reach.modulations {
            let sums = self.shares(block, tile.stream, 0..2, &mut tile.d_modulations);
            modulation_gradients(arch, &tile.x[block], d_normed, sums);
        }
        modulate_backward(arch, &tile.x[block], shift, d_normed, &mut tile.d_x);
    }

    /// A tile's rows of the gradient of queries, keys or values, out of all heads.
    fn gather_gradients(&self, part: usize, tile: &Tile, heads: &[Head], out: &mut [f32]) {
        let config = &self.shared.model.config;
        let (count, dim, d) = (
            config.num_attention_heads,
            config.attention_head_dim,
            config.width(),
        );
        for (h, head) in heads[tile.sample * count..][..count].iter().enumerate() {
            let rows = head.gradients[part][tile.first * dim..].chunks_exact(dim);
            for (out, row) in out.chunks_exact_mut(d).zip(rows).take(tile.rows) {
                out[h * dim..(h + 1) * dim].copy_from_slice(row);
            }
        }
    }

    fn embed(&self, tile: &mut Tile, scratch: &mut Scratch) {
        let layer = match tile.stream {
            TEXT => &self.shared.model.context_embedder,
            _ => &self.shared.model.x_embedder,
        };
        let rows = [&tile.input[..], &tile.d_x[..]];
        layer.factor_gradients(
            self.shared.arch(),
            tile.rows,
            rows,
            &mut tile.gradients,
            &mut scratch.inner[0],
        );
    }
}
