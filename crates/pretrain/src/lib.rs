//! Trains a small FLUX base from scratch: an autoencoder, then the transformer with its two text encoders.
//!
//! ```text
//! pictures, textures ──► autoencoder ──┬─► decoder alone ───────────────────────────────────────────────────────┐
//!                                      └─► latents of every version of every picture ─┐                         ├─► base
//! captions ──► ids of T5 and CLIP ────────────────────────────────────────────────────┴─► transformer, T5, CLIP ┤
//!                                                                                         └─► transformer alone ┘
//! ```
//!
//! Everything learns through the modules that the pipeline runs: [`tensor::Weights::from_tensors`] builds them around
//! tracked tensors at every step. A phase that is interrupted goes on from its checkpoint; on one CPU thread it ends
//! with the same bytes, on several the autoencoder's gradients were seen to differ in their last bits from run to run.
//! A phase that is done is not repeated while its part of the recipe and the corpus stay as they were.
//!
//! How to use it: `docs/pretraining.md`.
//!
//! * [`recipe`]: what decides the result. * [`corpus`]: what is learned from, and what is held out. * [`augment`]:
//!   versions of a picture whose captions say what was done.
#![forbid(unsafe_code)]

mod error;
pub mod recipe;

pub mod augment;
pub mod corpus;
mod textures;

mod clock;
mod results;
mod run;
mod state;

mod base_phase;
mod refine_engine;
mod refine_phase;
mod vae_phase;

mod evaluate;
mod export;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use autoencoder::{Autoencoder, AutoencoderConfig};
use mmdit::MmditConfig;
use pipeline::FileLock;
use serde_json::{Value, json};
use tensor::Device;
use text_encoders::{ClipConfig, T5Config};

use base_phase::{BaseConfigs, CLIP, Latents, Models, T5, TRANSFORMER, Tokenizers};
use results::{Ended, Results};
use run::Run;

pub use corpus::Corpus;
pub use error::PretrainError;
pub use recipe::PretrainRecipe;
pub use results::Phase;

/// Pictures whose latents' statistics scale all latents.
const NUM_FOR_STATISTICS: usize = 2048;

/// What changes speed and place and never the result.
#[derive(Clone, Debug)]
pub struct PretrainOptions {
    /// Where the base is written.
    pub out: PathBuf,
    /// Where checkpoints and logs are kept.
    pub work: PathBuf,
    /// Where it computes.
    pub device: Device,
    /// How the device is called in the model card.
    pub hardware: String,
    /// When to write a checkpoint and leave.
    pub max_time: Option<Duration>,
    /// Phases that are trained; what they build on must be done, and others are left as they are.
    pub phases: Vec<Phase>,
}

/// What came of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct PretrainReport {
    /// Whether all phases are done.
    pub is_done: bool,
    /// Whether time was up before the wanted phases were done: the same call goes on.
    pub is_paused: bool,
    /// What was measured, as `evaluation.json` says it.
    pub evaluation: Value,
}

