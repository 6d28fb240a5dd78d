//! Pictures and captions to learn from, and those kept back.
//!
//! Pictures are told apart by their pixels: the same picture under two captions is one picture and two pairs, and is
//! held out with all of its captions or not at all. A caption of a held-out picture is left out of the training pairs
//! wherever else it stands.
//!
//! Pictures come from any source that `ingest` reads ([`sources`]). Order counts: sources as the recipe lists them,
//! files by name, rows as stored. A picture or caption that cannot be used stops the run before it begins.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use artifacts::{Digest, RejectRow, digest_bytes};
use flow_matching::noise::{Purpose, Stream};
use pixel_art::{Limits, Rgb8, Rgba8};
use rayon::prelude::*;
use sources::{LISTED, Problem, Source, SourceImage, SourceKeys, SourceRecipe};

use crate::PretrainError;
use crate::augment::scale;
use crate::recipe::{CorpusRecipe, PretrainRecipe};
use crate::textures;

/// A picture, by its place in the corpus, and what it shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Place of the picture.
    pub picture: usize,
    /// Its caption.
    pub caption: String,
}

/// Everything that is learned from or measured on.
#[derive(Clone, Debug)]
pub struct Corpus {
    /// Captioned pictures, all of the recipe's size.
    pub pictures: Vec<Rgba8>,
    /// What all phases learn from.
    pub pairs: Vec<Pair>,
    /// What nothing learns from.
    pub held_out: Vec<Pair>,
    /// What only the autoencoder learns from.
    pub textures: Vec<Rgb8>,
    /// What the autoencoder is measured on beside the held-out pictures; nothing learns from it.
    pub characters: Vec<Rgba8>,
    /// Content of all that is learned from: of each captioned pair in order the picture's identity (64 hexadecimal
    /// digits) and the caption, then the RGBA pixels of each picture of `corpus.textures`, as stored.
    pub digest: Digest,
}

/// A decoded picture, its identity and its caption.
pub struct Captioned {
    /// Straight RGBA.
    pub picture: Rgba8,
    /// BLAKE3 of its pixels.
    pub identity: String,
    /// What it shows.
    pub caption: String,
}

/// No picture of a corpus for small models is larger.
const LIMITS: Limits = Limits {
    max_pixels: 1 << 24,
};

/// What messages call the fields of a source under the key `source`.
const fn keys(source: &'static str) -> SourceKeys {
    SourceKeys {
        source,
        image_column: "corpus.image_column",
        caption_column: "corpus.caption_column",
    }
}

const CAPTIONED: SourceKeys = keys("corpus.captioned");
const TEXTURES: SourceKeys = keys("corpus.textures");
const CHARACTERS: SourceKeys = keys("evaluate.characters");

impl Corpus {
    /// Reads what a recipe names.
    ///
    /// # Errors
    ///
    /// If a source cannot be read, a picture of it cannot be used, or there is nothing to learn from.
    pub fn read(recipe: &PretrainRecipe) -> Result<Self, PretrainError> {
        let mut captioned = Vec::new();
        for path in &recipe.corpus.captioned {
            let source = Source::open(&source(path, recipe, &CAPTIONED))?;
            captioned.extend(read(&source, path, &CAPTIONED, |image| {
                let caption = image.caption()?.to_owned();
                let decoded = image.decode(&LIMITS)?;
                Ok(Captioned {
                    identity: decoded.identity(),
                    picture: decoded.picture,
                    caption,
                })
            })?);
        }
        let mut pixel_art = Vec::new();
        for path in &recipe.corpus.textures {
            let source = Source::open_pictures(&source(path, recipe, &TEXTURES))?;
            pixel_art.extend(read(&source, path, &TEXTURES, |image| {
                Ok(image.decode(&LIMITS)?.picture)
            })?);
        }
        let mut corpus = Self::new(recipe, captioned, pixel_art)?;
        let path = &recipe.evaluate.characters;
        if !path.as_os_str().is_empty() {
            let source = Source::open_pictures(&source(path, recipe, &CHARACTERS))?;
            let side_px = recipe.corpus.resolution_px;
            corpus.characters = read(&source, path, &CHARACTERS, |image| {
                let picture = image.decode(&LIMITS)?.picture;
                let (width_px, height_px) = (picture.width_px, picture.height_px);
                if width_px.max(height_px) > side_px {
                    let detail = format!(
                        "it is {width_px}×{height_px} px; corpus.resolution_px = {side_px} holds no larger characters"
                    );
                    return Err(Problem::new("too-large", detail));
                }
                Ok(picture)
            })?;
            corpus.characters.truncate(recipe.evaluate.num_characters);
        }
        Ok(corpus)
    }

