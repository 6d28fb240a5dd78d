//! A run's pictures, batch by batch: noise, denoising, decoding, files.

use autoencoder::Autoencoder;
use engine::{Engine, RunError};
use flow_matching::{InferenceSchedule, Purpose, Stream};
use pipeline::StageContext;
use pipeline::recipe::SampleRecipe;
use tensor::{Device, Tensor, from_f32};

use crate::conditioning::{Conditioning, EncodedTexts};
use crate::denoise::{Denoising, TrueCfg, denoise};
use crate::error::SampleError;
use crate::parameters::{Parameters, Settings};
use crate::pictures::{Picture, decode};
use crate::plan::{Pass, Plan, Shot};
use crate::stack::LoraStack;

/// The noise that a picture starts from, as tokens `(1, n, 4·channels)`: a matter of its seed and number alone.
pub fn initial_noise(
    shot: Shot,
    channels: usize,
    latent_cells: [usize; 2],
    device: &Device,
) -> Tensor<3> {
    let [h, w] = latent_cells;
    let key = shot.image.to_string();
    let values = Stream::new(shot.seed, Purpose::InitialLatent, 0, &key).normals(channels * h * w);
    mmdit::patchify(from_f32(values, [1, channels, h, w], device)) // 1 n 4c
}

/// A run on its way from texts to pictures.
pub(crate) struct Drawing<'a> {
    pub(crate) recipe: &'a SampleRecipe,
    pub(crate) plan: &'a Plan,
    pub(crate) texts: &'a EncodedTexts,
    pub(crate) schedule: &'a InferenceSchedule,
    pub(crate) latent_cells: [usize; 2],
    pub(crate) batch: usize,
    pub(crate) device: &'a Device,
}

impl Drawing<'_> {
    /// The latents of all pictures, batch by batch; an error if the engine cannot go on.
    pub(crate) fn denoise_all(
        &self,
        engine: &mut dyn Engine,
        stack: &LoraStack,
        context: &StageContext,
    ) -> Result<Vec<Tensor<3>>, RunError> {
        engine.set_lora(&stack.factors())?;
        let guidance = engine
            .config()
            .guidance_embeds
            .then_some(self.recipe.guidance as f32);
        let channels = engine.config().in_channels / 4;
        let shots = &self.plan.shots;
        let job = context.progress.job(
            "draw",
            shots.len() as u64 * u64::from(self.recipe.steps),
            "steps",
        );
        let mut latents = Vec::new();
        for (number, batch) in shots.chunks(self.batch).enumerate() {
            let first = number * self.batch + 1;
            job.message(format!(
                "pictures {first} to {} of {}",
                first + batch.len() - 1,
                shots.len()
            ));
            let noise = batch
                .iter()
                .map(|&shot| initial_noise(shot, channels, self.latent_cells, self.device))
                .collect();
            let prompts: Vec<&Conditioning> = batch
                .iter()
                .map(|shot| self.texts.get(&self.plan.prompts[shot.prompt]))
                .collect();
            let negative = self
                .plan
                .negative_prompt
                .as_ref()
                .map(|text| Conditioning::stack(&vec![self.texts.get(text); batch.len()]));
            let denoising = Denoising {
                schedule: self.schedule,
                latents: Tensor::cat(noise, 0), // b n 4c
                latent_cells: self.latent_cells,
                conditioning: &Conditioning::stack(&prompts),
                guidance,
                true_cfg: negative.as_ref().map(|negative| TrueCfg {
                    negative,
                    scale: self.recipe.true_cfg_scale,
                }),
            };
            latents.push(denoise(engine, &denoising, |_, _| {
                job.advance(batch.len() as u64)
            })?);
        }
        Ok(latents)
    }

    /// Decodes and writes every picture.
    pub(crate) fn finish(
        &self,
        vae: &Autoencoder,
        latents: Vec<Tensor<3>>,
        pass: Pass,
        settings: &Settings,
        context: &StageContext,
    ) -> Result<Vec<Picture>, SampleError> {
        let job = context
            .progress
            .job("decode", self.plan.shots.len() as u64, "pictures");
        let mut pictures = Vec::with_capacity(self.plan.shots.len());
        for latents in latents {
            let [rows, n, c] = latents.dims();
            // One at a time: the decoder's widest level needs hundreds of times a latent's memory.
            for row in 0..rows {
                let tokens = latents.clone().slice([row..row + 1, 0..n, 0..c]);
                let drawn = decode(vae, tokens, self.latent_cells).map_err(|source| {
                    let shot = self.plan.shots[pictures.len()];
                    SampleError::NotFinite {
                        prompt: self.plan.prompts[shot.prompt].clone(),
                        seed: shot.seed,
                        what: match pass {
                            Pass::WithLoras if settings.loras.is_empty() => "without a LoRA",
                            Pass::WithLoras => "with its LoRAs",
                            Pass::BaseAlone => "of the base alone",
                        },
                        source,
                    }
                })?;
                for image in drawn {
                    let index = pictures.len();
                    let shot = self.plan.shots[index];
                    let picture = Picture {
                        file: self.plan.file_name(index, pass),
                        pass,
                        image,
                        parameters: Parameters {
                            prompt: self.plan.prompts[shot.prompt].clone(),
                            seed: shot.seed,
                            image: shot.image,
                            settings: settings.clone(),
                        },
                    };
                    picture.write(&context.dir)?;
                    pictures.push(picture);
                }
                job.advance(1);
            }
        }
        Ok(pictures)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::device::cpu;
    use tensor::to_f32;

    fn noise(seed: u64, image: u32, prompt: usize) -> Vec<f32> {
        let shot = Shot {
            prompt,
            seed,
            image,
        };
        let tokens = initial_noise(shot, 2, [4, 6], &cpu());
        assert_eq!(tokens.dims(), [1, 6, 8]);
        to_f32(&tokens)
    }

    #[test]
    fn noise_is_a_matter_of_seed_and_number_and_not_of_the_prompt() {
        assert_eq!(noise(1, 0, 0), noise(1, 0, 5));
        assert_ne!(noise(1, 0, 0), noise(2, 0, 0));
        assert_ne!(noise(1, 0, 0), noise(1, 1, 0));
    }
}
