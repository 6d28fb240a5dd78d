//! The training pairs, found to belong together before anything is loaded, and what is drawn for each use of them.
//!
//! A pair is an image and its caption. Everything is looked up by what it is of: a latent by its image's identity, an
//! embedding by its caption's hash; both stand in the files' own rows and are compared there. (The public recipe filled
//! its latents in one random order and read them in another, so that captions met other images' latents.)
//!
//! An epoch uses every pair once, in an order that is a function of seed and epoch. All random numbers of a use are
//! functions of seed, epoch and pair, so they depend neither on the size of batches nor on what came before.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use artifacts::{CaptionRow, Digest, LatentCache, SampleRow, TextEmbeddings};
use engine::MicroBatch;
use flow_matching::{Density, Purpose, Scheduler, Stream, TrainingPoint, Weighting};
use half::f16;
use mmdit::MmditConfig;
use mmdit::patches::PATCH_CELLS;
use rayon::prelude::*;

use crate::batch::{LatentScaling, sample_posterior};
use crate::error::TrainError;

/// Where the pairs are.
#[derive(Clone, Debug)]
pub struct DataFiles {
    /// `samples.parquet` of `ingest`.
    pub samples: PathBuf,
    /// `captions.parquet` of `ingest`.
    pub captions: PathBuf,
    /// `embeddings.parquet` of `embed-text`.
    pub embeddings: PathBuf,
    /// The directory of `cache-latents`.
    pub latents: PathBuf,
}

/// How noise levels are drawn and weighed, and from which seed everything is drawn.
#[derive(Clone, Debug)]
pub struct Sampling {
    /// Seed of order, views, posterior draws, noise and noise levels.
    pub seed: u64,
    /// Distribution of noise levels.
    pub density: Density,
    /// Weight of the loss by noise level.
    pub weighting: Weighting,
    /// The table of noise levels.
    pub scheduler: Scheduler,
    /// From the VAE's latents to the transformer's.
    pub scaling: LatentScaling,
}

/// An image and its caption.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Pair {
    sample_id: String,
    caption_hash: String,
    /// Cached views of the image, e.g. crops.
    views: Vec<u32>,
}

impl Pair {
    /// Its name among the keys of random streams.
    fn key(&self) -> String {
        format!("{}/{}", self.sample_id, self.caption_hash)
    }
}

/// All pairs with their latents and embeddings.
pub struct TrainingData {
    pairs: Vec<Pair>,
    embeddings: TextEmbeddings,
    embeddings_path: PathBuf,
    latents: LatentCache,
    latent_shape: [usize; 3],
    text_shape: [usize; 2],
    sampling: Sampling,
    num_images: usize,
    num_captions: usize,
}

impl TrainingData {
    /// Opens the files and checks every pair: its image is a sample, its caption has an embedding of the size that the
    /// transformer and the recipe want, its image has latents of this VAE that the transformer can take.
    ///
    /// # Errors
    ///
    /// At the first pair that does not hold, with what is missing; or if a file cannot be read.
    pub fn open(
        files: &DataFiles,
        config: &MmditConfig,
        t5_tokens: usize,
        vae_digest: Digest,
        sampling: Sampling,
    ) -> Result<Self, TrainError> {
        let samples: BTreeMap<String, SampleRow> = artifacts::samples::read(&files.samples)?
            .into_iter()
            .map(|row| (row.sample_id.clone(), row))
            .collect();
        let captions = artifacts::captions::read(&files.captions)?;
        if captions.is_empty() {
            return Err(TrainError::NoPairs {
                path: files.captions.clone(),
            });
        }
        let embeddings = TextEmbeddings::open(&files.embeddings)?;
        check_sizes(&files.embeddings, &embeddings, config, t5_tokens)?;
        let latents = LatentCache::open(&files.latents)?;
        latents.check_vae(vae_digest)?;

        let mut pairs = Vec::with_capacity(captions.len());
        let mut latent_shape = None;
        let views = views_by_sample(&latents);
        for CaptionRow {
            sample_id,
            caption_hash,
            caption,
        } in captions
        {
            let Some(sample) = samples.get(&sample_id) else {
                return Err(TrainError::UnknownSample {
                    path: files.captions.clone(),
                    sample_id,
                });
            };
            if !embeddings.contains(&caption_hash) {
                return Err(TrainError::MissingEmbedding {
                    path: files.embeddings.clone(),
                    caption,
                    source_file: sample.source_file.clone(),
                });
            }
            let Some(views) = views.get(sample_id.as_str()) else {
                return Err(TrainError::MissingLatent {
                    dir: files.latents.clone(),
                    sample_id,
                    source_file: sample.source_file.clone(),
                });
            };
            for (_, shape) in views {
                let expected = *latent_shape.get_or_insert(*shape);
                check_latent(&files.latents, &sample_id, *shape, expected, config)?;
            }
            let views = views.iter().map(|(view, _)| *view).collect();
            pairs.push(Pair {
                sample_id,
                caption_hash,
                views,
            });
        }
        // The tables' order is an accident of file names; the pairs' own is not.
        pairs.sort();
        let header = embeddings.header();
        let text_shape = [header.t5_tokens, header.t5_width];
        Ok(Self {
            num_images: count_distinct(pairs.iter().map(|pair| &pair.sample_id)),
            num_captions: count_distinct(pairs.iter().map(|pair| &pair.caption_hash)),
            pairs,
            embeddings,
            embeddings_path: files.embeddings.clone(),
            latents,
            latent_shape: latent_shape.expect("every pair has at least one view"),
            text_shape,
            sampling,
        })
    }

