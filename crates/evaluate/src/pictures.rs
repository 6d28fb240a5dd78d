//! The pictures that are looked at: those that `sample` drew, and the real held-out sprites as what can be reached.

use std::collections::BTreeMap;

use artifacts::{SampleRow, SourceImages, digest_bytes};
use pipeline::recipe::{Background, Recipe, Scaling};
use pipeline::{Stage, StageContext, files};
use pixel_art::{Limits, Rgb8, canvas_grid, decode, decode_expecting};

use crate::error::EvaluateError;
use crate::held_out::{HeldOut, location};

/// A drawn PNG has no more pixels than this: 16384×16384.
const MAX_DRAWN_PIXELS: u64 = 1 << 28;

/// Behind real sprites when the recipe lays nothing behind them.
const GROUND: [u8; 3] = [255; 3];

/// A picture with the prompt that it was drawn for, or the caption that describes it.
#[derive(Clone, Debug)]
pub struct Pictured {
    /// What it should show.
    pub prompt: String,
    /// What it started from: seed and number; all real sprites count as one.
    pub start: (u64, u32),
    /// Its pixels.
    pub picture: Rgb8,
}

/// The drawn pictures.
#[derive(Clone, Debug, Default)]
pub struct Drawn {
    /// With the recipe's LoRAs.
    pub with_loras: Vec<Pictured>,
    /// By the base alone.
    pub base: Vec<Pictured>,
}

/// Reads what `sample` drew.
///
/// # Errors
///
/// If a file cannot be read, or is not what was drawn.
pub fn drawn(context: &StageContext) -> Result<Drawn, EvaluateError> {
    let artifact = context.input(Stage::Sample);
    let recipe = &context.recipe.sample;
    let has_loras = recipe.use_trained_lora || !recipe.loras.is_empty();
    let source = SourceImages::new(&artifact.dir, "", "");
    let limits = Limits {
        max_pixels: MAX_DRAWN_PIXELS,
    };
    let mut drawn = Drawn::default();
    for entry in artifacts::images::read(&artifact.path(files::IMAGES))? {
        let path = artifact.path(&entry.file);
        let bytes = source.bytes(&entry.file, None, limits.max_file_bytes())?;
        let picture = decode(&bytes, &limits)
            .map_err(|source| EvaluateError::Picture {
                path: path.clone(),
                source,
            })?
            .picture
            .drop_alpha();
        let found = digest_bytes(&picture.pixels).to_string();
        if found != entry.pixels {
            return Err(EvaluateError::OtherPicture {
                path,
                expected: entry.pixels,
                found,
            });
        }
        let group = if has_loras && !entry.without_loras {
            &mut drawn.with_loras
        } else {
            &mut drawn.base
        };
        group.push(Pictured {
            prompt: entry.prompt,
            start: (entry.seed, entry.image),
            picture,
        });
    }
    Ok(drawn)
}

/// Reads the real held-out sprites at their native size, over the recipe's background.
///
/// # Errors
///
/// If one cannot be fetched or is not the one that was ingested.
pub fn real(recipe: &Recipe, held_out: &HeldOut) -> Result<Vec<Pictured>, EvaluateError> {
    let source = recipe
        .evaluate
        .held_out
        .as_deref()
        .expect("there is a held-out set only where the recipe names one");
    let ingest = &recipe.ingest;
    let images = SourceImages::new(source, &ingest.image_column, &ingest.caption_column);
    let limits = Limits {
        max_pixels: ingest.max_pixels,
    };
    let ground = match recipe.cache_latents.background {
        Background::Color(color) => color,
        Background::DropAlpha => GROUND,
    };
    held_out
        .pictures
        .iter()
        .map(|held_out| {
            let sample = &held_out.sample;
            let bytes = images
                .bytes(
                    &sample.source_file,
                    sample.source_row,
                    limits.max_file_bytes(),
                )
                .map_err(|source| EvaluateError::Fetch {
                    source_file: location(sample),
                    source: Box::new(source),
                })?;
            let decoded =
                decode_expecting(&bytes, &limits, &sample.sample_id).map_err(|source| {
                    EvaluateError::Changed {
                        source_file: location(sample),
                        source,
                    }
                })?;
            Ok(Pictured {
                prompt: held_out.caption.clone(),
                start: (0, 0),
                picture: decoded.picture.over(ground),
            })
        })
        .collect()
}

/// The side of a sprite pixel in a drawn picture: the factor at which most of these sprites are magnified for the
/// transformer. `None` if they are not magnified by whole factors.
pub fn sprite_pixel_px<'a>(
    recipe: &Recipe,
    samples: impl Iterator<Item = &'a SampleRow>,
) -> Option<u32> {
    if recipe.cache_latents.scaling != Scaling::IntegerNearest {
        return None;
    }
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    for sample in samples {
        let resolution_px = recipe.cache_latents.resolution_px;
        if let Ok(grid) = canvas_grid(sample.width_px, sample.height_px, resolution_px) {
            *counts.entry(grid.factor).or_default() += 1;
        }
    }
    let (factor, _) = counts.into_iter().max_by_key(|(_, count)| *count)?;
    Some(factor)
}
