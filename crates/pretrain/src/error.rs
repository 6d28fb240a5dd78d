//! Why a base could not be trained.

use std::io::ErrorKind;
use std::path::PathBuf;

use artifacts::{ArtifactError, RejectRow};
use pipeline::{FailureKind, StageError};
use sources::{SourceError, advice, rejects_text};

/// Why a base could not be trained.
#[derive(Debug, thiserror::Error)]
pub enum PretrainError {
    /// A file could not be read or written.
    #[error("cannot read or write a file of the run")]
    Read(#[source] std::io::Error),
    /// The recipe is no recipe.
    #[error("{path} is no pretraining recipe")]
    Recipe {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: Box<toml::de::Error>,
    },
    /// A field says what cannot be.
    #[error("the recipe's `{key}` is {found}; expected {expected}")]
    Field {
        /// The key, e.g. `base.optimizer.learning_rate`.
        key: String,
        /// What it says.
        found: String,
        /// What would do.
        expected: String,
    },
    /// Another process trains the same phase with the same files.
    #[error("another process trains the phase `{phase}` in {}", work.display())]
    Locked {
        /// The phase.
        phase: &'static str,
        /// The directory of checkpoints.
        work: PathBuf,
    },
    /// Another process makes the same base.
    #[error("another process makes a base in {}", out.display())]
    OutLocked {
        /// The directory.
        out: PathBuf,
    },
    /// The base would be written over one that this work did not make.
    #[error("{} holds a base already, and the --work directory has no results that it could be of", path.display())]
    Occupied {
        /// The directory.
        path: PathBuf,
    },
    /// A source of pictures cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Pictures or captions of a source cannot be used.
    #[error(
        "{count} {} of {key} {} cannot be used:{}",
        if *count == 1 { "image" } else { "images" },
        path.display(),
        rejects_text(listed, *count)
    )]
    Images {
        /// The recipe's key.
        key: &'static str,
        /// The source.
        path: PathBuf,
        /// How many.
        count: u64,
        /// The first of them, at most 20.
        listed: Vec<RejectRow>,
    },
    /// A part of the corpus that is needed is empty.
    #[error("there are no {what}")]
    Empty {
        /// What is not there.
        what: &'static str,
    },
    /// A checkpoint belongs to another recipe or another program.
    #[error("{path} continues another run: {detail}")]
    OtherRun {
        /// The checkpoint.
        path: PathBuf,
        /// What differs.
        detail: String,
    },
    /// A phase that others build on is neither wanted nor done.
    #[error("the phase `{phase}` is not done, and what follows builds on it")]
    NotDone {
        /// Which phase.
        phase: &'static str,
    },
    /// The loss is no number any more.
    #[error("the loss of the {phase} is {loss} at step {step}")]
    Diverged {
        /// Which phase.
        phase: &'static str,
        /// The step.
        step: u64,
        /// What it is.
        loss: f32,
    },
    /// A file of ours is damaged, or could not be written.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// The device failed at its work.
    #[error("the device cannot go on")]
    Execution(#[from] burn::tensor::backend::ExecutionError),
    /// The device is not there.
    #[error(transparent)]
    Device(#[from] tensor::DeviceError),
    /// The card that refines the transformer is not there, or failed.
    #[error("the CUDA engine cannot refine the transformer")]
    Engine(#[from] engine_cuda::CudaError),
    /// The transformer could not be built.
    #[error(transparent)]
    Transformer(#[from] mmdit::MmditError),
    /// The autoencoder could not be built.
    #[error(transparent)]
    Autoencoder(#[from] autoencoder::AutoencoderError),
    /// A text encoder could not be built.
    #[error(transparent)]
    TextEncoder(#[from] text_encoders::EncoderError),
    /// A tokenizer could not be read.
    #[error(transparent)]
    Tokenizer(#[from] text_encoders::TokenizerError),
    /// A picture could not be written.
    #[error(transparent)]
    Png(#[from] pixel_art::PngTextError),
}

impl StageError for PretrainError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::Source(error) => error.kind(),
            Self::Recipe { .. }
            | Self::Field { .. }
            | Self::Images { .. }
            | Self::Empty { .. }
            | Self::OtherRun { .. }
            | Self::NotDone { .. }
            | Self::Locked { .. }
            | Self::OutLocked { .. }
            | Self::Occupied { .. }
            | Self::Device(_)
            | Self::Tokenizer(_) => FailureKind::BadInput,
            Self::Read(error)
                if matches!(
                    error.kind(),
                    ErrorKind::NotFound | ErrorKind::PermissionDenied
                ) =>
            {
                FailureKind::BadInput
            }
            _ => FailureKind::Failed,
        }
    }

    fn help(&self) -> Option<String> {
        match self {
            Self::Source(error) => error.help(),
            Self::Images { listed, .. } => Some(advice(listed, None)),
            Self::OtherRun { .. } => {
                Some("choose another --work directory, or remove the old checkpoint yourself".to_owned())
            }
            Self::NotDone { phase } => Some(format!("add it: --only {phase},…, or leave --only out")),
            Self::Diverged { .. } => Some(
                "lower optimizer.learning_rate, or take precision = \"f32\", with another --work directory: a changed \
                 recipe is another run"
                    .to_owned(),
            ),
            Self::Locked { .. } => {
                Some("wait for it, or take other phases with --only, or another --work directory".to_owned())
            }
            Self::OutLocked { .. } => Some("wait for it, or give this one an --out of its own".to_owned()),
            Self::Occupied { .. } => Some("choose another --out directory, or remove that base yourself".to_owned()),
            _ => None,
        }
    }
}
