//! One pass over the image: which coefficients of which components, and how they are coded (T.81, F.2 and G.2).

use super::frame::Frame;
use super::huffman::{Bits, HuffmanTable};
use super::transform::ZIGZAG;
use super::{JpegError, Segment};

/// One component's part in a scan.
pub(super) struct Part {
    pub component: usize,
    dc_slot: usize,
    ac_slot: usize,
}

/// The scan header.
pub(super) struct Scan {
    pub parts: Vec<Part>,
    /// First and last coefficient in zigzag order.
    start: usize,
    end: usize,
    /// Bit positions: the one sent before (0 if none) and the one sent now.
    high: u32,
    low: u32,
}

/// Coding state that restarts reset.
#[derive(Default)]
struct State {
    /// Last DC value of each component.
    last_dc: [i32; 4],
    /// Blocks left in a run of blocks without further coefficients.
    end_of_band_run: u32,
}

impl Scan {
    pub(super) fn new(segment: &Segment<'_>, frame: &Frame) -> Result<Self, JpegError> {
        let num_parts = usize::from(segment.byte(0)?);
        if !(1..=frame.components.len()).contains(&num_parts) {
            return Err(segment.invalid("the number of a scan's components"));
        }
        let mut parts: Vec<Part> = Vec::new();
        for index in 0..num_parts {
            let id = segment.byte(1 + 2 * index)?;
            let slots = segment.byte(2 + 2 * index)?;
            let component = frame
                .components
                .iter()
                .position(|component| component.id == id)
                .filter(|found| parts.iter().all(|part| part.component != *found))
                .ok_or_else(|| segment.invalid("a scan's component"))?;
            let (dc_slot, ac_slot) = (usize::from(slots >> 4), usize::from(slots & 15));
            if dc_slot > 3 || ac_slot > 3 {
                return Err(segment.invalid("a scan's Huffman table"));
            }
            parts.push(Part {
                component,
                dc_slot,
                ac_slot,
            });
        }
        let tail = 1 + 2 * num_parts;
        let bits = segment.byte(tail + 2)?;
        let scan = if frame.is_progressive {
            Self {
                parts,
                start: usize::from(segment.byte(tail)?),
                end: usize::from(segment.byte(tail + 1)?),
                high: u32::from(bits >> 4),
                low: u32::from(bits & 15),
            }
        } else {
            Self {
                parts,
                start: 0,
                end: 63,
                high: 0,
                low: 0,
            }
        };
        let dc_only = scan.start == 0 && scan.end == 0;
        let ac_only = scan.start > 0 && scan.end >= scan.start && scan.end < 64;
        let band_fits = !frame.is_progressive || dc_only || (ac_only && scan.parts.len() == 1);
        if !band_fits || scan.low > 13 || (scan.high != 0 && scan.high != scan.low + 1) {
            return Err(segment.invalid("a scan's band"));
        }
        Ok(scan)
    }

    /// Decodes from `start`; returns where the data ends.
    pub(super) fn decode(
        &self,
        frame: &mut Frame,
        dc_tables: &[Option<HuffmanTable>; 4],
        ac_tables: &[Option<HuffmanTable>; 4],
        restart_interval: usize,
        bytes: &[u8],
        start: usize,
    ) -> Result<usize, JpegError> {
        let missing = || JpegError::Invalid {
            what: "a scan without its Huffman table",
            at: start,
        };
        let needs_dc = self.start == 0 && self.high == 0;
        let needs_ac = self.end > 0;
        for part in &self.parts {
            if needs_dc && dc_tables[part.dc_slot].is_none()
                || needs_ac && ac_tables[part.ac_slot].is_none()
            {
                return Err(missing());
            }
        }
        let mut bits = Bits::new(bytes, start);
        let mut state = State::default();
        // A scan of one component walks its own blocks; a scan of several walks MCUs.
        let (columns, rows) = match self.parts.as_slice() {
            [part] => frame.components[part.component].image_blocks,
            _ => (
                frame.width_px.div_ceil(8 * frame.max_h),
                frame.height_px.div_ceil(8 * frame.max_v),
            ),
        };
        for unit in 0..columns * rows {
            if restart_interval > 0 && unit > 0 && unit % restart_interval == 0 {
                bits.restart(((unit / restart_interval - 1) % 8) as u8)?;
                state = State::default();
            }
            let (column, row) = (unit % columns, unit / columns);
            for part in &self.parts {
                let component = &mut frame.components[part.component];
                let (across, down) = if self.parts.len() == 1 {
                    (1, 1)
                } else {
                    (component.h, component.v)
                };
                for y in row * down..(row + 1) * down {
                    for x in column * across..(column + 1) * across {
                        let block = &mut component.coefficients[y * component.stored_blocks.0 + x];
                        let dc = dc_tables[part.dc_slot].as_ref();
                        let ac = ac_tables[part.ac_slot].as_ref();
                        let last_dc = &mut state.last_dc[part.component];
                        if needs_dc {
                            self.dc(block, last_dc, dc.ok_or_else(missing)?, &mut bits)?;
                        } else if self.start == 0 {
                            block[0] |= (bits.take(1)? as i16) << self.low;
                        }
                        if needs_ac {
                            let ac = ac.ok_or_else(missing)?;
                            let run = &mut state.end_of_band_run;
                            if self.high == 0 {
                                self.ac(block, run, ac, &mut bits, frame.is_progressive)?;
                            } else {
                                self.refine(block, run, ac, &mut bits)?;
                            }
                        }
                    }
                }
            }
        }
        Ok(bits.at())
    }

