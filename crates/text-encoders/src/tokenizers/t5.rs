//! The Unigram tokenizer of T5, from `tokenizer.json` or from `spiece.model`.
//!
//! A text is normalised by the character map of the file, blanks at its end go, words get `▁` in
//! front, and `</s>` closes it. Behind the pieces of the file come `<extra_id_99>` … `<extra_id_0>`.
//! Padding is `<pad>`, id 0: FLUX attends to it, so it is part of what a caption means.
//!
//! Source: `T5TokenizerFast` as published with FLUX.1 (`tokenizer_2/tokenizer.json`).

use std::path::{Path, PathBuf};

use ::tokenizers::models::unigram::Unigram;
use ::tokenizers::normalizers::replace::ReplacePattern;
use ::tokenizers::normalizers::{Precompiled, Replace, Sequence as Normalizers, Strip};
use ::tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use ::tokenizers::processors::template::TemplateProcessing;
use ::tokenizers::{AddedToken, Tokenizer};
use serde::Deserialize;

use super::sentencepiece::{SentencePieceError, SentencePieceModel};
use super::{TokenIds, TokenizerError, bare_ids, check_vocabulary, frame, read, read_json};

/// Sentinels that T5 was trained with; `tokenizer_config.json` may say otherwise.
const EXTRA_IDS: usize = 100;

/// Tokenizer of a T5 encoder.
#[derive(Debug)]
pub struct T5Tokenizer {
    tokenizer: Tokenizer,
    eos: u32,
    pad: u32,
}

#[derive(Deserialize)]
struct TokenizerConfig {
    extra_ids: Option<usize>,
}

impl T5Tokenizer {
    /// Reads the tokenizer in `dir`: `tokenizer.json`, or else `spiece.model`.
    pub fn open(dir: &Path) -> Result<Self, TokenizerError> {
        let (whole, pieces) = (dir.join("tokenizer.json"), dir.join("spiece.model"));
        if whole.is_file() {
            Self::from_tokenizer_json(&whole)
        } else if pieces.is_file() {
            let config_path = dir.join("tokenizer_config.json");
            let extra_ids = if config_path.is_file() {
                read_json::<TokenizerConfig>(&config_path)?.extra_ids
            } else {
                None
            };
            Self::from_sentencepiece(&pieces, extra_ids.unwrap_or(EXTRA_IDS))
        } else {
            Err(TokenizerError::NoTokenizer {
                dir: dir.to_path_buf(),
                expected: "tokenizer.json or spiece.model",
            })
        }
    }

    /// Reads a whole tokenizer as the `tokenizers` crate writes it.
    pub fn from_tokenizer_json(path: &Path) -> Result<Self, TokenizerError> {
        let build = |source| TokenizerError::Build {
            path: path.to_path_buf(),
            source,
        };
        let mut tokenizer = Tokenizer::from_bytes(read(path)?).map_err(build)?;
        // Length is ours to decide, whatever was saved with the file.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(build)?;
        Self::checked(tokenizer, path.to_path_buf())
    }

    /// Builds the tokenizer from a SentencePiece model with `extra_ids` sentinels behind its pieces.
    pub fn from_sentencepiece(path: &Path, extra_ids: usize) -> Result<Self, TokenizerError> {
        let refused = |source| TokenizerError::SentencePiece {
            path: path.to_path_buf(),
            source,
        };
        // No vocabulary is near this; the number comes from a file.
        if extra_ids > 65_536 {
            return Err(refused(SentencePieceError::Setting {
                name: "extra_ids",
                expected: "at most 65536",
            }));
        }
        let model = SentencePieceModel::parse(&read(path)?).map_err(refused)?;
        let tokenizer =
            Self::pipeline(model, extra_ids).map_err(|source| TokenizerError::Build {
                path: path.to_path_buf(),
                source,
            })?;
        Self::checked(tokenizer, path.to_path_buf())
    }

