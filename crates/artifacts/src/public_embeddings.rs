//! The public recipe's embeddings: a Parquet file with lists of doubles, keyed by image.
//!
//! Columns, as its `compute_embeddings.py` writes them: `image_hash` (SHA-256 of PIL's raw buffer), `prompt_embeds`
//! (T5 states, `tokens × width`), `pooled_prompt_embeds`, `text_ids` (`tokens × 3`). The file says nothing of its sizes,
//! models or captions; the sizes follow from the lists' lengths, since there are three text ids to a token.

use std::collections::HashMap;
use std::path::Path;
use std::sync::OnceLock;

use polars_arrow::array::{Array, ListArray, PrimitiveArray};
use polars_arrow::datatypes::{ArrowDataType, Field};

use crate::error::Result;
use crate::parquet_read::ParquetFile;
use crate::text_embeddings::index_of;

/// Text ids are decoded so many bytes at a time. Writers put thousands of these constant lists into one page, which must
/// be decoded whole for any of them.
const IDS_BYTES: usize = 16 << 20;

/// What the encoders made of one image's caption.
#[derive(Debug, Clone, PartialEq)]
pub struct PublicEmbedding {
    /// T5 states, token by token: `(tokens, width)` row by row.
    pub t5: Vec<f32>,
    /// CLIP's pooled vector.
    pub pooled: Vec<f32>,
}

/// An open file in the public recipe's layout: hashes are in memory, embeddings are read when asked for.
pub struct PublicEmbeddings {
    file: ParquetFile,
    hashes: Vec<String>,
    row_of: HashMap<String, usize>,
    prompt_embeds: Field,
    pooled_prompt_embeds: Field,
    text_ids: Field,
    t5_tokens: usize,
    t5_width: usize,
    pooled_width: usize,
    /// How many text ids each row has, if they can be read and are finite; nobody needs the ids themselves.
    num_ids: OnceLock<Vec<Option<usize>>>,
}

/// Opens a file in the public recipe's layout.
///
/// # Errors
///
/// If the file cannot be read, a column is missing or of another type, a hash appears twice, or the first row's lists do
/// not give whole tokens. Every other row is checked against the first when it is read.
pub fn read_public_embeddings(path: &Path) -> Result<PublicEmbeddings> {
    let file = ParquetFile::open(path)?;
    let hashes = file.strings("image_hash")?;
    let row_of = index_of(&file, "image_hash", &hashes)?;
    let [prompt_embeds, pooled_prompt_embeds, text_ids] =
        ["prompt_embeds", "pooled_prompt_embeds", "text_ids"]
            .map(|column| number_list_field(&file, column));
    let mut embeddings = PublicEmbeddings {
        hashes,
        row_of,
        prompt_embeds: prompt_embeds?,
        pooled_prompt_embeds: pooled_prompt_embeds?,
        text_ids: text_ids?,
        t5_tokens: 0,
        t5_width: 0,
        pooled_width: 0,
        num_ids: OnceLock::new(),
        file,
    };
    if !embeddings.is_empty() {
        embeddings.infer_sizes()?;
    }
    Ok(embeddings)
}

impl PublicEmbeddings {
    /// How many images it has.
    pub fn len(&self) -> usize {
        self.hashes.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    /// The image hashes, in the file's order.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &str> {
        self.hashes.iter().map(String::as_str)
    }

    /// T5 tokens of an embedding, padding included; 0 if there is no row.
    pub fn t5_tokens(&self) -> usize {
        self.t5_tokens
    }

    /// Width of a T5 state; 0 if there is no row.
    pub fn t5_width(&self) -> usize {
        self.t5_width
    }

    /// Width of CLIP's pooled vector; 0 if there is no row.
    pub fn pooled_width(&self) -> usize {
        self.pooled_width
    }

    /// The embedding of an image's hash, `None` if the file does not have it.
    ///
    /// # Errors
    ///
    /// If the row's lists have other lengths than the first row's, or hold empty places or numbers that are not finite.
    pub fn get(&self, image_hash: &str) -> Result<Option<PublicEmbedding>> {
        let Some(&row) = self.row_of.get(image_hash) else {
            return Ok(None);
        };
        let num_ids = match self.num_ids.get_or_init(|| self.count_ids())[row] {
            Some(num_ids) => num_ids,
            // Whatever is wrong with them, it is said again here.
            None => self.numbers(&self.text_ids, row)?.len(),
        };
        self.check_length(&self.text_ids, row, self.t5_tokens * 3, num_ids)?;
        let t5 = self.numbers(&self.prompt_embeds, row)?;
        self.check_length(
            &self.prompt_embeds,
            row,
            self.t5_tokens * self.t5_width,
            t5.len(),
        )?;
        let pooled = self.numbers(&self.pooled_prompt_embeds, row)?;
        self.check_length(
            &self.pooled_prompt_embeds,
            row,
            self.pooled_width,
            pooled.len(),
        )?;
        Ok(Some(PublicEmbedding { t5, pooled }))
    }

