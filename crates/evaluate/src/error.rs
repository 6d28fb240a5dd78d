//! Why nothing can be measured.

use std::path::PathBuf;

use artifacts::ArtifactError;
use autoencoder::AutoencoderError;
use engine::{EngineError, OpenError, RunError};
use lora::LoraError;
use mmdit::ConfigError;
use pipeline::{FailureKind, StageError};
use pixel_art::{DecodeError, SourceError};

/// Why the stage stopped.
#[derive(Debug, thiserror::Error)]
pub enum EvaluateError {
    /// A picture that is held out is trained on as well.
    #[error(
        "the held-out picture {held_out} is also trained on, as {training}: it cannot tell what the LoRA makes of \
         pictures that it has not seen (sample {sample_id})"
    )]
    TrainedOn {
        /// Its file among those held out, and row if it is a table.
        held_out: String,
        /// Its file among those trained on.
        training: String,
        /// Identity of both.
        sample_id: String,
    },
    /// A caption of the held-out set has no embedding, or none of the transformer's size.
    #[error("{} does not suit the held-out captions: {problem}", path.display())]
    Embeddings {
        /// The table.
        path: PathBuf,
        /// What is missing or of another size.
        problem: String,
    },
    /// A held-out picture has no latents, or none of the transformer's size.
    #[error("{} does not suit the held-out pictures: {problem}", dir.display())]
    Latents {
        /// The cache.
        dir: PathBuf,
        /// What is missing or of another size.
        problem: String,
    },
    /// The loss is not a number.
    #[error(
        "the loss of the held-out picture {source_file} at noise level {sigma} is {loss} {with}"
    )]
    NotFinite {
        /// The picture.
        source_file: String,
        /// The noise level.
        sigma: f32,
        /// What was found.
        loss: f64,
        /// With or without the LoRA.
        with: &'static str,
    },
    /// A held-out picture cannot be fetched.
    #[error("the held-out picture {source_file} cannot be fetched")]
    Fetch {
        /// Its file, and row if it is a table.
        source_file: String,
        /// Why not.
        source: Box<ArtifactError>,
    },
    /// A held-out picture is not what was ingested.
    #[error("the held-out picture {source_file} is not the one that was ingested")]
    Changed {
        /// Its file, and row if it is a table.
        source_file: String,
        /// Why not.
        source: SourceError,
    },
    /// A drawn picture cannot be read.
    #[error("{} cannot be read", path.display())]
    Picture {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: DecodeError,
    },
    /// A drawn picture is not what was drawn.
    #[error("{} is not the picture that was drawn: its pixels are {found}, the index says {expected}", path.display())]
    OtherPicture {
        /// The file.
        path: PathBuf,
        /// BLAKE3 of the pixels in the index.
        expected: String,
        /// BLAKE3 of the pixels found.
        found: String,
    },
    /// The LoRA cannot be used.
    #[error(transparent)]
    Lora(#[from] LoraError),
    /// There is no such engine, or not for this device and precision.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The transformer's configuration cannot be used.
    #[error(transparent)]
    TransformerConfig(#[from] ConfigError),
    /// The transformer cannot be used.
    #[error(transparent)]
    Transformer(#[from] OpenError),
    /// The engine failed in the middle of its work.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The VAE's configuration cannot be used.
    #[error(transparent)]
    Vae(#[from] AutoencoderError),
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] ArtifactError),
}

impl StageError for EvaluateError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::NotFinite { .. }
            | Self::File(ArtifactError::Io {
                action: "write", ..
            }) => FailureKind::Failed,
            Self::Transformer(error) => error.kind(),
            Self::Run(error) => error.kind(),
            _ => FailureKind::BadInput,
        }
    }

    fn help(&self) -> Option<String> {
        Some(match self {
            Self::TrainedOn { .. } => {
                "take it out of one of the two: evaluate.held_out must share no picture with ingest.source"
                    .to_owned()
            }
            Self::Picture { .. } | Self::OtherPicture { .. } => {
                "draw again with `cargo xtask sample --force`".to_owned()
            }
            Self::Fetch { .. } | Self::Changed { .. } => {
                "run `cargo xtask evaluate` again: it reads the held-out pictures anew".to_owned()
            }
            Self::Engine(error) => error.help("train"),
            Self::Transformer(error) => return error.help(),
            Self::Run(error) => return error.help(),
            _ => return None,
        })
    }
}
