//! What can be wrong with a file, said with its path, the key in it, what was expected and what was found.

use std::io;
use std::path::{Path, PathBuf};

use polars::error::PolarsError;

use crate::digest::Digest;
use crate::safetensors_file::Dtype;

mod problems;

pub use problems::{HeaderProblem, KeyMismatch, ParquetProblem, WriteProblem};

/// The result of reading or writing an artifact.
pub type Result<T, E = ArtifactError> = std::result::Result<T, E>;

/// How many keys of a kind an error lists before it only counts them.
const LISTED_KEYS: usize = 8;

/// A file that cannot be read, written or believed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArtifactError {
    /// The operating system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, as a verb: `open`, `write`.
        action: &'static str,
        /// The file or directory it was tried on.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A JSON file that does not hold what it should.
    #[error("{} cannot be read", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        source: serde_json::Error,
    },
    /// The directory takes no new files.
    #[error(
        "cannot write {}: its directory is read-only or belongs to someone else; \
         make it writable or choose another directory for the runs",
        path.display()
    )]
    NotWritable {
        /// The file that was to be written.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A safetensors file whose header does not fit the file.
    #[error("{} is not a sound safetensors file", path.display())]
    SafetensorsHeader {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: HeaderProblem,
    },
    /// Tensors that do not make a safetensors file.
    #[error("cannot write tensor {name:?} to {}: {problem}", path.display())]
    UnwritableTensor {
        /// The file that was to be written.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What is wrong with it.
        problem: WriteProblem,
    },
    /// A tensor that a file does not have.
    #[error("{} has no tensor {name:?}{}", path.display(), nearest_hint(nearest))]
    MissingTensor {
        /// The file or checkpoint directory.
        path: PathBuf,
        /// The tensor asked for.
        name: String,
        /// The most similar names there are, best first.
        nearest: Vec<String>,
    },
    /// A tensor whose numbers have another type than the reader can use.
    #[error("tensor {name:?} of {} has dtype {found}; expected {expected}", path.display())]
    WrongDtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The dtypes that would do.
        expected: &'static str,
        /// The dtype in the header.
        found: Dtype,
    },
    /// A tensor element that does not fit the type asked for.
    #[error("tensor {name:?} of {}, element {index}: {found} does not fit {expected}", path.display())]
    ElementRange {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Position in the flattened tensor.
        index: usize,
        /// The type asked for.
        expected: &'static str,
        /// The value.
        found: i64,
    },
    /// A directory without the weights it should hold.
    #[error(
        "{} holds neither {stem}.safetensors nor {stem}.safetensors.index.json{}",
        dir.display(),
        found_hint(found)
    )]
    NoWeights {
        /// The directory.
        dir: PathBuf,
        /// The weight file's name without its ending.
        stem: String,
        /// Files there that look like weights.
        found: Vec<String>,
    },
    /// A sharded checkpoint's index that is not the JSON it should be.
    #[error("{} is not a sound checkpoint index", path.display())]
    CheckpointIndex {
        /// The index file.
        path: PathBuf,
        /// The parser's reason.
        source: serde_json::Error,
    },
    /// A shard name that points out of the checkpoint's directory.
    #[error(
        "{} maps {key:?} to {shard:?}; a shard must be a plain .safetensors file name in the same directory",
        path.display()
    )]
    ShardName {
        /// The index file.
        path: PathBuf,
        /// The tensor.
        key: String,
        /// The name found.
        shard: String,
    },
    /// An index and its shards that disagree.
    #[error(
        "{} and its shards disagree:{}{}",
        path.display(),
        listing("in the index, not in the shard", missing),
        listing("in a shard, not in the index", unlisted)
    )]
    ShardContents {
        /// The index file.
        path: PathBuf,
        /// `key (shard)` of tensors that the index promises and the shard lacks.
        missing: Vec<String>,
        /// `key (shard)` of tensors that the index does not place in that shard.
        unlisted: Vec<String>,
    },
    /// A checkpoint that does not fit the model.
    #[error("the weights in {} do not fit the model:{mismatch}", path.display())]
    Keys {
        /// The checkpoint's directory or file.
        path: PathBuf,
        /// Which keys, and how.
        mismatch: Box<KeyMismatch>,
    },
    /// A Parquet file that the reader or writer gave up on.
    #[error("cannot {action} {}", path.display())]
    Parquet {
        /// What was tried: `read the footer of`, `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The Parquet library's reason.
        source: PolarsError,
    },
    /// A Parquet file whose inner sizes contradict the file or each other.
    #[error("{} is damaged: {problem}", path.display())]
    DamagedParquet {
        /// The file.
        path: PathBuf,
        /// Where, and how.
        problem: ParquetProblem,
    },
    /// A table without a column that it must have.
    #[error(
        "{} has no column {column:?} (expected {expected}); its columns are: {}",
        path.display(),
        existing.join(", ")
    )]
    MissingColumn {
        /// The file.
        path: PathBuf,
        /// The column.
        column: String,
        /// The type it should have.
        expected: String,
        /// The columns that exist.
        existing: Vec<String>,
    },
    /// A column of another type than its reader can use.
    #[error("column {column:?} of {} has type {found}; expected {expected}", path.display())]
    ColumnType {
        /// The file.
        path: PathBuf,
        /// The column.
        column: String,
        /// The type it should have.
        expected: String,
        /// The type it has.
        found: String,
    },
    /// A cell whose value is not one that the column may hold.
    #[error(
        "column {column:?} of {}, row {row}: found {found}; expected {expected}",
        path.display()
    )]
    Cell {
        /// The file.
        path: PathBuf,
        /// The column.
        column: String,
        /// Row, counted from 0 over the whole file.
        row: usize,
        /// What the column may hold.
        expected: String,
        /// What it holds.
        found: String,
    },
    /// A row number past the end.
    #[error("{} has {rows} rows; row {row} was asked for", path.display())]
    RowOutOfRange {
        /// The file.
        path: PathBuf,
        /// The row asked for.
        row: usize,
        /// How many there are.
        rows: usize,
    },
    /// A footer entry that is missing or not what it should be.
    #[error(
        "footer entry {key:?} of {} is {}; expected {expected}",
        path.display(),
        found.as_deref().unwrap_or("missing")
    )]
    Footer {
        /// The file.
        path: PathBuf,
        /// The entry.
        key: String,
        /// What it should say.
        expected: String,
        /// What it says, if it is there.
        found: Option<String>,
    },
    /// Latents that another VAE made.
    #[error(
        "the latents in {} were made by VAE {found}; this run uses VAE {expected}: run cache-latents again",
        dir.display()
    )]
    OtherVae {
        /// The latent cache.
        dir: PathBuf,
        /// The VAE in use.
        expected: Digest,
        /// The VAE in the cache's index.
        found: Digest,
    },
    /// A latent whose numbers do not fill its shape.
    #[error(
        "latent {sample_id}.{view}: {part} has {found} numbers; shape {shape:?} needs {expected}"
    )]
    LatentSize {
        /// The sample.
        sample_id: String,
        /// The view.
        view: u32,
        /// `mean` or `logvar`.
        part: &'static str,
        /// Channels, height, width.
        shape: [usize; 3],
        /// Numbers that the shape needs.
        expected: usize,
        /// Numbers given.
        found: usize,
    },
    /// The same latent twice.
    #[error("latent {sample_id}.{view} appears twice in {}", dir.display())]
    DuplicateLatent {
        /// The latent cache.
        dir: PathBuf,
        /// The sample.
        sample_id: String,
        /// The view.
        view: u32,
    },
    /// A latent that the cache does not have.
    #[error(
        "{} has no latent of sample {sample_id}, view {view}: run cache-latents again",
        dir.display()
    )]
    MissingLatent {
        /// The latent cache.
        dir: PathBuf,
        /// The sample.
        sample_id: String,
        /// The view.
        view: u32,
    },
    /// The name of a source image that points out of its source.
    #[error(
        "{name:?} is no path below {}; it must be relative, without \"..\"",
        root.display()
    )]
    SourceName {
        /// The data source.
        root: PathBuf,
        /// The name found.
        name: String,
    },
    /// A source image with more bytes than its pixels could need.
    #[error("{} has more than {max_bytes} bytes, the most that an image of the allowed size can need", path.display())]
    SourceSize {
        /// The file.
        path: PathBuf,
        /// The limit.
        max_bytes: u64,
    },
    /// Latent shards and index that disagree.
    #[error("{} and its index disagree:{}", shard.display(), listing("tensors that no row names", unlisted))]
    LatentShard {
        /// The shard.
        shard: PathBuf,
        /// Tensors in the shard that the index does not know.
        unlisted: Vec<String>,
    },
    /// A latent whose tensor has another shape than its row says.
    #[error(
        "tensor {name:?} of {} is {found_dtype} {found:?}; the index says F32 {expected:?}",
        shard.display()
    )]
    LatentShape {
        /// The shard.
        shard: PathBuf,
        /// The tensor.
        name: String,
        /// Shape by the index.
        expected: Vec<usize>,
        /// Dtype by the shard.
        found_dtype: Dtype,
        /// Shape by the shard.
        found: Vec<usize>,
    },
    /// An embedding whose numbers do not fill the table's widths.
    #[error(
        "embedding of caption {caption_hash}: {part} has {found} numbers; the table holds {expected}"
    )]
    EmbeddingSize {
        /// The caption's hash.
        caption_hash: String,
        /// `t5` or `pooled`.
        part: &'static str,
        /// Numbers that the table's header needs.
        expected: usize,
        /// Numbers given.
        found: usize,
    },
    /// A table that would hold no numbers, or more than can be counted.
    #[error("cannot write {}: an embedding of {tokens} tokens of width {width} is impossible", path.display())]
    EmbeddingShape {
        /// The file that was to be written.
        path: PathBuf,
        /// Tokens.
        tokens: usize,
        /// Width of one.
        width: usize,
    },
}

