//! Whether a pretraining recipe makes sense: each value alone, and values that contradict each other.
//!
//! What is refused would end as a panic, as an allocation that no machine can make, as a loss that is no number, or as
//! a base that has learned nothing. Counts in `evaluate` are limits to what there is, so any will do.

use random_base::Preset;

use crate::PretrainError;
use crate::recipe::{
    AutoencoderRecipe, BaseRecipe, CorpusRecipe, EvaluateRecipe, OptimizerRecipe, PretrainRecipe,
    RefineRecipe,
};

/// Longest side of a picture in pixels, as in a recipe of the pipeline.
const MAX_SIDE_PX: u64 = 1 << 14;

/// The transformer's patches of 2×2 latent cells, times the largest factor of a preset's autoencoder.
const SIDE_STEP_PX: u32 = 16;

/// Most pixels of pictures that lie in memory at once: three channels of `f32` are 768 GiB, more than a device has.
const MAX_PIXELS: u64 = 1 << 36;

/// Most T5 tokens of a text, as in a recipe of the pipeline.
const MAX_T5_TOKENS: u64 = 1 << 13;

/// Most made-up textures: 350 times what the shipped base has seen.
const MAX_TEXTURES: u64 = 1 << 20;

/// Most versions of a picture: 170 times what the shipped base has seen. Each lies on the device.
const MAX_VARIANTS: u64 = 1 << 10;

/// Largest batch: 500 times the shipped base's.
const MAX_BATCH: u64 = 1 << 16;

/// Most steps of a phase: they are the exponents of AdamW's corrections, which are `i32`.
const MAX_STEPS: u64 = i32::MAX as u64;

/// Most denoising steps: ten for each of the 1000 noise levels that diffusers' scheduler tells apart.
const MAX_SAMPLE_STEPS: u64 = 10_000;

/// Largest guidance: 30 times the shipped base's.
const MAX_TRUE_CFG_SCALE: f64 = 100.0;

/// Largest weight of a part of a loss: beyond it `f32` keeps nothing of the other parts.
const MAX_LOSS_WEIGHT: f64 = 1e6;

/// Largest norm to clip at, which in effect clips nothing.
const MAX_GRAD_NORM: f64 = 1e9;

/// Bound of what is said in logits, the shift included: `sigmoid(±10)` is within 5e-5 of 0 and 1. Shifts beyond −36 or
/// 709 would make noise levels infinite or no numbers.
const MAX_LOGIT: f64 = 10.0;

impl PretrainRecipe {
    /// Refuses what cannot be.
    ///
    /// # Errors
    ///
    /// [`PretrainError::Field`] at the first such field, in the order of the recipe.
    pub fn check(&self) -> Result<(), PretrainError> {
        named("name", &self.name)?;
        unless(
            self.preset.parse::<Preset>().is_ok(),
            "preset",
            format!("{:?}", self.preset),
            "one of `demo`, `small`, `tiny`",
        )?;
        corpus(&self.corpus)?;
        let resolution_px = self.corpus.resolution_px;
        autoencoder(&self.autoencoder, resolution_px)?;
        base(&self.base, resolution_px)?;
        refine(&self.refine, resolution_px)?;
        evaluate(&self.evaluate)
    }

    /// Refuses paths that must be there and are empty; to be asked while they are as the recipe writes them.
    ///
    /// # Errors
    ///
    /// [`PretrainError::Field`] at the first such field.
    pub(super) fn check_paths(&self) -> Result<(), PretrainError> {
        let CorpusRecipe {
            captioned,
            textures,
            ..
        } = &self.corpus;
        unless(
            !self.tokenizers.as_os_str().is_empty(),
            "tokenizers",
            "\"\"",
            "a directory",
        )?;
        unless(
            !captioned.is_empty(),
            "corpus.captioned",
            "[]",
            "at least one source",
        )?;
        for (key, sources) in [
            ("corpus.captioned", captioned),
            ("corpus.textures", textures),
        ] {
            unless(
                sources.iter().all(|path| !path.as_os_str().is_empty()),
                key,
                format!("{sources:?}"),
                "paths of sources, none of them empty",
            )?;
        }
        Ok(())
    }
}

fn corpus(recipe: &CorpusRecipe) -> Result<(), PretrainError> {
    let side_px = recipe.resolution_px;
    unless(
        side_px > 0 && side_px.is_multiple_of(SIDE_STEP_PX) && u64::from(side_px) <= MAX_SIDE_PX,
        "corpus.resolution_px",
        side_px.to_string(),
        format!("a multiple of {SIDE_STEP_PX} from {SIDE_STEP_PX} to {MAX_SIDE_PX}"),
    )?;
    pictures(
        "corpus.synthetic_textures",
        recipe.synthetic_textures,
        [0, MAX_TEXTURES],
        side_px,
    )?;
    named("corpus.image_column", &recipe.image_column)?;
    named("corpus.caption_column", &recipe.caption_column)?;
    unless(
        (0.0..1.0).contains(&recipe.held_out_share),
        "corpus.held_out_share",
        format!("{:?}", recipe.held_out_share),
        "a number of at least 0 and below 1",
    )?;
    variants("corpus.variants", recipe.variants)
}

