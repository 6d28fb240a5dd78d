//! Freshness and runs: each task that is not fresh is run by `spritelora`, in order, until one fails.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use console::{Progress, print_document, print_line, shown_path};
use pipeline::{
    Artifact, DataSet, Failure, Override, Pipeline, PipelineError, Recipe, Stage, StageState, Task,
    files,
};
use serde_json::{Value, json};

use crate::cli::StageOptions;
use crate::output;
use crate::program::{self, ProgramError};

/// Where a command works.
#[derive(Debug)]
pub struct Place {
    /// The recipe file.
    pub recipe_file: PathBuf,
    /// The recipe with the overrides applied.
    pub recipe: Recipe,
    /// The directory of all artifacts, absolute.
    pub runs: PathBuf,
    /// The overrides, in order.
    pub overrides: Vec<Override>,
}

impl Place {
    /// Loads the recipe that the options name.
    ///
    /// # Errors
    ///
    /// If the recipe cannot be used.
    pub fn new(options: &StageOptions, more: &[Override]) -> Result<Self, Failure> {
        let default = |name: &str| program::workspace().join(name);
        let recipe_file = options
            .recipe
            .clone()
            .unwrap_or_else(|| default("configs/demo.toml"));
        let runs = options.runs.clone().unwrap_or_else(|| default("runs"));
        let overrides: Vec<Override> = options.set.iter().chain(more).cloned().collect();
        let recipe = Recipe::load(&recipe_file, &overrides)?;
        let runs = std::path::absolute(&runs).unwrap_or(runs);
        Ok(Self {
            recipe_file,
            recipe,
            runs,
            overrides,
        })
    }

    /// A fresh look at the artifacts.
    ///
    /// # Errors
    ///
    /// If the runs directory cannot be resolved.
    pub fn look(&self) -> Result<Pipeline, Failure> {
        Ok(Pipeline::open(
            self.recipe.clone(),
            &self.runs,
            Progress::stderr(),
        )?)
    }
}

/// What a command has done so far.
#[derive(Debug, Default)]
struct Done {
    stages: Vec<Value>,
    artifacts: Vec<Artifact>,
}

impl Done {
    /// A file of a stage's artifact, if that stage was among those asked for.
    fn file(&self, stage: Stage, name: &str) -> Option<PathBuf> {
        self.artifacts
            .iter()
            .find(|artifact| artifact.manifest.stage == stage)
            .map(|artifact| artifact.path(name))
            .filter(|file| file.is_file())
    }
}

/// Runs what is not fresh of `stages`; gives the exit code.
pub fn run(command: &str, stages: &[Stage], options: &StageOptions, more: &[Override]) -> u8 {
    let place = match Place::new(options, more) {
        Ok(place) => place,
        Err(failure) => return output::failure(&failure, options.json),
    };
    let mut done = Done::default();
    let failure = run_all(stages, &place, options, &mut done).err();

    if failure.is_some() {
        // What stands from before is no result of this run.
        done.artifacts.clear();
    }
    let sheet = done.file(Stage::Sample, files::SHEET);
    let comparison = done.file(Stage::Sample, files::COMPARISON_SHEET);
    let report = done.file(Stage::Evaluate, files::REPORT);
    let untrained = sheet.is_some() && place.recipe.base.is_untrained();
    if options.json {
        let error = failure.as_ref().map(|failure| match failure {
            RunFailure::Ours(failure) => failure.to_json(),
            RunFailure::Childs { error, .. } => error.clone(),
        });
        let mut document = json!({ "command": command, "stages": done.stages });
        if let Some(error) = error {
            document["error"] = error;
        }
        if let Some(sheet) = &sheet {
            document["sheet"] = json!(sheet);
            document["pictures_are_noise"] = json!(untrained);
        }
        if let Some(comparison) = &comparison {
            document["comparison_sheet"] = json!(comparison);
        }
        if let Some(report) = &report {
            document["evaluation"] = fs_err::read(report)
                .ok()
                .and_then(|bytes| serde_json::from_slice(&bytes).ok())
                .unwrap_or_default();
        }
        print_document(&document);
    } else {
        if let Some(sheet) = &sheet {
            print_line(&format!("contact sheet: {}", shown_path(sheet)));
        }
        if let Some(comparison) = &comparison {
            print_line(&format!("before and after: {}", shown_path(comparison)));
        }
        if let Some(text) = done.file(Stage::Evaluate, files::REPORT_TEXT) {
            print_line(&format!("report: {}", shown_path(&text)));
        }
        if untrained {
            print_line(&format!(
                "The base model in {} is untrained (its weights are random), so these pictures are noise: they show \
                 that the pipeline works, not what it can draw.",
                shown_path(&place.recipe.base.path)
            ));
        }
    }
    match failure {
        None => 0,
        Some(RunFailure::Ours(failure)) => {
            console::tell(&failure);
            failure.kind().exit_code()
        }
        Some(RunFailure::Childs { code, .. }) => code,
    }
}

