//! One slab of device memory with stack discipline: what was taken last is given back first.
//!
//! Everything between the weights and the loss lies here. A step makes the same requests in the same order every time,
//! so addresses repeat (CUDA graphs need that) and nothing fragments. Without a slab the arena only counts; the plan
//! is the peak that such a run leaves behind.

use std::cell::Cell;

use crate::view::View;

/// Every piece starts at a multiple of this: what cuBLASLt's fastest kernels and TMA want.
pub const ALIGNMENT_BYTES: usize = 256;

/// Where a counting arena pretends to begin. Never dereferenced; not 0, so that it is no null pointer.
const PRETENDED_BASE: u64 = 1 << 40;

/// A position to go back to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(usize);

/// A stack of device memory.
#[derive(Debug)]
pub struct Arena {
    base: u64,
    capacity: Option<usize>,
    used: Cell<usize>,
    peak: Cell<usize>,
}

/// `bytes` rounded up to the arena's alignment.
pub fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT_BYTES)
}

impl Arena {
    /// An arena over `slab`, whose address is aligned (every allocation of the driver is).
    ///
    /// # Panics
    ///
    /// If the slab is not aligned.
    pub fn over(slab: View) -> Self {
        assert_eq!(
            slab.address() % ALIGNMENT_BYTES as u64,
            0,
            "alignment of the slab"
        );
        Self {
            base: slab.address(),
            capacity: Some(slab.bytes()),
            used: Cell::new(0),
            peak: Cell::new(0),
        }
    }

    /// An arena without memory, for finding out how much a schedule needs.
    pub fn counting() -> Self {
        Self {
            base: PRETENDED_BASE,
            capacity: None,
            used: Cell::new(0),
            peak: Cell::new(0),
        }
    }

    /// Takes `bytes`.
    ///
    /// # Panics
    ///
    /// If the slab is too small: it was sized by a plan of the same schedule, so that is our bug.
    pub fn take(&self, bytes: usize) -> View {
        let start = self.used.get();
        let end = start + aligned(bytes);
        if let Some(capacity) = self.capacity {
            assert!(
                end <= capacity,
                "{bytes} bytes do not fit the arena: {start} of {capacity} are in use"
            );
        }
        self.used.set(end);
        self.peak.set(self.peak.get().max(end));
        View::new(self.base + start as u64, bytes)
    }

    /// The present top of the stack.
    pub fn mark(&self) -> Mark {
        Mark(self.used.get())
    }

    /// Gives back everything taken since `mark`. What kernels on the stream still do there comes before whatever the
    /// next owner launches.
    ///
    /// # Panics
    ///
    /// If more was given back already.
    pub fn release(&self, mark: Mark) {
        assert!(
            mark.0 <= self.used.get(),
            "{} bytes are in use, below the mark at {}",
            self.used.get(),
            mark.0
        );
        self.used.set(mark.0);
    }

    /// Bytes in use now.
    pub fn used_bytes(&self) -> usize {
        self.used.get()
    }

    /// The most that was ever in use.
    pub fn peak_bytes(&self) -> usize {
        self.peak.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_aligned_and_memory_is_reused_after_release() {
        let arena = Arena::counting();
        let first = arena.take(10);
        let mark = arena.mark();
        let second = arena.take(300);
        assert_eq!(second.address() - first.address(), 256);
        arena.release(mark);
        assert_eq!(arena.take(1).address(), second.address());
        assert_eq!((arena.used_bytes(), arena.peak_bytes()), (512, 768));
    }

    #[test]
    #[should_panic(expected = "300 bytes do not fit the arena: 0 of 256 are in use")]
    fn a_request_beyond_the_slab_panics_with_the_sizes() {
        Arena::over(View::new(4096, 256)).take(300);
    }

    #[test]
    #[should_panic(expected = "below the mark")]
    fn giving_back_twice_panics() {
        let arena = Arena::counting();
        let low = arena.mark();
        arena.take(1);
        let high = arena.mark();
        arena.release(low);
        arena.release(high);
    }
}
