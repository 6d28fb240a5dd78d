//! The recipe: one TOML file that decides a run's result, with nothing left to a default.
//!
//! Every field must be written, unknown ones are refused, and each decides part of a fingerprint (paths excepted: the
//! content behind them counts). What only changes speed is in [`crate::RunOptions`].
//!
//! Relative paths start at the directory that holds `configs/` when the recipe lies in a directory of that name, and
//! at the recipe's own directory otherwise. [`Recipe::load`] makes them absolute.

mod flatten;
mod load;
mod overrides;
mod validate;
mod values;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use load::RecipeError;
pub use overrides::Override;
pub use validate::Complaint;
pub use values::{
    Background, BaseFormat, Crop, LongText, LoraInit, Optimizer, PrecisionChoice, Scaling,
    Schedule, TimestepSampling, Weighting,
};

/// Everything that decides the result of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// What people call this run; a label only, in no fingerprint.
    pub name: String,
    /// The model that is adapted.
    pub base: BaseRecipe,
    /// Reading images and captions.
    pub ingest: IngestRecipe,
    /// Encoding captions.
    pub embed_text: EmbedTextRecipe,
    /// Encoding images.
    pub cache_latents: CacheLatentsRecipe,
    /// Training the LoRA.
    pub train: TrainRecipe,
    /// Drawing pictures.
    pub sample: SampleRecipe,
    /// Measuring LoRA and pictures.
    pub evaluate: EvaluateRecipe,
}

/// The model that is adapted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseRecipe {
    /// A diffusers directory: `model_index.json`, `transformer/`, `vae/`, `text_encoder/`, … Not fingerprinted; the
    /// digests of the files that a stage uses are.
    pub path: PathBuf,
}

impl BaseRecipe {
    /// Whether the base says of itself that its weights are random, so that every picture will be noise:
    /// `"_spritelora_untrained": true` in `model_index.json`.
    pub fn is_untrained(&self) -> bool {
        fs_err::read(self.path.join("model_index.json"))
            .ok()
            .and_then(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).ok())
            .is_some_and(|index| index["_spritelora_untrained"] == true)
    }
}

/// Reading images and captions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IngestRecipe {
    /// An image folder with `metadata.jsonl`, `metadata.csv` or `.txt` captions, or a Hugging Face Parquet file or
    /// folder. Not fingerprinted; names below it and contents are.
    pub source: PathBuf,
    /// Name of the caption's column or key (`metadata.*` and Parquet sources).
    pub caption_column: String,
    /// Name of the image's column (Parquet sources).
    pub image_column: String,
    /// More rejected images than this and the stage fails instead of training on what is left.
    pub max_rejects: u64,
    /// Largest `width × height` that is decoded; a header that says more is rejected before allocation.
    pub max_pixels: u64,
}

/// Encoding captions with T5 and CLIP.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmbedTextRecipe {
    /// Number of T5 positions, padding included (padding is attended, so it decides the result).
    pub t5_tokens: usize,
    /// What happens to a caption with more tokens than that.
    pub long_captions: LongText,
    /// What the encoders compute in.
    pub precision: PrecisionChoice,
    /// Embeddings in the public recipe's Parquet layout to use instead of the encoders; `""` for none. Not
    /// fingerprinted; its content is.
    #[serde(with = "values::empty_is_none")]
    pub public_embeddings: Option<PathBuf>,
}

/// Encoding images with the VAE.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheLatentsRecipe {
    /// Width and height of every view, in pixels.
    pub resolution_px: u32,
    /// How a sprite is brought to the resolution.
    pub scaling: Scaling,
    /// What stands behind transparent pixels: `"#rrggbb"`, or `"drop-alpha"` to expose the hidden colour.
    pub background: Background,
    /// Where the view is cut.
    pub crop: Crop,
    /// Probability that a view is mirrored, 0 to 1.
    pub flip_probability: f64,
    /// Number of views (crops and flips) kept of each image.
    pub views: u32,
    /// Seed of crops and flips.
    pub seed: u64,
    /// What the VAE computes in.
    pub precision: PrecisionChoice,
}

