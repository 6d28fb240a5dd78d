//! Reading Parquet files that nobody vouches for.
//!
//! The file is mapped, its footer parsed and compared with the file. Before a column is first decoded, a walk over its
//! pages shows that they are inside the chunk and expand to a sane size, and where each row is; a read then decodes the
//! pages that hold its rows and no others. The decoder is polars' own (`polars-parquet`), called below `polars-io` because that layer slices the file by unchecked
//! offsets and treats half floats as unreachable when debug assertions are on. It panics on some damaged pages; such a
//! panic is caught here and becomes an error.

use std::fs::File;
use std::io::Cursor;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use polars_arrow::array::{Array, StructArray};
use polars_arrow::datatypes::{ArrowDataType, ArrowSchema, Field};
use polars_buffer::Buffer;
use polars_parquet::read::{
    BasicDecompressor, ColumnChunkMetadata, FileMetadata, Filter, RowGroupMetadata,
    column_iter_to_arrays, infer_schema, n_columns, read_metadata,
};

use crate::error::{ArtifactError, ParquetProblem, Result};
use crate::parquet_write::Footer;
use crate::safetensors_file::map;

mod columns;
mod pages;

use pages::{PageHeader, PageIndex, PageProblem, Selection};

/// The four bytes at both ends of every Parquet file.
const MAGIC: &[u8; 4] = b"PAR1";

/// Columns that are read whole may have so many rows per byte of file: run lengths describe many equal values in little
/// space, but no table of ours is more than this repetitive.
const MAX_ROWS_PER_BYTE: u128 = 64;

/// An open Parquet file: mapped, its footer checked.
pub(crate) struct ParquetFile {
    path: PathBuf,
    bytes: Buffer<u8>,
    metadata: FileMetadata,
    schema: ArrowSchema,
    /// First row of every row group, and the number of rows at the end.
    starts: Vec<usize>,
    /// The pages of every row group's columns, or what is wrong with them; found when a column is first decoded.
    page_indices: Vec<Vec<OnceLock<Result<PageIndex, PageProblem>>>>,
}

impl ParquetFile {
    /// Opens a file and checks its footer.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| ArtifactError::io("open", path, e))?;
        let bytes = match map(&file).map_err(|e| ArtifactError::io("map", path, e))? {
            Some(map) => Buffer::from_owner(map),
            None => Buffer::new(),
        };
        let damaged = |problem| ArtifactError::DamagedParquet {
            path: path.to_path_buf(),
            problem,
        };
        check_frame(&bytes).map_err(damaged)?;
        let (metadata, schema) = guarded("the footer", || {
            let metadata = read_metadata(&mut Cursor::new(&bytes[..]))?;
            let schema = infer_schema(&metadata)?;
            Ok((metadata, schema))
        })
        .map_err(|e| e.in_file("read the footer of", path))?;
        let starts = check_row_groups(&metadata, bytes.len()).map_err(damaged)?;
        let page_indices = metadata
            .row_groups
            .iter()
            .map(|group| {
                group
                    .parquet_columns()
                    .iter()
                    .map(|_| OnceLock::new())
                    .collect()
            })
            .collect();
        Ok(Self {
            path: path.to_path_buf(),
            bytes,
            metadata,
            schema,
            starts,
            page_indices,
        })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many rows it has.
    pub fn num_rows(&self) -> usize {
        self.metadata.num_rows
    }

    /// The names of its columns.
    pub fn column_names(&self) -> Vec<String> {
        self.schema
            .iter_names()
            .map(|name| name.to_string())
            .collect()
    }

    /// The key-value entries of its footer, without the library's own.
    pub fn footer(&self) -> Footer {
        let entries = self.metadata.key_value_metadata.iter().flatten();
        entries
            .filter(|entry| entry.key != "ARROW:schema")
            .filter_map(|entry| Some((entry.key.clone(), entry.value.clone()?)))
            .collect()
    }

    /// A column's name and type.
    pub fn field(&self, column: &str, expected: &str) -> Result<&Field> {
        self.schema
            .get(column)
            .ok_or_else(|| ArtifactError::MissingColumn {
                path: self.path.clone(),
                column: column.to_owned(),
                expected: expected.to_owned(),
                existing: self.column_names(),
            })
    }

