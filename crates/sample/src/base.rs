//! The base as its configurations say it: do its parts belong together, which sizes can it draw, how is noise scheduled.
//!
//! All of it is known before any weights are read, so that a wrong request fails in a moment.

use autoencoder::AutoencoderConfig;
use flow_matching::{InferenceSchedule, Scheduler, SchedulerConfig, latent_seq_len};
use mmdit::MmditConfig;
use mmdit::patches::PATCH_CELLS;
use pipeline::recipe::SampleRecipe;
use pipeline::{StageContext, WeightPart};
use text_encoders::{ClipConfig, T5Config};

use crate::error::SampleError;

/// The configurations of the base's parts, found to belong together.
pub(crate) struct Base {
    /// The transformer's sizes.
    pub(crate) transformer: MmditConfig,
    /// The VAE's sizes.
    pub(crate) vae: AutoencoderConfig,
    /// Whether the base says of itself that its weights are random.
    pub(crate) untrained: bool,
}

impl Base {
    /// Reads the configurations.
    pub(crate) fn open(context: &StageContext) -> Result<Self, SampleError> {
        let config = |part| context.weights_dir(part).join("config.json");
        let transformer = MmditConfig::from_file(&config(WeightPart::Transformer))?;
        let vae = AutoencoderConfig::from_file(&config(WeightPart::Vae))?;
        let clip = ClipConfig::from_file(&config(WeightPart::Clip))?;
        let t5 = T5Config::from_file(&config(WeightPart::T5))?;
        let same = |what, part, expected: usize, found: usize| {
            if expected == found {
                return Ok(());
            }
            Err(SampleError::PartsDiffer {
                base: context.recipe.base.path.clone(),
                what,
                expected,
                found,
                part,
            })
        };
        same(
            "the width of a text token",
            "T5 encoder",
            transformer.joint_attention_dim,
            t5.d_model,
        )?;
        same(
            "the width of the pooled prompt",
            "CLIP text encoder",
            transformer.pooled_projection_dim,
            clip.hidden_size,
        )?;
        let token_channels = 4 * vae.latent_channels;
        same(
            "the width of an image token",
            "VAE",
            transformer.in_channels,
            token_channels,
        )?;
        same(
            "the width of a velocity",
            "VAE",
            transformer.velocity_channels(),
            token_channels,
        )?;
        Ok(Self {
            transformer,
            vae,
            untrained: context.recipe.base.is_untrained(),
        })
    }

    /// Rows and columns of the latents of a picture.
    pub(crate) fn latent_cells(
        &self,
        width_px: u32,
        height_px: u32,
    ) -> Result<[usize; 2], SampleError> {
        latent_cells(self.vae.scale_factor_px(), width_px, height_px)
    }

    /// The noise levels of a run.
    pub(crate) fn schedule(
        &self,
        context: &StageContext,
        latent_cells: [usize; 2],
    ) -> Result<InferenceSchedule, SampleError> {
        let path = context
            .weights_dir(WeightPart::Scheduler)
            .join("scheduler_config.json");
        let scheduler = Scheduler::new(SchedulerConfig::from_file(&path)?);
        let num_tokens = latent_seq_len(latent_cells[0], latent_cells[1]);
        Ok(scheduler.inference(context.recipe.sample.steps as usize, num_tokens))
    }

    /// What a person should know about this base.
    pub(crate) fn notes(&self, recipe: &SampleRecipe) -> Vec<String> {
        let mut notes = Vec::new();
        if self.untrained {
            notes.push(
                "the base is untrained (random weights): these pictures are noise".to_owned(),
            );
        }
        if !self.transformer.guidance_embeds {
            notes.push(format!(
                "the base has no guidance embedding: sample.guidance = {} had no effect",
                recipe.guidance
            ));
        }
        notes
    }
}

/// Rows and columns of latent cells, each `cell_px` pixels wide, of a picture that divides into tokens.
fn latent_cells(cell_px: usize, width_px: u32, height_px: u32) -> Result<[usize; 2], SampleError> {
    let multiple_px = (cell_px * PATCH_CELLS) as u32;
    // The nearest multiple; of two that are equally near the larger one, and never 0.
    let nearest = |side_px: u32| {
        let multiple = u64::from(multiple_px);
        let count = (u64::from(side_px) + multiple / 2) / multiple;
        (count.max(1) * multiple) as u32
    };
    let (nearest_width_px, nearest_height_px) = (nearest(width_px), nearest(height_px));
    if (nearest_width_px, nearest_height_px) != (width_px, height_px) {
        return Err(SampleError::Size {
            width_px,
            height_px,
            multiple_px,
            nearest_width_px,
            nearest_height_px,
        });
    }
    Ok([height_px as usize / cell_px, width_px as usize / cell_px])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_of_whole_tokens_has_two_cells_per_token_and_side() {
        assert_eq!(latent_cells(8, 160, 96).expect("multiples of 16"), [12, 20]);
    }

    #[test]
    fn another_size_is_refused_with_the_nearest_one() {
        for (asked, nearest) in [
            ((100, 96), (96, 96)),
            ((0, 104), (16, 112)),
            ((1, 32), (16, 32)),
        ] {
            let error = latent_cells(8, asked.0, asked.1).expect_err("no multiple");
            let SampleError::Size {
                multiple_px,
                nearest_width_px,
                nearest_height_px,
                ..
            } = error
            else {
                panic!("{error}");
            };
            assert_eq!(
                (multiple_px, nearest_width_px, nearest_height_px),
                (16, nearest.0, nearest.1)
            );
        }
    }
}
