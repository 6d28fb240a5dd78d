//! Why a picture cannot be used: a word for tables, a sentence for people, and what they can do about it.

use std::fmt::Write as _;

use artifacts::RejectRow;
use pixel_art::DecodeError;

pub(crate) const MISSING_CAPTION: &str = "missing-caption";
pub(crate) const EMPTY_CAPTION: &str = "empty-caption";
pub(crate) const CAPTION_NOT_TEXT: &str = "caption-not-text";
pub(crate) const MISSING_IMAGE: &str = "missing-image";
pub(crate) const PATH_ESCAPES: &str = "path-escapes";
pub(crate) const TOO_LARGE: &str = "too-large";
pub(crate) const UNREADABLE: &str = "unreadable";

/// So many single findings are listed before they are only counted.
pub const LISTED: usize = 20;

/// What is wrong with one image or its caption.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The kind, in kebab-case: `zero-bytes`.
    pub reason: &'static str,
    /// The same in words.
    pub detail: String,
}

impl Problem {
    /// A problem of a kind.
    pub fn new(reason: &'static str, detail: impl Into<String>) -> Self {
        Self {
            reason,
            detail: detail.into(),
        }
    }

    pub(crate) fn of_image(error: &DecodeError) -> Self {
        Self::new(error.reason(), with_causes(error))
    }

    /// The problem with its place.
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

/// A file, or a row of a file, as people read it.
pub fn place(source_file: &str, source_row: Option<u32>) -> String {
    match source_row {
        Some(row) => format!("{source_file} row {row}"),
        None => source_file.to_owned(),
    }
}

/// Pictures that cannot be used, a line each that begins with a line break, and how many more than those there are.
pub fn rejects_text(listed: &[RejectRow], count: u64) -> String {
    let mut text = String::new();
    for reject in listed {
        let place = place(&reject.source_file, reject.source_row);
        let _ = write!(text, "\n  - {place}: {} ({})", reject.detail, reject.reason);
    }
    let more = count.saturating_sub(listed.len() as u64);
    if more > 0 {
        let _ = write!(text, "\n  and {more} more");
    }
    text
}

/// One piece of advice per reason, in the order in which they are listed. `limit_key` is the recipe's key of the
/// largest picture, if it has one.
pub fn advice(listed: &[RejectRow], limit_key: Option<&str>) -> String {
    let mut reasons: Vec<&str> = Vec::new();
    for reject in listed {
        if !reasons.contains(&reject.reason.as_str()) {
            reasons.push(&reject.reason);
        }
    }
    let advice: Vec<String> = reasons
        .iter()
        .map(|&reason| match (reason, limit_key) {
            (TOO_LARGE, Some(key)) => format!("{reason}: scale the image down, or raise {key}"),
            _ => format!("{reason}: {}", advice_for(reason)),
        })
        .collect();
    advice.join("; ")
}

fn advice_for(reason: &str) -> &'static str {
    match reason {
        MISSING_CAPTION => "give each image a caption, or take the image out",
        EMPTY_CAPTION => "write the caption, or take the image out",
        CAPTION_NOT_TEXT => "store the caption as UTF-8 text",
        MISSING_IMAGE => "put the image there, or take its line out of the metadata",
        PATH_ESCAPES => "name images by paths inside the folder",
        UNREADABLE => "check the file's permissions",
        "zero-bytes" => "fetch the file again, or remove it",
        TOO_LARGE => "scale the image down",
        "unknown-format" => "convert the image to PNG",
        "undecodable" => "save the image again as PNG, or remove it",
        _ => "remove it",
    }
}
