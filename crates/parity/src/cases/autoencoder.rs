//! `vae_*`, `vae_debug`, `image_processor`: crate `autoencoder`.

use autoencoder::{Autoencoder, pixels};
use tensor::device::cpu;
use tensor::{Precision, Tensor};

use crate::checker::{CaseError, CaseRun};
use crate::compare::Values;

fn open(run: &CaseRun) -> Result<Autoencoder, CaseError> {
    let dir = run.set.model().join("vae");
    Ok(Autoencoder::open(&dir, &cpu(), Precision::F32)?)
}

/// A picture to its posterior, a sample of it, its scaled latent and back to a picture.
pub fn round_trip(run: &mut CaseRun) -> Result<(), CaseError> {
    let vae = open(run)?;
    let posterior = vae.encode(run.tensor("in.image", &cpu())?);
    run.output_tensor("mean", &posterior.mean);
    run.output_tensor("logvar", &posterior.logvar);
    let sample = posterior.sample(run.tensor("in.noise", &cpu())?);
    run.output_tensor("sample", &sample);
    let scaled = vae.config().to_model(sample);
    run.output_tensor("latent_scaled", &scaled);
    let decoded = vae.decode(vae.config().from_model(scaled));
    run.output_tensor("decoded", &decoded);
    let [_, _, height_px, width_px] = decoded.dims();
    // The reference holds the first picture without an axis for the batch.
    if let Some(picture) = pixels::to_rgb8(&decoded).into_iter().next() {
        let shape = [height_px, width_px, 3];
        run.output("decoded_u8", Values::U8(picture), &shape);
    }
    Ok(())
}

/// What leaves each block on the way to the mean, and from the unscaled mean to a picture.
pub fn blocks(run: &mut CaseRun) -> Result<(), CaseError> {
    let vae = open(run)?;
    let mut traced: Vec<(String, Tensor<4>)> = Vec::new();
    let mut probe = |name: &str, value: &Tensor<4>| traced.push((name.to_owned(), value.clone()));
    let posterior = vae.encode_traced(run.tensor("in.image", &cpu())?, &mut probe);
    let decoded = vae.decode_traced(posterior.mean.clone(), &mut probe);
    for (name, value) in &traced {
        run.output_tensor(name, value);
    }
    run.output_tensor("mean", &posterior.mean);
    run.output_tensor("decoded", &decoded);
    Ok(())
}

/// Bytes to the model's range and back.
pub fn image_processor(run: &mut CaseRun) -> Result<(), CaseError> {
    let (picture, shape) = run.u8("in.image_u8")?;
    let [height_px, width_px, _] = run.axes("in.image_u8", shape)?;
    let pictures: &[&[u8]] = &[&picture];
    let preprocessed = pixels::from_rgb8(pictures, width_px, height_px, &cpu());
    run.output_tensor("preprocessed", &preprocessed);

    let tensor: Tensor<4> = run.tensor("in.tensor", &cpu())?;
    let [b, c, h, w] = tensor.dims();
    let bytes = pixels::to_rgb8(&tensor).concat(); // b h w c
    run.output("postprocessed_u8", Values::U8(bytes), &[b, h, w, c]);
    Ok(())
}
