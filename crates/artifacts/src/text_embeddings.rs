//! `text-embeddings.parquet`: what the text encoders made of every distinct caption, written by embed-text.
//!
//! One row per caption: `caption_hash`, `caption`, `num_t5_tokens` (those that are not padding), `t5` as a fixed-size
//! list of half floats, token by token (`tokens × width`), and `pooled`, CLIP's pooled vector, likewise. The footer holds
//! the sizes and the digests of the encoders and tokenizers. Row groups are small, so that one embedding can be read
//! without its neighbours.

use std::collections::HashMap;
use std::fmt::Display;
use std::path::Path;
use std::str::FromStr;

use half::f16;
use polars::prelude::{
    ArrowField, Column, DataFrame, DataType, ParquetCompression, PlSmallStr, Schema, Series, pf16,
};
use polars_arrow::array::{Array as _, FixedSizeListArray, PrimitiveArray};
use polars_arrow::datatypes::{ArrowDataType, Field};

use crate::captions::{caption_hash, check_hashes};
use crate::digest::Digest;
use crate::error::{ArtifactError, Result};
use crate::parquet_read::ParquetFile;
use crate::parquet_write::{Footer, TableWriter, column};

/// Version of the layout, in the footer.
const FORMAT: &str = "spritelora-text-embeddings/1";

/// A row group closes at this size: a read of one row then touches little else.
const ROW_GROUP_BYTES: usize = 4 << 20;
/// A row group closes at so many rows, however small they are.
const ROW_GROUP_ROWS: usize = 256;

/// What all embeddings of a table have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextEmbeddingHeader {
    /// T5 tokens of an embedding, padding included.
    pub t5_tokens: usize,
    /// Width of a T5 state.
    pub t5_width: usize,
    /// Width of CLIP's pooled vector.
    pub pooled_width: usize,
    /// Weights of the T5 encoder.
    pub t5_digest: Digest,
    /// Weights of the CLIP text encoder.
    pub clip_digest: Digest,
    /// Files of the T5 tokenizer.
    pub t5_tokenizer_digest: Digest,
    /// Files of the CLIP tokenizer.
    pub clip_tokenizer_digest: Digest,
}

impl TextEmbeddingHeader {
    fn to_footer(&self) -> Footer {
        let entry = |key: &str, value: &dyn Display| (key.to_owned(), value.to_string());
        Footer::from([
            entry("format", &FORMAT),
            entry("t5_tokens", &self.t5_tokens),
            entry("t5_width", &self.t5_width),
            entry("pooled_width", &self.pooled_width),
            entry("t5_digest", &self.t5_digest),
            entry("clip_digest", &self.clip_digest),
            entry("t5_tokenizer_digest", &self.t5_tokenizer_digest),
            entry("clip_tokenizer_digest", &self.clip_tokenizer_digest),
        ])
    }

    fn from_footer(path: &Path, footer: &Footer) -> Result<Self> {
        let format = footer.get("format");
        if format.map(String::as_str) != Some(FORMAT) {
            return Err(ArtifactError::Footer {
                path: path.to_path_buf(),
                key: "format".to_owned(),
                expected: FORMAT.to_owned(),
                found: format.cloned(),
            });
        }
        let count = |key| footer_entry::<usize>(path, footer, key, "a count");
        let digest = |key| footer_entry::<Digest>(path, footer, key, "a digest");
        Ok(Self {
            t5_tokens: count("t5_tokens")?,
            t5_width: count("t5_width")?,
            pooled_width: count("pooled_width")?,
            t5_digest: digest("t5_digest")?,
            clip_digest: digest("clip_digest")?,
            t5_tokenizer_digest: digest("t5_tokenizer_digest")?,
            clip_tokenizer_digest: digest("clip_tokenizer_digest")?,
        })
    }

    /// Numbers in `t5` and in `pooled`, if both can be counted and are not zero.
    fn lengths(&self, path: &Path) -> Result<(usize, usize)> {
        let checked = |tokens: usize, width: usize| {
            tokens
                .checked_mul(width)
                .filter(|&length| length > 0 && length <= i32::MAX as usize)
                .ok_or_else(|| ArtifactError::EmbeddingShape {
                    path: path.to_path_buf(),
                    tokens,
                    width,
                })
        };
        Ok((
            checked(self.t5_tokens, self.t5_width)?,
            checked(1, self.pooled_width)?,
        ))
    }
}

/// A footer entry as a value.
pub(crate) fn footer_entry<T: FromStr>(
    path: &Path,
    footer: &Footer,
    key: &str,
    expected: &str,
) -> Result<T> {
    let found = footer.get(key);
    found
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| ArtifactError::Footer {
            path: path.to_path_buf(),
            key: key.to_owned(),
            expected: expected.to_owned(),
            found: found.cloned(),
        })
}

/// One caption and what the encoders made of it.
#[derive(Debug, Clone, PartialEq)]
pub struct TextEmbeddingRow {
    /// The caption; its hash is computed.
    pub caption: String,
    /// T5 tokens that are not padding, end mark included.
    pub num_t5_tokens: u32,
    /// Its embedding.
    pub embedding: Embedding,
}

