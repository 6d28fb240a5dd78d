//! Reading a recipe file: syntax with its place in the file, overrides, paths, sense.

use std::path::{Path, PathBuf};

use crate::failure::{FailureKind, StageError};
use crate::recipe::validate::Complaint;
use crate::recipe::{Override, Recipe};

/// Why a recipe cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// The file cannot be read.
    #[error("cannot read the recipe {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file is not TOML, lacks a field, or has one that does not exist.
    #[error("the recipe {} cannot be used", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        source: Box<toml::de::Error>,
    },
    /// An override names a field that the recipe does not have.
    #[error("the recipe has no field {key:?}")]
    UnknownKey {
        /// The dotted key.
        key: String,
        /// Fields with the most similar names, nearest first.
        nearest: Vec<String>,
    },
    /// An override is not of the form `section.field=value`.
    #[error("{text:?} is no override")]
    NotAnOverride {
        /// What was given.
        text: String,
    },
    /// An override has a value that its field cannot take.
    #[error("{key} cannot be {value}")]
    OverrideValue {
        /// The dotted key.
        key: String,
        /// The value in TOML syntax.
        value: String,
        /// What was expected.
        source: Box<toml::de::Error>,
    },
    /// Values that make no sense, alone or together.
    #[error("the recipe {} makes no sense: {}", path.display(), list(complaints))]
    Senseless {
        /// The file.
        path: PathBuf,
        /// One complaint for each field.
        complaints: Vec<Complaint>,
    },
}

fn list(complaints: &[Complaint]) -> String {
    let lines: Vec<String> = complaints.iter().map(ToString::to_string).collect();
    lines.join("; ")
}

impl StageError for RecipeError {
    fn kind(&self) -> FailureKind {
        FailureKind::BadInput
    }

    fn help(&self) -> Option<String> {
        match self {
            Self::Read { .. } => Some("name a recipe with --recipe FILE; configs/ holds some".to_owned()),
            Self::Parse { .. } => Some(
                "every field must be written and no others are known; compare with configs/demo.toml"
                    .to_owned(),
            ),
            Self::UnknownKey { nearest, .. } if nearest.is_empty() => None,
            Self::UnknownKey { nearest, .. } => {
                Some(format!("did you mean {}?", nearest.join(" or ")))
            }
            Self::NotAnOverride { .. } => {
                Some("write section.field=value, e.g. --set train.steps=50".to_owned())
            }
            Self::OverrideValue { .. } | Self::Senseless { .. } => None,
        }
    }
}

impl Recipe {
    /// Reads a recipe file, applies overrides in order, makes paths absolute and checks that it makes sense.
    ///
    /// # Errors
    ///
    /// If the file, an override or their result cannot be used; nothing is corrected silently.
    pub fn load(path: &Path, overrides: &[Override]) -> Result<Self, RecipeError> {
        let text = fs_err::read_to_string(path).map_err(|source| RecipeError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path, overrides)
    }

    /// [`Recipe::load`] of text that stands in the file `path` (which need not exist).
    ///
    /// # Errors
    ///
    /// As [`Recipe::load`].
    pub fn parse(text: &str, path: &Path, overrides: &[Override]) -> Result<Self, RecipeError> {
        let parse_error = |source| RecipeError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        };
        // First as it stands, for messages with line and column.
        let mut recipe: Self = toml::from_str(text).map_err(parse_error)?;
        if !overrides.is_empty() {
            let mut table: toml::Table = toml::from_str(text).map_err(parse_error)?;
            for change in overrides {
                change.apply(&mut table)?;
                // One at a time, so that an error is this override's.
                recipe = table
                    .clone()
                    .try_into()
                    .map_err(|source| RecipeError::OverrideValue {
                        key: change.key().to_owned(),
                        value: change.value().to_string(),
                        source: Box::new(source),
                    })?;
            }
        }
        // Before they are resolved: an empty path would become the directory that others start at.
        let mut complaints = recipe.empty_paths();
        recipe.make_paths_absolute(&root_of(path));
        complaints.extend(recipe.complaints());
        if complaints.is_empty() {
            Ok(recipe)
        } else {
            Err(RecipeError::Senseless {
                path: path.to_owned(),
                complaints,
            })
        }
    }

    fn make_paths_absolute(&mut self, root: &Path) {
        let resolve = |path: &mut PathBuf| *path = root.join(&*path);
        resolve(&mut self.base.path);
        resolve(&mut self.ingest.source);
        self.embed_text
            .public_embeddings
            .iter_mut()
            .for_each(resolve);
        self.sample.prompts_file.iter_mut().for_each(resolve);
        self.evaluate.held_out.iter_mut().for_each(resolve);
        self.sample
            .loras
            .iter_mut()
            .for_each(|lora| resolve(&mut lora.path));
    }
}

