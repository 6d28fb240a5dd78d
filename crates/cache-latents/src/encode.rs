//! Images through the VAE's encoder: decoded on all cores, batch by batch, while the batch before is encoded.

use std::sync::mpsc;
use std::thread;

use artifacts::{Latent, LatentCacheWriter};
use autoencoder::{Autoencoder, pixels};
use pipeline::recipe::PrecisionChoice;
use pipeline::{StageContext, WeightPart};
use pixel_art::Rgb8;
use rayon::prelude::*;
use tensor::{Precision, to_f32};

use crate::error::CacheLatentsError;
use crate::sources::Sources;
use crate::views::{Geometry, View};

/// Pixels that the encoder takes at once unless the run options say how many pictures: four of 512², which keeps its
/// widest activations near half a GiB.
const PIXELS_PER_BATCH: usize = 1 << 20;

/// Batches that wait decoded.
const WAITING: usize = 2;

/// Encodes views and hands their latents to the writer. The VAE is gone when this returns.
///
/// # Errors
///
/// If the VAE or an image cannot be used, or a shard cannot be written.
pub(crate) fn encode(
    context: &StageContext,
    writer: &mut LatentCacheWriter,
    sources: &Sources,
    geometry: &Geometry,
    views: &[&View],
) -> Result<(), CacheLatentsError> {
    let device = tensor::device::select(&context.options.device)?;
    let precision = match geometry.precision {
        PrecisionChoice::F32 => Precision::F32,
        PrecisionChoice::Bf16 => Precision::Bf16,
        PrecisionChoice::Fp16 => Precision::F16,
    };
    let vae = Autoencoder::open(&context.weights_dir(WeightPart::Vae), &device, precision)?;
    let side_px = geometry.resolution_px as usize;
    let batch = context
        .options
        .batch
        .unwrap_or(PIXELS_PER_BATCH / (side_px * side_px))
        .max(1);
    let job = context
        .progress
        .job("encode images", views.len() as u64, "views");
    thread::scope(|scope| {
        let (sender, receiver) = mpsc::sync_channel(WAITING);
        scope.spawn(move || {
            for batch in views.chunks(batch) {
                let pictures: Result<Vec<Rgb8>, CacheLatentsError> = batch
                    .par_iter()
                    .map(|view| Ok(geometry.render(&sources.decode(view.sample)?, view)))
                    .collect();
                let failed = pictures.is_err();
                // Nobody listens any more if the encoding side has failed.
                if sender.send((batch, pictures)).is_err() || failed {
                    return;
                }
            }
        });
        for (batch, pictures) in receiver {
            let pictures = pictures?;
            let bytes: Vec<&[u8]> = pictures
                .iter()
                .map(|picture| picture.pixels.as_slice())
                .collect();
            let posterior = vae.encode(pixels::from_rgb8(&bytes, side_px, side_px, &device));
            let [_, c, h, w] = posterior.mean.dims();
            let (means, logvars) = (to_f32(&posterior.mean), to_f32(&posterior.logvar));
            let size = c * h * w;
            for ((view, mean), logvar) in batch
                .iter()
                .zip(means.chunks_exact(size))
                .zip(logvars.chunks_exact(size))
            {
                if !mean.iter().chain(logvar).all(|number| number.is_finite()) {
                    return Err(CacheLatentsError::NotFinite {
                        source_file: view.sample.source_file.clone(),
                    });
                }
                writer.push(Latent {
                    sample_id: view.sample.sample_id.clone(),
                    view: view.view,
                    shape: [c, h, w],
                    mean: mean.to_vec(),
                    logvar: logvar.to_vec(),
                    flipped: view.flipped,
                    crop_x_px: view.x_px,
                    crop_y_px: view.y_px,
                })?;
            }
            job.advance(batch.len() as u64);
        }
        Ok(())
    })
}
