//! Which stages must run again after which change, and that nothing half-done is ever taken for done.
//!
//! The stages here are stand-ins that hash files; what they leave has the same logical digests as the real ones.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use console::Progress;
use pipeline::{
    Begin, Failure, FailureKind, MANIFEST_FILE, Override, Pipeline, PipelineError, Recipe,
    RunOptions, Stage, StageContext, StageLock, StageReport, StageRun, StageState, Task,
    list_source, outputs, run_stage,
};

/// A workspace of three sprites with captions and a base, and what ran in it.
struct World {
    dir: tempfile::TempDir,
    data: PathBuf,
    overrides: Vec<Override>,
    ran: RefCell<Vec<Task>>,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let data = dir.path().join("data");
        for name in ["a", "b", "c"] {
            write(
                &data.join(format!("{name}.png")),
                &format!("pixels of {name}"),
            );
            write(
                &data.join(format!("{name}.txt")),
                &format!("caption of {name}"),
            );
        }
        for folder in [
            "text_encoder",
            "text_encoder_2",
            "tokenizer",
            "tokenizer_2",
            "vae",
            "transformer",
            "scheduler",
        ] {
            write(
                &dir.path().join("base").join(folder).join("config.json"),
                "{}",
            );
        }
        Self {
            dir,
            data,
            overrides: Vec::new(),
            ran: RefCell::new(Vec::new()),
        }
    }

    fn runs(&self) -> PathBuf {
        self.dir.path().join("runs")
    }

    fn set(&mut self, change: &str) {
        self.overrides.push(change.parse().expect("an override"));
    }

    fn recipe(&self) -> Recipe {
        let mut overrides = vec![
            Override::new(
                "base.path",
                self.dir.path().join("base").to_string_lossy().as_ref(),
            ),
            Override::new("ingest.source", self.data.to_string_lossy().as_ref()),
            Override::new("evaluate.held_out", ""),
        ];
        overrides.extend(self.overrides.iter().cloned());
        let demo = include_str!("../../../configs/demo.toml");
        Recipe::parse(demo, &self.dir.path().join("configs/demo.toml"), &overrides)
            .expect("a recipe")
    }

    fn look(&self) -> Pipeline {
        Pipeline::open(self.recipe(), &self.runs(), Progress::silent()).expect("opened")
    }

    fn state(&self, stage: Stage) -> StageState {
        self.look().state(stage).expect("a state")
    }

    fn reasons(&self, stage: Stage) -> String {
        self.state(stage).to_string()
    }

    fn run(&self, task: impl Into<Task>, force: bool) -> Result<(StageReport, bool), Failure> {
        run_stage(
            self.recipe(),
            &self.runs(),
            task,
            options(),
            Progress::silent(),
            force,
            |context| {
                self.ran.borrow_mut().push(context.report().task());
                stand_in(context)
            },
        )
    }

    /// Holds a sprite out that looks like none of the others.
    fn hold_out(&mut self) -> PathBuf {
        let held_out = self.dir.path().join("held-out");
        write(&held_out.join("d.png"), "pixels of d");
        write(&held_out.join("d.txt"), "caption of d");
        self.set(&format!("evaluate.held_out={}", held_out.display()));
        held_out
    }

    /// Runs all tasks; gives those that did any work.
    fn run_all_tasks(&self) -> Vec<String> {
        self.ran.borrow_mut().clear();
        for task in Task::all(&self.recipe()) {
            self.run(task, false).expect("runs");
        }
        self.ran.take().iter().map(ToString::to_string).collect()
    }

    /// The same of a recipe that holds nothing out.
    fn run_all(&self) -> Vec<Stage> {
        let names = self.run_all_tasks();
        names
            .iter()
            .map(|name| name.parse().expect("a stage"))
            .collect()
    }
}

fn options() -> RunOptions {
    RunOptions {
        device: "cpu".into(),
        engine: "auto".into(),
        threads: None,
        batch: None,
        json: false,
    }
}

fn write(path: &Path, text: &str) {
    fs_err::create_dir_all(path.parent().expect("has a parent")).expect("created");
    fs_err::write(path, text).expect("written");
}

