//! Reading Parquet files that nobody vouches for.
//!
//! The file is mapped, its footer parsed and compared with the file, and a column is decoded only over the rows asked
//! for, after a walk over its page headers has shown that the pages are inside the chunk and expand to a sane size. The
//! decoder is polars' own (`polars-parquet`), called below `polars-io` because that layer slices the file by unchecked
//! offsets and treats half floats as unreachable when debug assertions are on. It panics on some damaged pages; such a
//! panic is caught here and becomes an error.

use std::fs::File;
use std::io::Cursor;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use polars_arrow::array::Array;
use polars_arrow::datatypes::{ArrowSchema, Field};
use polars_buffer::Buffer;
use polars_parquet::parquet::page::CompressedPage;
use polars_parquet::read::{
    BasicDecompressor, ColumnChunkMetadata, FileMetadata, Filter, PageReader, RowGroupMetadata,
    column_iter_to_arrays, infer_schema, read_metadata,
};

use crate::error::{ArtifactError, ParquetProblem, Result};
use crate::parquet_write::Footer;
use crate::safetensors_file::map;

mod columns;

/// The four bytes at both ends of every Parquet file.
const MAGIC: &[u8; 4] = b"PAR1";

/// A page may always expand to this much …
const FREE_PAGE_BYTES: usize = 64 << 20;
/// … and beyond it only to so many times its compressed size.
const MAX_EXPANSION: usize = 256;
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
        Ok(Self {
            path: path.to_path_buf(),
            bytes,
            metadata,
            schema,
            starts,
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
        guarded(&place, || {
            let mut columns = Vec::new();
            let mut types = Vec::new();
            for chunk in group
                .columns_under_root_iter(&field.name)
                .into_iter()
                .flatten()
            {
                let bytes = self.chunk_bytes(chunk);
                check_pages(&bytes, pages(bytes.clone(), chunk)).map_err(|(page, what)| {
                    Failure::Problem(ParquetProblem::Page {
                        row_group: index,
                        column: leaf_name(chunk),
                        page,
                        what,
                    })
                })?;
                columns.push(BasicDecompressor::new(pages(bytes, chunk), Vec::new()));
                types.push(&chunk.descriptor().descriptor.primitive_type);
            }
            let filter = (rows != (0..group.num_rows())).then(|| Filter::Range(rows.clone()));
            let (arrays, _) = column_iter_to_arrays(columns, types, field.clone(), filter)?;
            Ok(arrays)
        })
        .map_err(|e| e.in_file("decode", &self.path))
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

fn pages(bytes: Buffer<u8>, chunk: &ColumnChunkMetadata) -> PageReader {
    let max_page_bytes = bytes.len();
    PageReader::new(Cursor::new(bytes), chunk, Vec::new(), max_page_bytes)
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

/// Walks over the page headers of a chunk; gives the page and what is wrong with it.
fn check_pages(chunk: &[u8], mut pages: PageReader) -> Result<(), (usize, &'static str)> {
    let total = pages.total_num_values();
    let sane = |uncompressed: usize, compressed: usize| {
        uncompressed <= FREE_PAGE_BYTES.max(compressed.saturating_mul(MAX_EXPANSION))
    };
    let mut page = 0;
    if total > 0 {
        let header = PageHeader::parse(chunk).ok_or((0, "its header is unreadable"))?;
        if header.is_dictionary {
            if !sane(header.uncompressed_bytes, header.compressed_bytes) {
                return Err((0, "its dictionary expands absurdly"));
            }
            pages
                .read_dict()
                .map_err(|_| (0, "its dictionary is unreadable"))?;
            page = 1;
        }
    }
    let mut values = 0usize;
    for next in pages {
        match next {
            Ok(CompressedPage::Data(data)) => {
                if !sane(data.uncompressed_size(), data.compressed_size()) {
                    return Err((page, "it expands absurdly"));
                }
                values = values.saturating_add(data.num_values());
            }
            Ok(CompressedPage::Dict(_)) => return Err((page, "it is a second dictionary")),
            Err(_) => return Err((page, "its header is unreadable or reaches past the chunk")),
        }
        page += 1;
    }
    if values != total {
        return Err((
            page,
            "the pages hold another number of values than the footer says",
        ));
    }
    Ok(())
}

/// The start of a page header, in Thrift's compact protocol: three i32 fields, each a byte 0x15 (next field, i32) and a
/// zigzag varint. The library keeps these of a dictionary page to itself.
struct PageHeader {
    is_dictionary: bool,
    uncompressed_bytes: usize,
    compressed_bytes: usize,
}

impl PageHeader {
    fn parse(chunk: &[u8]) -> Option<Self> {
        const DICTIONARY_PAGE: usize = 2;
        let mut bytes = chunk.iter().copied();
        let mut field = || {
            (bytes.next()? == 0x15).then_some(())?;
            let mut zigzag = 0u64;
            for shift in (0..35).step_by(7) {
                let byte = bytes.next()?;
                zigzag |= u64::from(byte & 0x7f) << shift;
                if byte < 0x80 {
                    // A negative number, odd in zigzag, is never right here.
                    return zigzag.is_multiple_of(2).then_some((zigzag / 2) as usize);
                }
            }
            None
        };
        Some(Self {
            is_dictionary: field()? == DICTIONARY_PAGE,
            uncompressed_bytes: field()?,
            compressed_bytes: field()?,
        })
    }
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