    /// The uncompressed size of a column, all row groups, by the footer.
    pub fn column_bytes(&self, column: &str) -> u64 {
        self.metadata
            .row_groups
            .iter()
            .filter_map(|group| group.columns_under_root_iter(column))
            .flatten()
            .map(|chunk| u64::try_from(chunk.uncompressed_size()).unwrap_or(0))
            .fold(0, u64::saturating_add)
    }

    /// The rows of the row group that `row` is in; empty past the end.
    pub fn row_group_of(&self, row: usize) -> Range<usize> {
        let end = self.starts.partition_point(|&start| start <= row);
        match self.starts.get(end) {
            Some(&end_row) => self.starts[end - 1]..end_row,
            None => self.num_rows()..self.num_rows(),
        }
    }

    /// The size of the largest dictionary that must be decoded before any row of a column in `row`'s row group can be.
    pub fn dictionary_bytes(&self, column: &str, row: usize) -> usize {
        let end = self.starts.partition_point(|&start| start <= row);
        let group = end
            .checked_sub(1)
            .and_then(|group| self.metadata.row_groups.get(group));
        group
            .and_then(|group| group.columns_under_root_iter(column))
            .into_iter()
            .flatten()
            .filter_map(|chunk| PageHeader::parse(&self.chunk_bytes(chunk)))
            .filter(|header| header.is_dictionary)
            .map(|header| header.uncompressed_bytes)
            .max()
            .unwrap_or(0)
    }

    /// How many bytes the pages have, decompressed, that must be read for one row of a column.
    pub fn expanded_bytes(&self, field: &Field, row: usize) -> Result<usize> {
        let row_group = self.starts.partition_point(|&start| start <= row) - 1;
        let Some(group) = self.metadata.row_groups.get(row_group) else {
            return Ok(0);
        };
        let within = row - self.starts[row_group];
        let place = format!("column {:?} in row group {row_group}", field.name.as_str());
        guarded(&place, || {
            let leaves = group.columns_idxs_under_root_iter(&field.name);
            let mut total = 0usize;
            for &leaf in leaves.unwrap_or_default() {
                let selection = self.select(row_group, leaf, within..within + 1)?;
                total = total.saturating_add(selection.expanded_bytes);
            }
            Ok(total)
        })
        .map_err(|e| e.in_file("decode", &self.path))
    }

    /// Decodes `rows` of a column, an array per row group that they touch. `field` must be the schema's.
    pub fn decode(&self, field: &Field, rows: Range<usize>) -> Result<Vec<Box<dyn Array>>> {
        if rows.end > self.num_rows() {
            return Err(ArtifactError::RowOutOfRange {
                path: self.path.clone(),
                row: rows.end - 1,
                rows: self.num_rows(),
            });
        }
        let mut arrays = Vec::new();
        for (index, group) in self.metadata.row_groups.iter().enumerate() {
            let [start, end] = [self.starts[index], self.starts[index + 1]];
            let wanted = rows.start.max(start)..rows.end.min(end);
            if wanted.is_empty() {
                continue;
            }
            let within = wanted.start - start..wanted.end - start;
            arrays.extend(self.decode_in_group(field, index, group, within)?);
        }
        let found: usize = arrays.iter().map(|array| array.len()).sum();
        if found != rows.len() {
            return Err(self.damaged(ParquetProblem::Length {
                column: field.name.to_string(),
                expected: rows.len(),
                found,
            }));
        }
        Ok(arrays)
    }

    /// Refuses to read columns whole if the footer counts more rows than the file could hold.
    fn check_rows_against_size(&self) -> Result<()> {
        let (rows, file_bytes) = (self.num_rows(), self.bytes.len());
        if rows as u128 > file_bytes as u128 * MAX_ROWS_PER_BYTE {
            return Err(self.damaged(ParquetProblem::Rows {
                total: rows,
                summed: rows as u128,
                file_bytes,
            }));
        }
        Ok(())
    }