    fn pipeline(
        model: SentencePieceModel,
        extra_ids: usize,
    ) -> Result<Tokenizer, ::tokenizers::Error> {
        let SentencePieceModel {
            pieces,
            unknown,
            charsmap,
        } = model;
        let special = |text: &str| AddedToken::from(text, true).normalized(false);
        let mut vocabulary: Vec<(String, f64)> = Vec::with_capacity(pieces.len() + extra_ids);
        let mut added = Vec::new();
        for piece in pieces {
            if piece.is_special {
                added.push(special(&piece.text));
            }
            vocabulary.push((piece.text, f64::from(piece.score)));
        }
        for sentinel in (0..extra_ids).rev() {
            let text = format!("<extra_id_{sentinel}>");
            added.push(special(&text));
            vocabulary.push((text, 0.0));
        }
        let mut tokenizer = Tokenizer::new(Unigram::from(vocabulary, Some(unknown), false)?);
        let mut normalizers = Vec::new();
        if !charsmap.is_empty() {
            normalizers.push(Precompiled::from(&charsmap)?.into());
        }
        normalizers.push(Strip::new(false, true).into());
        normalizers.push(Replace::new(ReplacePattern::Regex(" {2,}".to_owned()), "▁")?.into());
        tokenizer.with_normalizer(Some(Normalizers::new(normalizers)));
        tokenizer.with_pre_tokenizer(Some(Metaspace::new('▁', PrependScheme::Always, true)));
        if let Some(eos) = tokenizer.token_to_id("</s>") {
            tokenizer.with_post_processor(Some(
                TemplateProcessing::builder()
                    .try_single("$A </s>")?
                    .special_tokens(vec![("</s>", eos)])
                    .build()?,
            ));
        }
        tokenizer.add_special_tokens(&added);
        Ok(tokenizer)
    }

    fn checked(tokenizer: Tokenizer, path: PathBuf) -> Result<Self, TokenizerError> {
        let special_id = |token: &str, role| {
            tokenizer
                .token_to_id(token)
                .ok_or_else(|| TokenizerError::NoSpecialToken {
                    path: path.clone(),
                    token: token.to_owned(),
                    role,
                })
        };
        let (eos, pad) = (
            special_id("</s>", "eos_token")?,
            special_id("<pad>", "pad_token")?,
        );
        let found = match tokenizer.encode("", true) {
            Ok(encoding) => encoding.get_ids().to_vec(),
            Err(source) => return Err(TokenizerError::Build { path, source }),
        };
        if found != [eos] {
            return Err(TokenizerError::Template {
                path,
                expected: vec![eos],
                found,
            });
        }
        Ok(Self {
            tokenizer,
            eos,
            pad,
        })
    }

    /// Ids of a text: `max_length` of them, closed by `</s>`, cut and padded.
    ///
    /// # Panics
    ///
    /// If `max_length` is 0.
    pub fn encode(&self, text: &str, max_length: usize) -> Result<TokenIds, TokenizerError> {
        let bare = bare_ids(&self.tokenizer, text)?;
        Ok(frame(&bare, None, self.eos, self.pad, max_length))
    }

    /// Checks that a model with `num_rows` rows (its `vocab_size`, which may be more than there are ids) has one for
    /// every id of this tokenizer, which was opened in `dir`.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Vocabulary`] if an id is too large.
    pub fn check_vocabulary(&self, dir: &Path, num_rows: usize) -> Result<(), TokenizerError> {
        check_vocabulary(&self.tokenizer, dir, num_rows)
    }
}

#[cfg(test)]
mod tests {
    use super::super::sentencepiece::tests::tiny_model;
    use super::*;

    fn tiny(extra_ids: usize) -> T5Tokenizer {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("spiece.model");
        fs_err::write(&path, tiny_model()).expect("the test directory can be written");
        T5Tokenizer::from_sentencepiece(&path, extra_ids).expect("the tiny model is whole")
    }

    #[test]
    fn the_likeliest_pieces_win_and_the_end_is_marked() {
        // pieces: <pad> </s> <unk> ▁ red ▁red ▁hair r e d
        let found = tiny(2)
            .encode("red  hair ", 6)
            .expect("the text is encodable");
        assert_eq!(found.ids, [5, 6, 1, 0, 0, 0]);
        assert_eq!(found.num_tokens, 3);
    }

    #[test]
    fn an_empty_text_is_one_end_mark() {
        let found = tiny(0).encode("", 3).expect("the text is encodable");
        assert_eq!(
            (found.ids.as_slice(), found.num_tokens),
            (&[1, 0, 0][..], 1)
        );
    }

    #[test]
    fn sentinels_follow_the_pieces_counting_down() {
        let tokenizer = tiny(3);
        let found = tokenizer
            .encode("<extra_id_0><extra_id_2>", 3)
            .expect("the text is encodable");
        assert_eq!(found.ids, [12, 10, 1]);
        let dir = Path::new("tokenizer_2");
        assert!(tokenizer.check_vocabulary(dir, 13).is_ok());
        let error = tokenizer
            .check_vocabulary(dir, 12)
            .expect_err("id 12 is the last sentinel's");
        assert!(
            matches!(error, TokenizerError::Vocabulary { found: 12, .. }),
            "{error}"
        );
    }

    #[test]
    fn a_character_without_piece_is_unknown() {
        let found = tiny(0).encode("red 日", 4).expect("the text is encodable");
        assert_eq!(found.ids, [5, 3, 2, 1]);
    }
}
