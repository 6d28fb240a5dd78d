//! One picture of a source: where it is, its caption, its pixels when they are asked for.

use artifacts::{ArtifactError, SourceImages};
use pixel_art::{Decoded, Limits, decode};

use crate::problem::{EMPTY_CAPTION, Problem, TOO_LARGE, UNREADABLE, with_causes};

/// A picture, not yet decoded.
pub struct SourceImage<'a> {
    /// The file, relative to the source, with `/`; as written in the metadata if it is no such path.
    pub file: &'a str,
    /// Row of that file, if it is a table.
    pub row: Option<u32>,
    pub(crate) caption: Result<&'a str, &'a Problem>,
    pub(crate) content: Content<'a>,
}

/// Where the encoded bytes are.
pub(crate) enum Content<'a> {
    /// In a file of their own.
    File(&'a SourceImages),
    /// In memory.
    Row(&'a [u8]),
}

impl<'a> SourceImage<'a> {
    /// What the source says that it shows.
    ///
    /// # Errors
    ///
    /// If the caption is not there, is blank or no text, or is for a picture that is not there; and for every picture of
    /// a source that was opened [without captions](crate::Source::open_pictures).
    pub fn caption(&self) -> Result<&'a str, Problem> {
        match self.caption {
            Ok(caption) if caption.trim().is_empty() => {
                Err(Problem::new(EMPTY_CAPTION, "its caption is empty"))
            }
            Ok(caption) => Ok(caption),
            Err(problem) => Err(problem.clone()),
        }
    }

    /// Reads and decodes it.
    ///
    /// # Errors
    ///
    /// If it cannot be read, is larger than allowed, or is no picture of a format that is read.
    pub fn decode(&self, limits: &Limits) -> Result<Decoded, Problem> {
        let decoded = match self.content {
            Content::Row(bytes) => decode(bytes, limits),
            Content::File(images) => {
                let bytes = images
                    .bytes(self.file, None, limits.max_file_bytes())
                    .map_err(|error| unreadable(&error))?;
                decode(&bytes, limits)
            }
        };
        decoded.map_err(|error| Problem::of_image(&error))
    }
}

/// Without the file's path: who reports it names the file, relative, so that a moved folder gives the same table.
fn unreadable(error: &ArtifactError) -> Problem {
    match error {
        ArtifactError::SourceSize { max_bytes, .. } => Problem::new(
            TOO_LARGE,
            format!(
                "the file has more than {max_bytes} bytes, the most that an image of the allowed size can need"
            ),
        ),
        ArtifactError::Io { action, source, .. } => {
            Problem::new(UNREADABLE, format!("cannot {action} it: {source}"))
        }
        error => Problem::new(UNREADABLE, with_causes(error)),
    }
}
