//! An image as Pillow holds it after `Image.open`, in Pillow's own mode: what the public recipe hashes.
//!
//! The recipe's key of an image is `sha256(image.tobytes())`: raw bytes in the file's own mode, without mode, size or
//! palette. We keep it so that its embedding files still align; [`crate::identity`] is what we go by.
//!
//! Source: Pillow 13.0 (`PngImagePlugin._MODES`, `JpegImagePlugin`, `Convert.c`), observed on files.

use sha2::{Digest, Sha256};

use crate::{Orientation, Rgb8};

/// Pillow's pixel modes that image files open in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PilMode {
    /// `1`: black and white; a byte 0 or 255 a pixel here, packed eight to a byte in [`PilImage::to_bytes`].
    OneBit,
    /// `L`: 8-bit gray.
    L,
    /// `I;16`: 16-bit gray, little-endian.
    I16,
    /// `LA`: gray and alpha.
    La,
    /// `P`: palette indices.
    P,
    /// `RGB`.
    Rgb,
    /// `RGBA`.
    Rgba,
    /// `CMYK`.
    Cmyk,
}

impl PilMode {
    /// Pillow's name of the mode.
    pub fn name(self) -> &'static str {
        match self {
            Self::OneBit => "1",
            Self::L => "L",
            Self::I16 => "I;16",
            Self::La => "LA",
            Self::P => "P",
            Self::Rgb => "RGB",
            Self::Rgba => "RGBA",
            Self::Cmyk => "CMYK",
        }
    }

    fn bytes_per_pixel(self) -> usize {
        match self {
            Self::OneBit | Self::L | Self::P => 1,
            Self::I16 | Self::La => 2,
            Self::Rgb => 3,
            Self::Rgba | Self::Cmyk => 4,
        }
    }
}

/// An image in one of Pillow's modes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PilImage {
    mode: PilMode,
    width_px: u32,
    height_px: u32,
    pixels: Vec<u8>,
    palette: Vec<[u8; 3]>,
}

impl PilImage {
    /// Takes over pixels; `palette` is empty unless the mode is [`PilMode::P`].
    ///
    /// # Panics
    ///
    /// If the buffer's length is not that of the mode and size.
    pub(crate) fn new(
        mode: PilMode,
        width_px: u32,
        height_px: u32,
        pixels: Vec<u8>,
        palette: Vec<[u8; 3]>,
    ) -> Self {
        assert_eq!(
            pixels.len(),
            width_px as usize * height_px as usize * mode.bytes_per_pixel(),
            "an image of {width_px}×{height_px} in mode {}",
            mode.name()
        );
        Self {
            mode,
            width_px,
            height_px,
            pixels,
            palette,
        }
    }

    /// `Image.mode`.
    pub fn mode(&self) -> PilMode {
        self.mode
    }

    /// Columns.
    pub fn width_px(&self) -> u32 {
        self.width_px
    }

    /// Rows.
    pub fn height_px(&self) -> u32 {
        self.height_px
    }

    /// `Image.tobytes()`.
    pub fn to_bytes(&self) -> Vec<u8> {
        if self.mode != PilMode::OneBit {
            return self.pixels.clone();
        }
        let mut bytes = Vec::with_capacity(self.pixels.len() / 8 + self.height_px as usize);
        for row in self.pixels.chunks_exact((self.width_px as usize).max(1)) {
            for eight in row.chunks(8) {
                let mut byte = 0;
                for (bit, &pixel) in eight.iter().enumerate() {
                    byte |= u8::from(pixel != 0) << (7 - bit);
                }
                bytes.push(byte);
            }
        }
        bytes
    }

    /// The public recipe's image hash, `sha256(image.tobytes())`: 64 hexadecimal digits.
    pub fn sha256(&self) -> String {
        let digest = Sha256::digest(self.to_bytes());
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// `ImageOps.exif_transpose(image)`, given the orientation that the file states.
    pub fn turned(&self, orientation: Orientation) -> Self {
        let (pixels, width_px, height_px) = orientation.apply(
            &self.pixels,
            self.width_px,
            self.height_px,
            self.mode.bytes_per_pixel(),
        );
        Self {
            mode: self.mode,
            width_px,
            height_px,
            pixels,
            palette: self.palette.clone(),
        }
    }

    /// `image.convert("RGB")`: alpha is dropped and shows hidden colour, 16-bit gray is clipped at 255.
    pub fn to_rgb(&self) -> Rgb8 {
        let count = self.width_px as usize * self.height_px as usize;
        let mut rgb = Vec::with_capacity(count * 3);
        for pixel in self.pixels.chunks_exact(self.mode.bytes_per_pixel()) {
            rgb.extend_from_slice(&match (self.mode, pixel) {
                (PilMode::OneBit | PilMode::L, &[gray]) | (PilMode::La, &[gray, _]) => [gray; 3],
                (PilMode::I16, &[low, high]) => [if high == 0 { low } else { 255 }; 3],
                (PilMode::P, &[index]) => self
                    .palette
                    .get(usize::from(index))
                    .copied()
                    .unwrap_or([0; 3]),
                (PilMode::Cmyk, &[c, m, y, k]) => cmyk_to_rgb([c, m, y, k]),
                (_, pixel) => [pixel[0], pixel[1], pixel[2]],
            });
        }
        Rgb8::new(self.width_px, self.height_px, rgb)
    }
}

/// `nk − c·nk/255` with `nk = 255 − k`, the division rounded.
///
/// Source: `cmyk2rgb`, Pillow's Convert.c.
pub(crate) fn cmyk_to_rgb([c, m, y, k]: [u8; 4]) -> [u8; 3] {
    let without_black = u32::from(255 - k);
    [c, m, y].map(|ink| {
        let product = u32::from(ink) * without_black + 128;
        let rounded = ((product >> 8) + product) >> 8;
        without_black.saturating_sub(rounded) as u8
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_rows_are_packed_from_the_high_bit_and_padded() {
        let mut pixels = vec![0; 20];
        for at in [0, 2, 9, 10] {
            pixels[at] = 255;
        }
        let image = PilImage::new(PilMode::OneBit, 10, 2, pixels, Vec::new());
        assert_eq!(image.to_bytes(), [0b1010_0000, 0b0100_0000, 0b1000_0000, 0]);
    }

    #[test]
    fn the_recipes_hash_forgets_the_palette() {
        let indices = vec![0, 1, 1, 0];
        let a = PilImage::new(PilMode::P, 2, 2, indices.clone(), vec![[1; 3], [2; 3]]);
        let b = PilImage::new(PilMode::P, 2, 2, indices, vec![[2; 3], [1; 3]]);
        assert_eq!(a.sha256(), b.sha256());
        assert_ne!(a.to_rgb(), b.to_rgb());
    }

    #[test]
    fn sixteen_bit_gray_is_clipped_like_pillow_does() {
        let image = PilImage::new(PilMode::I16, 3, 1, vec![1, 0, 255, 0, 0, 1], Vec::new());
        assert_eq!(
            image.to_rgb().pixels,
            [1, 1, 1, 255, 255, 255, 255, 255, 255]
        );
    }

    #[test]
    fn black_ink_wins_over_colours() {
        assert_eq!(cmyk_to_rgb([10, 20, 30, 255]), [0, 0, 0]);
        assert_eq!(cmyk_to_rgb([0, 128, 255, 0]), [255, 127, 0]);
        assert_eq!(cmyk_to_rgb([0, 128, 255, 55]), [200, 100, 0]);
    }
}
