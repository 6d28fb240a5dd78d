//! What can keep a LoRA from being trained.

use std::path::PathBuf;

use artifacts::ArtifactError;
use autoencoder::AutoencoderError;
use engine::{EngineError, EngineName, OpenError, RunError};
use flow_matching::SchedulerError;
use lora::LoraError;
use mmdit::ConfigError;
use pipeline::{FailureKind, StageError};

/// Why the stage stopped.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A target names no layer of the transformer.
    #[error("train.targets names `{target}`, and no linear layer of the transformer ends so")]
    NoSuchTarget {
        /// The target.
        target: String,
        /// Last parts of the paths that there are.
        known: Vec<String>,
    },
    /// There is nothing to train on.
    #[error("{} pairs no image with a caption", path.display())]
    NoPairs {
        /// The captions.
        path: PathBuf,
    },
    /// A caption belongs to an image that is not there.
    #[error("{} has a caption for image {sample_id}, which is not among the samples", path.display())]
    UnknownSample {
        /// The captions.
        path: PathBuf,
        /// The image.
        sample_id: String,
    },
    /// The embeddings were made for another length of text or for another transformer.
    #[error(
        "{} holds {what} of {found}; {asker} wants {expected}", path.display()
    )]
    EmbeddingSize {
        /// The embeddings.
        path: PathBuf,
        /// Which size.
        what: &'static str,
        /// What is there.
        found: usize,
        /// What is needed.
        expected: usize,
        /// Who needs it.
        asker: &'static str,
    },
    /// A caption was not embedded.
    #[error("{} has no embedding of the caption {caption:?} of {source_file}", path.display())]
    MissingEmbedding {
        /// The embeddings.
        path: PathBuf,
        /// The caption.
        caption: String,
        /// The image that has it.
        source_file: String,
    },
    /// An embedding holds infinities or not-a-numbers.
    #[error("the embedding of the caption {caption:?} in {} is not finite", path.display())]
    EmbeddingNotFinite {
        /// The embeddings.
        path: PathBuf,
        /// The caption.
        caption: String,
    },
    /// An image has no latent.
    #[error("{} has no latent of {source_file} (image {sample_id})", dir.display())]
    MissingLatent {
        /// The latent cache.
        dir: PathBuf,
        /// The image.
        sample_id: String,
        /// Where it came from.
        source_file: String,
    },
    /// Latents do not fit the transformer, or each other.
    #[error("the latent of image {sample_id} in {} is {found:?}; expected {expected}", dir.display())]
    LatentShape {
        /// The latent cache.
        dir: PathBuf,
        /// The image.
        sample_id: String,
        /// Channels, height, width.
        found: [usize; 3],
        /// What it should be.
        expected: String,
    },
    /// The VAE's latents do not fit the transformer's tokens.
    #[error(
        "the parts of the base at {} do not belong together: the transformer takes tokens of {in_channels} channels and \
         gives {out_channels}, four cells of the VAE's latent have {latent_channels}", base.display()
    )]
    PartsDiffer {
        /// The base.
        base: PathBuf,
        /// What the transformer takes.
        in_channels: usize,
        /// What it gives.
        out_channels: usize,
        /// What the VAE makes.
        latent_channels: usize,
    },
    /// Gradients stayed infinite or not-a-number.
    #[error(
        "training fell apart at step {step}: {num_skipped} steps in a row had gradients that are not finite"
    )]
    Diverged {
        /// The optimiser step that could not be taken.
        step: u32,
        /// How often it was tried.
        num_skipped: usize,
    },
    /// Checkpoints cannot be listed or removed.
    #[error("cannot keep checkpoints")]
    Checkpoints(#[source] std::io::Error),
    /// An interrupted run is to be continued by another engine.
    #[error("{} was written by the engine `{began}`, and this run would go on with `{now}`", path.display())]
    OtherEngine {
        /// The checkpoint.
        path: PathBuf,
        /// The engine that wrote it.
        began: EngineName,
        /// The engine of this run.
        now: EngineName,
    },
    /// There is no such engine, or not for this device and precision.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The transformer's configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The transformer cannot be used, or not be trained on this card.
    #[error(transparent)]
    Transformer(#[from] OpenError),
    /// The engine failed in the middle of its work.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The VAE's configuration cannot be used.
    #[error(transparent)]
    Vae(#[from] AutoencoderError),
    /// The scheduler's configuration cannot be used.
    #[error(transparent)]
    Schedule(#[from] SchedulerError),
    /// The LoRA cannot be written.
    #[error(transparent)]
    Lora(#[from] LoraError),
    /// A table or shard cannot be read or written.
    #[error(transparent)]
    File(#[from] ArtifactError),
}

impl StageError for TrainError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::Diverged { .. }
            | Self::Checkpoints(_)
            | Self::File(ArtifactError::Io { .. })
            | Self::Lora(LoraError::File(ArtifactError::Io { .. })) => FailureKind::Failed,
            Self::Transformer(error) => error.kind(),
            Self::Run(error) => error.kind(),
            _ => FailureKind::BadInput,
        }
    }

    fn help(&self) -> Option<String> {
        Some(match self {
            Self::NoSuchTarget { known, .. } => format!("layers end in: {}", known.join(", ")),
            Self::NoPairs { .. } | Self::UnknownSample { .. } => {
                "run `cargo xtask ingest --force`".to_owned()
            }
            Self::EmbeddingSize { .. }
            | Self::MissingEmbedding { .. }
            | Self::EmbeddingNotFinite { .. } => "run `cargo xtask embed-text --force`".to_owned(),
            Self::MissingLatent { .. }
            | Self::LatentShape { .. }
            | Self::File(ArtifactError::OtherVae { .. }) => {
                "run `cargo xtask cache-latents --force`".to_owned()
            }
            Self::OtherEngine { began, .. } => format!(
                "go on with --engine {began}, or begin again with --force: engines agree within rounding, and a run \
                 that changed over would end with other bytes than one that did not"
            ),
            Self::Engine(error) => error.help("train"),
            Self::Lora(LoraError::RankTooLarge { limit, .. }) => {
                format!("set train.rank to at most {limit}; 4 to 64 are usual")
            }
            Self::Transformer(error) => return error.help(),
            Self::Run(error) => match error.help() {
                Some(help) => {
                    format!("{help}; the same command goes on from the newest checkpoint")
                }
                None => return None,
            },
            Self::Diverged { .. } => {
                "lower train.learning_rate, or set train.precision to \"bf16\" or \"f32\""
                    .to_owned()
            }
            _ => return None,
        })
    }
}
