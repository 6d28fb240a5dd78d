//! The batches of rows that were decoded last, for readers that come back to them in any order.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::ParquetImage;
use super::batch::Batch;

/// Batches are kept up to this many bytes, all files together: a data set of thousands of sprites is decoded once,
/// whatever the order. The newest batch is kept however large it is.
const KEPT_BYTES: usize = 256 << 20;

/// Decoded batches, the latest used last. Threads share it, and files that are opened together.
pub(crate) struct Kept {
    batches: Mutex<VecDeque<(PathBuf, Arc<Batch>)>>,
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

impl Kept {
    /// A row of a file, if its batch is here.
    pub fn get(&self, path: &Path, file: usize, row: u32) -> Option<ParquetImage> {
        let mut batches = self.batches.lock().unwrap_or_else(PoisonError::into_inner);
        let index = batches
            .iter()
            .position(|(kept, batch)| kept == path && batch.file() == file && batch.has(row))?;
        let (kept, batch) = batches.remove(index)?;
        batches.push_back((kept, Arc::clone(&batch)));
        drop(batches);
        batch.get(row)
    }

    /// Keeps a batch, and lets go of the longest unused ones that it displaces.
    pub(super) fn put(&self, path: &Path, batch: Arc<Batch>) {
        let mut batches = self.batches.lock().unwrap_or_else(PoisonError::into_inner);
        batches.push_back((path.to_path_buf(), batch));
        let mut total: usize = batches.iter().map(|(_, batch)| batch.num_bytes()).sum();
        while total > self.max_bytes && batches.len() > 1 {
            total -= batches
                .pop_front()
                .map_or(0, |(_, batch)| batch.num_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use polars_arrow::array::BinaryViewArray;

    use super::*;

    fn batch(rows: std::ops::Range<u32>) -> Arc<Batch> {
        let pictures = rows.clone().map(|row| vec![row as u8; 1000]);
        let pictures = BinaryViewArray::from_slice_values(pictures.collect::<Vec<_>>());
        Arc::new(Batch::new(0, rows.start, vec![pictures.boxed()], Vec::new()).expect("binary"))
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
