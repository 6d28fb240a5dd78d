//! `samples.parquet`: one row per distinct image, written by ingest.

use std::path::Path;

use crate::error::Result;
use crate::parquet_read::ParquetFile;
use crate::parquet_write::{Footer, column, write_table};

/// One distinct image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SampleRow {
    /// Identity of the picture: 64 hexadecimal digits.
    pub sample_id: String,
    /// SHA-256 of PIL's raw buffer, as the public recipe hashes it before it turns by EXIF.
    pub compat_sha256: String,
    /// The same after turning by EXIF; which of both the recipe used depends on its data loader.
    pub compat_sha256_oriented: String,
    /// Width after turning.
    pub width_px: u32,
    /// Height after turning.
    pub height_px: u32,
    /// Whether any pixel is not opaque.
    pub has_alpha: bool,
    /// Number of distinct colours.
    pub num_colors: u32,
    /// Where its bytes are: path below the data source, with `/`.
    pub source_file: String,
    /// Row in that file, if it is a table.
    pub source_row: Option<u32>,
}

/// Writes the table, whole or not at all.
///
/// # Errors
///
/// If the file cannot be written.
pub fn write(path: &Path, rows: &[SampleRow], footer: &Footer) -> Result<()> {
    write_table(
        path,
        vec![
            column("sample_id", rows.iter().map(|r| r.sample_id.as_str())),
            column(
                "compat_sha256",
                rows.iter().map(|r| r.compat_sha256.as_str()),
            ),
            column(
                "compat_sha256_oriented",
                rows.iter().map(|r| r.compat_sha256_oriented.as_str()),
            ),
            column("width_px", rows.iter().map(|r| r.width_px)),
            column("height_px", rows.iter().map(|r| r.height_px)),
            column("has_alpha", rows.iter().map(|r| r.has_alpha)),
            column("num_colors", rows.iter().map(|r| r.num_colors)),
            column("source_file", rows.iter().map(|r| r.source_file.as_str())),
            column("source_row", rows.iter().map(|r| r.source_row)),
        ],
        footer,
    )
}

/// Reads the table.
///
/// # Errors
///
/// If the file cannot be read, or a column is missing, of another type, or has an empty cell where none may be.
pub fn read(path: &Path) -> Result<Vec<SampleRow>> {
    let file = ParquetFile::open(path)?;
    let mut sample_id = file.strings("sample_id")?.into_iter();
    let mut compat_sha256 = file.strings("compat_sha256")?.into_iter();
    let mut compat_sha256_oriented = file.strings("compat_sha256_oriented")?.into_iter();
    let mut width_px = file.u32s("width_px")?.into_iter();
    let mut height_px = file.u32s("height_px")?.into_iter();
    let mut has_alpha = file.bools("has_alpha")?.into_iter();
    let mut num_colors = file.u32s("num_colors")?.into_iter();
    let mut source_file = file.strings("source_file")?.into_iter();
    let mut source_row = file.optional_u32s("source_row")?.into_iter();
    let row = || {
        Some(SampleRow {
            sample_id: sample_id.next()?,
            compat_sha256: compat_sha256.next()?,
            compat_sha256_oriented: compat_sha256_oriented.next()?,
            width_px: width_px.next()?,
            height_px: height_px.next()?,
            has_alpha: has_alpha.next()?,
            num_colors: num_colors.next()?,
            source_file: source_file.next()?,
            source_row: source_row.next()?,
        })
    };
    Ok(std::iter::from_fn(row).collect())
}