    /// Number of pairs, and so of uses in an epoch.
    pub fn num_pairs(&self) -> usize {
        self.pairs.len()
    }

    /// Number of distinct images.
    pub fn num_images(&self) -> usize {
        self.num_images
    }

    /// Number of distinct captions.
    pub fn num_captions(&self) -> usize {
        self.num_captions
    }

    /// Channels, rows and columns of every latent.
    pub fn latent_shape(&self) -> [usize; 3] {
        self.latent_shape
    }

    /// Text tokens of a sample and their width.
    pub fn text_shape(&self) -> [usize; 2] {
        self.text_shape
    }

    /// The seed that everything is drawn from.
    pub fn seed(&self) -> u64 {
        self.sampling.seed
    }

    /// Which pairs an epoch uses, in order.
    fn order(&self, epoch: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.pairs.len()).collect();
        Stream::new(self.sampling.seed, Purpose::Order, epoch, "").shuffle(&mut order);
        order
    }

    /// The uses `first_use` to `first_use + count` of a run, counted from 0 over all epochs. They are read and drawn on all
    /// cores: at FLUX.1-dev's sizes one takes 50 ms.
    ///
    /// # Errors
    ///
    /// If a latent or an embedding cannot be read, or is not finite.
    pub fn batch(&self, first_use: u64, count: usize) -> Result<MicroBatch, TrainError> {
        let per_epoch = self.pairs.len() as u64;
        let mut current: Option<(u64, Vec<usize>)> = None;
        let mut uses = Vec::with_capacity(count);
        for index in first_use..first_use + count as u64 {
            let epoch = index / per_epoch;
            if current.as_ref().is_none_or(|(of, _)| *of != epoch) {
                current = Some((epoch, self.order(epoch)));
            }
            let (_, order) = current.as_ref().expect("it was just made");
            let place = usize::try_from(index % per_epoch).expect("less than the number of pairs");
            uses.push((epoch, &self.pairs[order[place]]));
        }
        let samples: Vec<Result<Sample, TrainError>> = uses
            .into_par_iter()
            .map(|(epoch, pair)| self.sample(epoch, pair))
            .collect();

        let [channels, height, width] = self.latent_shape;
        let [tokens, text_width] = self.text_shape;
        let cells = channels * height * width;
        let mut batch = MicroBatch {
            shape: [count, channels, height, width],
            model_input: Vec::with_capacity(count * cells),
            noise: Vec::with_capacity(count * cells),
            points: Vec::with_capacity(count),
            text_shape: self.text_shape,
            prompt_embeds: Vec::with_capacity(count * tokens * text_width),
            pooled: Vec::new(),
        };
        for sample in samples {
            let sample = sample?;
            batch.model_input.extend(sample.model_input);
            batch.noise.extend(sample.noise);
            batch.points.push(sample.point);
            batch.prompt_embeds.extend(sample.prompt_embeds);
            batch.pooled.extend(sample.pooled);
        }
        Ok(batch)
    }

    /// One use of a pair.
    fn sample(&self, epoch: u64, pair: &Pair) -> Result<Sample, TrainError> {
        let Sampling {
            seed,
            density,
            weighting,
            scheduler,
            scaling,
        } = &self.sampling;
        let key = pair.key();
        let stream = |purpose| Stream::new(*seed, purpose, epoch, &key);

        let choice = stream(Purpose::View).below(pair.views.len() as u64);
        let view = pair.views[usize::try_from(choice).expect("less than the number of views")];
        let latent = self.latents.get(&pair.sample_id, view)?;
        let drawn = stream(Purpose::Posterior).normals(latent.mean.len());
        let z = sample_posterior(&latent.mean, &latent.logvar, &drawn);
        let u = density.draw(&mut stream(Purpose::Timestep));

        let embedding = self
            .embeddings
            .get(&pair.caption_hash)?
            .expect("every caption's embedding was found when the data were opened");
        let wide = |values: &[f16]| values.iter().map(|v| v.to_f32()).collect::<Vec<f32>>();
        let (prompt_embeds, pooled) = (wide(&embedding.t5), wide(&embedding.pooled));
        let mut numbers = prompt_embeds.iter().chain(&pooled);
        if !numbers.all(|value| value.is_finite()) {
            let caption = self.embeddings.caption(&pair.caption_hash);
            return Err(TrainError::EmbeddingNotFinite {
                path: self.embeddings_path.clone(),
                caption: caption.unwrap_or_default().to_owned(),
            });
        }
        Ok(Sample {
            model_input: scaling.apply(z),
            noise: stream(Purpose::Noise).normals(latent.mean.len()),
            point: scheduler.training_point(u, *weighting),
            prompt_embeds,
            pooled,
        })
    }
}

