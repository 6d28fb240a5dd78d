//! The stages: names, order, what each reads of the base, and what it must produce.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Names of the files that stages leave in their artifact directories for others to read.
pub mod files {
    /// `ingest`: one row per distinct image.
    pub const SAMPLES: &str = "samples.parquet";
    /// `ingest`: one row per distinct image with its caption.
    pub const CAPTIONS: &str = "captions.parquet";
    /// `ingest`: one row per image that could not be used.
    pub const REJECTS: &str = "rejects.parquet";
    /// `embed-text`: one row per distinct caption.
    pub const EMBEDDINGS: &str = "embeddings.parquet";
    /// `cache-latents`: one row per view.
    pub const LATENT_INDEX: &str = "index.parquet";
    /// `train`: the LoRA in diffusers form.
    pub const LORA: &str = "pytorch_lora_weights.safetensors";
    /// `train`: one row per step.
    pub const METRICS: &str = "metrics.parquet";
    /// `train`: folder of checkpoints; not part of what is sealed, so it may be deleted.
    pub const CHECKPOINTS: &str = "checkpoints";
    /// `sample`: all pictures on one sheet.
    pub const SHEET: &str = "sheet.png";
    /// `sample`: pictures of the base beside those with the LoRAs, if the recipe compares them.
    pub const COMPARISON_SHEET: &str = "before-after.png";
    /// `sample`: what each picture is.
    pub const IMAGES: &str = "images.json";
    /// `evaluate`: everything that was measured.
    pub const REPORT: &str = "report.json";
    /// `evaluate`: the same in short, for people.
    pub const REPORT_TEXT: &str = "report.md";
}

/// Names of the logical digests that stages leave in [`crate::StageReport::outputs`] and so in their manifests.
///
/// A logical digest covers what a later stage can see of the output and nothing else (no paths, no times, no row
/// order), as 64 hex digits. A stage that reads it is dirty exactly when it changes.
pub mod outputs {
    /// `ingest`: over the sorted sample ids with their sizes.
    pub const SAMPLES: &str = "samples";
    /// `ingest`: over the sorted distinct caption hashes.
    pub const CAPTIONS: &str = "captions";
    /// `ingest`: over the sorted pairs of sample id and caption hash.
    pub const PAIRS: &str = "pairs";
    /// `ingest`: over the sorted triples of sample id and its two compat hashes (public embeddings are keyed by them).
    pub const COMPAT_HASHES: &str = "compat_hashes";
    /// `embed-text`: over the sorted caption hashes with their embeddings.
    pub const EMBEDDINGS: &str = "embeddings";
    /// `cache-latents`: over the sorted views with their latents.
    pub const LATENTS: &str = "latents";
    /// `train`: over the LoRA file.
    pub const LORA: &str = "lora";
    /// `sample`: over the pictures' pixels.
    pub const IMAGES: &str = "images";
    /// `evaluate`: over the report.
    pub const REPORT: &str = "report";
}

/// A stage of the pipeline. Its name is the `cargo xtask` subcommand and the artifact directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Images and captions into tables.
    Ingest,
    /// Captions into text embeddings.
    EmbedText,
    /// Images into latents.
    CacheLatents,
    /// Latents and embeddings into a LoRA.
    Train,
    /// Prompts into pictures.
    Sample,
    /// LoRA and pictures into figures.
    Evaluate,
}

/// A part of the base's diffusers directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WeightPart {
    /// CLIP text encoder.
    Clip,
    /// CLIP's tokenizer.
    ClipTokenizer,
    /// T5 encoder.
    T5,
    /// T5's tokenizer.
    T5Tokenizer,
    /// AutoencoderKL.
    Vae,
    /// The FLUX transformer.
    Transformer,
    /// The noise schedule's configuration.
    Scheduler,
}

impl WeightPart {
    /// All parts.
    pub const ALL: [Self; 7] = [
        Self::Clip,
        Self::ClipTokenizer,
        Self::T5,
        Self::T5Tokenizer,
        Self::Vae,
        Self::Transformer,
        Self::Scheduler,
    ];

