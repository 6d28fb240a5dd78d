//! A recipe and a runs directory seen together: the components of each task and the state of its output.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use console::Progress;
use serde::Deserialize;

use crate::digest_cache::DigestCache;
use crate::error::PipelineError;
use crate::fingerprint::{Fingerprint, digest_of_pairs};
use crate::manifest::{Artifact, earlier_artifacts};
use crate::recipe::Recipe;
use crate::source::list_source;
use crate::stage::{Stage, WeightPart};
use crate::state::{DirtyReason, StageState};
use crate::task::{DataSet, Task};

/// Files of a base's part that decide results; anything else there (`README.md`, other frameworks' weights) does not.
const WEIGHT_FILES: [&str; 4] = ["safetensors", "json", "txt", "model"];

/// A snapshot: each file is looked at once. Open a new one after a stage has run.
#[derive(Debug)]
pub struct Pipeline {
    recipe: Recipe,
    runs: PathBuf,
    progress: Progress,
    digests: DigestCache,
    sources: BTreeMap<DataSet, BTreeMap<String, String>>,
    weights: BTreeMap<WeightPart, String>,
    states: BTreeMap<Task, StageState>,
}

impl Pipeline {
    /// Looks at a runs directory (which need not exist) through a recipe.
    ///
    /// # Errors
    ///
    /// If a relative `runs` cannot be resolved.
    pub fn open(recipe: Recipe, runs: &Path, progress: Progress) -> Result<Self, PipelineError> {
        let runs = std::path::absolute(runs).map_err(PipelineError::io("resolve", runs))?;
        Ok(Self {
            digests: DigestCache::open(&runs, progress.clone()),
            recipe,
            runs,
            progress,
            sources: BTreeMap::new(),
            weights: BTreeMap::new(),
            states: BTreeMap::new(),
        })
    }

    /// The recipe.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// The recipe as a stage sees it that works on `data`: `ingest.source` is that set's.
    ///
    /// # Panics
    ///
    /// If the recipe holds nothing out and `data` are the held-out pictures.
    pub(crate) fn recipe_for(&self, data: DataSet) -> Recipe {
        let mut recipe = self.recipe.clone();
        recipe.ingest.source = self.source_of(data).to_owned();
        recipe
    }

    fn source_of(&self, data: DataSet) -> &Path {
        match data {
            DataSet::Training => &self.recipe.ingest.source,
            DataSet::HeldOut => self
                .recipe
                .evaluate
                .held_out
                .as_deref()
                .expect("only recipes that hold pictures out have tasks on them"),
        }
    }

    /// The directory of all artifacts, absolute.
    pub fn runs(&self) -> &Path {
        &self.runs
    }

    /// Where progress is shown.
    pub(crate) fn progress(&self) -> &Progress {
        &self.progress
    }

    /// The artifact directory of a fingerprint.
    pub(crate) fn dir_of(&self, stage: Stage, fingerprint: &Fingerprint) -> PathBuf {
        self.runs.join(stage.name()).join(fingerprint.short())
    }

    /// Whether a stage's output is still good.
    ///
    /// # Errors
    ///
    /// If the data, the base or a file that the recipe names cannot be read.
    pub fn state(&mut self, task: impl Into<Task>) -> Result<StageState, PipelineError> {
        let task = task.into();
        if let Some(state) = self.states.get(&task) {
            return Ok(state.clone());
        }
        let state = match self.inputs(task)? {
            Err(upstream) => StageState::Blocked { upstream },
            Ok(inputs) => {
                let components = self.components(task, &inputs)?;
                self.compare(task, components)
            }
        };
        self.digests.save();
        self.states.insert(task, state.clone());
        Ok(state)
    }

    /// The fresh artifacts that a task opens, or the first task that has to run before.
    pub(crate) fn inputs(
        &mut self,
        task: Task,
    ) -> Result<Result<BTreeMap<Task, Artifact>, Task>, PipelineError> {
        let mut inputs = BTreeMap::new();
        for upstream in task.inputs(&self.recipe) {
            match self.state(upstream)? {
                StageState::Fresh(artifact) => {
                    inputs.insert(upstream, *artifact);
                }
                StageState::Dirty { .. } => return Ok(Err(upstream)),
                StageState::Blocked { upstream } => return Ok(Err(upstream)),
            }
        }
        Ok(Ok(inputs))
    }

