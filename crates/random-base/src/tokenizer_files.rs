//! The tokenizers' files of a base: the published ones, JSON without its white space.
//!
//! Stripping white space takes 1 MB from T5's `tokenizer.json` and changes nothing that a reader sees.

use std::path::{Path, PathBuf};

use serde_json::Value;

/// Directory of the source, directory in the base, files.
const TOKENIZERS: [(&str, &str, &[&str]); 2] = [
    (
        "clip",
        "tokenizer",
        &[
            "vocab.json",
            "merges.txt",
            "special_tokens_map.json",
            "tokenizer_config.json",
        ],
    ),
    (
        "t5",
        "tokenizer_2",
        &[
            "spiece.model",
            "tokenizer.json",
            "special_tokens_map.json",
            "tokenizer_config.json",
        ],
    ),
];

/// Why the tokenizers' files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerFilesError {
    /// A file could not be read.
    #[error("the tokenizers need {path}, as published with FLUX.1")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is no JSON.
    #[error("{path} is not JSON")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: serde_json::Error,
    },
}

/// Reads `clip/` and `t5/` below `dir`; gives their files by the path that they have in a base.
pub(crate) fn read(dir: &Path) -> Result<Vec<(String, Vec<u8>)>, TokenizerFilesError> {
    let mut files = Vec::new();
    for (source_dir, base_dir, names) in TOKENIZERS {
        for name in names {
            let path = dir.join(source_dir).join(name);
            let bytes = fs_err::read(&path).map_err(|source| TokenizerFilesError::Read {
                path: path.clone(),
                source,
            })?;
            let bytes = if name.ends_with(".json") {
                compact(&path, &bytes)?
            } else {
                bytes
            };
            files.push((format!("{base_dir}/{name}"), bytes));
        }
    }
    Ok(files)
}

fn compact(path: &Path, bytes: &[u8]) -> Result<Vec<u8>, TokenizerFilesError> {
    let error = |source| TokenizerFilesError::Json {
        path: path.to_owned(),
        source,
    };
    // Parsed for the check only: numbers and the order of keys stay as they are written.
    serde_json::from_slice::<Value>(bytes).map_err(error)?;
    Ok(without_white_space(bytes))
}

/// Drops the white space outside of strings from what is known to be JSON.
fn without_white_space(json: &[u8]) -> Vec<u8> {
    let (mut in_string, mut escaped) = (false, false);
    json.iter()
        .copied()
        .filter(|&byte| {
            if in_string {
                match byte {
                    _ if escaped => escaped = false,
                    b'\\' => escaped = true,
                    b'"' => in_string = false,
                    _ => {}
                }
                return true;
            }
            in_string = byte == b'"';
            !matches!(byte, b' ' | b'\t' | b'\n' | b'\r')
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_goes_between_values_and_stays_in_strings() {
        let json = br#"{ "a b\" c" : [ 1.50,
            "\\" , " " ] }"#;
        let short = without_white_space(json);
        assert_eq!(short, br#"{"a b\" c":[1.50,"\\"," "]}"#);
    }

    #[test]
    fn a_missing_file_is_named() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let error = read(dir.path()).expect_err("it is empty").to_string();
        assert!(error.contains("vocab.json"), "{error}");
    }
}
