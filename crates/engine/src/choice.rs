//! Which engine: what a person asks for, and what fits the device and the precision.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tensor::device::cpu;
use tensor::{Device, Precision};

/// An engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EngineName {
    /// `mmdit` in Burn, on any device.
    Portable,
    /// `engine-cpu`.
    Cpu,
}

/// What a person asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineChoice {
    /// The fastest that does what is wanted.
    Auto,
    /// This one or none.
    Named(EngineName),
}

/// Why there is no engine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The name is none that we know.
    #[error("engine `{name}` is not known: expected `auto`, `portable` or `cpu`")]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// The engine does not do what is wanted.
    #[error("the engine `{engine}` computes {expected}, and {found} is wanted")]
    Unsupported {
        /// The engine.
        engine: EngineName,
        /// What it does.
        expected: &'static str,
        /// What is wanted.
        found: String,
    },
}

impl fmt::Display for EngineName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
            Self::Cpu => "cpu",
        })
    }
}

impl FromStr for EngineChoice {
    type Err = EngineError;

    fn from_str(name: &str) -> Result<Self, EngineError> {
        match name {
            "auto" => Ok(Self::Auto),
            "portable" => Ok(Self::Named(EngineName::Portable)),
            "cpu" => Ok(Self::Named(EngineName::Cpu)),
            _ => Err(EngineError::Unknown {
                name: name.to_owned(),
            }),
        }
    }
}

impl EngineChoice {
    /// The engine for a device and a precision.
    ///
    /// # Errors
    ///
    /// If one was named that does not compute there, or not in that.
    pub fn resolve(self, device: &Device, precision: Precision) -> Result<EngineName, EngineError> {
        let fits = *device == cpu() && precision == Precision::F32;
        match self {
            Self::Auto if fits => Ok(EngineName::Cpu),
            Self::Auto => Ok(EngineName::Portable),
            Self::Named(EngineName::Cpu) if !fits => Err(EngineError::Unsupported {
                engine: EngineName::Cpu,
                expected: "on the CPU in f32",
                found: format!("{precision:?} on {device:?}"),
            }),
            Self::Named(name) => Ok(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_engine_is_taken_where_it_fits_and_never_where_it_does_not() {
        let auto = EngineChoice::Auto;
        assert_eq!(auto.resolve(&cpu(), Precision::F32), Ok(EngineName::Cpu));
        assert_eq!(
            auto.resolve(&cpu(), Precision::Bf16),
            Ok(EngineName::Portable)
        );
        let named: EngineChoice = "cpu".parse().expect("it is known");
        let error = named
            .resolve(&cpu(), Precision::Bf16)
            .expect_err("another precision")
            .to_string();
        assert!(error.contains("f32") && error.contains("Bf16"), "{error}");
        assert!("gpu".parse::<EngineChoice>().is_err());
    }
}
