//! From coefficients to pixels: planes, full-size chroma, colours, each rounded as libjpeg rounds it.

use super::frame::{Adobe, Component, Frame};
use super::transform;
use crate::PilMode;

/// The image in the mode and bytes that Pillow gives it.
pub(super) fn pixels(frame: &Frame, has_jfif: bool, adobe: Option<Adobe>) -> (PilMode, Vec<u8>) {
    let planes: Vec<Vec<u8>> = frame
        .components
        .iter()
        .map(|component| full_size(frame, component))
        .collect();
    let (w, h) = (frame.width_px, frame.height_px);
    let mut out = Vec::with_capacity(w * h * planes.len());
    match planes.as_slice() {
        [gray] => {
            out.extend_from_slice(gray);
            (PilMode::L, out)
        }
        [a, b, c] => {
            let converts = is_ycbcr(frame, has_jfif, adobe);
            for at in 0..w * h {
                let pixel = [a[at], b[at], c[at]];
                out.extend(if converts { ycbcr_to_rgb(pixel) } else { pixel });
            }
            (PilMode::Rgb, out)
        }
        [a, b, c, k] => {
            // Pillow takes every CMYK file for Adobe's and inverts it.
            let converts = matches!(adobe, Some(Adobe::Ycck | Adobe::Ycbcr));
            for at in 0..w * h {
                let pixel = [a[at], b[at], c[at]];
                let inks = if converts {
                    ycbcr_to_rgb(pixel).map(|light| 255 - light)
                } else {
                    pixel
                };
                out.extend(inks.map(|ink| 255 - ink));
                out.push(255 - k[at]);
            }
            (PilMode::Cmyk, out)
        }
        _ => unreachable!("frames have 1, 3 or 4 components"),
    }
}

/// What three components mean, from the first of JFIF's marker, Adobe's marker and the component's names that speaks.
fn is_ycbcr(frame: &Frame, has_jfif: bool, adobe: Option<Adobe>) -> bool {
    if has_jfif {
        return true;
    }
    match adobe {
        Some(found) => found != Adobe::Untransformed,
        None => !frame.components.iter().map(|c| c.id).eq(*b"RGB"),
    }
}

/// JFIF's conversion with 16 fractional bits.
fn ycbcr_to_rgb([y, cb, cr]: [u8; 3]) -> [u8; 3] {
    const fn fixed(value: f64) -> i32 {
        (value * 65536.0 + 0.5) as i32
    }
    const HALF: i32 = 1 << 15;
    let (y, cb, cr) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
    let red = y + ((fixed(1.402) * cr + HALF) >> 16);
    let green = y + ((-fixed(0.344_14) * cb - fixed(0.714_14) * cr + HALF) >> 16);
    let blue = y + ((fixed(1.772) * cb + HALF) >> 16);
    [red, green, blue].map(|value| value.clamp(0, 255) as u8)
}

/// The component's plane at the image's size.
fn full_size(frame: &Frame, component: &Component) -> Vec<u8> {
    let plane = plane(component);
    let (w, h) = (component.width_px, component.height_px);
    let (across, down) = (frame.max_h / component.h, frame.max_v / component.v);
    let rows = |y: usize| &plane[y * w..(y + 1) * w];
    let mut out = Vec::with_capacity(frame.width_px * frame.height_px);
    for y in 0..frame.height_px {
        // The row it lies in and, for doubled rows, the other neighbour: above for the upper half, below for the lower.
        let near = y / down;
        let far = if y % 2 == 0 {
            near.saturating_sub(1)
        } else {
            (near + 1).min(h - 1)
        };
        let row: Vec<u8> = match (across, down) {
            (1, 1) => rows(y).to_vec(),
            (2, 1) if w > 2 => double_columns(rows(near)),
            (2, 2) if w > 2 => double_both(rows(near), rows(far)),
            (1, 2) => {
                let bias = if y % 2 == 0 { 1 } else { 2 };
                let pairs = rows(near).iter().zip(rows(far));
                pairs
                    .map(|(near, far)| ((3 * u16::from(*near) + u16::from(*far) + bias) >> 2) as u8)
                    .collect()
            }
            _ => rows(near)
                .iter()
                .flat_map(|sample| std::iter::repeat_n(*sample, across))
                .collect(),
        };
        out.extend_from_slice(&row[..frame.width_px]);
    }
    out
}

/// The component's samples without the padding of its blocks.
fn plane(component: &Component) -> Vec<u8> {
    let (w, h) = (component.width_px, component.height_px);
    let mut plane = vec![0; w * h];
    let steps = component
        .quantization
        .as_ref()
        .expect("the frame was checked to be complete");
    for (index, coefficients) in component.coefficients.iter().enumerate() {
        let left = index % component.stored_blocks.0 * 8;
        let top = index / component.stored_blocks.0 * 8;
        if left >= w || top >= h {
            continue;
        }
        let samples = transform::inverse(coefficients, steps);
        let columns = (w - left).min(8);
        for (y, row) in samples.chunks_exact(8).enumerate().take(h - top) {
            let start = (top + y) * w + left;
            plane[start..start + columns].copy_from_slice(&row[..columns]);
        }
    }
    plane
}

/// A row of twice the length: three quarters of the sample, one of its neighbour; rounding alternates.
fn double_columns(row: &[u8]) -> Vec<u8> {
    doubled(row.len(), |at| u32::from(row[at]), [1, 2], 2, 4)
}

/// The same in both directions, from the two nearest rows.
fn double_both(near: &[u8], far: &[u8]) -> Vec<u8> {
    let sum = |at: usize| 3 * u32::from(near[at]) + u32::from(far[at]);
    doubled(near.len(), sum, [8, 7], 4, 4)
}

fn doubled(
    length: usize,
    value: impl Fn(usize) -> u32,
    bias: [u32; 2],
    shift: u32,
    whole: u32,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(2 * length);
    for at in 0..length {
        let own = value(at);
        let left = if at == 0 {
            whole * own
        } else {
            3 * own + value(at - 1)
        };
        let right = if at + 1 == length {
            whole * own
        } else {
            3 * own + value(at + 1)
        };
        out.push(((left + bias[0]) >> shift) as u8);
        out.push(((right + bias[1]) >> shift) as u8);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chroma_is_spread_by_a_triangle() {
        // Ends are kept; between: (3·8 + 16 + 2)/4 = 10, (3·16 + 8 + 1)/4 = 14, …
        assert_eq!(double_columns(&[8, 16, 0]), [8, 10, 14, 12, 4, 0]);
        assert_eq!(double_both(&[8, 16, 0], &[8, 16, 0]), [8, 10, 14, 12, 4, 0]);
    }

    #[test]
    fn neutral_chroma_is_gray_and_red_is_red() {
        assert_eq!(ycbcr_to_rgb([77, 128, 128]), [77, 77, 77]);
        assert_eq!(ycbcr_to_rgb([76, 85, 255]), [254, 0, 0]);
    }
}
