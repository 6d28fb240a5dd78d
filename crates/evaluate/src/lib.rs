//! Stage `evaluate`: what the LoRA has learned, in figures.
//!
//! ```text
//! held-out pictures ── ingest, embed-text, cache-latents ──► HeldOut ─┐
//! LoRA of train ──────────────────────────────────────────────────────┴─ loss ───────────────┐
//! pictures of sample ─┬─ Figure ──► RegionShares ─┬─ visibility (permutation test) ──────────┼─► report.json, report.md
//! real sprites ───────┘     prompts ── Things ────┘                    pixels ───────────────┘
//! ```
//!
//! Three questions: is the loss of pictures that were not trained on lower than the base's ([`loss`])? Do the drawn
//! pictures show the colours that their prompts name, more often than with exchanged prompts ([`visibility`])? Do they
//! look like pixel art ([`pixels`])? The base's own pictures and the real sprites are measured beside them, as floor and
//! ceiling.
//!
//! * [`held_out`]: the pictures that were not trained on. * [`interval`]: how sure a change is.
//! * [`pictures`]: drawn and real. * [`figure`], [`color_words`], [`attributes`]: what is seen and what is said.
//! * [`report`]: the figures as a document and as a page.

#![forbid(unsafe_code)]

mod error;

pub mod held_out;
pub mod interval;
pub mod loss;

pub mod attributes;
pub mod color_words;
pub mod figure;
pub mod pictures;
pub mod pixels;
pub mod visibility;

pub mod report;

#[cfg(test)]
mod test_recipe;

use std::io::Write as _;

use artifacts::{digest_bytes, write_atomically};
use autoencoder::AutoencoderConfig;
use engine::{Chosen, Factors, Opening, base_weights_of, precision_of};
use lora::{LoraFile, Target};
use mmdit::MmditConfig;
use pipeline::{Stage, StageContext, StageReport, WeightPart, files, outputs};

pub use crate::error::EvaluateError;
pub use crate::report::{Group, GroupKind, Report};

use crate::attributes::Things;
use crate::color_words::Vocabulary;
use crate::figure::Figure;
use crate::held_out::HeldOut;
use crate::loss::HeldOutLoss;
use crate::pictures::Pictured;
use crate::visibility::Scene;

/// Measures what the recipe asks for and writes the report.
///
/// # Errors
///
/// If a held-out picture is also trained on, or a file, the base or the device cannot be used.
pub fn run(context: &StageContext) -> Result<StageReport, EvaluateError> {
    let recipe = &context.recipe;
    let transformer_dir = context.weights_dir(WeightPart::Transformer);
    let config = MmditConfig::from_file(&transformer_dir.join("config.json"))?;
    let held_out = recipe
        .evaluate
        .held_out
        .is_some()
        .then(|| HeldOut::open(context, &config))
        .transpose()?;
    let drawn = pictures::drawn(context)?;
    let (real, square_px) = match &held_out {
        None => (vec![], None),
        Some(held_out) => {
            let samples = held_out.pictures.iter().map(|picture| &picture.sample);
            (
                pictures::real(recipe, held_out)?,
                pictures::sprite_pixel_px(recipe, samples),
            )
        }
    };
    let groups: Vec<Group> = [
        (GroupKind::WithLoras, &drawn.with_loras, square_px),
        (GroupKind::Base, &drawn.base, square_px),
        (GroupKind::RealSprites, &real, None), // at native size
    ]
    .into_iter()
    .filter(|(_, pictures, _)| !pictures.is_empty())
    .map(|(kind, pictures, square_px)| group(context, kind, pictures, square_px))
    .collect();
    // Last, because it takes longest.
    let held_out = held_out
        .map(|held_out| held_out_loss(context, &held_out, &config))
        .transpose()?;

    let report = Report {
        report_version: report::REPORT_VERSION,
        recipe: recipe.name.clone(),
        untrained_base: recipe.base.is_untrained(),
        visible_share: recipe.evaluate.visible_share,
        permutations: recipe.evaluate.permutations,
        held_out,
        groups,
    };
    let mut json =
        serde_json::to_string_pretty(&report).expect("strings, numbers and lists are always JSON");
    json.push('\n');
    let write = |name, text: &str| {
        write_atomically(&context.path(name), |file| file.write_all(text.as_bytes()))
    };
    write(files::REPORT, &json)?;
    write(files::REPORT_TEXT, &report.to_markdown())?;

    let attributes_of = |kind| {
        let figures = report
            .group(kind)
            .and_then(|group| group.attributes.as_ref());
        figures.map_or(0, |figures| figures.attributes)
    };
    let mut stage = context
        .report()
        .count(
            "held_out",
            report.held_out.as_ref().map_or(0, |l| l.pictures.len()) as u64,
        )
        .count("pictures", drawn.with_loras.len() as u64)
        .count("base_pictures", drawn.base.len() as u64)
        .count(
            "attributes",
            attributes_of(GroupKind::WithLoras).max(attributes_of(GroupKind::Base)),
        )
        .output(outputs::REPORT, digest_bytes(json.as_bytes()));
    stage.notes = report.notes();
    Ok(stage)
}