fn autoencoder(recipe: &AutoencoderRecipe, resolution_px: u32) -> Result<(), PretrainError> {
    for (key, weight) in [
        ("autoencoder.gradient_weight", recipe.gradient_weight),
        ("autoencoder.cell_weight", recipe.cell_weight),
        ("autoencoder.kl_weight", recipe.kl_weight),
    ] {
        number(key, weight, [0.0, MAX_LOSS_WEIGHT])?;
    }
    share("autoencoder.texture_share", recipe.texture_share)?;
    optimizer("autoencoder.optimizer", &recipe.optimizer, 1, resolution_px)?;
    optimizer("autoencoder.decoder", &recipe.decoder, 0, resolution_px)
}

fn base(recipe: &BaseRecipe, resolution_px: u32) -> Result<(), PretrainError> {
    // One position is the end mark; a text needs another.
    whole(
        "base.t5_tokens",
        recipe.t5_tokens as u64,
        [2, MAX_T5_TOKENS],
    )?;
    share("base.caption_dropout", recipe.caption_dropout)?;
    share("base.original_share", recipe.original_share)?;
    number(
        "base.logit_mean",
        recipe.logit_mean,
        [-MAX_LOGIT, MAX_LOGIT],
    )?;
    above_zero("base.logit_std", recipe.logit_std, MAX_LOGIT)?;
    number("base.shift_mu", recipe.shift_mu, [-MAX_LOGIT, MAX_LOGIT])?;
    optimizer("base.optimizer", &recipe.optimizer, 1, resolution_px)
}

fn refine(recipe: &RefineRecipe, resolution_px: u32) -> Result<(), PretrainError> {
    variants("refine.variants", recipe.variants)?;
    share("refine.original_share", recipe.original_share)?;
    optimizer("refine.optimizer", &recipe.optimizer, 0, resolution_px)
}

fn evaluate(recipe: &EvaluateRecipe) -> Result<(), PretrainError> {
    whole(
        "evaluate.sample_steps",
        recipe.sample_steps as u64,
        [1, MAX_SAMPLE_STEPS],
    )?;
    // 1 is off.
    number(
        "evaluate.true_cfg_scale",
        recipe.true_cfg_scale,
        [1.0, MAX_TRUE_CFG_SCALE],
    )
}

/// An optimiser under the key `section`, of a phase that must take `least_steps`.
fn optimizer(
    section: &str,
    recipe: &OptimizerRecipe,
    least_steps: u64,
    resolution_px: u32,
) -> Result<(), PretrainError> {
    let key = |field: &str| format!("{section}.{field}");
    let steps = recipe.steps;
    whole(&key("steps"), steps, [least_steps, MAX_STEPS])?;
    pictures(&key("batch"), recipe.batch, [1, MAX_BATCH], resolution_px)?;
    above_zero(&key("learning_rate"), recipe.learning_rate, 1.0)?;
    unless(
        steps == 0 || recipe.warmup_steps <= steps,
        &key("warmup_steps"),
        recipe.warmup_steps.to_string(),
        format!("at most the {steps} of `{}`", key("steps")),
    )?;
    share(&key("final_lr_share"), recipe.final_lr_share)?;
    for (field, beta) in [("beta1", recipe.beta1), ("beta2", recipe.beta2)] {
        unless(
            (0.0..1.0).contains(&beta),
            &key(field),
            format!("{beta:?}"),
            "a number of at least 0 and below 1",
        )?;
    }
    above_zero(&key("epsilon"), recipe.epsilon, 1.0)?;
    let decay = recipe.weight_decay;
    unless(
        decay >= 0.0 && recipe.learning_rate * decay <= 1.0,
        &key("weight_decay"),
        format!("{decay:?}"),
        format!(
            "a number from 0 to {:?}: times `{}` it is at most 1, all that a parameter has",
            1.0 / recipe.learning_rate,
            key("learning_rate")
        ),
    )?;
    above_zero(&key("max_grad_norm"), recipe.max_grad_norm, MAX_GRAD_NORM)?;
    share(&key("ema_decay"), recipe.ema_decay)?;
    unless(
        recipe.precision().is_some(),
        &key("precision"),
        format!("{:?}", recipe.precision),
        "\"f32\" or \"bf16\"",
    )?;
    for (field, every) in [
        ("checkpoint_every", recipe.checkpoint_every),
        ("log_every", recipe.log_every),
    ] {
        unless(every >= 1, &key(field), every.to_string(), "at least 1")?;
    }
    Ok(())
}

