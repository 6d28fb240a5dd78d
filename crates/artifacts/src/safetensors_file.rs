//! safetensors files: eight bytes of header length, a JSON header, then the tensors' bytes, little-endian.
//!
//! Every entry of the header has a dtype, a shape and a range of data bytes. The ranges must lie in the file, hold
//! exactly what dtype and shape need, and cover the data without gap or overlap; a file that breaks any of it is not
//! opened. Format: <https://github.com/huggingface/safetensors#format>.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};
use memmap2::Mmap;

use crate::error::{ArtifactError, HeaderProblem, Result, nearest_names};

mod dtype;
mod header;
mod write;

pub use dtype::Dtype;
pub use write::{TensorToWrite, write_safetensors};

/// Dtype and shape of a tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The type of its numbers.
    pub dtype: Dtype,
    /// Its sizes, outermost first; empty for a single number.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// How many numbers it has.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product() // cannot overflow: checked with the header
    }
}

/// An open safetensors file: its header is checked, its data is mapped into memory and read when asked for.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    bytes: Option<Mmap>, // None: an empty file cannot be mapped (and is refused)
    header: header::Header,
}

impl SafetensorsFile {
    /// Opens a file and checks its whole header.
    ///
    /// # Errors
    ///
    /// If it cannot be read, or its header does not fit it: the error says which tensor and how.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| ArtifactError::io("open", path, e))?;
        let bytes = map(&file).map_err(|e| ArtifactError::io("map", path, e))?;
        let header =
            header::Header::parse(bytes.as_deref().unwrap_or_default()).map_err(|source| {
                ArtifactError::SafetensorsHeader {
                    path: path.to_path_buf(),
                    source,
                }
            })?;
        Ok(Self {
            path: path.to_path_buf(),
            bytes,
            header,
        })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of its tensors, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.header.tensors.keys().map(String::as_str)
    }

    /// Whether it has a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.header.tensors.contains_key(name)
    }

    /// Its metadata, empty if it has none.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// Dtype and shape of a tensor.
    ///
    /// # Errors
    ///
    /// If there is no such tensor; the error holds the nearest names.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.entry(name).map(|entry| &entry.info)
    }

    /// The bytes of a tensor as they lie in the file: little-endian, row by row, not aligned to anything.
    ///
    /// # Errors
    ///
    /// If there is no such tensor.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let entry = self.entry(name)?;
        let bytes = self.bytes.as_deref().unwrap_or_default();
        Ok(&bytes[self.header.data_start..][entry.start..entry.end])
    }

    /// The numbers of a floating-point tensor (F32, F16, BF16 or F64), row by row. F64 is rounded.
    ///
    /// # Errors
    ///
    /// If there is no such tensor, or it is not floating-point.
    pub fn f32(&self, name: &str) -> Result<Vec<f32>> {
        let bytes = self.bytes(name)?;
        Ok(match self.info(name)?.dtype {
            Dtype::F32 => f32s_of(bytes),
            Dtype::F16 => {
                let halves = cast_or_copy::<f16, 2>(bytes, f16::from_le_bytes);
                let mut out = vec![0.0; halves.len()];
                halves.convert_to_f32_slice(&mut out);
                out
            }
            Dtype::BF16 => {
                let halves = cast_or_copy::<bf16, 2>(bytes, bf16::from_le_bytes);
                let mut out = vec![0.0; halves.len()];
                halves.convert_to_f32_slice(&mut out);
                out
            }
            Dtype::F64 => chunks::<8>(bytes)
                .map(|b| f64::from_le_bytes(b) as f32)
                .collect(),
            found => return Err(self.wrong_dtype(name, "F32, F16, BF16 or F64", found)),
        })
    }

    /// The numbers of an I32 or I64 tensor, row by row.
    ///
    /// # Errors
    ///
    /// If there is no such tensor, it has another dtype, or a number does not fit.
    pub fn i32(&self, name: &str) -> Result<Vec<i32>> {
        let bytes = self.bytes(name)?;
        match self.info(name)?.dtype {
            Dtype::I32 => Ok(chunks::<4>(bytes).map(i32::from_le_bytes).collect()),
            Dtype::I64 => chunks::<8>(bytes)
                .map(i64::from_le_bytes)
                .enumerate()
                .map(|(index, found)| {
                    i32::try_from(found).map_err(|_| ArtifactError::ElementRange {
                        path: self.path.clone(),
                        name: name.to_owned(),
                        index,
                        expected: "a 32-bit integer",
                        found,
                    })
                })
                .collect(),
            found => Err(self.wrong_dtype(name, "I32 or I64", found)),
        }
    }

    /// The numbers of a U8 tensor, row by row.
    ///
    /// # Errors
    ///
    /// If there is no such tensor, or it has another dtype.
    pub fn u8(&self, name: &str) -> Result<Vec<u8>> {
        match self.info(name)?.dtype {
            Dtype::U8 => Ok(self.bytes(name)?.to_vec()),
            found => Err(self.wrong_dtype(name, "U8", found)),
        }
    }

    fn entry(&self, name: &str) -> Result<&header::Entry> {
        self.header
            .tensors
            .get(name)
            .ok_or_else(|| ArtifactError::MissingTensor {
                path: self.path.clone(),
                name: name.to_owned(),
                nearest: nearest_names(name, self.names(), 3),
            })
    }

    fn wrong_dtype(&self, name: &str, expected: &'static str, found: Dtype) -> ArtifactError {
        ArtifactError::WrongDtype {
            path: self.path.clone(),
            name: name.to_owned(),
            expected,
            found,
        }
    }
}

/// Maps a whole file for reading; `None` if it is empty.
#[allow(unsafe_code)]
pub(crate) fn map(file: &File) -> std::io::Result<Option<Mmap>> {
    if file.metadata()?.len() == 0 {
        return Ok(None);
    }
    // SAFETY: the map is only read. Artifacts are written once and replaced by rename, never changed or cut in place,
    // so the mapped file keeps its bytes; whoever edits a weight file in place during a run breaks that.
    unsafe { Mmap::map(file) }.map(Some)
}

fn f32s_of(bytes: &[u8]) -> Vec<f32> {
    match bytemuck::try_cast_slice::<u8, f32>(bytes) {
        Ok(values) if cfg!(target_endian = "little") => values.to_vec(),
        _ => chunks::<4>(bytes).map(f32::from_le_bytes).collect(),
    }
}

/// The half floats in `bytes`, in place if they are aligned.
fn cast_or_copy<T: bytemuck::Pod, const N: usize>(
    bytes: &[u8],
    from_le_bytes: impl Fn([u8; N]) -> T,
) -> Cow<'_, [T]> {
    match bytemuck::try_cast_slice::<u8, T>(bytes) {
        Ok(values) if cfg!(target_endian = "little") => Cow::Borrowed(values),
        _ => Cow::Owned(chunks::<N>(bytes).map(from_le_bytes).collect()),
    }
}

fn chunks<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes.as_chunks::<N>().0.iter().copied()
}

#[cfg(test)]
mod tests;
