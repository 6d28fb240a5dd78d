//! A training run as stage `train` takes it, at FLUX.1-dev's shapes: pairs read from files and checked, every step's
//! micro-batches drawn from them, checkpoints written. Weights are made on the card, and the files' content is noise.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use artifacts::{
    ArtifactError, CaptionRow, Digest, Embedding, Footer, Latent, LatentCacheWriter,
    SafetensorsFile, SampleRow, TextEmbeddingHeader, TextEmbeddingRow, TextEmbeddingWriter,
    captions, digest_bytes, samples,
};
use autoencoder::AutoencoderConfig;
use console::Progress;
use engine::cuda::CudaTraining;
use engine::{
    LoraOptimizer, OpenError, Opening, TrainableLora, TrainingEngine, Workload, base_weights_of,
    precision_of,
};
use engine_cuda::model::{NormalWeights, WeightSource};
use flow_matching::{Density, Scheduler, SchedulerConfig, Weighting};
use half::f16;
use mmdit::MmditConfig;
use pipeline::files;
use pipeline::recipe::{Recipe, RecipeError};
use serde_json::{Value, json};
use tensor::device;
use train::batch::LatentScaling;
use train::data::{DataFiles, Sampling};
use train::planning::workload;
use train::{Checkpoints, TrainError, Trainer, TrainingData, take_steps, untrained_lora};

/// The recipe that the run is, before [`CHANGES`].
const RECIPE: &str = include_str!("../../../configs/flux-dev-pixel-art.toml");

/// What is trained otherwise than the recipe says: the strongest setting on a card of 80 GB, and the bench's text length.
const CHANGES: [&str; 3] = [
    "train.base_format=plain",
    "train.precision=bf16",
    "embed_text.t5_tokens=512",
];

/// The plan's limit: a card of 80 GB.
const LIMIT_BYTES: usize = 80_000_000_000;

/// Images of the run, each with a caption of its own.
const NUM_IMAGES: usize = 32;

/// Steps at the start whose time says nothing of the others': kernels are loaded, work is recorded.
const FIRST_STEPS: usize = 3;

/// The fewest steps that a run can be told from.
pub const LEAST_STEPS: u32 = 8;