fn hash(texts: impl IntoIterator<Item = String>) -> String {
    let sorted: BTreeSet<String> = texts.into_iter().collect();
    let joined: Vec<String> = sorted.into_iter().collect();
    blake3::hash(joined.join("\n").as_bytes())
        .to_hex()
        .to_string()
}

/// Does what the real stage does as far as logical digests go.
fn stand_in(context: &StageContext) -> Result<StageReport, Failure> {
    write(&context.path("out.txt"), context.stage.name());
    let inputs = || {
        context
            .inputs
            .values()
            .flat_map(|input| input.manifest.outputs.values().cloned())
    };
    let own = || context.components.values().cloned();
    let report = context.report().count("done", 1);
    Ok(match context.stage {
        Stage::Ingest => {
            let files: BTreeMap<String, String> = list_source(&context.recipe.ingest.source)
                .expect("listed")
                .into_iter()
                .map(|file| (file.name, fs_err::read_to_string(file.path).expect("read")))
                .collect();
            let of = |extension: &str| -> Vec<(String, String)> {
                files
                    .iter()
                    .filter_map(|(name, text)| {
                        Some((name.strip_suffix(extension)?.to_owned(), text.clone()))
                    })
                    .collect()
            };
            let captions: BTreeMap<_, _> = of(".txt").into_iter().collect();
            let samples = of(".png");
            let pairs = samples
                .iter()
                .map(|(name, pixels)| format!("{pixels} {}", captions[name]));
            report
                .output(
                    outputs::SAMPLES,
                    hash(samples.iter().map(|(_, pixels)| pixels.clone())),
                )
                .output(outputs::CAPTIONS, hash(captions.values().cloned()))
                .output(
                    outputs::COMPAT_HASHES,
                    hash(samples.iter().map(|(_, pixels)| pixels.clone())),
                )
                .output(outputs::PAIRS, hash(pairs))
        }
        Stage::EmbedText => {
            let captions = context
                .input(Stage::Ingest)
                .output(outputs::CAPTIONS)
                .expect("promised");
            report.output(
                outputs::EMBEDDINGS,
                hash(own().chain([captions.to_owned()])),
            )
        }
        Stage::CacheLatents => {
            let samples = context
                .input(Stage::Ingest)
                .output(outputs::SAMPLES)
                .expect("promised");
            report.output(outputs::LATENTS, hash(own().chain([samples.to_owned()])))
        }
        Stage::Train => report.output(outputs::LORA, hash(own().chain(inputs()))),
        Stage::Sample => report.output(outputs::IMAGES, hash(own())),
        Stage::Evaluate => report.output(outputs::REPORT, hash(own().chain(inputs()))),
    })
}

use Stage::{CacheLatents, EmbedText, Evaluate, Ingest, Sample, Train};

#[test]
fn a_second_run_does_nothing() {
    let world = World::new();
    assert_eq!(world.run_all(), Stage::ALL);
    assert_eq!(world.run_all(), []);
    for stage in Stage::ALL {
        assert!(world.state(stage).is_fresh(), "{stage}");
    }
}

#[test]
fn before_the_first_run_only_ingest_can_be_told() {
    let world = World::new();
    assert_eq!(world.reasons(Ingest), "Dirty: no earlier run");
    for stage in [EmbedText, CacheLatents, Train, Sample, Evaluate] {
        assert_eq!(
            world.state(stage),
            StageState::Blocked {
                upstream: Ingest.into()
            }
        );
    }
}

#[test]
fn touching_a_file_redoes_nothing() {
    let world = World::new();
    world.run_all();
    let file = fs_err::OpenOptions::new()
        .write(true)
        .open(world.data.join("a.png"))
        .expect("opened");
    file.file()
        .set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(60))
        .expect("touched");
    assert_eq!(world.run_all(), []);
}

#[test]
fn renaming_the_data_folder_redoes_nothing() {
    let mut world = World::new();
    world.run_all();
    let renamed = world.dir.path().join("characters");
    fs_err::rename(&world.data, &renamed).expect("renamed");
    world.data = renamed;
    assert_eq!(world.run_all(), []);
}

