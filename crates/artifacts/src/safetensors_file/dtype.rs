//! The number types of safetensors that we can name.

use std::fmt;

/// The type of a tensor's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the names are the header's words
#[allow(clippy::upper_case_acronyms)]
pub enum Dtype {
    F64,
    I64,
    U64,
    F32,
    I32,
    U32,
    F16,
    BF16,
    I16,
    U16,
    I8,
    U8,
    BOOL,
}

impl Dtype {
    const ALL: [Self; 13] = [
        Self::F64,
        Self::I64,
        Self::U64,
        Self::F32,
        Self::I32,
        Self::U32,
        Self::F16,
        Self::BF16,
        Self::I16,
        Self::U16,
        Self::I8,
        Self::U8,
        Self::BOOL,
    ];

    /// Its word in the header.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F64 => "F64",
            Self::I64 => "I64",
            Self::U64 => "U64",
            Self::F32 => "F32",
            Self::I32 => "I32",
            Self::U32 => "U32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::I16 => "I16",
            Self::U16 => "U16",
            Self::I8 => "I8",
            Self::U8 => "U8",
            Self::BOOL => "BOOL",
        }
    }

    /// The dtype of a header's word.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Bytes of one number.
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::BF16 | Self::I16 | Self::U16 => 2,
            Self::I8 | Self::U8 | Self::BOOL => 1,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
