//! 8-bit codes with one scale per block of the flattened tensor.
//!
//! A block's scale is its largest magnitude; a value divided by the scale is replaced by the nearest entry of a
//! [`Codebook`]. The last block may be short.
//!
//! Source: `quantize_blockwise`, `dequantize_blockwise` in `backends/default/ops.py`, bitsandbytes 0.50.2.

use rayon::prelude::*;

use crate::{Codebook, QuantError};

/// Elements that share one scale in an optimiser state and in doubly quantised scales.
pub const BLOCK_LEN: usize = 256;

/// Blocks per rayon task: a block is too little work for a task of its own.
const BLOCKS_PER_TASK: usize = 64;

/// The smallest divisor: keeps a block of zeros from dividing by zero.
const SMALLEST_SCALE: f32 = 1e-38;

/// How the values of one block are brought to [-1, 1].
///
/// Full blocks are multiplied by a reciprocal and a short last block is divided, as upstream: the two can differ in
/// the last bit and so in the code.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Scaler {
    Multiply(f32),
    Divide(f32),
}

impl Scaler {
    /// The scale to store and the scaler of one block.
    ///
    /// The scale of an all-zero short block is [`SMALLEST_SCALE`], that of an all-zero full block is 0, as upstream.
    pub(crate) fn of_block(values: &[f32], block_len: usize) -> (f32, Self) {
        let largest = values
            .iter()
            .fold(0.0f32, |largest, value| largest.max(value.abs()));
        if values.len() == block_len {
            (largest, Self::Multiply(1.0 / largest.max(SMALLEST_SCALE)))
        } else {
            let scale = largest.max(SMALLEST_SCALE);
            (scale, Self::Divide(scale))
        }
    }

    pub(crate) fn apply(self, value: f32) -> f32 {
        match self {
            Self::Multiply(reciprocal) => (value * reciprocal).clamp(-1.0, 1.0),
            Self::Divide(scale) => (value / scale).clamp(-1.0, 1.0),
        }
    }
}

/// An array in 8-bit codes, blocks of [`BLOCK_LEN`].
#[derive(Clone, Debug, PartialEq)]
pub struct Blockwise {
    codes: Vec<u8>,
    absmax: Vec<f32>,
}

impl Blockwise {
    /// The state of a fresh optimiser: codes and scales zero. Its value is zero everywhere, whatever code 0 stands for.
    pub fn zeros(len: usize) -> Self {
        Self {
            codes: vec![0; len],
            absmax: vec![0.0; len.div_ceil(BLOCK_LEN)],
        }
    }

    /// Replaces every value by the nearest entry of `codebook`, scaled per block.
    pub fn quantize(values: &[f32], codebook: &Codebook) -> Self {
        let mut quantized = Self::zeros(values.len());
        values
            .par_chunks(BLOCK_LEN)
            .zip(quantized.codes.par_chunks_mut(BLOCK_LEN))
            .zip(quantized.absmax.par_iter_mut())
            .with_min_len(BLOCKS_PER_TASK)
            .for_each(|((values, codes), absmax)| {
                *absmax = quantize_block(values, codebook, codes)
            });
        quantized
    }

    /// The array from its codes and scales.
    ///
    /// # Errors
    ///
    /// [`QuantError::Length`] if `absmax` does not have one scale per block.
    pub fn from_parts(codes: Vec<u8>, absmax: Vec<f32>) -> Result<Self, QuantError> {
        let expected = codes.len().div_ceil(BLOCK_LEN);
        if absmax.len() != expected {
            return Err(QuantError::Length {
                part: "absmax".to_owned(),
                expected,
                found: absmax.len(),
            });
        }
        Ok(Self { codes, absmax })
    }

    /// The values that the codes stand for.
    pub fn dequantize(&self, codebook: &Codebook) -> Vec<f32> {
        let mut values = vec![0.0; self.codes.len()];
        values
            .par_chunks_mut(BLOCK_LEN)
            .zip(self.codes.par_chunks(BLOCK_LEN))
            .zip(self.absmax.par_iter())
            .with_min_len(BLOCKS_PER_TASK)
            .for_each(|((values, codes), absmax)| {
                dequantize_block(codes, *absmax, codebook, values)
            });
        values
    }

    /// One code per element.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// One scale per block.
    pub fn absmax(&self) -> &[f32] {
        &self.absmax
    }

    /// Codes and scales block by block, for an update in place.
    pub(crate) fn blocks_mut(&mut self) -> impl Iterator<Item = (&mut [u8], &mut f32)> {
        self.codes.chunks_mut(BLOCK_LEN).zip(self.absmax.iter_mut())
    }
}

/// Writes the codes of one block and returns its scale.
pub(crate) fn quantize_block(values: &[f32], codebook: &Codebook, codes: &mut [u8]) -> f32 {
    let (absmax, scaler) = Scaler::of_block(values, BLOCK_LEN);
    for (value, code) in values.iter().zip(codes) {
        *code = codebook.nearest(scaler.apply(*value));
    }
    absmax
}

/// Writes the values of one block.
pub(crate) fn dequantize_block(codes: &[u8], absmax: f32, codebook: &Codebook, values: &mut [f32]) {
    for (code, value) in codes.iter().zip(values) {
        *value = codebook.value(*code) * absmax;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_keeps_its_largest_value_and_zero_exactly() {
        let mut values = vec![0.0; 300];
        values[3] = 2.5;
        values[299] = 7.0;
        let quantized = Blockwise::quantize(&values, Codebook::signed_dynamic());
        assert_eq!(quantized.absmax(), [2.5, 7.0]);
        assert_eq!(quantized.dequantize(Codebook::signed_dynamic()), values);
    }

    #[test]
    fn a_zero_block_gives_zeros_and_only_a_short_one_has_a_scale() {
        let quantized = Blockwise::quantize(&[0.0; 257], Codebook::signed_dynamic());
        assert_eq!(quantized.absmax(), [0.0, 1e-38]);
        assert!(quantized.codes().iter().all(|code| *code == 127));
        assert_eq!(quantized.dequantize(Codebook::signed_dynamic()), [0.0; 257]);
    }

    #[test]
    fn a_fresh_state_is_zero_although_code_0_is_not() {
        assert!(Codebook::signed_dynamic().value(0) < -0.99);
        assert!(
            Blockwise::zeros(5)
                .dequantize(Codebook::signed_dynamic())
                .iter()
                .all(|value| *value == 0.0)
        );
    }

    #[test]
    fn a_missing_scale_is_an_error() {
        let error =
            Blockwise::from_parts(vec![0; 257], vec![1.0]).expect_err("two blocks need two scales");
        assert_eq!(error.to_string(), "`absmax` has 1 elements, expected 2");
    }
}
