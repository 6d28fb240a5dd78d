//! The stage: from the recipe and the artifacts before it to a LoRA, its metrics and its checkpoints.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use artifacts::{Digest, Footer, digest_file, metrics};
use autoencoder::AutoencoderConfig;
use engine::{
    Chosen, ImportError, LoraOptimizer, Opening, TrainableLora, base_weights_of, precision_of,
};
use flow_matching::{Density, Scheduler, SchedulerConfig, Weighting};
use mmdit::MmditConfig;
use mmdit::patches::PATCH_CELLS;
use pipeline::recipe::{self, TimestepSampling, TrainRecipe};
use pipeline::{Fingerprint, Stage, StageContext, StageReport, WeightPart, files, outputs};

use crate::batch::LatentScaling;
use crate::checkpoint::{self, Checkpoint};
use crate::data::{DataFiles, Sampling, TrainingData};
use crate::error::TrainError;
use crate::planning::workload;
use crate::steps::{Checkpoints, take_steps};
use crate::trainer::Trainer;
use crate::untrained::untrained_lora;

/// Runs the stage, from the newest checkpoint of an interrupted run if there is one.
///
/// # Errors
///
/// If the data and the base do not belong together, the device or a file cannot be used, or training falls apart.
pub fn run(context: &StageContext) -> Result<StageReport, TrainError> {
    let recipe = &context.recipe.train;
    // Everything that can be wrong is looked at before the transformer is loaded.
    let transformer_dir = context.weights_dir(WeightPart::Transformer);
    let config = MmditConfig::from_file(&transformer_dir.join("config.json"))?;
    let data = open_data(context, &config)?;
    let lora = untrained_lora(&config, recipe)?;
    let precision = precision_of(recipe.precision);
    let options = &context.options;
    let Chosen { name, device, card } =
        engine::choose(&options.device, &options.engine, precision, &config)?;
    let fingerprint = Fingerprint::of(&context.components).to_string();
    let checkpoints = context.path(files::CHECKPOINTS);
    let mut begun = sound_checkpoints(&checkpoints, &fingerprint, &lora)?.peekable();
    if let Some((path, checkpoint)) = begun.peek()
        && checkpoint.state.engine != name
    {
        return Err(TrainError::OtherEngine {
            began: checkpoint.state.engine,
            now: name,
            path: path.clone(),
        });
    }
    let at_once = begun.peek().map(|(_, checkpoint)| checkpoint.state.at_once);

    let opening = Opening {
        dir: &transformer_dir,
        device,
        card,
        precision,
        base: base_weights_of(recipe.base_format),
    };
    let optimizer = LoraOptimizer::of(recipe, &lora);
    let engine = engine::open_training(name, &opening, lora.clone(), optimizer, {
        let [_, rows, columns] = data.latent_shape();
        workload(recipe, data.text_shape()[0], [rows, columns], at_once)
    })?;
    tracing::info!(engine = %name, "training");
    for note in engine.notes() {
        tracing::info!("{note}");
    }

    let mut trainer = Trainer::new(engine, recipe, lora.clone(), fingerprint.clone());
    let num_resumed = resume(&mut trainer, begun)?;
    let kept = Checkpoints {
        dir: &checkpoints,
        every: recipe.checkpoint_every,
        keep: recipe.keep_checkpoints as usize,
    };
    let job = context.progress.job("train", recipe.steps.into(), "steps");
    job.already_done(trainer.num_steps().into());
    take_steps(
        &mut trainer,
        &data,
        recipe.steps,
        &kept,
        &job,
        |num_steps| provenance(context, &data, &fingerprint, num_steps),
    )?;
    job.finish();

    let lora_path = context.path(files::LORA);
    let file = trainer
        .lora()?
        .to_file(provenance(context, &data, &fingerprint, recipe.steps));
    file.write(&lora_path)?;
    metrics::write(
        &context.path(files::METRICS),
        trainer.metrics(),
        &Footer::new(),
    )?;
    Ok(report(context, &trainer, &data, num_resumed)
        .output(outputs::LORA, digest_file(&lora_path)?))
}

fn open_data(context: &StageContext, config: &MmditConfig) -> Result<TrainingData, TrainError> {
    let recipe = &context.recipe.train;
    let vae_path = context.weights_dir(WeightPart::Vae).join("config.json");
    let vae = AutoencoderConfig::from_file(&vae_path)?;
    let token_channels = vae.latent_channels * PATCH_CELLS * PATCH_CELLS;
    if token_channels != config.in_channels || token_channels != config.velocity_channels() {
        return Err(TrainError::PartsDiffer {
            base: context.recipe.base.path.clone(),
            in_channels: config.in_channels,
            out_channels: config.velocity_channels(),
            latent_channels: token_channels,
        });
    }
    let scheduler_path = context
        .weights_dir(WeightPart::Scheduler)
        .join("scheduler_config.json");
    let vae_digest: Digest = context
        .weights_digest(WeightPart::Vae)
        .parse()
        .expect("the pipeline's digests are BLAKE3 in hexadecimal");
    let ingest = context.input(Stage::Ingest);
    let data_files = DataFiles {
        samples: ingest.path(files::SAMPLES),
        captions: ingest.path(files::CAPTIONS),
        embeddings: context.input(Stage::EmbedText).path(files::EMBEDDINGS),
        latents: context.input(Stage::CacheLatents).dir.clone(),
    };
    let sampling = Sampling {
        seed: recipe.seed,
        density: density(recipe),
        weighting: weighting(recipe),
        scheduler: Scheduler::new(SchedulerConfig::from_file(&scheduler_path)?),
        scaling: LatentScaling {
            shift: vae.shift_factor as f32,
            scale: vae.scaling_factor as f32,
        },
    };
    let t5_tokens = context.recipe.embed_text.t5_tokens;
    TrainingData::open(&data_files, config, t5_tokens, vae_digest, sampling)
}