/// The directory at which a recipe's relative paths start.
fn root_of(recipe: &Path) -> PathBuf {
    // Without a current directory every relative path is lost anyway; what is given then stands.
    let recipe = std::path::absolute(recipe).unwrap_or_else(|_| recipe.to_owned());
    let dir = recipe.parent().unwrap_or(Path::new("/"));
    if dir.file_name().is_some_and(|name| name == "configs") {
        dir.parent().unwrap_or(dir).to_owned()
    } else {
        dir.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEMO: &str = include_str!("../../../../configs/demo.toml");

    fn load(text: &str, overrides: &[&str]) -> Result<Recipe, RecipeError> {
        let overrides: Vec<Override> = overrides
            .iter()
            .map(|text| text.parse().expect("an override"))
            .collect();
        Recipe::parse(text, Path::new("/w/configs/demo.toml"), &overrides)
    }

    /// What a person reads when the recipe is refused: the message and its causes.
    fn refusal(text: &str, overrides: &[&str]) -> String {
        let error = load(text, overrides).expect_err("refused");
        crate::Failure::from(error).messages().join(": ")
    }

    #[test]
    fn every_shipped_recipe_makes_sense() {
        for text in [
            DEMO,
            include_str!("../../../../configs/flux-dev-pixel-art.toml"),
            include_str!("../../../../configs/compat.toml"),
        ] {
            load(text, &[]).expect("a shipped recipe loads");
        }
    }

    #[test]
    fn paths_start_at_the_directory_that_holds_configs() {
        let recipe = load(DEMO, &["ingest.source=\"pictures\""]).expect("loads");
        assert_eq!(recipe.ingest.source, Path::new("/w/pictures"));
        let elsewhere = Recipe::parse(
            DEMO,
            Path::new("/w/mine/demo.toml"),
            &["ingest.source='/abs'".parse().expect("an override")],
        )
        .expect("loads");
        assert_eq!(elsewhere.ingest.source, Path::new("/abs"));
        assert!(elsewhere.base.path.starts_with("/w/mine"));
    }

    #[test]
    fn an_unknown_field_is_named_with_its_line() {
        let text = DEMO.replacen("[train]", "[train]\nlerning_rate = 1e-4", 1);
        let error = refusal(&text, &[]);
        assert!(error.contains("lerning_rate"), "{error}");
        assert!(error.contains("line"), "{error}");
    }

    #[test]
    fn a_missing_field_is_named() {
        let text: String = DEMO
            .lines()
            .filter(|line| !line.starts_with("beta2"))
            .map(|line| format!("{line}\n"))
            .collect();
        let error = refusal(&text, &[]);
        assert!(error.contains("beta2"), "{error}");
    }

    #[test]
    fn an_override_replaces_one_value() {
        let recipe = load(DEMO, &["train.steps=7", "train.precision=bf16"]).expect("loads");
        assert_eq!(recipe.train.steps, 7);
        assert_eq!(recipe.train.precision, crate::recipe::PrecisionChoice::Bf16);
    }

    #[test]
    fn an_override_of_no_field_names_the_nearest() {
        let error = load(DEMO, &["train.step=7"]).expect_err("refused");
        assert_eq!(error.help().as_deref(), Some("did you mean train.steps?"));
    }

    #[test]
    fn an_override_of_the_wrong_type_names_key_and_value() {
        let error = refusal(DEMO, &["train.steps=many"]);
        assert!(error.contains("train.steps cannot be \"many\""), "{error}");
    }

    #[test]
    fn a_negative_prompt_without_true_cfg_is_refused_with_the_reason() {
        let error = refusal(
            DEMO,
            &[
                "sample.negative_prompt=\"blurry\"",
                "sample.true_cfg_scale=1.0",
            ],
        );
        assert!(error.contains("sample.negative_prompt"), "{error}");
        assert!(error.contains("true_cfg_scale"), "{error}");
    }
}
