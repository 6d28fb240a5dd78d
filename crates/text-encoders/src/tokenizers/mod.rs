//! From text to token ids, id by id as transformers' tokenizers give them.
//!
//! Both tokenizers give a fixed number of ids (`padding="max_length"`, `truncation=True`) and
//! beside them the number that the whole text would take, so that a caption over the limit can be
//! named with its count.

mod charsmap;
mod clip;
mod sentencepiece;
mod t5;

use std::path::{Path, PathBuf};

pub use clip::ClipTokenizer;
pub use sentencepiece::SentencePieceError;
pub use t5::T5Tokenizer;

/// The ids of one text, padded and truncated to the length asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenIds {
    /// As many ids as were asked for.
    pub ids: Vec<u32>,
    /// Number of tokens of the whole text before truncation, special tokens included, padding not.
    pub num_tokens: usize,
}

impl TokenIds {
    /// Whether tokens of the text had to be left out.
    pub fn is_truncated(&self) -> bool {
        self.num_tokens > self.ids.len()
    }
}

/// Why a tokenizer could not be built or could not encode.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file of the tokenizer could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A JSON file of the tokenizer does not parse.
    #[error("{path} is not the JSON that is expected there")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: serde_json::Error,
    },
    /// The directory holds no tokenizer of this kind.
    #[error("no tokenizer in {dir}: expected {expected}")]
    NoTokenizer {
        /// The directory.
        dir: PathBuf,
        /// The files that would do.
        expected: &'static str,
    },
    /// The `tokenizers` crate refused the file.
    #[error("{path} does not make a tokenizer")]
    Build {
        /// The file.
        path: PathBuf,
        /// What the crate said.
        source: ::tokenizers::Error,
    },
    /// `spiece.model` cannot be used.
    #[error("{path} is not a SentencePiece model that T5 uses")]
    SentencePiece {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        source: SentencePieceError,
    },
    /// A special token is not in the vocabulary.
    #[error("{path} has no token {token:?}, which is to be used as {role}")]
    NoSpecialToken {
        /// The file that should hold it.
        path: PathBuf,
        /// The token.
        token: String,
        /// `bos_token`, `eos_token`, `pad_token`.
        role: &'static str,
    },
    /// The file adds other special tokens to a text than the model was trained with.
    #[error("{path} frames an empty text as ids {found:?}, but {expected:?} is expected")]
    Template {
        /// The file.
        path: PathBuf,
        /// The ids of an empty text.
        expected: Vec<u32>,
        /// The ids that it gives.
        found: Vec<u32>,
    },
    /// The tokenizer gives ids that its model has no row for.
    #[error(
        "the tokenizer in {dir} has a token with id {found}, and its model has {num_rows} rows (ids below {num_rows})"
    )]
    Vocabulary {
        /// The tokenizer's directory.
        dir: PathBuf,
        /// The largest id that the tokenizer can give.
        found: u32,
        /// The model's `vocab_size`.
        num_rows: usize,
    },
    /// The text cannot be encoded.
    #[error("cannot encode the text {text:?}")]
    Encode {
        /// The text.
        text: String,
        /// What the crate said.
        source: ::tokenizers::Error,
    },
}

fn read(path: &Path) -> Result<Vec<u8>, TokenizerError> {
    fs_err::read(path).map_err(|source| TokenizerError::Read {
        path: path.to_path_buf(),
        source,
    })
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, TokenizerError> {
    serde_json::from_slice(&read(path)?).map_err(|source| TokenizerError::Json {
        path: path.to_path_buf(),
        source,
    })
}

/// Ids of the text alone, without the special tokens that frame it.
fn bare_ids(tokenizer: &::tokenizers::Tokenizer, text: &str) -> Result<Vec<u32>, TokenizerError> {
    match tokenizer.encode_fast(text, false) {
        Ok(encoding) => Ok(encoding.get_ids().to_vec()),
        Err(source) => Err(TokenizerError::Encode {
            text: text.to_owned(),
            source,
        }),
    }
}

/// Checks that a model of `num_rows` rows has one for every id that the tokenizer can give.
///
/// Ids need not be dense, so their number says nothing: the largest one decides.
fn check_vocabulary(
    tokenizer: &::tokenizers::Tokenizer,
    dir: &Path,
    num_rows: usize,
) -> Result<(), TokenizerError> {
    match tokenizer.get_vocab(true).into_values().max() {
        Some(found) if found as usize >= num_rows => Err(TokenizerError::Vocabulary {
            dir: dir.to_path_buf(),
            found,
            num_rows,
        }),
        _ => Ok(()),
    }
}

/// Cuts, frames and pads, so that the closing token survives the cut.
///
/// # Panics
///
/// If `max_length` has no room for the framing tokens.
fn frame(bare: &[u32], bos: Option<u32>, eos: u32, pad: u32, max_length: usize) -> TokenIds {
    let num_special = 1 + usize::from(bos.is_some());
    assert!(
        max_length >= num_special,
        "{max_length} tokens leave no room for the {num_special} that frame every text"
    );
    let kept = bare.len().min(max_length - num_special);
    let mut ids = Vec::with_capacity(max_length);
    ids.extend(bos);
    ids.extend_from_slice(&bare[..kept]);
    ids.push(eos);
    ids.resize(max_length, pad);
    TokenIds {
        ids,
        num_tokens: bare.len() + num_special,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_that_fits_is_padded_behind_its_closing_token() {
        let ids = frame(&[7, 8], Some(1), 2, 0, 6);
        assert_eq!(ids.ids, [1, 7, 8, 2, 0, 0]);
        assert_eq!((ids.num_tokens, ids.is_truncated()), (4, false));
    }

    #[test]
    fn a_text_that_does_not_fit_keeps_its_closing_token_and_tells_its_count() {
        let ids = frame(&[7, 8, 9, 10], None, 2, 0, 3);
        assert_eq!(ids.ids, [7, 8, 2]);
        assert_eq!((ids.num_tokens, ids.is_truncated()), (5, true));
    }
}
