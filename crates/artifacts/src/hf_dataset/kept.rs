//! The batches of rows that were decoded last, for readers that come back to them in any order.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::ParquetImage;

/// Pictures are kept up to this many bytes, all files together: a data set of thousands of sprites is decoded once,
/// whatever the order. The newest batch is kept however large it is.
const KEPT_BYTES: usize = 256 << 20;

/// Decoded batches, the latest used last. Threads share it, and files that are opened together.
pub(crate) struct Kept {
    batches: Mutex<VecDeque<Batch>>,
    max_bytes: usize,
}

impl Default for Kept {
    fn default() -> Self {
        Self {
            batches: Mutex::default(),
            max_bytes: KEPT_BYTES,
        }
    }
}

struct Batch {
    path: PathBuf,
    images: Arc<Vec<ParquetImage>>,
    num_bytes: usize,
}

impl Kept {
    /// A row of a file, if its batch is here.
    pub fn get(&self, path: &Path, file: usize, row: u32) -> Option<ParquetImage> {
        let mut batches = self.batches.lock().unwrap_or_else(PoisonError::into_inner);
        let index = batches
            .iter()
            .position(|batch| batch.path == path && find(&batch.images, file, row).is_some())?;
        let batch = batches.remove(index)?;
        let images = Arc::clone(&batch.images);
        batches.push_back(batch);
        drop(batches);
        find(&images, file, row).cloned()
    }

    /// Keeps a batch, and lets go of the longest unused ones that it displaces.
    pub fn put(&self, path: &Path, images: Vec<ParquetImage>) {
        let num_bytes = images
            .iter()
            .map(|image| image.bytes.len() + size_of::<ParquetImage>())
            .sum();
        let mut batches = self.batches.lock().unwrap_or_else(PoisonError::into_inner);
        batches.push_back(Batch {
            path: path.to_path_buf(),
            images: Arc::new(images),
            num_bytes,
        });
        let mut total: usize = batches.iter().map(|batch| batch.num_bytes).sum();
        while total > self.max_bytes && batches.len() > 1 {
            total -= batches.pop_front().map_or(0, |batch| batch.num_bytes);
        }
    }
}

/// A row of a batch, whose rows follow each other.
fn find(images: &[ParquetImage], file: usize, row: u32) -> Option<&ParquetImage> {
    let place = row.checked_sub(images.first()?.row)?;
    images
        .get(place as usize)
        .filter(|image| image.file == file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(rows: std::ops::Range<u32>) -> Vec<ParquetImage> {
        let image = |row| ParquetImage {
            file: 0,
            row,
            bytes: vec![row as u8; 1000],
            path: None,
            caption: None,
        };
        rows.map(image).collect()
    }

    #[test]
    fn the_longest_unused_batch_goes_first_and_the_newest_stays() {
        let kept = Kept {
            max_bytes: 2500,
            ..Kept::default()
        };
        let path = Path::new("a.parquet");
        let has = |row| kept.get(path, 0, row).is_some();
        kept.put(path, batch(0..1));
        kept.put(path, batch(1..2));
        assert!(has(1) && has(0) && !has(2));
        assert!(kept.get(path, 1, 0).is_none() && kept.get(Path::new("b"), 0, 0).is_none());
        kept.put(path, batch(2..3));
        assert!(has(0) && !has(1) && has(2));
        kept.put(path, batch(3..9));
        assert!(!has(0) && !has(2) && has(3) && has(8));
        assert_eq!(kept.get(path, 0, 5).expect("kept").bytes[0], 5);
    }
}
