//! The first stage: a data source's images and captions become tables.
//!
//! ```text
//! folder + metadata.jsonl / .csv ─┐                  ┌─ samples.parquet   one row per distinct picture
//! folder + .txt captions ─────────┼─ entries ─ check ┼─ captions.parquet  its caption
//! Hugging Face Parquet ───────────┘                  └─ rejects.parquet   one row per image left out, and why
//! ```
//!
//! An image is known by its pixels ([`pixel_art::identity`]), so file names and formats do not matter and duplicates are
//! found. Images are decoded in parallel; at most one per thread and one batch of encoded Parquet rows are in memory.
//! Rows are sorted by sample id: the same data gives the same bytes.
//!
//! [`sources`] finds which of the three it is and every image with its caption; `check` looks at one image, `collect` at
//! all of them together.

#![forbid(unsafe_code)]

mod error;

mod check;
mod collect;

#[cfg(test)]
mod tests;

use artifacts::{captions, rejects, samples};
use pipeline::recipe::IngestRecipe;
use pipeline::{DataSet, StageContext, StageReport, files, outputs};
use pixel_art::Limits;
use sources::{Source, SourceKeys, SourceRecipe};

pub use error::{Conflict, IngestError};

use check::Checker;
use collect::Collected;

/// Version of the tables' columns, in their footers.
const TABLE_VERSION: &str = "1";

/// What messages call the recipe's fields.
const KEYS: SourceKeys = SourceKeys {
    source: "ingest.source",
    image_column: "ingest.image_column",
    caption_column: "ingest.caption_column",
};

/// The same for held-out pictures, which differ in nothing but their source.
const HELD_OUT_KEYS: SourceKeys = SourceKeys {
    source: "evaluate.held_out",
    ..KEYS
};

/// Reads the recipe's source into the stage's directory.
///
/// # Errors
///
/// If the source has no known layout or its metadata is damaged, a picture has two captions, more images than
/// `ingest.max_rejects` cannot be used, none can, or a table cannot be written.
pub fn run(context: &StageContext) -> Result<StageReport, IngestError> {
    let recipe = &context.recipe.ingest;
    let source = open(recipe, context.data)?;
    let job = context
        .progress
        .job("read images", source.num_images() as u64, "images");
    let checker = Checker {
        limits: Limits {
            max_pixels: recipe.max_pixels,
        },
        job: &job,
    };
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(context.options.threads.unwrap_or(0))
        .build()
        .map_err(IngestError::Threads)?;
    let checked = pool.install(|| source.map(|image| checker.check(image)))?;
    job.finish();
    let num_images = checked.len() as u64;
    let collected = Collected::new(checked)?;
    collected.check_rejects(&recipe.source, recipe.max_rejects)?;

    let footer = [("table_version".to_owned(), TABLE_VERSION.to_owned())].into();
    samples::write(&context.path(files::SAMPLES), &collected.samples, &footer)?;
    captions::write(&context.path(files::CAPTIONS), &collected.captions, &footer)?;
    rejects::write(&context.path(files::REJECTS), &collected.rejects, &footer)?;

    let digests = collected.digests();
    let mut report = context
        .report()
        .count("images", num_images)
        .count("samples", collected.samples.len() as u64)
        .count("distinct_captions", collected.num_distinct_captions())
        .count("duplicates", collected.num_duplicates)
        .count("rejects", collected.num_rejects())
        .output(outputs::SAMPLES, digests.samples)
        .output(outputs::CAPTIONS, digests.captions)
        .output(outputs::PAIRS, digests.pairs)
        .output(outputs::COMPAT_HASHES, digests.compat_hashes);
    if collected.num_rejects() > 0 {
        report = report.note(format!(
            "{} of {num_images} images were left out; rejects.parquet says why",
            collected.num_rejects()
        ));
    }
    if collected.num_duplicates > 0 {
        report = report.note(format!(
            "{} images are the same picture with the same caption as another and were taken once",
            collected.num_duplicates
        ));
    }
    for note in source.notes() {
        report = report.note(note);
    }
    Ok(report)
}

fn open(recipe: &IngestRecipe, data: DataSet) -> Result<Source, IngestError> {
    Ok(Source::open(&SourceRecipe {
        path: &recipe.source,
        image_column: &recipe.image_column,
        caption_column: &recipe.caption_column,
        keys: match data {
            DataSet::Training => &KEYS,
            DataSet::HeldOut => &HELD_OUT_KEYS,
        },
    })?)
}
