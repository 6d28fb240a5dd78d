//! The byte-pair tokenizer of CLIP, from `vocab.json` and `merges.txt` (or `tokenizer.json`).
//!
//! Normalisation: NFC, runs of white space to one blank, lower case. Splitting: the contractions
//! of the original pattern, runs of letters, single digits, runs of anything else; then bytes to
//! their printable alphabet. The last piece of a word carries `</w>`. A text is framed by
//! `<|startoftext|>` and `<|endoftext|>`.
//!
//! Source: `CLIPTokenizer` of transformers 5.23 (which has no `ftfy`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ::tokenizers::models::bpe::{BPE, Vocab};
use ::tokenizers::normalizers::replace::ReplacePattern;
use ::tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use ::tokenizers::pre_tokenizers::PreTokenizerWrapper;
use ::tokenizers::pre_tokenizers::byte_level::ByteLevel;
use ::tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use ::tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use ::tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};
use serde::Deserialize;

use super::{TokenIds, TokenizerError, bare_ids, check_vocabulary, frame, read_json};

/// What is one word; everything between matches is dropped.
const WORD: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// Positions of every published CLIP text model.
const CLIP_POSITIONS: usize = 77;

/// Tokenizer of a CLIP text model.
#[derive(Debug)]
pub struct ClipTokenizer {
    tokenizer: Tokenizer,
    bos: u32,
    eos: u32,
    pad: u32,
    max_length: usize,
}

/// `tokenizer_config.json`, as far as it decides ids.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    bos_token: Option<TokenText>,
    eos_token: Option<TokenText>,
    pad_token: Option<TokenText>,
    unk_token: Option<TokenText>,
    model_max_length: Option<f64>,
    #[serde(default)]
    added_tokens_decoder: BTreeMap<String, AddedTokenEntry>,
}

/// A token as transformers writes it: its text, or an object with its text.
#[derive(Deserialize)]
#[serde(untagged)]
enum TokenText {
    Text(String),
    Entry(AddedTokenEntry),
}

impl TokenText {
    fn into_text(self) -> String {
        match self {
            Self::Text(text) => text,
            Self::Entry(entry) => entry.content,
        }
    }
}

#[derive(Deserialize)]
struct AddedTokenEntry {
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    normalized: bool,
}

impl AddedTokenEntry {
    fn plain(content: &str) -> Self {
        Self {
            content: content.to_owned(),
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: false,
        }
    }

    fn into_added_token(self) -> AddedToken {
        AddedToken::from(self.content, true)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized)
    }
}

impl ClipTokenizer {
    /// Reads the tokenizer in `dir`: `vocab.json` and `merges.txt`, or else `tokenizer.json`.
    ///
    /// Special tokens and the length come from `tokenizer_config.json`; what it leaves out is as
    /// in the published CLIP-L.
    pub fn open(dir: &Path) -> Result<Self, TokenizerError> {
        let config_path = dir.join("tokenizer_config.json");
        let config: TokenizerConfig = if config_path.is_file() {
            read_json(&config_path)?
        } else {
            TokenizerConfig::default()
        };
        let text = |token: Option<TokenText>, usual: &str| {
            token.map_or_else(|| usual.to_owned(), TokenText::into_text)
        };
        let bos = text(config.bos_token, "<|startoftext|>");
        let eos = text(config.eos_token, "<|endoftext|>");
        let pad = text(config.pad_token, "<|endoftext|>");
        let unk = text(config.unk_token, "<|endoftext|>");

        let (path, mut tokenizer) = Self::vocabulary(dir, &unk)?;
        let mut special: Vec<AddedToken> = Vec::new();
        let listed = config.added_tokens_decoder;
        for token in [&bos, &eos, &pad] {
            if !listed.values().any(|entry| entry.content == *token) {
                special.push(AddedTokenEntry::plain(token).into_added_token());
            }
        }
        special.extend(listed.into_values().map(AddedTokenEntry::into_added_token));
        let special_id = |tokenizer: &Tokenizer, token: &str, role| {
            tokenizer
                .token_to_id(token)
                .ok_or_else(|| TokenizerError::NoSpecialToken {
                    path: path.clone(),
                    token: token.to_owned(),
                    role,
                })
        };
        // Looked up before they are added: a token that the vocabulary lacks would get a new id,
        // for which the model has no row.
        let bos = special_id(&tokenizer, &bos, "bos_token")?;
        let eos = special_id(&tokenizer, &eos, "eos_token")?;
        let pad = special_id(&tokenizer, &pad, "pad_token")?;
        tokenizer.add_special_tokens(&special);
        Ok(Self {
            tokenizer,
            bos,
            eos,
            pad,
            max_length: max_length(config.model_max_length),
        })
    }

