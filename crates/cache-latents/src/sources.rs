//! The images' pixels: fetched from below the data source, decoded, and known to be those that were ingested.

use artifacts::{SampleRow, SourceImages};
use pipeline::recipe::IngestRecipe;
use pixel_art::{Decoded, Limits, decode_expecting};

use crate::error::CacheLatentsError;

/// Where images come from; shared by all decoding threads.
pub(crate) struct Sources {
    images: SourceImages,
    limits: Limits,
}

impl Sources {
    /// The source that the recipe names.
    pub(crate) fn new(recipe: &IngestRecipe) -> Self {
        Self {
            images: SourceImages::new(&recipe.source, &recipe.image_column, &recipe.caption_column),
            limits: Limits {
                max_pixels: recipe.max_pixels,
            },
        }
    }

    /// Fetches and decodes an image, and checks that it is still the one that was ingested.
    ///
    /// # Errors
    ///
    /// If it cannot be read or decoded, or its pixels changed.
    pub(crate) fn decode(&self, sample: &SampleRow) -> Result<Decoded, CacheLatentsError> {
        let bytes = self
            .images
            .bytes(
                &sample.source_file,
                sample.source_row,
                self.limits.max_file_bytes(),
            )
            .map_err(|source| CacheLatentsError::Fetch {
                source_file: sample.source_file.clone(),
                source_row: sample.source_row,
                source: Box::new(source),
            })?;
        decode_expecting(&bytes, &self.limits, &sample.sample_id).map_err(|source| {
            CacheLatentsError::Image {
                source_file: sample.source_file.clone(),
                source_row: sample.source_row,
                source,
            }
        })
    }
}