    /// Divides captioned pictures into training and held-out ones.
    ///
    /// # Errors
    ///
    /// If there is nothing to learn from.
    pub fn new(
        recipe: &PretrainRecipe,
        captioned: Vec<Captioned>,
        pixel_art: Vec<Rgba8>,
    ) -> Result<Self, PretrainError> {
        let CorpusRecipe {
            resolution_px,
            held_out_share,
            synthetic_textures,
            ..
        } = recipe.corpus;
        let mut hasher = artifacts::Hasher::new();
        let mut places = BTreeMap::new();
        let mut sources = Vec::new();
        let mut all: Vec<(Pair, bool)> = Vec::new();
        for row in captioned {
            hasher.update(row.identity.as_bytes());
            hasher.update(row.caption.as_bytes());
            let digest = digest_bytes(row.identity.as_bytes()).to_string();
            let drawn = u32::from_str_radix(&digest[..8], 16).expect("a digest is hexadecimal");
            let is_held_out = f64::from(drawn) < held_out_share * 2f64.powi(32);
            let picture = *places.entry(row.identity).or_insert_with(|| {
                sources.push(row.picture);
                sources.len() - 1
            });
            let caption = row.caption;
            all.push((Pair { picture, caption }, is_held_out));
        }
        let pictures = sources
            .par_iter()
            .map(|picture| scale(picture, resolution_px, resolution_px))
            .collect();
        let hidden: BTreeSet<String> = all
            .iter()
            .filter(|(_, is_held_out)| *is_held_out)
            .map(|(pair, _)| pair.caption.clone())
            .collect();
        let (mut pairs, mut held_out) = (Vec::new(), Vec::new());
        for (pair, is_held_out) in all {
            if is_held_out {
                held_out.push(pair);
            } else if !hidden.contains(&pair.caption) {
                pairs.push(pair);
            }
        }
        if pairs.is_empty() {
            return Err(PretrainError::Empty {
                what: "captioned pictures to learn from",
            });
        }
        for picture in &pixel_art {
            hasher.update(&picture.pixels);
        }
        let mut textures: Vec<Rgb8> = pixel_art
            .par_iter()
            .enumerate()
            .map(|(index, sprite)| textures::magnified(sprite, resolution_px, recipe.seed, index))
            .collect();
        textures.par_extend((0..synthetic_textures).into_par_iter().map(|index| {
            let mut stream = Stream::new(
                recipe.seed,
                Purpose::Augmentation,
                index as u64,
                "pretrain/texture",
            );
            textures::blocks(&mut stream, resolution_px)
        }));
        Ok(Self {
            pictures,
            pairs,
            held_out,
            textures,
            characters: Vec::new(),
            digest: hasher.finish(),
        })
    }

    /// Places of the pictures that are learned from, each once.
    pub fn training_pictures(&self) -> Vec<usize> {
        let places: BTreeSet<usize> = self.pairs.iter().map(|pair| pair.picture).collect();
        places.into_iter().collect()
    }

    /// Places of the pictures that are held out, each once.
    pub fn held_out_pictures(&self) -> Vec<usize> {
        let places: BTreeSet<usize> = self.held_out.iter().map(|pair| pair.picture).collect();
        places.into_iter().collect()
    }
}

fn source<'a>(
    path: &'a Path,
    recipe: &'a PretrainRecipe,
    keys: &'static SourceKeys,
) -> SourceRecipe<'a> {
    SourceRecipe {
        path,
        image_column: &recipe.corpus.image_column,
        caption_column: &recipe.corpus.caption_column,
        keys,
    }
}

/// What `look` makes of every picture of a source, in its order; or all that cannot be used, with reasons.
fn read<T: Send>(
    source: &Source,
    path: &Path,
    keys: &'static SourceKeys,
    look: impl Fn(&SourceImage<'_>) -> Result<T, Problem> + Sync,
) -> Result<Vec<T>, PretrainError> {
    let seen =
        source.map(|image| look(image).map_err(|problem| problem.at(image.file, image.row)))?;
    let mut taken = Vec::with_capacity(seen.len());
    let mut listed: Vec<RejectRow> = Vec::new();
    let mut count = 0;
    for image in seen {
        match image {
            Ok(image) => taken.push(image),
            Err(reject) => {
                count += 1;
                if listed.len() < LISTED {
                    listed.push(reject);
                }
            }
        }
    }
    if count > 0 {
        return Err(PretrainError::Images {
            key: keys.source,
            path: path.to_owned(),
            count,
            listed,
        });
    }
    Ok(taken)
}

#[cfg(test)]
mod tests;
