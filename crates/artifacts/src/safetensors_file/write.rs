//! Writing safetensors files: the same tensors and metadata always give the same bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::Path;

use serde::Serialize;

use super::Dtype;
use super::header::METADATA_KEY;
use crate::atomic::write_atomically;
use crate::error::{ArtifactError, Result, WriteProblem};

/// A tensor to be written; its bytes are little-endian, row by row.
#[derive(Debug, Clone, Copy)]
pub struct TensorToWrite<'a> {
    /// Its name.
    pub name: &'a str,
    /// The type of its numbers.
    pub dtype: Dtype,
    /// Its sizes, outermost first.
    pub shape: &'a [usize],
    /// Its numbers.
    pub bytes: &'a [u8],
}

impl<'a> TensorToWrite<'a> {
    /// A tensor of f32 numbers.
    ///
    /// The numbers are taken as they lie in memory, which is the file's order on every machine that we build for.
    pub fn f32(name: &'a str, shape: &'a [usize], values: &'a [f32]) -> Self {
        const { assert!(cfg!(target_endian = "little")) }
        Self {
            name,
            dtype: Dtype::F32,
            shape,
            bytes: bytemuck::cast_slice(values),
        }
    }
}

#[derive(Serialize)]
struct Entry<'a> {
    dtype: &'static str,
    shape: &'a [usize],
    data_offsets: [usize; 2],
}

/// Writes a safetensors file, whole or not at all.
///
/// Tensors are laid out by size of their numbers, largest first, then by name, so that every tensor is aligned; the
/// order in which they are given leaves no trace.
///
/// # Errors
///
/// If a name appears twice, bytes do not fill a shape, or the file cannot be written.
pub fn write_safetensors(
    path: &Path,
    tensors: &[TensorToWrite<'_>],
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let unwritable = |tensor: &TensorToWrite<'_>, problem| ArtifactError::UnwritableTensor {
        path: path.to_path_buf(),
        name: tensor.name.to_owned(),
        problem,
    };
    let mut names = BTreeSet::from([METADATA_KEY]);
    for tensor in tensors {
        if !names.insert(tensor.name) {
            return Err(unwritable(tensor, WriteProblem::Name));
        }
        let expected = tensor
            .shape
            .iter()
            .try_fold(tensor.dtype.size_bytes(), |bytes, &n| bytes.checked_mul(n));
        if expected != Some(tensor.bytes.len()) {
            return Err(unwritable(
                tensor,
                WriteProblem::Size {
                    dtype: tensor.dtype,
                    shape: tensor.shape.to_vec(),
                    expected,
                    found: tensor.bytes.len(),
                },
            ));
        }
    }

    let mut ordered: Vec<&TensorToWrite<'_>> = tensors.iter().collect();
    ordered.sort_by_key(|tensor| (std::cmp::Reverse(tensor.dtype.size_bytes()), tensor.name));
    let header = header_of(&ordered, metadata);

    write_atomically(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        for tensor in &ordered {
            file.write_all(tensor.bytes)?;
        }
        Ok(())
    })
}

/// The JSON header, in the tensors' order, padded with spaces so that the data starts at a multiple of eight.
fn header_of(ordered: &[&TensorToWrite<'_>], metadata: &BTreeMap<String, String>) -> Vec<u8> {
    const REASON: &str = "strings and numbers always serialise to memory";
    let mut header = vec![b'{'];
    let mut comma = false;
    let mut entry = |name: &str, value: Vec<u8>| {
        if std::mem::replace(&mut comma, true) {
            header.push(b',');
        }
        header.extend(serde_json::to_vec(name).expect(REASON));
        header.push(b':');
        header.extend(value);
    };
    if !metadata.is_empty() {
        entry(METADATA_KEY, serde_json::to_vec(metadata).expect(REASON));
    }
    let mut start = 0;
    for tensor in ordered {
        let end = start + tensor.bytes.len();
        let value = Entry {
            dtype: tensor.dtype.name(),
            shape: tensor.shape,
            data_offsets: [start, end],
        };
        entry(tensor.name, serde_json::to_vec(&value).expect(REASON));
        start = end;
    }
    header.push(b'}');
    header.resize(header.len().next_multiple_of(8), b' ');
    header
}