/// What a use of a pair adds to a batch.
struct Sample {
    model_input: Vec<f32>,
    noise: Vec<f32>,
    point: TrainingPoint,
    prompt_embeds: Vec<f32>,
    pooled: Vec<f32>,
}

/// Views and their shapes of every image in the cache, in the order of the views.
fn views_by_sample(latents: &LatentCache) -> BTreeMap<&str, Vec<(u32, [usize; 3])>> {
    let mut views: BTreeMap<&str, Vec<(u32, [usize; 3])>> = BTreeMap::new();
    for row in latents.rows() {
        let shape = [row.channels, row.height, row.width].map(|size| size as usize);
        views
            .entry(&row.sample_id)
            .or_default()
            .push((row.view, shape));
    }
    views.values_mut().for_each(|views| views.sort_unstable());
    views
}

fn count_distinct<T: Ord>(items: impl Iterator<Item = T>) -> usize {
    items.collect::<std::collections::BTreeSet<_>>().len()
}

fn check_sizes(
    path: &Path,
    embeddings: &TextEmbeddings,
    config: &MmditConfig,
    t5_tokens: usize,
) -> Result<(), TrainError> {
    let header = embeddings.header();
    let transformer = "the transformer";
    for (what, asker, expected, found) in [
        ("texts", "embed_text.t5_tokens", t5_tokens, header.t5_tokens),
        (
            "text tokens",
            transformer,
            config.joint_attention_dim,
            header.t5_width,
        ),
        (
            "pooled captions",
            transformer,
            config.pooled_projection_dim,
            header.pooled_width,
        ),
    ] {
        if expected != found {
            return Err(TrainError::EmbeddingSize {
                path: path.to_owned(),
                what,
                found,
                expected,
                asker,
            });
        }
    }
    Ok(())
}

fn check_latent(
    dir: &Path,
    sample_id: &str,
    found: [usize; 3],
    first: [usize; 3],
    config: &MmditConfig,
) -> Result<(), TrainError> {
    let wrong = |expected: String| TrainError::LatentShape {
        dir: dir.to_owned(),
        sample_id: sample_id.to_owned(),
        found,
        expected,
    };
    let [channels, height, width] = found;
    let token_channels = channels * PATCH_CELLS * PATCH_CELLS;
    if token_channels != config.in_channels {
        return Err(wrong(format!(
            "{} channels, a quarter of a token's",
            config.in_channels / (PATCH_CELLS * PATCH_CELLS)
        )));
    }
    if height == 0 || width == 0 || height % PATCH_CELLS != 0 || width % PATCH_CELLS != 0 {
        return Err(wrong("an even number of rows and columns".to_owned()));
    }
    if found != first {
        return Err(wrong(format!(
            "{first:?} as the first one: latents of one run are of one size"
        )));
    }
    Ok(())
}
