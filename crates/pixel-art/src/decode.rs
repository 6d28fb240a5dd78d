//! From untrusted bytes to pixels. Sizes are read from the header and checked before anything is allocated for them.
//!
//! PNG and JPEG are read by our own hands down to Pillow's mode; WebP, GIF and BMP come through the `image` crate, first
//! frame only, and their recipe hash is over its RGB or RGBA (Pillow keeps GIF and palette BMP as indices: there the
//! two differ).

use std::borrow::Cow;
use std::io::Cursor;

use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader};

use crate::jpeg::{self, JpegError};
use crate::{Orientation, PilImage, PilMode, Rgb8, Rgba8, identity, png_source};

/// What is refused before it is decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Largest `width · height`.
    pub max_pixels: u64,
}

impl Limits {
    /// Most bytes that a file of an allowed image can have: 16-bit RGBA uncompressed, and 16 MiB of metadata.
    pub fn max_file_bytes(&self) -> u64 {
        self.max_pixels.saturating_mul(8).saturating_add(16 << 20)
    }
}

/// Why bytes are not an image that can be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// There are no bytes.
    #[error("the file is empty (0 bytes)")]
    Empty,
    /// The first bytes are of no format that is read.
    #[error("the file is not a PNG, JPEG, WebP, GIF or BMP image (it starts with {start:02x?})")]
    UnknownFormat {
        /// Up to 8 bytes.
        start: Vec<u8>,
    },
    /// The header says more pixels than are allowed.
    #[error("the header says {width_px}×{height_px} px; at most {max_pixels} pixels are decoded")]
    TooLarge {
        /// Columns by the header.
        width_px: u32,
        /// Rows by the header.
        height_px: u32,
        /// The limit.
        max_pixels: u64,
    },
    /// A PNG file that is damaged or uses what is not read.
    #[error("the PNG file cannot be decoded")]
    Png(#[source] png::DecodingError),
    /// A JPEG file that is damaged or uses what is not read.
    #[error("the JPEG file cannot be decoded")]
    Jpeg(#[source] JpegError),
    /// Another file that is damaged or uses what is not read.
    #[error("the {format} file cannot be decoded")]
    Other {
        /// The format.
        format: &'static str,
        /// The decoder's reason.
        source: ImageError,
    },
}

impl DecodeError {
    /// The reason in one word, for `rejects.parquet`.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Empty => "zero-bytes",
            Self::UnknownFormat { .. } => "unknown-format",
            Self::TooLarge { .. } => "too-large",
            Self::Png(_) | Self::Jpeg(_) | Self::Other { .. } => "undecodable",
        }
    }
}

/// An image file's pixels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded {
    /// Straight RGBA, turned upright.
    pub picture: Rgba8,
    /// What Pillow would hold, as stored (not turned).
    pub pil: PilImage,
    /// How the file says that it must be turned.
    pub orientation: Orientation,
}

impl Decoded {
    /// The name of the image, [`identity`] of the upright pixels.
    pub fn identity(&self) -> String {
        identity(&self.picture)
    }

    /// The public recipe's hash, before EXIF turning.
    pub fn compat_sha256(&self) -> String {
        self.pil.sha256()
    }

    /// The public recipe's hash, after EXIF turning.
    pub fn compat_sha256_oriented(&self) -> String {
        self.upright_pil().sha256()
    }

    /// What the public recipe trains on: turned, then converted to RGB with hidden colour showing.
    pub fn compat_rgb(&self) -> Rgb8 {
        self.upright_pil().to_rgb()
    }

    fn upright_pil(&self) -> Cow<'_, PilImage> {
        if self.orientation == Orientation::UPRIGHT {
            Cow::Borrowed(&self.pil)
        } else {
            Cow::Owned(self.pil.turned(self.orientation))
        }
    }
}

/// A file's pixels as stored, before turning.
pub(crate) struct Raw {
    pub pil: PilImage,
    pub picture: Rgba8,
    pub orientation: Orientation,
}

