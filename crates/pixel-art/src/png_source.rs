//! PNG files, read once into both forms: Pillow's mode for the recipe's hash and straight RGBA8 for everything else.
//!
//! Of 16-bit samples the high byte is kept. Palette indices without an entry are opaque black. Only the first image of
//! an animation counts.

use std::io::Cursor;

use png::{BitDepth, ColorType, Transformations};

use crate::decode::Raw;
use crate::png_text::{latin1_text, utf8_text};
use crate::{Limits, Orientation, PilImage, PilMode, Rgba8};

/// Width and height from the header alone, before anything is allocated for pixels.
pub(crate) fn size(bytes: &[u8]) -> Result<(u32, u32), png::DecodingError> {
    let mut decoder = png::Decoder::new(Cursor::new(bytes));
    let info = decoder.read_header_info()?;
    Ok((info.width, info.height))
}

/// Reads the first image. The size has been checked.
pub(crate) fn read(bytes: &[u8], limits: &Limits) -> Result<Raw, png::DecodingError> {
    // A row of 16-bit RGBA is 8 bytes a pixel; metadata gets its own 16 MiB.
    let memory_bytes = limits.max_pixels.saturating_mul(8).saturating_add(1 << 24);
    let mut decoder = png::Decoder::new_with_limits(
        Cursor::new(bytes),
        png::Limits {
            bytes: usize::try_from(memory_bytes).unwrap_or(usize::MAX),
        },
    );
    decoder.set_transformations(Transformations::IDENTITY);
    decoder.set_ignore_iccp_chunk(true);
    let mut reader = decoder.read_info()?;
    let buffer_bytes = reader
        .output_buffer_size()
        .ok_or(png::DecodingError::LimitsExceeded)?;
    let mut packed = vec![0; buffer_bytes];
    let frame = reader.next_frame(&mut packed)?;
    packed.truncate(frame.buffer_size());

    let info = reader.info();
    let samples = Samples {
        color: frame.color_type,
        depth: frame.bit_depth,
        width_px: frame.width,
        height_px: frame.height,
        row_bytes: frame.line_size,
        packed,
        palette: match &info.palette {
            Some(entries) => entries
                .chunks_exact(3)
                .map(|e| [e[0], e[1], e[2]])
                .collect(),
            None => Vec::new(),
        },
        transparency: info.trns.as_deref().unwrap_or(&[]).to_vec(),
    };
    let (pil, picture) = samples.read();
    // Text chunks may follow the pixels; damage behind them does not make the pixels wrong.
    let _ = reader.finish();
    Ok(Raw {
        pil,
        picture,
        orientation: orientation(reader.info()),
    })
}

/// Orientation from the eXIf chunk, ImageMagick's profile text or the XMP packet, in Pillow's order.
fn orientation(info: &png::Info<'_>) -> Orientation {
    let latin1 = |keyword: &str| -> Option<String> {
        let plain = info
            .uncompressed_latin1_text
            .iter()
            .find(|chunk| chunk.keyword == keyword)
            .map(|chunk| chunk.text.clone());
        plain.or_else(|| {
            info.compressed_latin1_text
                .iter()
                .find(|chunk| chunk.keyword == keyword)
                .and_then(|chunk| latin1_text(chunk).ok())
        })
    };
    let exif = info
        .exif_metadata
        .as_deref()
        .map(<[u8]>::to_vec)
        .or_else(|| latin1("Raw profile type exif").and_then(|text| unhex_profile(&text)));
    exif.and_then(|block| Orientation::from_exif(&block))
        .or_else(|| {
            info.utf8_text
                .iter()
                .find(|chunk| chunk.keyword == "XML:com.adobe.xmp")
                .and_then(|chunk| utf8_text(chunk).ok())
                .and_then(|packet| Orientation::from_xmp(packet.as_bytes()))
        })
        .unwrap_or(Orientation::UPRIGHT)
}

/// ImageMagick's `\n<type>\n<length>\n<hex lines>`.
fn unhex_profile(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text
        .split('\n')
        .skip(3)
        .flat_map(str::bytes)
        .filter(|byte| !byte.is_ascii_whitespace())
        .collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}

/// One PNG image as stored: rows of packed samples, not yet interpreted.
struct Samples {
    color: ColorType,
    depth: BitDepth,
    width_px: u32,
    height_px: u32,
    row_bytes: usize,
    packed: Vec<u8>,
    palette: Vec<[u8; 3]>,
    transparency: Vec<u8>,
}