    /// The part's name in components, e.g. `weights.t5_tokenizer`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Clip => "clip",
            Self::ClipTokenizer => "clip_tokenizer",
            Self::T5 => "t5",
            Self::T5Tokenizer => "t5_tokenizer",
            Self::Vae => "vae",
            Self::Transformer => "transformer",
            Self::Scheduler => "scheduler",
        }
    }

    /// The part's folder below the base's directory.
    pub fn folder(self) -> &'static str {
        match self {
            Self::Clip => "text_encoder",
            Self::ClipTokenizer => "tokenizer",
            Self::T5 => "text_encoder_2",
            Self::T5Tokenizer => "tokenizer_2",
            Self::Vae => "vae",
            Self::Transformer => "transformer",
            Self::Scheduler => "scheduler",
        }
    }
}

impl Stage {
    /// All stages, each after those it reads.
    pub const ALL: [Self; 6] = [
        Self::Ingest,
        Self::EmbedText,
        Self::CacheLatents,
        Self::Train,
        Self::Sample,
        Self::Evaluate,
    ];

    /// Subcommand and directory name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ingest => "ingest",
            Self::EmbedText => "embed-text",
            Self::CacheLatents => "cache-latents",
            Self::Train => "train",
            Self::Sample => "sample",
            Self::Evaluate => "evaluate",
        }
    }

    /// The recipe's section, e.g. `embed_text`.
    pub fn section(self) -> &'static str {
        match self {
            Self::Ingest => "ingest",
            Self::EmbedText => "embed_text",
            Self::CacheLatents => "cache_latents",
            Self::Train => "train",
            Self::Sample => "sample",
            Self::Evaluate => "evaluate",
        }
    }

    /// Version of what the stage writes. Raise it when the same components would give another output.
    pub fn schema(self) -> u32 {
        match self {
            Self::Sample => 2, // images.json says of each picture whether LoRAs had a part in it
            Self::Ingest => 2, // a transparent colour of gray and RGB PNGs counts
            Self::EmbedText | Self::CacheLatents | Self::Train | Self::Evaluate => 1,
        }
    }

    /// The parts of the base that this stage reads. `train` and `evaluate` read the VAE's configuration (scale and shift).
    pub fn weights(self) -> &'static [WeightPart] {
        match self {
            Self::Ingest => &[],
            Self::EmbedText => &[
                WeightPart::Clip,
                WeightPart::ClipTokenizer,
                WeightPart::T5,
                WeightPart::T5Tokenizer,
            ],
            Self::CacheLatents => &[WeightPart::Vae],
            Self::Train => &[
                WeightPart::Transformer,
                WeightPart::Scheduler,
                WeightPart::Vae,
            ],
            Self::Sample => &WeightPart::ALL,
            Self::Evaluate => &[WeightPart::Transformer, WeightPart::Vae],
        }
    }

    /// The logical digests that this stage must report; a run without one of them is not sealed.
    pub fn promised_outputs(self) -> &'static [&'static str] {
        match self {
            Self::Ingest => &[
                outputs::SAMPLES,
                outputs::CAPTIONS,
                outputs::PAIRS,
                outputs::COMPAT_HASHES,
            ],
            Self::EmbedText => &[outputs::EMBEDDINGS],
            Self::CacheLatents => &[outputs::LATENTS],
            Self::Train => &[outputs::LORA],
            Self::Sample => &[outputs::IMAGES],
            Self::Evaluate => &[outputs::REPORT],
        }
    }

    /// Whether an interrupted run's files are kept for the next run of the same fingerprint to continue from.
    pub fn resumes(self) -> bool {
        matches!(self, Self::Train | Self::EmbedText | Self::CacheLatents)
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.name())
    }
}

impl FromStr for Stage {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|stage| stage.name() == name)
            .ok_or_else(|| format!("no stage is called {name:?}"))
    }
}
