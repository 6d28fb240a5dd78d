//! The subcommands and their options.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bench::training_run::LEAST_STEPS;
use bench::{CpuBench, FluxBench};
use clap::{Args, Parser, Subcommand, ValueEnum};
use engine::EngineName;
use pipeline::Override;
use random_base::Preset;

use crate::planning::Bytes;

/// Does the work of one stage of Spritelora; `cargo xtask` starts it.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Read images and captions into tables
    Ingest(PreparationOptions),
    /// Encode captions with T5 and CLIP
    EmbedText(PreparationOptions),
    /// Encode images with the VAE
    CacheLatents(PreparationOptions),
    /// Train the LoRA
    Train(StageOptions),
    /// Draw pictures
    Sample(StageOptions),
    /// Measure the LoRA on pictures held out, and what the drawn pictures show
    Evaluate(StageOptions),
    /// Say what training takes on an NVIDIA card, before anything is loaded
    Plan(PlanOptions),
    /// Write a small untrained base, to try the pipeline on
    RandomBase(RandomBaseOptions),
    /// Train a small base from scratch
    Pretrain(PretrainOptions),
    /// Compare with reference values from the Python stack
    Parity(ParityOptions),
    /// Measure how fast the transformer is
    #[command(subcommand)]
    Bench(Bench),
}

impl Command {
    /// Whether stdout is to hold one JSON document.
    pub fn wants_json(&self) -> bool {
        match self {
            Self::Ingest(options) | Self::EmbedText(options) | Self::CacheLatents(options) => {
                options.stage.json
            }
            Self::Train(options) | Self::Sample(options) | Self::Evaluate(options) => options.json,
            Self::Plan(options) => options.json,
            Self::Pretrain(options) => options.json,
            Self::Parity(options) => options.json,
            Self::Bench(Bench::Cpu(options)) => options.json,
            Self::Bench(Bench::Flux(options)) => options.json,
            Self::RandomBase(_) | Self::Bench(Bench::FirstImage) => false,
        }
    }
}

/// Options of `plan`.
#[derive(Clone, Debug, Args)]
pub struct PlanOptions {
    /// The recipe
    #[arg(long, value_name = "FILE")]
    pub recipe: PathBuf,
    /// Replace one value of the recipe, e.g. train.micro_batch=2 (may be repeated)
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<Override>,
    /// Memory of the card, e.g. 24GiB [default: the first card's; without one an H100's]
    #[arg(long, value_name = "SIZE")]
    pub gpu_memory: Option<Bytes>,
    /// Plan for the sizes of FLUX.1-dev instead of those of the recipe's base, which need not be there
    #[arg(long)]
    pub flux_dev: bool,
    /// Print one JSON document on stdout, and nothing else there
    #[arg(long)]
    pub json: bool,
}

/// Phases of `pretrain`, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PretrainPhase {
    /// Encoder and decoder together
    Autoencoder,
    /// The decoder alone
    Decoder,
    /// Transformer and text encoders together
    Base,
    /// The transformer alone
    Refine,
}

impl From<PretrainPhase> for pretrain::Phase {
    fn from(phase: PretrainPhase) -> Self {
        match phase {
            PretrainPhase::Autoencoder => Self::Autoencoder,
            PretrainPhase::Decoder => Self::Decoder,
            PretrainPhase::Base => Self::Base,
            PretrainPhase::Refine => Self::Refine,
        }
    }
}

/// Options of `pretrain`.
#[derive(Clone, Debug, Args)]
pub struct PretrainOptions {
    /// The pretraining recipe
    #[arg(long, value_name = "FILE")]
    pub recipe: PathBuf,
    /// Directory of the base
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Directory of checkpoints and logs
    #[arg(long, value_name = "DIR")]
    pub work: PathBuf,
    /// auto, cpu, cuda or cuda:INDEX
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// What the model card says that it was trained on [default: the device]
    #[arg(long, value_name = "TEXT")]
    pub hardware: Option<String>,
    /// Write a checkpoint and leave after so many seconds; the same command goes on
    #[arg(long, value_name = "SECONDS")]
    pub max_seconds: Option<u64>,
    /// Train only these phases; those that they build on must be done
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PHASE", default_values_t = PretrainPhase::value_variants().to_vec())]
    pub only: Vec<PretrainPhase>,
    /// Print one JSON document on stdout, and nothing else there
    #[arg(long)]
    pub json: bool,
}

