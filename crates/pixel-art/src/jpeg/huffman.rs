//! Huffman codes and the bit stream they are read from.

use super::JpegError;

const FAST_BITS: u32 = 9;

/// A canonical Huffman code.
pub(super) struct HuffmanTable {
    /// By the next `FAST_BITS` bits: symbol and code length, length 0 if the code is longer.
    fast: Vec<(u8, u8)>,
    /// By length 1 to 16 (at index length − 1): one past the largest code of that length.
    limit: [i32; 16],
    /// By length: index of the first symbol minus the first code.
    offset: [i32; 16],
    symbols: Vec<u8>,
}

impl HuffmanTable {
    /// Builds the code from the number of codes of each length; `None` if they do not fit.
    pub(super) fn new(counts: &[u8; 16], symbols: &[u8]) -> Option<Self> {
        let mut table = Self {
            fast: vec![(0, 0); 1 << FAST_BITS],
            limit: [0; 16],
            offset: [0; 16],
            symbols: symbols.to_vec(),
        };
        let mut code = 0i32;
        let mut index = 0i32;
        for (slot, count) in counts.iter().enumerate() {
            let length = slot as u32 + 1;
            table.offset[slot] = index - code;
            for _ in 0..*count {
                if length <= FAST_BITS {
                    let spread = 1usize << (FAST_BITS - length);
                    let first = (code as usize) << (FAST_BITS - length);
                    let entries = table.fast.get_mut(first..first + spread)?;
                    entries.fill((symbols[index as usize], length as u8));
                }
                code += 1;
                index += 1;
            }
            if code > 1 << length {
                return None;
            }
            table.limit[slot] = code;
            code <<= 1;
        }
        Some(table)
    }
}

/// Entropy-coded data, bit by bit, up to the next marker.
pub(super) struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
    /// The next `num_bits` bits are its lowest.
    held: u64,
    num_bits: u32,
}

impl<'a> Bits<'a> {
    pub(super) fn new(bytes: &'a [u8], at: usize) -> Self {
        Self {
            bytes,
            at,
            held: 0,
            num_bits: 0,
        }
    }

    /// Where the next byte, or the marker that stopped the reading, lies.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    fn fill(&mut self) {
        while self.num_bits <= 48 {
            match self.bytes.get(self.at..) {
                Some([0xFF, 0, ..]) => {
                    self.held = self.held << 8 | 0xFF;
                    self.at += 2;
                }
                Some([0xFF, ..]) | Some([]) | None => return,
                Some([byte, ..]) => {
                    self.held = self.held << 8 | u64::from(*byte);
                    self.at += 1;
                }
            }
            self.num_bits += 8;
        }
    }

    fn truncated(&self) -> JpegError {
        JpegError::Truncated { at: self.at }
    }

    /// The next `count` ≤ 16 bits as a number.
    pub(super) fn take(&mut self, count: u32) -> Result<u32, JpegError> {
        if self.num_bits < count {
            self.fill();
            if self.num_bits < count {
                return Err(self.truncated());
            }
        }
        self.num_bits -= count;
        Ok((self.held >> self.num_bits) as u32 & ((1 << count) - 1))
    }

    /// The next `count` bits as a signed number of T.81's "extend" form.
    pub(super) fn take_signed(&mut self, count: u32) -> Result<i32, JpegError> {
        if count == 0 {
            return Ok(0);
        }
        let value = self.take(count)? as i32;
        Ok(if value < 1 << (count - 1) {
            value - (1 << count) + 1
        } else {
            value
        })
    }

    /// The next symbol.
    pub(super) fn symbol(&mut self, table: &HuffmanTable) -> Result<u8, JpegError> {
        if self.num_bits < 16 {
            self.fill();
        }
        // Past the end, zeros are looked at but never taken.
        let peek = |count: u32| -> usize {
            let bits = if self.num_bits >= count {
                self.held >> (self.num_bits - count)
            } else {
                self.held << (count - self.num_bits)
            };
            (bits & ((1 << count) - 1)) as usize
        };
        let (mut symbol, mut length) = table.fast[peek(FAST_BITS)];
        if length == 0 {
            for long in FAST_BITS + 1..=16 {
                let code = peek(long) as i32;
                let slot = long as usize - 1;
                if code < table.limit[slot] {
                    symbol = *table
                        .symbols
                        .get((code + table.offset[slot]) as usize)
                        .ok_or_else(|| self.truncated())?;
                    length = long as u8;
                    break;
                }
            }
        }
        if length == 0 {
            return Err(JpegError::Invalid {
                what: "a Huffman code",
                at: self.at,
            });
        }
        if u32::from(length) > self.num_bits {
            return Err(self.truncated());
        }
        self.num_bits -= u32::from(length);
        Ok(symbol)
    }

    /// Drops the bits left in the byte and passes over the restart marker that must follow.
    pub(super) fn restart(&mut self, number: u8) -> Result<(), JpegError> {
        self.held = 0;
        self.num_bits = 0;
        while let Some([0xFF, 0xFF, ..]) = self.bytes.get(self.at..) {
            self.at += 1;
        }
        match self.bytes.get(self.at..self.at + 2) {
            Some([0xFF, found]) if *found == super::marker::RST0 + number => {
                self.at += 2;
                Ok(())
            }
            Some(_) => Err(JpegError::Invalid {
                what: "a restart marker",
                at: self.at,
            }),
            None => Err(self.truncated()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_long_codes_are_read() {
        // Code lengths: one of 1 bit (0), one of 2 (10), one of 12 (1100 0000 0000).
        let mut counts = [0; 16];
        counts[0] = 1;
        counts[1] = 1;
        counts[11] = 1;
        let table = HuffmanTable::new(&counts, b"abc").expect("a valid code");
        let mut bits = Bits::new(&[0b0101_1000, 0b0000_0000], 0);
        let read: Vec<u8> = (0..3)
            .map(|_| bits.symbol(&table).expect("a symbol"))
            .collect();
        assert_eq!(read, b"abc");
        assert_eq!(bits.take(1), Ok(0));
        assert_eq!(bits.take(1), Err(JpegError::Truncated { at: 2 }));
    }

    #[test]
    fn too_many_codes_of_a_length_are_refused() {
        let mut counts = [0; 16];
        counts[0] = 3;
        assert!(HuffmanTable::new(&counts, b"abc").is_none());
    }

    #[test]
    fn stuffed_bytes_count_once_and_markers_stop_the_bits() {
        let mut bits = Bits::new(&[0xFF, 0x00, 0x12, 0xFF, 0xD9], 0);
        assert_eq!(bits.take(16), Ok(0xFF12));
        assert_eq!(bits.take(1), Err(JpegError::Truncated { at: 3 }));
    }

    #[test]
    fn signed_numbers_are_extended() {
        // 3 bits: 000 → −7, 011 → −4, 100 → 4, 111 → 7
        let mut bits = Bits::new(&[0b0000_1110, 0b0111_0000], 0);
        let read: Vec<i32> = (0..4).map(|_| bits.take_signed(3).expect("bits")).collect();
        assert_eq!(read, [-7, -4, 4, 7]);
    }
}
