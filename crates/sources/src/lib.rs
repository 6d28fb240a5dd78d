//! Data sources of captioned pictures, as people have them: found, listed and read, judged by nobody.
//!
//! ```text
//! folder + metadata.jsonl / .csv ─┐
//! folder + .txt captions ─────────┼─ Source ─ SourceImage: place, caption or what is wrong with it, pixels on demand
//! Hugging Face Parquet ───────────┘
//! ```
//!
//! What is made of it is the reader's: `ingest` takes a picture once and keeps a table of what it left out, `pretrain`
//! takes every pair and stops at a picture that it cannot use.
//!
//! `layout` finds which of the three a source is, `metadata` reads its files, `image` is one picture, `problem` what can
//! be wrong with it; what is wrong with a whole source is `error`.

#![forbid(unsafe_code)]

mod error;
mod problem;

mod image;
mod layout;
mod metadata;

#[cfg(test)]
mod tests;

use std::path::Path;

pub use error::{MetadataProblem, SourceError};
pub use image::SourceImage;
pub use layout::Source;
pub use problem::{LISTED, Problem, advice, place, rejects_text};

/// A source as a recipe names it.
#[derive(Clone, Copy, Debug)]
pub struct SourceRecipe<'a> {
    /// A folder, or a Parquet file.
    pub path: &'a Path,
    /// Column of the pictures (Parquet).
    pub image_column: &'a str,
    /// Column or key of the captions (Parquet and `metadata.*`).
    pub caption_column: &'a str,
    /// What the recipe calls these three.
    pub keys: &'static SourceKeys,
}

/// A recipe's keys, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceKeys {
    /// Of the path, e.g. `ingest.source`.
    pub source: &'static str,
    /// Of the pictures' column.
    pub image_column: &'static str,
    /// Of the captions' column.
    pub caption_column: &'static str,
}
