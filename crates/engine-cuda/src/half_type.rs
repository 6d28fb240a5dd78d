//! The 16-bit type that the network computes in.

use half::{bf16, f16};

/// `T` of every kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Half {
    /// bfloat16.
    Bf16,
    /// IEEE half precision; sums are clipped to its largest finite number as upstream.
    F16,
}

impl Half {
    /// The option that tells NVRTC.
    pub fn define(self) -> &'static str {
        match self {
            Self::Bf16 => "-DT_BF16",
            Self::F16 => "-DT_F16",
        }
    }

    /// The bits of the nearest values.
    pub fn from_f32(self, values: &[f32]) -> Vec<u16> {
        match self {
            Self::Bf16 => values
                .iter()
                .map(|v| bf16::from_f32(*v).to_bits())
                .collect(),
            Self::F16 => values.iter().map(|v| f16::from_f32(*v).to_bits()).collect(),
        }
    }

    /// The values that bits stand for.
    pub fn to_f32(self, bits: &[u16]) -> Vec<f32> {
        match self {
            Self::Bf16 => bits.iter().map(|b| bf16::from_bits(*b).to_f32()).collect(),
            Self::F16 => bits.iter().map(|b| f16::from_bits(*b).to_f32()).collect(),
        }
    }
}
