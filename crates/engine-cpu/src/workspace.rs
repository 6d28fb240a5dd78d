//! Who owns which numbers while a batch goes through the network.
//!
//! Rows are divided into tiles of a few dozen tokens of one sample and one stream, and attention into heads. Tiles and
//! heads take turns: while tiles work, each writes only to itself and reads heads; while heads work, each writes only
//! to itself and reads tiles. So nothing is locked, and what a number is does not depend on the number of threads.

use std::cell::RefCell;

use crate::aligned::Aligned;
use crate::attention;
use crate::kernels::Softmax;
use crate::linear::Inner;
use crate::matmul::PANEL;
use crate::model::{Block, Model};

/// Rows that go through a product together in registers on every instruction set.
const UNIT_ROWS: usize = 12;

/// Text stream and image stream, as places in [`Block::Double`].
pub(crate) const TEXT: usize = 0;
pub(crate) const IMAGE: usize = 1;

/// Sizes of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub num_samples: usize,
    pub num_text: usize,
    pub num_image: usize,
    /// Whether every block's activations are kept for going backward.
    pub keeps: bool,
}

impl Sizes {
    /// Tokens of one sample.
    pub fn num_tokens(&self) -> usize {
        self.num_text + self.num_image
    }

    /// Where a block's activations are kept: all share one place unless they are needed again.
    pub fn place(&self, block: usize) -> usize {
        if self.keeps { block } else { 0 }
    }
}

/// What one block computed for a tile's rows.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// Queries and keys as their layers gave them.
    pub raw_q: Vec<f32>,
    pub raw_k: Vec<f32>,
    /// Queries and keys normalised and turned.
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    /// The MLP before GELU.
    pub hidden: Vec<f32>,
    /// Double blocks: the residual between attention and MLP.
    pub middle: Vec<f32>,
    /// What the gates were put on; kept where modulations are trained.
    pub updates: [Vec<f32>; 2],
}

/// Some tokens of one stream of one sample.
#[derive(Debug, Default)]
pub(crate) struct Tile {
    pub sample: usize,
    pub stream: usize,
    /// First token in the joint sequence, text first.
    pub first: usize,
    pub rows: usize,
    /// The rows before embedding.
    pub input: Vec<f32>,
    /// The residual before each block and after the last.
    pub x: Vec<Vec<f32>>,
    pub kept: Vec<Kept>,
    /// Image tiles only.
    pub velocity: Vec<f32>,
    pub d_velocity: Vec<f32>,
    /// Gradient of the residual.
    pub d_x: Vec<f32>,
    /// Gradient of attention's output.
    pub d_attn: Vec<f32>,
    /// Single blocks: gradient of the MLP before GELU.
    pub d_hidden: Vec<f32>,
    /// This tile's share in the gradients of all factors.
    pub gradients: Vec<f32>,
    /// This tile's share in the gradients of all modulations of its sample, layer after layer.
    pub d_modulations: Vec<f32>,
}

/// One head of one sample.
#[derive(Debug, Default)]
pub(crate) struct Head {
    pub sample: usize,
    pub head: usize,
    /// Per block: output, a row per token, and softmax.
    pub kept: Vec<(Vec<f32>, Vec<Softmax>)>,
    /// Gradients of queries, keys and values, a row per token.
    pub gradients: [Vec<f32>; 3],
}

/// All tiles, sample by sample and text first, and all heads.
#[derive(Debug)]
pub(crate) struct Workspace {
    pub sizes: Sizes,
    pub tiles: Vec<Tile>,
    pub heads: Vec<Head>,
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
    pub positions: Vec<[f32; 3]>,
}

/// What a thread computes in.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    pub normed: Aligned,
    pub wide: Aligned,
    pub wide_too: Aligned,
    pub narrow: Aligned,
    pub narrow_too: Aligned,
    pub gradients: [Aligned; 3],
    pub inner: [Inner; 4],
    pub attention: attention::Scratch,
}

