//! The forward pass: tiles and heads by turns, twice per block.

use macerator::Arch;
use rayon::prelude::*;

use crate::attention::Shape;
use crate::conditioning::Conditioning;
use crate::kernels::{Shift, Turn, add_gated, gelu, modulate, norm_and_turn};
use crate::model::{Block, Model, Projections};
use crate::workspace::{Head, IMAGE, Kept, SCRATCH, Scratch, Sizes, TEXT, Tile, Workspace, sized};

/// What all tiles read.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a> {
    pub model: &'a Model,
    pub conditioning: &'a Conditioning,
    pub sizes: Sizes,
    pub cos: &'a [f32],
    pub sin: &'a [f32],
    /// Whether what gates are put on is kept.
    pub keeps_updates: bool,
}

/// Runs all blocks; every tile has its `input`, and image tiles end with their `velocity`.
pub(crate) fn run(
    model: &Model,
    conditioning: &Conditioning,
    space: &mut Workspace,
    keeps_updates: bool,
) {
    let per_sample = space.num_tiles_per_sample();
    let shared = Shared {
        model,
        conditioning,
        sizes: space.sizes,
        cos: &space.cos,
        sin: &space.sin,
        keeps_updates,
    };
    let num_blocks = model.blocks.len();
    for turn in 0..=num_blocks {
        let heads = &space.heads;
        each_tile(&mut space.tiles, |tile, scratch| {
            match turn {
                0 => shared.embed(tile, scratch),
                _ => shared.leave(turn - 1, tile, heads, scratch),
            }
            if turn < num_blocks {
                shared.enter(turn, tile, scratch);
            } else {
                shared.finish(tile, scratch);
            }
        });
        if turn < num_blocks {
            let tiles = &space.tiles;
            space.heads.par_iter_mut().with_max_len(1).for_each(|head| {
                let tiles = &tiles[head.sample * per_sample..][..per_sample];
                SCRATCH.with_borrow_mut(|scratch| shared.attend(turn, head, tiles, scratch));
            });
        }
    }
}

/// Calls `work` for every tile, on all threads.
pub(crate) fn each_tile(tiles: &mut [Tile], work: impl Fn(&mut Tile, &mut Scratch) + Sync) {
    tiles
        .par_iter_mut()
        .with_max_len(1)
        .for_each(|tile| SCRATCH.with_borrow_mut(|scratch| work(tile, scratch)));
}

impl<'a> Shared<'a> {
    pub fn arch(&self) -> Arch {
        self.model.arch
    }

    pub fn width(&self) -> usize {
        self.model.config.width()
    }

    /// The vectors that a block's modulation layer gives a tile's sample.
    pub fn vectors<const N: usize>(&self, block: usize, tile: &Tile) -> [&'a [f32]; N] {
        let layer = self.model.modulation_of(block, tile.stream);
        self.conditioning.vectors(layer, tile.sample, self.width())
    }

