//! The flow-matching loss of pictures that were not trained on, of the base and with the LoRA.
//!
//! The loss is the mean squared error of the velocity, unweighted, at noise levels that the recipe lists. Noise and
//! posterior draw of a picture are functions of (seed, draw, sample id): they do not depend on the other pictures, on the
//! order, or on which levels are listed, and the base and the LoRA see the same ones. So the difference between both is
//! the LoRA's, and reports of two LoRAs on one base can be compared number by number.

use autoencoder::{AutoencoderConfig, Posterior};
use engine::{Engine, Factors, Input};
use flow_matching::{Purpose, Stream, add_noise, velocity_target, weighted_mse};
use mmdit::{image_ids, patchify, text_ids, unpatchify};
use pipeline::StageContext;
use pipeline::recipe::EvaluateRecipe;
use serde::{Deserialize, Serialize};
use tensor::{Device, Tensor, from_f32, to_f32};

use crate::error::EvaluateError;
use crate::held_out::{HeldOut, HeldOutPicture, location};
use crate::interval::{Interval, relative_change};

/// Pictures that go through the transformer at once when the caller has no wish: alone, a loss is the same to the last
/// bit whatever else is measured, and two CPU cores gain nothing from larger batches.
const USUAL_BATCH: usize = 1;

/// The losses of one picture, each a mean over its draws, by noise level in the recipe's order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PictureLoss {
    /// Its identity.
    pub sample_id: String,
    /// Its file.
    pub source_file: String,
    /// Without the LoRA.
    pub base: Vec<f64>,
    /// With it.
    pub lora: Vec<f64>,
}

/// A loss over all pictures and draws.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MeanLoss {
    /// Over all noise levels.
    pub mean: f64,
    /// By noise level.
    pub by_sigma: Vec<f64>,
}

/// What was measured on the held-out pictures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeldOutLoss {
    /// Noise levels.
    pub sigmas: Vec<f64>,
    /// Noises per picture.
    pub draws: u32,
    /// Without the LoRA.
    pub base: MeanLoss,
    /// With it.
    pub lora: MeanLoss,
    /// `lora.mean / base.mean − 1`: below 0 is better.
    pub change: f64,
    /// Paired bootstrap over the pictures.
    pub interval: Interval,
    /// Pictures whose loss is lower with the LoRA.
    pub num_improved: u64,
    /// Every picture.
    pub pictures: Vec<PictureLoss>,
}

/// Measures all pictures, first the base and then with the LoRA: one forward pass for each picture, draw and level.
///
/// # Errors
///
/// If a latent or an embedding cannot be read, the engine cannot go on, or a loss is not finite.
pub fn measure(
    context: &StageContext,
    held_out: &HeldOut,
    engine: &mut dyn Engine,
    lora: &[Factors],
    vae: &AutoencoderConfig,
) -> Result<HeldOutLoss, EvaluateError> {
    let recipe = &context.recipe.evaluate;
    let meter = Meter {
        recipe,
        vae,
        device: tensor::device::cpu(),
        guidance: context.recipe.train.guidance as f32,
        batch: context.options.batch.unwrap_or(USUAL_BATCH).max(1),
    };
    let job = context.progress.job(
        "held-out loss",
        2 * held_out.pictures.len() as u64,
        "pictures",
    );
    let mut losses = [Vec::new(), Vec::new()];
    for ((factors, with), losses) in [(&[][..], "without the LoRA"), (lora, "with the LoRA")]
        .into_iter()
        .zip(&mut losses)
    {
        engine.set_lora(factors)?;
        for picture in &held_out.pictures {
            losses.push(meter.measure(engine, held_out, picture, with)?);
            job.advance(1);
        }
    }
    job.finish();
    let [base, lora] = losses;
    let pictures = held_out
        .pictures
        .iter()
        .zip(base.into_iter().zip(lora))
        .map(|(picture, (base, lora))| PictureLoss {
            sample_id: picture.sample.sample_id.clone(),
            source_file: location(&picture.sample),
            base,
            lora,
        })
        .collect();
    Ok(summary(recipe, pictures))
}

struct Meter<'a> {
    recipe: &'a EvaluateRecipe,
    vae: &'a AutoencoderConfig,
    /// Where noise is added and losses are taken: an engine takes and gives plain numbers.
    device: Device,
    guidance: f32,
    batch: usize,
}

