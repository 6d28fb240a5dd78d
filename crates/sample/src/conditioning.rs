//! Prompts into what the transformer is conditioned on; the encoders are gone when this is done.
//!
//! T5 gives a state for each of `t5_tokens` positions, padding included (the transformer attends to it); CLIP gives
//! one pooled vector. CLIP sees at most its own number of positions: a longer prompt is cut there, as upstream, and
//! T5 alone carries the rest.

use std::collections::BTreeMap;
use std::path::PathBuf;

use console::Progress;
use pipeline::recipe::LongText;
use tensor::{Device, Precision, Tensor};
use text_encoders::{ClipConfig, ClipTextModel, ClipTokenizer, T5Config, T5Encoder, T5Tokenizer};

use crate::error::SampleError;

/// What some pictures are conditioned on, a row each.
#[derive(Clone, Debug)]
pub struct Conditioning {
    /// T5's states, `(b, t5_tokens, d_model)`.
    pub prompt_embeds: Tensor<3>,
    /// CLIP's pooled vectors, `(b, hidden_size)`.
    pub pooled_prompt_embeds: Tensor<2>,
}

impl Conditioning {
    /// Stacks rows: all those of the first, then all those of the second, and so on.
    ///
    /// # Panics
    ///
    /// If there are none, or they differ in length or width.
    pub fn stack(parts: &[&Self]) -> Self {
        Self {
            prompt_embeds: Tensor::cat(parts.iter().map(|p| p.prompt_embeds.clone()).collect(), 0),
            pooled_prompt_embeds: Tensor::cat(
                parts
                    .iter()
                    .map(|p| p.pooled_prompt_embeds.clone())
                    .collect(),
                0,
            ),
        }
    }
}

/// Where the encoders are and how they are used.
#[derive(Clone, Debug)]
pub struct Encoders {
    /// CLIP's directory.
    pub clip: PathBuf,
    /// CLIP's tokenizer.
    pub clip_tokenizer: PathBuf,
    /// T5's directory.
    pub t5: PathBuf,
    /// T5's tokenizer.
    pub t5_tokenizer: PathBuf,
    /// Number of T5 positions.
    pub t5_tokens: usize,
    /// What happens to a text with more T5 tokens than that.
    pub long_texts: LongText,
    /// Texts encoded at once.
    pub batch: usize,
    /// Where the encoders compute.
    pub device: Device,
    /// What they compute in.
    pub precision: Precision,
}

/// Encoded texts, and what a person should know about them.
#[derive(Debug)]
pub struct EncodedTexts {
    by_text: BTreeMap<String, Conditioning>,
    /// A sentence for each text that was cut.
    pub notes: Vec<String>,
}

impl EncodedTexts {
    /// The row of a text.
    ///
    /// # Panics
    ///
    /// If the text was not among those encoded.
    pub fn get(&self, text: &str) -> &Conditioning {
        self.by_text
            .get(text)
            .unwrap_or_else(|| panic!("the text {text:?} was not encoded"))
    }
}

impl Encoders {
    /// Encodes distinct texts. One encoder is in memory at a time, and none afterwards.
    ///
    /// # Errors
    ///
    /// If a text is too long and is not to be cut, an encoder or tokenizer cannot be had, or a tokenizer gives ids that
    /// its encoder has no row for.
    pub fn encode(&self, texts: &[&str], progress: &Progress) -> Result<EncodedTexts, SampleError> {
        let clip_config = ClipConfig::from_file(&self.clip.join("config.json"))?;
        let t5_config = T5Config::from_file(&self.t5.join("config.json"))?;
        let mut notes = Vec::new();
        let t5_ids = self.t5_ids(texts, &t5_config, &mut notes)?;
        let clip_ids = self.clip_ids(texts, &clip_config, &mut notes)?;

        let job = progress.job("encode prompts", 2 * texts.len() as u64, "passes");
        let mut states = Vec::with_capacity(texts.len());
        let t5 = T5Encoder::open(&self.t5, &self.device, self.precision)?;
        for ids in t5_ids.chunks(self.batch) {
            states.extend(t5.encode(ids).chunk(ids.len(), 0));
            job.advance(ids.len() as u64);
        }
        drop(t5);

        let mut pooled = Vec::with_capacity(texts.len());
        let clip = ClipTextModel::open(&self.clip, &self.device, self.precision)?;
        for ids in clip_ids.chunks(self.batch) {
            pooled.extend(clip.encode(ids).pooled.chunk(ids.len(), 0));
            job.advance(ids.len() as u64);
        }

        let by_text = texts
            .iter()
            .zip(states.into_iter().zip(pooled))
            .map(|(&text, (prompt_embeds, pooled_prompt_embeds))| {
                let row = Conditioning {
                    prompt_embeds,
                    pooled_prompt_embeds,
                };
                (text.to_owned(), row)
            })
            .collect();
        Ok(EncodedTexts { by_text, notes })
    }

