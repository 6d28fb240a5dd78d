//! What can be wrong with a LoRA file, or with a LoRA that is to be made.

use std::fmt;
use std::path::PathBuf;

use artifacts::ArtifactError;
use thiserror::Error;

/// Unknown keys that an error lists; the rest is counted.
const MAX_LISTED: usize = 8;

/// A key that leads to no module, and the modules whose names are most like it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownKey {
    /// The key as it stands in the file.
    pub key: String,
    /// Up to three module paths, nearest first.
    pub nearest: Vec<String>,
}

/// Why a file is not a LoRA for this model, or why there can be no such LoRA.
#[derive(Debug, Error)]
pub enum LoraError {
    /// The file itself cannot be read or written.
    #[error(transparent)]
    File(#[from] ArtifactError),
    /// Keys that lead to no module of the model.
    #[error("{} keys of {} lead to no module of this model:{}\nThe LoRA was made for another model, or for parts of it that cannot be adapted here.", keys.len(), path.display(), Listing(keys))]
    UnknownKeys {
        /// The file.
        path: PathBuf,
        /// All of them.
        keys: Vec<UnknownKey>,
    },
    /// One factor of a pair is not there.
    #[error("{} has `{found}` but not the `{missing}` that belongs to it; the file is incomplete", path.display())]
    MissingHalf {
        /// The file.
        path: PathBuf,
        /// The key that is there.
        found: String,
        /// The key that is not.
        missing: String,
    },
    /// A factor does not have the shape that the module asks for.
    #[error("`{key}` in {} has shape {found:?}, expected {expected}; the LoRA was made for a model of another width", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        key: String,
        /// Shape expected, in words where a size is free.
        expected: String,
        /// Shape found.
        found: Vec<usize>,
    },
    /// The two factors of a module differ in rank.
    #[error("the factors of `{module}` in {} have ranks {rank_a} (A, down) and {rank_b} (B, up), which must be equal", path.display())]
    Rank {
        /// The file.
        path: PathBuf,
        /// The module as the file names it.
        module: String,
        /// Rows of `A`.
        rank_a: usize,
        /// Columns of `B`.
        rank_b: usize,
    },
    /// A new LoRA's rank is absurd for a layer: more than the wider of its sides.
    #[error("`{module}` cannot have a LoRA of rank {rank}; its widths allow at most {limit}")]
    RankTooLarge {
        /// The module's path.
        module: String,
        /// The rank asked for.
        rank: usize,
        /// The largest that is allowed.
        limit: usize,
    },
    /// The header tells another rank than the tensors have.
    #[error("{} says in `lora_adapter_metadata` that `{module}` has rank {expected}, but its tensors have rank {found}", path.display())]
    MetadataRank {
        /// The file.
        path: PathBuf,
        /// The module.
        module: String,
        /// Rank in the header.
        expected: usize,
        /// Rank of the tensors.
        found: usize,
    },
    /// The header and a tensor tell different alphas.
    #[error("{} gives `{module}` the alpha {metadata} in `lora_adapter_metadata` and {tensor} in a tensor; one of them must go", path.display())]
    AlphaConflict {
        /// The file.
        path: PathBuf,
        /// The module.
        module: String,
        /// Alpha in the header.
        metadata: f32,
        /// Alpha in the tensor.
        tensor: f32,
    },
    /// `lora_adapter_metadata` is not JSON.
    #[error("`lora_adapter_metadata` in {} is not a JSON object", path.display())]
    MetadataSyntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// An entry of `lora_adapter_metadata` has an unexpected value.
    #[error("`{key}` in the `lora_adapter_metadata` of {} is {found}, expected {expected}", path.display())]
    MetadataValue {
        /// The file.
        path: PathBuf,
        /// The entry.
        key: String,
        /// What can be used.
        expected: &'static str,
        /// What is there.
        found: String,
    },
    /// A kind of adapter that cannot be used.
    #[error("{} holds {kind} (`{key}`), which cannot be applied; only plain LoRA on the transformer can", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The kind.
        kind: &'static str,
        /// What shows it.
        key: String,
    },
    /// Two entries of a file lead to the same module.
    #[error("`{first}` and `{second}` in {} both lead to the module `{module}`", path.display())]
    Duplicate {
        /// The file.
        path: PathBuf,
        /// The module.
        module: String,
        /// One entry.
        first: String,
        /// The other.
        second: String,
    },
    /// A number is infinite or not a number.
    #[error("`{key}` in {} holds a value that is not finite; the LoRA is broken", path.display())]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        key: String,
    },
    /// There is nothing in the file.
    #[error("{} holds no LoRA tensors", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

struct Listing<'a>(&'a [UnknownKey]);

impl fmt::Display for Listing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for UnknownKey { key, nearest } in self.0.iter().take(MAX_LISTED) {
            write!(f, "\n  {key}")?;
            if !nearest.is_empty() {
                write!(f, " (nearest: {})", nearest.join(", "))?;
            }
        }
        if self.0.len() > MAX_LISTED {
            write!(f, "\n  and {} more", self.0.len() - MAX_LISTED)?;
        }
        Ok(())
    }
}