/// What the encoders made of one caption.
#[derive(Debug, Clone, PartialEq)]
pub struct Embedding {
    /// T5 states, token by token: `(tokens, width)` row by row.
    pub t5: Vec<f16>,
    /// CLIP's pooled vector.
    pub pooled: Vec<f16>,
}

/// A table in the making: rows are pushed one by one and written in small row groups.
pub struct TextEmbeddingWriter {
    table: TableWriter,
    lengths: (usize, usize),
    rows_per_group: usize,
    pending: Vec<TextEmbeddingRow>,
}

impl TextEmbeddingWriter {
    /// Starts a table that will be called `path`.
    ///
    /// # Errors
    ///
    /// If the sizes are zero or impossible, or the directory takes no new files.
    pub fn create(path: &Path, header: &TextEmbeddingHeader) -> Result<Self> {
        let lengths = header.lengths(path)?;
        let half_list = |length| DataType::Array(Box::new(DataType::Float16), length);
        let schema = Schema::from_iter([
            (PlSmallStr::from_static("caption_hash"), DataType::String),
            (PlSmallStr::from_static("caption"), DataType::String),
            (PlSmallStr::from_static("num_t5_tokens"), DataType::UInt32),
            (PlSmallStr::from_static("t5"), half_list(lengths.0)),
            (PlSmallStr::from_static("pooled"), half_list(lengths.1)),
        ]);
        // Half floats of encoders hardly compress, and uncompressed pages are read straight from the map.
        let compression = ParquetCompression::Uncompressed;
        let table = TableWriter::create(path, &schema, compression, &header.to_footer())?;
        let row_bytes = (lengths.0 + lengths.1) * size_of::<f16>();
        Ok(Self {
            table,
            lengths,
            rows_per_group: (ROW_GROUP_BYTES / row_bytes).clamp(1, ROW_GROUP_ROWS),
            pending: Vec::new(),
        })
    }

    /// Adds a row.
    ///
    /// # Errors
    ///
    /// If the embedding has another size than the header says, or the disk refuses.
    pub fn push(&mut self, row: TextEmbeddingRow) -> Result<()> {
        let embedding = &row.embedding;
        for (part, expected, found) in [
            ("t5", self.lengths.0, embedding.t5.len()),
            ("pooled", self.lengths.1, embedding.pooled.len()),
        ] {
            if expected != found {
                return Err(ArtifactError::EmbeddingSize {
                    caption_hash: caption_hash(&row.caption),
                    part,
                    expected,
                    found,
                });
            }
        }
        self.pending.push(row);
        if self.pending.len() == self.rows_per_group {
            self.flush()?;
        }
        Ok(())
    }

    /// Writes what is left and the footer, and gives the file its name.
    ///
    /// # Errors
    ///
    /// If the disk refuses.
    pub fn finish(mut self) -> Result<()> {
        self.flush()?;
        self.table.finish()
    }

    fn flush(&mut self) -> Result<()> {
        let rows = std::mem::take(&mut self.pending);
        if rows.is_empty() {
            return Ok(());
        }
        let t5 = rows.iter().map(|r| r.embedding.t5.as_slice());
        let pooled = rows.iter().map(|r| r.embedding.pooled.as_slice());
        let columns = vec![
            column(
                "caption_hash",
                rows.iter().map(|r| caption_hash(&r.caption)),
            ),
            column("caption", rows.iter().map(|r| r.caption.as_str())),
            column("num_t5_tokens", rows.iter().map(|r| r.num_t5_tokens)),
            half_lists("t5", self.lengths.0, t5),
            half_lists("pooled", self.lengths.1, pooled),
        ];
        let group = DataFrame::new_infer_height(columns)
            .expect("columns of equal length and distinct names");
        self.table.write_row_group(&group)
    }
}

/// A column of equally long lists of half floats.
fn half_lists<'a>(name: &str, length: usize, lists: impl Iterator<Item = &'a [f16]>) -> Column {
    let mut numbers: Vec<pf16> = Vec::new();
    let mut rows = 0;
    for list in lists {
        numbers.extend(list.iter().map(|&number| pf16(number)));
        rows += 1;
    }
    let dtype = half_list_type(length);
    let array = FixedSizeListArray::new(
        dtype.clone(),
        rows,
        PrimitiveArray::from_vec(numbers).boxed(),
        None,
    );
    let field = ArrowField::new(name.into(), dtype, true);
    Series::try_from((&field, vec![array.boxed()]))
        .expect("polars has a type for lists of half floats")
        .into()
}

fn half_list_type(length: usize) -> ArrowDataType {
    let item = ArrowField::new(
        PlSmallStr::from_static("item"),
        ArrowDataType::Float16,
        true,
    );
    ArrowDataType::FixedSizeList(Box::new(item), length)
}