#[test]
fn renaming_one_file_redoes_ingest_only() {
    let world = World::new();
    world.run_all();
    for extension in ["png", "txt"] {
        let at = |name: &str| world.data.join(format!("{name}.{extension}"));
        fs_err::rename(at("a"), at("z")).expect("renamed");
    }
    assert_eq!(
        world.reasons(Ingest),
        "Dirty: data file a.png is gone; data file a.txt is gone; data file z.png is new; data file z.txt is new"
    );
    assert_eq!(world.run_all(), [Ingest]);
}

#[test]
fn editing_one_pixel_redoes_all_but_the_text() {
    let world = World::new();
    world.run_all();
    write(&world.data.join("a.png"), "pixels of A");
    assert_eq!(world.reasons(Ingest), "Dirty: data file a.png changed");
    assert_eq!(
        world.run_all(),
        [Ingest, CacheLatents, Train, Sample, Evaluate]
    );
    assert_eq!(world.run_all(), []);
}

#[test]
fn editing_one_caption_redoes_all_but_the_latents() {
    let world = World::new();
    world.run_all();
    write(&world.data.join("a.txt"), "another caption of a");
    assert_eq!(world.reasons(Ingest), "Dirty: data file a.txt changed");
    world.run(Ingest, false).expect("runs");
    assert!(
        world
            .reasons(EmbedText)
            .starts_with("Dirty: captions changed: ")
    );
    assert!(world.state(CacheLatents).is_fresh());
    assert_eq!(world.run_all(), [EmbedText, Train, Sample, Evaluate]);
}

#[test]
fn swapping_two_captions_redoes_training_only() {
    let world = World::new();
    world.run_all();
    write(&world.data.join("a.txt"), "caption of b");
    write(&world.data.join("b.txt"), "caption of a");
    assert_eq!(world.run_all(), [Ingest, Train, Sample, Evaluate]);
}

#[test]
fn changing_one_training_number_redoes_training_and_drawing() {
    let mut world = World::new();
    world.run_all();
    world.set("train.learning_rate=2e-3");
    assert_eq!(
        world.reasons(Train),
        "Dirty: train.learning_rate changed: 0.0015 -> 0.002"
    );
    assert_eq!(world.run_all(), [Train, Sample, Evaluate]);
    // Back again: the earlier artifacts are still good.
    world.overrides.clear();
    assert_eq!(world.run_all(), []);
}

#[test]
fn changing_the_vae_redoes_latents_and_what_follows() {
    let world = World::new();
    world.run_all();
    write(&world.dir.path().join("base/vae/config.json"), "{ }");
    assert!(
        world
            .reasons(CacheLatents)
            .starts_with("Dirty: base's vae changed: ")
    );
    assert_eq!(world.run_all(), [CacheLatents, Train, Sample, Evaluate]);
}

#[test]
fn a_prompts_file_counts_by_its_content() {
    let mut world = World::new();
    let prompts = world.dir.path().join("p.txt");
    write(&prompts, "a knight");
    world.set(&format!("sample.prompts_file={}", prompts.display()));
    world.run_all();
    write(&prompts, "a wizard");
    assert!(
        world
            .reasons(Sample)
            .starts_with("Dirty: content of sample.prompts_file changed: ")
    );
    assert_eq!(world.run_all(), [Sample, Evaluate]);
}

#[test]
fn without_the_trained_lora_drawing_waits_for_nothing() {
    let mut world = World::new();
    world.set("sample.use_trained_lora=false");
    world.set("sample.compare_with_base=false");
    let (_, ran) = world.run(Sample, false).expect("runs");
    assert!(ran);
}

#[test]
fn device_threads_and_batch_decide_nothing() {
    let world = World::new();
    world.run_all();
    let other = RunOptions {
        device: "cuda:1".into(),
        engine: "portable".into(),
        threads: Some(3),
        batch: Some(8),
        json: true,
    };
    let begun = StageRun::begin(world.look(), Train, other, false).expect("begins");
    assert!(matches!(begun, Begin::Fresh(_)));
}