/// Looks at a group of pictures.
fn group(
    context: &StageContext,
    kind: GroupKind,
    pictures: &[Pictured],
    square_px: Option<u32>,
) -> Group {
    let recipe = &context.recipe.evaluate;
    let (things, vocabulary) = (Things::new(recipe), Vocabulary::new());
    let job = context
        .progress
        .job("look at pictures", pictures.len() as u64, "pictures");
    let figures: Vec<Figure> = pictures
        .iter()
        .map(|pictured| {
            job.advance(1);
            Figure::find(&pictured.picture)
        })
        .collect();
    let scenes: Vec<Scene> = pictures
        .iter()
        .zip(&figures)
        .map(|(pictured, figure)| Scene {
            stratum: pictured.start,
            attributes: things.attributes(&pictured.prompt),
            shares: figure.shares(&vocabulary),
        })
        .collect();
    let with_figures: Vec<_> = pictures
        .iter()
        .map(|pictured| &pictured.picture)
        .zip(&figures)
        .collect();
    Group {
        kind,
        attributes: visibility::measure(&scenes, recipe),
        pixels: pixels::measure(&with_figures, square_px),
    }
}

/// Loads base and LoRA as they were trained, and measures the loss.
fn held_out_loss(
    context: &StageContext,
    held_out: &HeldOut,
    config: &MmditConfig,
) -> Result<HeldOutLoss, EvaluateError> {
    let vae_path = context.weights_dir(WeightPart::Vae).join("config.json");
    let vae = AutoencoderConfig::from_file(&vae_path)?;
    let lora = trained_lora(context, config)?;
    let train = &context.recipe.train;
    let precision = precision_of(train.precision);
    let options = &context.options;
    let Chosen { name, device, card } =
        engine::choose(&options.device, &options.engine, precision, config)?;
    let opening = Opening {
        dir: &context.weights_dir(WeightPart::Transformer),
        device,
        card,
        precision,
        base: base_weights_of(train.base_format),
    };
    let mut engine = engine::open(name, &opening)?;
    loss::measure(context, held_out, engine.as_mut(), &lora, &vae)
}

/// The LoRA that `train` made, at the strength that it was trained at.
fn trained_lora(
    context: &StageContext,
    config: &MmditConfig,
) -> Result<Vec<Factors>, EvaluateError> {
    let targets: Vec<Target> = config
        .linears()
        .into_iter()
        .map(|layer| Target::new(layer.path, layer.in_features, layer.out_features))
        .collect();
    let file = LoraFile::read(&context.input(Stage::Train).path(files::LORA), &targets)?;
    let factors = file.modules.into_iter().map(|(path, module)| Factors {
        path,
        rank: module.rank,
        scale: module.scale(),
        a: module.a,
        b: module.b,
    });
    Ok(factors.collect())
}
