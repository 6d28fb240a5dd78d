//! One image: decode it, name it, and say what is wrong with it if it cannot be used.

use artifacts::{RejectRow, SampleRow};
use console::Job;
use pixel_art::{Limits, count_colors};
use sources::{Problem, SourceImage};

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
    /// An image of the source. Without a caption it is not even read.
    pub fn check(&self, image: &SourceImage<'_>) -> Checked {
        let taken = self.take(image);
        self.job.advance(1);
        taken.map_err(|problem| problem.at(image.file, image.row))
    }

    fn take(&self, image: &SourceImage<'_>) -> Result<Taken, Problem> {
        let caption = image.caption()?;
        let decoded = image.decode(&self.limits)?;
        Ok(Taken {
            sample: SampleRow {
                sample_id: decoded.identity(),
                compat_sha256: decoded.compat_sha256(),
                compat_sha256_oriented: decoded.compat_sha256_oriented(),
                width_px: decoded.picture.width_px,
                height_px: decoded.picture.height_px,
                has_alpha: decoded.picture.has_alpha(),
                num_colors: count_colors(&decoded.picture),
                source_file: image.file.to_owned(),
                source_row: image.row,
            },
            caption: caption.to_owned(),
        })
    }
}
