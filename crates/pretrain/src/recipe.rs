//! What a pretraining run is: everything that decides its result. Every field must be written; unknown ones are refused.

mod validate;

use std::path::{Path, PathBuf};

use random_base::Preset;
use serde::{Deserialize, Serialize};
use tensor::Precision;

use crate::PretrainError;

/// A pretraining recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PretrainRecipe {
    /// What the base is called in its model card.
    pub name: String,
    /// Set of sizes, by the name of [`Preset`].
    pub preset: String,
    /// Seed of weights, order, noise and augmentation.
    pub seed: u64,
    /// Directory with the tokenizers as a base has them: `tokenizer/` and `tokenizer_2/`.
    pub tokenizers: PathBuf,
    /// Pictures and captions.
    pub corpus: CorpusRecipe,
    /// Pictures to latents and back: the first two phases.
    pub autoencoder: AutoencoderRecipe,
    /// Captions to latents: transformer and text encoders.
    pub base: BaseRecipe,
    /// The transformer again, alone.
    pub refine: RefineRecipe,
    /// What is measured at the end.
    pub evaluate: EvaluateRecipe,
}

/// Pictures and captions.
///
/// A source is what `ingest` reads: a folder of pictures with `metadata.jsonl` or `metadata.csv`, or with `.txt` files
/// beside them, or a Parquet file or folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CorpusRecipe {
    /// What the data is and under which licences, as the model card says it (Markdown).
    pub about: String,
    /// Sources of captioned pictures: both phases learn from them.
    pub captioned: Vec<PathBuf>,
    /// Sources of pixel art, captions or not, that only the autoencoder sees, magnified by whole factors.
    pub textures: Vec<PathBuf>,
    /// Made-up textures of hard blocks for the autoencoder.
    pub synthetic_textures: usize,
    /// Column of the pictures (Parquet).
    pub image_column: String,
    /// Column or key of the captions (Parquet, `metadata.*`).
    pub caption_column: String,
    /// Side of every picture; pictures of another size or shape are scaled to it.
    pub resolution_px: u32,
    /// Share of the captioned pictures that nothing learns from.
    pub held_out_share: f64,
    /// Recoloured, backgrounded, moved or two-coloured versions of each captioned picture, with captions that say so.
    pub variants: usize,
}

/// One optimiser and its schedule: linear warm-up, then a cosine down to `final_lr_share`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerRecipe {
    /// Optimiser steps; 0 only where a phase may be left out.
    pub steps: u64,
    /// Pictures in a step.
    pub batch: usize,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Steps until it is reached.
    pub warmup_steps: u64,
    /// What is left of it at the end.
    pub final_lr_share: f64,
    /// AdamW.
    pub beta1: f64,
    /// AdamW.
    pub beta2: f64,
    /// AdamW.
    pub epsilon: f64,
    /// AdamW: times the learning rate, taken off every parameter before the update.
    pub weight_decay: f64,
    /// Largest global norm of the gradients.
    pub max_grad_norm: f64,
    /// Decay of the averaged weights, which are what is kept.
    pub ema_decay: f64,
    /// `f32` or `bf16`: what the network computes in; masters, moments and average are `f32`.
    pub precision: String,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Steps between logged losses.
    pub log_every: u64,
}

/// The autoencoder's phases.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AutoencoderRecipe {
    /// Weight of the L1 distance of neighbouring pixels' differences: edges.
    pub gradient_weight: f64,
    /// Weight of the L1 distance of latent cells' mean colours: what a sprite's pixel is judged by.
    pub cell_weight: f64,
    /// Weight of the posterior's divergence from the standard normal, per latent value.
    pub kl_weight: f64,
    /// Share of textures (pixel art and made-up blocks) in a batch.
    pub texture_share: f64,
    /// Optimiser of the first phase: encoder and decoder together.
    pub optimizer: OptimizerRecipe,
    /// Optimiser of the second phase: the decoder alone, on what the encoder has settled on; 0 steps for none.
    pub decoder: OptimizerRecipe,
}

