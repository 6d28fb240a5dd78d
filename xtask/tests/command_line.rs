//! `cargo xtask` as a person or a script meets it: words, JSON, exit codes. `spritelora` is a stand-in here.

#![cfg(unix)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard};

use console::Progress;
use pipeline::{Failure, Override, Recipe, RunOptions, Stage, Task, run_stage};

/// Held while an executable is written or a process is started: a process that is forked while another thread writes an
/// executable inherits the open file, and then the executable is "busy".
static NO_FORK_WHILE_WRITING: Mutex<()> = Mutex::new(());

fn no_fork_while_writing() -> MutexGuard<'static, ()> {
    NO_FORK_WHILE_WRITING
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A workspace with one sprite, a base and a recipe, and a copy of `xtask` outside cargo.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let world = Self {
            dir: tempfile::tempdir().expect("temporary directory"),
        };
        world.write("configs/demo.toml", include_str!("../../configs/demo.toml"));
        world.write("data/characters/a.png", "pixels");
        world.write("data/characters-held-out/b.png", "other pixels");
        world.write(
            "data/base/model_index.json",
            "{\"_spritelora_untrained\": true}",
        );
        for folder in [
            "text_encoder",
            "text_encoder_2",
            "tokenizer",
            "tokenizer_2",
            "vae",
            "transformer",
            "scheduler",
        ] {
            world.write(&format!("data/base/{folder}/config.json"), "{}");
        }
        let _guard = no_fork_while_writing();
        fs_err::copy(env!("CARGO_BIN_EXE_xtask"), world.path("xtask")).expect("copied");
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs_err::create_dir_all(path.parent().expect("has a parent")).expect("created");
        fs_err::write(path, text).expect("written");
    }

    /// Puts a shell script where `spritelora` is looked for.
    fn spritelora_is(&self, script: &str) {
        use std::os::unix::fs::PermissionsExt;
        let _guard = no_fork_while_writing();
        self.write("spritelora", &format!("#!/bin/sh\n{script}\n"));
        fs_err::set_permissions(
            self.path("spritelora"),
            std::fs::Permissions::from_mode(0o755),
        )
        .expect("executable");
    }

    /// Seals all tasks' artifacts with invented results.
    fn run_all_stages(&self, overrides: &[Override]) {
        let recipe = Recipe::load(&self.path("configs/demo.toml"), overrides).expect("a recipe");
        for task in Task::all(&recipe) {
            let options = RunOptions {
                device: "cpu".into(),
                engine: "auto".into(),
                threads: None,
                batch: None,
                json: false,
            };
            let work = |context: &pipeline::StageContext| {
                for (name, text) in [
                    (pipeline::files::SHEET, "a sheet"),
                    (pipeline::files::REPORT, "{\"report_version\": 1}"),
                    (pipeline::files::REPORT_TEXT, "# Evaluation"),
                ] {
                    fs_err::write(context.path(name), text).expect("written");
                }
                let promised = context.stage.promised_outputs().iter();
                Ok::<_, Failure>(
                    promised.fold(context.report(), |report, name| report.output(name, name)),
                )
            };
            run_stage(
                recipe.clone(),
                &self.path("runs"),
                task,
                options,
                Progress::silent(),
                false,
                work,
            )
            .expect("runs");
        }
    }

    /// Runs the copy of `xtask` in the workspace, as on a machine without cargo.
    fn xtask(&self, arguments: &[&str]) -> Output {
        self.xtask_with_path(arguments, None)
    }

    fn xtask_with_path(&self, arguments: &[&str], path: Option<&str>) -> Output {
        let mut command = Command::new(self.path("xtask"));
        command
            .args(arguments)
            .current_dir(self.dir.path())
            .env_remove("CARGO")
            .env_remove("CARGO_MANIFEST_DIR")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if let Some(path) = path {
            command.env("PATH", path);
        }
        let child = {
            let _guard = no_fork_while_writing();
            command.spawn().expect("starts")
        };
        child.wait_with_output().expect("ends")
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).expect("stdout holds one JSON document and nothing else")
}

#[test]
fn a_second_run_says_fresh_of_each_task_and_starts_nothing() {
    let world = World::new();
    world.run_all_stages(&[]);
    let started = std::time::Instant::now();
    let output = world.xtask(&["run"]);
    assert!(started.elapsed().as_secs_f64() < 2.0);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    for stage in Stage::ALL {
        assert!(
            text.contains(&format!("{stage}: Fresh (runs/{stage}/")),
            "{text}"
        );
    }
    assert_eq!(text.matches(": Fresh (").count(), 9, "{text}");
    assert!(
        text.contains("ingest (held-out): Fresh (runs/ingest/"),
        "{text}"
    );
    assert!(text.contains("contact sheet: runs/sample/"), "{text}");
    assert!(text.contains("report: runs/evaluate/"), "{text}");
    assert!(text.contains("these pictures are noise"), "{text}");
}

#[test]
fn json_is_one_document_and_nothing_else() {
    let world = World::new();
    world.run_all_stages(&[]);
    let document = json(&world.xtask(&["run", "--json"]));
    let stages = &document["stages"];
    assert_eq!(stages[3]["stage"], "ingest");
    assert_eq!(stages[3]["held_out"], true);
    assert_eq!(stages[6]["stage"], "train");
    assert_eq!(stages[6]["held_out"], false);
    assert_eq!(stages[6]["state"], "fresh");
    assert_eq!(stages[6]["ran"], false);
    assert_eq!(document["evaluation"]["report_version"], 1);
    assert_eq!(document["pictures_are_noise"], true);
    assert!(Path::new(document["sheet"].as_str().expect("a path")).is_file());
}