    fn t5_ids(
        &self,
        texts: &[&str],
        config: &T5Config,
        notes: &mut Vec<String>,
    ) -> Result<Vec<Vec<u32>>, SampleError> {
        let tokenizer = T5Tokenizer::open(&self.t5_tokenizer)?;
        tokenizer.check_vocabulary(&self.t5_tokenizer, config.vocab_size)?;
        let mut rows = Vec::with_capacity(texts.len());
        for &text in texts {
            let ids = tokenizer.encode(text, self.t5_tokens)?;
            if ids.is_truncated() {
                if self.long_texts == LongText::Stop {
                    return Err(SampleError::LongPrompt {
                        prompt: text.to_owned(),
                        num_tokens: ids.num_tokens,
                        limit: self.t5_tokens,
                    });
                }
                notes.push(format!(
                    "prompt {text:?} has {} T5 tokens and was cut to {}",
                    ids.num_tokens, self.t5_tokens
                ));
            }
            rows.push(ids.ids);
        }
        Ok(rows)
    }

    fn clip_ids(
        &self,
        texts: &[&str],
        config: &ClipConfig,
        notes: &mut Vec<String>,
    ) -> Result<Vec<Vec<u32>>, SampleError> {
        let tokenizer = ClipTokenizer::open(&self.clip_tokenizer)?;
        tokenizer.check_vocabulary(&self.clip_tokenizer, config.vocab_size)?;
        let clip_tokens = config.max_position_embeddings;
        if tokenizer.max_length() > clip_tokens {
            return Err(SampleError::ClipLength {
                tokenizer: self.clip_tokenizer.clone(),
                expected: clip_tokens,
                found: tokenizer.max_length(),
            });
        }
        let mut rows = Vec::with_capacity(texts.len());
        for &text in texts {
            let ids = tokenizer.encode(text)?;
            if ids.is_truncated() {
                notes.push(format!(
                    "CLIP sees {} of the {} tokens of prompt {text:?}; T5 carries the rest",
                    ids.ids.len(),
                    ids.num_tokens
                ));
            }
            rows.push(ids.ids);
        }
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use pipeline::{FailureKind, StageError as _};

    use super::*;

    #[test]
    fn a_tokenizer_with_an_id_beyond_the_model_s_rows_is_refused() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let write = |name: &str, text: &str| {
            fs_err::write(dir.path().join(name), text).expect("writable");
        };
        write(
            "vocab.json",
            r#"{"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 60000}"#,
        );
        write("merges.txt", "#version: 0.2\n");
        let encoders = Encoders {
            clip: dir.path().join("absent"),
            clip_tokenizer: dir.path().to_path_buf(),
            t5: dir.path().join("absent"),
            t5_tokenizer: dir.path().join("absent"),
            t5_tokens: 1,
            long_texts: LongText::Stop,
            batch: 1,
            device: tensor::device::cpu(),
            precision: Precision::F32,
        };
        let error = encoders
            .clip_ids(&["a"], &ClipConfig::clip_l(), &mut Vec::new())
            .expect_err("CLIP has 49408 rows");
        assert_eq!(error.kind(), FailureKind::BadInput);
        let message = error.to_string();
        assert!(
            message.contains("60000") && message.contains("49408"),
            "{message}"
        );
        assert!(error.help().is_some());
    }
}