/// Decodes an image file.
///
/// # Errors
///
/// If the bytes are empty, of an unknown format, too large by their header, damaged or of an unsupported kind.
pub fn decode(bytes: &[u8], limits: &Limits) -> Result<Decoded, DecodeError> {
    let raw = match bytes {
        [] => return Err(DecodeError::Empty),
        [0x89, b'P', b'N', b'G', ..] => {
            check_size(png_source::size(bytes).map_err(DecodeError::Png)?, limits)?;
            png_source::read(bytes, limits).map_err(DecodeError::Png)?
        }
        [0xFF, 0xD8, ..] => {
            check_size(jpeg::size(bytes).map_err(DecodeError::Jpeg)?, limits)?;
            jpeg::read(bytes).map_err(DecodeError::Jpeg)?
        }
        [
            b'R',
            b'I',
            b'F',
            b'F',
            _,
            _,
            _,
            _,
            b'W',
            b'E',
            b'B',
            b'P',
            ..,
        ] => other(bytes, ImageFormat::WebP, "WebP", limits)?,
        [b'G', b'I', b'F', b'8', ..] => {
            // Its decoder looks for the first frame before it tells the size.
            if let Some(&[w0, w1, h0, h1]) = bytes.get(6..10) {
                let side = |low, high| u32::from(u16::from_le_bytes([low, high]));
                check_size((side(w0, w1), side(h0, h1)), limits)?;
            }
            other(bytes, ImageFormat::Gif, "GIF", limits)?
        }
        [b'B', b'M', ..] => other(bytes, ImageFormat::Bmp, "BMP", limits)?,
        _ => {
            return Err(DecodeError::UnknownFormat {
                start: bytes[..bytes.len().min(8)].to_vec(),
            });
        }
    };
    let Raw {
        pil,
        picture,
        orientation,
    } = raw;
    let picture = if orientation == Orientation::UPRIGHT {
        picture
    } else {
        let (pixels, width_px, height_px) =
            orientation.apply(&picture.pixels, picture.width_px, picture.height_px, 4);
        Rgba8::new(width_px, height_px, pixels)
    };
    Ok(Decoded {
        picture,
        pil,
        orientation,
    })
}

/// Why a source image is not the one that was ingested.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// It no longer decodes.
    #[error("the image no longer decodes; it did at ingest")]
    Decode(#[from] DecodeError),
    /// It decodes to other pixels.
    #[error(
        "the image changed since ingest: its pixels are {found}, ingest saw {expected}; run ingest again"
    )]
    Changed {
        /// The sample id.
        expected: String,
        /// The identity of what is there now.
        found: String,
    },
}

/// Decodes an image file that must be the sample `sample_id`.
///
/// # Errors
///
/// If it does not decode, or decodes to an image of another [`identity`].
pub fn decode_expecting(
    bytes: &[u8],
    limits: &Limits,
    sample_id: &str,
) -> Result<Decoded, SourceError> {
    let decoded = decode(bytes, limits)?;
    let found = decoded.identity();
    if found == sample_id {
        Ok(decoded)
    } else {
        Err(SourceError::Changed {
            expected: sample_id.to_owned(),
            found,
        })
    }
}

fn check_size((width_px, height_px): (u32, u32), limits: &Limits) -> Result<(), DecodeError> {
    if u64::from(width_px) * u64::from(height_px) > limits.max_pixels {
        return Err(DecodeError::TooLarge {
            width_px,
            height_px,
            max_pixels: limits.max_pixels,
        });
    }
    Ok(())
}