/// Trains what is left to train of the wanted phases, measures it, and once there is a transformer writes the base as far as
/// it is.
///
/// Out of time, it leaves a checkpoint, and the next call goes on.
///
/// # Errors
///
/// If a phase that another builds on is neither wanted nor done, a checkpoint is another run's, a loss is no number, or
/// writing fails.
pub fn run(
    recipe: &PretrainRecipe,
    corpus: &Corpus,
    options: &PretrainOptions,
) -> Result<PretrainReport, PretrainError> {
    let PretrainOptions { out, work, .. } = options;
    let began = Instant::now();
    fs_err::create_dir_all(work).map_err(PretrainError::Read)?;
    fs_err::create_dir_all(out).map_err(PretrainError::Read)?;
    let _locks = lock_phases(work, &options.phases)?;
    let (draft, _lock) = lock_draft(work, out)?;
    let index_path = out.join(INDEX_FILE);
    let is_ours = out.join(EVALUATION_FILE).exists() && Results { work }.exist();
    if index_path.exists() && !is_ours {
        return Err(PretrainError::Occupied { path: out.clone() });
    }
    let preset = recipe.preset();
    let mut vae_json = preset.vae();
    vae_json["sample_size"] = json!(recipe.corpus.resolution_px);
    // A finished base in `out` stays whole until another one is. What an earlier call left of a draft is made anew.
    if draft.exists() {
        fs_err::remove_dir_all(&draft).map_err(PretrainError::Read)?;
    }
    let tokenizers = export::write_skeleton(&draft, preset, &vae_json, &recipe.tokenizers)?;
    let run = Run {
        recipe,
        corpus,
        tokenizers,
        device: options.device.clone(),
        work: work.clone(),
        phases: options.phases.clone(),
        // A time beyond all clocks is no limit.
        deadline: options.max_time.and_then(|time| began.checked_add(time)),
    };
    run.log(&json!({
        "phase": "corpus", "pictures": corpus.pictures.len(), "pairs": corpus.pairs.len(),
        "held_out_pairs": corpus.held_out.len(), "textures": corpus.textures.len(),
        "digest": corpus.digest.to_string(),
    }))?;
    let vae_config = AutoencoderConfig::from_file(&draft.join("vae/config.json"))?;
    let configs = BaseConfigs {
        transformer: MmditConfig::from_file(&draft.join("transformer/config.json"))
            .map_err(mmdit::MmditError::from)?,
        clip: ClipConfig::from_file(&draft.join("text_encoder/config.json"))?,
        t5: T5Config::from_file(&draft.join("text_encoder_2/config.json"))?,
    };
    Tokenizers::open(recipe)?.check(recipe, &configs)?;
    let mut learned = vae_phase::train(&run, &vae_config)?;

    // From here on everything sees the weights as the files have them, in half precision.
    let nothing = BTreeMap::new();
    let vae_path = draft.join(VAE_FILE);
    let mut steps = json!({ "autoencoder": learned.step });
    export::write_weights(&vae_path, &learned.models[0], &nothing)?;
    let open = || Autoencoder::open(&draft.join("vae"), &run.device, evaluate::PRECISION);
    let (shift, scale) = latent_scaling(&run, &open()?);
    vae_json["shift_factor"] = json!(shift);
    vae_json["scaling_factor"] = json!(scale);
    export::write_json(&draft.join("vae/config.json"), &vae_json)?;
    let mut is_done = true;
    if learned.ended == Ended::Done && recipe.autoencoder.decoder.steps > 0 {
        match vae_phase::train_decoder(&run, &vae_config, &learned)? {
            Some(decoder) => {
                steps["decoder"] = json!(decoder.step);
                export::write_weights(&vae_path, &decoder.models[0], &nothing)?;
                learned = decoder;
            }
            None => is_done = false,
        }
    }
    let vae = open()?;
    let mut evaluation = json!({
        "autoencoder": evaluate::autoencoder(&run, &vae)?, "steps": steps,
    });
    run.log(&json!({ "phase": "autoencoder evaluation", "measured": evaluation["autoencoder"] }))?;
    let without_base = |evaluation: Value, is_paused: bool| PretrainReport {
        is_done: false,
        is_paused,
        evaluation,
    };
    if learned.ended == Ended::Paused {
        return Ok(without_base(evaluation, true));
    }

    let Some(mut learned) = base_phase::train(&run, &vae, &configs)? else {
        if options.phases.contains(&Phase::Refine) {
            let phase = Phase::Base.name();
            return Err(PretrainError::NotDone { phase });
        }
        return Ok(without_base(evaluation, false));
    };
    evaluation["steps"]["base"] = json!(learned.step);
    if learned.ended == Ended::Done && recipe.refine.optimizer.steps > 0 {
        match refine_phase::train(&run, &vae, &configs, &learned)? {
            Some(refined) => {
                evaluation["steps"]["refine"] = json!(refined.step);
                learned.models[TRANSFORMER] = refined.models.into_iter().flatten().collect();
                learned.ended = refined.ended;
            }
            None => is_done = false,
        }
    }
    for (model, path) in [
        (TRANSFORMER, TRANSFORMER_FILE),
        (CLIP, CLIP_FILE),
        (T5, T5_FILE),
    ] {
        export::write_weights(&draft.join(path), &learned.models[model], &nothing)?;
    }
    let weights = [TRANSFORMER, CLIP, T5].map(|model| learned.weights(model));
    let models = Models::load(&weights, &configs, &run.device, evaluate::PRECISION)?;
    evaluation["base"] = evaluate::text_following(&run, &vae, &models, &configs)?;
    evaluation["num_parameters"] = json!({
        "transformer": tensor::weights::num_parameters(&configs.transformer.parameters()),
        "vae": tensor::weights::num_parameters(&vae_config.parameters()),
        "text_encoder": tensor::weights::num_parameters(&configs.clip.parameters()),
        "text_encoder_2": tensor::weights::num_parameters(&configs.t5.parameters()),
    });
    evaluation["hardware"] = json!(options.hardware);
    run.log(&json!({ "phase": "base evaluation", "measured": evaluation["base"] }))?;
    if let Some(sheet) = evaluate::sheet(&run, &vae, &models, &configs)? {
        let png = pixel_art::encode_png_rgb(&sheet, &[])?;
        export::write_file(&draft.join("samples.png"), &png)?;
    }
    export::write_json(&draft.join(EVALUATION_FILE), &evaluation)?;
    write_card(&draft, recipe, corpus, &evaluation)?;
    let mut index = preset.model_index();
    if let Some(index) = index.as_object_mut() {
        index.remove(random_base::UNTRAINED_KEY);
    }
    export::write_json(&draft.join(INDEX_FILE), &index)?;
    export::publish(&draft, out, INDEX_FILE)?;
    Ok(PretrainReport {
        is_done: is_done && learned.ended == Ended::Done,
        is_paused: learned.ended == Ended::Paused,
        evaluation,
    })
}

