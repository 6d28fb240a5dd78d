//! Which pictures are drawn: prompts × seeds × pictures, in the order of their numbers, and what their files are called.

use std::path::{Path, PathBuf};

use pipeline::recipe::SampleRecipe;

/// Characters of a prompt that a file name keeps.
const SLUG_LENGTH: usize = 40;

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The file of prompts cannot be read.
    #[error("cannot read the prompts in {path}")]
    PromptsFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// There is nothing to draw.
    #[error("there is nothing to draw: sample.prompts is empty, and {path} holds no prompt")]
    NoPrompts {
        /// The file of prompts.
        path: PathBuf,
    },
}

/// One picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shot {
    /// Which prompt, counted from 0.
    pub prompt: usize,
    /// The seed.
    pub seed: u64,
    /// Number of the picture among those of one prompt and seed, from 0. Noise depends on the seed and on this.
    pub image: u32,
}

/// Every shot is drawn with the recipe's LoRAs (of which there may be none), and once more without them where the
/// recipe compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// With all LoRAs of the recipe.
    WithLoras,
    /// Without any, for comparison.
    BaseAlone,
}

/// All pictures of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Distinct positions, not distinct texts: a prompt that is listed twice is drawn twice.
    pub prompts: Vec<String>,
    /// The negative prompt, if true classifier-free guidance is on.
    pub negative_prompt: Option<String>,
    /// The pictures; a picture's place here is the number in its file's name.
    pub shots: Vec<Shot>,
}

impl Plan {
    /// Lists what `recipe` asks for. Its numbers, and whether the negative prompt has an effect, were checked when it
    /// was loaded.
    ///
    /// # Errors
    ///
    /// If the file of prompts cannot be read, or there is no prompt at all.
    pub fn new(recipe: &SampleRecipe) -> Result<Self, PlanError> {
        let mut prompts = recipe.prompts.clone();
        if let Some(path) = &recipe.prompts_file {
            prompts.extend(read_prompts(path)?);
            if prompts.is_empty() {
                return Err(PlanError::NoPrompts { path: path.clone() });
            }
        }
        let mut shots = Vec::new();
        for prompt in 0..prompts.len() {
            for &seed in &recipe.seeds {
                for image in 0..recipe.images_per_prompt {
                    shots.push(Shot {
                        prompt,
                        seed,
                        image,
                    });
                }
            }
        }
        Ok(Self {
            prompts,
            negative_prompt: (recipe.true_cfg_scale > 1.0).then(|| recipe.negative_prompt.clone()),
            shots,
        })
    }

    /// The file of picture number `index`: `0000-<prompt>-s<seed>.png`, and `…-base.png` without LoRAs.
    pub fn file_name(&self, index: usize, pass: Pass) -> String {
        let shot = self.shots[index];
        let slug = slug(&self.prompts[shot.prompt]);
        let suffix = match pass {
            Pass::WithLoras => "",
            Pass::BaseAlone => "-base",
        };
        format!("{index:04}-{slug}-s{}{suffix}.png", shot.seed)
    }

    /// Every text that must be encoded, each once: the prompts, then the negative prompt.
    pub fn texts(&self) -> Vec<&str> {
        let mut texts: Vec<&str> = Vec::new();
        for text in self.prompts.iter().chain(&self.negative_prompt) {
            if !texts.contains(&text.as_str()) {
                texts.push(text);
            }
        }
        texts
    }
}

/// One prompt a line; blank lines and white space around prompts do not count.
fn read_prompts(path: &Path) -> Result<Vec<String>, PlanError> {
    let text = fs_err::read_to_string(path).map_err(|source| PlanError::PromptsFile {
        path: path.to_owned(),
        source,
    })?;
    Ok(text
        .trim_start_matches('\u{feff}')
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .map(str::to_owned)
        .collect())
}

/// The beginning of a prompt as lower-case words with hyphens, safe in a file name everywhere.
fn slug(prompt: &str) -> String {
    let mut slug = String::new();
    for c in prompt.chars().flat_map(char::to_lowercase) {
        if c.is_ascii_alphanumeric() {
            slug.push(c);
        } else if !slug.is_empty() && !slug.ends_with('-') {
            slug.push('-');
        }
        if slug.len() >= SLUG_LENGTH {
            break;
        }
    }
    let slug = slug.trim_end_matches('-');
    if slug.is_empty() { "prompt" } else { slug }.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_recipe::recipe;

    #[test]
    fn pictures_go_prompt_by_prompt_then_seed_by_seed() {
        let recipe = SampleRecipe {
            prompts: vec!["a".into(), "b".into()],
            seeds: vec![5, 3],
            images_per_prompt: 2,
            ..recipe()
        };
        let plan = Plan::new(&recipe).expect("valid");
        let shots: Vec<_> = plan
            .shots
            .iter()
            .map(|s| (s.prompt, s.seed, s.image))
            .collect();
        assert_eq!(
            shots[..5],
            [(0, 5, 0), (0, 5, 1), (0, 3, 0), (0, 3, 1), (1, 5, 0)]
        );
        assert_eq!(plan.file_name(4, Pass::WithLoras), "0004-b-s5.png");
        assert_eq!(plan.file_name(4, Pass::BaseAlone), "0004-b-s5-base.png");
    }

    #[test]
    fn prompts_of_the_file_follow_those_of_the_recipe() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("prompts.txt");
        fs_err::write(&path, "\u{feff}an orc\r\n\n  a mage \n").expect("written");
        let recipe = SampleRecipe {
            prompts: vec!["a knight".into()],
            prompts_file: Some(path),
            ..recipe()
        };
        let plan = Plan::new(&recipe).expect("valid");
        assert_eq!(plan.prompts, ["a knight", "an orc", "a mage"]);
    }

    #[test]
    fn a_missing_file_of_prompts_is_named() {
        let recipe = SampleRecipe {
            prompts_file: Some("nowhere/prompts.txt".into()),
            ..recipe()
        };
        let error = Plan::new(&recipe).expect_err("no such file").to_string();
        assert!(error.contains("nowhere/prompts.txt"), "{error}");
    }

    #[test]
    fn true_cfg_without_a_negative_prompt_uses_the_empty_one() {
        let recipe = SampleRecipe {
            true_cfg_scale: 2.0,
            ..recipe()
        };
        let plan = Plan::new(&recipe).expect("valid");
        assert_eq!(plan.negative_prompt.as_deref(), Some(""));
        assert_eq!(plan.texts(), ["a knight", ""]);
    }

    #[test]
    fn an_empty_file_of_prompts_alone_is_nothing_to_draw() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("prompts.txt");
        fs_err::write(&path, "\n \n").expect("written");
        let recipe = SampleRecipe {
            prompts: vec![],
            prompts_file: Some(path),
            ..recipe()
        };
        let error = Plan::new(&recipe).expect_err("no prompt").to_string();
        assert!(error.contains("prompts.txt"), "{error}");
    }

    #[test]
    fn a_file_name_keeps_the_words_of_its_prompt() {
        assert_eq!(slug("Pixel art, RED hair!"), "pixel-art-red-hair");
        assert_eq!(slug("../../etc/passwd"), "etc-passwd");
        assert_eq!(slug("騎士"), "prompt");
        assert_eq!(slug(&"ab ".repeat(40)).len(), SLUG_LENGTH);
    }
}
