//! Numbers that begin on a cache line, so that a vector register is filled from one line and never from two.

use std::ops::{Deref, DerefMut};

/// Bytes of a cache line, and of the widest vector register.
const LINE_BYTES: usize = 64;

/// A row of `f32` whose first lies on a cache line. It grows and never shrinks.
#[derive(Debug, Default)]
pub(crate) struct Aligned {
    data: Vec<f32>,
    start: usize,
    len: usize,
}

impl Aligned {
    /// So many zeros.
    pub fn zeros(len: usize) -> Self {
        const SLACK: usize = LINE_BYTES / size_of::<f32>() - 1;
        let data = vec![0.0; len + SLACK];
        // The vector is never resized, so the line stays where it is.
        let start = data.as_ptr().align_offset(LINE_BYTES).min(SLACK);
        Self { data, start, len }
    }

    /// At least so many numbers, with whatever they held before.
    pub fn at_least(&mut self, len: usize) -> &mut [f32] {
        if self.len < len {
            *self = Self::zeros(len);
        }
        &mut self[..len]
    }
}

impl Deref for Aligned {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.data[self.start..self.start + self.len]
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.data[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_number_lies_on_a_cache_line() {
        for len in [0, 1, 16, 1000] {
            let numbers = Aligned::zeros(len);
            assert_eq!(numbers.len(), len);
            assert_eq!(numbers.as_ptr().align_offset(LINE_BYTES), 0);
        }
    }
}