fn other(
    bytes: &[u8],
    format: ImageFormat,
    name: &'static str,
    limits: &Limits,
) -> Result<Raw, DecodeError> {
    let failed = |source| DecodeError::Other {
        format: name,
        source,
    };
    let mut decoder = ImageReader::with_format(Cursor::new(bytes), format)
        .into_decoder()
        .map_err(failed)?;
    check_size(decoder.dimensions(), limits)?;
    let exif = decoder.exif_metadata().map_err(failed)?;
    let xmp = decoder.xmp_metadata().map_err(failed)?;
    let orientation = exif
        .and_then(|block| Orientation::from_exif(&block))
        .or_else(|| xmp.and_then(|packet| Orientation::from_xmp(&packet)))
        .unwrap_or(Orientation::UPRIGHT);
    let image = DynamicImage::from_decoder(decoder).map_err(failed)?;
    let (width_px, height_px) = (image.width(), image.height());
    let (mode, picture) = if image.color().has_alpha() {
        (PilMode::Rgba, image.into_rgba8().into_raw())
    } else {
        (PilMode::Rgb, image.into_rgb8().into_raw())
    };
    let pil = PilImage::new(mode, width_px, height_px, picture, Vec::new());
    let picture = match mode {
        PilMode::Rgba => Rgba8::new(width_px, height_px, pil.to_bytes()),
        _ => pil.to_rgb().into_rgba(),
    };
    Ok(Raw {
        pil,
        picture,
        orientation,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { max_pixels: 1000 };

    /// A PNG file's signature and header chunk, with nothing behind.
    fn png_header(width_px: u32, height_px: u32) -> Vec<u8> {
        let mut header = b"IHDR".to_vec();
        header.extend(width_px.to_be_bytes());
        header.extend(height_px.to_be_bytes());
        header.extend([8, 6, 0, 0, 0]);
        // CRC-32 as PNG wants it, bit by bit.
        let crc = !header.iter().fold(!0u32, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
                (crc >> 1) ^ if crc & 1 == 1 { 0xEDB8_8320 } else { 0 }
            })
        });
        let mut file = b"\x89PNG\r\n\x1a\n\0\0\0\x0d".to_vec();
        file.extend(header);
        file.extend(crc.to_be_bytes());
        file
    }

    fn reason(bytes: &[u8]) -> &'static str {
        decode(bytes, &LIMITS).expect_err("not an image").reason()
    }

    /// A row of two pixels with a colour that is transparent; the first pixel has it.
    fn keyed(color: png::ColorType, depth: png::BitDepth, pixels: &[u8], key: &[u8]) -> Vec<u8> {
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, 2, 1);
        encoder.set_color(color);
        encoder.set_depth(depth);
        encoder.set_trns(key.to_vec());
        let mut writer = encoder.write_header().expect("a header");
        writer.write_image_data(pixels).expect("two pixels");
        writer.finish().expect("an end");
        file
    }

    #[test]
    fn a_transparent_colour_is_transparent_at_every_depth() {
        use png::{BitDepth, ColorType};
        for (color, depth, pixels, key) in [
            (
                ColorType::Rgb,
                BitDepth::Eight,
                &[255, 0, 255, 9, 8, 7][..],
                &[0, 255, 0, 0, 0, 255][..],
            ),
            (
                ColorType::Rgb,
                BitDepth::Sixteen,
                &[1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 7],
                &[1, 2, 3, 4, 5, 6],
            ),
            (ColorType::Grayscale, BitDepth::Eight, &[7, 8], &[0, 7]),
            (
                ColorType::Grayscale,
                BitDepth::Sixteen,
                &[1, 7, 2, 7],
                &[1, 7],
            ),
            (ColorType::Grayscale, BitDepth::One, &[0b0100_0000], &[0, 0]),
        ] {
            let file = keyed(color, depth, pixels, key);
            let picture = decode(&file, &LIMITS).expect("a PNG").picture;
            let alpha: Vec<u8> = picture.pixels.iter().skip(3).step_by(4).copied().collect();
            assert_eq!(alpha, [0, 255], "{color:?} {depth:?}");
        }
    }

    #[test]
    fn every_kind_of_bad_file_has_its_reason() {
        assert_eq!(reason(b""), "zero-bytes");
        assert_eq!(reason(b"hello"), "unknown-format");
        assert_eq!(reason(&png_header(60_000, 60_000)), "too-large");
        assert_eq!(reason(&png_header(3, 3)), "undecodable");
        assert_eq!(reason(b"\xff\xd8\xff\xd9"), "undecodable");
        assert_eq!(reason(b"GIF89a"), "undecodable");
        assert_eq!(reason(b"RIFF\0\0\0\0WEBPVP8 "), "undecodable");
        assert_eq!(reason(b"BM"), "undecodable");
    }

    #[test]
    fn a_huge_header_is_refused_with_its_size() {
        let error = decode(&png_header(60_000, 60_000), &LIMITS).expect_err("too large");
        assert_eq!(
            error.to_string(),
            "the header says 60000×60000 px; at most 1000 pixels are decoded"
        );
        let jpeg = b"\xff\xd8\xff\xc0\0\x0b\x08\xea\x60\xea\x60\x01\x01\x11\0";
        assert_eq!(reason(jpeg), "too-large");
        assert_eq!(reason(b"GIF89a\x60\xea\x60\xea\0\0\0"), "too-large");
    }

    #[test]
    fn a_changed_source_is_named_with_both_identities() {
        let image = Rgba8::new(1, 1, vec![1, 2, 3, 255]);
        let bytes = crate::encode_png_rgba(&image, &[]).expect("encodable");
        let id = identity(&image);
        assert!(decode_expecting(&bytes, &LIMITS, &id).is_ok());
        let error = decode_expecting(&bytes, &LIMITS, "0123").expect_err("another image");
        assert!(error.to_string().contains(&id) && error.to_string().contains("run ingest again"));
    }
}