impl Meter<'_> {
    /// The picture's losses by noise level, each a mean over the draws.
    fn measure(
        &self,
        engine: &mut dyn Engine,
        held_out: &HeldOut,
        picture: &HeldOutPicture,
        with: &'static str,
    ) -> Result<Vec<f64>, EvaluateError> {
        let latent = held_out.latent(picture)?;
        let [c, h, w] = latent.shape;
        let tensor = |values: Vec<f32>| from_f32::<4>(values, [1, c, h, w], &self.device);
        let posterior = Posterior {
            mean: tensor(latent.mean),
            logvar: tensor(latent.logvar).clamp(LOGVAR_MIN, LOGVAR_MAX),
        };
        // (x₀, ε, level) of every forward pass.
        let mut points = Vec::new();
        for draw in 0..u64::from(self.recipe.draws) {
            let normals = |purpose| {
                let id = &picture.sample.sample_id;
                tensor(Stream::new(self.recipe.seed, purpose, draw, id).normals(c * h * w))
            };
            let x0 = self
                .vae
                .to_model(posterior.sample(normals(Purpose::Posterior)));
            let noise = normals(Purpose::Noise);
            for level in 0..self.recipe.sigmas.len() {
                points.push((x0.clone(), noise.clone(), level));
            }
        }
        let text = held_out.text(picture)?;
        let mut positions = text_ids(text.shape[0]);
        positions.extend(image_ids(h, w));
        let velocity_channels = engine.config().velocity_channels();
        let guided = engine.config().guidance_embeds;

        let mut sums = vec![0.0; self.recipe.sigmas.len()];
        for batch in points.chunks(self.batch) {
            let b = batch.len();
            let stack = |part: fn(&Point) -> &Tensor<4>| {
                Tensor::cat(batch.iter().map(|point| part(point).clone()).collect(), 0) // b c h w
            };
            let (x0, noise) = (stack(|point| &point.0), stack(|point| &point.1));
            let sigmas: Vec<f32> = batch
                .iter()
                .map(|(_, _, level)| self.recipe.sigmas[*level] as f32)
                .collect();
            let target = velocity_target(x0.clone(), noise.clone());
            let guidance = vec![self.guidance; b];
            let hidden_states = patchify(add_noise(x0, noise, &sigmas)); // b n 4c
            let [_, n, _] = hidden_states.dims();
            let velocity = engine.velocity(&Input {
                hidden_states: &to_f32(&hidden_states),
                encoder_hidden_states: &text.prompt_embeds.repeat(b),
                pooled_projections: &text.pooled.repeat(b),
                timestep: &sigmas, // the training table is not shifted: a timestep is 1000σ
                guidance: guided.then_some(guidance.as_slice()),
                positions: &positions,
            })?;
            let velocity = from_f32(velocity, [b, n, velocity_channels], &self.device);
            let velocity = unpatchify(velocity, h, w);
            for (row, (_, _, level)) in batch.iter().enumerate() {
                let [found, wanted] = [&velocity, &target].map(|t| t.clone().narrow(0, row, 1)); // 1 c h w
                let loss = f64::from(to_f32(&weighted_mse(found, wanted, &[1.0]))[0]);
                if !loss.is_finite() {
                    return Err(EvaluateError::NotFinite {
                        source_file: location(&picture.sample),
                        sigma: sigmas[row],
                        loss,
                        with,
                    });
                }
                sums[*level] += loss;
            }
        }
        let draws = f64::from(self.recipe.draws);
        Ok(sums.into_iter().map(|sum| sum / draws).collect())
    }
}

/// Latent, noise and number of the noise level.
type Point = (Tensor<4>, Tensor<4>, usize);

/// Bounds of a log-variance: `DiagonalGaussianDistribution`, diffusers 0.42. The cache holds it as the VAE gave it.
const LOGVAR_MIN: f32 = -30.0;
const LOGVAR_MAX: f32 = 20.0;

/// Means over the pictures, and how sure the change is.
fn summary(recipe: &EvaluateRecipe, pictures: Vec<PictureLoss>) -> HeldOutLoss {
    let mean_of = |losses: fn(&PictureLoss) -> &[f64]| {
        let by_sigma: Vec<f64> = (0..recipe.sigmas.len())
            .map(|level| mean(pictures.iter().map(|picture| losses(picture)[level])))
            .collect();
        MeanLoss {
            mean: mean(by_sigma.iter().copied()),
            by_sigma,
        }
    };
    let (base, lora) = (mean_of(|p| &p.base), mean_of(|p| &p.lora));
    let pairs: Vec<[f64; 2]> = pictures
        .iter()
        .map(|picture| [&picture.base, &picture.lora].map(|losses| mean(losses.iter().copied())))
        .collect();
    HeldOutLoss {
        sigmas: recipe.sigmas.clone(),
        draws: recipe.draws,
        change: relative_change(&pairs),
        interval: Interval::bootstrap(&pairs, recipe.seed, recipe.resamples),
        num_improved: pairs.iter().filter(|[base, lora]| lora < base).count() as u64,
        base,
        lora,
        pictures,
    }
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len().max(1) as f64;
    values.sum::<f64>() / count
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_recipe::recipe;

    #[test]
    fn means_are_over_pictures_and_levels() {
        let recipe = EvaluateRecipe {
            sigmas: vec![0.25, 0.75],
            ..recipe()
        };
        let picture = |base: [f64; 2], lora: [f64; 2]| PictureLoss {
            sample_id: String::new(),
            source_file: String::new(),
            base: base.to_vec(),
            lora: lora.to_vec(),
        };
        let pictures = vec![
            picture([1.0, 3.0], [0.5, 1.5]),
            picture([2.0, 2.0], [3.0, 1.0]),
        ];
        let loss = summary(&recipe, pictures);
        assert_eq!(loss.base.by_sigma, [1.5, 2.5]);
        assert_eq!(loss.lora.by_sigma, [1.75, 1.25]);
        assert_eq!((loss.base.mean, loss.lora.mean), (2.0, 1.5));
        assert_eq!(loss.change, -0.25);
        // The second picture's mean is the same with the LoRA.
        assert_eq!(loss.num_improved, 1);
        assert!(loss.interval.low >= -0.5 && loss.interval.high <= 0.0);
    }
}
