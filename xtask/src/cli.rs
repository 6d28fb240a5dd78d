//! The commands and their options. What decides a result is in the recipe; options say which recipe, where, how fast.

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::{Args, Parser, Subcommand};
use pipeline::Override;

/// Turns a folder of pixel-art characters into a FLUX.1 LoRA and draws with it.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Read images and captions into tables
    Ingest(StageOptions),
    /// Encode captions with T5 and CLIP
    EmbedText(StageOptions),
    /// ingest and embed-text
    Prepare(StageOptions),
    /// Encode images with the VAE
    CacheLatents(StageOptions),
    /// Train the LoRA
    Train(StageOptions),
    /// Draw pictures
    Sample(SampleOptions),
    /// Measure the LoRA on pictures held out, and what the drawn pictures show
    Evaluate(StageOptions),
    /// All stages, from images to a contact sheet and a report
    Run(StageOptions),
    /// Say of each stage whether its output is still good, and if not why
    Status(StageOptions),
    /// Compare with reference values from the Python stack
    #[command(disable_help_flag = true)]
    Parity(PassedOn),
    /// Measure how fast the transformer is
    #[command(disable_help_flag = true)]
    Bench(PassedOn),
    /// Say what training takes on an NVIDIA card, before anything is loaded
    #[command(disable_help_flag = true)]
    Plan(PassedOn),
    /// Write a small untrained base model
    #[command(disable_help_flag = true)]
    RandomBase(PassedOn),
    /// Train a small base model from scratch
    #[command(disable_help_flag = true)]
    Pretrain(PassedOn),
    /// Run the tests
    Test(TestOptions),
}

/// Options of everything that runs stages.
#[derive(Clone, Debug, Args)]
pub struct StageOptions {
    /// The recipe [default: configs/demo.toml of the workspace]
    #[arg(long, value_name = "FILE")]
    pub recipe: Option<PathBuf>,
    /// Directory of all artifacts [default: runs of the workspace]
    #[arg(long, value_name = "DIR")]
    pub runs: Option<PathBuf>,
    /// Replace one value of the recipe, e.g. train.steps=50 (may be repeated)
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_override)]
    pub set: Vec<Override>,
    /// Print one JSON document on stdout, and nothing else there
    #[arg(long)]
    pub json: bool,
    /// Run even what is fresh, and take nothing over from earlier runs
    #[arg(long)]
    pub force: bool,
    /// auto, cpu, cuda or cuda:INDEX
    #[arg(long, default_value = "auto", value_parser = parse_device)]
    pub device: String,
    /// What executes the transformer in train, sample and evaluate: auto, portable, cpu or cuda
    #[arg(long, default_value = "auto", value_parser = ["auto", "portable", "cpu", "cuda"])]
    pub engine: String,
    /// Worker threads [default: one per core]
    #[arg(long, value_name = "COUNT")]
    pub threads: Option<NonZeroUsize>,
    /// Images or captions encoded at once [default: chosen by the stage]
    #[arg(long, value_name = "COUNT")]
    pub batch: Option<NonZeroUsize>,
}

/// Options of `sample`: each stands for a field of the recipe's `[sample]`.
#[derive(Clone, Debug, Args)]
pub struct SampleOptions {
    /// Options of all stages.
    #[command(flatten)]
    pub stage: StageOptions,
    /// Draw this instead of the recipe's prompts (may be repeated)
    #[arg(long, value_name = "TEXT")]
    pub prompt: Vec<String>,
    /// Draw the lines of this file instead of the recipe's prompts
    #[arg(long, value_name = "FILE")]
    pub prompt_file: Option<PathBuf>,
    /// What to keep away from; needs --true-cfg above 1
    #[arg(long, value_name = "TEXT")]
    pub negative_prompt: Option<String>,
    /// Scale of true classifier-free guidance; 1 is off
    #[arg(long, value_name = "SCALE")]
    pub true_cfg: Option<f64>,
    /// Distilled guidance
    #[arg(long, value_name = "SCALE")]
    pub guidance: Option<f64>,
    /// Denoising steps
    #[arg(long, value_name = "COUNT")]
    pub steps: Option<u32>,
    /// Seed (may be repeated)
    // TOML's integers end at 2^63 − 1.
    #[arg(long, value_name = "SEED", value_parser = clap::value_parser!(i64).range(0..))]
    pub seed: Vec<i64>,
    /// Size in pixels, e.g. 512x512
    #[arg(long, value_name = "WIDTHxHEIGHT")]
    pub size: Option<Size>,
    /// Pictures per prompt and seed
    #[arg(long, value_name = "COUNT")]
    pub count: Option<u32>,
    /// Apply a LoRA file too, with its scale after a colon (may be repeated)
    #[arg(long, value_name = "FILE[:SCALE]")]
    pub lora: Vec<LoraOption>,
    /// Leave out the LoRA that this recipe trained (train need not have run)
    #[arg(long)]
    pub no_trained_lora: bool,
}