/// Training the LoRA.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainRecipe {
    /// Seed of initialisation, data order, noise and timesteps.
    pub seed: u64,
    /// Number of optimiser steps.
    pub steps: u32,
    /// Images in one forward pass.
    pub micro_batch: u32,
    /// Forward passes in one optimiser step.
    pub accumulation: u32,
    /// The optimiser.
    pub optimizer: Optimizer,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// How the learning rate moves.
    pub schedule: Schedule,
    /// Steps of linear warm-up (schedules other than `constant`, which has none: write 0).
    pub warmup_steps: u32,
    /// Restarts of `cosine-with-restarts`.
    pub schedule_cycles: u32,
    /// Exponent of `polynomial`.
    pub schedule_power: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Tensors with fewer elements keep f32 states under `adamw8bit`.
    pub min_8bit_size: usize,
    /// Global gradient norm to which gradients are clipped.
    pub max_grad_norm: f64,
    /// What the network computes in.
    pub precision: PrecisionChoice,
    /// First loss scale under `fp16`.
    pub initial_loss_scale: f64,
    /// Steps without overflow after which the loss scale doubles.
    pub loss_scale_growth_interval: u32,
    /// How the frozen base's linear layers are kept.
    pub base_format: BaseFormat,
    /// Rank of the LoRA.
    pub rank: usize,
    /// Alpha of the LoRA; its effect is scaled by alpha / rank.
    pub alpha: f64,
    /// How A is initialised (B is zero).
    pub lora_init: LoraInit,
    /// Suffixes of the modules that get a LoRA, e.g. `to_q`, `to_out.0`.
    pub targets: Vec<String>,
    /// Guidance fed to a base with a guidance embedding.
    pub guidance: f64,
    /// Weight of the loss by noise level.
    pub weighting: Weighting,
    /// Density from which noise levels are drawn.
    pub timestep_sampling: TimestepSampling,
    /// Mean of `logit_normal` sampling.
    pub logit_mean: f64,
    /// Standard deviation of `logit_normal` sampling.
    pub logit_std: f64,
    /// Scale of `mode` sampling.
    pub mode_scale: f64,
    /// Steps between checkpoints.
    pub checkpoint_every: u32,
    /// Number of newest checkpoints kept.
    pub keep_checkpoints: u32,
}

/// Drawing pictures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleRecipe {
    /// Prompts; those of `prompts_file` follow them.
    pub prompts: Vec<String>,
    /// A text file with one prompt per line; `""` for none. Not fingerprinted; its content is.
    #[serde(with = "values::empty_is_none")]
    pub prompts_file: Option<PathBuf>,
    /// Negative prompt; needs `true_cfg_scale` above 1.
    pub negative_prompt: String,
    /// Scale of true classifier-free guidance; 1 is off.
    pub true_cfg_scale: f64,
    /// Guidance fed to a base with a guidance embedding.
    pub guidance: f64,
    /// Number of denoising steps.
    pub steps: u32,
    /// Seeds; every prompt is drawn with each.
    pub seeds: Vec<u64>,
    /// Pictures per prompt and seed.
    pub images_per_prompt: u32,
    /// Width in pixels.
    pub width_px: u32,
    /// Height in pixels.
    pub height_px: u32,
    /// Number of T5 positions, padding included.
    pub t5_tokens: usize,
    /// What happens to a prompt with more tokens than that.
    pub long_prompts: LongText,
    /// What the networks compute in.
    pub precision: PrecisionChoice,
    /// How the base's linear layers are kept.
    pub base_format: BaseFormat,
    /// Whether the LoRA of this recipe's `train` is applied; `false` makes `sample` independent of `train`.
    pub use_trained_lora: bool,
    /// Scale of the trained LoRA.
    pub lora_scale: f64,
    /// Further LoRAs, applied at once.
    pub loras: Vec<LoraChoice>,
    /// Whether each picture is also drawn without any LoRA, with the same seed, prompt and steps.
    pub compare_with_base: bool,
    /// Columns of the contact sheet.
    pub sheet_columns: u32,
    /// Integer magnification of each picture on the contact sheet.
    pub sheet_magnify: u32,
}

/// Measuring how well the LoRA predicts pictures that it was not trained on, and whether pictures show what their
/// prompts say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluateRecipe {
    /// A source of pictures with captions like `ingest.source`, of which none is trained on; `""` for none, then no
    /// loss is measured. Not fingerprinted; names below it and contents are.
    #[serde(with = "values::empty_is_none")]
    pub held_out: Option<PathBuf>,
    /// Noise levels of the loss, above 0 and at most 1.
    pub sigmas: Vec<f64>,
    /// Noises per picture; each is used at every level.
    pub draws: u32,
    /// Seed of noises, resamples and permutations.
    pub seed: u64,
    /// Resamples of the held-out pictures from which the interval of the loss's change is read.
    pub resamples: u32,
    /// Random reassignments of prompts to pictures from which chance is read.
    pub permutations: u32,
    /// Share of a region's pixels from which on a colour counts as visible there.
    pub visible_share: f64,
    /// Things in the head's region whose colour a prompt may say, e.g. `hair` for "long red hair". Without any word
    /// here and below no attributes are measured.
    pub head_words: Vec<String>,
    /// The same for the torso.
    pub torso_words: Vec<String>,
    /// The same for the legs.
    pub legs_words: Vec<String>,
    /// The same for the feet.
    pub feet_words: Vec<String>,
}

/// A LoRA file and how strongly it is applied.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraChoice {
    /// A LoRA in diffusers or kohya form. Not fingerprinted; its content is.
    pub path: PathBuf,
    /// Multiplies its own alpha / rank.
    pub scale: f64,
}
