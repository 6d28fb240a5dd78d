//! What is wrong inside a file: the detail behind an [`ArtifactError`](super::ArtifactError).

use std::fmt;

use super::{LISTED_KEYS, nearest_hint, nearest_names};
use crate::safetensors_file::Dtype;

/// What is wrong with a safetensors header.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderProblem {
    /// Fewer than the eight bytes of the header's length.
    #[error(
        "it has {file_bytes} bytes, too few for the 8-byte header length (is the download complete?)"
    )]
    TooShort {
        /// The file's size.
        file_bytes: usize,
    },
    /// The header would end past the file.
    #[error(
        "its header claims {header_bytes} bytes, the file has {file_bytes} \
         (is the download complete, or is it another format?)"
    )]
    HeaderTooLong {
        /// Length by the first eight bytes.
        header_bytes: u64,
        /// The file's size.
        file_bytes: usize,
    },
    /// The header is not the JSON it should be.
    #[error("its header is not valid JSON of tensor entries")]
    Json(
        /// The parser's reason.
        #[from]
        serde_json::Error,
    ),
    /// Two entries of one name.
    #[error("its header names tensor {name:?} twice")]
    Duplicate {
        /// The tensor.
        name: String,
    },
    /// A dtype that we do not know.
    #[error("tensor {name:?} has the unknown dtype {dtype:?}")]
    Dtype {
        /// The tensor.
        name: String,
        /// The word in the header.
        dtype: String,
    },
    /// A shape whose size cannot be counted.
    #[error("tensor {name:?} has the impossible shape {shape:?}")]
    ShapeOverflow {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<u64>,
    },
    /// Offsets that end before they start or past the data.
    #[error("tensor {name:?} lies at {start}..{end}, the file has {data_bytes} bytes of data")]
    OutOfRange {
        /// The tensor.
        name: String,
        /// First byte, counted from the header's end.
        start: u64,
        /// One past its last byte.
        end: u64,
        /// Bytes after the header.
        data_bytes: usize,
    },
    /// Offsets that do not hold the shape.
    #[error("tensor {name:?} ({dtype} {shape:?}) needs {expected} bytes, its offsets hold {found}")]
    Size {
        /// The tensor.
        name: String,
        /// Its dtype.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
        /// Bytes that dtype and shape need.
        expected: usize,
        /// Bytes between the offsets.
        found: u64,
    },
    /// Two tensors that share bytes.
    #[error("tensors {first:?} and {second:?} overlap")]
    Overlap {
        /// The one that starts first.
        first: String,
        /// The one that starts inside it.
        second: String,
    },
    /// Bytes that belong to no tensor.
    #[error("bytes {start}..{end} of its data belong to no tensor")]
    Gap {
        /// First byte.
        start: usize,
        /// One past the last.
        end: usize,
    },
}

/// Why tensors cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteProblem {
    /// The name is taken.
    #[error("the name is taken (or is the format's own \"__metadata__\")")]
    Name,
    /// The bytes do not fill the shape.
    #[error("{dtype} {shape:?} needs {expected:?} bytes, {found} were given")]
    Size {
        /// Its dtype.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
        /// Bytes needed, `None` if they cannot be counted.
        expected: Option<usize>,
        /// Bytes given.
        found: usize,
    },
}

/// Where a Parquet file contradicts itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ParquetProblem {
    /// Neither begins nor ends as Parquet.
    #[error(
        "it does not begin and end with the mark PAR1 (is it Parquet, and is the download complete?)"
    )]
    Magic,
    /// The footer would begin before the file.
    #[error("its footer claims {footer_bytes} bytes, the file has {file_bytes}")]
    FooterLength {
        /// Length by the last eight bytes.
        footer_bytes: u64,
        /// The file's size.
        file_bytes: usize,
    },
    /// The row groups do not add up to the file's rows, or there are more rows than bytes could describe.
    #[error("its footer counts {total} rows, its row groups {summed}, in {file_bytes} bytes")]
    Rows {
        /// Rows by the footer.
        total: usize,
        /// Rows by the row groups.
        summed: u128,
        /// The file's size.
        file_bytes: usize,
    },
    /// A column chunk that is not inside the file.
    #[error("row group {row_group}, column {column:?} lies outside the file")]
    Chunk {
        /// The row group.
        row_group: usize,
        /// The column.
        column: String,
    },
    /// Pages that do not hold what the footer says, or that expand absurdly.
    #[error("row group {row_group}, column {column:?}, page {page}: {what}")]
    Page {
        /// The row group.
        row_group: usize,
        /// The column.
        column: String,
        /// The page.
        page: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The number of values read is not the number of rows asked for.
    #[error("column {column:?} gave {found} rows; expected {expected}")]
    Length {
        /// The column.
        column: String,
        /// Rows asked for.
        expected: usize,
        /// Rows read.
        found: usize,
    },
    /// Text of many equal cells, absurdly much of it.
    #[error("column {column:?} has {num_bytes} bytes of text; at most {max_bytes} are read")]
    Text {
        /// The column.
        column: String,
        /// What its cells come to.
        num_bytes: usize,
        /// The most that is read.
        max_bytes: usize,
    },
    /// The decoder met something that it takes for impossible.
    #[error("{place} cannot be decoded ({message})")]
    Undecodable {
        /// `the footer`, or which column.
        place: String,
        /// The decoder's last words.
        message: String,
    },
}

/// The keys of a checkpoint that do not fit a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyMismatch {
    /// Keys that the model has and the checkpoint lacks, with their shapes.
    pub missing: Vec<(String, Vec<usize>)>,
    /// Keys that the checkpoint has and the model lacks, with their shapes.
    pub unknown: Vec<(String, Vec<usize>)>,
    /// Keys of both: name, the model's shape, the checkpoint's shape.
    pub misshapen: Vec<(String, Vec<usize>, Vec<usize>)>,
}

impl fmt::Display for KeyMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unknown: Vec<&str> = self.unknown.iter().map(|(name, _)| name.as_str()).collect();
        let missing: Vec<&str> = self.missing.iter().map(|(name, _)| name.as_str()).collect();
        let rest = |f: &mut fmt::Formatter<'_>, count: usize| match count.checked_sub(LISTED_KEYS) {
            None | Some(0) => Ok(()),
            Some(more) => write!(f, "\n    and {more} more"),
        };
        if !self.missing.is_empty() {
            write!(f, "\n  {} missing:", self.missing.len())?;
            for (name, shape) in self.missing.iter().take(LISTED_KEYS) {
                let hint = nearest_hint(&nearest_names(name, unknown.iter().copied(), 1));
                write!(f, "\n    {name} {shape:?}{hint}")?;
            }
            rest(f, self.missing.len())?;
        }
        if !self.unknown.is_empty() {
            write!(f, "\n  {} unknown:", self.unknown.len())?;
            for (name, shape) in self.unknown.iter().take(LISTED_KEYS) {
                let hint = nearest_hint(&nearest_names(name, missing.iter().copied(), 1));
                write!(f, "\n    {name} {shape:?}{hint}")?;
            }
            rest(f, self.unknown.len())?;
        }
        if !self.misshapen.is_empty() {
            write!(f, "\n  {} of another shape:", self.misshapen.len())?;
            for (name, expected, found) in self.misshapen.iter().take(LISTED_KEYS) {
                write!(f, "\n    {name}: expected {expected:?}, found {found:?}")?;
            }
            rest(f, self.misshapen.len())?;
        }
        Ok(())
    }
}
