//! Pictures and captions to learn from, and those kept back.
//!
//! Pictures are told apart by their pixels: the same picture under two captions is one picture and two pairs, and is
//! held out with all of its captions or not at all. A caption of a held-out picture is left out of the training pairs
//! wherever else it stands.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use artifacts::{Digest, ParquetImages, digest_bytes};
use flow_matching::noise::{Purpose, Stream};
use pixel_art::{Limits, Rgb8, Rgba8, decode};
use rayon::prelude::*;

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
    /// What both phases learn from.
    pub pairs: Vec<Pair>,
    /// What nothing learns from.
    pub held_out: Vec<Pair>,
    /// What only the autoencoder learns from.
    pub textures: Vec<Rgb8>,
    /// Content of all of it.
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

impl Corpus {
    /// Reads what a recipe names.
    ///
    /// # Errors
    ///
    /// If a file is damaged or there is nothing to learn from.
    pub fn read(recipe: &PretrainRecipe) -> Result<Self, PretrainError> {
        let corpus = &recipe.corpus;
        let captioned = read_pictures(&corpus.captioned, corpus)?;
        let pixel_art = read_pictures(&corpus.textures, corpus)?;
        let pixel_art = pixel_art.into_iter().map(|row| row.picture).collect();
        Self::new(recipe, captioned, pixel_art)
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

/// All rows of Parquet files.
///
/// # Errors
///
/// If a file or a picture is damaged.
pub fn read_pictures(
    files: &[PathBuf],
    recipe: &CorpusRecipe,
) -> Result<Vec<Captioned>, PretrainError> {
    if files.is_empty() {
        return Ok(Vec::new());
    }
    let images = ParquetImages::open(files, &recipe.image_column, &recipe.caption_column)?;
    let rows: Vec<_> = images.iter().collect::<Result<_, _>>()?;
    rows.into_par_iter()
        .map(|row| {
            let decoded = decode(&row.bytes, &LIMITS).map_err(|source| PretrainError::Picture {
                path: files[row.file].clone(),
                row: row.row,
                source,
            })?;
            Ok(Captioned {
                identity: decoded.identity(),
                picture: decoded.picture,
                caption: row.caption.unwrap_or_default(),
            })
        })
        .collect()
}
