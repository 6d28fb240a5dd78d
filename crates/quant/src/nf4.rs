//! 4-bit normal-float weights: 16 values at the quantiles of a normal distribution, one scale per 64 weights.
//!
//! Blocks run over the flattened tensor. Two codes share a byte, the first one in the high half; an odd count is filled
//! up with the code of 0.0. A dequantised weight is `value(code) · absmax`, rounded to the type that the weight had.
//! With double quantisation the scales themselves, less their mean, are kept in 8 bits ([`crate::blockwise`]).
//!
//! Source: `quantize_4bit`, `dequantize_4bit`, bitsandbytes 0.50.2.

use std::sync::LazyLock;

use rayon::prelude::*;

use crate::blockwise::Scaler;
use crate::{Blockwise, Codebook, QuantError, StoredFloat};

/// Weights that share one scale.
pub const BLOCK_LEN: usize = 64;

/// The 16 values, by code. Code 7 is zero.
pub const VALUES: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The code of 0.0, which fills the last byte of an odd count.
const ZERO_CODE: u8 = 7;

/// Blocks per rayon task: a block is too little work for a task of its own.
const BLOCKS_PER_TASK: usize = 256;

static CODEBOOK: LazyLock<Codebook> = LazyLock::new(|| Codebook::from_sorted(VALUES.to_vec()));

/// The scales of an NF4 tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Scales {
    /// One `f32` per block.
    Plain(Vec<f32>),
    /// Scales less their mean, in signed 8-bit codes.
    Double {
        /// The scales minus `offset`.
        centred: Blockwise,
        /// The mean of the scales.
        offset: f32,
    },
}

impl Scales {
    /// One `f32` per block.
    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Self::Plain(absmax) => absmax.clone(),
            Self::Double { centred, offset } => {
                let mut absmax = centred.dequantize(Codebook::signed_dynamic());
                absmax.iter_mut().for_each(|value| *value += offset);
                absmax
            }
        }
    }

    fn num_blocks(&self) -> usize {
        match self {
            Self::Plain(absmax) => absmax.len(),
            Self::Double { centred, .. } => centred.codes().len(),
        }
    }
}

/// A tensor in NF4, flattened.
#[derive(Clone, Debug, PartialEq)]
pub struct Nf4 {
    packed: Vec<u8>,
    scales: Scales,
    len: usize,
    stored: StoredFloat,
}

impl Nf4 {
    /// Quantises `values`, which came as `stored`, with `f32` scales.
    ///
    /// # Errors
    ///
    /// [`QuantError::NotFinite`] if a value is infinite or not a number.
    pub fn quantize(values: &[f32], stored: StoredFloat) -> Result<Self, QuantError> {
        if let Some(index) = values.par_iter().position_first(|value| !value.is_finite()) {
            return Err(QuantError::NotFinite {
                index,
                value: values[index],
            });
        }
        let mut packed = vec![0; values.len().div_ceil(2)];
        let mut absmax = vec![0.0; values.len().div_ceil(BLOCK_LEN)];
        values
            .par_chunks(BLOCK_LEN)
            .zip(packed.par_chunks_mut(BLOCK_LEN / 2))
            .zip(absmax.par_iter_mut())
            .with_min_len(BLOCKS_PER_TASK)
            .for_each(|((values, packed), absmax)| {
                let (scale, scaler) = Scaler::of_block(values, BLOCK_LEN);
                *absmax = scale;
                let code = |value: &f32| CODEBOOK.nearest(scaler.apply(*value));
                for (pair, byte) in values.chunks(2).zip(packed) {
                    *byte = code(&pair[0]) << 4 | pair.get(1).map_or(ZERO_CODE, code);
                }
            });
        Ok(Self {
            packed,
            scales: Scales::Plain(absmax),
            len: values.len(),
            stored,
        })
    }

    /// The same tensor with its scales in 8 bits.
    ///
    /// The mean is taken in `f64`; upstream's depends on the vector width of the machine in its last bit.
    pub fn double_quantized(self) -> Self {
        let Scales::Plain(absmax) = self.scales else {
            return self;
        };
        let sum: f64 = absmax.iter().copied().map(f64::from).sum();
        let offset = (sum / absmax.len().max(1) as f64) as f32;
        let centred: Vec<f32> = absmax.iter().map(|value| value - offset).collect();
        let centred = Blockwise::quantize(&centred, Codebook::signed_dynamic());
        Self {
            scales: Scales::Double { centred, offset },
            ..self
        }
    }

