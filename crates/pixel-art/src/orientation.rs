//! The eight ways a camera can hold an image, as EXIF numbers them, and where files say so.
//!
//! EXIF is a TIFF header, one directory of 12-byte entries, tag 0x0112 = orientation. If it says nothing, the XMP
//! packet's `tiff:Orientation` counts, as in Pillow.

/// How the stored pixels must be turned to stand upright: EXIF's 1 to 8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Orientation(u8);

/// TIFF tag "Orientation".
const TAG_ORIENTATION: u16 = 0x0112;

impl Orientation {
    /// Stored upright.
    pub const UPRIGHT: Self = Self(1);

    /// The orientation with EXIF's number; `None` outside of 1 to 8.
    pub fn from_number(number: u32) -> Option<Self> {
        match number {
            1..=8 => Some(Self(number as u8)),
            _ => None,
        }
    }

    /// EXIF's number, 1 to 8.
    pub fn number(self) -> u8 {
        self.0
    }

    /// Reads the tag from an EXIF block (a TIFF header, perhaps after `Exif\0\0`); `None` if absent or unreadable.
    pub fn from_exif(mut block: &[u8]) -> Option<Self> {
        while let Some(rest) = block.strip_prefix(b"Exif\0\0") {
            block = rest;
        }
        let big_endian = match block.get(..4)? {
            b"MM\0*" => true,
            b"II*\0" => false,
            _ => return None,
        };
        let short = |at: usize| -> Option<u16> {
            let bytes: [u8; 2] = block.get(at..at.checked_add(2)?)?.try_into().ok()?;
            Some(if big_endian {
                u16::from_be_bytes(bytes)
            } else {
                u16::from_le_bytes(bytes)
            })
        };
        let long = |at: usize| -> Option<u32> {
            let bytes: [u8; 4] = block.get(at..at.checked_add(4)?)?.try_into().ok()?;
            Some(if big_endian {
                u32::from_be_bytes(bytes)
            } else {
                u32::from_le_bytes(bytes)
            })
        };
        let directory = long(4)? as usize;
        let num_entries = short(directory)? as usize;
        for entry in 0..num_entries {
            let at = directory.checked_add(2 + 12 * entry)?;
            if short(at)? != TAG_ORIENTATION {
                continue;
            }
            let value = match short(at + 2)? {
                1 => u32::from(*block.get(at + 8)?),
                3 => u32::from(short(at + 8)?),
                4 => long(at + 8)?,
                _ => return None,
            };
            return Self::from_number(value);
        }
        None
    }

    /// Reads `tiff:Orientation` from an XMP packet, written as an attribute or as an element.
    pub fn from_xmp(packet: &[u8]) -> Option<Self> {
        const NAME: &[u8] = b"tiff:Orientation";
        let mut rest = packet;
        while let Some(at) = rest.windows(NAME.len()).position(|window| window == NAME) {
            rest = &rest[at + NAME.len()..];
            let value = rest.strip_prefix(b"=\"").or(rest.strip_prefix(b">"));
            if let Some([digit @ b'0'..=b'9', ..]) = value {
                return Self::from_number(u32::from(digit - b'0'));
            }
        }
        None
    }

    /// Turns pixels `(h w c)` of `bytes_per_pixel` upright; returns them with the new width and height.
    ///
    /// # Panics
    ///
    /// If the buffer's length is not `height · width · bytes_per_pixel`.
    pub fn apply(
        self,
        pixels: &[u8],
        width_px: u32,
        height_px: u32,
        bytes_per_pixel: usize,
    ) -> (Vec<u8>, u32, u32) {
        let (w, h) = (width_px as usize, height_px as usize);
        assert_eq!(
            pixels.len(),
            w * h * bytes_per_pixel,
            "an image of {width_px}×{height_px} with {bytes_per_pixel} bytes a pixel"
        );
        if self == Self::UPRIGHT {
            return (pixels.to_vec(), width_px, height_px);
        }
        let sideways = self.0 >= 5;
        let (out_w, out_h) = if sideways { (h, w) } else { (w, h) };
        let mut out = Vec::with_capacity(pixels.len());
        for y in 0..out_h {
            for x in 0..out_w {
                let (from_x, from_y) = match self.0 {
                    2 => (w - 1 - x, y),
                    3 => (w - 1 - x, h - 1 - y),
                    4 => (x, h - 1 - y),
                    5 => (y, x),
                    6 => (y, h - 1 - x),
                    7 => (w - 1 - y, h - 1 - x),
                    _ => (w - 1 - y, x),
                };
                let at = (from_y * w + from_x) * bytes_per_pixel;
                out.extend_from_slice(&pixels[at..at + bytes_per_pixel]);
            }
        }
        (out, out_w as u32, out_h as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The image `1 2 3 / 4 5 6` turned.
    fn turned(number: u32) -> (Vec<u8>, u32, u32) {
        Orientation::from_number(number)
            .expect("1 to 8")
            .apply(&[1, 2, 3, 4, 5, 6], 3, 2, 1)
    }

    #[test]
    fn all_eight_orientations_turn_as_exif_says() {
        assert_eq!(turned(1), (vec![1, 2, 3, 4, 5, 6], 3, 2));
        assert_eq!(turned(2), (vec![3, 2, 1, 6, 5, 4], 3, 2));
        assert_eq!(turned(3), (vec![6, 5, 4, 3, 2, 1], 3, 2));
        assert_eq!(turned(4), (vec![4, 5, 6, 1, 2, 3], 3, 2));
        assert_eq!(turned(5), (vec![1, 4, 2, 5, 3, 6], 2, 3));
        assert_eq!(turned(6), (vec![4, 1, 5, 2, 6, 3], 2, 3));
        assert_eq!(turned(7), (vec![6, 3, 5, 2, 4, 1], 2, 3));
        assert_eq!(turned(8), (vec![3, 6, 2, 5, 1, 4], 2, 3));
    }

    #[test]
    fn exif_is_read_in_both_byte_orders() {
        let big = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
        let little = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x08\0\0\0\0\0\0\0";
        assert_eq!(
            Orientation::from_exif(big).map(Orientation::number),
            Some(6)
        );
        assert_eq!(
            Orientation::from_exif(little).map(Orientation::number),
            Some(8)
        );
    }

    #[test]
    fn a_broken_exif_block_says_nothing() {
        assert_eq!(Orientation::from_exif(b""), None);
        assert_eq!(Orientation::from_exif(b"MM\0*\xff\xff\xff\xff"), None);
        assert_eq!(Orientation::from_exif(b"MM\0*\0\0\0\x08\xff\xff"), None);
        let nine = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0\0\0\0\0";
        assert_eq!(Orientation::from_exif(nine), None);
    }

    #[test]
    fn xmp_is_read_as_attribute_and_as_element() {
        let number = |packet: &[u8]| Orientation::from_xmp(packet).map(Orientation::number);
        assert_eq!(number(b"<x tiff:Orientation=\"3\"/>"), Some(3));
        assert_eq!(number(b"<tiff:Orientation>8</tiff:Orientation>"), Some(8));
        assert_eq!(number(b"<x/>"), None);
    }
}
