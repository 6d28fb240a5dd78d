//! Whether a recipe makes sense: each field alone, and fields that contradict each other.
//!
//! A setting that would silently have no effect is refused like one that cannot work.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use crate::recipe::{
    CacheLatentsRecipe, Crop, EmbedTextRecipe, EvaluateRecipe, IngestRecipe, Recipe, SampleRecipe,
    Schedule, TrainRecipe,
};

/// Longest side of a picture, in pixels: 16384×16384 is also the largest that `evaluate` reads back.
const MAX_SIDE_PX: u32 = 1 << 14;

/// Most T5 tokens of a text: T5 compares each with each, so that more would take its memory and not its words.
const MAX_T5_TOKENS: usize = 1 << 13;

/// A field and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Complaint {
    /// The dotted key.
    pub key: &'static str,
    /// The problem, with the value found.
    pub problem: String,
}

impl fmt::Display for Complaint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}", self.key, self.problem)
    }
}

#[derive(Default)]
struct Complaints(Vec<Complaint>);

impl Complaints {
    fn unless(&mut self, holds: bool, key: &'static str, problem: impl Into<String>) {
        if !holds {
            self.0.push(Complaint {
                key,
                problem: problem.into(),
            });
        }
    }

    fn at_least(&mut self, key: &'static str, value: u64, least: u64) {
        self.unless(
            value >= least,
            key,
            format!("is {value}; at least {least} is needed"),
        );
    }

    fn side_px(&mut self, key: &'static str, value: u32) {
        self.at_least(key, value.into(), 1);
        self.unless(
            value <= MAX_SIDE_PX,
            key,
            format!("is {value}; at most {MAX_SIDE_PX} pixels are possible"),
        );
    }

    /// The closing token has to have a place beside one of the text.
    fn t5_tokens(&mut self, key: &'static str, value: usize) {
        self.at_least(key, value as u64, 2);
        self.unless(
            value <= MAX_T5_TOKENS,
            key,
            format!(
                "is {value}; at most {MAX_T5_TOKENS} are possible (FLUX.1 was trained with 512)"
            ),
        );
    }

    fn filled(&mut self, key: &'static str, path: &Path, problem: &str) {
        let is_empty = path.to_string_lossy().trim().is_empty();
        self.unless(!is_empty, key, problem);
    }

    /// Also refuses NaN and infinity, which TOML can write.
    fn positive(&mut self, key: &'static str, value: f64) {
        self.unless(
            value.is_finite() && value > 0.0,
            key,
            format!("is {value}; it must be a number above 0"),
        );
    }

    fn not_negative(&mut self, key: &'static str, value: f64) {
        self.unless(
            value.is_finite() && value >= 0.0,
            key,
            format!("is {value}; it must be a number, 0 or more"),
        );
    }

    fn finite(&mut self, key: &'static str, value: f64) {
        self.unless(
            value.is_finite(),
            key,
            format!("is {value}; it must be a number"),
        );
    }

    fn named(&mut self, key: &'static str, text: &str) {
        self.unless(!text.trim().is_empty(), key, "is empty");
    }
}

impl Recipe {
    /// The paths that must be there and are empty; to be asked while they are as the recipe writes them.
    pub(super) fn empty_paths(&self) -> Vec<Complaint> {
        let mut complaints = Complaints::default();
        complaints.filled("base.path", &self.base.path, "is empty");
        complaints.filled("ingest.source", &self.ingest.source, "is empty");
        for lora in &self.sample.loras {
            complaints.filled(
                "sample.loras",
                &lora.path,
                "holds a LoRA whose path is empty",
            );
        }
        complaints.0
    }

    /// Everything else that is wrong with the values; empty for a recipe that makes sense.
    pub(super) fn complaints(&self) -> Vec<Complaint> {
        let mut complaints = Complaints::default();
        complaints.named("name", &self.name);
        ingest(&mut complaints, &self.ingest);
        embed_text(&mut complaints, &self.embed_text);
        cache_latents(&mut complaints, &self.cache_latents);
        train(&mut complaints, &self.train);
        sample(&mut complaints, &self.sample);
        evaluate(&mut complaints, &self.evaluate);
        complaints.0
    }
}

fn ingest(complaints: &mut Complaints, recipe: &IngestRecipe) {
    complaints.named("ingest.caption_column", &recipe.caption_column);
    complaints.named("ingest.image_column", &recipe.image_column);
    complaints.at_least("ingest.max_pixels", recipe.max_pixels, 1);
}

