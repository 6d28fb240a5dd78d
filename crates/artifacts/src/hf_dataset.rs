//! Hugging Face image data sets in Parquet: one or many shards with an image column and, where captions are wanted, a
//! text column.
//!
//! An image is `struct<bytes: binary, path: string>` (a plain binary column is taken too). Rows are decoded in batches of
//! a few MiB, or one by one; the files are mapped, so memory does not grow with them. Some writers put a thousand pictures
//! into one page, which must be decompressed whole for any of them, and the first thousand into the dictionary, which all
//! that refer to it need; where a single row is that costly, its batch is decoded and the latest batches are kept. Rows that
//! refer to one value of a dictionary share its bytes until they are asked for one by one: a small file can describe
//! gigabytes of equal pictures.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use polars_arrow::array::Utf8ViewArray;
use polars_arrow::datatypes::{ArrowDataType, Field};

use crate::error::{ArtifactError, ParquetProblem, Result};
use crate::parquet_read::ParquetFile;

mod batch;
mod kept;

use batch::Batch;
pub(crate) use kept::Kept;

/// Rows are decoded so many bytes at a time, by the column's mean.
const BATCH_BYTES: usize = 16 << 20;
/// … and no more rows than this, unless a dictionary is larger than that …
const BATCH_ROWS: usize = 256;
/// … and then no more than this.
const DICTIONARY_ROWS: usize = 1 << 16;
/// A single row is costly if this fraction of a batch must be expanded for it.
const COSTLY_FRACTION: usize = 8;

const IMAGE_TYPE: &str = "struct<bytes: binary, path: text> or binary";

/// One row of a data set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParquetImage {
    /// Which of the files, counted from 0.
    pub file: usize,
    /// Row in that file, counted from 0.
    pub row: u32,
    /// The encoded picture; empty if the cell is.
    pub bytes: Vec<u8>,
    /// The name that the picture had, if the data set kept it.
    pub path: Option<String>,
    /// The caption, if the cell has one and captions are read.
    pub caption: Option<String>,
}

/// An open data set.
pub struct ParquetImages {
    shards: Vec<Shard>,
    /// What was decoded for [`Self::get`] where single rows are costly.
    kept: Arc<Kept>,
}

struct Shard {
    file: ParquetFile,
    image: Field,
    /// Absent if captions are not wanted.
    text: Option<Field>,
    /// Mean size of an image, at least 1.
    image_bytes: usize,
    batch_bytes: usize,
}

impl ParquetImages {
    /// Opens the files of a data set and checks their columns.
    ///
    /// # Errors
    ///
    /// If a file cannot be read, or a column is missing (the error lists those there are) or of another type.
    pub fn open<P: AsRef<Path>>(
        files: &[P],
        image_column: &str,
        text_column: &str,
    ) -> Result<Self> {
        Self::open_columns(files, image_column, Some(text_column))
    }

    /// Opens the files of a data set for their pictures alone; captions are not read and need not be there.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub fn open_pictures<P: AsRef<Path>>(files: &[P], image_column: &str) -> Result<Self> {
        Self::open_columns(files, image_column, None)
    }

    fn open_columns<P: AsRef<Path>>(
        files: &[P],
        image_column: &str,
        text_column: Option<&str>,
    ) -> Result<Self> {
        let shards: Result<Vec<Shard>> = files
            .iter()
            .map(|path| Shard::open(path.as_ref(), image_column, text_column))
            .collect();
        Ok(Self {
            shards: shards?,
            kept: Arc::default(),
        })
    }

    /// Keeps what it decodes together with others.
    pub(crate) fn sharing(self, kept: &Arc<Kept>) -> Self {
        Self {
            kept: Arc::clone(kept),
            ..self
        }
    }

    /// The files, in the order given.
    pub fn files(&self) -> Vec<PathBuf> {
        self.shards
            .iter()
            .map(|shard| shard.file.path().to_path_buf())
            .collect()
    }

    /// Rows of all files.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.file.num_rows()).sum()
    }

    /// Whether no file has a row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Rows of one file.
    ///
    /// # Panics
    ///
    /// If there is no such file.
    pub fn num_rows(&self, file: usize) -> usize {
        self.shards[file].file.num_rows()
    }

    /// One row of one file.
    ///
    /// # Errors
    ///
    /// If there is no such row, or the file is damaged there.
    ///
    /// # Panics
    ///
    /// If there is no such file.
    pub fn get(&self, file: usize, row: u32) -> Result<ParquetImage> {
        self.shards[file].get(&self.kept, file, row)
    }

    /// All rows, file by file. After an error the next item is the first row of the next batch or file.
    pub fn iter(&self) -> impl Iterator<Item = Result<ParquetImage>> {
        self.shards.iter().enumerate().flat_map(|(file, shard)| {
            shard
                .batches()
                .map(move |rows| shard.read(file, rows))
                .flat_map(|batch| {
                    let (batch, error) =
                        batch.map_or_else(|e| (None, Some(e)), |b| (Some(b), None));
                    let rows = batch.into_iter().flat_map(Batch::into_rows);
                    rows.map(Ok).chain(error.map(Err))
                })
        })
    }
}