/// An open table: the captions are in memory, embeddings are read when asked for.
pub struct TextEmbeddings {
    file: ParquetFile,
    header: TextEmbeddingHeader,
    hashes: Vec<String>,
    captions: Vec<String>,
    num_t5_tokens: Vec<u32>,
    row_of: HashMap<String, usize>,
    t5: Field,
    pooled: Field,
}

impl TextEmbeddings {
    /// Opens a table and checks all of it but the embeddings' numbers.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, a footer entry or column is missing or wrong, a hash is not its caption's or appears
    /// twice.
    pub fn open(path: &Path) -> Result<Self> {
        let file = ParquetFile::open(path)?;
        let header = TextEmbeddingHeader::from_footer(path, &file.footer())?;
        let lengths = header.lengths(path)?;
        let hashes = file.strings("caption_hash")?;
        let captions = file.strings("caption")?;
        check_hashes(path, &hashes, &captions)?;
        let num_t5_tokens = file.u32s("num_t5_tokens")?;
        let t5 = half_list_field(&file, "t5", lengths.0)?;
        let pooled = half_list_field(&file, "pooled", lengths.1)?;
        let row_of = index_of(&file, "caption_hash", &hashes)?;
        Ok(Self {
            file,
            header,
            hashes,
            captions,
            num_t5_tokens,
            row_of,
            t5,
            pooled,
        })
    }

    /// Sizes and digests.
    pub fn header(&self) -> &TextEmbeddingHeader {
        &self.header
    }

    /// How many captions it has.
    pub fn len(&self) -> usize {
        self.hashes.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    /// The caption hashes, in the file's order.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &str> {
        self.hashes.iter().map(String::as_str)
    }

    /// Whether it has a caption with this hash.
    pub fn contains(&self, caption_hash: &str) -> bool {
        self.row_of.contains_key(caption_hash)
    }

    /// The caption of a hash.
    pub fn caption(&self, caption_hash: &str) -> Option<&str> {
        self.row_of
            .get(caption_hash)
            .map(|&row| self.captions[row].as_str())
    }

    /// The embedding of a caption's hash, `None` if the table does not have it.
    ///
    /// # Errors
    ///
    /// If the file is damaged there.
    pub fn get(&self, caption_hash: &str) -> Result<Option<Embedding>> {
        let Some(&row) = self.row_of.get(caption_hash) else {
            return Ok(None);
        };
        Ok(Some(Embedding {
            t5: read_half_list(&self.file, &self.t5, row)?,
            pooled: read_half_list(&self.file, &self.pooled, row)?,
        }))
    }

    /// As [`Self::get`] with everything that is known of the caption, to copy it into another table.
    ///
    /// # Errors
    ///
    /// If the file is damaged there.
    pub fn row(&self, caption_hash: &str) -> Result<Option<TextEmbeddingRow>> {
        let Some(&row) = self.row_of.get(caption_hash) else {
            return Ok(None);
        };
        Ok(self.get(caption_hash)?.map(|embedding| TextEmbeddingRow {
            caption: self.captions[row].clone(),
            num_t5_tokens: self.num_t5_tokens[row],
            embedding,
        }))
    }
}

/// The row of every key; a key that appears twice is an error.
pub(crate) fn index_of(
    file: &ParquetFile,
    column: &str,
    keys: &[String],
) -> Result<HashMap<String, usize>> {
    let mut row_of = HashMap::with_capacity(keys.len());
    for (row, key) in keys.iter().enumerate() {
        if let Some(first) = row_of.insert(key.clone(), row) {
            let found = format!(
                "{} as in row {first}",
                key.chars().take(80).collect::<String>()
            );
            return Err(file.wrong_cell(column, row, "each key once", found));
        }
    }
    Ok(row_of)
}

/// The field of a column of `length` half floats a row.
fn half_list_field(file: &ParquetFile, column: &str, length: usize) -> Result<Field> {
    let expected = format!("list of {length} f16");
    let field = file.field(column, &expected)?;
    match &field.dtype {
        ArrowDataType::FixedSizeList(item, found)
            if item.dtype == ArrowDataType::Float16 && *found == length =>
        {
            Ok(field.clone())
        }
        _ => Err(file.wrong_type(field, &expected)),
    }
}

fn read_half_list(file: &ParquetFile, field: &Field, row: usize) -> Result<Vec<f16>> {
    let ArrowDataType::FixedSizeList(_, length) = field.dtype else {
        unreachable!("the field was checked when the table was opened");
    };
    let lists = file.decode_as::<FixedSizeListArray>(field, row..row + 1)?;
    let expected = || format!("{length} f16");
    let numbers = lists
        .iter()
        .flat_map(|list| list.iter())
        .next()
        .flatten()
        .ok_or_else(|| file.wrong_cell(&field.name, row, expected(), "an empty cell"))?;
    let numbers = numbers
        .as_any()
        .downcast_ref::<PrimitiveArray<pf16>>()
        .filter(|numbers| numbers.len() == length && numbers.null_count() == 0)
        .ok_or_else(|| file.wrong_cell(&field.name, row, expected(), "a list with empty places"))?;
    Ok(numbers.values().iter().map(|number| number.0).collect())
}

#[cfg(test)]
mod tests;