    /// Everything that decides a task's result.
    pub(crate) fn components(
        &mut self,
        task: Task,
        inputs: &BTreeMap<Task, Artifact>,
    ) -> Result<BTreeMap<String, String>, PipelineError> {
        let stage = task.stage;
        let mut components = self.recipe.flattened(stage);
        components.insert("schema".into(), format!("{stage}/{}", stage.schema()));
        if stage == Stage::Ingest {
            let digest = digest_of_pairs("source files", self.sources(task.data)?);
            components.insert("source.files".into(), digest);
        }
        for (key, path) in self.named_files(stage) {
            let digest = self.named_file_digest(&key, &path)?;
            components.insert(format!("file.{key}"), digest);
        }
        for part in stage.weights() {
            components.insert(format!("weights.{}", part.name()), self.weights(*part)?);
        }
        for (upstream, output) in task.input_digests(&self.recipe) {
            let artifact = &inputs[&upstream];
            let digest = artifact
                .output(output)
                .ok_or_else(|| PipelineError::MissingDigest {
                    stage: upstream.stage,
                    output,
                    dir: artifact.dir.clone(),
                })?;
            components.insert(task.component_of(upstream, output), digest.to_owned());
        }
        self.check_sizes(stage)?;
        Ok(components)
    }

    /// Names and digests of a set's files.
    pub(crate) fn sources(
        &mut self,
        data: DataSet,
    ) -> Result<&BTreeMap<String, String>, PipelineError> {
        if !self.sources.contains_key(&data) {
            let listed = list_source(self.source_of(data)).map_err(|error| match data {
                DataSet::Training => error,
                DataSet::HeldOut => error.of_held_out(),
            })?;
            let (names, paths): (Vec<_>, Vec<_>) = listed
                .into_iter()
                .map(|file| (file.name, file.path))
                .unzip();
            let digests = self.digests.digests(&paths)?;
            self.sources
                .insert(data, names.into_iter().zip(digests).collect());
        }
        Ok(&self.sources[&data])
    }

    fn compare(&mut self, task: Task, components: BTreeMap<String, String>) -> StageState {
        let stage = task.stage;
        let fingerprint = Fingerprint::of(&components);
        let dir = self.dir_of(stage, &fingerprint);
        let mut reasons = Vec::new();
        match Artifact::open(&dir, stage) {
            Ok(Some(artifact)) if artifact.manifest.fingerprint == fingerprint => {
                return StageState::Fresh(Box::new(artifact));
            }
            Ok(Some(_)) => reasons.push(DirtyReason::Damaged {
                dir: dir.clone(),
                problem: "it is another run's".to_owned(),
            }),
            Err(problem) => reasons.push(DirtyReason::Damaged {
                dir: dir.clone(),
                problem,
            }),
            Ok(None) if dir.is_dir() => {
                reasons.push(DirtyReason::Interrupted { dir: dir.clone() });
            }
            Ok(None) => {}
        }
        let earlier: Vec<Artifact> = earlier_artifacts(stage, &self.runs)
            .into_iter()
            .filter(|artifact| artifact.manifest.report.data == task.data)
            .collect();
        // With several recipes in one runs directory, the difference to this recipe's last run says more.
        let newest = earlier
            .iter()
            .find(|artifact| artifact.manifest.recipe_name == self.recipe.name)
            .or(earlier.first());
        if let Some(newest) = newest {
            reasons.extend(DirtyReason::between(
                &newest.manifest.components,
                &components,
                &newest.sources(),
                self.sources.get(&task.data).unwrap_or(&BTreeMap::new()),
            ));
        }
        if reasons.is_empty() {
            reasons.push(DirtyReason::NoEarlierRun);
        }
        StageState::Dirty {
            reasons,
            fingerprint,
            dir,
        }
    }

