//! Which image this is: a name made from pixels, so that file names, formats and metadata do not matter.
//!
//! `BLAKE3("spritelora image 1\0" · width u32 le · height u32 le · RGBA8 pixels, colour zeroed where alpha is 0)`
//!
//! Width and height are in it, so transposed sizes differ; pixels and not palette indices, so palette swaps differ;
//! always RGBA, so the same picture stored as RGB or with a palette is the same image.

use std::collections::HashSet;

use crate::Rgba8;

/// Says what is hashed; changes if that ever does.
const VERSION_TAG: &[u8] = b"spritelora image 1\0";

/// The image's name: 64 hexadecimal digits.
pub fn identity(image: &Rgba8) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(VERSION_TAG);
    hasher.update(&image.width_px.to_le_bytes());
    hasher.update(&image.height_px.to_le_bytes());
    let mut block = Vec::with_capacity(1 << 16);
    for pixels in image.pixels.chunks(1 << 16) {
        block.clear();
        for pixel in pixels.chunks_exact(4) {
            block.extend_from_slice(&visible(pixel));
        }
        hasher.update(&block);
    }
    hasher.finalize().to_hex().to_string()
}

/// How many different visible colours the image has; all fully transparent pixels count as one.
pub fn count_colors(image: &Rgba8) -> u32 {
    let colors: HashSet<[u8; 4]> = image.pixels.chunks_exact(4).map(visible).collect();
    colors.len() as u32
}

fn visible(pixel: &[u8]) -> [u8; 4] {
    match pixel {
        &[r, g, b, a] if a != 0 => [r, g, b, a],
        _ => [0; 4],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(width_px: u32, height_px: u32, pixels: &[[u8; 4]]) -> Rgba8 {
        Rgba8::new(width_px, height_px, pixels.concat())
    }

    #[test]
    fn the_identity_is_the_hash_of_tag_sizes_and_visible_pixels() {
        let bytes = b"spritelora image 1\0\x02\0\0\0\x01\0\0\0\x01\x02\x03\xff\0\0\0\0";
        assert_eq!(
            identity(&image(2, 1, &[[1, 2, 3, 255], [9, 9, 9, 0]])),
            blake3::hash(bytes).to_hex().to_string()
        );
    }

    #[test]
    fn hidden_colour_does_not_matter_and_shape_does() {
        let red = [255, 0, 0, 255];
        let a = image(2, 1, &[red, [1, 2, 3, 0]]);
        let b = image(2, 1, &[red, [9, 9, 9, 0]]);
        let c = image(1, 2, &[red, [9, 9, 9, 0]]);
        assert_eq!(identity(&a), identity(&b));
        assert_ne!(identity(&b), identity(&c));
        assert_eq!(count_colors(&a), 2);
    }

    #[test]
    fn blocks_do_not_show_in_the_hash() {
        let wide = Rgba8::new(20_000, 1, vec![7; 80_000]);
        let mut bytes = b"spritelora image 1\0\x20\x4e\0\0\x01\0\0\0".to_vec();
        bytes.extend(vec![7; 80_000]);
        assert_eq!(identity(&wide), blake3::hash(&bytes).to_hex().to_string());
    }
}
