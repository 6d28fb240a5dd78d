//! JPEG files, decoded to the bytes that libjpeg-turbo gives, because the public recipe's hashes are over those bytes.
//!
//! The standard leaves rounding open, and no decoder written in Rust that we tried (zune-jpeg 0.5, jpeg-decoder 0.3)
//! rounds like libjpeg, so this one follows its choices: the accurate integer inverse transform, triangle-filtered
//! chroma, 16-bit fixed-point colour conversion. Baseline, extended and progressive Huffman files with 8-bit samples
//! of 1, 3 or 4 components are read, which is what Pillow opens; arithmetic coding and lossless files are refused.
//!
//! A file is refused where libjpeg would warn and make up data: a damaged picture is no training example.
//!
//! Source: ITU-T T.81; rounding from libjpeg-turbo's behaviour (`tests/pillow.rs` holds digests).

mod frame;
mod huffman;
mod output;
mod scan;
mod transform;

use frame::{Adobe, Frame};
use huffman::HuffmanTable;

use crate::decode::Raw;
use crate::{Orientation, PilImage};

/// Progressive files can ask for any number of passes over the image; libjpeg's own files use about ten.
const MAX_SCANS: u32 = 500;

/// Why a JPEG file cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum JpegError {
    /// The file ends, or a segment does, before what it promises.
    #[error("the file ends too early (at byte {at})")]
    Truncated {
        /// Position in the file.
        at: usize,
    },
    /// A segment contradicts the standard or an earlier segment.
    #[error("{what} is invalid (at byte {at})")]
    Invalid {
        /// The part that is wrong.
        what: &'static str,
        /// Position in the file.
        at: usize,
    },
    /// A valid kind of JPEG that is not read here.
    #[error("{what} is not supported")]
    Unsupported {
        /// The kind.
        what: &'static str,
    },
}

/// Width and height from the frame header.
pub(crate) fn size(bytes: &[u8]) -> Result<(u32, u32), JpegError> {
    let mut segments = Segments::new(bytes)?;
    while let Some(segment) = segments.next()? {
        if is_frame_header(segment.marker) {
            return Frame::header(&segment);
        }
        if matches!(segment.marker, marker::EOI | marker::SOS) {
            break;
        }
    }
    Err(JpegError::Invalid {
        what: "a file without a frame header",
        at: segments.at,
    })
}

/// Reads the image. The size has been checked.
pub(crate) fn read(bytes: &[u8]) -> Result<Raw, JpegError> {
    let mut segments = Segments::new(bytes)?;
    let mut decoder = Decoder::default();
    let mut ended = false;
    while let Some(segment) = segments.next()? {
        match segment.marker {
            marker::EOI => {
                ended = true;
                break;
            }
            marker::SOS => segments.at = decoder.scan(&segment, bytes)?,
            _ => decoder.segment(&segment)?,
        }
    }
    let frame = decoder.frame.ok_or(JpegError::Invalid {
        what: "a file without a frame",
        at: bytes.len(),
    })?;
    // Without an end marker a progressive file may lack passes; a baseline file that has all its blocks is whole.
    if !frame.is_complete() || (frame.is_progressive && !ended) {
        return Err(JpegError::Truncated { at: bytes.len() });
    }
    let (mode, pixels) = output::pixels(&frame, decoder.has_jfif, decoder.adobe);
    let pil = PilImage::new(
        mode,
        frame.width_px as u32,
        frame.height_px as u32,
        pixels,
        Vec::new(),
    );
    let picture = pil.to_rgb().into_rgba();
    Ok(Raw {
        pil,
        picture,
        orientation: decoder
            .exif_orientation
            .or(decoder.xmp_orientation)
            .unwrap_or(Orientation::UPRIGHT),
    })
}