    fn infer_sizes(&mut self) -> Result<()> {
        let ids = self.numbers(&self.text_ids, 0)?.len();
        let states = self.numbers(&self.prompt_embeds, 0)?.len();
        let pooled = self.numbers(&self.pooled_prompt_embeds, 0)?.len();
        let wrong = |column: &str, expected: String, found: usize| {
            self.file
                .wrong_cell(column, 0, expected, format!("{found} numbers"))
        };
        if ids == 0 || !ids.is_multiple_of(3) {
            return Err(wrong("text_ids", "three numbers a token".to_owned(), ids));
        }
        let tokens = ids / 3;
        if states == 0 || !states.is_multiple_of(tokens) {
            let expected =
                format!("a multiple of {tokens} numbers, one state for each token of text_ids");
            return Err(wrong("prompt_embeds", expected, states));
        }
        if pooled == 0 {
            return Err(wrong(
                "pooled_prompt_embeds",
                "at least one number".to_owned(),
                pooled,
            ));
        }
        (self.t5_tokens, self.t5_width, self.pooled_width) = (tokens, states / tokens, pooled);
        Ok(())
    }

    fn check_length(&self, field: &Field, row: usize, expected: usize, found: usize) -> Result<()> {
        if expected == found {
            return Ok(());
        }
        let expected = format!("{expected} numbers as in row 0");
        let found = format!("{found} numbers");
        Err(self.file.wrong_cell(&field.name, row, expected, found))
    }

    fn count_ids(&self) -> Vec<Option<usize>> {
        let rows_at_once = (IDS_BYTES / (self.t5_tokens * 3 * size_of::<f64>())).max(1);
        let mut counts = Vec::with_capacity(self.len());
        for start in (0..self.len()).step_by(rows_at_once) {
            let rows = start..(start + rows_at_once).min(self.len());
            let count = |list: Option<Box<dyn Array>>| Some(numbers_of(list).ok()?.len());
            match self
                .file
                .decode_as::<ListArray<i64>>(&self.text_ids, rows.clone())
            {
                Ok(lists) => counts.extend(lists.iter().flat_map(|list| list.iter()).map(count)),
                Err(_) => counts.extend(rows.map(|_| None)),
            }
        }
        counts
    }

    /// One row's list.
    fn numbers(&self, field: &Field, row: usize) -> Result<Vec<f32>> {
        let lists = self.file.decode_as::<ListArray<i64>>(field, row..row + 1)?;
        let list = lists.iter().flat_map(|list| list.iter()).next().flatten();
        numbers_of(list).map_err(|found| {
            self.file
                .wrong_cell(&field.name, row, "a list of finite numbers", found)
        })
    }
}

/// A cell's numbers, or what was found instead.
fn numbers_of(list: Option<Box<dyn Array>>) -> Result<Vec<f32>, String> {
    let list = list.ok_or("an empty cell")?;
    if list.null_count() > 0 {
        return Err("a list with empty places".to_owned());
    }
    let numbers: Vec<f32> = if let Some(list) = list.as_any().downcast_ref::<PrimitiveArray<f64>>()
    {
        list.values().iter().map(|&number| number as f32).collect()
    } else if let Some(list) = list.as_any().downcast_ref::<PrimitiveArray<f32>>() {
        list.values().as_slice().to_vec()
    } else {
        return Err("a list of something else".to_owned());
    };
    match numbers.iter().position(|number| !number.is_finite()) {
        Some(place) => Err(format!("{} at place {place}", numbers[place])),
        None => Ok(numbers),
    }
}

const NUMBER_LIST: &str = "list of f64 (or f32)";

fn number_list_field(file: &ParquetFile, column: &str) -> Result<Field> {
    let field = file.field(column, NUMBER_LIST)?;
    match &field.dtype {
        ArrowDataType::LargeList(item)
            if matches!(item.dtype, ArrowDataType::Float64 | ArrowDataType::Float32) =>
        {
            Ok(field.clone())
        }
        _ => Err(file.wrong_type(field, NUMBER_LIST)),
    }
}

#[cfg(test)]
mod tests;
