//! A fixture directory: `cases.json`, one safetensors file per case, and the model that the cases ran on.
//!
//! The layout is the one that the oracle's `make_fixtures.py` writes. Nothing here knows a size: shapes come from the
//! files, parameters from `cases.json`. One key is ours: `tokenizers`, an optional path (relative to the directory) of
//! the folder that holds `tokenizer/` and `tokenizer_2/`, so that small committed sets need not carry 3 MB of
//! vocabulary each.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use artifacts::{ArtifactError, SafetensorsFile};
use serde::Deserialize;

/// Why a directory cannot be used as fixtures at all (as against a case that fails).
#[derive(Debug, thiserror::Error)]
pub enum FixtureError {
    /// `cases.json` is not there or cannot be read.
    #[error("cannot read {path}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// `cases.json` is not what it should be.
    #[error("{path} is not a list of cases")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// Another version of the layout.
    #[error("{path} has format {found}, and this program knows format 1")]
    Format {
        /// The file.
        path: PathBuf,
        /// Its `format`.
        found: u64,
    },
    /// There is nothing to check, which must not pass for success.
    #[error("{path} lists no case")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Two cases share a name, so one of them would hide the other.
    #[error("{path} lists case `{name}` twice")]
    Duplicate {
        /// The file.
        path: PathBuf,
        /// The name.
        name: String,
    },
    /// A path in `cases.json` leaves the directory.
    #[error("{path}: `{key}` is `{found}`, expected a plain relative path")]
    Path {
        /// The file.
        path: PathBuf,
        /// The key that holds the path.
        key: String,
        /// What it says.
        found: String,
    },
    /// The LoRA file that gives the names of all gradients is damaged or not there.
    #[error(transparent)]
    Lora(#[from] ArtifactError),
}

/// Top level of `cases.json`; keys that only describe how the set was made are left out.
#[derive(Debug, Deserialize)]
struct Header {
    format: u64,
    variant: String,
    seed: u64,
    #[serde(default)]
    versions: BTreeMap<String, String>,
    model: String,
    #[serde(default)]
    tokenizers: Option<String>,
    lora: String,
    lora_kohya: String,
    cases: Vec<Case>,
}

/// One line of `cases.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Case {
    /// Its name, which says what is to be run.
    pub name: String,
    /// Its safetensors file, a plain file name.
    pub file: String,
    /// The upstream function that gave the outputs.
    pub upstream: String,
    /// What the function was called with besides tensors.
    pub params: serde_json::Value,
    /// The tensors it announces, `out.*`: name to dtype and shape.
    pub outputs: BTreeMap<String, serde_json::Value>,
}

/// A fixture directory whose `cases.json` has been read and checked.
#[derive(Debug)]
pub struct FixtureSet {
    dir: PathBuf,
    header: Header,
    lora_keys: Vec<String>,
}