/// Options of `parity`.
#[derive(Clone, Debug, Args)]
pub struct ParityOptions {
    /// Directory with cases.json, as the oracle's make_fixtures.py writes it
    #[arg(long, value_name = "DIR")]
    pub fixtures: PathBuf,
    /// What executes the transformer
    #[arg(long, value_enum, default_value_t = ParityEngine::Portable)]
    pub engine: ParityEngine,
    /// Print one JSON document on stdout, and nothing else there
    #[arg(long)]
    pub json: bool,
}

/// What `bench` measures.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// A training step and a sampling step of the base `small` on the CPU
    Cpu(CpuBenchOptions),
    /// Training and sampling steps at the shapes of FLUX.1-dev on an NVIDIA card
    Flux(FluxBenchOptions),
    /// Draw one picture's latents at those shapes and end (bench flux times this from outside)
    FirstImage,
}

/// Options of `bench cpu`.
#[derive(Clone, Debug, Args)]
pub struct CpuBenchOptions {
    /// Measure PyTorch too, with this interpreter (it needs torch, diffusers and peft)
    #[arg(long, value_name = "FILE")]
    pub python: Option<PathBuf>,
    /// PyTorch's side of it [default: docs/benchmarks/cpu_step.py of the workspace]
    #[arg(long, value_name = "FILE")]
    pub script: Option<PathBuf>,
    /// Steps of each kind, 1 or more
    #[arg(long, value_name = "COUNT", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub repeats: u32,
    /// Measure the portable engine too
    #[arg(long)]
    pub portable: bool,
    /// Print one JSON document on stdout, and nothing else there
    #[arg(long)]
    pub json: bool,
}

impl CpuBenchOptions {
    /// What to measure.
    pub fn measurement(self) -> CpuBench {
        CpuBench {
            python: self.python,
            script: self.script.unwrap_or_else(|| {
                let package = std::env::var_os("CARGO_MANIFEST_DIR");
                default_script(package.as_deref().map(Path::new))
            }),
            repeats: self.repeats as usize,
            portable: self.portable,
            json: self.json,
        }
    }
}

/// PyTorch's side of `bench cpu` where none is named: that of the workspace under cargo, which says where the package
/// that it runs is (xtask, or this one), and that below the current directory else.
fn default_script(package: Option<&Path>) -> PathBuf {
    let script = Path::new("docs/benchmarks/cpu_step.py");
    package
        .into_iter()
        .flat_map(Path::ancestors)
        .map(|dir| dir.join(script))
        .find(|path| path.is_file())
        .unwrap_or_else(|| script.to_owned())
}

/// Options of `bench flux`.
#[derive(Clone, Debug, Args)]
pub struct FluxBenchOptions {
    /// Measure on the card; without it only what is predicted is said
    #[arg(long)]
    pub gpu: bool,
    /// Measure PyTorch too, with this interpreter (it needs torch, diffusers, peft and bitsandbytes)
    #[arg(long, value_name = "FILE", requires_all = ["peer", "gpu"])]
    pub python: Option<PathBuf>,
    /// PyTorch's side of it
    #[arg(long, value_name = "FILE", requires = "python")]
    pub peer: Option<PathBuf>,
    /// Optimiser steps of the training run, 8 to 700; of fewer than 700 the rest is reckoned
    #[arg(long, value_name = "COUNT", default_value_t = 40,
        value_parser = clap::value_parser!(u32).range(i64::from(LEAST_STEPS)..=700))]
    pub train_steps: u32,
    /// Train for so long after all else, and say whether device memory grew
    #[arg(long, value_name = "SECONDS", requires = "gpu", value_parser = clap::value_parser!(u64).range(1..))]
    pub soak_seconds: Option<u64>,
    /// Print one JSON document on stdout, and nothing else there
    #[arg(long)]
    pub json: bool,
}

impl FluxBenchOptions {
    /// What to measure.
    pub fn measurement(self) -> FluxBench {
        FluxBench {
            gpu: self.gpu,
            peer: self.python.zip(self.peer),
            train_steps: self.train_steps,
            soak: self.soak_seconds.map(Duration::from_secs),
            json: self.json,
        }
    }
}

/// Engines that `parity` can look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ParityEngine {
    /// mmdit in Burn
    Portable,
    /// engine-cpu
    Cpu,
    /// engine-cuda on an NVIDIA card: the transformer's cases, in bf16 and in fp16
    Cuda,
}

impl ParityEngine {
    /// The engine.
    pub fn name(self) -> EngineName {
        match self {
            Self::Portable => EngineName::Portable,
            Self::Cpu => EngineName::Cpu,
            Self::Cuda => EngineName::Cuda,
        }
    }
}