impl ArtifactError {
    /// Wraps an I/O error, telling a directory that cannot be written apart from the rest.
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            action,
            path: path.to_path_buf(),
            source,
        }
    }

    /// As [`Self::io`] for writing.
    pub(crate) fn write(path: &Path, source: io::Error) -> Self {
        let path = path.to_path_buf();
        match source.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                Self::NotWritable { path, source }
            }
            _ => Self::Io {
                action: "write",
                path,
                source,
            },
        }
    }
}

/// The names most like `name`, best first: at most `count`, and only those that share at least 60 % of it.
pub(crate) fn nearest_names<'a>(
    name: &str,
    candidates: impl Iterator<Item = &'a str>,
    count: usize,
) -> Vec<String> {
    let mut scored: Vec<(f64, &str)> = candidates
        .map(|candidate| (strsim::normalized_levenshtein(name, candidate), candidate))
        .filter(|(score, _)| *score >= 0.6)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    scored.truncate(count);
    scored
        .into_iter()
        .map(|(_, candidate)| candidate.to_owned())
        .collect()
}

fn nearest_hint(nearest: &[String]) -> String {
    match nearest {
        [] => String::new(),
        names => format!(" (nearest: {})", names.join(", ")),
    }
}

fn found_hint(found: &[String]) -> String {
    match found {
        [] => " (and nothing else that looks like weights)".to_owned(),
        names => format!(
            " (it does hold {}; only safetensors of that name are read)",
            names.join(", ")
        ),
    }
}

fn listing(title: &str, keys: &[String]) -> String {
    if keys.is_empty() {
        return String::new();
    }
    let mut text = format!("\n  {} {title}: ", keys.len());
    text.push_str(&keys[..keys.len().min(LISTED_KEYS)].join(", "));
    if keys.len() > LISTED_KEYS {
        text.push_str(", …");
    }
    text
}
