//! The words that a recipe may use: each enumeration is written in the file exactly as its variant's `serde` name.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What happens to a text with more tokens than there are positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LongText {
    /// The stage stops and names the text and its token count.
    Stop,
    /// The text is cut, with a note in the report.
    Truncate,
}

/// How a sprite is brought to the training resolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scaling {
    /// Every sprite pixel becomes an equal square; no new colours.
    IntegerNearest,
    /// The public recipe's: short side to the resolution by PIL's antialiased bilinear filter.
    BilinearShortSide,
}

/// Where a view is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Crop {
    /// In the middle.
    Center,
    /// At a place drawn from the seed, on the pixel grid under `integer-nearest`.
    Random,
}

/// What stands behind transparent pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Background {
    /// This colour, red, green, blue; written `"#rrggbb"`.
    Color([u8; 3]),
    /// Alpha is thrown away and the hidden colour shows, as in the public recipe; written `"drop-alpha"`.
    DropAlpha,
}

impl TryFrom<String> for Background {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if text == "drop-alpha" {
            return Ok(Self::DropAlpha);
        }
        text.strip_prefix('#')
            .filter(|digits| {
                digits.len() == 6 && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
            })
            .and_then(|digits| u32::from_str_radix(digits, 16).ok())
            .map(|number| {
                let [_, red, green, blue] = number.to_be_bytes();
                Self::Color([red, green, blue])
            })
            .ok_or_else(|| {
                format!("background is {text:?}; expected \"#rrggbb\" or \"drop-alpha\"")
            })
    }
}

impl From<Background> for String {
    fn from(background: Background) -> Self {
        background.to_string()
    }
}

impl fmt::Display for Background {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Color([red, green, blue]) => write!(formatter, "#{red:02x}{green:02x}{blue:02x}"),
            Self::DropAlpha => formatter.write_str("drop-alpha"),
        }
    }
}

/// The optimiser.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Optimizer {
    /// AdamW with block-wise dynamic 8-bit states.
    #[serde(rename = "adamw8bit")]
    AdamW8bit,
    /// AdamW with f32 states.
    #[serde(rename = "adamw")]
    AdamW,
}

/// How the learning rate moves over a run, as in diffusers' `get_scheduler`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// Always the peak.
    Constant,
    /// The peak after a linear warm-up.
    ConstantWithWarmup,
    /// Linearly to zero.
    Linear,
    /// Half a cosine to zero.
    Cosine,
    /// `schedule_cycles` half cosines with hard restarts.
    CosineWithRestarts,
    /// Polynomially with `schedule_power`.
    Polynomial,
}

/// What a network computes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PrecisionChoice {
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half, with loss scaling in training.
    Fp16,
}

/// How the frozen base's linear layers are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BaseFormat {
    /// As stored, in the compute precision.
    Plain,
    /// 4-bit NormalFloat, blocks of 64, f32 scales.
    Nf4,
    /// The same with 8-bit scales.
    Nf4DoubleQuant,
}

/// How LoRA A is initialised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LoraInit {
    /// Normal with standard deviation 1 / rank (peft's `"gaussian"`).
    Gaussian,
    /// Kaiming-uniform with a = √5 (peft's default).
    Kaiming,
}

/// Weight of the loss by noise level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Weighting {
    /// 1.
    None,
    /// σ⁻².
    SigmaSqrt,
    /// 1 (the public recipe couples this name with `logit_normal` sampling).
    LogitNormal,
    /// 2/(π(1−2σ+2σ²)).
    Cosmap,
    /// 1 (the public recipe couples this name with `mode` sampling).
    Mode,
}

/// Density from which noise levels are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimestepSampling {
    /// Uniform.
    Uniform,
    /// sigmoid(N(mean, std)).
    LogitNormal,
    /// 1 − u − scale·(cos²(πu/2) − 1 + u).
    Mode,
}

/// `""` in the file is `None`, any other text a path.
pub(super) mod empty_is_none {
    use std::path::PathBuf;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(
        path: &Option<PathBuf>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        path.clone().unwrap_or_default().serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<PathBuf>, D::Error> {
        let path = PathBuf::deserialize(deserializer)?;
        Ok((!path.as_os_str().is_empty()).then_some(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_background_is_read_back_as_it_is_written() {
        for text in ["#ff8000", "drop-alpha"] {
            let background = Background::try_from(text.to_owned()).expect("valid");
            assert_eq!(background.to_string(), text);
        }
    }

    #[test]
    fn a_background_that_is_no_colour_is_refused() {
        for text in ["#ff80", "ff8000", "#ff80zz", "#+f8000", "white", ""] {
            assert!(Background::try_from(text.to_owned()).is_err(), "{text:?}");
        }
    }
}