fn unless(
    holds: bool,
    key: &str,
    found: impl Into<String>,
    expected: impl Into<String>,
) -> Result<(), PretrainError> {
    if holds {
        return Ok(());
    }
    Err(PretrainError::Field {
        key: key.to_owned(),
        found: found.into(),
        expected: expected.into(),
    })
}

fn named(key: &str, text: &str) -> Result<(), PretrainError> {
    unless(
        !text.trim().is_empty(),
        key,
        format!("{text:?}"),
        "a name that is not empty",
    )
}

fn whole(key: &str, found: u64, [least, most]: [u64; 2]) -> Result<(), PretrainError> {
    unless(
        (least..=most).contains(&found),
        key,
        found.to_string(),
        format!("a whole number from {least} to {most}"),
    )
}

/// Pictures that lie in memory together: their pixels count too. The resolution is a checked one.
fn pictures(
    key: &str,
    found: usize,
    [least, most]: [u64; 2],
    resolution_px: u32,
) -> Result<(), PretrainError> {
    let fitting = MAX_PIXELS / u64::from(resolution_px).pow(2);
    unless(
        (least..=most.min(fitting)).contains(&(found as u64)),
        key,
        found.to_string(),
        format!(
            "a whole number from {least} to {} with pictures of {resolution_px}×{resolution_px} px",
            most.min(fitting)
        ),
    )
}

fn variants(key: &str, found: usize) -> Result<(), PretrainError> {
    whole(key, found as u64, [0, MAX_VARIANTS])
}

/// Also refuses NaN and infinity, which TOML can write.
fn number(key: &str, found: f64, [least, most]: [f64; 2]) -> Result<(), PretrainError> {
    unless(
        (least..=most).contains(&found),
        key,
        format!("{found:?}"),
        format!("a number from {least} to {most}"),
    )
}

fn share(key: &str, found: f64) -> Result<(), PretrainError> {
    number(key, found, [0.0, 1.0])
}

/// Also refuses what `f32`, which the phases compute in, rounds to 0.
fn above_zero(key: &str, found: f64, most: f64) -> Result<(), PretrainError> {
    unless(
        found as f32 > 0.0 && found <= most,
        key,
        format!("{found:?}"),
        format!("a number above 0, as `f32` has it, and at most {most}"),
    )
}

#[cfg(test)]
mod tests {
    use crate::PretrainRecipe;
    use crate::tests::tiny_recipe;

    const OPTIMIZERS: [&str; 4] = [
        "autoencoder.optimizer",
        "autoencoder.decoder",
        "base.optimizer",
        "refine.optimizer",
    ];

    /// `configs/pretrain-tiny.toml` with other values, each in TOML's syntax.
    fn tiny_with(changes: &[(&str, &str)]) -> PretrainRecipe {
        let mut recipe: toml::Table = include_str!("../../../../configs/pretrain-tiny.toml")
            .parse()
            .expect("a recipe is TOML");
        for &(key, value) in changes {
            let said: toml::Table = format!("value = {value}").parse().expect("a value is TOML");
            let (sections, field) = key.rsplit_once('.').unwrap_or(("", key));
            let mut table = &mut recipe;
            for section in sections.split('.').filter(|section| !section.is_empty()) {
                table = table
                    .get_mut(section)
                    .and_then(toml::Value::as_table_mut)
                    .expect("the recipe has the section");
            }
            let before = table.insert(field.to_owned(), said["value"].clone());
            assert!(before.is_some(), "the recipe has no {key}");
        }
        toml::Value::Table(recipe)
            .try_into()
            .expect("the value has the field's type")
    }

    fn assert_refused(key: &str, value: &str) {
        let text = match tiny_with(&[(key, value)]).check() {
            Ok(()) => panic!("{key} = {value} is taken"),
            Err(error) => error.to_string(),
        };
        assert!(
            text.contains(&format!("`{key}` is ")),
            "{key} = {value}: {text}"
        );
    }

    fn assert_taken(changes: &[(&str, &str)]) {
        let checked = tiny_with(changes).check();
        assert!(checked.is_ok(), "{changes:?}: {checked:?}");
    }