    fn decode_in_group(
        &self,
        field: &Field,
        index: usize,
        group: &RowGroupMetadata,
        rows: Range<usize>,
    ) -> Result<Vec<Box<dyn Array>>> {
        let place = format!("column {:?} in row group {index}", field.name.as_str());
        let leaves = group
            .columns_idxs_under_root_iter(&field.name)
            .unwrap_or_default();
        guarded(&place, || match &field.dtype {
            // Each field of a struct has pages of its own, and the decoder takes one range of rows for all columns.
            ArrowDataType::Struct(children) if rows != (0..group.num_rows()) => {
                self.decode_struct(field, children, index, leaves, rows)
            }
            _ => self.decode_leaves(field, index, leaves, rows),
        })
        .map_err(|e| e.in_file("decode", &self.path))
    }

    /// Decodes a struct field by field.
    fn decode_struct(
        &self,
        field: &Field,
        children: &[Field],
        row_group: usize,
        mut leaves: &[usize],
        rows: Range<usize>,
    ) -> Result<Vec<Box<dyn Array>>, Failure> {
        let length = |found: usize| {
            Failure::Problem(ParquetProblem::Length {
                column: field.name.to_string(),
                expected: rows.len(),
                found,
            })
        };
        let mut values = Vec::with_capacity(children.len());
        let mut validity = None;
        for child in children {
            let (own, others) = leaves
                .split_at_checked(n_columns(&child.dtype))
                .ok_or_else(|| length(0))?;
            leaves = others;
            let alone = Field {
                dtype: ArrowDataType::Struct(vec![child.clone()]),
                ..field.clone()
            };
            let arrays = self.decode_leaves(&alone, row_group, own, rows.clone())?;
            let array = arrays
                .first()
                .and_then(|array| array.as_any().downcast_ref::<StructArray>())
                .filter(|array| array.len() == rows.len())
                .ok_or_else(|| length(arrays.iter().map(|array| array.len()).sum()))?;
            values.push(array.values()[0].clone());
            // Sound files say the same of the struct in every field; the library too goes by the last.
            validity = array.validity().cloned();
        }
        let dtype = ArrowDataType::Struct(children.to_vec());
        let array = StructArray::try_new(dtype, rows.len(), values, validity)?;
        Ok(vec![array.boxed()])
    }

    /// Decodes rows of the columns that make up `field`; of a single column, only the pages that hold them.
    fn decode_leaves(
        &self,
        field: &Field,
        row_group: usize,
        leaves: &[usize],
        rows: Range<usize>,
    ) -> Result<Vec<Box<dyn Array>>, Failure> {
        let group = &self.metadata.row_groups[row_group];
        let everything = 0..group.num_rows();
        let wanted = if leaves.len() == 1 {
            rows.clone()
        } else {
            everything.clone()
        };
        let mut columns = Vec::with_capacity(leaves.len());
        let mut types = Vec::with_capacity(leaves.len());
        let mut within = rows.clone();
        for &leaf in leaves {
            let chunk = &group.parquet_columns()[leaf];
            let selection = self.select(row_group, leaf, wanted.clone())?;
            if leaves.len() == 1 {
                within = selection.rows.clone();
            }
            columns.push(BasicDecompressor::new(selection.reader(), Vec::new()));
            types.push(&chunk.descriptor().descriptor.primitive_type);
        }
        let filter = (rows != everything).then_some(Filter::Range(within));
        let (arrays, _) = column_iter_to_arrays(columns, types, field.clone(), filter)?;
        Ok(arrays)
    }

    /// The pages of a column chunk that hold `rows` of its row group.
    fn select(
        &self,
        row_group: usize,
        leaf: usize,
        rows: Range<usize>,
    ) -> Result<Selection, Failure> {
        let group = &self.metadata.row_groups[row_group];
        let chunk = &group.parquet_columns()[leaf];
        let bytes = self.chunk_bytes(chunk);
        self.page_indices[row_group][leaf]
            .get_or_init(|| PageIndex::of(&bytes, chunk, group.num_rows()))
            .as_ref()
            .map_err(|&problem| problem)
            .and_then(|index| index.select(&bytes, rows))
            .map_err(|(page, what)| {
                Failure::Problem(ParquetProblem::Page {
                    row_group,
                    column: leaf_name(chunk),
                    page,
                    what,
                })
            })
    }