impl FixtureSet {
    /// Opens a directory; tensors are not touched yet.
    ///
    /// # Errors
    ///
    /// If `cases.json` is missing, malformed, empty, or names a file outside of the directory.
    pub fn open(dir: &Path) -> Result<Self, FixtureError> {
        let path = dir.join("cases.json");
        let text = fs_err::read_to_string(&path).map_err(|source| FixtureError::Unreadable {
            path: path.clone(),
            source,
        })?;
        let malformed = |source| FixtureError::Malformed {
            path: path.clone(),
            source,
        };
        let header: Header = serde_json::from_str(&text).map_err(malformed)?;
        if header.format != 1 {
            return Err(FixtureError::Format {
                path,
                found: header.format,
            });
        }
        if header.cases.is_empty() {
            return Err(FixtureError::Empty { path });
        }
        let inside = |key: &str, found: &str| {
            let plain = Path::new(found)
                .components()
                .all(|part| matches!(part, Component::Normal(_)));
            if plain && !found.is_empty() {
                Ok(())
            } else {
                Err(FixtureError::Path {
                    path: path.clone(),
                    key: key.to_owned(),
                    found: found.to_owned(),
                })
            }
        };
        inside("model", &header.model)?;
        inside("lora", &header.lora)?;
        inside("lora_kohya", &header.lora_kohya)?;
        let mut names = BTreeSet::new();
        for case in &header.cases {
            inside("file", &case.file)?;
            if !names.insert(&case.name) {
                return Err(FixtureError::Duplicate {
                    path,
                    name: case.name.clone(),
                });
            }
        }
        let lora = SafetensorsFile::open(&dir.join(&header.lora))?;
        let lora_keys = lora.names().map(str::to_owned).collect();
        Ok(Self {
            dir: dir.to_owned(),
            header,
            lora_keys,
        })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The cases in the order of `cases.json`.
    pub fn cases(&self) -> &[Case] {
        &self.header.cases
    }

    /// Which of the oracle's variants, and the seed of its random numbers.
    pub fn origin(&self) -> (&str, u64) {
        (&self.header.variant, self.header.seed)
    }

    /// The Python packages that wrote the set.
    pub fn versions(&self) -> &BTreeMap<String, String> {
        &self.header.versions
    }

    /// The diffusers model directory.
    pub fn model(&self) -> PathBuf {
        self.dir.join(&self.header.model)
    }

    /// The directory with `tokenizer/` and `tokenizer_2/`.
    pub fn tokenizers(&self) -> PathBuf {
        match &self.header.tokenizers {
            Some(path) => self.dir.join(path),
            None => self.model(),
        }
    }

    /// The LoRA in diffusers' layout.
    pub fn lora(&self) -> PathBuf {
        self.dir.join(&self.header.lora)
    }

    /// The same LoRA under kohya's keys.
    pub fn lora_kohya(&self) -> PathBuf {
        self.dir.join(&self.header.lora_kohya)
    }

    /// Every tensor name of the LoRA file: what `<lora key>` stands for in `cases.json`.
    pub fn lora_keys(&self) -> &[String] {
        &self.lora_keys
    }

    /// The names of all tensors that a case announces, without `out.`, `<lora key>` written out.
    pub fn announced_outputs(&self, case: &Case) -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        for name in case.outputs.keys() {
            let name = name.strip_prefix("out.").unwrap_or(name);
            match name.strip_suffix("<lora key>") {
                Some(head) => names.extend(self.lora_keys.iter().map(|key| format!("{head}{key}"))),
                None => {
                    names.insert(name.to_owned());
                }
            }
        }
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(json: &str) -> FixtureError {
        let dir = tempfile::tempdir().expect("a temporary directory");
        fs_err::write(dir.path().join("cases.json"), json).expect("it is writable");
        FixtureSet::open(dir.path()).expect_err("the set is bad")
    }

    fn with_cases(cases: &str) -> String {
        format!(
            r#"{{"format": 1, "variant": "a", "seed": 1, "model": "model", "lora": "l", "lora_kohya": "k", "cases": [{cases}]}}"#
        )
    }

    #[test]
    fn a_directory_without_cases_is_refused() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let error = FixtureSet::open(dir.path()).expect_err("nothing is there");
        assert!(error.to_string().contains("cases.json"), "{error}");
    }

    #[test]
    fn an_empty_list_does_not_pass_for_success() {
        assert!(matches!(open(&with_cases("")), FixtureError::Empty { .. }));
    }

    #[test]
    fn a_case_may_not_name_a_file_elsewhere() {
        let case = r#"{"name": "x", "file": "../x.safetensors", "upstream": "", "params": {}, "outputs": {}}"#;
        assert!(matches!(open(&with_cases(case)), FixtureError::Path { .. }));
    }

    #[test]
    fn two_cases_of_one_name_are_refused() {
        let case = r#"{"name": "x", "file": "x", "upstream": "", "params": {}, "outputs": {}}"#;
        let error = open(&with_cases(&format!("{case}, {case}")));
        assert!(matches!(error, FixtureError::Duplicate { .. }), "{error}");
    }
}