#[test]
fn an_interrupted_run_is_never_read() {
    let world = World::new();
    world.run_all();
    let StageState::Fresh(artifact) = world.state(Train) else {
        panic!("train is fresh");
    };
    fs_err::remove_file(artifact.path(MANIFEST_FILE)).expect("unsealed");
    assert!(
        world
            .reasons(Train)
            .contains("interrupted run (no seal in ")
    );
    assert_eq!(
        world.state(Sample),
        StageState::Blocked {
            upstream: Train.into()
        }
    );
    assert_eq!(world.run_all(), [Train]);
}

#[test]
fn a_training_run_continues_in_its_directory_and_ingest_starts_anew() {
    let world = World::new();
    for (stage, kept) in [
        (Ingest, false),
        (EmbedText, true),
        (CacheLatents, true),
        (Train, true),
    ] {
        let Begin::Run(run) =
            StageRun::begin(world.look(), stage, options(), false).expect("begins")
        else {
            panic!("{stage} must run");
        };
        let dir = run.context().dir.clone();
        write(&dir.join("step-20"), "state");
        write(&dir.join(".tmp123"), "half a file");
        drop(run); // killed
        let Begin::Run(run) =
            StageRun::begin(world.look(), stage, options(), false).expect("begins")
        else {
            panic!("{stage} must run");
        };
        assert_eq!(run.context().dir, dir);
        assert_eq!(dir.join("step-20").exists(), kept, "{stage}");
        assert!(!dir.join(".tmp123").exists(), "{stage}");
        let report = stand_in(run.context()).expect("works");
        run.finish(report).expect("seals");
    }
}

#[test]
fn a_damaged_artifact_is_made_again() {
    let world = World::new();
    world.run_all();
    let StageState::Fresh(artifact) = world.state(CacheLatents) else {
        panic!("cache-latents is fresh");
    };
    fs_err::remove_file(artifact.path("out.txt")).expect("removed");
    assert!(world.reasons(CacheLatents).ends_with("out.txt is gone"));
    assert_eq!(world.run_all(), [CacheLatents]);
    write(&artifact.path(MANIFEST_FILE), "{ half a seal");
    assert!(
        world
            .reasons(CacheLatents)
            .contains("manifest.json cannot be read")
    );
    assert_eq!(world.run_all(), [CacheLatents]);
}

#[test]
fn a_damaged_training_run_keeps_its_checkpoints_and_nothing_else() {
    let world = World::new();
    world.run_all();
    for (stage, kept) in [(Train, true), (EmbedText, false), (CacheLatents, false)] {
        let StageState::Fresh(artifact) = world.state(stage) else {
            panic!("{stage} is fresh");
        };
        let checkpoints = artifact.path(pipeline::files::CHECKPOINTS);
        write(&checkpoints.join("step-20"), "state");
        write(&checkpoints.join(".tmp123"), "half a file");
        write(&artifact.path("lora/other"), "a file of the damaged run");
        fs_err::remove_file(artifact.path("out.txt")).expect("removed");
        let Begin::Run(run) =
            StageRun::begin(world.look(), stage, options(), false).expect("begins")
        else {
            panic!("{stage} must run");
        };
        assert_eq!(run.context().dir, artifact.dir);
        assert_eq!(checkpoints.join("step-20").exists(), kept, "{stage}");
        let left: Vec<_> = fs_err::read_dir(&artifact.dir)
            .expect("listed")
            .map(|entry| entry.expect("listed").path())
            .collect();
        assert_eq!(
            left,
            if kept {
                vec![checkpoints.clone()]
            } else {
                vec![]
            }
        );
        assert!(!checkpoints.join(".tmp123").exists());
        let report = stand_in(run.context()).expect("works");
        run.finish(report).expect("seals");
    }
}

#[test]
fn checkpoints_may_be_deleted_from_a_sealed_artifact() {
    let world = World::new();
    for stage in [Ingest, EmbedText, CacheLatents] {
        world.run(stage, false).expect("runs");
    }
    let Begin::Run(run) = StageRun::begin(world.look(), Train, options(), false).expect("begins")
    else {
        panic!("train must run");
    };
    let checkpoints = run.context().path(pipeline::files::CHECKPOINTS);
    write(&checkpoints.join("step-20/state"), "state");
    let report = stand_in(run.context()).expect("works");
    run.finish(report).expect("seals");
    fs_err::remove_dir_all(checkpoints).expect("removed");
    assert!(world.state(Train).is_fresh());
}