/// Second bytes of markers.
mod marker {
    pub const SOF0: u8 = 0xC0;
    pub const SOF2: u8 = 0xC2;
    pub const DHT: u8 = 0xC4;
    pub const JPG: u8 = 0xC8;
    pub const DAC: u8 = 0xCC;
    pub const SOF15: u8 = 0xCF;
    pub const RST0: u8 = 0xD0;
    pub const SOI: u8 = 0xD8;
    pub const EOI: u8 = 0xD9;
    pub const SOS: u8 = 0xDA;
    pub const DQT: u8 = 0xDB;
    pub const DRI: u8 = 0xDD;
    pub const APP0: u8 = 0xE0;
    pub const APP1: u8 = 0xE1;
    pub const APP14: u8 = 0xEE;
    pub const TEM: u8 = 0x01;
}

fn is_frame_header(found: u8) -> bool {
    (marker::SOF0..=marker::SOF15).contains(&found)
        && !matches!(found, marker::DHT | marker::JPG | marker::DAC)
}

/// One marker segment: what follows its two length bytes.
struct Segment<'a> {
    marker: u8,
    payload: &'a [u8],
    /// Where the payload starts in the file.
    at: usize,
}

impl Segment<'_> {
    fn invalid(&self, what: &'static str) -> JpegError {
        JpegError::Invalid { what, at: self.at }
    }

    fn byte(&self, index: usize) -> Result<u8, JpegError> {
        self.payload
            .get(index)
            .copied()
            .ok_or(JpegError::Truncated {
                at: self.at + self.payload.len(),
            })
    }

    fn short(&self, index: usize) -> Result<u16, JpegError> {
        Ok(u16::from_be_bytes([
            self.byte(index)?,
            self.byte(index + 1)?,
        ]))
    }
}

/// Walks over the marker segments.
struct Segments<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Segments<'a> {
    fn new(bytes: &'a [u8]) -> Result<Self, JpegError> {
        match bytes {
            [0xFF, marker::SOI, ..] => Ok(Self { bytes, at: 2 }),
            _ => Err(JpegError::Invalid {
                what: "the first marker",
                at: 0,
            }),
        }
    }

    /// The next segment, skipping what is between segments; `None` at the end of the file.
    fn next(&mut self) -> Result<Option<Segment<'a>>, JpegError> {
        loop {
            while self.bytes.get(self.at).is_some_and(|byte| *byte != 0xFF) {
                self.at += 1;
            }
            while self.bytes.get(self.at) == Some(&0xFF) {
                self.at += 1;
            }
            let Some(&found) = self.bytes.get(self.at) else {
                return Ok(None);
            };
            self.at += 1;
            match found {
                0 | marker::TEM | marker::RST0..=marker::SOI => {}
                marker::EOI => {
                    return Ok(Some(Segment {
                        marker: found,
                        payload: &[],
                        at: self.at,
                    }));
                }
                _ => {
                    let truncated = JpegError::Truncated {
                        at: self.bytes.len(),
                    };
                    let Some(&[high, low]) = self.bytes.get(self.at..self.at + 2) else {
                        return Err(truncated);
                    };
                    let length = usize::from(u16::from_be_bytes([high, low]));
                    if length < 2 {
                        return Err(JpegError::Invalid {
                            what: "a segment's length",
                            at: self.at,
                        });
                    }
                    let start = self.at + 2;
                    self.at += length;
                    let payload = self.bytes.get(start..self.at).ok_or(truncated)?;
                    return Ok(Some(Segment {
                        marker: found,
                        payload,
                        at: start,
                    }));
                }
            }
        }
    }
}

/// What the segments so far have set up.
#[derive(Default)]
struct Decoder {
    frame: Option<Frame>,
    quantization: [Option<[u16; 64]>; 4],
    dc_tables: [Option<HuffmanTable>; 4],
    ac_tables: [Option<HuffmanTable>; 4],
    restart_interval: usize,
    num_scans: u32,
    has_jfif: bool,
    adobe: Option<Adobe>,
    exif_orientation: Option<Orientation>,
    xmp_orientation: Option<Orientation>,
}

