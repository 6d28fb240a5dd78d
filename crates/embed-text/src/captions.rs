//! The distinct captions and their token ids, counted before any weights are read.

use std::collections::BTreeMap;
use std::path::Path;

use artifacts::{CaptionRow, SampleRow};
use pipeline::recipe::LongText;
use pipeline::{Stage, StageContext, WeightPart, files};
use text_encoders::{ClipConfig, ClipTokenizer, T5Config, T5Tokenizer};

use crate::error::EmbedTextError;

/// What `ingest` says about captions.
pub(crate) struct Captions {
    /// Caption hash → caption, each once.
    pub(crate) by_hash: BTreeMap<String, String>,
    /// Every image's caption.
    pub(crate) rows: Vec<CaptionRow>,
    /// Sample id → image.
    pub(crate) samples: BTreeMap<String, SampleRow>,
}

/// Token ids of one caption.
#[derive(Debug)]
pub(crate) struct Tokens {
    pub(crate) t5: Vec<u32>,
    pub(crate) clip: Vec<u32>,
    /// T5 tokens that are not padding, after a cut.
    pub(crate) num_t5_tokens: u32,
}

/// Token ids of all captions.
#[derive(Debug)]
pub(crate) struct Texts {
    /// By caption hash.
    pub(crate) tokens: BTreeMap<String, Tokens>,
    /// What a person should know: captions that were cut.
    pub(crate) notes: Vec<String>,
}

impl Captions {
    /// Reads the tables of `ingest`.
    pub(crate) fn read(context: &StageContext) -> Result<Self, EmbedTextError> {
        let ingest = context.input(Stage::Ingest);
        let rows = artifacts::captions::read(&ingest.path(files::CAPTIONS))?;
        let samples: BTreeMap<String, SampleRow> =
            artifacts::samples::read(&ingest.path(files::SAMPLES))?
                .into_iter()
                .map(|sample| (sample.sample_id.clone(), sample))
                .collect();
        if let Some(orphan) = rows
            .iter()
            .find(|row| !samples.contains_key(&row.sample_id))
        {
            return Err(EmbedTextError::Orphan {
                path: ingest.path(files::CAPTIONS),
                sample_id: orphan.sample_id.clone(),
            });
        }
        Ok(Self {
            by_hash: rows
                .iter()
                .map(|row| (row.caption_hash.clone(), row.caption.clone()))
                .collect(),
            rows,
            samples,
        })
    }

    /// A file that a caption belongs to.
    pub(crate) fn source_file(&self, caption_hash: &str) -> String {
        self.rows
            .iter()
            .find(|row| row.caption_hash == caption_hash)
            .and_then(|row| self.samples.get(&row.sample_id))
            .map_or_else(
                || "an image".to_owned(),
                |sample| sample.source_file.clone(),
            )
    }

    /// Token ids of all captions.
    ///
    /// # Errors
    ///
    /// If captions are too long for T5 and the recipe says to stop, or a tokenizer cannot be used.
    pub(crate) fn tokenize(&self, context: &StageContext) -> Result<Texts, EmbedTextError> {
        let limit = context.recipe.embed_text.t5_tokens;
        let t5 = open_t5(
            &context.weights_dir(WeightPart::T5Tokenizer),
            &context.weights_dir(WeightPart::T5),
        )?;
        let clip = open_clip(
            &context.weights_dir(WeightPart::ClipTokenizer),
            &context.weights_dir(WeightPart::Clip),
        )?;
        let mut tokens = BTreeMap::new();
        let mut too_long: Vec<(usize, &String)> = Vec::new();
        let mut num_cut_by_clip = 0;
        for (hash, caption) in &self.by_hash {
            let t5_ids = t5.encode(caption, limit)?;
            let clip_ids = clip.encode(caption)?;
            if t5_ids.is_truncated() {
                too_long.push((t5_ids.num_tokens, hash));
            }
            if clip_ids.is_truncated() {
                num_cut_by_clip += 1;
                tracing::info!(
                    caption,
                    tokens = clip_ids.num_tokens,
                    limit = clip.max_length(),
                    "CLIP sees the beginning of this caption"
                );
            }
            let num_t5_tokens = t5_ids.num_tokens.min(limit) as u32;
            tokens.insert(
                hash.clone(),
                Tokens {
                    t5: t5_ids.ids,
                    clip: clip_ids.ids,
                    num_t5_tokens,
                },
            );
        }
        let mut notes = Vec::new();
        // Of equally long ones the first by hash, so that the same data gives the same message.
        if let Some(&(num_tokens, hash)) = too_long.iter().rev().max_by_key(|(count, _)| *count) {
            if context.recipe.embed_text.long_captions == LongText::Stop {
                return Err(EmbedTextError::LongCaption {
                    caption: self.by_hash[hash].clone(),
                    source_file: self.source_file(hash),
                    num_tokens,
                    limit,
                    num_others: too_long.len() - 1,
                });
            }
            notes.push(format!(
                "{} captions were cut to {limit} T5 tokens; the longest has {num_tokens}",
                too_long.len()
            ));
        }
        if num_cut_by_clip > 0 {
            notes.push(format!(
                "CLIP's pooled vector sees the first {} tokens of {num_cut_by_clip} captions; T5 carries the rest",
                clip.max_length()
            ));
        }
        Ok(Texts { tokens, notes })
    }
}

fn open_t5(tokenizer_dir: &Path, model_dir: &Path) -> Result<T5Tokenizer, EmbedTextError> {
    let config = T5Config::from_file(&model_dir.join("config.json"))?;
    let tokenizer = T5Tokenizer::open(tokenizer_dir)?;
    tokenizer.check_vocabulary(tokenizer_dir, config.vocab_size)?;
    Ok(tokenizer)
}

fn open_clip(tokenizer_dir: &Path, model_dir: &Path) -> Result<ClipTokenizer, EmbedTextError> {
    let config = ClipConfig::from_file(&model_dir.join("config.json"))?;
    let tokenizer = ClipTokenizer::open(tokenizer_dir)?;
    tokenizer.check_vocabulary(tokenizer_dir, config.vocab_size)?;
    if tokenizer.max_length() > config.max_position_embeddings {
        return Err(EmbedTextError::ClipLength {
            tokenizer: tokenizer_dir.to_path_buf(),
            expected: config.max_position_embeddings,
            found: tokenizer.max_length(),
        });
    }
    Ok(tokenizer)
}