#[test]
fn a_forced_run_keeps_the_old_artifact_until_it_is_done() {
    let world = World::new();
    world.run_all();
    let failed = run_stage(
        world.recipe(),
        &world.runs(),
        Ingest,
        options(),
        Progress::silent(),
        true,
        |context| {
            write(&context.path("half.txt"), "half");
            Err(Failure::bad_input("an image is broken"))
        },
    );
    assert_eq!(failed.expect_err("fails").kind(), FailureKind::BadInput);
    assert!(world.state(Ingest).is_fresh());
    let (report, ran) = world.run(Ingest, true).expect("runs");
    assert!(ran);
    assert!(report.dir.join(MANIFEST_FILE).is_file());
    let left: Vec<_> = fs_err::read_dir(world.runs().join("ingest"))
        .expect("listed")
        .map(|entry| entry.expect("listed").file_name())
        .filter(|name| name != ".lock")
        .collect();
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(world.run_all(), []);
}

/// A copy of a sealed artifact beside it, told apart by other text of the same length.
fn copy_beside(artifact: &Path, what: &str, text: &str) -> PathBuf {
    let name = artifact.file_name().expect("a name").to_string_lossy();
    let copy = artifact.with_file_name(format!(".{name}.{what}"));
    fs_err::create_dir_all(&copy).expect("created");
    for entry in fs_err::read_dir(artifact).expect("listed") {
        let entry = entry.expect("listed");
        fs_err::copy(entry.path(), copy.join(entry.file_name())).expect("copied");
    }
    write(&copy.join("out.txt"), text);
    copy
}

#[test]
fn a_forced_run_killed_between_its_two_renames_is_completed_by_the_next_run() {
    for force in [false, true] {
        let world = World::new();
        world.run_all();
        let StageState::Fresh(artifact) = world.state(Ingest) else {
            panic!("ingest is fresh");
        };
        let old = copy_beside(&artifact.dir, "replaced", "ingest");
        let new = copy_beside(&artifact.dir, "forced", "INGEST");
        fs_err::remove_dir_all(&artifact.dir).expect("removed");
        assert!(!world.state(Ingest).is_fresh());

        let (_, ran) = world.run(Ingest, force).expect("runs");
        assert_eq!(ran, force);
        let text = fs_err::read_to_string(artifact.path("out.txt")).expect("there");
        assert_eq!(text, if force { "ingest" } else { "INGEST" });
        assert!(!old.exists() && !new.exists());
        assert_eq!(world.run_all(), []);
    }
}

#[test]
fn an_artifact_that_was_moved_aside_is_put_back_if_the_new_one_is_not_whole() {
    let world = World::new();
    world.run_all();
    let StageState::Fresh(artifact) = world.state(Ingest) else {
        panic!("ingest is fresh");
    };
    copy_beside(&artifact.dir, "replaced", "Ingest");
    let half = copy_beside(&artifact.dir, "forced", "INGEST");
    fs_err::remove_file(half.join(MANIFEST_FILE)).expect("unsealed");
    fs_err::remove_dir_all(&artifact.dir).expect("removed");
    let (_, ran) = world.run(Ingest, false).expect("runs");
    assert!(!ran);
    let text = fs_err::read_to_string(artifact.path("out.txt")).expect("there");
    assert_eq!(text, "Ingest");
}

#[test]
fn a_forced_run_is_offered_no_earlier_rows() {
    let world = World::new();
    world.run_all();
    let offered = |force: bool| {
        let Begin::Run(run) =
            StageRun::begin(world.look(), EmbedText, options(), force).expect("begins")
        else {
            panic!("embed-text must run");
        };
        let context = run.context();
        let found = (
            context.earlier_artifacts().len(),
            context.reusable_artifacts().len(),
        );
        run.abandon();
        found
    };
    assert_eq!(offered(true), (0, 0));
    write(&world.data.join("a.txt"), "another caption of a");
    world.run(Ingest, false).expect("runs");
    assert_eq!(offered(false), (1, 1));
}

