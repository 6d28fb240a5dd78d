//! What makes the whole stage fail, apart from single images (those are rows of `rejects.parquet` until too many).

use std::fmt::{self, Write as _};
use std::path::PathBuf;

use artifacts::{ArtifactError, RejectRow};
use pipeline::{FailureKind, StageError};
use sources::{SourceError, advice, rejects_text};

/// The recipe's key of the largest picture.
const LIMIT_KEY: &str = "ingest.max_pixels";
/// Captions in messages are cut after so many characters.
const CAPTION_CHARS: usize = 100;

/// Why the stage stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IngestError {
    /// The source cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The same picture has two captions.
    #[error("{}", conflicts_text(conflicts, *count))]
    TwoCaptions {
        /// The first of them, at most 20.
        conflicts: Vec<Conflict>,
        /// How many there are.
        count: usize,
    },
    /// More images than allowed cannot be used.
    #[error(
        "{count} {} cannot be used, and ingest.max_rejects is {max_rejects}:{}",
        if *count == 1 { "image" } else { "images" },
        rejects_text(listed, *count)
    )]
    TooManyRejects {
        /// How many.
        count: u64,
        /// The limit.
        max_rejects: u64,
        /// The first of them, at most 20.
        listed: Vec<RejectRow>,
    },
    /// Nothing is left.
    #[error("no image of {} can be used:{}", path.display(), rejects_text(listed, *count))]
    NoSamples {
        /// The source.
        path: PathBuf,
        /// How many images there were.
        count: u64,
        /// The first of them, at most 20.
        listed: Vec<RejectRow>,
    },
    /// Threads cannot be started.
    #[error("cannot start threads")]
    Threads(#[source] rayon::ThreadPoolBuildError),
    /// A table cannot be written.
    #[error(transparent)]
    File(#[from] ArtifactError),
}

/// One picture with two captions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// The picture.
    pub sample_id: String,
    /// Where it is first.
    pub first: String,
    /// Its caption there.
    pub first_caption: String,
    /// Where it is again.
    pub second: String,
    /// Its other caption.
    pub second_caption: String,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {:?}\n    {}: {:?}",
            self.first,
            cut(&self.first_caption),
            self.second,
            cut(&self.second_caption)
        )
    }
}

fn cut(caption: &str) -> String {
    match caption.char_indices().nth(CAPTION_CHARS) {
        Some((end, _)) => format!("{}…", &caption[..end]),
        None => caption.to_owned(),
    }
}

fn conflicts_text(conflicts: &[Conflict], count: usize) -> String {
    let mut text = match count {
        1 => "the same picture has two captions:".to_owned(),
        count => format!("{count} pictures have two captions each:"),
    };
    for conflict in conflicts {
        let _ = write!(text, "\n  - {conflict}");
    }
    let more = count.saturating_sub(conflicts.len());
    if more > 0 {
        let _ = write!(text, "\n  and {more} more");
    }
    text
}

impl StageError for IngestError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::Source(error) => error.kind(),
            Self::Threads(_) | Self::File(ArtifactError::Io { .. }) => FailureKind::Failed,
            _ => FailureKind::BadInput,
        }
    }

    fn help(&self) -> Option<String> {
        Some(match self {
            Self::Source(error) => return error.help(),
            Self::TwoCaptions { .. } => {
                "keep one caption of each, or make the pictures differ: a picture is known by its pixels".to_owned()
            }
            Self::TooManyRejects { count, listed, .. } => format!(
                "{}. Or set ingest.max_rejects = {count} to go on without them",
                advice(listed, Some(LIMIT_KEY))
            ),
            Self::NoSamples { listed, .. } => advice(listed, Some(LIMIT_KEY)),
            _ => return None,
        })
    }
}