fn embed_text(complaints: &mut Complaints, recipe: &EmbedTextRecipe) {
    // One position is the end mark; a text needs another.
    complaints.t5_tokens("embed_text.t5_tokens", recipe.t5_tokens);
}

fn cache_latents(complaints: &mut Complaints, recipe: &CacheLatentsRecipe) {
    complaints.side_px("cache_latents.resolution_px", recipe.resolution_px);
    complaints.at_least("cache_latents.views", recipe.views.into(), 1);
    let probability = recipe.flip_probability;
    complaints.unless(
        (0.0..=1.0).contains(&probability),
        "cache_latents.flip_probability",
        format!("is {probability}; a probability is between 0 and 1"),
    );
    complaints.unless(
        recipe.views == 1 || recipe.crop == Crop::Random || (probability > 0.0 && probability < 1.0),
        "cache_latents.views",
        format!(
            "is {}, but with a center crop and flip probability {probability} all views of an image are the same",
            recipe.views
        ),
    );
}

fn train(complaints: &mut Complaints, recipe: &TrainRecipe) {
    complaints.at_least("train.steps", recipe.steps.into(), 1);
    complaints.at_least("train.micro_batch", recipe.micro_batch.into(), 1);
    complaints.at_least("train.accumulation", recipe.accumulation.into(), 1);
    complaints.positive("train.learning_rate", recipe.learning_rate);
    complaints.unless(
        recipe.warmup_steps <= recipe.steps,
        "train.warmup_steps",
        format!(
            "is {}, more than train.steps ({})",
            recipe.warmup_steps, recipe.steps
        ),
    );
    complaints.unless(
        recipe.schedule != Schedule::Constant || recipe.warmup_steps == 0,
        "train.warmup_steps",
        format!(
            "is {}, but the constant schedule has no warm-up: write 0, or schedule = \"constant-with-warmup\"",
            recipe.warmup_steps
        ),
    );
    complaints.at_least("train.schedule_cycles", recipe.schedule_cycles.into(), 1);
    complaints.positive("train.schedule_power", recipe.schedule_power);
    for (key, beta) in [("train.beta1", recipe.beta1), ("train.beta2", recipe.beta2)] {
        complaints.unless(
            (0.0..1.0).contains(&beta),
            key,
            format!("is {beta}; a decay is at least 0 and below 1"),
        );
    }
    complaints.positive("train.epsilon", recipe.epsilon);
    complaints.not_negative("train.weight_decay", recipe.weight_decay);
    complaints.positive("train.max_grad_norm", recipe.max_grad_norm);
    complaints.positive("train.initial_loss_scale", recipe.initial_loss_scale);
    complaints.at_least(
        "train.loss_scale_growth_interval",
        recipe.loss_scale_growth_interval.into(),
        1,
    );
    complaints.at_least("train.rank", recipe.rank as u64, 1);
    complaints.positive("train.alpha", recipe.alpha);
    complaints.unless(
        !recipe.targets.is_empty(),
        "train.targets",
        "is empty: nothing would be trained",
    );
    complaints.unless(
        distinct(&recipe.targets),
        "train.targets",
        "names a module twice",
    );
    complaints.unless(
        recipe
            .targets
            .iter()
            .all(|target| !target.trim().is_empty()),
        "train.targets",
        "holds an empty name, which would match every module",
    );
    complaints.not_negative("train.guidance", recipe.guidance);
    complaints.finite("train.logit_mean", recipe.logit_mean);
    complaints.positive("train.logit_std", recipe.logit_std);
    complaints.finite("train.mode_scale", recipe.mode_scale);
    complaints.at_least("train.checkpoint_every", recipe.checkpoint_every.into(), 1);
    complaints.at_least("train.keep_checkpoints", recipe.keep_checkpoints.into(), 1);
}

