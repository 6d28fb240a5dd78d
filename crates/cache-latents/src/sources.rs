//! The images' bytes: files below the data source, or rows of Parquet files there.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use artifacts::{ParquetImages, SampleRow};
use pipeline::recipe::IngestRecipe;
use pixel_art::{Decoded, Limits, decode_expecting};

use crate::error::CacheLatentsError;

/// Where images are fetched from; shared by all decoding threads.
pub(crate) struct Sources {
    root: PathBuf,
    limits: Limits,
    /// Open Parquet files by their name below the source.
    tables: BTreeMap<String, ParquetImages>,
}

impl Sources {
    /// Opens the Parquet files among the images' sources.
    ///
    /// # Errors
    ///
    /// If one cannot be opened or lacks the recipe's columns.
    pub(crate) fn open(
        recipe: &IngestRecipe,
        samples: &[SampleRow],
    ) -> Result<Self, CacheLatentsError> {
        let source = recipe.source.as_path();
        let root = if source.is_file() {
            source.parent().unwrap_or(source)
        } else {
            source
        };
        let mut sources = Self {
            root: root.to_path_buf(),
            limits: Limits {
                max_pixels: recipe.max_pixels,
            },
            tables: BTreeMap::new(),
        };
        for sample in samples {
            if sample.source_row.is_some() && !sources.tables.contains_key(&sample.source_file) {
                let path = sources.path(&sample.source_file)?;
                let table =
                    ParquetImages::open(&[path], &recipe.image_column, &recipe.caption_column)?;
                sources.tables.insert(sample.source_file.clone(), table);
            }
        }
        Ok(sources)
    }

    /// Fetches and decodes an image, and checks that it is still the one that was ingested.
    ///
    /// # Errors
    ///
    /// If it cannot be read or decoded, or its pixels changed.
    pub(crate) fn decode(&self, sample: &SampleRow) -> Result<Decoded, CacheLatentsError> {
        let bytes = match (sample.source_row, self.tables.get(&sample.source_file)) {
            (Some(row), Some(table)) => table.get(0, row)?.bytes,
            _ => {
                let path = self.path(&sample.source_file)?;
                fs_err::read(&path).map_err(|source| CacheLatentsError::Read { path, source })?
            }
        };
        decode_expecting(&bytes, &self.limits, &sample.sample_id).map_err(|source| {
            CacheLatentsError::Image {
                source_file: sample.source_file.clone(),
                source_row: sample.source_row,
                source,
            }
        })
    }

    /// A name from a table as a path, if it stays below the source.
    fn path(&self, source_file: &str) -> Result<PathBuf, CacheLatentsError> {
        let name = Path::new(source_file);
        let stays = !source_file.is_empty()
            && name
                .components()
                .all(|component| matches!(component, Component::Normal(_)));
        if stays {
            Ok(self.root.join(name))
        } else {
            Err(CacheLatentsError::OutsideSource {
                source_file: source_file.to_owned(),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_leaves_the_source_is_refused() {
        let sources = Sources {
            root: PathBuf::from("/data"),
            limits: Limits { max_pixels: 1 },
            tables: BTreeMap::new(),
        };
        for name in ["../secret.png", "/etc/passwd", "a/../../b", ""] {
            let refused = matches!(
                sources.path(name),
                Err(CacheLatentsError::OutsideSource { .. })
            );
            assert!(refused, "{name}");
        }
        assert_eq!(
            sources.path("a/b.png").expect("below the source"),
            Path::new("/data/a/b.png")
        );
    }
}
