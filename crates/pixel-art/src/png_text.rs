//! PNG files that carry text about their picture, and reading that text back.
//!
//! A text that fits Latin-1 becomes a tEXt chunk, which every viewer shows; any other an iTXt chunk in UTF-8.

use std::io::Cursor;

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

/// All texts `(keyword, text)` of a PNG file, in the order tEXt, zTXt, iTXt.
///
/// # Errors
///
/// If the file is damaged.
pub fn read_png_text(bytes: &[u8]) -> Result<Vec<(String, String)>, PngTextError> {
    let mut reader = png::Decoder::new(Cursor::new(bytes)).read_info()?;
    reader.finish()?;
    let info = reader.info();
    let mut texts = Vec::new();
    for chunk in &info.uncompressed_latin1_text {
        texts.push((chunk.keyword.clone(), chunk.text.clone()));
    }
    for chunk in &info.compressed_latin1_text {
        texts.push((chunk.keyword.clone(), chunk.get_text()?));
    }
    for chunk in &info.utf8_text {
        texts.push((chunk.keyword.clone(), chunk.get_text()?));
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
}
