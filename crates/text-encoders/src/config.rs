//! What both encoders share: reading `config.json` and saying what is wrong with it.

use std::path::{Path, PathBuf};

use tensor::WeightsError;

/// Why an encoder cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum EncoderError {
    /// The configuration could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The configuration does not parse, or lacks a size.
    #[error("{path} is not the configuration of such an encoder")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: serde_json::Error,
    },
    /// The configuration asks for something that this encoder does not do.
    #[error("{path}: `{key}` is {found}, expected {expected}")]
    Setting {
        /// The file.
        path: PathBuf,
        /// The field.
        key: &'static str,
        /// What would do.
        expected: String,
        /// What the file says.
        found: String,
    },
    /// The weights are absent, damaged, or another model's.
    #[error(transparent)]
    Weights(#[from] WeightsError),
}

pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, EncoderError> {
    let bytes = fs_err::read(path).map_err(|source| EncoderError::Read {
        path: path.to_path_buf(),
        source,
    })?;
    serde_json::from_slice(&bytes).map_err(|source| EncoderError::Json {
        path: path.to_path_buf(),
        source,
    })
}

/// A size from a file: positive, and small enough that products of two of them are numbers.
pub(crate) fn size(path: &Path, key: &'static str, found: usize) -> Result<usize, EncoderError> {
    if (1..=1 << 24).contains(&found) {
        Ok(found)
    } else {
        Err(EncoderError::Setting {
            path: path.to_path_buf(),
            key,
            expected: "a size between 1 and 16777216".to_owned(),
            found: found.to_string(),
        })
    }
}

/// Checks that all rows are equally long and lie in the vocabulary; `(rows, columns)`.
///
/// # Panics
///
/// If they do not.
pub(crate) fn check_ids(ids: &[Vec<u32>], vocab_size: usize) -> (usize, usize) {
    let columns = ids.first().map_or(0, Vec::len);
    assert!(
        columns > 0,
        "an encoder was given {} rows of no ids",
        ids.len()
    );
    for row in ids {
        assert_eq!(row.len(), columns, "rows of a batch must be equally long");
        for &id in row {
            assert!(
                (id as usize) < vocab_size,
                "id {id} is outside the vocabulary of {vocab_size}"
            );
        }
    }
    (ids.len(), columns)
}