impl Shard {
    fn open(path: &Path, image_column: &str, text_column: Option<&str>) -> Result<Self> {
        let file = ParquetFile::open(path)?;
        let image = file.field(image_column, IMAGE_TYPE)?.clone();
        let is_image = match &image.dtype {
            ArrowDataType::BinaryView => true,
            ArrowDataType::Struct(fields) => {
                let has = |name: &str, dtype: ArrowDataType| {
                    fields
                        .iter()
                        .any(|f| f.name.as_str() == name && f.dtype == dtype)
                };
                has("bytes", ArrowDataType::BinaryView)
                    && (has("path", ArrowDataType::Utf8View)
                        || fields.iter().all(|f| f.name.as_str() != "path"))
            }
            _ => false,
        };
        if !is_image {
            return Err(file.wrong_type(&image, IMAGE_TYPE));
        }
        let text = match text_column {
            Some(column) => Some(
                file.typed_field(column, "text", &ArrowDataType::Utf8View)?
                    .clone(),
            ),
            None => None,
        };
        if u32::try_from(file.num_rows()).is_err() {
            return Err(ArtifactError::RowOutOfRange {
                path: path.to_path_buf(),
                row: u32::MAX as usize,
                rows: file.num_rows(),
            });
        }
        let column_bytes = usize::try_from(file.column_bytes(image_column)).unwrap_or(usize::MAX);
        let image_bytes = column_bytes
            .checked_div(file.num_rows())
            .unwrap_or(0)
            .max(1);
        Ok(Self {
            file,
            image,
            text,
            image_bytes,
            batch_bytes: BATCH_BYTES,
        })
    }

    /// Ranges of rows to decode together.
    fn batches(&self) -> impl Iterator<Item = Range<usize>> {
        let mut start = 0;
        std::iter::from_fn(move || {
            let rows = self.batch_of(start);
            start = rows.end;
            (!rows.is_empty()).then_some(rows)
        })
    }

    /// The batch that a row is in; no batch crosses a row group, whose dictionary would be decoded twice.
    fn batch_of(&self, row: usize) -> Range<usize> {
        let group = self.file.row_group_of(row);
        let dictionary_bytes = self.file.dictionary_bytes(&self.image.name, row);
        let mut rows = (self.batch_bytes / self.image_bytes).clamp(1, BATCH_ROWS);
        if dictionary_bytes > self.batch_bytes {
            rows = rows.max((dictionary_bytes / self.image_bytes).min(DICTIONARY_ROWS));
        }
        let start = group.start + row.saturating_sub(group.start) / rows * rows;
        start.min(group.end)..(start + rows).min(group.end)
    }

    fn get(&self, kept: &Kept, file: usize, row: u32) -> Result<ParquetImage> {
        let path = self.file.path();
        if let Some(image) = kept.get(path, file, row) {
            return Ok(image);
        }
        let index = row as usize;
        if index >= self.file.num_rows() {
            return Err(self.out_of_range(index));
        }
        let cost = self.file.expanded_bytes(&self.image, index)?;
        let costly = cost > self.batch_bytes / COSTLY_FRACTION;
        let rows = if costly {
            self.batch_of(index)
        } else {
            index..index + 1
        };
        // Outside the lock: threads read different batches at once.
        let batch = Arc::new(self.read(file, rows)?);
        let image = batch.get(row).ok_or_else(|| self.out_of_range(index))?;
        if costly {
            kept.put(path, batch);
        }
        Ok(image)
    }

    fn read(&self, file: usize, rows: Range<usize>) -> Result<Batch> {
        if rows.end > self.file.num_rows() {
            return Err(self.out_of_range(rows.start));
        }
        let captions = match &self.text {
            Some(text) => self.file.decode_as::<Utf8ViewArray>(text, rows.clone())?,
            None => Vec::new(),
        };
        let images = self.file.decode(&self.image, rows.clone())?;
        let first_row = rows.start as u32; // fits: checked when opened
        Batch::new(file, first_row, images, captions).ok_or_else(|| self.unreadable())
    }

    fn out_of_range(&self, row: usize) -> ArtifactError {
        ArtifactError::RowOutOfRange {
            path: self.file.path().to_path_buf(),
            row,
            rows: self.file.num_rows(),
        }
    }

    fn unreadable(&self) -> ArtifactError {
        ArtifactError::DamagedParquet {
            path: self.file.path().to_path_buf(),
            problem: ParquetProblem::Undecodable {
                place: format!("column {:?}", self.image.name.as_str()),
                message: "it decodes to another type".to_owned(),
            },
        }
    }
}

#[cfg(test)]
mod tests;