    fn vocabulary(dir: &Path, unk: &str) -> Result<(PathBuf, Tokenizer), TokenizerError> {
        let (vocab, merges) = (dir.join("vocab.json"), dir.join("merges.txt"));
        let whole = dir.join("tokenizer.json");
        if vocab.is_file() && merges.is_file() {
            let model = Self::byte_pairs(&vocab, &merges, unk)?;
            let tokenizer = Self::pipeline(model).map_err(|source| TokenizerError::Build {
                path: vocab.clone(),
                source,
            })?;
            Ok((vocab, tokenizer))
        } else if whole.is_file() {
            let bytes = super::read(&whole)?;
            match Tokenizer::from_bytes(bytes) {
                Ok(mut tokenizer) => {
                    // Length is ours to decide, whatever was saved with the file.
                    tokenizer.with_padding(None);
                    match tokenizer.with_truncation(None) {
                        Ok(_) => Ok((whole, tokenizer)),
                        Err(source) => Err(TokenizerError::Build {
                            path: whole,
                            source,
                        }),
                    }
                }
                Err(source) => Err(TokenizerError::Build {
                    path: whole,
                    source,
                }),
            }
        } else {
            Err(TokenizerError::NoTokenizer {
                dir: dir.to_path_buf(),
                expected: "vocab.json with merges.txt, or tokenizer.json",
            })
        }
    }

    fn byte_pairs(vocab_path: &Path, merges_path: &Path, unk: &str) -> Result<BPE, TokenizerError> {
        let vocab: Vocab = read_json(vocab_path)?;
        let bytes = super::read(merges_path)?;
        let build = |source: ::tokenizers::Error| TokenizerError::Build {
            path: merges_path.to_path_buf(),
            source,
        };
        let text = std::str::from_utf8(&bytes).map_err(|error| build(error.into()))?;
        let mut merges = Vec::new();
        for (number, line) in text.lines().enumerate() {
            if line.starts_with("#version") || line.is_empty() {
                continue;
            }
            match line.split_once(' ') {
                Some((left, right)) if !right.contains(' ') => {
                    merges.push((left.to_owned(), right.to_owned()));
                }
                _ => {
                    return Err(build(
                        format!("line {} is not two tokens with a blank between", number + 1)
                            .into(),
                    ));
                }
            }
        }
        BPE::builder()
            .vocab_and_merges(vocab, merges)
            .unk_token(unk.to_owned())
            .end_of_word_suffix("</w>".to_owned())
            .build()
            .map_err(build)
    }

    fn pipeline(model: BPE) -> Result<Tokenizer, ::tokenizers::Error> {
        let mut tokenizer = Tokenizer::new(model);
        tokenizer.with_normalizer(Some(Normalizers::new(vec![
            NFC.into(),
            Replace::new(ReplacePattern::Regex(r"\s+".to_owned()), " ")?.into(),
            Lowercase.into(),
        ])));
        let words = Split::new(
            SplitPattern::Regex(WORD.to_owned()),
            SplitDelimiterBehavior::Removed,
            true,
        )?;
        tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(vec![
            PreTokenizerWrapper::from(words),
            PreTokenizerWrapper::from(ByteLevel::new(false, true, true)),
        ])));
        Ok(tokenizer)
    }

    /// Ids of a text: `max_length` of them, framed, cut and padded.
    pub fn encode(&self, text: &str) -> Result<TokenIds, TokenizerError> {
        let bare = bare_ids(&self.tokenizer, text)?;
        Ok(frame(
            &bare,
            Some(self.bos),
            self.eos,
            self.pad,
            self.max_length,
        ))
    }

    /// Number of ids that a text becomes (77 in every published CLIP).
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// Checks that a model with `num_rows` rows (its `vocab_size`) has one for every id of this tokenizer, which was
    /// opened in `dir`.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Vocabulary`] if an id is too large.
    pub fn check_vocabulary(&self, dir: &Path, num_rows: usize) -> Result<(), TokenizerError> {
        check_vocabulary(&self.tokenizer, dir, num_rows)
    }
}

