//! Rotary position embedding: a query or key is turned, pair by pair, by angles proportional to its position.
//!
//! A head's channels are divided among three position axes ([`axes_dims_rope`]); on an axis of `d` channels, pair
//! `i` turns by `position · 10⁴^(−2i/d)`. Pairs are interleaved, channels `2i` and `2i+1`. Angles are computed in
//! `f64` on the host and their cosines kept in `f32`, whatever the precision of the network.
//!
//! Source: `FluxPosEmbed` and `apply_rotary_emb`, diffusers 0.42.
//!
//! [`axes_dims_rope`]: crate::MmditConfig::axes_dims_rope

use tensor::{DType, Device, Tensor, from_f32};

use crate::config::{MmditConfig, ROPE_THETA};
use crate::patches::{image_ids, text_ids};

/// Cosines and sines for one sequence of positions, and the exchange of a pair's two channels.
#[derive(Clone, Debug)]
pub struct Rope {
    /// `[n, heads · head width]`: each value twice in a row, and all of a position's once per head.
    cos: Tensor<2>,
    /// As `cos`.
    sin: Tensor<2>,
    /// `x · quarter_turn` has `−x[2i+1]` at `2i` and `x[2i]` at `2i+1`: `[head width, head width]`.
    ///
    /// A product with this constant is one pass in every backend, and exact; taking pairs apart is five strided ones.
    quarter_turn: Tensor<2>,
}

/// Cosines and sines of all positions, each `[n, head width]`, row-major, every value twice in a row.
pub fn angles(config: &MmditConfig, ids: &[[f32; 3]]) -> [Vec<f32>; 2] {
    let mut cos = Vec::with_capacity(ids.len() * config.attention_head_dim);
    let mut sin = Vec::with_capacity(ids.len() * config.attention_head_dim);
    for position in ids {
        for (&position, &dim) in position.iter().zip(&config.axes_dims_rope) {
            for i in (0..dim).step_by(2) {
                let frequency = ROPE_THETA.powf(i as f64 / dim as f64).recip();
                let (s, c) = (f64::from(position) * frequency).sin_cos();
                cos.extend([c as f32; 2]);
                sin.extend([s as f32; 2]);
            }
        }
    }
    [cos, sin]
}

impl Rope {
    /// Tables for text tokens followed by the image tokens of a latent of `h`×`w` cells.
    pub fn for_latent(
        config: &MmditConfig,
        num_text_tokens: usize,
        [h, w]: [usize; 2],
        device: &Device,
    ) -> Self {
        let mut ids = text_ids(num_text_tokens);
        ids.extend(image_ids(h, w));
        Self::new(config, &ids, device)
    }

    /// Tables for the positions `ids`, text tokens first.
    pub fn new(config: &MmditConfig, ids: &[[f32; 3]], device: &Device) -> Self {
        let width = config.attention_head_dim;
        let heads = config.num_attention_heads;
        let [cos, sin] = angles(config, ids);
        let once_per_head = |table: Vec<f32>| -> Tensor<2> {
            let table = table.chunks(width).flat_map(|row| row.repeat(heads));
            from_f32(table.collect(), [ids.len(), heads * width], device)
        };
        let mut quarter_turn = vec![0.0; width * width];
        for i in (0..width).step_by(2) {
            quarter_turn[(i + 1) * width + i] = -1.0;
            quarter_turn[i * width + i + 1] = 1.0;
        }
        Self {
            cos: once_per_head(cos),
            sin: once_per_head(sin),
            quarter_turn: from_f32(quarter_turn, [width, width], device),
        }
    }

    /// Number of positions, text and image together.
    pub fn num_tokens(&self) -> usize {
        self.cos.dims()[0]
    }

    /// Turns queries or keys by their positions, in `f32`: `(b, n, h, d)` → the same shape.
    ///
    /// # Panics
    ///
    /// If `n`, `h` or `d` is not the tables'.
    pub fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        let [b, n, h, d] = x.dims();
        assert_eq!(
            [n, h * d],
            self.cos.dims(),
            "positions × width of the model"
        );
        let dtype = x.dtype();
        let x = x.cast(DType::F32).reshape([b, n * h * d]);
        // One long line per sample: a broadcast over whole rows is the one that every backend is fast at.
        let turned = x
            .clone()
            .reshape([b * n * h, d])
            .matmul(self.quarter_turn.clone())
            .reshape([b, n * h * d]);
        let line = |table: &Tensor<2>| table.clone().reshape([1, n * h * d]);
        (x * line(&self.cos) + turned * line(&self.sin))
            .reshape([b, n, h, d])
            .cast(dtype)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::device::cpu;
    use tensor::to_f32;

    #[test]
    fn pairs_are_neighbouring_channels_and_axes_follow_each_other() {
        let config = MmditConfig::tiny(); // axes 2, 2, 4
        let rope = Rope::new(&config, &[[0.0, 2.0, 3.0]], &cpu());
        // Both heads alike: they turn alike.
        let x: Vec<f32> = (0..16).map(|i| (i % 8 + 1) as f32).collect();
        let turned = to_f32(&rope.rotate(from_f32(x, [1, 1, 2, 8], &cpu())));
        assert_eq!(turned[..8], turned[8..]);
        let turn = |a: f64, b: f64, angle: f64| {
            let (s, c) = angle.sin_cos();
            [(a * c - b * s) as f32, (b * c + a * s) as f32]
        };
        let expected = [
            turn(1.0, 2.0, 0.0),
            turn(3.0, 4.0, 2.0),
            turn(5.0, 6.0, 3.0),
            turn(7.0, 8.0, 3.0 / 100.0), // 10⁴^(2/4) = 100
        ]
        .concat();
        for (t, e) in turned.iter().zip(&expected) {
            assert!((t - e).abs() < 1e-5, "{turned:?} is not {expected:?}");
        }
    }

    #[test]
    fn text_stands_at_the_origin_and_is_not_turned() {
        let config = MmditConfig::tiny();
        let rope = Rope::for_latent(&config, 2, [2, 2], &cpu());
        assert_eq!(rope.num_tokens(), 3);
        let x: Vec<f32> = (0..48).map(|i| i as f32).collect();
        let turned = rope.rotate(from_f32(x.clone(), [1, 3, 2, 8], &cpu()));
        assert_eq!(to_f32(&turned), x);
    }
}