impl Decoder {
    fn segment(&mut self, segment: &Segment<'_>) -> Result<(), JpegError> {
        match segment.marker {
            marker::DQT => self.quantization_tables(segment),
            marker::DHT => self.huffman_tables(segment),
            marker::DRI => {
                self.restart_interval = usize::from(segment.short(0)?);
                Ok(())
            }
            marker::APP0 if segment.payload.starts_with(b"JFIF\0") => {
                self.has_jfif = true;
                Ok(())
            }
            marker::APP1 => {
                if segment.payload.starts_with(b"Exif\0\0") {
                    let found = Orientation::from_exif(segment.payload);
                    self.exif_orientation = self.exif_orientation.or(found);
                } else if segment
                    .payload
                    .starts_with(b"http://ns.adobe.com/xap/1.0/\0")
                {
                    let found = Orientation::from_xmp(segment.payload);
                    self.xmp_orientation = self.xmp_orientation.or(found);
                }
                Ok(())
            }
            marker::APP14
                if segment.payload.starts_with(b"Adobe") && segment.payload.len() >= 12 =>
            {
                self.adobe = Some(match segment.payload[11] {
                    0 => Adobe::Untransformed,
                    2 => Adobe::Ycck,
                    _ => Adobe::Ycbcr,
                });
                Ok(())
            }
            found if is_frame_header(found) => {
                if self.frame.is_some() {
                    return Err(segment.invalid("a second frame header"));
                }
                self.frame = Some(Frame::new(segment)?);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn quantization_tables(&mut self, segment: &Segment<'_>) -> Result<(), JpegError> {
        let mut at = 0;
        while at < segment.payload.len() {
            let head = segment.byte(at)?;
            at += 1;
            let (wide, slot) = (head >> 4, usize::from(head & 15));
            if wide > 1 || slot > 3 {
                return Err(segment.invalid("a quantization table's number"));
            }
            let mut table = [0; 64];
            for position in transform::ZIGZAG {
                table[position] = if wide == 1 {
                    at += 2;
                    segment.short(at - 2)?
                } else {
                    at += 1;
                    u16::from(segment.byte(at - 1)?)
                };
            }
            self.quantization[slot] = Some(table);
        }
        Ok(())
    }

    fn huffman_tables(&mut self, segment: &Segment<'_>) -> Result<(), JpegError> {
        let mut at = 0;
        while at < segment.payload.len() {
            let head = segment.byte(at)?;
            let mut counts = [0; 16];
            for (index, count) in counts.iter_mut().enumerate() {
                *count = segment.byte(at + 1 + index)?;
            }
            let num_symbols: usize = counts.iter().map(|count| usize::from(*count)).sum();
            at += 17;
            let symbols = segment
                .payload
                .get(at..at + num_symbols)
                .ok_or_else(|| segment.invalid("a Huffman table's length"))?;
            at += num_symbols;
            let table = HuffmanTable::new(&counts, symbols)
                .ok_or_else(|| segment.invalid("a Huffman table"))?;
            let slot = usize::from(head & 15);
            match (head >> 4, slot) {
                (0, 0..=3) => self.dc_tables[slot] = Some(table),
                (1, 0..=3) => self.ac_tables[slot] = Some(table),
                _ => return Err(segment.invalid("a Huffman table's number")),
            }
        }
        Ok(())
    }

    /// Decodes one pass; returns where its data ends.
    fn scan(&mut self, segment: &Segment<'_>, bytes: &[u8]) -> Result<usize, JpegError> {
        self.num_scans += 1;
        if self.num_scans > MAX_SCANS {
            return Err(segment.invalid("the number of scans"));
        }
        let frame = self
            .frame
            .as_mut()
            .ok_or_else(|| segment.invalid("a scan before the frame header"))?;
        let scan = scan::Scan::new(segment, frame)?;
        // A component keeps the table that was in force when it was first scanned.
        for part in &scan.parts {
            let component = &mut frame.components[part.component];
            if component.quantization.is_none() {
                component.quantization = self.quantization[component.quantization_slot];
            }
        }
        let start = segment.at + segment.payload.len();
        scan.decode(
            frame,
            &self.dc_tables,
            &self.ac_tables,
            self.restart_interval,
            bytes,
            start,
        )
    }
}
