//! The same run in one piece and in several.

use std::path::Path;

use engine::portable::PortableGradients;
use engine::{HostEngine, LoraOptimizer, MicroBatch};
use pipeline::files;
use pipeline::recipe::{BaseFormat, Optimizer, PrecisionChoice, Recipe};

use super::support::{World, recipe};
use crate::{Groups, TrainError, Trainer, checkpoint, run, untrained_lora};

fn lora_bytes(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join(files::LORA)).expect("the stage wrote it")
}

fn checkpoint_names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir.join(files::CHECKPOINTS))
        .expect("a directory")
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    names.sort();
    names
}

/// Runs in one directory, then again in another that holds what `damage` left of the first one's checkpoints.
fn runs_again(recipe: &Recipe, damage: impl Fn(&Path)) -> (Vec<u8>, Vec<u8>, u64) {
    let world = World::new(5);
    let whole = world.context("whole", recipe.clone());
    run(&whole).expect("a run");
    let again = world.context("again", recipe.clone());
    let checkpoints = again.dir.join(files::CHECKPOINTS);
    std::fs::create_dir_all(&checkpoints).expect("a directory");
    for name in checkpoint_names(&whole.dir) {
        let from = whole.dir.join(files::CHECKPOINTS).join(&name);
        std::fs::copy(from, checkpoints.join(name)).expect("copied");
    }
    damage(&checkpoints);
    let report = run(&again).expect("a run");
    (
        lora_bytes(&whole.dir),
        lora_bytes(&again.dir),
        report.counts["resumed_at_step"],
    )
}

#[test]
fn a_run_continued_from_a_checkpoint_ends_with_the_same_bytes() {
    for optimizer in [Optimizer::AdamW, Optimizer::AdamW8bit] {
        let mut recipe = recipe();
        recipe.train.optimizer = optimizer;
        let (whole, again, resumed_at) = runs_again(&recipe, |checkpoints| {
            std::fs::remove_file(checkpoints.join(checkpoint::file_name(6))).expect("removed");
        });
        assert_eq!(resumed_at, 4);
        assert!(whole == again, "{optimizer:?}");
    }
}

#[test]
fn a_torn_or_altered_checkpoint_is_passed_over() {
    let mut recipe = recipe();
    recipe.train.keep_checkpoints = 3;
    let (whole, again, resumed_at) = runs_again(&recipe, |checkpoints| {
        let newest = checkpoints.join(checkpoint::file_name(6));
        let bytes = std::fs::read(&newest).expect("readable");
        std::fs::write(&newest, &bytes[..bytes.len() / 2]).expect("torn");
        let second = checkpoints.join(checkpoint::file_name(4));
        let mut bytes = std::fs::read(&second).expect("readable");
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(&second, bytes).expect("altered");
    });
    assert_eq!(resumed_at, 2);
    assert!(whole == again);
}

#[test]
fn without_any_checkpoint_a_run_starts_from_the_beginning_and_ends_the_same() {
    let (whole, again, resumed_at) = runs_again(&recipe(), |checkpoints| {
        std::fs::remove_dir_all(checkpoints).expect("removed");
    });
    assert_eq!(resumed_at, 0);
    assert!(whole == again);
}

#[test]
fn a_checkpoint_of_another_run_is_passed_over() {
    let world = World::new(4);
    let context = world.context("train", recipe());
    run(&context).expect("a run");
    let mut other = world.context("train", recipe());
    other
        .components
        .insert("recipe.train.seed".to_owned(), "8".to_owned());
    let report = run(&other).expect("a run");
    assert_eq!(report.counts["resumed_at_step"], 0);
}

#[test]
fn a_run_goes_on_with_the_engine_that_began_it_and_no_other() {
    let world = World::new(4);
    for (engine, other) in [("cpu", "portable"), ("portable", "auto")] {
        let mut context = world.context(engine, recipe());
        context.options.engine = engine.to_owned();
        run(&context).expect("a run");
        context.options.engine = other.to_owned();
        let error = run(&context).expect_err("another engine");
        assert!(
            matches!(error, TrainError::OtherEngine { began, .. } if began.to_string() == engine),
            "{error}"
        );
        context.options.engine = engine.to_owned();
        assert_eq!(run(&context).expect("a run").counts["resumed_at_step"], 6);
    }
}

#[test]
fn engines_train_to_the_same_losses_within_rounding() {
    let world = World::new(4);
    let mut recipe = recipe();
    // Eight-bit states turn a difference in rounding into one of a code now and then.
    recipe.train.optimizer = Optimizer::AdamW;
    let losses = |engine: &str| -> Vec<f32> {
        let mut context = world.context(engine, recipe.clone());
        context.options.engine = engine.to_owned();
        run(&context).expect("a run");
        let rows = artifacts::metrics::read(&context.path(files::METRICS)).expect("readable");
        rows.iter().map(|row| row.loss).collect()
    };
    let (cpu, portable) = (losses("cpu"), losses("portable"));
    assert_eq!(cpu.len(), 6);
    for (cpu, portable) in cpu.iter().zip(&portable) {
        assert!((cpu - portable).abs() < 1e-3 * portable, "{cpu} {portable}");
    }
}

