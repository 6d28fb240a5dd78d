//! The public recipe's resize: Pillow's BILINEAR with antialiasing, to the bit.
//!
//! Two passes, each rounded to 8 bits, so their order shows: rows first, but columns first where the height shrinks by
//! more than twice what the width does (new in Pillow 13; earlier versions always took rows first, and differ there by
//! a unit in some pixels). An output pixel's weights are a triangle over its footprint
//! in the input (at least one input pixel to each side), normalised, then rounded to 22 fractional bits.
//! It turns 16 colours into thousands: [`crate::place_on_canvas`] is what sprites should go through.
//!
//! Source: `precompute_coeffs`, `normalize_coeffs_8bpc`, `ImagingResampleInner` (Pillow's Resample.c); the order of the
//! passes from Pillow 13.0's results (python-pillow/Pillow#9549).

use crate::Rgb8;

/// 8 bits of result, 2 of headroom, the rest of an i32 for the fraction.
const FRACTION_BITS: u32 = 32 - 8 - 2;

/// `transforms.Resize(size, BILINEAR)` on a PIL image: the short side becomes `size_px`, the long side follows, cut off.
///
/// Source: `_compute_resized_output_size`, torchvision 0.29.
///
/// # Panics
///
/// If the image has no pixels or `size_px` is 0.
pub fn resize_short_side(image: &Rgb8, size_px: u32) -> Rgb8 {
    let (w, h) = (u64::from(image.width_px), u64::from(image.height_px));
    assert!(w > 0 && h > 0, "resize of an image of {w}×{h}");
    let long = (u64::from(size_px) * w.max(h) / w.min(h)) as u32;
    if w <= h {
        resize_bilinear(image, size_px, long)
    } else {
        resize_bilinear(image, long, size_px)
    }
}

/// `image.resize((width, height), Image.BILINEAR)`.
///
/// # Panics
///
/// If either image has no pixels.
pub fn resize_bilinear(image: &Rgb8, width_px: u32, height_px: u32) -> Rgb8 {
    assert!(
        image.width_px > 0 && image.height_px > 0 && width_px > 0 && height_px > 0,
        "resize of {}×{} to {width_px}×{height_px}",
        image.width_px,
        image.height_px
    );
    let shrinks = |from: u32, to: u32| i64::from(from) - i64::from(to);
    let lost_rows = shrinks(image.height_px, height_px);
    let lost_columns = shrinks(image.width_px, width_px);
    if lost_rows > 0 && lost_rows > 2 * lost_columns {
        resize_rows(&resize_columns(image, height_px), width_px)
    } else {
        resize_columns(&resize_rows(image, width_px), height_px)
    }
}

/// One output pixel: the first input pixel it sees and the weight of each from there on.
struct Footprint {
    start: usize,
    weights: Vec<i32>,
}

fn footprints(in_px: u32, out_px: u32) -> Vec<Footprint> {
    let scale = f64::from(in_px) / f64::from(out_px);
    // When magnifying, the triangle keeps a half width of one input pixel.
    let half_width = scale.max(1.0);
    (0..out_px)
        .map(|out| {
            let center = (f64::from(out) + 0.5) * scale;
            let start = ((center - half_width + 0.5) as i64).max(0);
            let end = ((center + half_width + 0.5) as i64).min(i64::from(in_px));
            let weights: Vec<f64> = (start..end)
                .map(|at| {
                    let distance = (at as f64 - center + 0.5) * (1.0 / half_width);
                    (1.0 - distance.abs()).max(0.0)
                })
                .collect();
            let sum: f64 = weights.iter().sum();
            let one = f64::from(1u32 << FRACTION_BITS);
            Footprint {
                start: start as usize,
                weights: weights
                    .iter()
                    .map(|weight| (0.5 + weight / sum * one) as i32)
                    .collect(),
            }
        })
        .collect()
}

fn resize_rows(image: &Rgb8, width_px: u32) -> Rgb8 {
    if width_px == image.width_px {
        return image.clone();
    }
    let footprints = footprints(image.width_px, width_px);
    let mut pixels = Vec::with_capacity(width_px as usize * image.height_px as usize * 3);
    for row in image.pixels.chunks_exact(image.width_px as usize * 3) {
        for footprint in &footprints {
            let mut sums = [HALF; 3];
            let seen = row[footprint.start * 3..].chunks_exact(3);
            for (pixel, weight) in seen.zip(&footprint.weights) {
                for channel in 0..3 {
                    sums[channel] += i32::from(pixel[channel]) * weight;
                }
            }
            pixels.extend(sums.map(to_byte));
        }
    }
    Rgb8::new(width_px, image.height_px, pixels)
}

fn resize_columns(image: &Rgb8, height_px: u32) -> Rgb8 {
    if height_px == image.height_px {
        return image.clone();
    }
    let row_bytes = image.width_px as usize * 3;
    let mut pixels = Vec::with_capacity(row_bytes * height_px as usize);
    let mut sums = vec![HALF; row_bytes];
    for footprint in footprints(image.height_px, height_px) {
        sums.fill(HALF);
        let seen = image.pixels[footprint.start * row_bytes..].chunks_exact(row_bytes);
        for (row, weight) in seen.zip(&footprint.weights) {
            for (sum, sample) in sums.iter_mut().zip(row) {
                *sum += i32::from(*sample) * weight;
            }
        }
        pixels.extend(sums.iter().map(|sum| to_byte(*sum)));
    }
    Rgb8::new(image.width_px, height_px, pixels)
}

const HALF: i32 = 1 << (FRACTION_BITS - 1);

fn to_byte(sum: i32) -> u8 {
    (sum >> FRACTION_BITS).clamp(0, 255) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gray(width_px: u32, height_px: u32, values: &[u8]) -> Rgb8 {
        let pixels = values.iter().flat_map(|value| [*value; 3]).collect();
        Rgb8::new(width_px, height_px, pixels)
    }

    #[test]
    fn magnifying_blends_neighbours_by_quarters() {
        let wide = resize_bilinear(&gray(2, 1, &[0, 100]), 4, 1);
        assert_eq!(wide, gray(4, 1, &[0, 25, 75, 100]));
    }

    #[test]
    fn halving_looks_at_four_pixels_not_two() {
        // Weights of the first output pixel: 3/7, 3/7, 1/7 (the fourth lies outside).
        let small = resize_bilinear(&gray(4, 1, &[0, 70, 140, 210]), 2, 1);
        assert_eq!(small, gray(2, 1, &[50, 160]));
    }

    #[test]
    fn the_short_side_gets_the_size_and_the_long_side_is_cut_off() {
        let size = |w, h| {
            let image = resize_short_side(&Rgb8::filled(w, h, [1, 2, 3]), 32);
            (image.width_px, image.height_px)
        };
        assert_eq!(size(69, 41), (53, 32)); // 53.85
        assert_eq!(size(11, 19), (32, 55)); // 55.27
        assert_eq!(size(32, 32), (32, 32));
    }
}
