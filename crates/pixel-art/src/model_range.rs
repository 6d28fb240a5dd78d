//! Bytes to the model's [-1, 1] and back, channels first.

use crate::Rgb8;

/// `2·(u8/255) − 1`: `(h w c)` → `(c h w)`.
///
/// torchvision's `ToTensor` and `Normalize(0.5, 0.5)` compute `(u8/255 − 0.5)/0.5`, which is the same number in f32.
///
/// Source: `VaeImageProcessor.preprocess`, diffusers 0.42.
pub fn to_model_range(image: &Rgb8) -> Vec<f32> {
    let mut planes = Vec::with_capacity(image.pixels.len());
    for channel in 0..3 {
        let samples = image.pixels[channel.min(image.pixels.len())..].iter();
        planes.extend(
            samples
                .step_by(3)
                .map(|sample| 2.0 * (f32::from(*sample) / 255.0) - 1.0),
        );
    }
    planes
}

/// `round(clamp(x/2 + 1/2, 0, 1)·255)`, halves to even: `(c h w)` → `(h w c)`. Not-a-number becomes 0.
///
/// Source: `VaeImageProcessor.postprocess`, diffusers 0.42.
///
/// # Panics
///
/// If the number of values is not `3 · height · width`.
pub fn from_model_range(planes: &[f32], width_px: u32, height_px: u32) -> Rgb8 {
    let count = width_px as usize * height_px as usize;
    assert_eq!(
        planes.len(),
        3 * count,
        "the planes of an image of {width_px}×{height_px}"
    );
    let mut pixels = Vec::with_capacity(planes.len());
    for at in 0..count {
        for channel in 0..3 {
            let unit = (planes[channel * count + at] * 0.5 + 0.5).clamp(0.0, 1.0);
            pixels.push((unit * 255.0).round_ties_even() as u8);
        }
    }
    Rgb8::new(width_px, height_px, pixels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planes_come_one_after_another() {
        let image = Rgb8::new(2, 1, vec![0, 51, 102, 153, 204, 255]);
        let planes = to_model_range(&image);
        let expected = [-1.0, 0.2, -0.6, 0.6, -0.2, 1.0];
        for (value, expected) in planes.iter().zip(expected) {
            assert!((value - expected).abs() < 1e-6, "{planes:?}");
        }
    }

    #[test]
    fn both_upstream_formulas_are_one_number_in_f32() {
        for byte in 0..=255u8 {
            let unit = f32::from(byte) / 255.0;
            assert_eq!(2.0 * unit - 1.0, (unit - 0.5) / 0.5);
        }
    }

    #[test]
    fn every_byte_comes_back() {
        let image = Rgb8::new(16, 16, (0..=255u8).flat_map(|byte| [byte; 3]).collect());
        assert_eq!(from_model_range(&to_model_range(&image), 16, 16), image);
    }

    #[test]
    fn halves_round_to_even_and_the_rest_is_clamped() {
        // 0.5·255 = 127.5 → 128; outside values stop at 0 and 255.
        let image = from_model_range(&[0.0, -7.0, 7.0], 1, 1);
        assert_eq!(image.pixels, [128, 0, 255]);
        assert_eq!(from_model_range(&[f32::NAN; 3], 1, 1).pixels, [0, 0, 0]);
    }
}