    /// A tensor of `len` weights from its parts.
    ///
    /// # Errors
    ///
    /// [`QuantError::Length`] if a part does not fit `len`.
    pub fn from_parts(
        packed: Vec<u8>,
        scales: Scales,
        len: usize,
        stored: StoredFloat,
    ) -> Result<Self, QuantError> {
        let lengths = [
            ("packed", len.div_ceil(2), packed.len()),
            ("absmax", len.div_ceil(BLOCK_LEN), scales.num_blocks()),
        ];
        for (part, expected, found) in lengths {
            if expected != found {
                return Err(QuantError::Length {
                    part: part.to_owned(),
                    expected,
                    found,
                });
            }
        }
        Ok(Self {
            packed,
            scales,
            len,
            stored,
        })
    }

    /// The weights that the codes stand for, rounded to the type that they had.
    pub fn dequantize(&self) -> Vec<f32> {
        let absmax = self.scales.to_f32();
        let mut values = vec![0.0; self.len];
        values
            .par_chunks_mut(BLOCK_LEN)
            .zip(self.packed.par_chunks(BLOCK_LEN / 2))
            .zip(absmax.par_iter())
            .with_min_len(BLOCKS_PER_TASK)
            .for_each(|((values, packed), absmax)| {
                let weight = |code: u8| self.stored.round(VALUES[usize::from(code)] * absmax);
                for (pair, byte) in values.chunks_mut(2).zip(packed) {
                    pair[0] = weight(byte >> 4);
                    if let Some(second) = pair.get_mut(1) {
                        *second = weight(byte & 0xF);
                    }
                }
            });
        values
    }

    /// Number of weights.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no weights.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Two codes per byte, the first in the high half.
    pub fn packed(&self) -> &[u8] {
        &self.packed
    }

    /// The scales.
    pub fn scales(&self) -> &Scales {
        &self.scales
    }

    /// The type that the weights had and are rounded to.
    pub fn stored(&self) -> StoredFloat {
        self.stored
    }

    /// Memory for codes and scales.
    pub fn num_bytes(&self) -> usize {
        let scale_bytes = match &self.scales {
            Scales::Plain(absmax) => 4 * absmax.len(),
            Scales::Double { centred, .. } => {
                centred.codes().len() + 4 * centred.absmax().len() + 4
            }
        };
        self.packed.len() + scale_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quantize(values: &[f32]) -> Nf4 {
        Nf4::quantize(values, StoredFloat::F32).expect("finite")
    }

    #[test]
    fn the_first_code_is_in_the_high_half_of_the_byte() {
        let tensor = quantize(&[-1.0, 1.0, 0.0, -1.0]);
        assert_eq!(tensor.packed(), [0x0F, 0x70]);
        assert_eq!(tensor.dequantize(), [-1.0, 1.0, 0.0, -1.0]);
    }

    #[test]
    fn an_odd_count_is_filled_with_the_code_of_zero() {
        assert_eq!(quantize(&[2.0, 2.0, 2.0]).packed(), [0xFF, 0xF7]);
        assert_eq!(quantize(&[2.0, 2.0, 2.0]).dequantize(), [2.0, 2.0, 2.0]);
    }

    #[test]
    fn a_weight_on_a_midpoint_takes_the_lower_code() {
        let midpoint = (VALUES[9] + VALUES[10]) / 2.0;
        assert_eq!(quantize(&[midpoint, 1.0]).packed(), [0x9F]);
        assert_eq!(quantize(&[midpoint.next_up(), 1.0]).packed(), [0xAF]);
    }

    #[test]
    fn every_block_has_its_own_scale_and_a_zero_block_stays_zero() {
        let mut values = vec![0.25; 64];
        values.extend([0.0; 64]);
        values.extend([-3.0; 6]);
        let tensor = quantize(&values);
        assert_eq!(*tensor.scales(), Scales::Plain(vec![0.25, 0.0, 3.0]));
        assert_eq!(tensor.dequantize(), values);
    }

    #[test]
    fn a_dequantised_weight_is_rounded_to_the_type_it_had() {
        let tensor = Nf4::quantize(&[1.0, 0.17], StoredFloat::Bf16).expect("finite");
        assert_eq!(tensor.dequantize(), [1.0, 0.161_132_81]);
    }

    #[test]
    fn double_quantisation_keeps_equal_scales_exactly() {
        let tensor = quantize(&[0.5; 200]).double_quantized();
        assert_eq!(tensor.dequantize(), [0.5; 200]);
        assert_eq!(tensor.num_bytes(), 100 + 4 + 4 + 4);
    }

    #[test]
    fn an_infinite_weight_is_an_error_that_says_where() {
        let error = Nf4::quantize(&[0.0, f32::INFINITY], StoredFloat::F32).expect_err("infinite");
        assert_eq!(
            error.to_string(),
            "value 1 is inf, and only finite values can be quantised"
        );
    }

    #[test]
    fn parts_that_do_not_fit_the_count_are_an_error() {
        let error = Nf4::from_parts(vec![0; 2], Scales::Plain(vec![1.0]), 5, StoredFloat::F32)
            .expect_err("3 bytes");
        assert_eq!(error.to_string(), "`packed` has 2 elements, expected 3");
    }
}
