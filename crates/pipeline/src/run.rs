//! One run of a stage: lock, directory, work, seal.
//!
//! The seal is written after everything else, so whatever kills a run (Ctrl-C, SIGKILL, a power cut) leaves either a
//! sealed artifact or a directory without a seal. A forced run works in a hidden directory beside the old artifact and
//! takes its place only once sealed; a run killed between the two renames of that is completed by the next one.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use console::Progress;

use crate::context::{RunOptions, StageContext, StageReport};
use crate::error::PipelineError;
use crate::failure::Failure;
use crate::fingerprint::Fingerprint;
use crate::lock::FileLock;
use crate::manifest::{
    Artifact, MANIFEST_FILE, Manifest, SOURCES_FILE, sync_directory, write_json_atomically,
};
use crate::pipeline::Pipeline;
use crate::recipe::Recipe;
use crate::stage::{Stage, files};
use crate::state::{DirtyReason, StageState};
use crate::task::Task;

/// The right to run a stage in a runs directory; given back when dropped, also by a killed process.
#[derive(Debug)]
pub struct StageLock {
    _lock: FileLock,
}

impl StageLock {
    /// Takes the lock, or says that another process has it.
    ///
    /// # Errors
    ///
    /// If the lock is taken or the directory cannot be written.
    pub fn acquire(stage: Stage, runs: &Path) -> Result<Self, PipelineError> {
        let dir = runs.join(stage.name());
        fs_err::create_dir_all(&dir).map_err(PipelineError::write("create", &dir))?;
        let path = dir.join(".lock");
        match FileLock::try_acquire(&path).map_err(PipelineError::write("lock", &path))? {
            Some(lock) => Ok(Self { _lock: lock }),
            None => Err(PipelineError::Locked { stage, path }),
        }
    }
}

/// What [`StageRun::begin`] found.
#[derive(Debug)]
pub enum Begin {
    /// Nothing to do.
    Fresh(Box<Artifact>),
    /// The stage must work.
    Run(Box<StageRun>),
}

/// A run under way: the stage works with [`StageRun::context`], then [`StageRun::finish`] seals.
#[derive(Debug)]
pub struct StageRun {
    context: StageContext,
    final_dir: PathBuf,
    started: Instant,
    pipeline: Pipeline,
    _lock: StageLock,
}

impl StageRun {
    /// Locks the stage, looks whether it must run, and makes its directory ready.
    ///
    /// # Errors
    ///
    /// If the stage is locked or blocked, or the recipe's files or the runs directory cannot be used.
    pub fn begin(
        mut pipeline: Pipeline,
        task: impl Into<Task>,
        options: RunOptions,
        force: bool,
    ) -> Result<Begin, PipelineError> {
        let task = task.into();
        let stage = task.stage;
        let state = pipeline.state(task)?;
        if let (StageState::Fresh(artifact), false) = (&state, force) {
            return Ok(Begin::Fresh(artifact.clone()));
        }
        let inputs = match pipeline.inputs(task)? {
            Ok(inputs) => inputs,
            Err(upstream) => {
                return Err(PipelineError::Blocked {
                    stage: task,
                    upstream,
                    reason: pipeline.state(upstream)?.to_string(),
                });
            }
        };
        let lock = StageLock::acquire(stage, pipeline.runs())?;
        let components = pipeline.components(task, &inputs)?;
        let fingerprint = Fingerprint::of(&components);
        let final_dir = pipeline.dir_of(stage, &fingerprint);
        complete_replacement(&final_dir, stage, &fingerprint)
            .map_err(PipelineError::write("restore", &final_dir))?;
        if !force
            && let Ok(Some(artifact)) = Artifact::open(&final_dir, stage)
            && artifact.manifest.fingerprint == fingerprint
        {
            // Another process sealed it between our look and our lock, or it was put back just now.
            return Ok(Begin::Fresh(Box::new(artifact)));
        }
        let dir = if final_dir.join(MANIFEST_FILE).exists() && force {
            beside(&final_dir, "forced")
        } else {
            final_dir.clone()
        };
        let damaged = matches!(&state, StageState::Dirty { reasons, .. }
            if reasons.iter().any(|reason| matches!(reason, DirtyReason::Damaged { .. })));
        let keep = match (force, damaged) {
            (false, false) if stage.resumes() => Keep::Everything,
            // Each checkpoint carries a digest of its own, so that the damage of the rest says nothing about them.
            (false, true) if stage == Stage::Train => Keep::Checkpoints,
            _ => Keep::Nothing,
        };
        make_ready(&dir, keep).map_err(PipelineError::write("prepare", &dir))?;
        let context = StageContext {
            stage,
            data: task.data,
            recipe: pipeline.recipe_for(task.data),
            runs: pipeline.runs().to_owned(),
            dir,
            forced: force,
            inputs,
            components,
            options,
            progress: pipeline.progress().clone(),
        };
        Ok(Begin::Run(Box::new(Self {
            context,
            final_dir,
            started: Instant::now(),
            pipeline,
            _lock: lock,
        })))
    }

