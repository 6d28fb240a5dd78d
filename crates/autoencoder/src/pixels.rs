//! Between batches of 8-bit pictures and tensors in the model's range [−1, 1]; the formulas are `pixel-art`'s.

use pixel_art::{Rgb8, from_model_range, to_model_range};
use tensor::{DType, Device, Tensor, TensorData};

/// Equally large pictures, row by row with interleaved channels (RGB), to `(b, 3, H, W)` in [−1, 1], in `f32`.
///
/// # Panics
///
/// If there are none, one does not hold `width_px · height_px` pixels, or a side exceeds `u32`.
pub fn from_rgb8(
    pictures: &[&[u8]],
    width_px: usize,
    height_px: usize,
    device: &Device,
) -> Tensor<4> {
    assert!(!pictures.is_empty(), "a batch of no pictures");
    let (width, height) = (side(width_px), side(height_px));
    let mut values = Vec::with_capacity(pictures.len() * 3 * width_px * height_px);
    for rgb in pictures {
        values.extend(to_model_range(&Rgb8::new(width, height, rgb.to_vec())));
    }
    let data = TensorData::new(values, [pictures.len(), 3, height_px, width_px]);
    Tensor::from_data(data, (device, DType::F32))
}

/// `(b, 3, H, W)` in [−1, 1] to one RGB buffer per picture, row by row with interleaved channels.
///
/// Waits for the device.
///
/// # Panics
///
/// If there are not 3 channels, or a side exceeds `u32`.
pub fn to_rgb8(pictures: &Tensor<4>) -> Vec<Vec<u8>> {
    let [_, c, h, w] = pictures.dims();
    assert_eq!(c, 3, "channels of a picture");
    tensor::to_f32(pictures)
        .chunks_exact((3 * h * w).max(1))
        .map(|planes| from_model_range(planes, side(w), side(h)).pixels)
        .collect()
}

fn side(px: usize) -> u32 {
    u32::try_from(px).expect("the side of a picture in memory fits 32 bits")
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::device::cpu;

    #[test]
    fn interleaved_channels_become_planes_and_come_back() {
        let picture: Vec<u8> = (0..18).map(|i| i * 14).collect(); // 3×2 pixels
        let planes = from_rgb8(&[&picture, &picture], 3, 2, &cpu());
        assert_eq!(planes.dims(), [2, 3, 2, 3]);
        let values = tensor::to_f32(&planes);
        let in_range = |byte: u8| 2.0 * (f32::from(byte) / 255.0) - 1.0;
        assert_eq!(values[1], in_range(picture[3]));
        assert_eq!(values[6], in_range(picture[1]));
        assert_eq!(to_rgb8(&planes), [picture.clone(), picture]);
    }
}
