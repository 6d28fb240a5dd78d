//! The pages of a column chunk: checked and listed once, so that a read decodes only those that hold its rows.
//!
//! Pages follow each other, a dictionary first. A page of a column outside lists has a row for each of its values. In a
//! list column a row begins at every value of repetition level 0 and may go on over several pages; how many rows begin in
//! a page is in its levels alone, so these pages are decompressed once, one at a time, to count them.
//!
//! The decoder is handed the dictionary and the selected pages as if they were the chunk. Left to itself it would
//! decompress every page of a nested column for a single row (`collect_nested`, polars-parquet 0.55).

use std::io::Cursor;
use std::ops::Range;

use polars_buffer::Buffer;
use polars_parquet::parquet::compression::DecompressionContext;
use polars_parquet::parquet::encoding::Encoding;
use polars_parquet::parquet::encoding::hybrid_rle::{HybridRleChunk, HybridRleDecoder};
use polars_parquet::parquet::error::ParquetResult;
use polars_parquet::parquet::page::{CompressedPage, split_buffer};
use polars_parquet::parquet::read::PageMetaData;
use polars_parquet::parquet::read::levels::get_bit_width;
use polars_parquet::read::{ColumnChunkMetadata, Page, PageReader, decompress};

/// A page may always expand to this much …
const FREE_PAGE_BYTES: usize = 64 << 20;
/// … and beyond it only to so many times its compressed size.
const MAX_EXPANSION: usize = 256;
/// So many values may always be decoded at once: run lengths put whole lists of equal numbers into a few bytes …
const FREE_VALUES: usize = 1 << 27;
/// … and beyond it only so many for each byte of the expanded pages.
const MAX_VALUES_PER_BYTE: usize = 64;