#[test]
fn a_failed_run_leaves_no_artifact_and_no_directory() {
    let world = World::new();
    let failed = run_stage(
        world.recipe(),
        &world.runs(),
        Ingest,
        options(),
        Progress::silent(),
        false,
        |_| Err(Failure::bad_input("an image is broken")),
    );
    assert!(failed.is_err());
    assert_eq!(world.reasons(Ingest), "Dirty: no earlier run");
}

#[test]
fn a_run_without_a_promised_output_is_not_sealed() {
    let world = World::new();
    let failed = run_stage(
        world.recipe(),
        &world.runs(),
        Ingest,
        options(),
        Progress::silent(),
        false,
        |context| Ok::<_, Failure>(context.report().output(outputs::SAMPLES, "1")),
    );
    let failure = failed.expect_err("fails");
    assert_eq!(failure.kind(), FailureKind::Failed);
    assert!(failure.to_string().contains("\"captions\""), "{failure}");
    assert!(!world.state(Ingest).is_fresh());
}

#[test]
fn data_that_changes_while_it_is_read_is_not_sealed() {
    let world = World::new();
    let failed = run_stage(
        world.recipe(),
        &world.runs(),
        Ingest,
        options(),
        Progress::silent(),
        false,
        |context| {
            let report = stand_in(context);
            write(&world.data.join("b.png"), "pixels that came late");
            report
        },
    );
    let message = failed.expect_err("fails").to_string();
    assert_eq!(
        message,
        "the data changed while ingest read it (data file b.png changed)"
    );
}

#[test]
fn two_runs_of_one_stage_refuse_each_other() {
    let world = World::new();
    let lock = StageLock::acquire(Ingest, &world.runs()).expect("free");
    let failure = world.run(Ingest, false).expect_err("locked");
    assert!(
        failure
            .to_string()
            .starts_with("another process is running ingest"),
        "{failure}"
    );
    drop(lock);
    world.run(Ingest, false).expect("free again");
}

#[test]
fn a_stage_whose_input_is_not_fresh_is_refused_with_the_reason() {
    let world = World::new();
    let failure = world.run(Train, false).expect_err("blocked");
    assert_eq!(failure.kind(), FailureKind::BadInput);
    assert_eq!(
        failure.to_string(),
        "train cannot run: ingest is not fresh (Dirty: no earlier run)"
    );
}

#[test]
fn rows_are_reused_only_from_runs_of_the_same_encoder_and_recipe() {
    let mut world = World::new();
    world.run_all();
    write(&world.data.join("a.txt"), "another caption of a");
    world.run(Ingest, false).expect("runs");
    let reusable = |world: &World| {
        let Begin::Run(run) =
            StageRun::begin(world.look(), EmbedText, options(), false).expect("begins")
        else {
            panic!("embed-text must run");
        };
        let found = run.context().reusable_artifacts().len();
        run.abandon();
        found
    };
    assert_eq!(reusable(&world), 1);
    world.set("embed_text.t5_tokens=80");
    assert_eq!(reusable(&world), 0);
}

#[test]
fn an_empty_data_folder_and_a_missing_base_are_bad_input() {
    let mut world = World::new();
    let source = world.data.clone();
    world.data = world.dir.path().join("empty");
    fs_err::create_dir_all(&world.data).expect("created");
    let error = world.look().state(Ingest).expect_err("empty");
    assert!(matches!(error, PipelineError::EmptySource { .. }));
    world.data = source;
    world.run(Ingest, false).expect("needs no base");
    fs_err::remove_dir_all(world.dir.path().join("base/vae")).expect("removed");
    let error = world.look().state(CacheLatents).expect_err("no VAE");
    assert!(matches!(
        error,
        PipelineError::NoBasePart { folder: "vae", .. }
    ));
}

