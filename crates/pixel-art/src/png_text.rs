//! PNG files that carry text about their picture, and reading that text back.
//!
//! A text that fits Latin-1 becomes a tEXt chunk, which every viewer shows; any other an iTXt chunk in UTF-8.

use std::io::Cursor;

use png::text_metadata::{ITXtChunk, ZTXtChunk};
use png::{BitDepth, ColorType};

use crate::{Rgb8, Rgba8};

/// Why a PNG file with text cannot be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PngTextError {
    /// Not written.
    #[error("the PNG file cannot be encoded")]
    Encode(#[from] png::EncodingError),
    /// Not read.
    #[error("the PNG file cannot be decoded")]
    Decode(#[from] png::DecodingError),
}

/// A PNG file of an opaque picture with texts `(keyword, text)`.
///
/// # Errors
///
/// If a keyword is not 1 to 79 Latin-1 characters or the picture has no pixels.
pub fn encode_png_rgb(picture: &Rgb8, texts: &[(&str, &str)]) -> Result<Vec<u8>, PngTextError> {
    let size = (picture.width_px, picture.height_px);
    encode(size, ColorType::Rgb, &picture.pixels, texts)
}

/// A PNG file of a picture with alpha and texts `(keyword, text)`.
///
/// # Errors
///
/// If a keyword is not 1 to 79 Latin-1 characters or the picture has no pixels.
pub fn encode_png_rgba(picture: &Rgba8, texts: &[(&str, &str)]) -> Result<Vec<u8>, PngTextError> {
    let size = (picture.width_px, picture.height_px);
    encode(size, ColorType::Rgba, &picture.pixels, texts)
}

fn encode(
    (width_px, height_px): (u32, u32),
    color: ColorType,
    pixels: &[u8],
    texts: &[(&str, &str)],
) -> Result<Vec<u8>, PngTextError> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, width_px, height_px);
    encoder.set_color(color);
    encoder.set_depth(BitDepth::Eight);
    for (keyword, text) in texts {
        let (keyword, text) = ((*keyword).to_owned(), (*text).to_owned());
        if text.chars().all(|c| matches!(u32::from(c), 1..=255)) {
            encoder.add_text_chunk(keyword, text)?;
        } else {
            encoder.add_itxt_chunk(keyword, text)?;
        }
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    writer.finish()?;
    Ok(file)
}

/// Most bytes that a compressed text may expand to.
const MAX_TEXT_BYTES: usize = 1 << 20;

/// The text of a zTXt chunk, if it expands to no more than a MiB.
pub(crate) fn latin1_text(chunk: &ZTXtChunk) -> Result<String, png::DecodingError> {
    let mut chunk = chunk.clone();
    chunk.decompress_text_with_limit(MAX_TEXT_BYTES)?;
    chunk.get_text()
}

/// The text of an iTXt chunk, if it expands to no more than a MiB.
pub(crate) fn utf8_text(chunk: &ITXtChunk) -> Result<String, png::DecodingError> {
    let mut chunk = chunk.clone();
    chunk.decompress_text_with_limit(MAX_TEXT_BYTES)?;
    chunk.get_text()
}

/// All texts `(keyword, text)` of a PNG file, in the order tEXt, zTXt, iTXt.
///
/// # Errors
///
/// If the file is damaged, or a compressed text expands to more than a MiB.
pub fn read_png_text(bytes: &[u8]) -> Result<Vec<(String, String)>, PngTextError> {
    let mut reader = png::Decoder::new(Cursor::new(bytes)).read_info()?;
    reader.finish()?;
    let info = reader.info();
    let mut texts = Vec::new();
    for chunk in &info.uncompressed_latin1_text {
        texts.push((chunk.keyword.clone(), chunk.text.clone()));
    }
    for chunk in &info.compressed_latin1_text {
        texts.push((chunk.keyword.clone(), latin1_text(chunk)?));
    }
    for chunk in &info.utf8_text {
        texts.push((chunk.keyword.clone(), utf8_text(chunk)?));
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Limits, decode};

    #[test]
    fn texts_and_pixels_come_back() {
        let picture = Rgb8::new(2, 1, vec![1, 2, 3, 4, 5, 6]);
        let texts = [
            ("prompt", "pixel art character, red hair\nfacing forward"),
            ("prompt2", "naïve knight"),
            ("prompt3", "騎士 ⚔"),
            ("empty", ""),
        ];
        let bytes = encode_png_rgb(&picture, &texts).expect("encodable");
        let mut read = read_png_text(&bytes).expect("readable");
        read.sort();
        let mut expected = texts.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec();
        expected.sort();
        assert_eq!(read, expected);
        let decoded = decode(&bytes, &Limits { max_pixels: 2 }).expect("decodable");
        assert_eq!(decoded.compat_rgb(), picture);
    }

    #[test]
    fn a_keyword_that_png_does_not_allow_is_an_error() {
        let picture = Rgb8::filled(1, 1, [0; 3]);
        assert!(encode_png_rgb(&picture, &[("騎", "x")]).is_err());
        assert!(encode_png_rgb(&picture, &[("", "x")]).is_err());
    }

    /// A PNG of 2×1 pixels whose compressed EXIF profile, as ImageMagick writes it, has `padding` empty lines.
    fn with_profile(padding: usize) -> Vec<u8> {
        let exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
        let digits: String = exif.iter().map(|byte| format!("{byte:02x}")).collect();
        let text = format!(
            "\nexif\n      {}\n{digits}{}",
            exif.len(),
            "\n".repeat(padding)
        );
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, 2, 1);
        encoder.set_color(png::ColorType::Rgb);
        let keyword = "Raw profile type exif".to_owned();
        encoder
            .add_ztxt_chunk(keyword, text)
            .expect("a sound keyword");
        let mut writer = encoder.write_header().expect("in memory");
        writer
            .write_image_data(&[1, 2, 3, 4, 5, 6])
            .expect("in memory");
        drop(writer);
        file
    }

    #[test]
    fn a_compressed_text_of_megabytes_is_not_expanded() {
        let limits = Limits { max_pixels: 2 };
        let small = with_profile(9);
        assert_eq!(read_png_text(&small).expect("readable").len(), 1);
        let turned = decode(&small, &limits).expect("decodable");
        assert_eq!((turned.picture.width_px, turned.picture.height_px), (1, 2));
        let large = with_profile(MAX_TEXT_BYTES);
        assert!(large.len() < 16 << 10, "it is a bomb");
        read_png_text(&large).expect_err("too large");
        // Its pixels are sound, and it says nothing of how they are turned.
        let upright = decode(&large, &limits).expect("decodable");
        assert_eq!(
            (upright.picture.width_px, upright.picture.height_px),
            (2, 1)
        );
    }
}