    /// What the stage is given.
    pub fn context(&self) -> &StageContext {
        &self.context
    }

    /// Checks that the stage kept its promises and seals its directory.
    ///
    /// # Errors
    ///
    /// If a promised output is missing, the data changed meanwhile, or the seal cannot be written. Nothing is sealed
    /// then.
    pub fn finish(mut self, mut report: StageReport) -> Result<StageReport, PipelineError> {
        let stage = self.context.stage;
        if let Some(output) = stage
            .promised_outputs()
            .iter()
            .find(|name| !report.outputs.contains_key(**name))
        {
            return Err(PipelineError::MissingOutput { stage, output });
        }
        if stage == Stage::Ingest {
            self.seal_sources()?;
        }
        report.seconds = self.started.elapsed().as_secs_f64();
        report.dir.clone_from(&self.final_dir);
        let dir = &self.context.dir;
        let seal = dir.join(MANIFEST_FILE);
        let manifest = Manifest::new(
            &self.context.recipe.name,
            self.context.components.clone(),
            report.clone(),
            dir,
        )
        .map_err(PipelineError::io("list", dir))?;
        write_json_atomically(&seal, &manifest).map_err(PipelineError::write("write", &seal))?;
        if *dir != self.final_dir {
            take_place(dir, &self.final_dir)
                .map_err(PipelineError::write("replace", &self.final_dir))?;
        }
        Ok(report)
    }

    /// Tidies up after a stage that failed: what it cannot continue from goes.
    pub fn abandon(self) {
        let dir = &self.context.dir;
        let removed = if self.context.stage.resumes() {
            // Only if there is nothing in it.
            fs_err::remove_dir(dir)
        } else {
            fs_err::remove_dir_all(dir)
        };
        if let Err(error) = removed {
            tracing::debug!(%error, "directory of a failed run kept");
        }
    }

    /// Writes down what the data was, unless it is no longer what this run was named for.
    fn seal_sources(&mut self) -> Result<(), PipelineError> {
        let data = self.context.data;
        let before = self.pipeline.sources(data)?.clone();
        let mut now = Pipeline::open(
            self.pipeline.recipe().clone(),
            &self.context.runs,
            self.context.progress.clone(),
        )?;
        let after = now.sources(data)?;
        if *after != before {
            let key = || "source.files".to_owned();
            let reasons = DirtyReason::between(
                &[(key(), String::new())].into(),
                &[(key(), "changed".to_owned())].into(),
                &before,
                after,
            );
            let change = reasons.first().map(ToString::to_string).unwrap_or_default();
            return Err(PipelineError::ChangedMeanwhile { change });
        }
        let path = self.context.dir.join(SOURCES_FILE);
        write_json_atomically(&path, &before).map_err(PipelineError::write("write", &path))
    }
}

/// Runs a stage if it must, from recipe to seal. `work` is the stage crate's `run`.
///
/// Returns the report of this run, or of the run that is still good, and whether work was done.
///
/// # Errors
///
/// Whatever the stage or the pipeline refuses; no artifact is sealed then and earlier ones stand as they were.
pub fn run_stage<E: Into<Failure>>(
    recipe: Recipe,
    runs: &Path,
    task: impl Into<Task>,
    options: RunOptions,
    progress: Progress,
    force: bool,
    work: impl FnOnce(&StageContext) -> Result<StageReport, E>,
) -> Result<(StageReport, bool), Failure> {
    let task = task.into();
    let pipeline = Pipeline::open(recipe, runs, progress)?;
    let run = match StageRun::begin(pipeline, task, options, force)? {
        Begin::Fresh(artifact) => return Ok((artifact.manifest.report, false)),
        Begin::Run(run) => run,
    };
    tracing::info!(%task, dir = %run.context().dir.display(), "started");
    match work(run.context()) {
        Ok(report) => {
            let report = run.finish(report)?;
            tracing::info!(%task, seconds = report.seconds, "sealed");
            Ok((report, true))
        }
        Err(error) => {
            run.abandon();
            Err(error.into())
        }
    }
}