/// The third phase: transformer and text encoders together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseRecipe {
    /// Length of T5's ids; padding is attended, so it is the length that the base wants ever after.
    pub t5_tokens: usize,
    /// Share of samples whose caption is left empty, for classifier-free guidance.
    pub caption_dropout: f64,
    /// Share of samples that are the picture as it is; the rest are its variants.
    pub original_share: f64,
    /// Times are `sigmoid(N(mean, std))`, …
    pub logit_mean: f64,
    /// … of this deviation, …
    pub logit_std: f64,
    /// … then shifted as sampling is at this resolution: `σ' = e^μ σ / (1 + (e^μ − 1) σ)`.
    pub shift_mu: f64,
    /// Optimiser.
    pub optimizer: OptimizerRecipe,
}

/// The last phase: the transformer alone, its texts encoded once. Times and dropped captions are as in the base's phase.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RefineRecipe {
    /// Versions of each captioned picture, as `corpus.variants`.
    pub variants: usize,
    /// Share of samples that are the picture as it is.
    pub original_share: f64,
    /// Optimiser; 0 steps for no such phase. In `bf16` on a CUDA card our own engine trains.
    pub optimizer: OptimizerRecipe,
}

/// What is measured at the end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluateRecipe {
    /// Source of pixel-art characters, captions or not, which nothing has learned from; empty for none.
    pub characters: PathBuf,
    /// How many of them.
    pub num_characters: usize,
    /// Held-out pairs whose velocity losses are compared.
    pub num_pairs: usize,
    /// Pictures on the sheet.
    pub num_samples: usize,
    /// Denoising steps.
    pub sample_steps: usize,
    /// Classifier-free guidance.
    pub true_cfg_scale: f64,
}

impl PretrainRecipe {
    /// Reads a recipe; its relative paths start at the directory that holds `configs/`, or at the recipe's own.
    ///
    /// # Errors
    ///
    /// If it cannot be read, is no such recipe, or says what cannot be.
    pub fn load(path: &Path) -> Result<Self, PretrainError> {
        let text = fs_err::read_to_string(path).map_err(PretrainError::Read)?;
        let mut recipe: Self = toml::from_str(&text).map_err(|source| PretrainError::Recipe {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        let own = path.parent().unwrap_or(Path::new(""));
        let root = if own.file_name().is_some_and(|name| name == "configs") {
            own.parent().unwrap_or(Path::new(""))
        } else {
            own
        };
        // Before they are resolved: an empty path would become the directory that others start at.
        recipe.check_paths()?;
        let corpus = &mut recipe.corpus;
        let paths = corpus.captioned.iter_mut().chain(&mut corpus.textures);
        for file in paths.chain([&mut recipe.tokenizers]) {
            *file = root.join(&file);
        }
        if !recipe.evaluate.characters.as_os_str().is_empty() {
            recipe.evaluate.characters = root.join(&recipe.evaluate.characters);
        }
        recipe.check()?;
        Ok(recipe)
    }

    /// The preset.
    pub fn preset(&self) -> Preset {
        self.preset
            .parse()
            .expect("a checked recipe names a preset")
    }
}

impl OptimizerRecipe {
    /// What the network computes in, if it is known.
    pub fn precision(&self) -> Option<Precision> {
        match self.precision.as_str() {
            "f32" => Some(Precision::F32),
            "bf16" => Some(Precision::Bf16),
            _ => None,
        }
    }

    /// The learning rate of a step, counted from 0.
    pub fn learning_rate_at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.learning_rate * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let span = self.steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let progress = ((step - self.warmup_steps) as f64 / span).min(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        self.learning_rate * (self.final_lr_share + (1.0 - self.final_lr_share) * cosine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::tiny_recipe;

    #[test]
    fn the_learning_rate_rises_to_its_height_and_falls_to_its_share() {
        let optimizer = OptimizerRecipe {
            steps: 110,
            warmup_steps: 10,
            learning_rate: 1.0,
            final_lr_share: 0.1,
            ..tiny_recipe().base.optimizer
        };
        assert_eq!(optimizer.learning_rate_at(0), 0.1);
        assert_eq!(optimizer.learning_rate_at(10), 1.0);
        assert!((optimizer.learning_rate_at(60) - 0.55).abs() < 1e-9);
        assert!((optimizer.learning_rate_at(110) - 0.1).abs() < 1e-9);
    }

    #[test]
    fn an_unknown_precision_is_refused_by_name() {
        let mut recipe = tiny_recipe();
        recipe.base.optimizer.precision = "f8".to_owned();
        let error = recipe
            .check()
            .expect_err("there is no such format")
            .to_string();
        assert!(error.contains("precision"), "{error}");
    }
}
