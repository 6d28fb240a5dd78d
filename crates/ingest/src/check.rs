//! One image: decode it, name it, and say what is wrong with it if it cannot be used.

use artifacts::{ArtifactError, RejectRow, SampleRow, SourceImages};
use console::Job;
use pixel_art::{Limits, count_colors, decode};

use crate::reason::{EMPTY_CAPTION, Problem, TOO_LARGE, UNREADABLE, with_causes};

/// An image that can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Taken {
    pub sample: SampleRow,
    pub caption: String,
}

/// What became of one image.
pub(crate) type Checked = Result<Taken, RejectRow>;

/// Checks images.
pub(crate) struct Checker<'a> {
    pub limits: Limits,
    pub job: &'a Job,
}

impl Checker<'_> {
    /// An image in a file of its own.
    pub fn file(
        &self,
        images: &SourceImages,
        source_file: &str,
        caption: Result<&str, &Problem>,
    ) -> Checked {
        let done = self.caption(caption).and_then(|caption| {
            let bytes = images
                .bytes(source_file, None, self.limits.max_file_bytes())
                .map_err(|error| unreadable(&error))?;
            self.bytes(&bytes, source_file, None, caption)
        });
        self.job.advance(1);
        done.map_err(|problem| problem.at(source_file, None))
    }

    /// An image in a table's row.
    pub fn row(
        &self,
        bytes: &[u8],
        source_file: &str,
        source_row: u32,
        caption: Result<&str, &Problem>,
    ) -> Checked {
        let done = self
            .caption(caption)
            .and_then(|caption| self.bytes(bytes, source_file, Some(source_row), caption));
        self.job.advance(1);
        done.map_err(|problem| problem.at(source_file, Some(source_row)))
    }

    fn caption<'c>(&self, caption: Result<&'c str, &Problem>) -> Result<&'c str, Problem> {
        match caption {
            Ok(caption) if caption.trim().is_empty() => {
                Err(Problem::new(EMPTY_CAPTION, "its caption is empty"))
            }
            Ok(caption) => Ok(caption),
            Err(problem) => Err(problem.clone()),
        }
    }

    fn bytes(
        &self,
        bytes: &[u8],
        source_file: &str,
        source_row: Option<u32>,
        caption: &str,
    ) -> Result<Taken, Problem> {
        let image = decode(bytes, &self.limits).map_err(|error| Problem::of_image(&error))?;
        Ok(Taken {
            sample: SampleRow {
                sample_id: image.identity(),
                compat_sha256: image.compat_sha256(),
                compat_sha256_oriented: image.compat_sha256_oriented(),
                width_px: image.picture.width_px,
                height_px: image.picture.height_px,
                has_alpha: image.picture.has_alpha(),
                num_colors: count_colors(&image.picture),
                source_file: source_file.to_owned(),
                source_row,
            },
            caption: caption.to_owned(),
        })
    }
}

/// Without the file's path: the row has it already, relative, so that a moved folder gives the same table.
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
