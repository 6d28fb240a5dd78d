//! The section of a recipe that this crate's tests start from.

use pipeline::recipe::{BaseFormat, LongText, PrecisionChoice, SampleRecipe};

/// One prompt, one seed, one picture, everything else off.
pub(crate) fn recipe() -> SampleRecipe {
    SampleRecipe {
        prompts: vec!["a knight".into()],
        prompts_file: None,
        negative_prompt: String::new(),
        true_cfg_scale: 1.0,
        guidance: 3.5,
        steps: 2,
        seeds: vec![0],
        images_per_prompt: 1,
        width_px: 32,
        height_px: 32,
        t5_tokens: 16,
        long_prompts: LongText::Stop,
        precision: PrecisionChoice::F32,
        base_format: BaseFormat::Plain,
        use_trained_lora: false,
        lora_scale: 1.0,
        loras: vec![],
        compare_with_base: false,
        sheet_columns: 4,
        sheet_magnify: 1,
    }
}