fn sample(complaints: &mut Complaints, recipe: &SampleRecipe) {
    complaints.unless(
        !recipe.prompts.is_empty() || recipe.prompts_file.is_some(),
        "sample.prompts",
        "is empty and there is no sample.prompts_file: nothing would be drawn",
    );
    complaints.unless(
        recipe.true_cfg_scale.is_finite() && recipe.true_cfg_scale >= 1.0,
        "sample.true_cfg_scale",
        format!("is {}; 1 is off, more is stronger", recipe.true_cfg_scale),
    );
    complaints.unless(
        recipe.negative_prompt.is_empty() || recipe.true_cfg_scale > 1.0,
        "sample.negative_prompt",
        format!(
            "is {:?}, but a negative prompt only acts through true classifier-free guidance and sample.true_cfg_scale \
             is {}, which is off (guidance {} is the distilled embedding and knows no negative prompt): raise \
             true_cfg_scale above 1, which draws two branches per step, or empty the negative prompt",
            recipe.negative_prompt, recipe.true_cfg_scale, recipe.guidance
        ),
    );
    complaints.not_negative("sample.guidance", recipe.guidance);
    complaints.at_least("sample.steps", recipe.steps.into(), 1);
    complaints.unless(
        !recipe.seeds.is_empty(),
        "sample.seeds",
        "is empty: nothing would be drawn",
    );
    complaints.unless(
        distinct(&recipe.seeds),
        "sample.seeds",
        "names a seed twice: the same picture would be drawn twice",
    );
    complaints.at_least(
        "sample.images_per_prompt",
        recipe.images_per_prompt.into(),
        1,
    );
    complaints.side_px("sample.width_px", recipe.width_px);
    complaints.side_px("sample.height_px", recipe.height_px);
    complaints.t5_tokens("sample.t5_tokens", recipe.t5_tokens);
    complaints.finite("sample.lora_scale", recipe.lora_scale);
    for lora in &recipe.loras {
        complaints.finite("sample.loras", lora.scale);
    }
    complaints.unless(
        !recipe.compare_with_base || recipe.use_trained_lora || !recipe.loras.is_empty(),
        "sample.compare_with_base",
        "is true, but no LoRA is applied: the same pictures would be drawn twice",
    );
    complaints.at_least("sample.sheet_columns", recipe.sheet_columns.into(), 1);
    complaints.at_least("sample.sheet_magnify", recipe.sheet_magnify.into(), 1);
    let side_px = recipe.width_px.max(recipe.height_px);
    complaints.unless(
        // A side that is too long itself has been complained about.
        side_px > MAX_SIDE_PX
            || u64::from(side_px) * u64::from(recipe.sheet_magnify) <= u64::from(MAX_SIDE_PX),
        "sample.sheet_magnify",
        format!(
            "is {}; a picture of {}×{} magnified so often has a side of more than {MAX_SIDE_PX} pixels",
            recipe.sheet_magnify, recipe.width_px, recipe.height_px
        ),
    );
}

fn evaluate(complaints: &mut Complaints, recipe: &EvaluateRecipe) {
    complaints.unless(
        recipe.held_out.is_none() || !recipe.sigmas.is_empty(),
        "evaluate.sigmas",
        "is empty: no loss of the held-out pictures could be measured",
    );
    for sigma in &recipe.sigmas {
        complaints.unless(
            *sigma > 0.0 && *sigma <= 1.0,
            "evaluate.sigmas",
            format!("holds {sigma}; a noise level is above 0 and at most 1"),
        );
    }
    let mut sigmas = recipe.sigmas.clone();
    sigmas.sort_by(f64::total_cmp);
    sigmas.dedup();
    complaints.unless(
        sigmas.len() == recipe.sigmas.len(),
        "evaluate.sigmas",
        "names a noise level twice",
    );
    complaints.at_least("evaluate.draws", recipe.draws.into(), 1);
    complaints.at_least("evaluate.resamples", recipe.resamples.into(), 1);
    complaints.at_least("evaluate.permutations", recipe.permutations.into(), 1);
    let share = recipe.visible_share;
    complaints.unless(
        share > 0.0 && share <= 1.0,
        "evaluate.visible_share",
        format!("is {share}; a share is above 0 and at most 1"),
    );
    let mut named: BTreeSet<&str> = BTreeSet::new();
    for (key, words) in [
        ("evaluate.head_words", &recipe.head_words),
        ("evaluate.torso_words", &recipe.torso_words),
        ("evaluate.legs_words", &recipe.legs_words),
        ("evaluate.feet_words", &recipe.feet_words),
    ] {
        for word in words {
            let is_word = !word.is_empty() && word.chars().all(|c| c.is_lowercase() || c == '-');
            complaints.unless(
                is_word,
                key,
                format!("holds {word:?}; single lower-case words are compared"),
            );
            complaints.unless(
                named.insert(word),
                key,
                format!("holds {word:?}, which is named already"),
            );
        }
    }
}