    /// The bytes of a column chunk. Its range was checked when the file was opened.
    fn chunk_bytes(&self, chunk: &ColumnChunkMetadata) -> Buffer<u8> {
        let range = chunk.byte_range();
        self.bytes
            .clone()
            .sliced(range.start as usize..range.end as usize)
    }

    fn damaged(&self, problem: ParquetProblem) -> ArtifactError {
        ArtifactError::DamagedParquet {
            path: self.path.clone(),
            problem,
        }
    }
}

/// A column's name with those of the fields inside it: `image.bytes`.
fn leaf_name(chunk: &ColumnChunkMetadata) -> String {
    let path: Vec<&str> = chunk
        .descriptor()
        .path_in_schema
        .iter()
        .map(|name| name.as_str())
        .collect();
    path.join(".")
}

/// Checks the marks at both ends and that the footer begins inside the file.
fn check_frame(bytes: &[u8]) -> Result<(), ParquetProblem> {
    let framed = bytes.len() >= 12 && bytes.starts_with(MAGIC) && bytes.ends_with(MAGIC);
    if !framed {
        return Err(ParquetProblem::Magic);
    }
    let length = &bytes[bytes.len() - 8..bytes.len() - 4];
    let footer_bytes = u64::from(u32::from_le_bytes([
        length[0], length[1], length[2], length[3],
    ]));
    if footer_bytes > bytes.len() as u64 - 12 {
        return Err(ParquetProblem::FooterLength {
            footer_bytes,
            file_bytes: bytes.len(),
        });
    }
    Ok(())
}

/// Checks that the row groups add up and lie inside the file; gives their first rows, and the number of rows.
fn check_row_groups(
    metadata: &FileMetadata,
    file_bytes: usize,
) -> Result<Vec<usize>, ParquetProblem> {
    let groups = &metadata.row_groups;
    let summed: u128 = groups.iter().map(|group| group.num_rows() as u128).sum();
    if summed != metadata.num_rows as u128 {
        return Err(ParquetProblem::Rows {
            total: metadata.num_rows,
            summed,
            file_bytes,
        });
    }
    for (row_group, group) in groups.iter().enumerate() {
        for chunk in group.parquet_columns() {
            let start = chunk
                .dictionary_page_offset()
                .unwrap_or(chunk.data_page_offset());
            let end = start.checked_add(chunk.compressed_size());
            let inside = start >= MAGIC.len() as i64
                && chunk.compressed_size() >= 0
                && chunk.num_values() >= 0
                && end.is_some_and(|end| end as u64 <= file_bytes as u64);
            // A column that is not in a list has a value in every row.
            let flat = chunk.descriptor().descriptor.max_rep_level == 0;
            if !inside || (flat && chunk.num_values() as u128 != group.num_rows() as u128) {
                return Err(ParquetProblem::Chunk {
                    row_group,
                    column: leaf_name(chunk),
                });
            }
        }
    }
    let mut next = 0;
    let mut starts = vec![0];
    starts.extend(groups.iter().map(|group| {
        next += group.num_rows();
        next
    }));
    Ok(starts)
}

/// Why something that was guarded failed.
enum Failure {
    Polars(polars::error::PolarsError),
    Problem(ParquetProblem),
}

impl From<polars::error::PolarsError> for Failure {
    fn from(source: polars::error::PolarsError) -> Self {
        Self::Polars(source)
    }
}

impl Failure {
    fn in_file(self, action: &'static str, path: &Path) -> ArtifactError {
        let path = path.to_path_buf();
        match self {
            Self::Polars(source) => ArtifactError::Parquet {
                action,
                path,
                source,
            },
            Self::Problem(problem) => ArtifactError::DamagedParquet { path, problem },
        }
    }
}

/// Runs the decoder; a panic of it becomes an error that says where it was.
fn guarded<T>(place: &str, decode: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    // Nothing outlives a panic but the file's bytes and footer, which the decoder only reads.
    catch_unwind(AssertUnwindSafe(decode)).unwrap_or_else(|panic| {
        let message = panic
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_default();
        Err(Failure::Problem(ParquetProblem::Undecodable {
            place: place.to_owned(),
            message: message
                .lines()
                .next()
                .unwrap_or_default()
                .chars()
                .take(160)
                .collect(),
        }))
    })
}

#[cfg(test)]
mod tests;
