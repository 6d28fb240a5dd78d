//! Content digests: 32 bytes of BLAKE3, written as 64 hexadecimal digits.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{ArtifactError, Result};

/// How much of a file is read at a time; large enough to keep several threads busy with one piece.
const PIECE_BYTES: usize = 8 << 20;

/// A BLAKE3 digest. Prints, parses and serialises as 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest with these bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Its first 16 hexadecimal digits: enough to name a directory.
    pub fn short(&self) -> String {
        self.to_string()[..16].to_owned()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// Text that is not a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{found:?} is not a digest (64 hexadecimal digits)")]
pub struct ParseDigestError {
    found: String,
}

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Self, ParseDigestError> {
        match blake3::Hash::from_hex(text) {
            Ok(hash) => Ok(Self(*hash.as_bytes())),
            Err(_) => Err(ParseDigestError {
                found: text.chars().take(80).collect(),
            }),
        }
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A digest that is fed piece by piece.
#[derive(Clone, Default)]
pub struct Hasher(blake3::Hasher);

impl Hasher {
    /// A hasher that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Feeds bytes. Where they end leaves no trace: feed lengths too where that matters, or use [`Self::field`].
    pub fn update(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.update(bytes);
        self
    }

    /// Feeds a length and then the bytes, so that `["ab", "c"]` and `["a", "bc"]` differ.
    pub fn field(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    /// The digest of all that was fed.
    pub fn finish(&self) -> Digest {
        Digest(*self.0.finalize().as_bytes())
    }
}

/// The digest of bytes in memory.
pub fn digest_bytes(bytes: &[u8]) -> Digest {
    Digest(*blake3::hash(bytes).as_bytes())
}

/// The digest of a file's bytes; memory stays at a few MiB and all threads help.
///
/// # Errors
///
/// If the file cannot be read.
pub fn digest_file(path: &Path) -> Result<Digest> {
    let mut file = File::open(path).map_err(|e| ArtifactError::io("open", path, e))?;
    let size_bytes = file
        .metadata()
        .map_err(|e| ArtifactError::io("read", path, e))?
        .len();
    let piece_bytes = usize::try_from(size_bytes.saturating_add(1))
        .map_or(PIECE_BYTES, |size| size.min(PIECE_BYTES));
    let mut piece = Vec::with_capacity(piece_bytes);
    let mut hasher = blake3::Hasher::new();
    loop {
        piece.clear();
        let read = file
            .by_ref()
            .take(piece_bytes as u64)
            .read_to_end(&mut piece)
            .map_err(|e| ArtifactError::io("read", path, e))?;
        if read == 0 {
            return Ok(Digest(*hasher.finalize().as_bytes()));
        }
        hasher.update_rayon(&piece);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// BLAKE3 of no bytes, from the algorithm's published test vectors.
    const OF_NOTHING: &str = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";

    #[test]
    fn the_digest_of_nothing_is_the_published_one() {
        assert_eq!(digest_bytes(b"").to_string(), OF_NOTHING);
        assert_eq!(digest_bytes(b"").short(), &OF_NOTHING[..16]);
    }

    #[test]
    fn a_file_has_the_digest_of_its_bytes() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("file");
        for size in [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1] {
            let bytes: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
            std::fs::write(&path, &bytes).expect("written");
            assert_eq!(digest_file(&path).expect("readable"), digest_bytes(&bytes));
        }
    }

    #[test]
    fn a_digest_survives_text_and_json() {
        let digest = digest_bytes(b"sprite");
        assert_eq!(digest.to_string().parse(), Ok(digest));
        let json = serde_json::to_string(&digest).expect("serialisable");
        assert_eq!(json, format!("\"{digest}\""));
        let back: Digest = serde_json::from_str(&json).expect("parseable");
        assert_eq!(back, digest);
    }

    #[test]
    fn text_that_is_no_digest_is_refused() {
        for text in [
            "",
            "af13",
            &OF_NOTHING.replace('a', "x"),
            &format!("{OF_NOTHING}0"),
        ] {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
    }

    #[test]
    fn fields_with_other_borders_have_other_digests() {
        let ab_c = Hasher::new().field(b"ab").field(b"c").finish();
        let a_bc = Hasher::new().field(b"a").field(b"bc").finish();
        assert_ne!(ab_c, a_bc);
    }
}