fn distinct<T: Ord>(values: &[T]) -> bool {
    values.iter().collect::<BTreeSet<_>>().len() == values.len()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::recipe::{Recipe, RecipeError};

    fn complaint_keys(overrides: &[&str]) -> Vec<&'static str> {
        let overrides: Vec<_> = overrides
            .iter()
            .map(|text| text.parse().expect("an override"))
            .collect();
        let demo = include_str!("../../../../configs/demo.toml");
        match Recipe::parse(demo, Path::new("/w/configs/demo.toml"), &overrides) {
            Ok(_) => vec![],
            Err(RecipeError::Senseless { complaints, .. }) => {
                complaints.iter().map(|complaint| complaint.key).collect()
            }
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn a_number_that_is_none_is_refused() {
        assert_eq!(
            complaint_keys(&["train.learning_rate=nan"]),
            ["train.learning_rate"]
        );
        assert_eq!(complaint_keys(&["train.epsilon=inf"]), ["train.epsilon"]);
        assert_eq!(
            complaint_keys(&["cache_latents.flip_probability=1.5"]),
            ["cache_latents.flip_probability"]
        );
    }

    #[test]
    fn a_setting_without_effect_is_refused() {
        assert_eq!(
            complaint_keys(&["train.schedule=constant", "train.warmup_steps=1"]),
            ["train.warmup_steps"]
        );
        assert_eq!(
            complaint_keys(&[
                "cache_latents.views=2",
                "cache_latents.crop=center",
                "cache_latents.flip_probability=0.0"
            ]),
            ["cache_latents.views"]
        );
    }

    #[test]
    fn a_comparison_needs_something_to_compare() {
        let changes = [
            "sample.compare_with_base=true",
            "sample.use_trained_lora=false",
        ];
        assert_eq!(complaint_keys(&changes), ["sample.compare_with_base"]);
    }

    #[test]
    fn noise_levels_and_words_of_the_evaluation_are_checked() {
        assert_eq!(
            complaint_keys(&["evaluate.sigmas=[0.5, 0.0]"]),
            ["evaluate.sigmas"]
        );
        assert_eq!(
            complaint_keys(&["evaluate.sigmas=[0.5, 0.5]"]),
            ["evaluate.sigmas"]
        );
        assert_eq!(complaint_keys(&["evaluate.sigmas=[]"]), ["evaluate.sigmas"]);
        assert_eq!(
            complaint_keys(&["evaluate.sigmas=[]", "evaluate.held_out=\"\""]),
            Vec::<&str>::new()
        );
        assert_eq!(
            complaint_keys(&[
                "evaluate.head_words=[\"hair\"]",
                "evaluate.feet_words=[\"hair\"]"
            ]),
            ["evaluate.feet_words"]
        );
        assert_eq!(
            complaint_keys(&["evaluate.head_words=[\"Wizard hat\"]"]),
            ["evaluate.head_words"]
        );
    }

    #[test]
    fn an_empty_path_is_refused_and_not_taken_for_the_directory_of_the_recipe() {
        assert_eq!(complaint_keys(&["ingest.source="]), ["ingest.source"]);
        assert_eq!(complaint_keys(&["base.path=\"\""]), ["base.path"]);
        assert_eq!(
            complaint_keys(&["sample.loras=[{path=\"\", scale=1.0}]"]),
            ["sample.loras"]
        );
        assert_eq!(complaint_keys(&["ingest.source=."]), Vec::<&str>::new());
    }

    #[test]
    fn texts_of_too_many_or_too_few_tokens_are_refused() {
        for key in ["embed_text.t5_tokens", "sample.t5_tokens"] {
            for (tokens, refused) in [(1, true), (2, false), (8192, false), (8193, true)] {
                let keys = complaint_keys(&[&format!("{key}={tokens}")]);
                assert_eq!(keys.contains(&key), refused, "{key}={tokens}");
            }
        }
    }

    #[test]
    fn a_picture_larger_than_any_is_refused() {
        let most = [
            "sample.width_px=16384",
            "sample.height_px=16384",
            "sample.sheet_magnify=1",
        ];
        assert_eq!(complaint_keys(&most), Vec::<&str>::new());
        assert_eq!(
            complaint_keys(&["sample.width_px=4294967295"]),
            ["sample.width_px"]
        );
        assert_eq!(
            complaint_keys(&["sample.height_px=16385"]),
            ["sample.height_px"]
        );
        assert_eq!(
            complaint_keys(&["cache_latents.resolution_px=4294967295"]),
            ["cache_latents.resolution_px"]
        );
        assert_eq!(
            complaint_keys(&["sample.sheet_magnify=4294967295"]),
            ["sample.sheet_magnify"]
        );
    }

    #[test]
    fn all_complaints_are_listed_at_once() {
        assert_eq!(
            complaint_keys(&["train.steps=0", "train.targets=[]", "sample.seeds=[]"]),
            ["train.steps", "train.targets", "sample.seeds"]
        );
    }
}
