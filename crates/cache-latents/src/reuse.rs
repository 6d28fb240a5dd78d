//! Latents that earlier runs have: whole shards are linked, parts of shards are copied.
//!
//! Equal VAE and equal geometry make equal latents, so nothing else is asked. A shard of an interrupted run of this very
//! fingerprint lies in the directory already and is kept where it is.

use std::collections::BTreeMap;

use artifacts::latents::LatentShard;
use artifacts::{LatentCache, LatentCacheWriter, LatentRow};
use pipeline::StageContext;

use crate::error::CacheLatentsError;
use crate::views::View;

/// Views that are still missing, by image and number.
type Missing<'a> = BTreeMap<(String, u32), &'a View<'a>>;

/// Takes over what there is; the views that must be encoded, in their order.
///
/// # Errors
///
/// If a shard cannot be linked, copied or removed.
pub(crate) fn take_over<'a>(
    context: &StageContext,
    writer: &mut LatentCacheWriter,
    views: &'a [View<'a>],
) -> Result<Vec<&'a View<'a>>, CacheLatentsError> {
    let mut missing: Missing = views
        .iter()
        .map(|view| ((view.sample.sample_id.clone(), view.view), view))
        .collect();
    for shard in writer.leftover_shards()? {
        keep_leftover(writer, shard, &mut missing)?;
    }
    for artifact in context.earlier_artifacts() {
        if missing.is_empty() {
            break;
        }
        match LatentCache::open(&artifact.dir) {
            Ok(cache) if writer.accepts(&cache) => take_from(writer, &cache, &mut missing)?,
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(dir = %artifact.dir.display(), %error, "earlier latents passed over");
            }
        }
    }
    Ok(missing.into_values().collect())
}

/// Keeps a shard that an interrupted run left, unless it holds anything that is not wanted.
fn keep_leftover(
    writer: &mut LatentCacheWriter,
    shard: LatentShard,
    missing: &mut Missing,
) -> Result<(), CacheLatentsError> {
    let is_wanted =
        !shard.keys().is_empty() && shard.keys().iter().all(|key| missing.contains_key(key));
    if !is_wanted {
        return Ok(shard.remove()?);
    }
    Ok(writer.keep(&shard, |sample_id, view| {
        let view = missing
            .remove(&(sample_id.to_owned(), view))
            .expect("every latent of the shard was found missing, and each is there once");
        (view.flipped, view.x_px, view.y_px)
    })?)
}

/// Links shards of which everything is missing here, and copies single latents out of the others.
fn take_from(
    writer: &mut LatentCacheWriter,
    cache: &LatentCache,
    missing: &mut Missing,
) -> Result<(), CacheLatentsError> {
    let mut by_shard: BTreeMap<&str, Vec<&LatentRow>> = BTreeMap::new();
    for row in cache.rows() {
        by_shard.entry(&row.shard).or_default().push(row);
    }
    // Links first: they close the shard that copies are being collected in.
    let (whole, parts): (Vec<&str>, Vec<&str>) = by_shard.keys().copied().partition(|shard| {
        by_shard[shard]
            .iter()
            .all(|row| missing.contains_key(&(row.sample_id.clone(), row.view)))
    });
    for shard in whole {
        writer.link(cache, shard)?;
        for row in &by_shard[shard] {
            missing.remove(&(row.sample_id.clone(), row.view));
        }
    }
    for shard in parts {
        for row in &by_shard[shard] {
            if missing.remove(&(row.sample_id.clone(), row.view)).is_some() {
                writer.push(cache.get(&row.sample_id, row.view)?)?;
            }
        }
    }
    Ok(())
}