/// Everything behind the command goes to `spritelora` as it is.
#[derive(Clone, Debug, Args)]
pub struct PassedOn {
    /// Options; see --help
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub arguments: Vec<OsString>,
}

/// Options of `test`.
#[derive(Clone, Debug, Args)]
pub struct TestOptions {
    /// Run the tests that need an NVIDIA GPU; fails without one
    #[arg(long)]
    pub gpu: bool,
    /// Print one JSON document on stdout, and nothing else there
    #[arg(long)]
    pub json: bool,
}

/// A picture size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Width in pixels.
    pub width_px: u32,
    /// Height in pixels.
    pub height_px: u32,
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.split_once(['x', '×'])
            .and_then(|(width, height)| {
                Some(Self {
                    width_px: width.parse().ok()?,
                    height_px: height.parse().ok()?,
                })
            })
            .ok_or_else(|| "expected WIDTHxHEIGHT, e.g. 512x512".to_owned())
    }
}

/// A LoRA file and its scale.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraOption {
    /// The file.
    pub path: PathBuf,
    /// Multiplies its own strength.
    pub scale: f64,
}

impl FromStr for LoraOption {
    type Err = String;

    /// A colon may also be part of a name: what stands behind the last one is a scale only if it is a number.
    fn from_str(text: &str) -> Result<Self, String> {
        let whole = || Self {
            path: PathBuf::from(text),
            scale: 1.0,
        };
        if text.is_empty() {
            return Err("expected FILE or FILE:SCALE".to_owned());
        }
        if Path::new(text).exists() {
            return Ok(whole());
        }
        Ok(match text.rsplit_once(':') {
            Some((path, scale)) if !path.is_empty() => match scale.parse::<f64>() {
                Ok(scale) if scale.is_finite() => Self {
                    path: PathBuf::from(path),
                    scale,
                },
                _ => whole(),
            },
            _ => whole(),
        })
    }
}

fn parse_override(text: &str) -> Result<Override, String> {
    text.parse()
        .map_err(|_| "expected section.field=value, e.g. train.steps=50".to_owned())
}

fn parse_device(text: &str) -> Result<String, String> {
    let known = match text.strip_prefix("cuda:") {
        Some(index) => index.parse::<usize>().is_ok(),
        None => matches!(text, "auto" | "cpu" | "cuda"),
    };
    if known {
        Ok(text.to_owned())
    } else {
        Err("expected auto, cpu, cuda or cuda:<index>".to_owned())
    }
}

#[cfg(test)]
mod unit_tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_contradicts_itself_nowhere() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_lora_has_a_scale_only_if_it_is_a_number() {
        let parsed = |text: &str| text.parse::<LoraOption>().expect("a LoRA");
        assert_eq!(parsed("a.safetensors:0.7").scale, 0.7);
        assert_eq!(parsed("a.safetensors").scale, 1.0);
        assert_eq!(
            parsed("C:\\a.safetensors").path,
            PathBuf::from("C:\\a.safetensors")
        );
    }

    #[test]
    fn a_size_is_two_numbers() {
        let size = "512x768".parse::<Size>().expect("a size");
        assert_eq!((size.width_px, size.height_px), (512, 768));
        assert!("512".parse::<Size>().is_err());
    }

    #[test]
    fn an_unknown_device_is_wrong_usage() {
        assert!(parse_device("cuda:1").is_ok());
        for device in ["gpu", "cuda:", "cuda:x", ""] {
            assert!(parse_device(device).is_err(), "{device:?}");
        }
    }
}