    fn dc(
        &self,
        block: &mut [i16; 64],
        last: &mut i32,
        table: &HuffmanTable,
        bits: &mut Bits<'_>,
    ) -> Result<(), JpegError> {
        let size = bits.symbol(table)?;
        if size > 15 {
            return Err(JpegError::Invalid {
                what: "a DC coefficient",
                at: bits.at(),
            });
        }
        *last = last.wrapping_add(bits.take_signed(u32::from(size))?);
        block[0] = (*last << self.low) as i16;
        Ok(())
    }

    /// First pass over a band (or the whole of it, in sequential files).
    fn ac(
        &self,
        block: &mut [i16; 64],
        run: &mut u32,
        table: &HuffmanTable,
        bits: &mut Bits<'_>,
        is_progressive: bool,
    ) -> Result<(), JpegError> {
        if *run > 0 {
            *run -= 1;
            return Ok(());
        }
        let mut at = self.start.max(1);
        while at <= self.end {
            let symbol = bits.symbol(table)?;
            let (zeros, size) = (usize::from(symbol >> 4), u32::from(symbol & 15));
            if size == 0 {
                if zeros == 15 {
                    at += 16;
                    continue;
                }
                if is_progressive {
                    *run = (1 << zeros) - 1 + bits.take(zeros as u32)?;
                }
                break;
            }
            at += zeros;
            if at > self.end {
                return Err(JpegError::Invalid {
                    what: "a run of coefficients",
                    at: bits.at(),
                });
            }
            block[ZIGZAG[at]] = (bits.take_signed(size)? << self.low) as i16;
            at += 1;
        }
        Ok(())
    }

    /// Later passes over a band: one more bit of known coefficients, and new ones of size 1 between them.
    fn refine(
        &self,
        block: &mut [i16; 64],
        run: &mut u32,
        table: &HuffmanTable,
        bits: &mut Bits<'_>,
    ) -> Result<(), JpegError> {
        let bit = 1i16 << self.low;
        let more = |value: &mut i16, bits: &mut Bits<'_>| -> Result<(), JpegError> {
            if bits.take(1)? == 1 && *value & bit == 0 {
                *value = value.wrapping_add(if *value > 0 { bit } else { -bit });
            }
            Ok(())
        };
        let mut at = self.start;
        if *run == 0 {
            while at <= self.end {
                let symbol = bits.symbol(table)?;
                let (mut zeros, size) = (u32::from(symbol >> 4), symbol & 15);
                let mut new = 0;
                match size {
                    0 if zeros < 15 => {
                        *run = (1 << zeros) + bits.take(zeros)?;
                        break;
                    }
                    0 => {}
                    1 => new = if bits.take(1)? == 1 { bit } else { -bit },
                    _ => {
                        return Err(JpegError::Invalid {
                            what: "a refined coefficient",
                            at: bits.at(),
                        });
                    }
                }
                // Pass over `zeros` still-zero coefficients, refining the others on the way.
                while at <= self.end {
                    let value = &mut block[ZIGZAG[at]];
                    if *value != 0 {
                        more(value, bits)?;
                    } else if zeros == 0 {
                        *value = new;
                        break;
                    } else {
                        zeros -= 1;
                    }
                    at += 1;
                }
                at += 1;
            }
        }
        if *run > 0 {
            while at <= self.end {
                let value = &mut block[ZIGZAG[at]];
                if *value != 0 {
                    more(value, bits)?;
                }
                at += 1;
            }
            *run -= 1;
        }
        Ok(())
    }
}
