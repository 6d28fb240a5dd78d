//! Whether a stage's output is still good, and if not, why.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use crate::fingerprint::Fingerprint;
use crate::manifest::Artifact;
use crate::task::Task;

/// More changed files than this are summed up in one reason.
const MAX_FILES_NAMED: usize = 5;
/// Longest recipe value shown in a reason, in characters; longer ones are cut.
const MAX_VALUE_CHARS: usize = 60;

/// The state of a stage's output under a recipe.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum StageState {
    /// A sealed artifact with exactly this fingerprint is there.
    Fresh(Box<Artifact>),
    /// The stage must run.
    Dirty {
        /// Why; never empty.
        reasons: Vec<DirtyReason>,
        /// What the run will be called.
        fingerprint: Fingerprint,
        /// Where the run will write.
        dir: PathBuf,
    },
    /// It cannot be told before an earlier stage has run.
    Blocked {
        /// The first task that has to run.
        upstream: Task,
    },
}

impl StageState {
    /// Whether nothing needs to be done.
    pub fn is_fresh(&self) -> bool {
        matches!(self, Self::Fresh(_))
    }
}

impl fmt::Display for StageState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fresh(artifact) => write!(formatter, "Fresh ({})", artifact.dir.display()),
            Self::Dirty { reasons, .. } => {
                let reasons: Vec<String> = reasons.iter().map(ToString::to_string).collect();
                write!(formatter, "Dirty: {}", reasons.join("; "))
            }
            Self::Blocked { upstream } => write!(formatter, "Blocked: waits for {upstream}"),
        }
    }
}

/// Why a stage must run, compared with the newest sealed run of that stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum DirtyReason {
    /// The stage never ran to its end.
    NoEarlierRun,
    /// A run of this very fingerprint was interrupted.
    Interrupted {
        /// Its directory.
        dir: PathBuf,
    },
    /// The artifact of this very fingerprint was damaged after it was sealed.
    Damaged {
        /// Its directory.
        dir: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The person asked for it.
    Forced,
    /// The stage writes another output than before.
    SchemaChanged {
        /// Version of the earlier run.
        old: String,
        /// Version now.
        new: String,
    },
    /// A recipe field changed.
    RecipeChanged {
        /// The dotted key.
        key: String,
        /// The earlier value, if the field was there.
        old: Option<String>,
        /// The value now, if the field is there.
        new: Option<String>,
    },
    /// A data file's content changed.
    FileChanged {
        /// Name relative to the source.
        name: String,
        /// Digest in the earlier run.
        old: String,
        /// Digest now.
        new: String,
    },
    /// A data file is new.
    FileAdded {
        /// Name relative to the source.
        name: String,
    },
    /// A data file is gone.
    FileRemoved {
        /// Name relative to the source.
        name: String,
    },
    /// More data files changed than are named.
    MoreFiles {
        /// How many more.
        count: usize,
    },
    /// The content of a file that the recipe names changed.
    NamedFileChanged {
        /// The recipe's key, e.g. `sample.prompts_file`.
        key: String,
        /// Digest in the earlier run, if the file was named.
        old: Option<String>,
        /// Digest now, if the file is named.
        new: Option<String>,
    },
    /// A part of the base changed.
    WeightsChanged {
        /// The part, e.g. `vae`.
        part: String,
        /// Digest in the earlier run, if the part was read.
        old: Option<String>,
        /// Digest now, if the part is read.
        new: Option<String>,
    },
    /// The result of an earlier stage changed.
    InputChanged {
        /// Which logical digest, e.g. `captions`.
        output: String,
        /// Digest in the earlier run, if it was read.
        old: Option<String>,
        /// Digest now, if it is read.
        new: Option<String>,
    },
}

impl DirtyReason {
    /// All differences between what an earlier run was made from and what a run now would be.
    pub(crate) fn between(
        old: &BTreeMap<String, String>,
        new: &BTreeMap<String, String>,
        old_sources: &BTreeMap<String, String>,
        new_sources: &BTreeMap<String, String>,
    ) -> Vec<Self> {
        let mut reasons = Vec::new();
        for key in merged_keys(old, new) {
            let (before, now) = (old.get(key).cloned(), new.get(key).cloned());
            if before == now {
                continue;
            }
            let (kind, name) = key.split_once('.').unwrap_or((key, ""));
            match kind {
                "schema" => reasons.push(Self::SchemaChanged {
                    old: before.unwrap_or_default(),
                    new: now.unwrap_or_default(),
                }),
                "weights" => reasons.push(Self::WeightsChanged {
                    part: name.to_owned(),
                    old: before,
                    new: now,
                }),
                "input" => reasons.push(Self::InputChanged {
                    output: name.to_owned(),
                    old: before,
                    new: now,
                }),
                "source" => reasons.extend(file_reasons(old_sources, new_sources)),
                "file" => reasons.push(Self::NamedFileChanged {
                    key: name.to_owned(),
                    old: before,
                    new: now,
                }),
                _ => reasons.push(Self::RecipeChanged {
                    key: name.to_owned(),
                    old: before,
                    new: now,
                }),
            }
        }
        reasons
    }
}