/// transformers writes 1e30 where a tokenizer has no limit.
fn max_length(model_max_length: Option<f64>) -> usize {
    match model_max_length {
        Some(length) if (2.0..=65_536.0).contains(&length) => length as usize,
        _ => CLIP_POSITIONS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A vocabulary of single bytes, one merge and the two special tokens.
    fn tiny(dir: &Path) -> ClipTokenizer {
        let mut vocab = BTreeMap::new();
        let mut letters: Vec<String> = ('a'..='z').map(String::from).collect();
        letters.push("!".to_owned());
        for letter in letters {
            let (plain, closing) = (letter.clone(), format!("{letter}</w>"));
            for token in [plain, closing] {
                let id = vocab.len() as u32;
                vocab.insert(token, id);
            }
        }
        for token in ["re", "red</w>", "<|startoftext|>", "<|endoftext|>"] {
            let id = vocab.len() as u32;
            vocab.insert(token.to_owned(), id);
        }
        fs_err::write(
            dir.join("vocab.json"),
            serde_json::to_vec(&vocab).expect("a map of strings is JSON"),
        )
        .expect("the test directory can be written");
        fs_err::write(dir.join("merges.txt"), "#version: 0.2\nr e\nre d</w>\n")
            .expect("the test directory can be written");
        ClipTokenizer::open(dir).expect("the tiny tokenizer is whole")
    }

    #[test]
    fn a_word_is_merged_up_to_its_closing_piece() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let tokenizer = tiny(dir.path());
        // 27 letters twice, then re, red</w>, start, end.
        let (red, start, end) = (55, 56, 57);
        let found = tokenizer
            .encode("  RED\t\nRed ")
            .expect("the text is encodable");
        assert_eq!(found.ids[..5], [start, red, red, end, end]);
        assert_eq!((found.ids.len(), found.num_tokens), (77, 4));
    }

    #[test]
    fn punctuation_splits_and_the_cut_keeps_the_end() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let tokenizer = tiny(dir.path());
        let found = tokenizer
            .encode(&"red! ".repeat(60))
            .expect("the text is encodable");
        assert_eq!(found.ids[1..4], [55, 53, 55]);
        assert_eq!((found.ids[76], found.num_tokens), (57, 122));
        assert!(found.is_truncated());
    }

    #[test]
    fn the_largest_id_needs_a_row_however_few_tokens_there_are() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let tokenizer = tiny(dir.path());
        assert!(tokenizer.check_vocabulary(dir.path(), 58).is_ok());
        let vocab = r#"{"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 90}"#;
        fs_err::write(dir.path().join("vocab.json"), vocab)
            .expect("the test directory can be written");
        fs_err::write(dir.path().join("merges.txt"), "#version: 0.2\n")
            .expect("the test directory can be written");
        let sparse = ClipTokenizer::open(dir.path()).expect("three tokens make a tokenizer");
        assert!(sparse.check_vocabulary(dir.path(), 91).is_ok());
        let error = sparse
            .check_vocabulary(dir.path(), 90)
            .expect_err("the last row is 89");
        let TokenizerError::Vocabulary {
            dir: named,
            found,
            num_rows,
        } = &error
        else {
            panic!("another error: {error}");
        };
        assert_eq!((named.as_path(), *found, *num_rows), (dir.path(), 90, 90));
    }

    #[test]
    fn a_directory_without_tokenizer_is_named() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let error = ClipTokenizer::open(dir.path()).expect_err("there is nothing in it");
        assert!(error.to_string().contains("merges.txt"), "{error}");
    }
}