impl Samples {
    fn read(self) -> (PilImage, Rgba8) {
        let count = self.width_px as usize * self.height_px as usize;
        let (mode, pil_bytes) = match (self.color, self.depth) {
            (ColorType::Grayscale, BitDepth::One) => (PilMode::OneBit, 1),
            (ColorType::Grayscale, BitDepth::Sixteen) => (PilMode::I16, 2),
            (ColorType::Grayscale, _) => (PilMode::L, 1),
            (ColorType::Rgb, _) => (PilMode::Rgb, 3),
            (ColorType::Indexed, _) => (PilMode::P, 1),
            (ColorType::GrayscaleAlpha, BitDepth::Sixteen) => (PilMode::Rgba, 4),
            (ColorType::GrayscaleAlpha, _) => (PilMode::La, 2),
            (ColorType::Rgba, _) => (PilMode::Rgba, 4),
        };
        let mut pil = Vec::with_capacity(count * pil_bytes);
        let mut rgba = Vec::with_capacity(count * 4);
        let num_channels = self.color.samples();
        let clear = self.clear_color(num_channels);
        let mut pixel = [0u16; 4];
        for y in 0..self.height_px as usize {
            let row = &self.packed[y * self.row_bytes..(y + 1) * self.row_bytes];
            for x in 0..self.width_px as usize {
                for (channel, sample) in pixel[..num_channels].iter_mut().enumerate() {
                    *sample = self.sample(row, x * num_channels + channel);
                }
                let sampled = &pixel[..num_channels];
                let is_clear = clear.is_some_and(|clear| clear[..num_channels] == *sampled);
                let alpha = if is_clear { 0 } else { 255 };
                let byte = |channel: usize| self.to_byte(sampled[channel]);
                let color = match self.color {
                    ColorType::Grayscale => [byte(0), byte(0), byte(0), alpha],
                    ColorType::Rgb => [byte(0), byte(1), byte(2), alpha],
                    ColorType::GrayscaleAlpha => [byte(0), byte(0), byte(0), byte(1)],
                    ColorType::Rgba => [byte(0), byte(1), byte(2), byte(3)],
                    ColorType::Indexed => self.indexed(usize::from(sampled[0])),
                };
                rgba.extend_from_slice(&color);
                match mode {
                    PilMode::I16 => pil.extend_from_slice(&sampled[0].to_le_bytes()),
                    PilMode::P => pil.push(sampled[0] as u8),
                    PilMode::OneBit | PilMode::L => pil.push(color[0]),
                    PilMode::La => pil.extend_from_slice(&[color[0], color[3]]),
                    PilMode::Rgb => pil.extend_from_slice(&color[..3]),
                    PilMode::Rgba | PilMode::Cmyk => pil.extend_from_slice(&color),
                }
            }
        }
        let palette = if mode == PilMode::P {
            self.palette
        } else {
            Vec::new()
        };
        (
            PilImage::new(mode, self.width_px, self.height_px, pil, palette),
            Rgba8::new(self.width_px, self.height_px, rgba),
        )
    }

    /// The `at`-th sample of a row, as stored.
    fn sample(&self, row: &[u8], at: usize) -> u16 {
        let packed = |bits: usize| -> u16 {
            let first_bit = at * bits;
            let byte = row[first_bit / 8];
            u16::from(byte >> (8 - bits - first_bit % 8)) & ((1 << bits) - 1)
        };
        match self.depth {
            BitDepth::One => packed(1),
            BitDepth::Two => packed(2),
            BitDepth::Four => packed(4),
            BitDepth::Eight => u16::from(row[at]),
            BitDepth::Sixteen => u16::from_be_bytes([row[2 * at], row[2 * at + 1]]),
        }
    }

    /// A sample spread over 0 to 255.
    fn to_byte(&self, sample: u16) -> u8 {
        match self.depth {
            BitDepth::One => (sample * 255) as u8,
            BitDepth::Two => (sample * 85) as u8,
            BitDepth::Four => (sample * 17) as u8,
            BitDepth::Eight => sample as u8,
            BitDepth::Sixteen => (sample >> 8) as u8,
        }
    }

    fn indexed(&self, index: usize) -> [u8; 4] {
        match self.palette.get(index) {
            Some(&[r, g, b]) => [
                r,
                g,
                b,
                self.transparency.get(index).copied().unwrap_or(255),
            ],
            None => [0, 0, 0, 255],
        }
    }

    /// The colour that a tRNS chunk of a gray or RGB image declares transparent, sample by sample.
    fn clear_color(&self, num_channels: usize) -> Option<[u16; 4]> {
        // The decoder leaves 16-bit samples as they are in the file and gives others in a byte each.
        let width = if self.depth == BitDepth::Sixteen {
            2
        } else {
            1
        };
        if !matches!(self.color, ColorType::Grayscale | ColorType::Rgb)
            || self.transparency.len() < width * num_channels
        {
            return None;
        }
        let mut clear = [0; 4];
        for (sample, bytes) in clear.iter_mut().zip(self.transparency.chunks_exact(width)) {
            *sample = bytes
                .iter()
                .fold(0, |value, byte| value << 8 | u16::from(*byte));
        }
        Some(clear)
    }
}
