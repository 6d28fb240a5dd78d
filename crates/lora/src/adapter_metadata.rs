//! The header entry `lora_adapter_metadata`: a peft configuration as JSON, each key prefixed with its model part.
//!
//! Alpha stands nowhere else in a file of diffusers' format. Ranks and alphas that differ from the common ones stand in
//! `rank_pattern` and `alpha_pattern`, under a regular expression that the end of a module's path must match; we write
//! `^path` and read that and plain paths.
//!
//! Source: `write_lora_layers` and `_create_lora_config`, diffusers 0.42; `get_pattern_key`, peft 0.21.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Number, Value};

use crate::{LoraError, LoraModule};

/// The header entry's name.
pub(crate) const KEY: &str = "lora_adapter_metadata";

const PREFIX: &str = "transformer.";

/// What the entry says about ranks and alphas.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct AdapterMetadata {
    rank: usize,
    alpha: f32,
    rank_pattern: Vec<(String, usize)>,
    alpha_pattern: Vec<(String, f32)>,
    /// The addition is scaled by `alpha / √rank`.
    rank_stabilised: bool,
}

impl AdapterMetadata {
    /// Reads the entry. `None` if it says nothing about the transformer.
    pub(crate) fn parse(path: &Path, json: &str) -> Result<Option<Self>, LoraError> {
        let entries: Map<String, Value> =
            serde_json::from_str(json).map_err(|source| LoraError::MetadataSyntax {
                path: path.to_path_buf(),
                source,
            })?;
        let entries: BTreeMap<&str, &Value> = entries
            .iter()
            .filter_map(|(key, value)| Some((key.strip_prefix(PREFIX)?, value)))
            .collect();
        if entries.is_empty() {
            return Ok(None);
        }
        let get = |key: &str| entries.get(key).copied().unwrap_or(&Value::Null);
        let fail = |key: &str, expected, found: &Value| LoraError::MetadataValue {
            path: path.to_path_buf(),
            key: format!("{PREFIX}{key}"),
            expected,
            found: found.to_string(),
        };
        for (key, kind) in [("use_dora", "DoRA"), ("lora_bias", "LoRA with biases")] {
            if get(key) == &Value::Bool(true) {
                return Err(LoraError::Unsupported {
                    path: path.to_path_buf(),
                    kind,
                    key: format!("{PREFIX}{key}"),
                });
            }
        }
        let rank = |key: &str, value: &Value| {
            let rank = value
                .as_u64()
                .and_then(|rank| usize::try_from(rank).ok())
                .filter(|rank| *rank > 0);
            rank.ok_or_else(|| fail(key, "a whole number above 0", value))
        };
        let alpha =
            |key: &str, value: &Value| to_f32(value).ok_or_else(|| fail(key, "a number", value));
        let pattern = |key: &str| match get(key) {
            Value::Null => Ok(Vec::new()),
            Value::Object(entries) => Ok(entries
                .iter()
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect::<Vec<(String, Value)>>()),
            other => Err(fail(key, "an object", other)),
        };
        let module = |key: &str, name: String| {
            let is_path = name
                .strip_prefix('^')
                .unwrap_or(&name)
                .chars()
                .all(|c| c.is_alphanumeric() || "._".contains(c));
            if is_path {
                Ok(name)
            } else {
                Err(fail(
                    key,
                    "module paths, not regular expressions",
                    &Value::String(name),
                ))
            }
        };
        Ok(Some(Self {
            rank: rank("r", get("r"))?,
            alpha: alpha("lora_alpha", get("lora_alpha"))?,
            rank_pattern: pattern("rank_pattern")?
                .into_iter()
                .map(|(name, value)| {
                    Ok((module("rank_pattern", name)?, rank("rank_pattern", &value)?))
                })
                .collect::<Result<_, LoraError>>()?,
            alpha_pattern: pattern("alpha_pattern")?
                .into_iter()
                .map(|(name, value)| {
                    Ok((
                        module("alpha_pattern", name)?,
                        alpha("alpha_pattern", &value)?,
                    ))
                })
                .collect::<Result<_, LoraError>>()?,
            rank_stabilised: get("use_rslora") == &Value::Bool(true),
        }))
    }

    /// The rank that the entry gives a module.
    pub(crate) fn rank(&self, module: &str) -> usize {
        find(&self.rank_pattern, module).unwrap_or(self.rank)
    }

    /// The alpha that makes `alpha / rank` the scale that the entry asks for.
    pub(crate) fn alpha(&self, module: &str) -> f32 {
        let alpha = find(&self.alpha_pattern, module).unwrap_or(self.alpha);
        if self.rank_stabilised {
            alpha * (self.rank(module) as f32).sqrt()
        } else {
            alpha
        }
    }
}