#[test]
fn the_newest_checkpoints_are_kept_and_every_lora() {
    let world = World::new(4);
    let context = world.context("train", recipe());
    run(&context).expect("a run");
    assert_eq!(
        checkpoint_names(&context.dir),
        [
            "lora-000002.safetensors",
            "lora-000004.safetensors",
            "lora-000006.safetensors",
            "step-000004.safetensors",
            "step-000006.safetensors"
        ]
    );
    let snapshot = context
        .dir
        .join(files::CHECKPOINTS)
        .join("lora-000006.safetensors");
    assert_eq!(
        std::fs::read(snapshot).expect("readable"),
        lora_bytes(&context.dir)
    );
    let metrics = artifacts::metrics::read(&context.path(files::METRICS)).expect("readable");
    assert_eq!(metrics.len(), 6);
    assert!(
        metrics
            .iter()
            .all(|row| row.loss.is_finite() && !row.skipped)
    );
}

#[test]
fn groups_made_ahead_are_those_asked_for_one_by_one() {
    let world = World::new(3);
    let (data, recipe) = (world.data(1), recipe().train);
    let groups = Groups::new(&data, &recipe, 1);
    let number = |group: Vec<MicroBatch>| -> Vec<u32> {
        let noise = group.iter().flat_map(|batch| &batch.noise);
        noise.map(|value| value.to_bits()).collect()
    };
    let one_by_one: Vec<_> = (5..9)
        .map(|index| number(groups.get(index).expect("it can be read")))
        .collect();
    // Whoever takes them may stop at any time: the thread that makes them ends with him.
    let ahead: Vec<_> = groups.ahead(5, |next| {
        (0..4)
            .map(|_| number(next().expect("it can be read")))
            .collect()
    });
    assert_eq!(ahead, one_by_one);
    assert_ne!(ahead[0], ahead[1]);
    let joined = Groups::new(&data, &recipe, recipe.accumulation as usize);
    let group = joined.get(5).expect("it can be read");
    assert_eq!(group.len(), 1);
    assert_eq!(number(group), one_by_one[0]);
    groups.ahead(0, |_| {});
}

#[test]
fn two_micro_batches_of_one_are_one_of_two() {
    let world = World::new(4);
    let (data, model) = (world.data(1), world.model());
    let train = |micro_batch, accumulation| {
        let mut recipe = recipe().train;
        recipe.optimizer = Optimizer::AdamW;
        (recipe.micro_batch, recipe.accumulation) = (micro_batch, accumulation);
        let lora = untrained_lora(model.config(), &recipe).expect("known targets");
        let gradients = Box::new(PortableGradients::new(model.clone()));
        let optimizer = LoraOptimizer::of(&recipe, &lora);
        let engine = Box::new(HostEngine::new(gradients, lora.clone(), optimizer));
        let mut trainer = Trainer::new(engine, &recipe, lora, String::new());
        let groups = trainer.groups(&data);
        (0..3)
            .map(|step| trainer.step(|| groups.get(step)).expect("a step"))
            .collect::<Vec<_>>()
    };
    for (one, other) in train(1, 2).iter().zip(train(2, 1)) {
        assert!(
            (one.loss - other.loss).abs() < 1e-4 * one.loss,
            "{one:?} {other:?}"
        );
        assert!(
            (one.grad_norm - other.grad_norm).abs() < 1e-3 * one.grad_norm,
            "{one:?} {other:?}"
        );
    }
}

#[test]
fn an_overflowing_loss_scale_costs_tries_and_no_optimiser_steps() {
    let mut recipe = recipe();
    recipe.train.precision = PrecisionChoice::Fp16;
    recipe.train.initial_loss_scale = 1e12;
    let world = World::new(4);
    let context = world.context("train", recipe);
    let report = run(&context).expect("a run");
    assert_eq!(report.counts["steps"], 6);
    let skipped = report.counts["skipped_steps"];
    assert!(skipped > 0, "a scale of 1e12 overflows half precision");
    let metrics = artifacts::metrics::read(&context.path(files::METRICS)).expect("readable");
    assert_eq!(metrics.len() as u64, 6 + skipped);
    assert_eq!(metrics[0].step, 1);
    assert_eq!(metrics[1].loss_scale, metrics[0].loss_scale / 2.0);
    assert_eq!(metrics.last().map(|row| row.step), Some(6));
}

#[test]
fn training_in_bf16_on_a_quantised_base_lowers_the_loss_of_one_image() {
    let mut recipe = recipe();
    recipe.train.precision = PrecisionChoice::Bf16;
    recipe.train.base_format = BaseFormat::Nf4DoubleQuant;
    recipe.train.steps = 40;
    recipe.train.checkpoint_every = 40;
    let world = World::new(1);
    let context = world.context("train", recipe);
    run(&context).expect("a run");
    let metrics = artifacts::metrics::read(&context.path(files::METRICS)).expect("readable");
    let mean = |rows: &[artifacts::MetricRow]| rows.iter().map(|r| r.loss).sum::<f32>() / 10.0;
    assert!(mean(&metrics[30..]) < mean(&metrics[..10]));
}