/// A page and what is wrong with it.
pub(super) type PageProblem = (usize, &'static str);

/// Where the pages of a chunk lie and which rows they hold.
#[derive(Debug)]
pub(super) struct PageIndex {
    meta: PageMetaData,
    /// Length of the dictionary page with its header, and what it expands to; 0 if there is none.
    dictionary_len: usize,
    dictionary_bytes: usize,
    pages: Vec<DataPage>,
    /// One past the last page's last byte.
    end: usize,
}

#[derive(Debug)]
struct DataPage {
    /// Where its header starts, from the chunk's start.
    start: usize,
    num_values: usize,
    uncompressed_bytes: usize,
    /// The first row that begins in this page or after it.
    first_row: usize,
    /// Whether its first values belong to the row before `first_row`.
    continues: bool,
    uses_dictionary: bool,
}

/// Pages that hold some rows, to be read as if they were a chunk.
pub(super) struct Selection {
    /// The pages' bytes, behind the dictionary's if they need it.
    pub bytes: Buffer<u8>,
    meta: PageMetaData,
    /// The rows, counted from the first that begins in these pages.
    pub rows: Range<usize>,
    /// What the pages expand to, with the dictionary if they need it.
    pub expanded_bytes: usize,
}

impl Selection {
    /// A reader of these pages.
    pub fn reader(&self) -> PageReader {
        let max_page_bytes = self.bytes.len();
        PageReader::new_with_page_meta(
            Cursor::new(self.bytes.clone()),
            self.meta.clone(),
            Vec::new(),
            max_page_bytes,
        )
    }
}

impl PageIndex {
    /// Walks over a chunk's pages; they must lie inside it, expand to a sane size and hold as many values as the footer
    /// says, in `num_rows` rows. Takes some 50 bytes for each page, and for a list column as much as its largest page.
    pub fn of(
        chunk: &Buffer<u8>,
        metadata: &ColumnChunkMetadata,
        num_rows: usize,
    ) -> Result<Self, PageProblem> {
        let meta = PageMetaData::from(metadata);
        let total = usize::try_from(meta.num_values).unwrap_or(0);
        let mut index = Self {
            meta,
            dictionary_len: 0,
            dictionary_bytes: 0,
            pages: Vec::new(),
            end: 0,
        };
        if total > 0 {
            index.take_dictionary(chunk)?;
        }
        let mut context = DecompressionContext::Unset;
        let [mut values, mut rows] = [0usize; 2];
        while values < total {
            let page = usize::from(index.dictionary_len > 0) + index.pages.len();
            let mut reader = index.reader_at(chunk, index.end);
            let data = match reader.next() {
                Some(Ok(CompressedPage::Data(data))) => data,
                Some(Ok(CompressedPage::Dict(_))) => {
                    return Err((page, "it is a second dictionary"));
                }
                Some(Err(_)) | None => {
                    return Err((page, "its header is unreadable or reaches past the chunk"));
                }
            };
            if !sane(data.uncompressed_size(), data.compressed_size()) {
                return Err((page, "it expands absurdly"));
            }
            let mut entry = DataPage {
                start: index.end,
                num_values: data.num_values(),
                uncompressed_bytes: data.uncompressed_size(),
                first_row: rows,
                continues: false,
                uses_dictionary: matches!(
                    Encoding::try_from(data.header().encoding()),
                    Ok(Encoding::RleDictionary | Encoding::PlainDictionary)
                ),
            };
            values = values.saturating_add(entry.num_values);
            if index.meta.descriptor.max_rep_level == 0 {
                rows = rows.saturating_add(entry.num_values);
            } else {
                let begun = RowStarts::of(CompressedPage::Data(data), &mut context)
                    .map_err(|_| (page, "its repetition levels are unreadable"))?;
                if begun.num_levels != entry.num_values {
                    return Err((page, "it has another number of levels than of values"));
                }
                rows += begun.count;
                entry.continues = begun.continues;
            }
            index.pages.push(entry);
            index.end = reader.into_inner().0.position() as usize;
        }
        let past = usize::from(index.dictionary_len > 0) + index.pages.len();
        if values != total {
            return Err((
                past,
                "the pages hold another number of values than the footer says",
            ));
        }
        if rows != num_rows {
            return Err((
                past,
                "the pages hold another number of rows than the footer says",
            ));
        }
        Ok(index)
    }

    fn take_dictionary(&mut self, chunk: &Buffer<u8>) -> Result<(), PageProblem> {
        let header = PageHeader::parse(chunk).ok_or((0, "its header is unreadable"))?;
        if !header.is_dictionary {
            return Ok(());
        }
        if !sane(header.uncompressed_bytes, header.compressed_bytes) {
            return Err((0, "its dictionary expands absurdly"));
        }
        let mut reader = self.reader_at(chunk, 0);
        reader
            .read_dict()
            .map_err(|_| (0, "its dictionary is unreadable"))?;
        self.dictionary_len = reader.into_inner().0.position() as usize;
        self.dictionary_bytes = header.uncompressed_bytes;
        self.end = self.dictionary_len;
        Ok(())
    }

    fn reader_at(&self, chunk: &Buffer<u8>, position: usize) -> PageReader {
        let mut cursor = Cursor::new(chunk.clone());
        cursor.set_position(position as u64);
        PageReader::new_with_page_meta(cursor, self.meta.clone(), Vec::new(), chunk.len())
    }

    /// The pages that hold `rows` of the chunk, a range inside it that is not empty. Only a dictionary that is far from
    /// them is copied.
    pub fn select(&self, chunk: &Buffer<u8>, rows: Range<usize>) -> Result<Selection, PageProblem> {
        let after = self
            .pages
            .partition_point(|page| page.first_row <= rows.start);
        // Row 0 begins in the first page, so one page is at or before every row.
        let first = after.saturating_sub(1);
        let more = self.pages[after..].iter().take_while(|page| {
            page.first_row < rows.end || (page.first_row == rows.end && page.continues)
        });
        let end = after + more.count();
        let pages = &self.pages[first..end];
        let num_values: usize = pages.iter().map(|page| page.num_values).sum();
        let expanded: usize = pages.iter().map(|page| page.uncompressed_bytes).sum();
        if num_values > FREE_VALUES.max(expanded.saturating_mul(MAX_VALUES_PER_BYTE)) {
            let page = usize::from(self.dictionary_len > 0) + first;
            return Err((page, "it has absurdly many values for its size"));
        }
        let start = pages.first().map_or(self.end, |page| page.start);
        let stop = self.pages.get(end).map_or(self.end, |page| page.start);
        let needs_dictionary = pages.iter().any(|page| page.uses_dictionary);
        let bytes = if !needs_dictionary {
            chunk.clone().sliced(start..stop)
        } else if start == self.dictionary_len {
            chunk.clone().sliced(0..stop)
        } else {
            Buffer::from([&chunk[..self.dictionary_len], &chunk[start..stop]].concat())
        };
        let skipped = pages.first().map_or(0, |page| page.first_row);
        Ok(Selection {
            bytes,
            meta: PageMetaData {
                num_values: num_values as i64, // at most the chunk's, which is one
                ..self.meta.clone()
            },
            rows: rows.start - skipped..rows.end - skipped,
            expanded_bytes: if needs_dictionary {
                expanded.saturating_add(self.dictionary_bytes)
            } else {
                expanded
            },
        })
    }
}

fn sane(uncompressed: usize, compressed: usize) -> bool {
    uncompressed <= FREE_PAGE_BYTES.max(compressed.saturating_mul(MAX_EXPANSION))
}

/// What the repetition levels of a page say of rows.
struct RowStarts {
    /// How many begin in it.
    count: usize,
    /// Whether its first value belongs to a row that began before.
    continues: bool,
    num_levels: usize,
}

impl RowStarts {
    fn of(page: CompressedPage, context: &mut DecompressionContext) -> ParquetResult<Self> {
        let Page::Data(page) = decompress(page, &mut Vec::new(), context)? else {
            unreachable!("a data page expands to a data page");
        };
        let levels = split_buffer(&page)?.rep;
        let num_bits = get_bit_width(page.descriptor.max_rep_level);
        let mut starts = Self {
            count: 0,
            continues: false,
            num_levels: 0,
        };
        for run in HybridRleDecoder::new(levels, num_bits, page.num_values()).into_chunk_iter() {
            match run? {
                HybridRleChunk::Rle(level, length) => starts.push(level, length),
                HybridRleChunk::Bitpacked(mut levels) => {
                    let mut levels = levels.chunked();
                    while let Some((levels, length)) = levels.next_inexact() {
                        for level in &levels[..length] {
                            starts.push(*level, 1);
                        }
                    }
                }
            }
        }
        Ok(starts)
    }

    fn push(&mut self, level: u32, length: usize) {
        if self.num_levels == 0 {
            self.continues = level != 0 && length > 0;
        }
        if level == 0 {
            self.count += length;
        }
        self.num_levels += length;
    }
}

/// The start of a page header, in Thrift's compact protocol: three i32 fields, each a byte 0x15 (next field, i32) and a
/// zigzag varint. The library keeps these of a dictionary page to itself.
pub(super) struct PageHeader {
    pub is_dictionary: bool,
    pub uncompressed_bytes: usize,
    pub compressed_bytes: usize,
}

impl PageHeader {
    pub fn parse(chunk: &[u8]) -> Option<Self> {
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

#[cfg(test)]
mod tests;
