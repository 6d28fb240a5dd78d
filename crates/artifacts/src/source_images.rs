//! The encoded bytes of a source image, found again by what `samples.parquet` says of it: a file, or a row of a Parquet
//! data set.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{ArtifactError, Result};
use crate::hf_dataset::{Kept, ParquetImages};

/// A data source, opened to fetch single images; its Parquet files are opened when first needed and kept.
pub struct SourceImages {
    root: PathBuf,
    image_column: String,
    text_column: String,
    tables: Mutex<BTreeMap<String, Arc<ParquetImages>>>,
    /// Shared by all tables, so that memory does not grow with their number.
    kept: Arc<Kept>,
}

impl SourceImages {
    /// A source as the recipe names it: a folder, or one file.
    pub fn new(source: &Path, image_column: &str, text_column: &str) -> Self {
        let root = match source.parent() {
            Some(parent) if source.is_file() => parent,
            _ => source,
        };
        Self {
            root: root.to_path_buf(),
            image_column: image_column.to_owned(),
            text_column: text_column.to_owned(),
            tables: Mutex::default(),
            kept: Arc::default(),
        }
    }

    /// The bytes of the image in `source_file` (relative to the source, with `/`), or in that file's row.
    ///
    /// # Errors
    ///
    /// If the name points out of the source, the file cannot be read or has more than `max_bytes`, or there is no such
    /// row.
    pub fn bytes(
        &self,
        source_file: &str,
        source_row: Option<u32>,
        max_bytes: u64,
    ) -> Result<Vec<u8>> {
        let path = self.path(source_file)?;
        match source_row {
            Some(row) => Ok(self.table(source_file, &path)?.get(0, row)?.bytes),
            None => read_at_most(&path, max_bytes),
        }
    }

    fn path(&self, source_file: &str) -> Result<PathBuf> {
        let is_plain = Path::new(source_file)
            .components()
            .all(|component| matches!(component, Component::Normal(_)));
        if is_plain && !source_file.is_empty() {
            Ok(self.root.join(source_file))
        } else {
            Err(ArtifactError::SourceName {
                root: self.root.clone(),
                name: source_file.to_owned(),
            })
        }
    }

    fn table(&self, source_file: &str, path: &Path) -> Result<Arc<ParquetImages>> {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = tables.get(source_file) {
            return Ok(Arc::clone(table));
        }
        let table = ParquetImages::open(&[path], &self.image_column, &self.text_column)?;
        let table = Arc::new(table.sharing(&self.kept));
        tables.insert(source_file.to_owned(), Arc::clone(&table));
        Ok(table)
    }
}

/// A whole file, if it has at most `max_bytes`.
fn read_at_most(path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let file = std::fs::File::open(path).map_err(|e| ArtifactError::io("open", path, e))?;
    let mut bytes = Vec::new();
    file.take(max_bytes.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|e| ArtifactError::io("read", path, e))?;
    if bytes.len() as u64 > max_bytes {
        return Err(ArtifactError::SourceSize {
            path: path.to_path_buf(),
            max_bytes,
        });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_found_below_the_source_and_nowhere_else() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::create_dir(dir.path().join("sub")).expect("created");
        std::fs::write(dir.path().join("sub/a.png"), b"abc").expect("written");
        let source = SourceImages::new(dir.path(), "image", "text");
        assert_eq!(
            source.bytes("sub/a.png", None, 3).expect("readable"),
            b"abc"
        );
        for name in ["../a.png", "/etc/passwd", "", "sub/../../x", "./sub/a.png"] {
            assert!(
                matches!(
                    source.bytes(name, None, 3),
                    Err(ArtifactError::SourceName { .. })
                ),
                "{name}"
            );
        }
        let error = source.bytes("sub/b.png", None, 3).expect_err("absent");
        assert!(error.to_string().contains("b.png"), "{error}");
    }

    #[test]
    fn a_file_larger_than_allowed_is_refused() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::write(dir.path().join("a.png"), b"abc").expect("written");
        let source = SourceImages::new(&dir.path().join("a.png"), "image", "text");
        assert_eq!(source.bytes("a.png", None, 3).expect("readable"), b"abc");
        assert!(matches!(
            source.bytes("a.png", None, 2),
            Err(ArtifactError::SourceSize { .. })
        ));
    }
}
