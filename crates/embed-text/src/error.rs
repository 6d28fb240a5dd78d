//! What can keep captions from being embedded.

use std::path::PathBuf;

use artifacts::ArtifactError;
use pipeline::{FailureKind, PipelineError, StageError};
use tensor::DeviceError;
use text_encoders::{EncoderError, TokenizerError};

/// Why the stage stopped.
#[derive(Debug, thiserror::Error)]
pub enum EmbedTextError {
    /// A caption has more tokens than there are positions.
    #[error("caption {:?} of {source_file} has {num_tokens} T5 tokens, and the limit is {limit}{}", excerpt(caption), others(*num_others))]
    LongCaption {
        /// The longest caption.
        caption: String,
        /// An image that it belongs to.
        source_file: String,
        /// Its tokens, the closing one included.
        num_tokens: usize,
        /// `embed_text.t5_tokens`.
        limit: usize,
        /// How many other captions are too long as well.
        num_others: usize,
    },
    /// CLIP's tokenizer makes more ids than the model has positions.
    #[error("the CLIP tokenizer in {} makes {found} ids of a text, and the model has {expected} positions", tokenizer.display())]
    ClipLength {
        /// The tokenizer's directory.
        tokenizer: PathBuf,
        /// The model's.
        expected: usize,
        /// The tokenizer's.
        found: usize,
    },
    /// An embedding holds infinities or not-a-numbers.
    #[error(
        "the {part} embedding of caption {:?} is not finite in half precision",
        excerpt(caption)
    )]
    NotFinite {
        /// `t5` or `pooled`.
        part: &'static str,
        /// The caption.
        caption: String,
    },
    /// Public embeddings of another size than recipe or base say.
    #[error("the public embeddings {} have {found} {what}, and {expected_by} says {expected}", path.display())]
    PublicSize {
        /// The file.
        path: PathBuf,
        /// What is counted.
        what: &'static str,
        /// The file's.
        found: usize,
        /// `embed_text.t5_tokens`, or a part of the base.
        expected_by: &'static str,
        /// What it says.
        expected: usize,
    },
    /// Images that the public embeddings do not have.
    #[error(
        "the public embeddings {} have no row for {missing} of {images} images; the first is {source_file} \
         (hash {compat_sha256}, turned by EXIF {compat_sha256_oriented})",
        path.display()
    )]
    PublicMissing {
        /// The file or folder.
        path: PathBuf,
        /// How many images have no row.
        missing: usize,
        /// How many images there are.
        images: usize,
        /// The first of them.
        source_file: String,
        /// Its hash before turning.
        compat_sha256: String,
        /// Its hash after turning.
        compat_sha256_oriented: String,
    },
    /// Two images share a caption and have different public embeddings.
    #[error(
        "{first} and {second} have the same caption ({:?}) but different public embeddings: \
         at least one was made from another caption",
        excerpt(caption)
    )]
    PublicConflict {
        /// The caption.
        caption: String,
        /// One image.
        first: String,
        /// The other image.
        second: String,
    },
    /// Images with different captions share a row of public embeddings: their recipe hash is one, as that of palette swaps is.
    #[error(
        "{first} ({:?}) and {second} ({:?}) have one hash, {hash}, and so one row of the public \
         embeddings: at most one of the captions can be its",
        excerpt(first_caption),
        excerpt(second_caption)
    )]
    PublicShared {
        /// One image.
        first: String,
        /// Its caption.
        first_caption: String,
        /// The other image.
        second: String,
        /// Its caption.
        second_caption: String,
        /// The hash.
        hash: String,
    },
    /// Two files with different embeddings of one image.
    #[error(
        "{} and {} have different embeddings of the image with hash {hash} ({source_file})",
        first.display(),
        second.display()
    )]
    PublicTwice {
        /// A file.
        first: PathBuf,
        /// Another one.
        second: PathBuf,
        /// The hash.
        hash: String,
        /// The image.
        source_file: String,
    },
    /// A caption of an image that is not there.
    #[error("{} has a caption for image {sample_id}, which samples.parquet beside it does not have", path.display())]
    Orphan {
        /// The captions.
        path: PathBuf,
        /// The image.
        sample_id: String,
    },
    /// A folder without Parquet files.
    #[error("{} holds no .parquet files", path.display())]
    NoPublicFiles {
        /// The folder.
        path: PathBuf,
    },
    /// Files cannot be listed.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// The device cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// An encoder cannot be used.
    #[error(transparent)]
    Encoder(#[from] EncoderError),
    /// A table cannot be read or written.
    #[error(transparent)]
    File(#[from] ArtifactError),
}

/// The most characters of a caption that a message shows.
const MAX_SHOWN: usize = 120;

/// A caption's beginning.
fn excerpt(caption: &str) -> String {
    match caption.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{}…", &caption[..end]),
        None => caption.to_owned(),
    }
}

fn others(count: usize) -> String {
    match count {
        0 => String::new(),
        1 => " (one more caption is too long)".to_owned(),
        count => format!(" ({count} more captions are too long)"),
    }
}

impl StageError for EmbedTextError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::Pipeline(error) => error.kind(),
            Self::File(ArtifactError::Io { .. }) => FailureKind::Failed,
            _ => FailureKind::BadInput,
        }
    }

    fn help(&self) -> Option<String> {
        Some(match self {
            Self::LongCaption { num_tokens, .. } => format!(
                "shorten it, raise embed_text.t5_tokens to at least {num_tokens}, or cut long captions with \
                 embed_text.long_captions = \"truncate\""
            ),
            Self::ClipLength { .. } | Self::Tokenizer(TokenizerError::Vocabulary { .. }) => {
                "use a base whose tokenizer and text encoder come from one model".to_owned()
            }
            Self::Orphan { .. } => "run ingest again with --force".to_owned(),
            Self::NotFinite { .. } => {
                "set embed_text.precision to \"bf16\" or \"f32\": fp16 overflows in some encoders".to_owned()
            }
            Self::PublicSize { what: "T5 tokens", found, .. } => {
                format!("set embed_text.t5_tokens = {found}, or make the embeddings again with the recipe's length")
            }
            Self::PublicSize { .. } => {
                "use embeddings that were made with this base's text encoders".to_owned()
            }
            Self::PublicMissing { .. } => {
                "make the embeddings from exactly these images, or set embed_text.public_embeddings = \"\" to encode \
                 the captions here"
                    .to_owned()
            }
            Self::PublicShared { .. } => {
                "set embed_text.public_embeddings = \"\" to encode the captions here: the public recipe cannot tell these \
                 images apart"
                    .to_owned()
            }
            Self::PublicTwice { .. } => {
                "take one of the files out: only one of them can have been made from these captions".to_owned()
            }
            Self::PublicConflict { .. } => {
                "make the embeddings again, or set embed_text.public_embeddings = \"\"".to_owned()
            }
            Self::Pipeline(error) => return error.help(),
            _ => return None,
        })
    }
}
