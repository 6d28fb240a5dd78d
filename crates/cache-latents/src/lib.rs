//! Stage `cache-latents`: every view of every image through the VAE's encoder.
//!
//! Reads `samples.parquet` of `ingest` and the images themselves, and writes posterior mean and log-variance per view
//! into safetensors shards with an index. A view's crop and flip depend on (seed, image, view) alone, so it is known
//! before anything is decoded which latents earlier runs have: their shards are taken over as they are (hard links), and
//! ten new images cost ten encodings. Images are decoded on all cores while the encoder works; the VAE is not loaded if
//! there is nothing to encode, and is gone when the stage ends.

#![forbid(unsafe_code)]

mod encode;
mod error;
mod reuse;
mod sources;
mod views;

use artifacts::{Digest, Hasher, LatentCache, LatentCacheWriter};
use autoencoder::AutoencoderConfig;
use pipeline::{Stage, StageContext, StageReport, WeightPart, files, outputs};

pub use error::CacheLatentsError;

use sources::Sources;
use views::Geometry;

/// Runs the stage.
///
/// # Errors
///
/// If an image does not fit the resolution or is no longer the one that was ingested, the VAE cannot be used, or the
/// cache cannot be written.
pub fn run(context: &StageContext) -> Result<StageReport, CacheLatentsError> {
    let samples = artifacts::samples::read(&context.input(Stage::Ingest).path(files::SAMPLES))?;
    let vae_dir = context.weights_dir(WeightPart::Vae);
    let config = AutoencoderConfig::from_file(&vae_dir.join("config.json"))?;
    let geometry = Geometry::new(&context.recipe.cache_latents);
    let side_px = geometry.resolution_px as usize;
    config.check_size(side_px, side_px)?;
    if config.in_channels != 3 {
        return Err(CacheLatentsError::Channels {
            path: vae_dir.join("config.json"),
            found: config.in_channels,
        });
    }
    let views = geometry.views(&samples, context.recipe.cache_latents.views)?;

    let vae_digest: Digest = context
        .weights_digest(WeightPart::Vae)
        .parse()
        .expect("the pipeline's digests are BLAKE3 in hexadecimal");
    let mut writer = LatentCacheWriter::create(&context.dir, vae_digest, &geometry.to_string());
    let new = reuse::take_over(context, &mut writer, &views)?;
    let num_new = new.len() as u64;
    if !new.is_empty() {
        let sources = Sources::new(&context.recipe.ingest);
        encode::encode(context, &mut writer, &sources, &geometry, &new)?;
    }
    writer.finish()?;

    let cache = LatentCache::open(&context.dir)?;
    Ok(context
        .report()
        .count("images", samples.len() as u64)
        .count("views", views.len() as u64)
        .count("encoded", num_new)
        .count("reused", views.len() as u64 - num_new)
        .output(outputs::LATENTS, digest(&cache)?))
}

/// Over every view with its latent, sorted: what training can see.
fn digest(cache: &LatentCache) -> Result<Digest, CacheLatentsError> {
    let mut keys: Vec<(&str, u32)> = cache
        .rows()
        .iter()
        .map(|row| (row.sample_id.as_str(), row.view))
        .collect();
    keys.sort_unstable();
    let mut hasher = Hasher::new();
    for (sample_id, view) in keys {
        let latent = cache.get(sample_id, view)?;
        hasher.field(sample_id.as_bytes());
        hasher.field(&view.to_le_bytes());
        for size in latent.shape {
            hasher.field(&(size as u64).to_le_bytes());
        }
        for numbers in [&latent.mean, &latent.logvar] {
            let bytes: Vec<u8> = numbers
                .iter()
                .flat_map(|number| number.to_le_bytes())
                .collect();
            hasher.field(&bytes);
        }
    }
    Ok(hasher.finish())
}
