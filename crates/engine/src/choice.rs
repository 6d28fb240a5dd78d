//! Which engine: what a person asks for, and what fits the device and the precision.

use std::fmt;
use std::str::FromStr;

use engine_cuda::model::Sizes;
use mmdit::{BaseWeights, MmditConfig};
use pipeline::recipe::{BaseFormat, PrecisionChoice};
use serde::{Deserialize, Serialize};
use tensor::device::{self, cpu};
use tensor::{Device, DeviceError, Precision};

/// An engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EngineName {
    /// `mmdit` in Burn, on any device.
    Portable,
    /// `engine-cpu`.
    Cpu,
    /// `engine-cuda`.
    Cuda,
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
    #[error("engine `{name}` is not known: expected `auto`, `portable`, `cpu` or `cuda`")]
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
    /// There is no card for the engine, or not all that it needs beside one.
    #[error(
        "the engine `cuda` needs an NVIDIA card (Ampere or newer), its driver, NVRTC and cuBLASLt: {missing}"
    )]
    NoCard {
        /// What is missing.
        missing: String,
    },
    /// The device cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// What executes a network, and where.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    /// The engine.
    pub name: EngineName,
    /// Where Burn computes what the engine does not: encoders, the VAE, all of `portable`'s work.
    pub device: Device,
    /// Number of the card that the engine `cuda` computes on.
    pub card: usize,
}

/// Chooses by what a person said with `--device` and `--engine`.
///
/// The engine `cuda` is in every build and calls the driver by itself: where only it is to use the card that was named,
/// a build without Burn's CUDA backend is no obstacle, and Burn computes on the CPU.
///
/// # Errors
///
/// If a name is unknown, the device is not to be had, or a named engine does not compute there or not in that precision.
pub fn choose(
    device_option: &str,
    engine_option: &str,
    precision: Precision,
    config: &MmditConfig,
) -> Result<Chosen, EngineError> {
    let choice: EngineChoice = engine_option.parse()?;
    let selected = device::select(device_option);
    choose_with(choice, device_option, selected, |device| {
        choice.resolve(device_option, device, precision, config)
    })
}

fn choose_with(
    choice: EngineChoice,
    device_option: &str,
    selected: Result<Device, DeviceError>,
    resolve: impl FnOnce(&Device) -> Result<EngineName, EngineError>,
) -> Result<Chosen, EngineError> {
    let chosen = |name, device| Chosen {
        name,
        device,
        card: card_of(device_option).unwrap_or(0),
    };
    match selected {
        Ok(device) => Ok(chosen(resolve(&device)?, device)),
        Err(missing @ DeviceError::NotBuiltIn { .. }) => match resolve(&cpu()) {
            Ok(EngineName::Cuda) => Ok(chosen(EngineName::Cuda, cpu())),
            Err(error) if choice == EngineChoice::Named(EngineName::Cuda) => Err(error),
            _ => Err(missing.into()),
        },
        Err(error) => Err(error.into()),
    }
}

impl EngineError {
    /// What to do about it; `section` is the recipe's part that has the precision.
    pub fn help(&self, section: &str) -> String {
        match self {
            Self::NoCard { .. } => {
                "leave --engine out, and the portable engine does it, slowly; libraries are looked \
                 for where the system looks and in CUDA_HOME"
                    .to_owned()
            }
            Self::Unsupported {
                engine: EngineName::Cuda,
                ..
            } => format!(
                "leave --engine out, or set {section}.precision to \"bf16\" and leave --device out"
            ),
            Self::Unknown { .. } | Self::Unsupported { .. } => {
                format!("leave --engine out, or set {section}.precision to \"f32\"")
            }
            Self::Device(DeviceError::NotBuiltIn { .. }) => format!(
                "set {section}.precision to \"bf16\": the engine `cuda` needs no such build; `cargo xtask` makes one"
            ),
            Self::Device(_) => "leave --device out, and what is there is taken".to_owned(),
        }
    }
}

impl fmt::Display for EngineName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
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
            "cuda" => Ok(Self::Named(EngineName::Cuda)),
            _ => Err(EngineError::Unknown {
                name: name.to_owned(),
            }),
        }
    }
}

/// The precision that a recipe asks for.
pub fn precision_of(choice: PrecisionChoice) -> Precision {
    match choice {
        PrecisionChoice::F32 => Precision::F32,
        PrecisionChoice::Bf16 => Precision::Bf16,
        PrecisionChoice::Fp16 => Precision::F16,
    }
}

/// The form of the frozen weights that a recipe asks for.
pub fn base_weights_of(format: BaseFormat) -> BaseWeights {
    match format {
        BaseFormat::Plain => BaseWeights::Plain,
        BaseFormat::Nf4 => BaseWeights::Nf4 {
            double_quant: false,
        },
        BaseFormat::Nf4DoubleQuant => BaseWeights::Nf4 { double_quant: true },
    }
}

/// The number of the card that a `--device` allows: none with `cpu`.
pub fn card_of(device_option: &str) -> Option<usize> {
    match device_option.strip_prefix("cuda:") {
        Some(index) => index.parse().ok(),
        None => (device_option != "cpu").then_some(0),
    }
}

/// Whether the engine `cuda` can use the card of that number.
///
/// # Errors
///
/// [`EngineError::NoCard`] with what is missing.
pub fn require_card(index: usize) -> Result<(), EngineError> {
    let found = engine_cuda::device::probe(index).map(drop);
    found.map_err(|error| EngineError::NoCard {
        missing: error.to_string(),
    })
}