/// Options of `random-base`.
#[derive(Clone, Debug, Args)]
pub struct RandomBaseOptions {
    /// Directory of the base; an untrained base in it is replaced
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Set of sizes: demo, small or tiny
    #[arg(long, default_value = "demo")]
    pub preset: Preset,
    /// Seed of the weights
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Directory with the published tokenizers' files in clip/ and t5/
    #[arg(long, value_name = "DIR")]
    pub tokenizers: PathBuf,
}

/// Options of the stages that prepare pictures.
#[derive(Clone, Debug, Args)]
pub struct PreparationOptions {
    /// Options of every stage.
    #[command(flatten)]
    pub stage: StageOptions,
    /// Work on the pictures of evaluate.held_out instead of those of ingest.source
    #[arg(long)]
    pub held_out: bool,
}

/// Options of every stage.
#[derive(Clone, Debug, Args)]
pub struct StageOptions {
    /// The recipe
    #[arg(long, value_name = "FILE")]
    pub recipe: PathBuf,
    /// Directory of all artifacts
    #[arg(long, value_name = "DIR")]
    pub runs: PathBuf,
    /// Replace one value of the recipe, e.g. train.steps=50 (may be repeated)
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<Override>,
    /// Print one JSON document on stdout, and nothing else there
    #[arg(long)]
    pub json: bool,
    /// Run even if fresh, and take nothing over from earlier runs
    #[arg(long)]
    pub force: bool,
    /// auto, cpu, cuda or cuda:INDEX
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// What executes the transformer in train, sample and evaluate: auto, portable, cpu or cuda
    #[arg(long, default_value = "auto")]
    pub engine: String,
    /// Worker threads [default: one per core]
    #[arg(long, value_name = "COUNT")]
    pub threads: Option<NonZeroUsize>,
    /// Images or captions encoded at once [default: chosen by the stage]
    #[arg(long, value_name = "COUNT")]
    pub batch: Option<NonZeroUsize>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_contradicts_itself_nowhere() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_document_is_wanted_with_the_option_json() {
        for words in [
            &["bench", "cpu"][..],
            &["bench", "flux"],
            &["plan", "--recipe", "r"],
            &["train", "--recipe", "r", "--runs", "d"],
            &["ingest", "--recipe", "r", "--runs", "d"],
            &["pretrain", "--recipe", "r", "--out", "d", "--work", "d"],
            &["parity", "--fixtures", "d"],
        ] {
            let wants = |more: &[&str]| {
                let words = ["spritelora"].iter().chain(words).chain(more);
                let parsed = Cli::try_parse_from(words).expect("right usage");
                parsed.command.wants_json()
            };
            assert!(!wants(&[]) && wants(&["--json"]), "{words:?}");
        }
    }

    #[test]
    fn the_script_is_found_from_every_directory_under_cargo() {
        let found = default_script(Some(Path::new(env!("CARGO_MANIFEST_DIR"))));
        assert!(
            found.is_absolute() && found.is_file(),
            "{}",
            found.display()
        );
        assert_eq!(
            default_script(None),
            Path::new("docs/benchmarks/cpu_step.py")
        );
    }

    #[test]
    fn a_benchmark_has_steps() {
        let parsed = |repeats| {
            Cli::try_parse_from(["spritelora", "bench", "cpu", "--repeats", repeats]).is_ok()
        };
        assert!(parsed("1") && !parsed("0"));
    }

    #[test]
    fn the_peer_is_a_script_with_an_interpreter_on_the_same_card() {
        let parsed = |more: &[&str]| {
            let words = ["spritelora", "bench", "flux"].iter().chain(more);
            Cli::try_parse_from(words).is_ok()
        };
        assert!(parsed(&[]) && parsed(&["--gpu", "--json"]));
        assert!(parsed(&["--gpu", "--train-steps", "700"]));
        assert!(!parsed(&["--gpu", "--train-steps", "7"]));
        assert!(parsed(&["--gpu", "--soak-seconds", "600"]));
        assert!(!parsed(&["--soak-seconds", "600"]));
        assert!(parsed(&[
            "--gpu",
            "--python",
            "python3",
            "--peer",
            "flux_torch.py"
        ]));
        assert!(!parsed(&["--gpu", "--python", "python3"]));
        assert!(!parsed(&["--gpu", "--peer", "flux_torch.py"]));
        assert!(!parsed(&["--python", "python3", "--peer", "flux_torch.py"]));
    }
}
