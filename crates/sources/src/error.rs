//! What is wrong with a whole source, apart from single pictures (those have a [`Problem`](crate::Problem) each).

use std::path::PathBuf;

use artifacts::ArtifactError;
use pipeline::{FailureKind, PipelineError, StageError};

use crate::SourceKeys;

/// Why a source cannot be read. Messages call it by its key in the recipe.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// There is no such file or folder.
    #[error("{} is {}, which does not exist", keys.source, path.display())]
    Absent {
        /// The recipe's keys.
        keys: &'static SourceKeys,
        /// The source.
        path: PathBuf,
    },
    /// The folder holds no file.
    #[error("{} is {}, which holds no files", keys.source, path.display())]
    Empty {
        /// The recipe's keys.
        keys: &'static SourceKeys,
        /// The source.
        path: PathBuf,
    },
    /// The source cannot be listed.
    #[error(transparent)]
    List(PipelineError),
    /// The source is a file of another kind.
    #[error("{} is the file {}; a file must be a Parquet data set", keys.source, path.display())]
    NotParquet {
        /// The recipe's keys.
        keys: &'static SourceKeys,
        /// The source.
        path: PathBuf,
    },
    /// The folder holds nothing that looks like images.
    #[error(
        "{} {} holds neither images nor .parquet files (it holds {})",
        keys.source,
        path.display(),
        found.join(", ")
    )]
    NoImages {
        /// The recipe's keys.
        keys: &'static SourceKeys,
        /// The source.
        path: PathBuf,
        /// Some of the files there.
        found: Vec<String>,
    },
    /// The folder holds both.
    #[error(
        "{} {} holds an image folder ({other}) and Parquet files ({parquet}): which of them is the data?",
        keys.source,
        path.display()
    )]
    Mixed {
        /// The recipe's keys.
        keys: &'static SourceKeys,
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
        /// The recipe's keys.
        keys: &'static SourceKeys,
        /// The file.
        path: PathBuf,
        /// The recipe's caption column.
        column: String,
        /// The columns there are.
        existing: Vec<String>,
    },
    /// A Parquet file lacks one of the two columns.
    #[error(
        "{} has no column {column:?} (expected {expected}); its columns are: {}",
        path.display(),
        existing.join(", ")
    )]
    NoTableColumn {
        /// The recipe's keys.
        keys: &'static SourceKeys,
        /// The file.
        path: PathBuf,
        /// The column.
        column: String,
        /// The type it should have.
        expected: String,
        /// The columns there are.
        existing: Vec<String>,
    },
    /// The Parquet files have no rows.
    #[error("the Parquet files of {} have no rows", path.display())]
    NoRows {
        /// The source.
        path: PathBuf,
    },
    /// A Parquet file cannot be read.
    #[error(transparent)]
    File(ArtifactError),
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
    /// Another number of cells than columns.
    #[error("has {found} cells, the file has {expected} columns")]
    Cells {
        /// Columns by the first line.
        expected: usize,
        /// Cells of this line.
        found: usize,
    },
    /// A quoted cell that goes on to the end of the file.
    #[error("has a quote that is never closed")]
    OpenQuote,
    /// A quoted cell with text behind it, most often because an earlier quote was not closed.
    #[error("has a quoted cell that goes on behind its closing quote")]
    BehindQuote,
    /// There is no text in `file_name`.
    #[error("has no text in \"file_name\"; its columns are: {}", existing.join(", "))]
    NoFileName {
        /// The columns there are.
        existing: Vec<String>,
    },
}

impl SourceError {
    /// A source that cannot be listed, by its own key: the lister knows `ingest.source` only.
    pub(crate) fn of_listing(error: PipelineError, keys: &'static SourceKeys) -> Self {
        match error {
            PipelineError::NoSource { path, .. } => Self::Absent { keys, path },
            PipelineError::EmptySource { path, .. } => Self::Empty { keys, path },
            error => Self::List(error),
        }
    }

    /// A table that cannot be opened; a column that is not there is told with the key that names it.
    pub(crate) fn of_table(error: ArtifactError, keys: &'static SourceKeys) -> Self {
        match error {
            ArtifactError::MissingColumn {
                path,
                column,
                expected,
                existing,
            } => Self::NoTableColumn {
                keys,
                path,
                column,
                expected,
                existing,
            },
            error => Self::File(error),
        }
    }
}

impl StageError for SourceError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::List(error) => error.kind(),
            Self::File(ArtifactError::Io { .. }) => FailureKind::Failed,
            _ => FailureKind::BadInput,
        }
    }

    fn help(&self) -> Option<String> {
        Some(match self {
            Self::List(error) => return error.help(),
            Self::Absent { keys, .. } => format!(
                "correct {} in the recipe; a relative path starts at the directory that holds configs/",
                keys.source
            ),
            Self::Empty { .. } => {
                "put images and their captions there: metadata.jsonl, metadata.csv, .txt files beside the images, \
                 or Parquet shards"
                    .to_owned()
            }
            Self::NotParquet { keys, .. } => format!(
                "set {} to a .parquet file, or to a folder of images or .parquet files",
                keys.source
            ),
            Self::NoImages { .. } => {
                "images are .png, .jpg, .jpeg, .webp, .gif and .bmp files, with captions in metadata.jsonl, \
                 metadata.csv or .txt files beside them"
                    .to_owned()
            }
            Self::Mixed { keys, .. } => format!(
                "put them into folders of their own and set {} to one of them",
                keys.source
            ),
            Self::TwoMetadataFiles { .. } => "remove one of them".to_owned(),
            Self::Metadata {
                source: MetadataProblem::NoFileName { .. },
                ..
            } => "each line names its image in \"file_name\", relative to the metadata file".to_owned(),
            Self::Metadata {
                source: MetadataProblem::Cells { .. },
                ..
            } => "put text with commas between quotes: a.png,\"a knight, red hair\"".to_owned(),
            Self::Metadata {
                source: MetadataProblem::OpenQuote | MetadataProblem::BehindQuote,
                ..
            } => "close the quote at the end of its cell; a quote inside a quoted cell is written twice: \"\"".to_owned(),
            Self::NoCaptionColumn { keys, .. } | Self::NoTableColumn { keys, .. } => format!(
                "set {} (and for Parquet {}) to the columns that exist",
                keys.caption_column, keys.image_column
            ),
            _ => return None,
        })
    }
}