/// Why there is no figure.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunBenchError {
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    #[error(transparent)]
    Train(Box<TrainError>),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    File(#[from] ArtifactError),
    #[error("cannot make a folder for the run's files")]
    Folder(#[from] std::io::Error),
}

impl From<TrainError> for RunBenchError {
    fn from(error: TrainError) -> Self {
        Self::Train(Box::new(error))
    }
}

/// What a run took.
#[derive(Clone, Copy, Debug)]
struct Times {
    /// Opening and checking the pairs.
    data_s: f64,
    /// Planning, and making the network on the card.
    load_s: f64,
    /// All steps, with reading and checkpoints.
    run_s: f64,
    /// Steps taken.
    steps: u32,
    /// Of these the first few, together.
    first_s: f64,
    /// One of the others, in the mean.
    step_s: f64,
    /// Checkpoints written.
    checkpoints: u32,
    /// One of them, with what else is between steps.
    checkpoint_s: f64,
}

impl Times {
    /// What a whole run of `steps` with a checkpoint `every` so many takes: as measured if these were all, else reckoned.
    fn of_all(&self, steps: u32, every: u32) -> f64 {
        let before = self.data_s + self.load_s;
        if steps == self.steps {
            return before + self.run_s;
        }
        let later = f64::from(steps) - FIRST_STEPS as f64;
        let checkpoints = f64::from(steps / every);
        before + self.first_s + later * self.step_s + checkpoints * self.checkpoint_s
    }
}

/// Takes the first `num_steps` steps of the recipe's run, and says what all of them take.
///
/// # Errors
///
/// If there is no card or it fails, or a file cannot be written or read.
pub(crate) fn row(num_steps: u32) -> Result<Value, RunBenchError> {
    let config = MmditConfig::flux_dev();
    let recipe = recipe()?;
    measure(&config, &recipe, num_steps, |lora, optimizer, work| {
        let opening = Opening {
            dir: Path::new(""),
            device: device::cpu(),
            card: 0,
            precision: precision_of(recipe.train.precision),
            base: base_weights_of(recipe.train.base_format),
        };
        let network: (&MmditConfig, &dyn WeightSource) = (&config, &NormalWeights { std: 0.02 });
        let engine =
            CudaTraining::with_weights(&opening, network, LIMIT_BYTES, lora, optimizer, work)?;
        Ok(Box::new(engine))
    })
}

fn recipe() -> Result<Recipe, RecipeError> {
    let changes = CHANGES.map(str::parse).into_iter();
    let changes = changes.collect::<Result<Vec<_>, _>>()?;
    Recipe::parse(RECIPE, Path::new("flux-dev-pixel-art.toml"), &changes)
}

/// [`row`] of any network and engine.
fn measure(
    config: &MmditConfig,
    recipe: &Recipe,
    num_steps: u32,
    open: impl FnOnce(
        &TrainableLora,
        LoraOptimizer,
        Workload,
    ) -> Result<Box<dyn TrainingEngine>, RunBenchError>,
) -> Result<Value, RunBenchError> {
    let train = &recipe.train;
    let folder = tempfile::tempdir()?;
    let cells = recipe.cache_latents.resolution_px as usize / 8;
    write_pairs(folder.path(), config, recipe.embed_text.t5_tokens, cells)?;

    let start = Instant::now();
    let data = open_pairs(folder.path(), config, recipe)?;
    let data_s = start.elapsed().as_secs_f64();

    let start = Instant::now();
    let lora = untrained_lora(config, train)?;
    let [_, rows, columns] = data.latent_shape();
    let work = workload(train, data.text_shape()[0], [rows, columns], None);
    let engine = open(&lora, LoraOptimizer::of(train, &lora), work)?;
    let load_s = start.elapsed().as_secs_f64();

    let mut trainer = Trainer::new(engine, train, lora, "bench".to_owned());
    // A short run has checkpoints too, so that one is timed.
    let kept = Checkpoints {
        dir: &folder.path().join(files::CHECKPOINTS),
        every: train.checkpoint_every.min(num_steps / 3).max(1),
        keep: train.keep_checkpoints as usize,
    };
    let job = Progress::silent().job("train", num_steps.into(), "steps");
    let start = Instant::now();
    let checkpoints = take_steps(&mut trainer, &data, num_steps, &kept, &job, |_| {
        BTreeMap::new()
    })?;
    let run_s = start.elapsed().as_secs_f64();
    job.finish();

    let path = folder.path().join(files::LORA);
    let trained = trainer.lora().map_err(TrainError::from)?;
    let written = trained.to_file(BTreeMap::new()).write(&path);
    written.map_err(TrainError::from)?;
    let file = lora_file(&path)?;

    let steps: Vec<f64> = trainer.metrics().iter().map(|row| row.step_s).collect();
    let (first, later) = steps.split_at(FIRST_STEPS.min(steps.len()));
    let in_steps: f64 = steps.iter().sum();
    let times = Times {
        data_s,
        load_s,
        run_s,
        steps: num_steps,
        first_s: first.iter().sum(),
        step_s: later.iter().sum::<f64>() / later.len().max(1) as f64,
        checkpoints,
        checkpoint_s: (run_s - in_steps) / f64::from(checkpoints.max(1)),
    };
    Ok(said(
        &times,
        train.steps,
        train.checkpoint_every,
        &trainer.notes(),
        file,
    ))
}

/// Names and shapes of the tensors of the public recipe's LoRA for FLUX.1-dev: rank 4 on the attention's image stream.
fn published() -> BTreeMap<String, Vec<usize>> {
    const WIDTH: usize = 3072;
    const RANK: usize = 4;
    let double = (
        "transformer_blocks",
        19,
        ["to_q", "to_k", "to_v", "to_out.0"].as_slice(),
    );
    let single = (
        "single_transformer_blocks",
        38,
        ["to_q", "to_k", "to_v"].as_slice(),
    );
    let mut tensors = BTreeMap::new();
    for (blocks, count, layers) in [double, single] {
        for (block, layer) in (0..count).flat_map(|block| layers.iter().map(move |l| (block, l))) {
            for (factor, shape) in [("A", [RANK, WIDTH]), ("B", [WIDTH, RANK])] {
                let name =
                    format!("transformer.{blocks}.{block}.attn.{layer}.lora_{factor}.weight");
                tensors.insert(name, shape.to_vec());
            }
        }
    }
    tensors
}

/// What is in a LoRA's file, and whether it is [`published`].
fn lora_file(path: &Path) -> Result<Value, ArtifactError> {
    let file = SafetensorsFile::open(path)?;
    let tensors = file
        .names()
        .map(|name| Ok((name.to_owned(), file.info(name)?.shape.clone())))
        .collect::<Result<BTreeMap<_, _>, ArtifactError>>()?;
    let numbers: usize = tensors
        .values()
        .map(|shape| shape.iter().product::<usize>())
        .sum();
    Ok(json!({
        "tensors": tensors.len(),
        "numbers": numbers,
        "names_and_shapes_as_published": tensors == published(),
    }))
}

fn said(times: &Times, all_steps: u32, every: u32, notes: &[String], lora_file: Value) -> Value {
    json!({
        "what": format!(
            "the loop of stage train with the engine cuda on flux-dev-pixel-art.toml ({}), {NUM_IMAGES} pairs read from files; \
             weights made on the card and not read", CHANGES.join(", ")
        ),
        "all_steps": all_steps,
        "all_steps_s": times.of_all(all_steps, every),
        "extrapolated": times.steps != all_steps,
        "measured_steps": times.steps,
        "measured_s": times.data_s + times.load_s + times.run_s,
        "open_data_s": times.data_s,
        "load_s": times.load_s,
        "first_steps_s": times.first_s,
        "step_s": times.step_s,
        "measured_checkpoints": times.checkpoints,
        "checkpoint_s": times.checkpoint_s,
        "notes": notes,
        "lora_file": lora_file,
    })
}

/// The VAE and the encoders that the files claim to be of.
fn digest() -> Digest {
    digest_bytes(b"bench")
}

/// Numbers in (−1, 1), another sequence for another seed.
fn noise(seed: usize, count: usize) -> impl Iterator<Item = f32> {
    let mut state = (seed as u32).wrapping_mul(0x9e37_79b9) | 1;
    (0..count).map(move |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    })
}