#[test]
fn a_size_that_does_not_fit_the_autoencoder_is_refused() {
    let mut world = World::new();
    world.run(Ingest, false).expect("runs");
    write(
        &world.dir.path().join("base/vae/config.json"),
        "{\"block_out_channels\": [8, 8, 8, 8]}",
    );
    world.set("cache_latents.resolution_px=72");
    let error = world
        .look()
        .state(CacheLatents)
        .expect_err("72 is no multiple of 16");
    assert!(
        error
            .to_string()
            .contains("is 72, which is no multiple of 16"),
        "{error}"
    );
}

#[test]
fn a_runs_path_that_is_a_file_is_bad_input() {
    let world = World::new();
    write(&world.runs(), "a file");
    let failure = world.run(Ingest, false).expect_err("not writable");
    assert_eq!(failure.kind(), FailureKind::BadInput);
}

#[test]
fn held_out_pictures_go_through_the_same_stages_before_the_training() {
    let mut world = World::new();
    world.hold_out();
    assert_eq!(
        world.run_all_tasks(),
        [
            "ingest",
            "embed-text",
            "cache-latents",
            "ingest (held-out)",
            "embed-text (held-out)",
            "cache-latents (held-out)",
            "train",
            "sample",
            "evaluate"
        ]
    );
    assert_eq!(world.run_all_tasks(), Vec::<String>::new());
    let state = world.look().state(Task::held_out(Ingest)).expect("a state");
    assert!(state.is_fresh(), "{state}");
}

#[test]
fn a_change_among_held_out_pictures_trains_and_draws_nothing() {
    let mut world = World::new();
    let held_out = world.hold_out();
    world.run_all_tasks();
    write(&held_out.join("d.png"), "pixels of D");
    let reason = |task: Task| world.look().state(task).expect("a state").to_string();
    assert_eq!(
        reason(Task::held_out(Ingest)),
        "Dirty: data file d.png changed"
    );
    assert_eq!(
        reason(Evaluate.into()),
        "Blocked: waits for ingest (held-out)"
    );
    assert_eq!(
        world.run_all_tasks(),
        ["ingest (held-out)", "cache-latents (held-out)", "evaluate"]
    );
}

#[test]
fn the_first_look_at_held_out_pictures_is_not_compared_with_the_training_set() {
    let mut world = World::new();
    world.run_all();
    world.hold_out();
    let mut look = world.look();
    let state = look.state(Task::held_out(Ingest)).expect("a state");
    assert_eq!(state.to_string(), "Dirty: no earlier run");
    for stage in [Ingest, EmbedText, CacheLatents] {
        world.run(Task::held_out(stage), false).expect("runs");
    }
    let reasons = world.reasons(Evaluate);
    assert!(
        reasons.contains("held_out.pairs changed: none -> "),
        "{reasons}"
    );
}

#[test]
fn held_out_pictures_that_do_not_exist_are_named_by_their_own_key() {
    let mut world = World::new();
    world.set("evaluate.held_out=/nowhere");
    let error = world
        .look()
        .state(Task::held_out(Ingest))
        .expect_err("there is nothing");
    assert_eq!(
        error.to_string(),
        "evaluate.held_out is /nowhere, which does not exist"
    );
    world.run(Ingest, false).expect("needs nothing held out");
}

#[test]
fn evaluating_without_held_out_pictures_waits_for_the_drawing_alone() {
    let mut world = World::new();
    world.set("sample.use_trained_lora=false");
    world.set("sample.compare_with_base=false");
    world.run(Sample, false).expect("runs");
    let (_, ran) = world.run(Evaluate, false).expect("runs");
    assert!(ran);
}

#[test]
fn the_held_out_set_is_prepared_along_with_the_evaluation() {
    let mut world = World::new();
    world.hold_out();
    let recipe = world.recipe();
    let names = |stages: &[Stage]| -> Vec<String> {
        let tasks = Task::of_stages(stages, &recipe);
        tasks.iter().map(ToString::to_string).collect()
    };
    assert_eq!(names(&[Ingest, EmbedText]), ["ingest", "embed-text"]);
    assert_eq!(
        names(&[Evaluate]),
        [
            "ingest (held-out)",
            "embed-text (held-out)",
            "cache-latents (held-out)",
            "evaluate"
        ]
    );
    assert_eq!(names(&Stage::ALL).len(), 9);
}
