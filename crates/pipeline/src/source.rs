//! The files below `ingest.source`: what `ingest` reads, and what decides whether it must read again.
//!
//! A file is known by its name relative to the source and by its content. The source's own name, times and order
//! stay out, so a moved or touched data folder is the same data. Hidden files (`.DS_Store`, `.git/`) are no data.

use std::path::{Path, PathBuf};

use walkdir::WalkDir;

use crate::error::PipelineError;

/// The recipe's key for the source.
const SOURCE_KEY: &str = "ingest.source";

/// A file below the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// Path relative to the source with `/` between folders; the file's own name if the source is a file.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
}

/// All files below `source`, sorted by name; `source` itself if it is a file.
///
/// `ingest` must read these and no others.
///
/// # Errors
///
/// If the source does not exist, holds no files, has a name that is not UTF-8 or cannot be listed.
pub fn list_source(source: &Path) -> Result<Vec<SourceFile>, PipelineError> {
    if !source.exists() {
        return Err(PipelineError::NoSource {
            key: SOURCE_KEY,
            path: source.to_owned(),
        });
    }
    let root = if source.is_file() {
        source.parent().unwrap_or(source)
    } else {
        source
    };
    let mut listed = Vec::new();
    let entries = WalkDir::new(source)
        .follow_links(true)
        .into_iter()
        .filter_entry(|entry| {
            entry.depth() == 0 || !entry.file_name().as_encoded_bytes().starts_with(b".")
        });
    for entry in entries {
        let entry = entry.map_err(|error| PipelineError::CannotList {
            path: error.path().unwrap_or(source).to_owned(),
            source: error,
        })?;
        if !entry.file_type().is_file() {
            continue;
        }
        let relative = entry.path().strip_prefix(root).unwrap_or(entry.path());
        let name = relative
            .to_str()
            .ok_or_else(|| PipelineError::NameNotUtf8 {
                path: entry.path().to_owned(),
            })?
            .replace(std::path::MAIN_SEPARATOR, "/");
        listed.push(SourceFile {
            name,
            path: entry.into_path(),
        });
    }
    if listed.is_empty() {
        return Err(PipelineError::EmptySource {
            key: SOURCE_KEY,
            path: source.to_owned(),
        });
    }
    listed.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(listed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_relative_sorted_and_skip_hidden_files() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let root = dir.path().join("data");
        fs_err::create_dir_all(root.join("sub")).expect("created");
        for name in ["z.png", "sub/a.png", ".DS_Store"] {
            fs_err::write(root.join(name), b"x").expect("written");
        }
        let names: Vec<_> = list_source(&root)
            .expect("listed")
            .into_iter()
            .map(|file| file.name)
            .collect();
        assert_eq!(names, ["sub/a.png", "z.png"]);
    }

    #[test]
    fn a_single_file_is_its_own_listing() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = dir.path().join("data.parquet");
        fs_err::write(&file, b"x").expect("written");
        let listed = list_source(&file).expect("listed");
        assert_eq!(listed.len(), 1);
        assert_eq!(listed[0].name, "data.parquet");
    }

    #[test]
    fn an_absent_and_an_empty_source_are_told_apart() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let empty = list_source(dir.path());
        assert!(matches!(empty, Err(PipelineError::EmptySource { .. })));
        let absent = list_source(&dir.path().join("nowhere"));
        assert!(matches!(absent, Err(PipelineError::NoSource { .. })));
    }
}
