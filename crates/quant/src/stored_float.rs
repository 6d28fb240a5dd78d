//! The float type that a tensor had on disk, and rounding to it.

use half::{bf16, f16};

/// A float type that weights are stored in.
///
/// A dequantised weight is rounded to the type that it had before quantisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StoredFloat {
    /// 32 bits.
    F32,
    /// 16 bits, 5 of them exponent.
    F16,
    /// 16 bits, 8 of them exponent.
    Bf16,
}

impl StoredFloat {
    /// Rounds to the nearest value of this type, ties to even.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::F16 => f16::from_f32(value).to_f32(),
            Self::Bf16 => bf16::from_f32(value).to_f32(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_floats_round_ties_to_even() {
        let tie = 1.0 + 2f32.powi(-11);
        assert_eq!(StoredFloat::F16.round(tie), 1.0);
        assert_eq!(
            StoredFloat::Bf16.round(1.0 + 3.0 * 2f32.powi(-8)),
            1.0 + 2f32.powi(-6)
        );
        assert_eq!(StoredFloat::F32.round(tie), tie);
    }
}