    /// Recipe keys of files whose content decides, with their paths.
    fn named_files(&self, stage: Stage) -> Vec<(String, PathBuf)> {
        let mut named = Vec::new();
        match stage {
            Stage::EmbedText => {
                if let Some(path) = &self.recipe.embed_text.public_embeddings {
                    named.push(("embed_text.public_embeddings".to_owned(), path.clone()));
                }
            }
            Stage::Sample => {
                if let Some(path) = &self.recipe.sample.prompts_file {
                    named.push(("sample.prompts_file".to_owned(), path.clone()));
                }
                for (index, lora) in self.recipe.sample.loras.iter().enumerate() {
                    named.push((format!("sample.loras.{index}"), lora.path.clone()));
                }
            }
            Stage::Ingest | Stage::CacheLatents | Stage::Train | Stage::Evaluate => {}
        }
        named
    }

    fn named_file_digest(&mut self, key: &str, path: &Path) -> Result<String, PipelineError> {
        let no_file = || PipelineError::NoFile {
            key: key.to_owned(),
            path: path.to_owned(),
        };
        // Embeddings may be one Parquet file or a folder of shards.
        if path.is_dir() && key == "embed_text.public_embeddings" {
            let listed = list_source(path).map_err(|_| no_file())?;
            let (names, paths): (Vec<_>, Vec<_>) = listed
                .into_iter()
                .map(|file| (file.name, file.path))
                .unzip();
            let digests = self.digests.digests(&paths)?;
            let pairs = names.into_iter().zip(digests).collect();
            return Ok(digest_of_pairs("named folder", &pairs));
        }
        if !path.is_file() {
            return Err(no_file());
        }
        Ok(self.digests.digests(&[path.to_owned()])?.remove(0))
    }

    /// The digest of a part of the base: over the names and contents of its weights, configuration and vocabulary.
    fn weights(&mut self, part: WeightPart) -> Result<String, PipelineError> {
        if let Some(digest) = self.weights.get(&part) {
            return Ok(digest.clone());
        }
        let dir = self.recipe.base.path.join(part.folder());
        let missing = || PipelineError::NoBasePart {
            folder: part.folder(),
            path: dir.clone(),
        };
        let (mut names, mut paths) = (Vec::new(), Vec::new());
        for entry in fs_err::read_dir(&dir).map_err(|_| missing())? {
            let path = entry.map_err(PipelineError::io("list", &dir))?.path();
            let decides = path
                .extension()
                .is_some_and(|extension| WEIGHT_FILES.iter().any(|known| extension == *known));
            let name = path
                .file_name()
                .map(|name| name.to_string_lossy().into_owned());
            if let Some(name) = name
                && decides
                && !name.starts_with('.')
                && path.is_file()
            {
                names.push(name);
                paths.push(path);
            }
        }
        if names.is_empty() {
            return Err(missing());
        }
        let digests = self.digests.digests(&paths)?;
        let pairs = names.into_iter().zip(digests).collect();
        let digest = digest_of_pairs("base part", &pairs);
        self.weights.insert(part, digest.clone());
        Ok(digest)
    }

    /// Checks picture sizes against the base's autoencoder: each token stands for 2×2 latent cells.
    fn check_sizes(&self, stage: Stage) -> Result<(), PipelineError> {
        let sizes: &[(&'static str, u32)] = match stage {
            Stage::CacheLatents => &[(
                "cache_latents.resolution_px",
                self.recipe.cache_latents.resolution_px,
            )],
            Stage::Sample => &[
                ("sample.width_px", self.recipe.sample.width_px),
                ("sample.height_px", self.recipe.sample.height_px),
            ],
            Stage::Ingest | Stage::EmbedText | Stage::Train | Stage::Evaluate => return Ok(()),
        };
        #[derive(Deserialize)]
        struct VaeLevels {
            block_out_channels: Vec<u32>,
        }
        let config = self.recipe.base.path.join("vae").join("config.json");
        // A configuration that cannot be read is for the stage to complain about: it knows what it must hold.
        let Some(levels) = fs_err::read(&config)
            .ok()
            .and_then(|bytes| serde_json::from_slice::<VaeLevels>(&bytes).ok())
            .map(|vae| vae.block_out_channels.len() as u32)
            .filter(|levels| (1..16).contains(levels))
        else {
            return Ok(());
        };
        let multiple = 1 << levels; // 2^(levels − 1) pixels a cell, 2 cells a token
        for (key, found) in sizes {
            if found % multiple != 0 {
                return Err(PipelineError::SizeNotMultiple {
                    key,
                    found: *found,
                    multiple,
                    config,
                });
            }
        }
        Ok(())
    }
}