/// The entry for these modules.
pub(crate) fn render(modules: &BTreeMap<String, LoraModule>) -> String {
    let rank = most_common(modules.values().map(|module| module.rank));
    let alpha =
        most_common(modules.values().map(|module| module.alpha.to_bits())).map(f32::from_bits);
    let pattern = |value: &dyn Fn(&LoraModule) -> Option<Value>| {
        let entries = modules
            .iter()
            .filter_map(|(path, module)| Some((format!("^{path}"), value(module)?)));
        Value::Object(entries.collect())
    };
    let different_rank =
        |module: &LoraModule| (Some(module.rank) != rank).then(|| Value::from(module.rank));
    let different_alpha =
        |module: &LoraModule| (Some(module.alpha) != alpha).then(|| from_f32(module.alpha));
    let entries: BTreeMap<String, Value> = [
        ("alpha_pattern", pattern(&different_alpha)),
        ("bias", Value::from("none")),
        ("lora_alpha", alpha.map_or(Value::Null, from_f32)),
        ("lora_bias", Value::Bool(false)),
        ("lora_dropout", Value::from(0.0)),
        ("peft_type", Value::from("LORA")),
        ("r", rank.map_or(Value::Null, Value::from)),
        ("rank_pattern", pattern(&different_rank)),
        (
            "target_modules",
            Value::from(modules.keys().cloned().collect::<Vec<String>>()),
        ),
        ("use_dora", Value::Bool(false)),
        ("use_rslora", Value::Bool(false)),
    ]
    .into_iter()
    .map(|(key, value)| (format!("{PREFIX}{key}"), value))
    .collect();
    serde_json::to_string_pretty(&entries).expect("strings, numbers and booleans are always JSON")
}

/// The value of the first pattern that the end of `module` matches.
fn find<T: Copy>(patterns: &[(String, T)], module: &str) -> Option<T> {
    let matches = |pattern: &str| match pattern.strip_prefix('^') {
        Some(path) => module == path,
        None => module
            .strip_suffix(pattern)
            .is_some_and(|head| head.is_empty() || head.ends_with('.')),
    };
    patterns
        .iter()
        .find(|(pattern, _)| matches(pattern))
        .map(|(_, value)| *value)
}

/// The most frequent value; of several the smallest.
fn most_common<T: Ord + Copy>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts: BTreeMap<T, usize> = BTreeMap::new();
    for value in values {
        *counts.entry(value).or_default() += 1;
    }
    counts
        .into_iter()
        .rev()
        .max_by_key(|(_, count)| *count)
        .map(|(value, _)| value)
}

fn to_f32(value: &Value) -> Option<f32> {
    value
        .as_f64()
        .map(|value| value as f32)
        .filter(|value| value.is_finite())
}

/// A whole number where it is one: peft declares alpha an integer.
fn from_f32(value: f32) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e9 {
        return Value::from(value as i64);
    }
    // The shortest decimal that gives this f32 back.
    let decimal: f64 = value.to_string().parse().expect("a printed float parses");
    Number::from_f64(decimal).map_or(Value::Null, Value::Number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Option<AdapterMetadata>, LoraError> {
        AdapterMetadata::parse(Path::new("x.safetensors"), json)
    }

    fn module(rank: usize, alpha: f32) -> LoraModule {
        LoraModule::new(alpha, 1, 1, vec![0.0; rank], vec![0.0; rank])
    }

    #[test]
    fn what_is_written_is_read_back_module_by_module() {
        let modules = BTreeMap::from([
            ("proj_out".to_owned(), module(2, 0.3)),
            (
                "single_transformer_blocks.0.proj_out".to_owned(),
                module(4, 8.0),
            ),
            ("transformer_blocks.0.attn.to_q".to_owned(), module(4, 8.0)),
        ]);
        let json = render(&modules);
        assert!(json.contains("\"transformer.lora_alpha\": 8,"), "{json}");
        let metadata = parse(&json).expect("own text").expect("a transformer");
        for (path, module) in &modules {
            assert_eq!(metadata.rank(path), module.rank, "{path}");
            assert_eq!(metadata.alpha(path), module.alpha, "{path}");
        }
    }

    #[test]
    fn a_plain_pattern_matches_the_end_of_a_path_at_a_dot() {
        let json = r#"{"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.alpha_pattern": {"to_q": 2.5}}"#;
        let metadata = parse(json).expect("valid").expect("a transformer");
        assert_eq!(metadata.alpha("transformer_blocks.0.attn.to_q"), 2.5);
        assert_eq!(metadata.alpha("transformer_blocks.0.attn.xto_q"), 4.0);
    }

    #[test]
    fn rank_stabilised_scaling_becomes_an_alpha() {
        let json =
            r#"{"transformer.r": 4, "transformer.lora_alpha": 6, "transformer.use_rslora": true}"#;
        assert_eq!(
            parse(json)
                .expect("valid")
                .expect("a transformer")
                .alpha("x"),
            12.0
        );
    }

    #[test]
    fn an_entry_about_another_part_says_nothing() {
        assert_eq!(parse(r#"{"unet.r": 4}"#).expect("valid"), None);
    }

    #[test]
    fn values_that_cannot_be_used_are_named() {
        let error =
            parse(r#"{"transformer.r": 0, "transformer.lora_alpha": 4}"#).expect_err("rank 0");
        assert!(
            error
                .to_string()
                .contains("`transformer.r` in the `lora_adapter_metadata` of x.safetensors is 0")
        );
        assert!(matches!(
            parse(r#"{"transformer.r": 4}"#),
            Err(LoraError::MetadataValue { .. })
        ));
        assert!(matches!(
            parse("[1]"),
            Err(LoraError::MetadataSyntax { .. })
        ));
        let dora = parse(r#"{"transformer.use_dora": true}"#).expect_err("DoRA");
        assert!(dora.to_string().contains("DoRA"));
        let regex = r#"{"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.rank_pattern": {".*q": 2}}"#;
        assert!(matches!(parse(regex), Err(LoraError::MetadataValue { .. })));
    }
}
