//! `images.json`: what each picture of a run is, written by sample. What all pictures have in common stands beside the
//! list and is sample's own matter.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{ArtifactError, Result};

/// One picture.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageEntry {
    /// Its file, beside the index.
    pub file: String,
    /// The prompt.
    pub prompt: String,
    /// The seed.
    pub seed: u64,
    /// Number of the picture among those of one prompt and seed.
    pub image: u32,
    /// Whether the base drew it without any LoRA, to be compared with the picture of the same prompt, seed and number.
    pub without_loras: bool,
    /// BLAKE3 of its pixels, `(h w 3)`.
    pub pixels: String,
}

/// Reads the list of pictures.
///
/// # Errors
///
/// If the file cannot be read, or is not such an index.
pub fn read(path: &Path) -> Result<Vec<ImageEntry>> {
    #[derive(Deserialize)]
    struct Index {
        images: Vec<ImageEntry>,
    }
    let bytes = std::fs::read(path).map_err(|e| ArtifactError::io("read", path, e))?;
    let index: Index = serde_json::from_slice(&bytes).map_err(|source| ArtifactError::Json {
        path: path.to_path_buf(),
        source,
    })?;
    Ok(index.images)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_read_whatever_stands_beside_it() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("images.json");
        let entry = ImageEntry {
            file: "0000-a-s1.png".to_owned(),
            prompt: "a".to_owned(),
            seed: 1,
            image: 0,
            without_loras: true,
            pixels: "00".to_owned(),
        };
        let index = serde_json::json!({"settings": {"steps": 3}, "images": [entry]});
        std::fs::write(&path, index.to_string()).expect("written");
        assert_eq!(read(&path).expect("readable"), [entry]);
        std::fs::write(&path, "{\"images\": 3}").expect("written");
        let error = read(&path).expect_err("no list").to_string();
        assert!(error.contains("images.json"), "{error}");
    }
}
