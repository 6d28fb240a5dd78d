//! What makes the whole stage fail, apart from single images (those are rows of `rejects.parquet` until too many).

use std::fmt::{self, Write as _};
use std::path::PathBuf;

use artifacts::{ArtifactError, RejectRow};
use pipeline::{FailureKind, PipelineError, StageError};

use crate::reason;

/// So many single findings are listed before they are only counted.
pub(crate) const LISTED: usize = 20;
/// Captions in messages are cut after so many characters.
const CAPTION_CHARS: usize = 100;

/// Why the stage stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IngestError {
    /// The source cannot be listed.
    #[error(transparent)]
    Source(#[from] PipelineError),
    /// The source is a file of another kind.
    #[error("ingest.source is the file {}; a file must be a Parquet data set", path.display())]
    NotParquet {
        /// The source.
        path: PathBuf,
    },
    /// The folder holds nothing that looks like images.
    #[error(
        "ingest.source {} holds neither images nor .parquet files (it holds {})",
        path.display(),
        found.join(", ")
    )]
    NoImages {
        /// The source.
        path: PathBuf,
        /// Some of the files there.
        found: Vec<String>,
    },
    /// The folder holds both.
    #[error(
        "ingest.source {} holds an image folder ({other}) and Parquet files ({parquet}): which of them is the data?",
        path.display()
    )]
    Mixed {
        /// The source.
        path: PathBuf,
        /// An image or a metadata file there.
        other: String,
        /// A Parquet file there.
        parquet: String,
    },
    /// Two metadata files for one folder.
    #[error("{} has both metadata.jsonl and metadata.csv: which of them holds the captions?", folder.display())]
    TwoMetadataFiles {
        /// The folder.
        folder: PathBuf,
    },
    /// A metadata file cannot be understood.
    #[error("{}{}", path.display(), line.map(|line| format!(", line {line}")).unwrap_or_default())]
    Metadata {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: Option<u64>,
        /// What is wrong.
        source: MetadataProblem,
    },
    /// No line of a metadata file has the caption column.
    #[error(
        "{} has no column {column:?} for captions; its columns are: {}",
        path.display(),
        existing.join(", ")
    )]
    NoCaptionColumn {
        /// The file.
        path: PathBuf,
        /// `ingest.caption_column`.
        column: String,
        /// The columns there are.
        existing: Vec<String>,
    },
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
    /// The Parquet files have no rows.
    #[error("the Parquet files of {} have no rows", path.display())]
    NoRows {
        /// The source.
        path: PathBuf,
    },
    /// Threads cannot be started.
    #[error("cannot start threads")]
    Threads(#[source] rayon::ThreadPoolBuildError),
    /// A Parquet file cannot be read, or a table cannot be written.
    #[error(transparent)]
    File(#[from] ArtifactError),
}

/// What is wrong with a metadata file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MetadataProblem {
    /// The file cannot be read.
    #[error("cannot be read")]
    Read(#[source] std::io::Error),
    /// A line of `metadata.jsonl` is not a JSON object.
    #[error("is not a JSON object")]
    Json(#[source] serde_json::Error),
    /// A record of `metadata.csv` is damaged.
    #[error("is not a CSV record")]
    Csv(#[source] csv::Error),
    /// There is no text in `file_name`.
    #[error("has no text in \"file_name\"; its columns are: {}", existing.join(", "))]
    NoFileName {
        /// The columns there are.
        existing: Vec<String>,
    },
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
    push_rest(&mut text, count as u64, conflicts.len());
    text
}

fn rejects_text(listed: &[RejectRow], count: u64) -> String {
    let mut text = String::new();
    for reject in listed {
        let place = place(&reject.source_file, reject.source_row);
        let _ = write!(text, "\n  - {place}: {} ({})", reject.detail, reject.reason);
    }
    push_rest(&mut text, count, listed.len());
    text
}

fn push_rest(text: &mut String, count: u64, listed: usize) {
    let more = count.saturating_sub(listed as u64);
    if more > 0 {
        let _ = write!(text, "\n  and {more} more");
    }
}

/// A file, or a row of a file, as people read it.
pub(crate) fn place(source_file: &str, source_row: Option<u32>) -> String {
    match source_row {
        Some(row) => format!("{source_file} row {row}"),
        None => source_file.to_owned(),
    }
}

/// One piece of advice per reason, in the order in which they are listed.
fn advice(listed: &[RejectRow]) -> String {
    let mut reasons: Vec<&str> = Vec::new();
    for reject in listed {
        if !reasons.contains(&reject.reason.as_str()) {
            reasons.push(&reject.reason);
        }
    }
    let advice: Vec<String> = reasons
        .iter()
        .map(|reason| format!("{reason}: {}", reason::advice(reason)))
        .collect();
    advice.join("; ")
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
            Self::NotParquet { .. } => {
                "set ingest.source to a .parquet file, or to a folder of images or .parquet files".to_owned()
            }
            Self::NoImages { .. } => {
                "images are .png, .jpg, .jpeg, .webp, .gif and .bmp files, with captions in metadata.jsonl, \
                 metadata.csv or .txt files beside them"
                    .to_owned()
            }
            Self::Mixed { .. } => {
                "put them into folders of their own and set ingest.source to one of them".to_owned()
            }
            Self::TwoMetadataFiles { .. } => "remove one of them".to_owned(),
            Self::Metadata { source: MetadataProblem::NoFileName { .. }, .. } => {
                "each line names its image in \"file_name\", relative to the metadata file".to_owned()
            }
            Self::NoCaptionColumn { .. } | Self::File(ArtifactError::MissingColumn { .. }) => {
                "set ingest.caption_column (and for Parquet ingest.image_column) to the columns that exist".to_owned()
            }
            Self::TwoCaptions { .. } => {
                "keep one caption of each, or make the pictures differ: a picture is known by its pixels".to_owned()
            }
            Self::TooManyRejects { count, listed, .. } => format!(
                "{}. Or set ingest.max_rejects = {count} to go on without them",
                advice(listed)
            ),
            Self::NoSamples { listed, .. } => advice(listed),
            _ => return None,
        })
    }
}
