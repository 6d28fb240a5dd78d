//! A stage at work on one of the recipe's two sets of pictures: those that are trained on, and those held out.
//!
//! The held-out set goes through the very stages of the training set, with `evaluate.held_out` in the place of
//! `ingest.source`. Directories of artifacts are named by fingerprint, so both lie side by side in `runs/<stage>/`.

use std::fmt;

use serde::{Deserialize, Serialize, Serializer};

use crate::recipe::Recipe;
use crate::stage::{Stage, outputs};

/// Which pictures a stage works on.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum DataSet {
    /// Those of `ingest.source`.
    #[default]
    Training,
    /// Those of `evaluate.held_out`, which nothing is trained on.
    HeldOut,
}

/// A stage at work on a set. Stages from `train` on read both sets or none and count as [`DataSet::Training`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Task {
    /// The stage.
    pub stage: Stage,
    /// The pictures.
    pub data: DataSet,
}

/// The stages that prepare a set of pictures.
const PREPARATION: [Stage; 3] = [Stage::Ingest, Stage::EmbedText, Stage::CacheLatents];

impl Task {
    /// A stage at work on the held-out pictures.
    pub fn held_out(stage: Stage) -> Self {
        Self {
            stage,
            data: DataSet::HeldOut,
        }
    }

    /// Everything that a recipe asks for, each task after those it reads. Both sets are prepared before the training
    /// begins, so that bad held-out data is not found out hours later.
    pub fn all(recipe: &Recipe) -> Vec<Self> {
        let mut tasks: Vec<Self> = PREPARATION.map(Self::from).to_vec();
        if recipe.evaluate.held_out.is_some() {
            tasks.extend(PREPARATION.map(Self::held_out));
        }
        tasks.extend([Stage::Train, Stage::Sample, Stage::Evaluate].map(Self::from));
        tasks
    }

    /// The tasks of these stages. The held-out set is prepared for `evaluate` and goes with it.
    pub fn of_stages(stages: &[Stage], recipe: &Recipe) -> Vec<Self> {
        let belongs = |task: &Self| {
            stages.contains(match task.data {
                DataSet::Training => &task.stage,
                DataSet::HeldOut => &Stage::Evaluate,
            })
        };
        Self::all(recipe).into_iter().filter(belongs).collect()
    }

    /// The tasks whose artifacts this one opens under `recipe`, in pipeline order.
    pub fn inputs(self, recipe: &Recipe) -> Vec<Self> {
        let of_this_set = |stage| Self {
            stage,
            data: self.data,
        };
        match self.stage {
            Stage::Ingest => vec![],
            Stage::EmbedText | Stage::CacheLatents => vec![of_this_set(Stage::Ingest)],
            Stage::Train => PREPARATION.map(of_this_set).to_vec(),
            Stage::Sample if recipe.sample.use_trained_lora => vec![Stage::Train.into()],
            Stage::Sample => vec![],
            Stage::Evaluate if recipe.evaluate.held_out.is_some() => {
                let mut inputs = vec![Stage::Ingest.into()]; // to see that nothing held out was trained on
                inputs.extend(PREPARATION.map(Self::held_out));
                inputs.extend([Stage::Train, Stage::Sample].map(Self::from));
                inputs
            }
            Stage::Evaluate => vec![Stage::Sample.into()],
        }
    }

    /// The logical digests of earlier tasks that decide this one's result under `recipe`.
    pub fn input_digests(self, recipe: &Recipe) -> Vec<(Self, &'static str)> {
        let own = |stage, output| {
            let data = self.data;
            (Self { stage, data }, output)
        };
        match self.stage {
            Stage::Ingest => vec![],
            Stage::EmbedText if recipe.embed_text.public_embeddings.is_some() => vec![
                own(Stage::Ingest, outputs::CAPTIONS),
                own(Stage::Ingest, outputs::PAIRS),
                own(Stage::Ingest, outputs::COMPAT_HASHES),
            ],
            Stage::EmbedText => vec![own(Stage::Ingest, outputs::CAPTIONS)],
            Stage::CacheLatents => vec![own(Stage::Ingest, outputs::SAMPLES)],
            Stage::Train => vec![
                own(Stage::Ingest, outputs::PAIRS),
                own(Stage::EmbedText, outputs::EMBEDDINGS),
                own(Stage::CacheLatents, outputs::LATENTS),
            ],
            Stage::Sample if recipe.sample.use_trained_lora => {
                vec![own(Stage::Train, outputs::LORA)]
            }
            Stage::Sample => vec![],
            Stage::Evaluate if recipe.evaluate.held_out.is_some() => vec![
                own(Stage::Ingest, outputs::SAMPLES),
                (Self::held_out(Stage::Ingest), outputs::PAIRS),
                (Self::held_out(Stage::EmbedText), outputs::EMBEDDINGS),
                (Self::held_out(Stage::CacheLatents), outputs::LATENTS),
                own(Stage::Train, outputs::LORA),
                own(Stage::Sample, outputs::IMAGES),
            ],
            Stage::Evaluate => vec![own(Stage::Sample, outputs::IMAGES)],
        }
    }

    /// How this task names an input's digest among its components: `input.pairs`, and `input.held_out.pairs` where it
    /// reads the other set beside its own.
    pub(crate) fn component_of(self, input: Self, output: &str) -> String {
        if input.data == self.data {
            format!("input.{output}")
        } else {
            format!("input.held_out.{output}")
        }
    }

    /// The `cargo xtask` subcommand that does it.
    pub fn command(self) -> &'static str {
        match self.data {
            DataSet::Training => self.stage.name(),
            DataSet::HeldOut => Stage::Evaluate.name(),
        }
    }
}

impl From<Stage> for Task {
    /// The stage at work on the training set.
    fn from(stage: Stage) -> Self {
        Self {
            stage,
            data: DataSet::Training,
        }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.data {
            DataSet::Training => formatter.pad(self.stage.name()),
            DataSet::HeldOut => formatter.pad(&format!("{} (held-out)", self.stage)),
        }
    }
}

impl Serialize for Task {
    /// As people read it, e.g. `"ingest (held-out)"`.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
