//! What a stage is given and what it gives back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use console::Progress;
use serde::{Deserialize, Serialize};

use crate::manifest::{Artifact, earlier_artifacts};
use crate::recipe::Recipe;
use crate::stage::{Stage, WeightPart};
use crate::task::{DataSet, Task};

/// What changes only speed and is never fingerprinted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunOptions {
    /// `auto`, `cpu`, `cuda` or `cuda:<index>`; parsed by the `tensor` crate.
    pub device: String,
    /// `auto`, `portable`, `cpu` or `cuda`: what executes the transformer; parsed by the `engine` crate. (A checkpoint names its
    /// engine, and another one does not continue it.)
    pub engine: String,
    /// Worker threads; `None` for all cores.
    pub threads: Option<usize>,
    /// Batch of the stages that encode; `None` lets the stage choose.
    pub batch: Option<usize>,
    /// Whether the caller wants JSON on stdout (stages write nothing there either way).
    pub json: bool,
}

/// What a stage is given.
#[derive(Clone, Debug)]
pub struct StageContext {
    /// The stage that runs.
    pub stage: Stage,
    /// The pictures that it works on.
    pub data: DataSet,
    /// The recipe, paths absolute; `ingest.source` is the source of [`StageContext::data`].
    pub recipe: Recipe,
    /// The directory of all artifacts.
    pub runs: PathBuf,
    /// Where this run writes; it exists. It may hold files of an interrupted run of the same fingerprint when
    /// [`Stage::resumes`], and checkpoints also of a damaged one; else it is empty.
    pub dir: PathBuf,
    /// Whether the person asked for the work although its result is there: then nothing is taken over from earlier runs.
    pub forced: bool,
    /// The sealed artifacts of [`Task::inputs`].
    pub inputs: BTreeMap<Task, Artifact>,
    /// What the fingerprint is made of, e.g. `weights.vae` → 64 hex digits.
    pub components: BTreeMap<String, String>,
    /// What changes only speed.
    pub options: RunOptions,
    /// Where to report how far the work is.
    pub progress: Progress,
}

impl StageContext {
    /// The sealed artifact of an input stage, of the pictures that this one works on.
    ///
    /// # Panics
    ///
    /// If `stage` is not among [`Task::inputs`] of this stage under this recipe.
    pub fn input(&self, stage: Stage) -> &Artifact {
        let data = self.data;
        self.input_task(Task { stage, data })
    }

    /// The sealed artifact that a stage made of the held-out pictures.
    ///
    /// # Panics
    ///
    /// If it is not among [`Task::inputs`] of this stage under this recipe.
    pub fn held_out_input(&self, stage: Stage) -> &Artifact {
        self.input_task(Task::held_out(stage))
    }

    fn input_task(&self, task: Task) -> &Artifact {
        self.inputs
            .get(&task)
            .unwrap_or_else(|| panic!("{task} is no input of {}", self.stage))
    }

    /// The folder of a part of the base, e.g. `<base>/vae`.
    pub fn weights_dir(&self, part: WeightPart) -> PathBuf {
        self.recipe.base.path.join(part.folder())
    }

    /// The digest (64 hex digits) of a part of the base that this stage reads.
    ///
    /// # Panics
    ///
    /// If `part` is not among [`Stage::weights`] of this stage.
    pub fn weights_digest(&self, part: WeightPart) -> &str {
        self.components
            .get(&format!("weights.{}", part.name()))
            .unwrap_or_else(|| panic!("{} does not read {}", self.stage, part.name()))
    }

    /// Sealed artifacts of this stage, newest first, to reuse rows from. None for a forced run: what is there is what
    /// the person does not trust.
    pub fn earlier_artifacts(&self) -> Vec<Artifact> {
        if self.forced {
            return Vec::new();
        }
        earlier_artifacts(self.stage, &self.runs)
    }

    /// Earlier artifacts of this stage that differ from this run in nothing but inputs: every component that does
    /// not start with `input.` is equal. Their rows can be taken over.
    pub fn reusable_artifacts(&self) -> Vec<Artifact> {
        let own = |components: &BTreeMap<String, String>| -> BTreeMap<String, String> {
            components
                .iter()
                .filter(|(key, _)| !key.starts_with("input."))
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect()
        };
        let wanted = own(&self.components);
        self.earlier_artifacts()
            .into_iter()
            .filter(|artifact| own(&artifact.manifest.components) == wanted)
            .collect()
    }

    /// An empty report of this run, to be filled.
    pub fn report(&self) -> StageReport {
        StageReport {
            stage: self.stage,
            data: self.data,
            dir: self.dir.clone(),
            seconds: 0.0,
            counts: BTreeMap::new(),
            outputs: BTreeMap::new(),
            notes: Vec::new(),
        }
    }

    /// A file below this run's directory.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.join(name)
    }
}

/// What a stage gives back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageReport {
    /// The stage that ran.
    pub stage: Stage,
    /// The pictures that it worked on; training in reports from before held-out pictures were known.
    #[serde(default)]
    pub data: DataSet,
    /// Its artifact directory.
    pub dir: PathBuf,
    /// How long it took; filled in by [`crate::StageRun::finish`].
    pub seconds: f64,
    /// What was counted, e.g. `encoded` → 60, `reused` → 0.
    pub counts: BTreeMap<String, u64>,
    /// Logical digests by the names in [`crate::outputs`].
    pub outputs: BTreeMap<String, String>,
    /// What a person should know, a sentence each.
    pub notes: Vec<String>,
}

impl StageReport {
    /// The task that it is of.
    pub fn task(&self) -> Task {
        Task {
            stage: self.stage,
            data: self.data,
        }
    }

    /// Sets a count.
    #[must_use]
    pub fn count(mut self, what: &str, count: u64) -> Self {
        self.counts.insert(what.to_owned(), count);
        self
    }

    /// Sets a logical digest.
    #[must_use]
    pub fn output(mut self, name: &str, digest: impl ToString) -> Self {
        self.outputs.insert(name.to_owned(), digest.to_string());
        self
    }

    /// Adds a sentence for the person.
    #[must_use]
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }
}
