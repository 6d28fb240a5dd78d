//! What can be wrong with a request for pictures.

use std::path::PathBuf;

use artifacts::ArtifactError;
use autoencoder::AutoencoderError;
use engine::{EngineError, OpenError, RunError};
use lora::LoraError;
use mmdit::ConfigError;
use pipeline::{FailureKind, StageError};
use pixel_art::PngTextError;
use text_encoders::{EncoderError, TokenizerError};

use crate::pictures::NotFinite;
use crate::plan::PlanError;

/// Why the stage stopped.
#[derive(Debug, thiserror::Error)]
pub enum SampleError {
    /// The prompts cannot be had.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A side of the picture is not a whole number of tokens.
    #[error(
        "pictures of {width_px}×{height_px} cannot be drawn: with this base both sides are multiples of {multiple_px} \
         (the nearest size is {nearest_width_px}×{nearest_height_px})"
    )]
    Size {
        /// Asked for.
        width_px: u32,
        /// Asked for.
        height_px: u32,
        /// Pixels per token along one side.
        multiple_px: u32,
        /// The nearest width that can be drawn.
        nearest_width_px: u32,
        /// The nearest height that can be drawn.
        nearest_height_px: u32,
    },
    /// A prompt has more tokens than there are positions.
    #[error("prompt {prompt:?} has {num_tokens} T5 tokens, and the limit is {limit}")]
    LongPrompt {
        /// The prompt.
        prompt: String,
        /// Its tokens, the closing one included.
        num_tokens: usize,
        /// `sample.t5_tokens`.
        limit: usize,
    },
    /// CLIP's tokenizer makes more ids than the model has positions.
    #[error(
        "the CLIP tokenizer in {tokenizer} makes {found} ids of a text, and the model has {expected} positions"
    )]
    ClipLength {
        /// The tokenizer's directory.
        tokenizer: PathBuf,
        /// The model's.
        expected: usize,
        /// The tokenizer's.
        found: usize,
    },
    /// Two parts of the base are of different models.
    #[error(
        "the parts of the base at {base} do not belong together: {what} is {expected} by the transformer and {found} \
         by the {part}"
    )]
    PartsDiffer {
        /// The base.
        base: PathBuf,
        /// The size that differs.
        what: &'static str,
        /// The transformer's.
        expected: usize,
        /// The other part's.
        found: usize,
        /// The other part.
        part: &'static str,
    },
    /// The sheet of all pictures would be too large.
    #[error(
        "a sheet of {count} pictures in sample.sheet_columns = {columns}, with sample.sheet_magnify = {magnify}, would be \
         {width_px}×{height_px} pixels"
    )]
    Sheet {
        /// Pictures on it.
        count: usize,
        /// In a row.
        columns: u32,
        /// `sample.sheet_magnify`.
        magnify: u32,
        /// Its width.
        width_px: u64,
        /// Its height.
        height_px: u64,
    },
    /// A picture came to nothing.
    #[error("the picture of prompt {prompt:?} with seed {seed} {what}: {source}")]
    NotFinite {
        /// Its prompt.
        prompt: String,
        /// Its seed.
        seed: u64,
        /// With LoRAs or without.
        what: &'static str,
        /// What is not finite.
        source: NotFinite,
    },
    /// The scheduler's configuration cannot be used.
    #[error(transparent)]
    Schedule(#[from] flow_matching::SchedulerError),
    /// A LoRA cannot be used.
    #[error(transparent)]
    Lora(#[from] LoraError),
    /// There is no such engine, or not for this device and precision.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A text encoder cannot be used.
    #[error(transparent)]
    Encoder(#[from] EncoderError),
    /// The transformer's configuration cannot be used.
    #[error(transparent)]
    TransformerConfig(#[from] ConfigError),
    /// The transformer cannot be used.
    #[error(transparent)]
    Transformer(#[from] OpenError),
    /// The engine failed in the middle of its work.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The VAE cannot be used.
    #[error(transparent)]
    Vae(#[from] AutoencoderError),
    /// A picture cannot be written as PNG.
    #[error("{path} cannot be made")]
    Png {
        /// The file.
        path: PathBuf,
        /// Why.
        source: PngTextError,
    },
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] ArtifactError),
}

impl StageError for SampleError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::Png { .. }
            | Self::NotFinite { .. }
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
            Self::Size {
                nearest_width_px,
                nearest_height_px,
                ..
            } => format!(
                "set sample.width_px = {nearest_width_px} and sample.height_px = {nearest_height_px}"
            ),
            Self::LongPrompt { num_tokens, .. } => format!(
                "shorten it, raise sample.t5_tokens to at least {num_tokens}, or cut long prompts with \
                 sample.long_prompts = \"truncate\""
            ),
            Self::Sheet { .. } => "lower sample.sheet_magnify, or raise sample.sheet_columns".to_owned(),
            Self::NotFinite { .. } => "try another precision (sample.precision = \"bf16\", or \"f32\"); if it is of a LoRA, a \
                 lower strength (sample.lora_scale, or the scale in sample.loras)"
                .to_owned(),
            Self::Engine(error) => error.help("sample"),
            Self::Transformer(error) => return error.help(),
            Self::Run(error) => return error.help(),
            Self::PartsDiffer { .. } => {
                "use a base whose folders all come from one model".to_owned()
            }
            Self::Tokenizer(TokenizerError::Vocabulary { .. }) => {
                "use a base whose tokenizer and text encoder come from one model".to_owned()
            }
            Self::Lora(LoraError::UnknownKeys { .. } | LoraError::Shape { .. }) => {
                "use a LoRA that was trained for this base, or take it out of sample.loras"
                    .to_owned()
            }
            _ => return None,
        })
    }
}
