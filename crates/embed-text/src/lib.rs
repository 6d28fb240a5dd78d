//! Stage `embed-text`: every distinct caption into T5 states and CLIP's pooled vector.
//!
//! Reads `captions.parquet` of `ingest` and writes one row per distinct caption, keyed by the caption's hash, in the
//! order of the hashes. Captions that an earlier artifact holds from the same encoders are copied, so one edited
//! caption costs one encoding. CLIP runs first and is freed before T5 is loaded: of both, only CLIP's small pooled
//! vectors wait in memory while T5's states stream into the table.
//!
//! With `embed_text.public_embeddings` no encoder runs: rows come from files in the public recipe's layout, found by
//! either of an image's two compat hashes.

#![forbid(unsafe_code)]

mod captions;
mod encode;
mod error;
mod public;
mod reuse;
mod table;

use artifacts::{Digest, TextEmbeddingHeader};
use pipeline::{StageContext, StageReport, WeightPart, outputs};
use text_encoders::{ClipConfig, T5Config};

pub use error::EmbedTextError;

use captions::Captions;
use table::Table;

/// Runs the stage.
///
/// # Errors
///
/// If a caption has more T5 tokens than the recipe allows, the base or the public embeddings cannot be used, or the
/// table cannot be written.
pub fn run(context: &StageContext) -> Result<StageReport, EmbedTextError> {
    let captions = Captions::read(context)?;
    let header = header(context)?;
    let texts = captions.tokenize(context)?;
    let path = context.path(pipeline::files::EMBEDDINGS);
    let report = context
        .report()
        .count("captions", captions.by_hash.len() as u64);
    let (table, mut report) = match &context.recipe.embed_text.public_embeddings {
        Some(source) => public::import(
            context,
            source,
            &captions,
            &texts,
            Table::create(&path, &header)?,
            report,
        )?,
        None => encode::encode(context, &captions, &texts, &header, &path, report)?,
    };
    report.notes.extend(texts.notes);
    Ok(report.output(outputs::EMBEDDINGS, table.finish()?))
}

/// Sizes by recipe and base; digests by the base's files.
fn header(context: &StageContext) -> Result<TextEmbeddingHeader, EmbedTextError> {
    let t5 = T5Config::from_file(&context.weights_dir(WeightPart::T5).join("config.json"))?;
    let clip = ClipConfig::from_file(&context.weights_dir(WeightPart::Clip).join("config.json"))?;
    let digest = |part| -> Digest {
        context
            .weights_digest(part)
            .parse()
            .expect("the pipeline's digests are BLAKE3 in hexadecimal")
    };
    Ok(TextEmbeddingHeader {
        t5_tokens: context.recipe.embed_text.t5_tokens,
        t5_width: t5.d_model,
        pooled_width: clip.hidden_size,
        t5_digest: digest(WeightPart::T5),
        clip_digest: digest(WeightPart::Clip),
        t5_tokenizer_digest: digest(WeightPart::T5Tokenizer),
        clip_tokenizer_digest: digest(WeightPart::ClipTokenizer),
    })
}
