//! A model's weights as diffusers and transformers lay them out: `<stem>.safetensors`, or `<stem>.safetensors.index.json`
//! with shards beside it.
//!
//! The index is compared with the shards in both directions when the checkpoint is opened.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{ArtifactError, KeyMismatch, Result, nearest_names};
use crate::latents::is_plain_file_name;
use crate::safetensors_file::{SafetensorsFile, TensorInfo};

/// An open checkpoint: headers are checked, tensors are read when asked for.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    files: Vec<SafetensorsFile>,
    /// Which of `files` a tensor is in.
    file_of: BTreeMap<String, usize>,
    index: Option<PathBuf>,
}

/// What we read of an index; its `metadata` is nothing but sums.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens the weights called `stem` in `dir`: `diffusion_pytorch_model` for transformers and VAEs, `model` for text
    /// encoders. If there are a single file and an index, the single file is read.
    ///
    /// # Errors
    ///
    /// If there are none, a header does not fit its file, or an index and its shards disagree.
    pub fn open(dir: &Path, stem: &str) -> Result<Self> {
        let single = dir.join(format!("{stem}.safetensors"));
        let index = dir.join(format!("{stem}.safetensors.index.json"));
        if single.is_file() {
            Self::open_file(&single)
        } else if index.is_file() {
            Self::open_sharded(dir, index)
        } else {
            Err(no_weights(dir, stem))
        }
    }

    /// Opens one safetensors file as a checkpoint.
    ///
    /// # Errors
    ///
    /// If the file cannot be read or its header does not fit it.
    pub fn open_file(path: &Path) -> Result<Self> {
        let file = SafetensorsFile::open(path)?;
        Ok(Self {
            dir: path.parent().unwrap_or(Path::new("")).to_path_buf(),
            file_of: file.names().map(|name| (name.to_owned(), 0)).collect(),
            files: vec![file],
            index: None,
        })
    }

    fn open_sharded(dir: &Path, index: PathBuf) -> Result<Self> {
        let text = fs::read(&index).map_err(|e| ArtifactError::io("read", &index, e))?;
        let Index { weight_map } =
            serde_json::from_slice(&text).map_err(|source| ArtifactError::CheckpointIndex {
                path: index.clone(),
                source,
            })?;

        let mut shards: BTreeMap<String, usize> = BTreeMap::new();
        let mut files = Vec::new();
        for (key, shard) in &weight_map {
            if shards.contains_key(shard) {
                continue;
            }
            if !is_plain_file_name(shard) || !shard.ends_with(".safetensors") {
                return Err(ArtifactError::ShardName {
                    path: index,
                    key: key.clone(),
                    shard: shard.clone(),
                });
            }
            shards.insert(shard.clone(), files.len());
            files.push(SafetensorsFile::open(&dir.join(shard))?);
        }

        let missing: Vec<String> = weight_map
            .iter()
            .filter(|(key, shard)| !files[shards[*shard]].contains(key))
            .map(|(key, shard)| format!("{key} ({shard})"))
            .collect();
        let unlisted: Vec<String> = shards
            .iter()
            .flat_map(|(shard, &file)| files[file].names().map(move |key| (shard, key)))
            .filter(|(shard, key)| weight_map.get(*key) != Some(shard))
            .map(|(shard, key)| format!("{key} ({shard})"))
            .collect();
        if !missing.is_empty() || !unlisted.is_empty() {
            return Err(ArtifactError::ShardContents {
                path: index,
                missing,
                unlisted,
            });
        }
        let file_of = weight_map
            .into_iter()
            .map(|(key, shard)| (key, shards[&shard]))
            .collect();
        Ok(Self {
            dir: dir.to_path_buf(),
            files,
            file_of,
            index: Some(index),
        })
    }

    /// The names of its tensors, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.file_of.keys().map(String::as_str)
    }

    /// Whether it has a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.file_of.contains_key(name)
    }

    /// Every file that it is made of: the weights, and the index if there is one.
    pub fn files(&self) -> Vec<PathBuf> {
        let weights = self.files.iter().map(|file| file.path().to_path_buf());
        weights.chain(self.index.clone()).collect()
    }

    /// Dtype and shape of a tensor.
    ///
    /// # Errors
    ///
    /// If there is no such tensor; the error holds the nearest names.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.file(name)?.info(name)
    }

    /// The numbers of a floating-point tensor (F32, F16, BF16 or F64), row by row.
    ///
    /// # Errors
    ///
    /// If there is no such tensor, or it is not floating-point.
    pub fn f32(&self, name: &str) -> Result<Vec<f32>> {
        self.file(name)?.f32(name)
    }

    /// The bytes of a tensor as they lie in the file.
    ///
    /// # Errors
    ///
    /// If there is no such tensor.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        self.file(name)?.bytes(name)
    }

    /// Checks that the checkpoint has exactly these tensors, in these shapes.
    ///
    /// # Errors
    ///
    /// If a tensor is missing, unknown or of another shape; the error lists them with the nearest names.
    pub fn check(&self, expected: &[(String, Vec<usize>)]) -> Result<()> {
        self.check_with_optional(expected, &[])
    }

    /// As [`Self::check`], with tensors that may be there, but then in these shapes: tied weights that some files repeat,
    /// buffers that old ones keep.
    ///
    /// # Errors
    ///
    /// As [`Self::check`].
    pub fn check_with_optional(
        &self,
        expected: &[(String, Vec<usize>)],
        optional: &[(String, Vec<usize>)],
    ) -> Result<()> {
        let mut mismatch = KeyMismatch {
            missing: Vec::new(),
            unknown: Vec::new(),
            misshapen: Vec::new(),
        };
        let mut known: BTreeMap<&str, (&[usize], bool)> = BTreeMap::new();
        for (entries, required) in [(optional, false), (expected, true)] {
            for (name, shape) in entries {
                known.insert(name, (shape, required));
            }
        }
        for (&name, &(shape, required)) in &known {
            if !self.contains(name) {
                if required {
                    mismatch.missing.push((name.to_owned(), shape.to_vec()));
                }
                continue;
            }
            let found = &self.info(name)?.shape;
            if found != shape {
                mismatch
                    .misshapen
                    .push((name.to_owned(), shape.to_vec(), found.clone()));
            }
        }
        for name in self.names().filter(|name| !known.contains_key(name)) {
            mismatch
                .unknown
                .push((name.to_owned(), self.info(name)?.shape.clone()));
        }
        let KeyMismatch {
            missing,
            unknown,
            misshapen,
        } = &mismatch;
        if missing.is_empty() && unknown.is_empty() && misshapen.is_empty() {
            return Ok(());
        }
        Err(ArtifactError::Keys {
            path: self.dir.clone(),
            mismatch: Box::new(mismatch),
        })
    }

    fn file(&self, name: &str) -> Result<&SafetensorsFile> {
        match self.file_of.get(name) {
            Some(&file) => Ok(&self.files[file]),
            None => Err(ArtifactError::MissingTensor {
                path: self.dir.clone(),
                name: name.to_owned(),
                nearest: nearest_names(name, self.names(), 3),
            }),
        }
    }
}

fn no_weights(dir: &Path, stem: &str) -> ArtifactError {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(source) => return ArtifactError::io("open", dir, source),
    };
    let mut found: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| {
            [
                ".safetensors",
                ".safetensors.index.json",
                ".bin",
                ".pt",
                ".ckpt",
                ".gguf",
            ]
            .iter()
            .any(|ending| name.ends_with(ending))
        })
        .collect();
    found.sort();
    found.truncate(8);
    ArtifactError::NoWeights {
        dir: dir.to_path_buf(),
        stem: stem.to_owned(),
        found,
    }
}

#[cfg(test)]
mod tests;