fn sample_id(image: usize) -> String {
    digest_bytes(&image.to_le_bytes()).to_string()
}

/// What `ingest`, `embed-text` and `cache-latents` would have left, with noise in it.
fn write_pairs(
    folder: &Path,
    config: &MmditConfig,
    t5_tokens: usize,
    cells: usize,
) -> Result<(), ArtifactError> {
    let caption = |image: usize| format!("picture {image}");
    let side = 8 * cells as u32;
    let rows: Vec<SampleRow> = (0..NUM_IMAGES)
        .map(|image| SampleRow {
            sample_id: sample_id(image),
            compat_sha256: String::new(),
            compat_sha256_oriented: String::new(),
            width_px: side,
            height_px: side,
            has_alpha: false,
            num_colors: 0,
            source_file: format!("{image}.png"),
            source_row: None,
        })
        .collect();
    samples::write(&folder.join(files::SAMPLES), &rows, &Footer::new())?;
    let rows: Vec<CaptionRow> = (0..NUM_IMAGES)
        .map(|image| CaptionRow {
            sample_id: sample_id(image),
            caption_hash: captions::caption_hash(&caption(image)),
            caption: caption(image),
        })
        .collect();
    captions::write(&folder.join(files::CAPTIONS), &rows, &Footer::new())?;

    let [t5_width, pooled_width] = [config.joint_attention_dim, config.pooled_projection_dim];
    let header = TextEmbeddingHeader {
        t5_tokens,
        t5_width,
        pooled_width,
        t5_digest: digest(),
        clip_digest: digest(),
        t5_tokenizer_digest: digest(),
        clip_tokenizer_digest: digest(),
    };
    let mut writer = TextEmbeddingWriter::create(&folder.join(files::EMBEDDINGS), &header)?;
    for image in 0..NUM_IMAGES {
        let half =
            |seed: usize, count: usize| noise(seed, count).map(f16::from_f32).collect::<Vec<_>>();
        writer.push(TextEmbeddingRow {
            embedding: Embedding {
                t5: half(2 * image, t5_tokens * t5_width),
                pooled: half(2 * image + 1, pooled_width),
            },
            caption: caption(image),
            num_t5_tokens: t5_tokens as u32,
        })?;
    }
    writer.finish()?;

    let shape = [config.in_channels / 4, cells, cells];
    let count = shape.iter().product();
    let mut writer = LatentCacheWriter::create(folder, digest(), "bench");
    for image in 0..NUM_IMAGES {
        writer.push(Latent {
            mean: noise(1000 + image, count).collect(),
            logvar: vec![-2.0; count],
            sample_id: sample_id(image),
            view: 0,
            shape,
            flipped: false,
            crop_x_px: 0,
            crop_y_px: 0,
        })?;
    }
    writer.finish()?;
    Ok(())
}

