//! How a picture was made, as text inside its PNG: JSON for this program, and the `parameters` line that other tools
//! read.
//!
//! Nothing here depends on where files lie or on when the picture was drawn, so that equal work gives equal bytes.

use std::fmt::Write as _;

use pipeline::recipe::{BaseFormat, PrecisionChoice};
use serde::{Deserialize, Serialize};

/// Keyword of the chunk with the JSON.
pub const JSON_KEYWORD: &str = "spritelora";

/// Keyword of the chunk that most programs for generated pictures read.
pub const PARAMETERS_KEYWORD: &str = "parameters";

/// One LoRA that had a part in a picture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraUse {
    /// The file's name without its ending, or `trained` for the LoRA of the run.
    pub name: String,
    /// What its own alpha / rank was multiplied by.
    pub scale: f64,
    /// BLAKE3 of the file, 64 hex digits.
    pub digest: String,
}

/// What all pictures of a run have in common.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// `spritelora <version>`.
    pub program: String,
    /// BLAKE3 over the digests of the base's parts, 64 hex digits.
    pub base: String,
    /// Whether the base is marked as untrained: its pictures are noise.
    pub untrained_base: bool,
    /// The LoRAs, all applied at once.
    pub loras: Vec<LoraUse>,
    /// Columns.
    pub width_px: u32,
    /// Rows.
    pub height_px: u32,
    /// Number of denoising steps.
    pub steps: u32,
    /// Guidance fed to the model; absent if the model has no guidance embedding.
    pub guidance: Option<f64>,
    /// Scale of true classifier-free guidance; absent if it was off.
    pub true_cfg_scale: Option<f64>,
    /// The negative prompt; absent if true classifier-free guidance was off.
    pub negative_prompt: Option<String>,
    /// Number of T5 positions.
    pub t5_tokens: usize,
    /// What the networks computed in.
    pub precision: PrecisionChoice,
    /// How the base's linear layers were kept.
    pub base_format: BaseFormat,
}

/// How one picture was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Parameters {
    /// The prompt.
    pub prompt: String,
    /// The seed.
    pub seed: u64,
    /// Number of the picture among those of one prompt and seed.
    pub image: u32,
    /// What it shares with the other pictures.
    #[serde(flatten)]
    pub settings: Settings,
}

impl Parameters {
    /// As one line of JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("strings, numbers and lists are always JSON")
    }

    /// As the text that other programs read: the prompt, the negative prompt, then `Name: value` pairs.
    pub fn to_text(&self) -> String {
        let settings = &self.settings;
        let mut text = self.prompt.clone();
        for lora in &settings.loras {
            let _ = write!(text, " <lora:{}:{}>", lora.name, lora.scale);
        }
        if let Some(negative) = &settings.negative_prompt {
            let _ = write!(text, "\nNegative prompt: {negative}");
        }
        let _ = write!(
            text,
            "\nSteps: {}, Sampler: Euler, CFG scale: {}",
            settings.steps,
            settings.true_cfg_scale.unwrap_or(1.0)
        );
        if let Some(guidance) = settings.guidance {
            let _ = write!(text, ", Distilled CFG Scale: {guidance}");
        }
        let _ = write!(
            text,
            ", Seed: {}, Size: {}x{}, Model hash: {}",
            self.seed,
            settings.width_px,
            settings.height_px,
            short(&settings.base)
        );
        if !settings.loras.is_empty() {
            let hashes: Vec<String> = settings
                .loras
                .iter()
                .map(|lora| format!("{}: {}", lora.name, short(&lora.digest)))
                .collect();
            let _ = write!(text, ", Lora hashes: \"{}\"", hashes.join(", "));
        }
        let _ = write!(text, ", Version: {}", settings.program);
        text
    }
}

/// As many digits as other programs show of a model's hash.
fn short(digest: &str) -> &str {
    digest.get(..10).unwrap_or(digest)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn parameters() -> Parameters {
        Parameters {
            prompt: "a knight".into(),
            seed: 7,
            image: 0,
            settings: Settings {
                program: "spritelora 0.1.0".into(),
                base: "0123456789abcdef".into(),
                untrained_base: false,
                loras: vec![LoraUse {
                    name: "trained".into(),
                    scale: 0.7,
                    digest: "fedcba9876543210".into(),
                }],
                width_px: 64,
                height_px: 96,
                steps: 6,
                guidance: Some(3.5),
                true_cfg_scale: Some(2.0),
                negative_prompt: Some("blurry".into()),
                t5_tokens: 77,
                precision: PrecisionChoice::F32,
                base_format: BaseFormat::Plain,
            },
        }
    }

    #[test]
    fn the_text_is_prompt_then_negative_prompt_then_pairs() {
        assert_eq!(
            parameters().to_text(),
            "a knight <lora:trained:0.7>\nNegative prompt: blurry\nSteps: 6, Sampler: Euler, CFG scale: 2, \
             Distilled CFG Scale: 3.5, Seed: 7, Size: 64x96, Model hash: 0123456789, \
             Lora hashes: \"trained: fedcba9876\", Version: spritelora 0.1.0"
        );
    }

    #[test]
    fn what_was_off_is_not_in_the_text() {
        let mut parameters = parameters();
        parameters.settings.loras.clear();
        parameters.settings.guidance = None;
        parameters.settings.true_cfg_scale = None;
        parameters.settings.negative_prompt = None;
        let text = parameters.to_text();
        assert!(
            text.starts_with("a knight\nSteps: 6, Sampler: Euler, CFG scale: 1, Seed: 7"),
            "{text}"
        );
        assert!(
            !text.contains("Negative") && !text.contains("<lora"),
            "{text}"
        );
    }

    #[test]
    fn the_json_says_the_whole_of_it() {
        let read: Parameters = serde_json::from_str(&parameters().to_json()).expect("valid");
        assert_eq!(read, parameters());
    }
}
