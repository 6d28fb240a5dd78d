//! Pictures with hard edges for the autoencoder: magnified pixel art, and made-up blocks of every pitch.

use flow_matching::noise::{Purpose, Stream};
use pixel_art::{Rgb8, Rgba8};

use crate::augment::{BACKGROUND, COLORS};

/// Sides of a block in pixels; half are the demo's own geometry, 32 sprite pixels on 128. None is 1: a picture of noise
/// says more than its latents can hold, and trying to keep it costs the others.
const PITCHES: [u32; 8] = [4, 4, 4, 4, 2, 5, 8, 16];

/// A sprite over a plain ground, magnified by a whole factor, in the middle or cropped.
pub(crate) fn magnified(sprite: &Rgba8, side_px: u32, seed: u64, index: usize) -> Rgb8 {
    let mut stream = Stream::new(seed, Purpose::Augmentation, index as u64, "pretrain/sprite");
    let ground = if stream.uniform() < 0.6 {
        BACKGROUND
    } else {
        COLORS[stream.below(COLORS.len() as u64) as usize].1
    };
    let fitting = (side_px / sprite.width_px.max(sprite.height_px)).max(1);
    // Mostly as large as fits, as the demo has it.
    let factor = match stream.below(4) {
        0 => 1 + stream.below(u64::from(2 * fitting)) as u32,
        _ => fitting,
    };
    let large = sprite.over(ground).magnify(factor);
    let mut canvas = Rgb8::filled(side_px, side_px, ground);
    let place = |side: u32| (i64::from(side_px) - i64::from(side)) / 2;
    let (left, top) = (place(large.width_px), place(large.height_px));
    for y in 0..large.height_px {
        for x in 0..large.width_px {
            let (to_x, to_y) = (i64::from(x) + left, i64::from(y) + top);
            let inside = |v: i64| (0..i64::from(side_px)).contains(&v);
            if inside(to_x) && inside(to_y) {
                let at = ((to_y * i64::from(side_px) + to_x) * 3) as usize;
                canvas.pixels[at..at + 3].copy_from_slice(&large.pixel(x, y));
            }
        }
    }
    canvas
}

/// Blocks of one pitch in a few colours: scattered, in rectangles, or each block another colour.
pub(crate) fn blocks(stream: &mut Stream, side_px: u32) -> Rgb8 {
    let pitch = PITCHES[stream.below(PITCHES.len() as u64) as usize];
    // The demo's pitch stays on the latent grid half of the time.
    let offset = if stream.uniform() < 0.5 {
        0
    } else {
        stream.below(u64::from(pitch)) as u32
    };
    let cells = (side_px / pitch + 2) as usize;
    let num_colors = match stream.below(4) {
        0 => cells * cells,
        _ => 2 + stream.below(14) as usize,
    };
    let palette: Vec<[u8; 3]> = (0..num_colors)
        .map(|_| std::array::from_fn(|_| stream.below(256) as u8))
        .collect();
    let any = |stream: &mut Stream| palette[stream.below(num_colors as u64) as usize];
    let ground = if stream.uniform() < 0.5 {
        BACKGROUND
    } else {
        any(stream)
    };
    let mut grid = vec![ground; cells * cells];
    if stream.uniform() < 0.5 {
        let density = stream.uniform();
        for cell in &mut grid {
            if stream.uniform() < density {
                *cell = any(stream);
            }
        }
    } else {
        for _ in 0..4 + stream.below(40) {
            let color = any(stream);
            let mut span = || {
                let start = stream.below(cells as u64) as usize;
                let length = 1 + stream.below(cells as u64 / 3 + 1) as usize;
                start..(start + length).min(cells)
            };
            let (rows, columns) = (span(), span());
            for row in rows {
                grid[row * cells..][columns.clone()].fill(color);
            }
        }
    }
    let mut picture = Rgb8::filled(side_px, side_px, ground);
    for (index, pixel) in picture.pixels.chunks_exact_mut(3).enumerate() {
        let (x, y) = (index as u32 % side_px, index as u32 / side_px);
        let (column, row) = ((x + offset) / pitch, (y + offset) / pitch);
        pixel.copy_from_slice(&grid[row as usize * cells + column as usize]);
    }
    picture
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sprite_fills_the_canvas_with_whole_squares() {
        let sprite = Rgba8::new(2, 2, [[9, 9, 9, 255]; 4].concat());
        // Whatever the draw, a factor is whole and colours are the sprite's or the ground's.
        for index in 0..8 {
            let picture = magnified(&sprite, 16, 3, index);
            assert_eq!((picture.width_px, picture.height_px), (16, 16));
            assert_eq!(picture.pixel(8, 8), [9, 9, 9]);
        }
    }

    #[test]
    fn blocks_are_the_same_for_the_same_stream() {
        let draw = || blocks(&mut Stream::new(1, Purpose::Augmentation, 2, "x"), 32);
        assert_eq!(draw(), draw());
    }
}