fn open_pairs(
    folder: &Path,
    config: &MmditConfig,
    recipe: &Recipe,
) -> Result<TrainingData, RunBenchError> {
    let vae = AutoencoderConfig::flux();
    let data_files = DataFiles {
        samples: folder.join(files::SAMPLES),
        captions: folder.join(files::CAPTIONS),
        embeddings: folder.join(files::EMBEDDINGS),
        latents: folder.to_owned(),
    };
    let sampling = Sampling {
        seed: recipe.train.seed,
        density: Density::Uniform,
        weighting: Weighting::None,
        scheduler: Scheduler::new(SchedulerConfig::flux_dev()),
        scaling: LatentScaling {
            shift: vae.shift_factor as f32,
            scale: vae.scaling_factor as f32,
        },
    };
    let t5_tokens = recipe.embed_text.t5_tokens;
    let opened = TrainingData::open(&data_files, config, t5_tokens, digest(), sampling);
    Ok(opened?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(steps: u32) -> Times {
        Times {
            data_s: 1.0,
            load_s: 2.0,
            run_s: 50.0,
            steps,
            first_s: 4.0,
            step_s: 0.5,
            checkpoints: 3,
            checkpoint_s: 0.25,
        }
    }

    #[test]
    fn a_whole_run_is_as_measured_and_a_part_is_reckoned() {
        assert_eq!(times(700).of_all(700, 100), 53.0);
        // 697 later steps and 7 checkpoints.
        assert_eq!(
            times(30).of_all(700, 100),
            3.0 + 4.0 + 697.0 * 0.5 + 7.0 * 0.25
        );
        let extrapolated =
            |steps| said(&times(steps), 700, 100, &[], Value::Null)["extrapolated"].clone();
        assert_eq!([extrapolated(700), extrapolated(30)], [false, true]);
    }

    #[test]
    fn the_recipes_lora_has_the_380_published_tensors_and_another_has_not() {
        let recipe = recipe().expect("the shipped recipe is valid");
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(files::LORA);
        let said = |config: &MmditConfig| {
            let lora = untrained_lora(config, &recipe.train).expect("known targets");
            lora.to_file(BTreeMap::new()).write(&path).expect("written");
            lora_file(&path).expect("it is a file")
        };
        let file = said(&MmditConfig::flux_dev());
        assert_eq!(
            (&file["tensors"], &file["numbers"]),
            (&json!(380), &json!(4_669_440))
        );
        assert_eq!(file["names_and_shapes_as_published"], true);
        assert_eq!(
            said(&MmditConfig::tiny())["names_and_shapes_as_published"],
            false
        );
    }

    #[test]
    fn the_files_are_what_stage_train_opens() {
        let mut recipe = recipe().expect("the shipped recipe is valid");
        assert_eq!((recipe.train.steps, recipe.train.accumulation), (700, 4));
        recipe.embed_text.t5_tokens = 3;
        let config = MmditConfig::tiny();
        let folder = tempfile::tempdir().expect("a folder");
        write_pairs(folder.path(), &config, 3, 4).expect("written");
        let data = open_pairs(folder.path(), &config, &recipe).expect("they belong together");
        assert_eq!(data.num_pairs(), NUM_IMAGES);
        assert_eq!(data.latent_shape(), [config.in_channels / 4, 4, 4]);
    }

    #[test]
    fn a_run_reads_steps_and_writes_checkpoints() {
        let config = MmditConfig::tiny();
        let mut recipe = recipe().expect("the shipped recipe is valid");
        recipe.embed_text.t5_tokens = 3;
        recipe.cache_latents.resolution_px = 32;
        let row = measure(&config, &recipe, LEAST_STEPS, |lora, optimizer, work| {
            assert_eq!((work.accumulation, work.latent_cells), (4, [4, 4]));
            let values = |count: u64| noise(1, count as usize).map(|v| 0.1 * v).collect();
            let parameters = config.parameters().into_iter();
            let weights = parameters.map(|spec| {
                let count = spec.num_elements();
                (spec, values(count))
            });
            let weights = tensor::Weights::from_values(weights);
            let base = mmdit::BaseWeights::Plain;
            let network = engine_cpu::Transformer::load(&weights, config.clone(), base);
            let network = engine::cpu::Cpu::new(network.expect("all are there"));
            let engine = engine::HostEngine::new(Box::new(network), lora.clone(), optimizer);
            Ok(Box::new(engine))
        });
        let row = row.expect("no card is needed");
        // Every second of eight steps; the rest of 700 is reckoned.
        assert_eq!(
            (&row["measured_checkpoints"], &row["measured_steps"]),
            (&json!(4), &json!(8))
        );
        assert_eq!(row["extrapolated"], json!(true));
        assert!(row["all_steps_s"].as_f64() > row["measured_s"].as_f64());
    }
}