impl EngineChoice {
    /// The engine for a device, a precision and a network.
    ///
    /// `device` is where Burn computes. The engine `cuda` calls the driver by itself, so it needs no build with Burn's
    /// CUDA backend, and only what a person said with `--device` keeps it from a card. `auto` takes it for 16 bits where
    /// there is a card and the network's widths are among those that its kernels have.
    ///
    /// # Errors
    ///
    /// If one was named that does not compute there, or not in that, or whose card is not there.
    pub fn resolve(
        self,
        device_option: &str,
        device: &Device,
        precision: Precision,
        config: &MmditConfig,
    ) -> Result<EngineName, EngineError> {
        self.resolve_with(device_option, device, precision, config, require_card)
    }

    /// As [`EngineChoice::resolve`], with the words on what a card lacks from elsewhere.
    fn resolve_with(
        self,
        device_option: &str,
        device: &Device,
        precision: Precision,
        config: &MmditConfig,
        require_card: impl FnOnce(usize) -> Result<(), EngineError>,
    ) -> Result<EngineName, EngineError> {
        let fits_cpu = *device == cpu() && precision == Precision::F32;
        let is_half = precision != Precision::F32;
        let card = card_of(device_option);
        let unsupported = |engine, expected, found| EngineError::Unsupported {
            engine,
            expected,
            found,
        };
        match self {
            Self::Auto if fits_cpu => Ok(EngineName::Cpu),
            Self::Auto => {
                let card = card.filter(|_| is_half && Sizes::new(config).is_ok());
                let taken = card.map(require_card);
                if let Some(Err(error)) = &taken {
                    tracing::warn!("the engine `portable` is taken, which is slow: {error}");
                }
                Ok(match taken {
                    Some(Ok(())) => EngineName::Cuda,
                    _ => EngineName::Portable,
                })
            }
            Self::Named(EngineName::Cpu) if !fits_cpu => Err(unsupported(
                EngineName::Cpu,
                "on the CPU in f32",
                format!("{precision:?} on {device:?}"),
            )),
            Self::Named(EngineName::Cuda) if !is_half => Err(unsupported(
                EngineName::Cuda,
                "in bf16 and fp16",
                format!("{precision:?}"),
            )),
            Self::Named(EngineName::Cuda) => match card {
                None => Err(unsupported(
                    EngineName::Cuda,
                    "on NVIDIA cards",
                    format!("the device `{device_option}`"),
                )),
                Some(index) => require_card(index).map(|()| EngineName::Cuda),
            },
            Self::Named(name) => Ok(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(
        choice: &str,
        option: &str,
        precision: Precision,
        card: bool,
    ) -> Result<EngineName, EngineError> {
        let choice: EngineChoice = choice.parse().expect("it is known");
        let config = MmditConfig::tiny();
        choice.resolve_with(option, &cpu(), precision, &config, |_| match card {
            true => Ok(()),
            false => Err(EngineError::NoCard {
                missing: "no libcuda".to_owned(),
            }),
        })
    }

    #[test]
    fn auto_takes_what_fits() {
        for (option, precision, card, expected) in [
            ("auto", Precision::F32, false, EngineName::Cpu),
            ("auto", Precision::F32, true, EngineName::Cpu),
            ("auto", Precision::Bf16, false, EngineName::Portable),
            ("auto", Precision::Bf16, true, EngineName::Cuda),
            ("cuda:1", Precision::F16, true, EngineName::Cuda),
            ("cpu", Precision::Bf16, true, EngineName::Portable),
        ] {
            assert_eq!(resolve("auto", option, precision, card), Ok(expected));
        }
    }

    #[test]
    fn auto_leaves_widths_that_the_card_has_no_kernels_for_to_burn() {
        let mut config = MmditConfig::tiny();
        config.attention_head_dim = 6;
        config.num_attention_heads = 2;
        let taken =
            EngineChoice::Auto.resolve_with("auto", &cpu(), Precision::Bf16, &config, |_| Ok(()));
        assert_eq!(taken, Ok(EngineName::Portable));
    }

    #[test]
    fn a_named_engine_that_does_not_fit_says_why() {
        for (choice, option, precision, words) in [
            ("cpu", "auto", Precision::Bf16, ["f32", "Bf16"]),
            ("cuda", "auto", Precision::F32, ["bf16 and fp16", "F32"]),
            ("cuda", "cpu", Precision::Bf16, ["NVIDIA", "`cpu`"]),
            ("cuda", "auto", Precision::Bf16, ["NVRTC", "no libcuda"]),
        ] {
            let error = resolve(choice, option, precision, false)
                .expect_err("it does not fit")
                .to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
        assert!("gpu".parse::<EngineChoice>().is_err());
    }

    #[test]
    fn a_named_card_needs_burns_backend_only_where_burn_computes() {
        let choose = |choice: &str, resolved: Result<EngineName, EngineError>| {
            let missing = DeviceError::NotBuiltIn {
                name: "cuda:1".to_owned(),
            };
            let choice = choice.parse().expect("it is known");
            choose_with(choice, "cuda:1", Err(missing), |_| resolved)
        };
        let chosen = choose("auto", Ok(EngineName::Cuda)).expect("it needs no backend");
        assert_eq!((chosen.card, chosen.device), (1, cpu()));
        for (choice, resolved) in [
            ("auto", Ok(EngineName::Portable)),
            ("portable", Ok(EngineName::Portable)),
        ] {
            let error = choose(choice, resolved).expect_err("Burn would compute there");
            assert!(matches!(error, EngineError::Device(_)), "{error}");
        }
        let no_card = EngineError::NoCard {
            missing: "no libcuda".to_owned(),
        };
        assert_eq!(choose("cuda", Err(no_card.clone())), Err(no_card));
    }

    #[test]
    fn a_device_names_its_card() {
        let cards = ["auto", "cuda", "cuda:2", "cpu"].map(card_of);
        assert_eq!(cards, [Some(0), Some(0), Some(2), None]);
    }
}
