//! Buffers with guards and what else tests of single kernels share.

use engine_cuda::{Buffer, Half, Stream, View};

pub use crate::networks::{distance, numbers};

/// Bytes before and behind every output that no kernel may touch.
const GUARD_BYTES: usize = 256;

/// What outputs and guards are filled with: a NaN in every float type.
const POISON: u8 = 0xFF;

/// Relative error of one rounding to T, in the root mean square, with room for a second one.
pub fn rounding(t: Half) -> f64 {
    match t {
        Half::Bf16 => 4e-3,
        Half::F16 => 5e-4,
    }
}

/// `bf16` or `f16`.
pub fn name(t: Half) -> &'static str {
    match t {
        Half::Bf16 => "bf16",
        Half::F16 => "f16",
    }
}

/// How many values differ in any bit.
pub fn differing<V: PartialEq>(found: &[V], expected: &[V]) -> f64 {
    assert_eq!(found.len(), expected.len(), "lengths");
    found.iter().zip(expected).filter(|(f, e)| f != e).count() as f64
}

/// The bits of f32 values.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// A buffer with guards.
pub struct Guarded {
    buffer: Buffer,
    bytes: usize,
}

impl Guarded {
    /// Its middle.
    pub fn view(&self) -> View {
        self.buffer.view().skip(GUARD_BYTES).take(self.bytes)
    }
}

/// A stream and the type to test with.
#[derive(Clone, Copy)]
pub struct Bench<'a> {
    pub s: &'a Stream,
    pub t: Half,
}

impl Bench<'_> {
    /// A poisoned output of so many bytes.
    pub fn output(&self, bytes: usize) -> Guarded {
        let buffer = self
            .s
            .allocate(bytes + 2 * GUARD_BYTES, "a test")
            .expect("tests are small");
        self.s.fill(buffer.view(), POISON).expect("fill");
        Guarded { buffer, bytes }
    }

    /// Values on the device.
    pub fn upload<V: bytemuck::NoUninit>(&self, values: &[V]) -> Guarded {
        let guarded = self.output(size_of_val(values));
        self.s.upload(guarded.view(), values).expect("upload");
        guarded
    }

    /// Values rounded to T on the device, and what they were rounded to.
    pub fn half(&self, values: &[f32]) -> (Guarded, Vec<f64>) {
        let rounded = self.t.from_f32(values);
        (self.upload(&rounded), self.wide(&rounded))
    }

    /// Values in f32 on the device, and what they are.
    pub fn f32(&self, values: &[f32]) -> (Guarded, Vec<f64>) {
        let wide = values.iter().map(|value| f64::from(*value));
        (self.upload(values), wide.collect())
    }

    fn wide(&self, values: &[u16]) -> Vec<f64> {
        let wide = self.t.to_f32(values);
        wide.into_iter().map(f64::from).collect()
    }

    /// What lies in a buffer.
    ///
    /// # Panics
    ///
    /// If a kernel wrote beyond it.
    pub fn read<V: bytemuck::AnyBitPattern + bytemuck::NoUninit>(
        &self,
        guarded: &Guarded,
    ) -> Vec<V> {
        let all = guarded.buffer.view();
        for guard in [all.take(GUARD_BYTES), all.skip(GUARD_BYTES + guarded.bytes)] {
            let bytes: Vec<u8> = self.s.download(guard, GUARD_BYTES).expect("download");
            assert!(
                bytes.iter().all(|byte| *byte == POISON),
                "a kernel wrote beyond its output"
            );
        }
        let count = guarded.bytes / size_of::<V>();
        self.s.download(guarded.view(), count).expect("download")
    }

    /// The values of T in a buffer.
    pub fn read_half(&self, guarded: &Guarded) -> Vec<f64> {
        self.wide(&self.read::<u16>(guarded))
    }

    /// The f32 values in a buffer.
    pub fn read_f32(&self, guarded: &Guarded) -> Vec<f64> {
        let values = self.read::<f32>(guarded);
        values.into_iter().map(f64::from).collect()
    }
}
