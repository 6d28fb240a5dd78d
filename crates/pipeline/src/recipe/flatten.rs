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

impl Recipe {
    /// The stage's section, e.g. `recipe.train.learning_rate` → `0.0001`, without paths.
    ///
    /// Values are JSON, so that text and number differ; lists of plain values stay one value.
    pub fn flattened(&self, stage: Stage) -> BTreeMap<String, String> {
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