    #[test]
    fn a_value_that_cannot_be_is_refused_by_its_key() {
        for (key, value) in [
            ("name", "' '"),
            ("preset", "'huge'"),
            ("corpus.synthetic_textures", "100000000000000"),
            ("corpus.image_column", "''"),
            ("corpus.caption_column", "''"),
            ("corpus.resolution_px", "0"),
            ("corpus.resolution_px", "40"),
            ("corpus.resolution_px", "16400"),
            ("corpus.resolution_px", "2147483648"),
            ("corpus.held_out_share", "nan"),
            ("corpus.held_out_share", "1.0"),
            ("corpus.variants", "1025"),
            ("corpus.variants", "9223372036854775807"),
            ("autoencoder.gradient_weight", "-0.5"),
            ("autoencoder.cell_weight", "inf"),
            ("autoencoder.kl_weight", "nan"),
            ("autoencoder.texture_share", "1.5"),
            ("autoencoder.optimizer.steps", "0"),
            ("base.t5_tokens", "1"),
            ("base.t5_tokens", "8193"),
            ("base.t5_tokens", "100000000000"),
            ("base.caption_dropout", "-0.1"),
            ("base.original_share", "nan"),
            ("base.logit_mean", "-inf"),
            ("base.logit_std", "nan"),
            ("base.logit_std", "0.0"),
            ("base.shift_mu", "800.0"),
            ("base.optimizer.steps", "0"),
            ("refine.variants", "9223372036854775807"),
            ("refine.original_share", "2.0"),
            ("evaluate.sample_steps", "0"),
            ("evaluate.sample_steps", "1000000000000000"),
            ("evaluate.true_cfg_scale", "nan"),
            ("evaluate.true_cfg_scale", "0.5"),
        ] {
            assert_refused(key, value);
        }
    }

    #[test]
    fn a_value_of_an_optimiser_that_cannot_be_is_refused_by_its_section_and_key() {
        for section in OPTIMIZERS {
            for (field, value) in [
                ("steps", "2147483648"),
                ("batch", "0"),
                ("batch", "1000000000000000"),
                ("learning_rate", "nan"),
                ("learning_rate", "0.0"),
                ("learning_rate", "1e-50"),
                ("learning_rate", "2.0"),
                ("warmup_steps", "1000"),
                ("final_lr_share", "1.1"),
                ("beta1", "2.0"),
                ("beta2", "1.0"),
                ("beta2", "nan"),
                ("epsilon", "0.0"),
                ("epsilon", "inf"),
                ("weight_decay", "-0.01"),
                ("weight_decay", "nan"),
                ("weight_decay", "1000.0"),
                ("max_grad_norm", "-1.0"),
                ("max_grad_norm", "inf"),
                ("ema_decay", "nan"),
                ("ema_decay", "1.1"),
                ("precision", "'f8'"),
                ("checkpoint_every", "0"),
                ("log_every", "0"),
            ] {
                assert_refused(&format!("{section}.{field}"), value);
            }
        }
    }

    #[test]
    fn a_refusal_says_what_was_found_and_what_would_do() {
        let error = tiny_with(&[("autoencoder.optimizer.learning_rate", "nan")])
            .check()
            .expect_err("it is no number");
        assert_eq!(
            error.to_string(),
            "the recipe's `autoencoder.optimizer.learning_rate` is NaN; expected a number above 0, as `f32` has it, and \
             at most 1"
        );
    }

    #[test]
    fn two_phases_may_have_no_steps() {
        assert_taken(&[
            ("autoencoder.decoder.steps", "0"),
            ("refine.optimizer.steps", "0"),
        ]);
    }

    #[test]
    fn values_at_their_bounds_are_taken() {
        assert_taken(&[]);
        assert_taken(&[
            ("corpus.variants", "1024"),
            ("base.t5_tokens", "8192"),
            ("base.optimizer.steps", "2147483647"),
            ("base.optimizer.batch", "65536"),
            ("base.optimizer.warmup_steps", "0"),
            ("base.optimizer.beta1", "0.0"),
            ("base.optimizer.ema_decay", "1.0"),
            ("evaluate.true_cfg_scale", "1.0"),
        ]);
        assert!(tiny_recipe().check().is_ok());
    }

    #[test]
    fn large_pictures_leave_room_for_fewer() {
        let large = ("corpus.resolution_px", "16384");
        let textures = |number| ("corpus.synthetic_textures", number);
        assert_taken(&[large, textures("256")]);
        let error = tiny_with(&[large, textures("257")])
            .check()
            .expect_err("it is too much")
            .to_string();
        assert!(
            error.contains("from 0 to 256 with pictures of 16384×16384 px"),
            "{error}"
        );
    }

    #[test]
    fn an_empty_path_is_refused_and_not_taken_for_the_directory_of_the_recipe() {
        for (key, value) in [
            ("tokenizers", "''"),
            ("corpus.captioned", "[]"),
            ("corpus.captioned", "['data/characters', '']"),
            ("corpus.textures", "['']"),
        ] {
            let error = tiny_with(&[(key, value)])
                .check_paths()
                .expect_err("a path is empty")
                .to_string();
            assert!(error.contains(&format!("`{key}` is ")), "{error}");
        }
        assert!(tiny_with(&[]).check_paths().is_ok());
    }
}
