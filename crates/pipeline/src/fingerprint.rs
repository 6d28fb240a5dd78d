//! Names for what a stage's result depends on: BLAKE3 over components, over lists of files, over files.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// BLAKE3 of a stage's components, as 64 hex digits; the first 16 name the artifact directory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(String);

impl Fingerprint {
    /// The fingerprint of these components.
    pub fn of(components: &BTreeMap<String, String>) -> Self {
        Self(digest_of_pairs("spritelora fingerprint", components))
    }

    /// The first 16 hex digits: the artifact directory's name.
    pub fn short(&self) -> &str {
        // A fingerprint read from a damaged manifest may be shorter.
        self.0.get(..16).unwrap_or(&self.0)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// BLAKE3 over named values in the map's order, each preceded by its length so that no two maps read the same.
pub(crate) fn digest_of_pairs(purpose: &str, pairs: &BTreeMap<String, String>) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut add = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    add(purpose);
    for (name, value) in pairs {
        add(name);
        add(value);
    }
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(list: &[(&str, &str)]) -> BTreeMap<String, String> {
        list.iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn a_fingerprint_changes_with_any_name_or_value() {
        let base = Fingerprint::of(&pairs(&[("a", "1"), ("b", "2")]));
        assert_eq!(base, Fingerprint::of(&pairs(&[("b", "2"), ("a", "1")])));
        for other in [
            pairs(&[("a", "1"), ("b", "3")]),
            pairs(&[("a", "1"), ("c", "2")]),
            pairs(&[("a", "1")]),
            pairs(&[("a", "1b"), ("", "2")]),
        ] {
            assert_ne!(base, Fingerprint::of(&other));
        }
    }

    #[test]
    fn a_directory_is_named_by_sixteen_digits() {
        assert_eq!(Fingerprint::of(&BTreeMap::new()).short().len(), 16);
    }
}