/// The checkpoints of this run that can be read, newest first, each read when it is asked for.
fn sound_checkpoints(
    checkpoints: &Path,
    fingerprint: &str,
    lora: &TrainableLora,
) -> Result<impl Iterator<Item = (PathBuf, Checkpoint)>, TrainError> {
    let paths = checkpoint::list(checkpoints).map_err(TrainError::Checkpoints)?;
    Ok(paths.into_iter().filter_map(
        move |path| match Checkpoint::read(&path, fingerprint, lora) {
            Ok(checkpoint) => Some((path, checkpoint)),
            Err(error) => {
                tracing::warn!(checkpoint = %path.display(), %error, "checkpoint passed over");
                None
            }
        },
    ))
}

/// Continues from the first of them that fits, and says which step that was.
fn resume(
    trainer: &mut Trainer<'_>,
    checkpoints: impl Iterator<Item = (PathBuf, Checkpoint)>,
) -> Result<u32, TrainError> {
    for (path, checkpoint) in checkpoints {
        let shown = path.display();
        match trainer.restore(checkpoint) {
            Ok(()) => {
                tracing::info!(step = trainer.num_steps(), checkpoint = %shown, "continuing");
                return Ok(trainer.num_steps());
            }
            Err(ImportError::State(error)) => {
                tracing::warn!(checkpoint = %shown, %error, "checkpoint passed over");
            }
            Err(ImportError::Run(error)) => return Err(error.into()),
        }
    }
    Ok(0)
}

/// Where the LoRA comes from; nothing that depends on time or place, so that its bytes do not.
fn provenance(
    context: &StageContext,
    data: &TrainingData,
    fingerprint: &str,
    num_steps: u32,
) -> BTreeMap<String, String> {
    let entries = [
        ("fingerprint", fingerprint.to_owned()),
        ("recipe", context.recipe.name.clone()),
        (
            "base",
            context.weights_digest(WeightPart::Transformer).to_owned(),
        ),
        ("steps", num_steps.to_string()),
        ("seed", data.seed().to_string()),
        ("images", data.num_images().to_string()),
        ("captions", data.num_captions().to_string()),
    ];
    entries
        .into_iter()
        .map(|(key, value)| (format!("spritelora.{key}"), value))
        .collect()
}

fn report(
    context: &StageContext,
    trainer: &Trainer<'_>,
    data: &TrainingData,
    num_resumed: u32,
) -> StageReport {
    let metrics = trainer.metrics();
    let num_skipped = metrics.iter().filter(|row| row.skipped).count();
    let mut report = context
        .report()
        .count("steps", trainer.num_steps().into())
        .count("resumed_at_step", num_resumed.into())
        .count("skipped_steps", num_skipped as u64)
        .count("images", data.num_images() as u64)
        .count("captions", data.num_captions() as u64)
        .count("pairs", data.num_pairs() as u64);
    // Single losses are mostly the noise level that was drawn; a tenth of the run says more.
    let tenth = metrics.len().div_ceil(10);
    let mean = |rows: &[artifacts::MetricRow]| {
        rows.iter().map(|row| f64::from(row.loss)).sum::<f64>() / rows.len().max(1) as f64
    };
    if metrics.len() >= 2 {
        report = report.note(format!(
            "mean loss {:.4} over the first tenth of the steps, {:.4} over the last",
            mean(&metrics[..tenth]),
            mean(&metrics[metrics.len() - tenth..])
        ));
    }
    for note in trainer.notes() {
        report = report.note(note);
    }
    if num_resumed > 0 {
        report = report.note(format!(
            "continued from the checkpoint of step {num_resumed}"
        ));
    }
    report
}

fn density(recipe: &TrainRecipe) -> Density {
    match recipe.timestep_sampling {
        TimestepSampling::Uniform => Density::Uniform,
        TimestepSampling::LogitNormal => Density::LogitNormal {
            mean: recipe.logit_mean as f32,
            std: recipe.logit_std as f32,
        },
        TimestepSampling::Mode => Density::Mode {
            scale: recipe.mode_scale as f32,
        },
    }
}

fn weighting(recipe: &TrainRecipe) -> Weighting {
    match recipe.weighting {
        recipe::Weighting::SigmaSqrt => Weighting::SigmaSqrt,
        recipe::Weighting::Cosmap => Weighting::Cosmap,
        recipe::Weighting::None | recipe::Weighting::LogitNormal | recipe::Weighting::Mode => {
            Weighting::None
        }
    }
}