    /// The last norm's modulation; its layer gives the scale before the shift.
    pub fn last_shift(&self, tile: &Tile) -> Shift<'a> {
        let layer = self.model.modulations().len() - 1;
        let [scale, shift] = self.conditioning.vectors(layer, tile.sample, self.width());
        Shift { shift, scale }
    }

    /// How a tile's heads are normalised and turned.
    pub fn turn(&self, weight: &'a [f32], tile: &Tile) -> Turn<'a> {
        let dim = self.model.config.attention_head_dim;
        let range = tile.first * dim..(tile.first + tile.rows) * dim;
        Turn {
            weight,
            cos: &self.cos[range.clone()],
            sin: &self.sin[range],
        }
    }

    /// The head of a block for this batch.
    pub fn shape(&self, block: usize) -> Shape {
        Shape {
            num_tokens: self.sizes.num_tokens(),
            first_query: if self.model.is_read(block, TEXT) {
                0
            } else {
                self.sizes.num_text
            },
            dim: self.model.config.attention_head_dim,
        }
    }

    fn embed(&self, tile: &mut Tile, scratch: &mut Scratch) {
        let layer = match tile.stream {
            TEXT => &self.model.context_embedder,
            _ => &self.model.x_embedder,
        };
        layer.forward(
            self.arch(),
            tile.rows,
            &tile.input,
            &mut tile.x[0],
            &mut scratch.inner[0],
        );
    }

    /// Up to attention: norm, queries, keys, values, and in single blocks the MLP's first layer.
    fn enter(&self, block: usize, tile: &mut Tile, scratch: &mut Scratch) {
        let arch = self.arch();
        let size = tile.rows * self.width();
        let is_read = self.model.is_read(block, tile.stream);
        let normed = scratch.normed.at_least(size);
        let (attn, mlp, shift) = match &self.model.blocks[block] {
            Block::Double(streams) => {
                let [shift, scale, ..] = self.vectors::<6>(block, tile);
                (&streams[tile.stream].attn, None, Shift { shift, scale })
            }
            Block::Single(single) => {
                let [shift, scale, _] = self.vectors::<3>(block, tile);
                (&single.attn, Some(&single.mlp), Shift { shift, scale })
            }
        };
        modulate(arch, &tile.x[block], shift, normed);
        let turns = [self.turn(&attn.norm_q, tile), self.turn(&attn.norm_k, tile)];
        let kept = &mut tile.kept[self.sizes.place(block)];
        let Projections { q, k, v, .. } = attn;
        let inner = &mut scratch.inner[0];
        let [turn_q, turn_k] = turns;
        if is_read {
            q.forward(arch, tile.rows, normed, sized(&mut kept.raw_q, size), inner);
            norm_and_turn(
                arch,
                &kept.raw_q,
                turn_q,
                self.width(),
                sized(&mut kept.q, size),
            );
        }
        k.forward(arch, tile.rows, normed, sized(&mut kept.raw_k, size), inner);
        norm_and_turn(
            arch,
            &kept.raw_k,
            turn_k,
            self.width(),
            sized(&mut kept.k, size),
        );
        v.forward(arch, tile.rows, normed, sized(&mut kept.v, size), inner);
        if let Some(mlp) = mlp.filter(|_| is_read) {
            let hidden = sized(&mut kept.hidden, tile.rows * mlp.out_features);
            mlp.forward(arch, tile.rows, normed, hidden, inner);
        }
    }

    /// Attention of one head.
    fn attend(&self, block: usize, head: &mut Head, tiles: &[Tile], scratch: &mut Scratch) {
        let place = self.sizes.place(block);
        let shape = self.shape(block);
        self.gather(head.head, tiles, place, shape, &mut scratch.attention);
        let (out, softmax) = &mut head.kept[place];
        scratch.attention.forward(self.arch(), shape, out, softmax);
    }

    /// Queries, keys and values of one head out of all tiles of its sample.
    pub fn gather(
        &self,
        head: usize,
        tiles: &[Tile],
        place: usize,
        shape: Shape,
        scratch: &mut crate::attention::Scratch,
    ) {
        let (d, dim) = (self.width(), shape.dim);
        let len = shape.num_tokens * dim;
        let scale = (dim as f32).sqrt().recip();
        let [q, k, v] =
            [&mut scratch.q, &mut scratch.k, &mut scratch.v].map(|rows| rows.at_least(len));
        let rows = [q, k, v].map(|rows| rows.chunks_exact_mut(dim));
        let [mut q, mut k, mut v] = rows;
        for tile in tiles {
            let Kept {
                q: tile_q,
                k: tile_k,
                v: tile_v,
                ..
            } = &tile.kept[place];
            for row in 0..tile.rows {
                let range = row * d + head * dim..row * d + (head + 1) * dim;
                let rows = (q.next(), k.next(), v.next());
                let (Some(q), Some(k), Some(v)) = rows else {
                    panic!("tiles of more than {} tokens", shape.num_tokens);
                };
                if tile.first >= shape.first_query {
                    for (q, value) in q.iter_mut().zip(&tile_q[range.clone()]) {
                        *q = value * scale;
                    }
                }
                k.copy_from_slice(&tile_k[range.clone()]);
                v.copy_from_slice(&tile_v[range]);
            }
        }
    }

    /// Attention's output in rows of all heads, `stride` apart.
    pub fn attended(
        &self,
        block: usize,
        tile: &Tile,
        heads: &[Head],
        stride: usize,
        out: &mut [f32],
    ) {
        let config = &self.model.config;
        let (count, dim) = (config.num_attention_heads, config.attention_head_dim);
        for (h, head) in heads[tile.sample * count..][..count].iter().enumerate() {
            let (values, _) = &head.kept[self.sizes.place(block)];
            let values = values[tile.first * dim..].chunks_exact(dim);
            for (out, values) in out.chunks_mut(stride).zip(values).take(tile.rows) {
                out[h * dim..(h + 1) * dim].copy_from_slice(values);
            }
        }
    }

    /// Behind attention: the residual, and in double blocks the MLP.
    fn leave(&self, block: usize, tile: &mut Tile, heads: &[Head], scratch: &mut Scratch) {
        if !self.model.is_read(block, tile.stream) {
            return;
        }
        let arch = self.arch();
        let (rows, d) = (tile.rows, self.width());
        let size = rows * d;
        let place = self.sizes.place(block);
        match &self.model.blocks[block] {
            Block::Double(streams) => {
                let stream = &streams[tile.stream];
                let [_, _, gate_attn, shift, scale, gate_mlp] = self.vectors::<6>(block, tile);
                let attended = scratch.narrow.at_least(size);
                self.attended(block, tile, heads, d, attended);
                let update = scratch.narrow_too.at_least(size);
                stream
                    .out
                    .forward(arch, rows, attended, update, &mut scratch.inner[0]);
                let (before, after) = tile.x.split_at_mut(block + 1);
                let kept = &mut tile.kept[place];
                let middle = sized(&mut kept.middle, size);
                add_gated(arch, &before[block], update, gate_attn, middle);
                if self.keeps_updates {
                    sized(&mut kept.updates[0], size).copy_from_slice(update);
                }

                let normed = scratch.normed.at_least(size);
                modulate(arch, middle, Shift { shift, scale }, normed);
                let wide = stream.mlp.first.out_features;
                let hidden = sized(&mut kept.hidden, rows * wide);
                stream
                    .mlp
                    .first
                    .forward(arch, rows, normed, hidden, &mut scratch.inner[0]);
                let active = scratch.wide.at_least(rows * wide);
                gelu(arch, hidden, wide, active, wide);
                stream
                    .mlp
                    .second
                    .forward(arch, rows, active, update, &mut scratch.inner[0]);
                add_gated(arch, middle, update, gate_mlp, &mut after[0]);
                if self.keeps_updates {
                    sized(&mut kept.updates[1], size).copy_from_slice(update);
                }
            }
            Block::Single(single) => {
                let [_, _, gate] = self.vectors::<3>(block, tile);
                let both = scratch.wide.at_least(rows * single.out.in_features);
                self.mixed(block, tile, heads, single.out.in_features, both);
                let update = scratch.narrow.at_least(size);
                single
                    .out
                    .forward(arch, rows, both, update, &mut scratch.inner[0]);
                let (before, after) = tile.x.split_at_mut(block + 1);
                add_gated(arch, &before[block], update, gate, &mut after[0]);
                if self.keeps_updates {
                    sized(&mut tile.kept[place].updates[0], size).copy_from_slice(update);
                }
            }
        }
    }

    /// What a single block's last layer is given: attention's output and the MLP's, side by side.
    pub fn mixed(&self, block: usize, tile: &Tile, heads: &[Head], stride: usize, out: &mut [f32]) {
        let d = self.width();
        let hidden = &tile.kept[self.sizes.place(block)].hidden;
        self.attended(block, tile, heads, stride, out);
        gelu(self.arch(), hidden, stride - d, &mut out[d..], stride);
    }

    fn finish(&self, tile: &mut Tile, scratch: &mut Scratch) {
        if tile.stream != IMAGE {
            return;
        }
        let arch = self.arch();
        let layer = &self.model.proj_out;
        let normed = scratch.normed.at_least(tile.rows * self.width());
        let shift = self.last_shift(tile);
        let velocity = sized(&mut tile.velocity, tile.rows * layer.out_features);
        modulate(arch, &tile.x[self.model.blocks.len()], shift, normed);
        layer.forward(arch, tile.rows, normed, velocity, &mut scratch.inner[0]);
    }
}
