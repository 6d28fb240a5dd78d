//! Does a picture look like pixel art? Two plain figures: how many of the squares that a sprite pixel would be are of one
//! colour, and how many colours there are.

use pixel_art::Rgb8;
use serde::{Deserialize, Serialize};

use crate::figure::Figure;

/// Largest difference within a square, of 255 per channel, that still counts as one colour: what the autoencoder leaves
/// of a flat square is below it, an edge between two colours of a sprite above.
const FLAT_SPREAD: u8 = 24;

/// Bits of each channel that tell colours apart.
const COLOR_BITS: u32 = 5;

/// Means over a group of pictures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PixelFigures {
    /// Pictures.
    pub pictures: u64,
    /// Of the squares that the figure touches, the share of one colour. Absent if the size of a sprite pixel is unknown
    /// or 1.
    pub flat_squares: Option<f64>,
    /// Different colours of a figure, at 5 bits a channel.
    pub num_colors: f64,
}

/// Measures a group; `square_px` is the side of a sprite pixel.
///
/// # Panics
///
/// If there are no pictures, or not as many figures.
pub fn measure(pictures: &[(&Rgb8, &Figure)], square_px: Option<u32>) -> PixelFigures {
    assert!(!pictures.is_empty(), "no pictures");
    let mean = |of: &dyn Fn(&Rgb8, &Figure) -> f64| {
        let sum: f64 = pictures.iter().map(|(p, figure)| of(p, figure)).sum();
        sum / pictures.len() as f64
    };
    PixelFigures {
        pictures: pictures.len() as u64,
        flat_squares: square_px
            .filter(|side| *side > 1)
            .map(|side| mean(&|picture, figure| flat_squares(picture, figure, side))),
        num_colors: mean(&|picture, figure| num_colors(picture, figure) as f64),
    }
}

/// The share of whole squares, counted from the top left corner, that hold a foreground pixel and are of one colour.
fn flat_squares(picture: &Rgb8, figure: &Figure, side_px: u32) -> f64 {
    let (mut flat, mut total) = (0_u64, 0_u64);
    for top in 0..picture.height_px / side_px {
        for left in 0..picture.width_px / side_px {
            let pixels = || {
                (0..side_px * side_px).map(|at| {
                    let (x, y) = (at % side_px, at / side_px);
                    (left * side_px + x, top * side_px + y)
                })
            };
            if !pixels().any(|(x, y)| figure.is_foreground(x as usize, y as usize)) {
                continue;
            }
            total += 1;
            let is_flat = (0..3).all(|channel| {
                let values = || pixels().map(|(x, y)| picture.pixel(x, y)[channel]);
                let (low, high) = (values().min(), values().max());
                high.unwrap_or(0) - low.unwrap_or(0) <= FLAT_SPREAD
            });
            flat += u64::from(is_flat);
        }
    }
    flat as f64 / total.max(1) as f64
}

fn num_colors(picture: &Rgb8, figure: &Figure) -> usize {
    let mut seen = std::collections::BTreeSet::new();
    for y in 0..picture.height_px {
        for x in 0..picture.width_px {
            if figure.is_foreground(x as usize, y as usize) {
                seen.insert(
                    picture
                        .pixel(x, y)
                        .map(|channel| channel >> (8 - COLOR_BITS)),
                );
            }
        }
    }
    seen.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(picture: &Rgb8, square_px: Option<u32>) -> PixelFigures {
        measure(&[(picture, &Figure::find(picture))], square_px)
    }

    /// Two squares of 4×4 on white, red and blue.
    fn sprite() -> Rgb8 {
        let mut native = Rgb8::filled(6, 4, [255; 3]);
        native.paste(&Rgb8::filled(1, 1, [200, 8, 8]), 2, 2);
        native.paste(&Rgb8::filled(1, 1, [8, 8, 200]), 3, 2);
        native.magnify(4)
    }

    #[test]
    fn magnified_sprites_are_flat_and_shifted_ones_are_not() {
        let figures = measured(&sprite(), Some(4));
        assert_eq!(figures.flat_squares, Some(1.0));
        assert_eq!(figures.num_colors, 2.0);
        let mut shifted = Rgb8::filled(24, 16, [255; 3]);
        shifted.paste(&sprite().crop(0, 0, 22, 16), 2, 0);
        // Three squares are touched, each is half one colour and half another.
        assert_eq!(measured(&shifted, Some(4)).flat_squares, Some(0.0));
    }

    #[test]
    fn without_a_known_sprite_pixel_there_is_no_share() {
        assert_eq!(measured(&sprite(), None).flat_squares, None);
        assert_eq!(measured(&sprite(), Some(1)).flat_squares, None);
    }
}
