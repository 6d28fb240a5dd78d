//! The table in the making, and the digest of what others can see of it.

use std::path::Path;

use artifacts::{
    Digest, Embedding, Hasher, TextEmbeddingHeader, TextEmbeddingRow, TextEmbeddingWriter,
};
use half::f16;

use crate::error::EmbedTextError;

/// Rows go in by the order of their caption hashes, so equal content gives an equal file and digest.
pub(crate) struct Table {
    writer: TextEmbeddingWriter,
    digest: Hasher,
    last_hash: String,
}

impl Table {
    /// Starts the table that will be called `path`.
    pub(crate) fn create(
        path: &Path,
        header: &TextEmbeddingHeader,
    ) -> Result<Self, EmbedTextError> {
        let mut digest = Hasher::new();
        for size in [header.t5_tokens, header.t5_width, header.pooled_width] {
            digest.field(&(size as u64).to_le_bytes());
        }
        Ok(Self {
            writer: TextEmbeddingWriter::create(path, header)?,
            digest,
            last_hash: String::new(),
        })
    }

    /// Adds a row.
    ///
    /// # Panics
    ///
    /// If rows come in another order than that of their hashes.
    pub(crate) fn push(&mut self, hash: &str, row: TextEmbeddingRow) -> Result<(), EmbedTextError> {
        assert!(
            self.last_hash.as_str() < hash,
            "{hash} after {}",
            self.last_hash
        );
        hash.clone_into(&mut self.last_hash);
        self.digest.field(hash.as_bytes());
        self.digest.field(&le_bytes(&row.embedding.t5));
        self.digest.field(&le_bytes(&row.embedding.pooled));
        Ok(self.writer.push(row)?)
    }

    /// Gives the file its name; the logical digest of the embeddings.
    pub(crate) fn finish(self) -> Result<Digest, EmbedTextError> {
        self.writer.finish()?;
        Ok(self.digest.finish())
    }
}

fn le_bytes(numbers: &[f16]) -> Vec<u8> {
    numbers
        .iter()
        .flat_map(|number| number.to_le_bytes())
        .collect()
}

/// An embedding in half precision.
///
/// # Errors
///
/// If a number is not finite, or too large for half precision.
pub(crate) fn to_half(
    caption: &str,
    t5: &[f32],
    pooled: &[f32],
) -> Result<Embedding, EmbedTextError> {
    let half = |part, numbers: &[f32]| {
        let halves: Vec<f16> = numbers
            .iter()
            .map(|&number| f16::from_f32(number))
            .collect();
        if halves.iter().all(|number| number.is_finite()) {
            Ok(halves)
        } else {
            Err(EmbedTextError::NotFinite {
                part,
                caption: caption.to_owned(),
            })
        }
    };
    Ok(Embedding {
        t5: half("t5", t5)?,
        pooled: half("pooled", pooled)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_beyond_half_precision_are_refused_with_the_caption() {
        let error = to_half("red", &[1.0], &[70_000.0]).expect_err("65504 is the largest half");
        assert!(
            error
                .to_string()
                .contains("pooled embedding of caption \"red\""),
            "{error}"
        );
        to_half("red", &[f32::NAN], &[1.0]).expect_err("not a number");
        let embedding = to_half("red", &[0.5], &[65_504.0]).expect("both fit");
        assert_eq!(embedding.pooled[0], f16::MAX);
    }
}
