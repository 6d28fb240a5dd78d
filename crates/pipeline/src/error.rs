//! What can go wrong between a recipe and a sealed artifact, apart from a stage's own work.

use std::io;
use std::path::{Path, PathBuf};

use crate::failure::{FailureKind, StageError};
use crate::recipe::RecipeError;
use crate::stage::Stage;
use crate::task::Task;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// The recipe cannot be used.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// A file operation failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, e.g. `read`.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file whose content decides a result is not readable, or no longer there.
    #[error("cannot read {}", path.display())]
    NotReadable {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The runs directory (or something below it) refuses to be written.
    #[error("cannot write to {}", path.display())]
    NotWritable {
        /// The directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A source of pictures does not exist.
    #[error("{key} is {}, which does not exist", path.display())]
    NoSource {
        /// The recipe's key: `ingest.source` or `evaluate.held_out`.
        key: &'static str,
        /// The resolved path.
        path: PathBuf,
    },
    /// A source of pictures is a folder without a file.
    #[error("{key} is {}, which holds no files", path.display())]
    EmptySource {
        /// The recipe's key.
        key: &'static str,
        /// The resolved path.
        path: PathBuf,
    },
    /// A file's name is not UTF-8, so it cannot stand in a table.
    #[error("the name of {} is not UTF-8", path.display())]
    NameNotUtf8 {
        /// The file.
        path: PathBuf,
    },
    /// Files or folders link in a circle, or cannot be listed.
    #[error("cannot list {}", path.display())]
    CannotList {
        /// Where listing failed.
        path: PathBuf,
        /// The system's reason.
        source: walkdir::Error,
    },
    /// A part of the base that the stage reads is not there.
    #[error("the base has no {folder}: {} holds no weights, configuration or vocabulary", path.display())]
    NoBasePart {
        /// The folder's name, e.g. `text_encoder_2`.
        folder: &'static str,
        /// Its path.
        path: PathBuf,
    },
    /// A file that the recipe names does not exist.
    #[error("{key} is {}, which does not exist or is not a file", path.display())]
    NoFile {
        /// The recipe's key.
        key: String,
        /// The resolved path.
        path: PathBuf,
    },
    /// A size in the recipe does not fit the base's autoencoder.
    #[error("{key} is {found}, which is no multiple of {multiple}, the pixels per token of this base ({})", config.display())]
    SizeNotMultiple {
        /// The recipe's key.
        key: &'static str,
        /// The size.
        found: u32,
        /// What it must be a multiple of.
        multiple: u32,
        /// The file that says so.
        config: PathBuf,
    },
    /// An earlier stage has to run first.
    #[error("{stage} cannot run: {upstream} is not fresh ({reason})")]
    Blocked {
        /// The task that was asked for.
        stage: Task,
        /// The task that has to run.
        upstream: Task,
        /// Why it has to.
        reason: String,
    },
    /// Another process runs the same stage.
    #[error("another process is running {stage} (it holds {})", path.display())]
    Locked {
        /// The stage.
        stage: Stage,
        /// The lock file.
        path: PathBuf,
    },
    /// The data changed while `ingest` read it.
    #[error("the data changed while ingest read it ({change})")]
    ChangedMeanwhile {
        /// The first change found.
        change: String,
    },
    /// A stage did not report a digest that others need.
    #[error("{stage} ended without the output digest {output:?}; it was not sealed")]
    MissingOutput {
        /// The stage.
        stage: Stage,
        /// The digest's name.
        output: &'static str,
    },
    /// A sealed artifact lacks a digest that this version needs.
    #[error("the {stage} artifact {} has no digest {output:?}", dir.display())]
    MissingDigest {
        /// The stage.
        stage: Stage,
        /// The digest's name.
        output: &'static str,
        /// The artifact.
        dir: PathBuf,
    },
}

impl PipelineError {
    /// An error about the source of pictures, said of the recipe's key for held-out ones.
    pub(crate) fn of_held_out(mut self) -> Self {
        if let Self::NoSource { key, .. } | Self::EmptySource { key, .. } = &mut self {
            *key = "evaluate.held_out";
        }
        self
    }

    /// Wraps a failed read-like operation.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    /// Wraps a failed reading of a file that the person gave; one that is gone or refuses is told apart.
    pub(crate) fn read(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound => {
                Self::NotReadable { path, source }
            }
            _ => Self::Io {
                action: "read",
                path,
                source,
            },
        }
    }

    /// Wraps a failed write-like operation; a directory that refuses writing is told apart.
    pub(crate) fn write(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::PermissionDenied
            | io::ErrorKind::ReadOnlyFilesystem
            | io::ErrorKind::NotADirectory
            | io::ErrorKind::AlreadyExists => Self::NotWritable { path, source },
            _ => Self::Io {
                action,
                path,
                source,
            },
        }
    }
}

