//! A range of device memory, by address and length.
//!
//! A view has no lifetime: kernels run long after the call that launched them, so a borrow would promise too little.
//! Whoever makes the launches keeps the memory: weights, factors and the arena's slab live in the model, which
//! synchronises its stream before it drops them.

/// A range of device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    address: u64,
    bytes: usize,
}

impl View {
    /// The range of `bytes` from `address`.
    pub(crate) fn new(address: u64, bytes: usize) -> Self {
        Self { address, bytes }
    }

    /// Its device address.
    pub fn address(self) -> u64 {
        self.address
    }

    /// Its length.
    pub fn bytes(self) -> usize {
        self.bytes
    }

    /// Without its first `bytes`.
    ///
    /// # Panics
    ///
    /// If it is shorter.
    pub fn skip(self, bytes: usize) -> Self {
        assert!(
            bytes <= self.bytes,
            "{bytes} bytes to skip of {}",
            self.bytes
        );
        Self::new(self.address + bytes as u64, self.bytes - bytes)
    }

    /// Its first `bytes`.
    ///
    /// # Panics
    ///
    /// If it is shorter.
    pub fn take(self, bytes: usize) -> Self {
        assert!(
            bytes <= self.bytes,
            "{bytes} bytes to take of {}",
            self.bytes
        );
        Self::new(self.address, bytes)
    }

    /// Without its first `n` 16-bit elements.
    ///
    /// # Panics
    ///
    /// If it is shorter.
    pub fn elements_from(self, n: usize) -> Self {
        self.skip(2 * n)
    }

    /// Panics unless it holds `bytes`: what every wrapper asks of its arguments before it launches.
    ///
    /// # Panics
    ///
    /// If it is shorter.
    pub fn holds(self, bytes: usize, what: &str) -> Self {
        assert!(
            bytes <= self.bytes,
            "{what} needs {bytes} bytes and has {}",
            self.bytes
        );
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_view_stay_inside() {
        let view = View::new(1000, 64);
        assert_eq!(view.skip(16).take(8), View::new(1016, 8));
        assert_eq!(view.elements_from(4), View::new(1008, 56));
    }

    #[test]
    #[should_panic(expected = "65 bytes to skip of 64")]
    fn a_part_outside_panics() {
        let _ = View::new(0, 64).skip(65);
    }
}
