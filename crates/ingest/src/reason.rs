//! Why an image is left out: the words of `rejects.parquet`, and what a person can do about each.

use artifacts::RejectRow;
use pixel_art::DecodeError;

/// The same picture with the same caption is already there. No failure, so not counted as one.
pub(crate) const DUPLICATE: &str = "duplicate";
pub(crate) const MISSING_CAPTION: &str = "missing-caption";
pub(crate) const EMPTY_CAPTION: &str = "empty-caption";
pub(crate) const CAPTION_NOT_TEXT: &str = "caption-not-text";
pub(crate) const MISSING_IMAGE: &str = "missing-image";
pub(crate) const PATH_ESCAPES: &str = "path-escapes";
pub(crate) const TOO_LARGE: &str = "too-large";
pub(crate) const UNREADABLE: &str = "unreadable";

/// What is wrong with one image or its caption.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    pub reason: &'static str,
    pub detail: String,
}

impl Problem {
    pub fn new(reason: &'static str, detail: impl Into<String>) -> Self {
        Self {
            reason,
            detail: detail.into(),
        }
    }

    pub fn of_image(error: &DecodeError) -> Self {
        Self::new(error.reason(), with_causes(error))
    }

    pub fn at(self, source_file: &str, source_row: Option<u32>) -> RejectRow {
        RejectRow {
            source_file: source_file.to_owned(),
            source_row,
            reason: self.reason.to_owned(),
            detail: self.detail,
        }
    }
}

/// A message and those of its causes, in one line.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

/// What to do about images with this reason.
pub(crate) fn advice(reason: &str) -> &'static str {
    match reason {
        MISSING_CAPTION => "give each image a caption, or take the image out",
        EMPTY_CAPTION => "write the caption, or take the image out",
        CAPTION_NOT_TEXT => "store the caption as UTF-8 text",
        MISSING_IMAGE => "put the image there, or take its line out of the metadata",
        PATH_ESCAPES => "name images by paths inside the folder",
        UNREADABLE => "check the file's permissions",
        "zero-bytes" => "fetch the file again, or remove it",
        TOO_LARGE => "scale the image down, or raise ingest.max_pixels",
        "unknown-format" => "convert the image to PNG",
        "undecodable" => "save the image again as PNG, or remove it",
        _ => "remove it",
    }
}