#[test]
fn status_says_why_each_stage_is_dirty() {
    let world = World::new();
    world.run_all_stages(&[]);
    let output = world.xtask(&["status", "--set", "train.learning_rate=2e-3"]);
    assert_eq!(output.status.code(), Some(0));
    let text = stdout(&output);
    assert!(
        text.contains("cache-latents: Fresh (runs/cache-latents/"),
        "{text}"
    );
    assert!(
        text.contains("train: Dirty: train.learning_rate changed: 0.0015 -> 0.002\n"),
        "{text}"
    );
    assert!(
        text.contains("sample: Blocked: waits for train\n"),
        "{text}"
    );
    let document = json(&world.xtask(&["status", "--json", "--set", "train.learning_rate=2e-3"]));
    let reason = &document["stages"][6]["reasons"][0]["detail"];
    assert_eq!(reason["key"], "train.learning_rate");
    assert_eq!(
        (&reason["old"], &reason["new"]),
        (&"0.0015".into(), &"0.002".into())
    );
}

#[test]
fn wrong_usage_and_bad_recipes_exit_with_2() {
    let world = World::new();
    world.write(
        "configs/unknown.toml",
        &include_str!("../../configs/demo.toml").replace("[train]", "[train]\nlerning_rate = 1.0"),
    );
    for (arguments, said) in [
        (vec!["trian"], "trian"),
        (vec!["run", "--device", "gpu"], "auto, cpu, cuda"),
        (vec!["run", "--recipe", "nowhere.toml"], "nowhere.toml"),
        (
            vec!["run", "--recipe", "configs/unknown.toml"],
            "lerning_rate",
        ),
        (
            vec!["run", "--set", "train.step=3"],
            "did you mean train.steps?",
        ),
        (
            vec!["sample", "--negative-prompt", "blurry", "--true-cfg", "1"],
            "true_cfg_scale",
        ),
        (vec!["train"], "train cannot run: ingest is not fresh"),
        (
            vec!["ingest", "--set", "ingest.source=nowhere"],
            "nowhere, which does not exist",
        ),
    ] {
        let output = world.xtask(&arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(
            stderr(&output).contains(said),
            "{arguments:?}: {}",
            stderr(&output)
        );
        assert!(
            !world.path("runs/ingest").exists(),
            "{arguments:?} wrote an artifact"
        );
    }
}

#[test]
fn a_failure_is_json_too_when_json_is_asked_for() {
    let world = World::new();
    let output = world.xtask(&["train", "--json"]);
    assert_eq!(output.status.code(), Some(2));
    let document = json(&output);
    assert_eq!(document["error"]["exit_code"], 2);
    assert!(
        document["error"]["help"]
            .as_str()
            .expect("advice")
            .contains("cargo xtask ingest")
    );
}

#[test]
fn the_stages_exit_code_and_error_are_passed_on() {
    let world = World::new();
    world.spritelora_is("echo '{\"error\": {\"messages\": [\"a.png is broken\"]}}'; exit 2");
    let output = world.xtask(&["ingest", "--json"]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(json(&output)["error"]["messages"][0], "a.png is broken");
    world.spritelora_is("exit 1");
    let output = world.xtask(&["run"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(stdout(&output), "ingest: Dirty: no earlier run\n");
}

#[test]
fn a_killed_stage_is_told_and_exits_with_1() {
    let world = World::new();
    world.spritelora_is("kill -9 $$");
    let output = world.xtask(&["run"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("spritelora ingest was ended by signal: 9"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_stage_is_started_with_recipe_runs_and_changes() {
    let world = World::new();
    world.spritelora_is("for argument; do echo \"<$argument>\" >&2; done; exit 1");
    let output = world.xtask(&[
        "ingest",
        "--set",
        "name=x",
        "--batch=4",
        "--threads",
        "2",
        "--device=cpu",
        "--force",
    ]);
    let runs = world.path("runs");
    let expected = [
        "ingest",
        "--recipe",
        "./configs/demo.toml",
        "--runs",
        runs.to_str().expect("UTF-8"),
        "--device",
        "cpu",
        "--engine",
        "auto",
        "--set",
        "name=\"x\"",
        "--threads",
        "2",
        "--batch",
        "4",
        "--force",
    ];
    let lines: Vec<String> = expected
        .iter()
        .map(|argument| format!("<{argument}>"))
        .collect();
    assert_eq!(stderr(&output).trim(), lines.join("\n"));
}

#[test]
fn held_out_pictures_are_prepared_by_the_same_subcommand_with_an_option() {
    let world = World::new();
    world.spritelora_is("echo \"$1 ${12} $#\" >&2; exit 1");
    let output = world.xtask(&["evaluate", "--set", "name=x", "--device=cpu"]);
    assert_eq!(
        stdout(&output),
        "ingest (held-out): Dirty: no earlier run\n"
    );
    assert_eq!(stderr(&output).trim(), "ingest --held-out 12");
}

#[test]
fn without_the_program_beside_it_the_help_says_what_to_do() {
    let world = World::new();
    let output = world.xtask(&["ingest"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("put the program spritelora beside xtask"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn parity_and_random_base_get_their_options_untouched() {
    let world = World::new();
    world.spritelora_is("echo \"$@\"; exit 1");
    for command in ["parity", "random-base"] {
        let output = world.xtask(&[command, "--fixtures", "d", "--json", "--help"]);
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(
            stdout(&output),
            format!("{command} --fixtures d --json --help\n")
        );
    }
}

#[test]
fn gpu_tests_without_a_gpu_fail_clearly() {
    let world = World::new();
    // Whatever this machine has: a driver that shows nothing.
    let output = world.xtask_with_path(&["test", "--gpu"], Some(""));
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("need an NVIDIA GPU"),
        "{}",
        stderr(&output)
    );
}