/// What a run may continue from of what is in its directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keep {
    /// All but half-written files.
    Everything,
    /// Only the folder [`files::CHECKPOINTS`], without half-written files.
    Checkpoints,
    Nothing,
}

/// Makes an unsealed directory, empty unless a run may continue from what is in it.
fn make_ready(dir: &Path, keep: Keep) -> io::Result<()> {
    if dir.exists() {
        // The seal goes first: from here on this is an interrupted run, whatever happens.
        match fs_err::remove_file(dir.join(MANIFEST_FILE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        sync_directory(dir)?;
        match keep {
            Keep::Everything => remove_temporary_files(dir)?,
            Keep::Checkpoints => {
                remove_all_but(dir, files::CHECKPOINTS)?;
                remove_temporary_files(dir)?;
            }
            Keep::Nothing => fs_err::remove_dir_all(dir)?,
        }
    }
    fs_err::create_dir_all(dir)?;
    // A directory that exists may still refuse files: better now than after an hour of work.
    tempfile::Builder::new()
        .prefix(".tmp")
        .tempfile_in(dir)?
        .close()
}

fn remove_all_but(dir: &Path, kept: &str) -> io::Result<()> {
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name() == kept {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs_err::remove_dir_all(entry.path())?;
        } else {
            fs_err::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Files that a killed process was writing when it was killed.
fn remove_temporary_files(dir: &Path) -> io::Result<()> {
    for entry in walkdir::WalkDir::new(dir) {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy();
        if entry.file_type().is_file() && (name.starts_with(".tmp") || name.ends_with(".tmp")) {
            fs_err::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// The hidden directory beside an artifact where a forced run works (`forced`), or where the old artifact waits until
/// the new one is in its place (`replaced`).
fn beside(artifact: &Path, what: &str) -> PathBuf {
    let name = artifact.file_name().unwrap_or_default().to_string_lossy();
    artifact.with_file_name(format!(".{name}.{what}"))
}

/// Puts a sealed directory where an older one is. Killed in between, neither is found until [`complete_replacement`].
fn take_place(new: &Path, old: &Path) -> io::Result<()> {
    let aside = beside(old, "replaced");
    remove_replaced(&aside)?;
    if old.exists() {
        fs_err::rename(old, &aside)?;
    }
    fs_err::rename(new, old)?;
    if let Some(parent) = old.parent() {
        sync_directory(parent)?;
    }
    remove_replaced(&aside)
}

/// Completes what a run was killed in, between the two renames of [`take_place`]: the new artifact takes the place that
/// is empty, or the old one if the new one is not whole.
fn complete_replacement(
    final_dir: &Path,
    stage: Stage,
    fingerprint: &Fingerprint,
) -> io::Result<()> {
    if final_dir.exists() {
        return Ok(());
    }
    let is_sealed = |dir: &Path| {
        matches!(Artifact::open(dir, stage), Ok(Some(artifact))
            if artifact.manifest.fingerprint == *fingerprint)
    };
    let aside = beside(final_dir, "replaced");
    for dir in [beside(final_dir, "forced"), aside.clone()] {
        if is_sealed(&dir) {
            tracing::info!(from = %dir.display(), to = %final_dir.display(), "interrupted replacement completed");
            fs_err::rename(&dir, final_dir)?;
            if let Some(parent) = final_dir.parent() {
                sync_directory(parent)?;
            }
            return remove_replaced(&aside);
        }
    }
    Ok(())
}

/// Removes an artifact that another one has replaced. Its seal goes first, so that what a kill leaves is never put back.
fn remove_replaced(aside: &Path) -> io::Result<()> {
    if !aside.exists() {
        return Ok(());
    }
    match fs_err::remove_file(aside.join(MANIFEST_FILE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs_err::remove_dir_all(aside)
}
