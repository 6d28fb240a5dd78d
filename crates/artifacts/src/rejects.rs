//! `rejects.parquet`: one row per image that ingest could not use, and why.

use std::path::Path;

use crate::error::Result;
use crate::parquet_read::ParquetFile;
use crate::parquet_write::{Footer, column, write_table};

/// One image that was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RejectRow {
    /// Where it is: path below the data source, with `/`.
    pub source_file: String,
    /// Row in that file, if it is a table.
    pub source_row: Option<u32>,
    /// The kind of reason, in kebab-case: `zero-bytes`.
    pub reason: String,
    /// The reason in words.
    pub detail: String,
}

/// Writes the table, whole or not at all.
///
/// # Errors
///
/// If the file cannot be written.
pub fn write(path: &Path, rows: &[RejectRow], footer: &Footer) -> Result<()> {
    write_table(
        path,
        vec![
            column("source_file", rows.iter().map(|r| r.source_file.as_str())),
            column("source_row", rows.iter().map(|r| r.source_row)),
            column("reason", rows.iter().map(|r| r.reason.as_str())),
            column("detail", rows.iter().map(|r| r.detail.as_str())),
        ],
        footer,
    )
}

/// Reads the table.
///
/// # Errors
///
/// If the file cannot be read, or a column is missing or of another type.
pub fn read(path: &Path) -> Result<Vec<RejectRow>> {
    let file = ParquetFile::open(path)?;
    let mut source_file = file.strings("source_file")?.into_iter();
    let mut source_row = file.optional_u32s("source_row")?.into_iter();
    let mut reason = file.strings("reason")?.into_iter();
    let mut detail = file.strings("detail")?.into_iter();
    let row = || {
        Some(RejectRow {
            source_file: source_file.next()?,
            source_row: source_row.next()?,
            reason: reason.next()?,
            detail: detail.next()?,
        })
    };
    Ok(std::iter::from_fn(row).collect())
}
