//! `captions.parquet`: which caption belongs to which image, written by ingest.

use std::path::Path;

use crate::digest::digest_bytes;
use crate::error::{ArtifactError, Result};
use crate::parquet_read::ParquetFile;
use crate::parquet_write::{Footer, column, write_table};

/// One caption of one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptionRow {
    /// Identity of the picture: 64 hexadecimal digits.
    pub sample_id: String,
    /// BLAKE3 of the caption's UTF-8: 64 hexadecimal digits.
    pub caption_hash: String,
    /// The caption.
    pub caption: String,
}

/// The hash that stands for a caption: BLAKE3 of its UTF-8, 64 hexadecimal digits.
pub fn caption_hash(caption: &str) -> String {
    digest_bytes(caption.as_bytes()).to_string()
}

/// Writes the table, whole or not at all.
///
/// # Errors
///
/// If the file cannot be written.
pub fn write(path: &Path, rows: &[CaptionRow], footer: &Footer) -> Result<()> {
    write_table(
        path,
        vec![
            column("sample_id", rows.iter().map(|r| r.sample_id.as_str())),
            column("caption_hash", rows.iter().map(|r| r.caption_hash.as_str())),
            column("caption", rows.iter().map(|r| r.caption.as_str())),
        ],
        footer,
    )
}

/// Reads the table.
///
/// # Errors
///
/// If the file cannot be read, a column is missing or of another type, or a hash is not its caption's.
pub fn read(path: &Path) -> Result<Vec<CaptionRow>> {
    let file = ParquetFile::open(path)?;
    let sample_ids = file.strings("sample_id")?;
    let hashes = file.strings("caption_hash")?;
    let captions = file.strings("caption")?;
    check_hashes(path, &hashes, &captions)?;
    Ok(sample_ids
        .into_iter()
        .zip(hashes)
        .zip(captions)
        .map(|((sample_id, caption_hash), caption)| CaptionRow {
            sample_id,
            caption_hash,
            caption,
        })
        .collect())
}

/// Checks that every hash is its caption's: a caption edited by hand must not keep the old one's embedding.
pub(crate) fn check_hashes(path: &Path, hashes: &[String], captions: &[String]) -> Result<()> {
    for (row, (found, caption)) in hashes.iter().zip(captions).enumerate() {
        let expected = caption_hash(caption);
        if *found != expected {
            return Err(ArtifactError::Cell {
                path: path.to_path_buf(),
                column: "caption_hash".to_owned(),
                row,
                expected: format!("{expected}, the hash of its caption"),
                found: found.chars().take(80).collect(),
            });
        }
    }
    Ok(())
}