impl StageError for PipelineError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::Recipe(error) => error.kind(),
            Self::Io { .. } | Self::MissingOutput { .. } | Self::MissingDigest { .. } => {
                FailureKind::Failed
            }
            _ => FailureKind::BadInput,
        }
    }

    fn help(&self) -> Option<String> {
        let help = match self {
            Self::Recipe(error) => return error.help(),
            Self::Io { .. } => return None,
            Self::NotReadable { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                "it was listed and is gone, or is a link to nothing: put it back or take the link away, and run it again"
                    .to_owned()
            }
            Self::NotReadable { .. } => {
                "give yourself the right to read it, or take it away".to_owned()
            }
            Self::NotWritable { .. } => {
                "choose a directory that you may write to with --runs DIR".to_owned()
            }
            Self::NoSource { key, .. } => format!(
                "set {key} in the recipe, or --set {key}=PATH; a relative path starts at the directory that holds \
                 configs/"
            ),
            Self::EmptySource { .. } => {
                "put images and their captions there: metadata.jsonl, metadata.csv, .txt files beside the images, \
                 or Parquet shards"
                    .to_owned()
            }
            Self::NameNotUtf8 { .. } => "rename the file".to_owned(),
            Self::CannotList { .. } => "check permissions and links there".to_owned(),
            Self::NoBasePart { .. } => {
                "base.path must be a diffusers directory: model_index.json, transformer/, vae/, text_encoder/, \
                 text_encoder_2/, tokenizer/, tokenizer_2/, scheduler/"
                    .to_owned()
            }
            Self::NoFile { key, .. } => format!("correct {key} in the recipe or on the command line"),
            Self::SizeNotMultiple {
                found, multiple, ..
            } => {
                let below = found / multiple * multiple;
                match below.checked_add(*multiple) {
                    _ if below == 0 => format!("use {multiple}"),
                    Some(above) => format!("use {below} or {above}"),
                    None => format!("use {below}"),
                }
            }
            Self::Blocked { upstream, .. } => {
                let command = upstream.command();
                format!("run `cargo xtask {command}` first, or everything with `cargo xtask run`")
            }
            Self::Locked { .. } => "wait for it, or use another --runs directory".to_owned(),
            Self::ChangedMeanwhile { .. } => "run it again".to_owned(),
            Self::MissingOutput { .. } => "this is a bug of the stage".to_owned(),
            Self::MissingDigest { stage, .. } => format!("run `cargo xtask {stage} --force`"),
        };
        Some(help)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_sizes_of_the_largest_number_are_told_without_overflow() {
        let help = |found| {
            PipelineError::SizeNotMultiple {
                key: "sample.width_px",
                found,
                multiple: 16,
                config: PathBuf::new(),
            }
            .help()
            .expect("advice")
        };
        assert_eq!(help(u32::MAX), "use 4294967280");
        assert_eq!(help(33), "use 32 or 48");
        assert_eq!(help(15), "use 16");
    }

    #[test]
    fn a_file_that_may_not_be_read_is_for_the_person_and_a_broken_disk_is_not() {
        let error = |kind: io::ErrorKind| PipelineError::read(Path::new("/d/a.png"))(kind.into());
        for kind in [io::ErrorKind::PermissionDenied, io::ErrorKind::NotFound] {
            let error = error(kind);
            assert_eq!(error.kind(), FailureKind::BadInput);
            assert_eq!(error.to_string(), "cannot read /d/a.png");
            assert!(error.help().is_some());
        }
        let broken = error(io::ErrorKind::Other);
        assert_eq!(broken.kind(), FailureKind::Failed);
    }
}
