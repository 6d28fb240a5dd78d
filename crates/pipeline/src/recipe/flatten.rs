//! A recipe's section as the named values that decide a stage's result.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::recipe::Recipe;
use crate::stage::Stage;

/// Fields that hold paths: where something lies decides nothing, what lies there is digested apart.
const PATHS: [&str; 5] = [
    "source",
    "public_embeddings",
    "prompts_file",
    "path",
    "held_out",
];

/// Fields of other stages' sections that `evaluate` reads of what was drawn: whether a LoRA had a part in it.
const READ_OF_DRAWN: [&str; 2] = ["recipe.sample.use_trained_lora", "recipe.sample.loras"];

/// Fields of other stages' sections that `evaluate` reads where pictures are held out: how a real sprite is shown, and
/// how the loss is computed.
const READ_WITH_HELD_OUT: [&str; 6] = [
    "recipe.cache_latents.background",
    "recipe.cache_latents.resolution_px",
    "recipe.cache_latents.scaling",
    "recipe.train.base_format",
    "recipe.train.guidance",
    "recipe.train.precision",
];

impl Recipe {
    /// Everything in the recipe that decides the stage's result: its section, e.g. `recipe.train.learning_rate` → `0.0001`,
    /// without paths, and for `evaluate` the fields of other sections that it reads. Values are JSON.
    pub fn flattened(&self, stage: Stage) -> BTreeMap<String, String> {
        let mut flat = self.section(stage);
        if stage == Stage::Evaluate {
            let mut read: Vec<&str> = READ_OF_DRAWN.to_vec();
            if self.evaluate.held_out.is_some() {
                read.extend(READ_WITH_HELD_OUT);
            }
            let is_read = |key: &str| {
                read.iter().any(|field| {
                    key.strip_prefix(field)
                        .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
                })
            };
            for other in [Stage::CacheLatents, Stage::Train, Stage::Sample] {
                let fields = self.section(other).into_iter();
                flat.extend(fields.filter(|(key, _)| is_read(key)));
            }
        }
        flat
    }

    /// The stage's section, e.g. `recipe.train.learning_rate` → `0.0001`, without paths.
    ///
    /// Values are JSON, so that text and number differ; lists of plain values stay one value.
    fn section(&self, stage: Stage) -> BTreeMap<String, String> {
        let section = match stage {
            Stage::Ingest => serde_json::to_value(&self.ingest),
            Stage::EmbedText => serde_json::to_value(&self.embed_text),
            Stage::CacheLatents => serde_json::to_value(&self.cache_latents),
            Stage::Train => serde_json::to_value(&self.train),
            Stage::Sample => serde_json::to_value(&self.sample),
            Stage::Evaluate => serde_json::to_value(&self.evaluate),
        }
        .expect("a recipe that was read from text can be written as JSON");
        let mut flat = BTreeMap::new();
        flatten(&format!("recipe.{}", stage.section()), &section, &mut flat);
        flat
    }
}

fn flatten(key: &str, value: &Value, flat: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                if !PATHS.contains(&name.as_str()) {
                    flatten(&format!("{key}.{name}"), field, flat);
                }
            }
        }
        Value::Array(items) if items.iter().any(Value::is_object) => {
            for (index, item) in items.iter().enumerate() {
                flatten(&format!("{key}.{index}"), item, flat);
            }
        }
        plain => {
            flat.insert(key.to_owned(), plain.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn flattened(stage: Stage, overrides: &[&str]) -> BTreeMap<String, String> {
        let overrides: Vec<_> = overrides
            .iter()
            .map(|text| text.parse().expect("an override"))
            .collect();
        let demo = include_str!("../../../../configs/demo.toml");
        Recipe::parse(demo, Path::new("/w/configs/demo.toml"), &overrides)
            .expect("the demo loads")
            .flattened(stage)
    }

    #[test]
    fn values_are_named_by_section_and_field() {
        let flat = flattened(Stage::Train, &["train.learning_rate=1e-4"]);
        assert_eq!(flat["recipe.train.learning_rate"], "0.0001");
        assert_eq!(flat["recipe.train.optimizer"], "\"adamw8bit\"");
    }

    #[test]
    fn an_integer_and_the_same_decimal_are_one_value() {
        assert_eq!(
            flattened(Stage::Sample, &["sample.guidance=3"]),
            flattened(Stage::Sample, &["sample.guidance=3.0"])
        );
    }

    #[test]
    fn paths_decide_nothing() {
        for (stage, change) in [
            (Stage::Ingest, "ingest.source=/elsewhere"),
            (Stage::EmbedText, "embed_text.public_embeddings=/e.parquet"),
            (Stage::Sample, "sample.prompts_file=/p.txt"),
            (Stage::Evaluate, "evaluate.held_out=/elsewhere"),
        ] {
            assert_eq!(
                flattened(stage, &[]),
                flattened(stage, &[change]),
                "{change}"
            );
        }
    }

    #[test]
    fn what_evaluate_reads_of_other_sections_decides_its_result() {
        let held_out = "evaluate.held_out=/held-out";
        for change in [
            "cache_latents.background=drop-alpha",
            "cache_latents.resolution_px=1024",
            "cache_latents.scaling=bilinear-short-side",
            "sample.loras=[{path='/a', scale=1.0}]",
            "train.base_format=nf4",
            "train.guidance=9.5",
            "train.precision=bf16",
        ] {
            assert_ne!(
                flattened(Stage::Evaluate, &[held_out]),
                flattened(Stage::Evaluate, &[held_out, change]),
                "{change}"
            );
        }
        let alone = ["evaluate.held_out=\"\"", "sample.compare_with_base=false"];
        let without_lora = [alone[0], alone[1], "sample.use_trained_lora=false"];
        assert_ne!(
            flattened(Stage::Evaluate, &alone),
            flattened(Stage::Evaluate, &without_lora)
        );
        // What it does not read decides nothing: without held-out pictures no loss is computed.
        for change in ["train.guidance=9.5", "train.steps=77", "sample.steps=77"] {
            assert_eq!(
                flattened(Stage::Evaluate, &alone),
                flattened(Stage::Evaluate, &[alone[0], alone[1], change]),
                "{change}"
            );
        }
    }

    #[test]
    fn every_field_that_is_no_path_decides() {
        let recipe: toml::Table = toml::from_str(include_str!("../../../../configs/demo.toml"))
            .expect("the demo is TOML");
        for stage in Stage::ALL {
            let flat = flattened(stage, &[]);
            let section = recipe[stage.section()].as_table().expect("a section");
            for field in section
                .keys()
                .filter(|field| !PATHS.contains(&field.as_str()))
            {
                let key = format!("recipe.{}.{field}", stage.section());
                let listed = flat.contains_key(&key);
                assert!(listed || field == "loras", "{key} decides nothing");
            }
        }
    }

    #[test]
    fn the_scale_of_a_lora_decides_and_its_path_does_not() {
        let at = |path: &str, scale: f64| {
            flattened(
                Stage::Sample,
                &[&format!(
                    "sample.loras=[{{path='{path}', scale={scale:?}}}]"
                )],
            )
        };
        assert_eq!(at("/a", 1.0)["recipe.sample.loras.0.scale"], "1.0");
        assert_eq!(at("/a", 1.0), at("/b", 1.0));
        assert_ne!(at("/a", 1.0), at("/a", 0.5));
    }
}
