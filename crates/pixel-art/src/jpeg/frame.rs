//! The frame: sizes, components, and every coefficient until all scans are in.

use super::{JpegError, Segment, marker};

/// What Adobe's marker says of the colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Adobe {
    /// RGB or CMYK as stored.
    Untransformed,
    /// YCbCr.
    Ycbcr,
    /// YCbCr of the inverted CMY, and K.
    Ycck,
}

/// One colour component.
pub(super) struct Component {
    pub id: u8,
    /// Horizontal and vertical sampling factors.
    pub h: usize,
    pub v: usize,
    pub quantization_slot: usize,
    pub quantization: Option<[u16; 64]>,
    /// Samples that belong to the image.
    pub width_px: usize,
    pub height_px: usize,
    /// Blocks that belong to the image; scans of one component hold only these.
    pub image_blocks: (usize, usize),
    /// Blocks stored, whole MCUs: columns and rows.
    pub stored_blocks: (usize, usize),
    /// Block by block, each in natural (not zigzag) order.
    pub coefficients: Vec<[i16; 64]>,
}

/// The image under construction.
pub(super) struct Frame {
    pub width_px: usize,
    pub height_px: usize,
    pub is_progressive: bool,
    pub components: Vec<Component>,
    pub max_h: usize,
    pub max_v: usize,
}

impl Frame {
    /// Width and height only.
    pub(super) fn header(segment: &Segment<'_>) -> Result<(u32, u32), JpegError> {
        Ok((u32::from(segment.short(3)?), u32::from(segment.short(1)?)))
    }

    pub(super) fn new(segment: &Segment<'_>) -> Result<Self, JpegError> {
        let unsupported = |what| Err(JpegError::Unsupported { what });
        match segment.marker - marker::SOF0 {
            0..=2 => {}
            3 => return unsupported("lossless JPEG"),
            5..=7 => return unsupported("hierarchical JPEG"),
            _ => return unsupported("arithmetic-coded JPEG"),
        }
        if segment.byte(0)? != 8 {
            return unsupported("JPEG with more than 8 bits a sample");
        }
        let (width_px, height_px) = Self::header(segment)?;
        let (width_px, height_px) = (width_px as usize, height_px as usize);
        if width_px == 0 || height_px == 0 {
            return Err(segment.invalid("the image's size"));
        }
        let num_components = usize::from(segment.byte(5)?);
        if !matches!(num_components, 1 | 3 | 4) {
            return unsupported("JPEG with other than 1, 3 or 4 components");
        }
        let mut heads = Vec::new();
        for index in 0..num_components {
            let id = segment.byte(6 + 3 * index)?;
            let factors = segment.byte(7 + 3 * index)?;
            let (h, v) = (usize::from(factors >> 4), usize::from(factors & 15));
            let slot = usize::from(segment.byte(8 + 3 * index)?);
            if !(1..=4).contains(&h) || !(1..=4).contains(&v) || slot > 3 {
                return Err(segment.invalid("a component"));
            }
            heads.push((id, h, v, slot));
        }
        let max_h = heads.iter().map(|head| head.1).max().unwrap_or(1);
        let max_v = heads.iter().map(|head| head.2).max().unwrap_or(1);
        if heads
            .iter()
            .any(|(_, h, v, _)| max_h % h != 0 || max_v % v != 0)
        {
            return unsupported("JPEG with fractional sampling");
        }
        let mcu_columns = width_px.div_ceil(8 * max_h);
        let mcu_rows = height_px.div_ceil(8 * max_v);
        let components = heads
            .into_iter()
            .map(|(id, h, v, quantization_slot)| {
                let own_width_px = (width_px * h).div_ceil(max_h);
                let own_height_px = (height_px * v).div_ceil(max_v);
                let stored_blocks = (mcu_columns * h, mcu_rows * v);
                Component {
                    id,
                    h,
                    v,
                    quantization_slot,
                    quantization: None,
                    width_px: own_width_px,
                    height_px: own_height_px,
                    image_blocks: (own_width_px.div_ceil(8), own_height_px.div_ceil(8)),
                    stored_blocks,
                    coefficients: vec![[0; 64]; stored_blocks.0 * stored_blocks.1],
                }
            })
            .collect();
        Ok(Self {
            width_px,
            height_px,
            is_progressive: segment.marker == marker::SOF2,
            components,
            max_h,
            max_v,
        })
    }

    /// Whether every component was scanned, with a quantization table.
    pub(super) fn is_complete(&self) -> bool {
        self.components
            .iter()
            .all(|component| component.quantization.is_some())
    }
}