thread_local! {
    /// Lives as long as the thread: no allocation in a step after the first.
    pub(crate) static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Cuts `count` tokens into tiles of at most `limit` units: first and number of each.
fn cut(count: usize, limit: usize) -> Vec<(usize, usize)> {
    let units = count.div_ceil(UNIT_ROWS);
    let tiles = units.div_ceil(limit);
    let mut first = 0;
    (0..tiles)
        .map(|tile| {
            let share = units / tiles + usize::from(tile < units % tiles);
            let rows = (share * UNIT_ROWS).min(count - first);
            first += rows;
            (first - rows, rows)
        })
        .collect()
}

impl Workspace {
    pub fn new(model: &Model, sizes: Sizes) -> Self {
        let config = &model.config;
        let d = config.width();
        let num_blocks = model.blocks.len();
        let num_places = if sizes.keeps {
            num_blocks
        } else {
            num_blocks.min(1)
        };
        // Few rows in all are cut finer, so that they still occupy several cores.
        let limit = if sizes.num_samples * sizes.num_tokens() <= 640 {
            2
        } else {
            4
        };
        let mut tiles = Vec::new();
        for sample in 0..sizes.num_samples {
            for (stream, start, count) in [
                (TEXT, 0, sizes.num_text),
                (IMAGE, sizes.num_text, sizes.num_image),
            ] {
                for (first, rows) in cut(count, limit) {
                    tiles.push(Tile {
                        sample,
                        stream,
                        first: start + first,
                        rows,
                        x: vec![vec![0.0; rows * d]; num_blocks + 1],
                        kept: std::iter::repeat_with(Kept::default)
                            .take(num_places)
                            .collect(),
                        ..Tile::default()
                    });
                }
            }
        }
        let n = sizes.num_tokens();
        let head_len = n * config.attention_head_dim;
        let mut heads = Vec::new();
        for sample in 0..sizes.num_samples {
            for head in 0..config.num_attention_heads {
                let kept = (
                    vec![0.0; head_len],
                    vec![Softmax::default(); n.div_ceil(PANEL)],
                );
                heads.push(Head {
                    sample,
                    head,
                    kept: vec![kept; num_places],
                    gradients: std::array::from_fn(|_| {
                        if sizes.keeps {
                            vec![0.0; head_len]
                        } else {
                            vec![]
                        }
                    }),
                });
            }
        }
        Self {
            sizes,
            tiles,
            heads,
            cos: vec![],
            sin: vec![],
            positions: vec![],
        }
    }

    /// Tiles of one sample.
    pub fn num_tiles_per_sample(&self) -> usize {
        self.tiles.len() / self.sizes.num_samples.max(1)
    }
}

/// A vector of exactly so many numbers, the old ones kept where there are any.
pub(crate) fn sized(values: &mut Vec<f32>, len: usize) -> &mut [f32] {
    values.resize(len, 0.0);
    values
}

impl Model {
    /// Whether what a block makes of a tile's own rows reaches the velocity. The last block's text does not: there,
    /// text is only looked at.
    pub fn is_read(&self, block: usize, stream: usize) -> bool {
        stream == IMAGE || block + 1 < self.blocks.len()
    }

    /// Which modulation layer a block has for a stream.
    pub fn modulation_of(&self, block: usize, stream: usize) -> usize {
        let doubles = self.config.num_layers;
        match self.blocks[block] {
            Block::Double(_) => 2 * block + stream,
            Block::Single(_) => doubles + block,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_all_tokens_once() {
        for count in 0..300 {
            for limit in [2, 4] {
                let mut next = 0;
                for (first, rows) in cut(count, limit) {
                    assert_eq!(first, next);
                    assert!(rows > 0 && rows <= limit * UNIT_ROWS);
                    next += rows;
                }
                assert_eq!(next, count);
            }
        }
    }
}