fn merged_keys<'a>(
    old: &'a BTreeMap<String, String>,
    new: &'a BTreeMap<String, String>,
) -> std::collections::BTreeSet<&'a str> {
    old.keys().chain(new.keys()).map(String::as_str).collect()
}

fn file_reasons(
    old: &BTreeMap<String, String>,
    new: &BTreeMap<String, String>,
) -> Vec<DirtyReason> {
    let mut reasons: Vec<DirtyReason> = merged_keys(old, new)
        .into_iter()
        .filter_map(|name| match (old.get(name), new.get(name)) {
            (Some(before), Some(now)) if before == now => None,
            (Some(before), Some(now)) => Some(DirtyReason::FileChanged {
                name: name.to_owned(),
                old: before.clone(),
                new: now.clone(),
            }),
            (None, _) => Some(DirtyReason::FileAdded {
                name: name.to_owned(),
            }),
            (_, None) => Some(DirtyReason::FileRemoved {
                name: name.to_owned(),
            }),
        })
        .collect();
    if reasons.len() > MAX_FILES_NAMED {
        let count = reasons.len() - MAX_FILES_NAMED;
        reasons.truncate(MAX_FILES_NAMED);
        reasons.push(DirtyReason::MoreFiles { count });
    }
    reasons
}

impl fmt::Display for DirtyReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoEarlierRun => formatter.write_str("no earlier run"),
            Self::Interrupted { dir } => {
                write!(formatter, "interrupted run (no seal in {})", dir.display())
            }
            Self::Damaged { dir, problem } => {
                write!(formatter, "damaged artifact {}: {problem}", dir.display())
            }
            Self::Forced => formatter.write_str("forced"),
            Self::SchemaChanged { old, new } => {
                write!(formatter, "output format changed: {old} -> {new}")
            }
            Self::RecipeChanged { key, old, new } => {
                write!(formatter, "{key} changed: {} -> {}", value(old), value(new))
            }
            Self::FileChanged { name, .. } => write!(formatter, "data file {name} changed"),
            Self::FileAdded { name } => write!(formatter, "data file {name} is new"),
            Self::FileRemoved { name } => write!(formatter, "data file {name} is gone"),
            Self::MoreFiles { count } => write!(formatter, "and {count} more data files"),
            Self::NamedFileChanged { key, old, new } => write!(
                formatter,
                "content of {key} changed: {} -> {}",
                digest(old),
                digest(new)
            ),
            Self::WeightsChanged { part, old, new } => write!(
                formatter,
                "base's {part} changed: {} -> {}",
                digest(old),
                digest(new)
            ),
            Self::InputChanged { output, old, new } => {
                write!(
                    formatter,
                    "{output} changed: {} -> {}",
                    digest(old),
                    digest(new)
                )
            }
        }
    }
}

fn value(value: &Option<String>) -> String {
    match value {
        None => "not there".to_owned(),
        Some(text) if text.chars().count() > MAX_VALUE_CHARS => {
            let cut: String = text.chars().take(MAX_VALUE_CHARS).collect();
            format!("{cut}…")
        }
        Some(text) => text.clone(),
    }
}

fn digest(digest: &Option<String>) -> &str {
    match digest {
        None => "none",
        Some(digest) => digest.get(..8).unwrap_or(digest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn a_reason_names_key_old_and_new_value() {
        let reasons = DirtyReason::between(
            &map(&[("recipe.train.learning_rate", "0.0001")]),
            &map(&[("recipe.train.learning_rate", "0.0002")]),
            &map(&[]),
            &map(&[]),
        );
        let texts: Vec<_> = reasons.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["train.learning_rate changed: 0.0001 -> 0.0002"]);
    }

    #[test]
    fn data_files_are_named_and_the_rest_is_counted() {
        let old: Vec<(String, String)> = (0..9).map(|i| (format!("{i}.png"), "a".into())).collect();
        let old: BTreeMap<_, _> = old.into_iter().collect();
        let mut new = old.clone();
        new.remove("0.png");
        new.insert("1.png".into(), "b".into());
        new.insert("new.png".into(), "a".into());
        let components = |digest| map(&[("source.files", digest)]);
        let texts: Vec<_> = DirtyReason::between(&components("1"), &components("2"), &old, &new)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            texts,
            [
                "data file 0.png is gone",
                "data file 1.png changed",
                "data file new.png is new"
            ]
        );
        let all = DirtyReason::between(&components("1"), &components("2"), &old, &map(&[]));
        assert_eq!(all.len(), MAX_FILES_NAMED + 1);
        assert_eq!(all[MAX_FILES_NAMED].to_string(), "and 4 more data files");
    }
}
