//! Stage `sample`: prompts become pictures.
//!
//! ```text
//! prompts ── Encoders::encode ──► Conditioning ─┐
//! seed, number ── noise ──► tokens ─────────────┼─ denoise ──► tokens ── decode ──► PNGs, sheets, images.json
//! LoRAs ── LoraStack ──► Factors ───────────────┘
//! ```
//!
//! One model is in memory at a time: the text encoders are gone before the transformer is loaded, and the transformer
//! before the VAE. A picture depends on its prompt, its seed and its number among the pictures of that seed, and not
//! on what else is drawn in the run. Where the recipe compares, each is drawn once more by the base alone.
//!
//! * [`plan`]: which pictures. * [`conditioning`]: texts. * [`stack`]: LoRAs. * [`denoise()`]: the loop.
//! * [`pictures`]: pixels and files. * [`parameters`]: what a file says of its making.

#![forbid(unsafe_code)]

mod error;

mod base;
pub mod plan;

pub mod conditioning;
pub mod stack;

mod denoise;
pub mod parameters;
pub mod pictures;

mod drawing;

#[cfg(test)]
mod test_recipe;

use autoencoder::Autoencoder;
use engine::{Chosen, Opening, base_weights_of, precision_of};
use pipeline::{Stage, StageContext, StageReport, WeightPart, files, outputs};
use tensor::Precision;

pub use crate::conditioning::{Conditioning, EncodedTexts, Encoders};
pub use crate::denoise::{Denoising, TrueCfg, denoise};
pub use crate::drawing::initial_noise;
pub use crate::error::SampleError;
pub use crate::pictures::{NotFinite, Picture, decode};
pub use crate::plan::{Pass, Plan, PlanError, Shot};
pub use crate::stack::{LoraChoice, LoraStack};

use crate::base::Base;
use crate::drawing::Drawing;
use crate::parameters::Settings;

/// Pictures that go through the transformer at once when the caller has no wish: alone, a picture is the same to the
/// last bit whatever else is drawn. (Products of more rows add up in another order; pixels then differ by 1 of 255 here
/// and there. Two CPU cores gain nothing from larger batches.)
const USUAL_BATCH: usize = 1;

/// Draws what the recipe asks for into the stage's directory.
///
/// # Errors
///
/// If the recipe's prompts, sizes or LoRAs cannot be used with its base, or a file cannot be read or written.
pub fn run(context: &StageContext) -> Result<StageReport, SampleError> {
    let recipe = &context.recipe.sample;
    let plan = Plan::new(recipe)?;
    let base = Base::open(context)?;
    let latent_cells = base.latent_cells(recipe.width_px, recipe.height_px)?;
    pictures::check_sheets(recipe, plan.shots.len())?;
    let vae_dir = context.weights_dir(WeightPart::Vae);
    let (vae_config, vae_weights) = Autoencoder::look_at(&vae_dir)?;
    let precision = precision_of(recipe.precision);
    let options = &context.options;
    let Chosen { name, device, card } = engine::choose(
        &options.device,
        &options.engine,
        precision,
        &base.transformer,
    )?;
    let batch = context.options.batch.unwrap_or(USUAL_BATCH).max(1);
    let stack = LoraStack::read(&lora_choices(context), &base.transformer)?;
    let schedule = base.schedule(context, latent_cells)?;

    let encoders = Encoders {
        clip: context.weights_dir(WeightPart::Clip),
        clip_tokenizer: context.weights_dir(WeightPart::ClipTokenizer),
        t5: context.weights_dir(WeightPart::T5),
        t5_tokenizer: context.weights_dir(WeightPart::T5Tokenizer),
        t5_tokens: recipe.t5_tokens,
        long_texts: recipe.long_prompts,
        batch,
        device: device.clone(),
        precision,
    };
    let texts = encoders.encode(&plan.texts(), &context.progress)?;

    let opening = Opening {
        dir: &context.weights_dir(WeightPart::Transformer),
        device: device.clone(),
        card,
        precision,
        base: base_weights_of(recipe.base_format),
    };
    let mut engine = engine::open(name, &opening)?;
    let drawing = Drawing {
        recipe,
        plan: &plan,
        texts: &texts,
        schedule: &schedule,
        latent_cells,
        batch,
        device: &device,
    };
    let latents = drawing.denoise_all(engine.as_mut(), &stack, context)?;
    let base_latents = recipe
        .compare_with_base
        .then(|| drawing.denoise_all(engine.as_mut(), &LoraStack::none(), context))
        .transpose()?;
    drop(engine);

    let vae = Autoencoder::load(&vae_weights, &vae_config, &device, of_vae(precision))?;
    let settings = settings(context, &base, &plan, &stack);
    let mut pictures = drawing.finish(&vae, latents, Pass::WithLoras, &settings, context)?;
    pictures::write_sheet(
        &context.path(files::SHEET),
        &pictures,
        recipe.sheet_columns,
        recipe.sheet_magnify,
    )?;
    if let Some(latents) = base_latents {
        let base_settings = Settings {
            loras: vec![],
            ..settings.clone()
        };
        let before = drawing.finish(&vae, latents, Pass::BaseAlone, &base_settings, context)?;
        pictures::write_comparison(
            &context.path(files::COMPARISON_SHEET),
            &before,
            &pictures,
            recipe.sheet_columns,
            recipe.sheet_magnify,
        )?;
        pictures.extend(before);
    }
    pictures::write_index(&context.path(files::IMAGES), &settings, &pictures)?;

    let mut report = context
        .report()
        .count("images", pictures.len() as u64)
        .count("prompts", plan.prompts.len() as u64)
        .count("loras", stack.uses.len() as u64)
        .output(outputs::IMAGES, pictures::digest_of_all(&pictures));
    report.notes = [stack.notes, texts.notes, base.notes(recipe)].concat();
    Ok(report)
}

/// What the VAE decodes in: not fp16, whose range FLUX.1's decoder leaves (its published configuration says
/// `force_upcast`), and a picture has to be decoded once only.
fn of_vae(precision: Precision) -> Precision {
    match precision {
        Precision::F16 => Precision::F32,
        other => other,
    }
}

fn lora_choices(context: &StageContext) -> Vec<LoraChoice> {
    let recipe = &context.recipe.sample;
    let trained = recipe.use_trained_lora.then(|| {
        let path = context.input(Stage::Train).path(files::LORA);
        LoraChoice::trained(path, recipe.lora_scale)
    });
    let others = recipe
        .loras
        .iter()
        .map(|choice| LoraChoice::file(&choice.path, choice.scale));
    trained.into_iter().chain(others).collect()
}

fn settings(context: &StageContext, base: &Base, plan: &Plan, stack: &LoraStack) -> Settings {
    let recipe = &context.recipe.sample;
    let mut parts = artifacts::Hasher::new();
    for part in WeightPart::ALL {
        parts.field(part.name().as_bytes());
        parts.field(context.weights_digest(part).as_bytes());
    }
    let has_cfg = plan.negative_prompt.is_some();
    Settings {
        program: format!("spritelora {}", env!("CARGO_PKG_VERSION")),
        base: parts.finish().to_string(),
        untrained_base: base.untrained,
        loras: stack.uses.clone(),
        width_px: recipe.width_px,
        height_px: recipe.height_px,
        steps: recipe.steps,
        guidance: base.transformer.guidance_embeds.then_some(recipe.guidance),
        true_cfg_scale: has_cfg.then_some(recipe.true_cfg_scale),
        negative_prompt: plan.negative_prompt.clone(),
        t5_tokens: recipe.t5_tokens,
        precision: recipe.precision,
        base_format: recipe.base_format,
    }
}