/// Why a command ended early.
#[derive(Debug)]
enum RunFailure {
    /// Not told yet.
    Ours(Failure),
    /// `spritelora` has told it on stderr.
    Childs { code: u8, error: Value },
}

impl From<Failure> for RunFailure {
    fn from(failure: Failure) -> Self {
        Self::Ours(failure)
    }
}

impl From<PipelineError> for RunFailure {
    fn from(error: PipelineError) -> Self {
        Self::Ours(error.into())
    }
}

impl From<ProgramError> for RunFailure {
    fn from(error: ProgramError) -> Self {
        Self::Ours(error.into())
    }
}

fn run_all(
    stages: &[Stage],
    place: &Place,
    options: &StageOptions,
    done: &mut Done,
) -> Result<(), RunFailure> {
    let mut program = None;
    let mut look = place.look()?;
    for task in Task::of_stages(stages, &place.recipe) {
        let state = look.state(task)?;
        if let StageState::Blocked { upstream } = state {
            let reason = look.state(upstream)?.to_string();
            return Err(PipelineError::Blocked {
                stage: task,
                upstream,
                reason,
            }
            .into());
        }
        let must_run = options.force || !state.is_fresh();
        let mut entry = output::state_value(task, &state);
        entry["ran"] = json!(must_run);
        if !options.json {
            let words = output::state_words(task, &state);
            let forced = options.force && state.is_fresh();
            print_line(&if forced {
                format!("{words}, forced")
            } else {
                words
            });
        }
        if !must_run {
            done.stages.push(entry);
            done.artifacts.extend(fresh(state));
            continue;
        }
        let path = match &program {
            Some(path) => path,
            None => program.insert(program::prepare(options.device.starts_with("cuda"))?),
        };
        let result = spawn(path, task, place, options);
        if let Ok(Some(report)) = &result {
            entry["report"] = report.clone();
        }
        done.stages.push(entry);
        result?;
        look = place.look()?;
        let state = look.state(task)?;
        if !state.is_fresh() {
            return Err(
                Failure::bad_input(format!("{task} has run, but now is {state}"))
                    .with_help("something changed its data meanwhile; run it again")
                    .into(),
            );
        }
        done.artifacts.extend(fresh(state));
    }
    Ok(())
}

fn fresh(state: StageState) -> Option<Artifact> {
    match state {
        StageState::Fresh(artifact) => Some(*artifact),
        _ => None,
    }
}

/// Has `spritelora` run a task; its report if JSON was asked for.
fn spawn(
    program: &Path,
    task: Task,
    place: &Place,
    options: &StageOptions,
) -> Result<Option<Value>, RunFailure> {
    let stage = task.stage;
    let mut child = Command::new(program);
    child
        .arg(stage.name())
        .arg("--recipe")
        .arg(&place.recipe_file)
        .arg("--runs")
        .arg(&place.runs)
        .args(["--device", &options.device, "--engine", &options.engine]);
    for change in &place.overrides {
        child.arg("--set").arg(change.to_string());
    }
    for (option, count) in [("--threads", options.threads), ("--batch", options.batch)] {
        if let Some(count) = count {
            child.arg(option).arg(count.to_string());
        }
    }
    if options.force {
        child.arg("--force");
    }
    if task.data == DataSet::HeldOut {
        child.arg("--held-out");
    }
    let start = |source| ProgramError::Start {
        path: program.to_owned(),
        source,
    };
    if !options.json {
        let status = child.status().map_err(start)?;
        return match program::code_of(status, stage.name())? {
            0 => Ok(None),
            code => Err(RunFailure::Childs {
                code,
                error: Value::Null,
            }),
        };
    }
    let ended = child
        .arg("--json")
        .stderr(Stdio::inherit())
        .output()
        .map_err(start)?;
    let mut document: Value = serde_json::from_slice(&ended.stdout).unwrap_or_default();
    match program::code_of(ended.status, stage.name())? {
        0 => Ok(Some(document["report"].take())),
        code => {
            let mut error = document["error"].take();
            if error.is_null() {
                // It crashed before it could write its document.
                let message = format!(
                    "spritelora {stage} failed; {} holds its log",
                    place.runs.join("logs").display()
                );
                error = json!({ "messages": [message], "help": null, "exit_code": code });
            }
            Err(RunFailure::Childs { code, error })
        }
    }
}