/// Where the base of an `--out` is put together, and its lock: a directory of its own, since two may be made of one work.
fn lock_draft(work: &Path, out: &Path) -> Result<(PathBuf, FileLock), PretrainError> {
    let whole = fs_err::canonicalize(out).map_err(PretrainError::Read)?;
    let digest = artifacts::digest_bytes(whole.as_os_str().as_encoded_bytes());
    let name = format!("draft-{}", digest.short());
    let held = PretrainError::OutLocked {
        out: out.to_owned(),
    };
    let lock = acquire(work, &name, held)?;
    Ok((work.join(name), lock))
}

/// Takes the locks of phases that are to be trained.
fn lock_phases(work: &Path, phases: &[Phase]) -> Result<Vec<FileLock>, PretrainError> {
    let lock = |phase: &Phase| {
        let held = PretrainError::Locked {
            phase: phase.name(),
            work: work.to_owned(),
        };
        acquire(work, phase.name(), held)
    };
    phases.iter().map(lock).collect()
}

/// A lock of a name in `work`; the error is for when another process has it.
fn acquire(work: &Path, name: &str, held: PretrainError) -> Result<FileLock, PretrainError> {
    let lock = FileLock::try_acquire(&work.join(format!(".{name}.lock")));
    lock.map_err(PretrainError::Read)?.ok_or(held)
}

/// Shift and scale that give latents of training pictures mean 0 and deviation 1, to four digits.
fn latent_scaling(run: &Run<'_>, vae: &Autoencoder) -> (f64, f64) {
    let places = run.corpus.training_pictures();
    let step = places.len().div_ceil(NUM_FOR_STATISTICS).max(1);
    let places: Vec<usize> = places.into_iter().step_by(step).collect();
    let latents = Latents::encode(vae, places.len(), &run.device, |index| {
        run.corpus.pictures[places[index]].over(augment::BACKGROUND)
    });
    let (mean, deviation) = latents.statistics();
    let rounded = |value: f64| (value * 1e4).round() / 1e4;
    (rounded(mean), rounded(1.0 / deviation.max(1e-6)).max(1e-4))
}

/// What makes a base of a directory.
const INDEX_FILE: &str = "model_index.json";

/// What was measured; where it is beside a base, the base is `pretrain`'s.
const EVALUATION_FILE: &str = "evaluation.json";

/// Weights of a base, by their paths in it.
const TRANSFORMER_FILE: &str = "transformer/diffusion_pytorch_model.safetensors";
const VAE_FILE: &str = "vae/diffusion_pytorch_model.safetensors";
const CLIP_FILE: &str = "text_encoder/model.safetensors";
const T5_FILE: &str = "text_encoder_2/model.safetensors";

/// Lines of the model card: which files it is about.
fn digests(base: &Path) -> Result<String, PretrainError> {
    let mut lines = "| file | BLAKE3 |\n|---|---|\n".to_owned();
    for path in [TRANSFORMER_FILE, VAE_FILE, CLIP_FILE, T5_FILE] {
        let digest = artifacts::digest_file(&base.join(path))?;
        lines += &format!("| `{path}` | `{digest}` |\n");
    }
    Ok(lines)
}

/// The model card.
fn write_card(
    out: &Path,
    recipe: &PretrainRecipe,
    corpus: &Corpus,
    evaluation: &Value,
) -> Result<(), PretrainError> {
    let said = toml::to_string(recipe).unwrap_or_default();
    let card = format!(
        "# {name}\n\nA small base of the FLUX.1 architecture, trained from scratch by `cargo xtask pretrain`. It draws \
         pictures of {side}×{side} px; T5 texts are {tokens} tokens.\n\n## Data\n\n{about}\n\n{pairs} pairs of {pictures} \
         pictures, {held} pairs held out; the autoencoder also saw {textures} textures, {made_up} of them made-up \
         blocks. Content: BLAKE3 `{digest}`.\n\n## Measured\n\n```json\n{evaluation:#}\n```\n\n\
         ![samples of held-out captions](samples.png)\n\n## Files\n\n{files}\n## Recipe\n\n```toml\n{said}```\n",
        files = digests(out)?,
        name = recipe.name,
        side = recipe.corpus.resolution_px,
        tokens = recipe.base.t5_tokens,
        about = recipe.corpus.about.trim(),
        made_up = recipe.corpus.synthetic_textures,
        pairs = corpus.pairs.len(),
        pictures = corpus.pictures.len(),
        held = corpus.held_out.len(),
        textures = corpus.textures.len(),
        digest = corpus.digest,
    );
    export::write_file(&out.join("README.md"), card.as_bytes())
}
