//! The section of a recipe that this crate's tests start from.

use pipeline::recipe::EvaluateRecipe;

/// Nothing held out, four words, as many permutations as a test can wait for.
pub(crate) fn recipe() -> EvaluateRecipe {
    EvaluateRecipe {
        held_out: None,
        sigmas: vec![0.5],
        draws: 1,
        seed: 0,
        resamples: 400,
        permutations: 999,
        visible_share: 0.15,
        head_words: vec!["hair".into()],
        torso_words: vec!["robe".into()],
        legs_words: vec!["pants".into()],
        feet_words: vec!["boots".into()],
    }
}
