//! One value of a recipe replaced on the command line: `--set train.steps=50`.

use std::fmt;
use std::str::FromStr;

use crate::recipe::RecipeError;

/// A field and the value that it takes instead of the recipe file's. Applied before the recipe is checked and
/// fingerprinted, so it decides the result like the file itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Override {
    key: String,
    value: toml::Value,
}

impl Override {
    /// Sets a dotted key, e.g. `sample.prompts`, to any value.
    pub fn new(key: impl Into<String>, value: impl Into<toml::Value>) -> Self {
        Self {
            key: key.into(),
            value: value.into(),
        }
    }

    /// The dotted key.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The value.
    pub fn value(&self) -> &toml::Value {
        &self.value
    }

    /// Replaces the field in a recipe that has it.
    pub(super) fn apply(&self, recipe: &mut toml::Table) -> Result<(), RecipeError> {
        let unknown = |recipe: &toml::Table| RecipeError::UnknownKey {
            key: self.key.clone(),
            nearest: nearest(&self.key, recipe),
        };
        let (section, field) = match self.key.split_once('.') {
            Some((section, field)) => (Some(section), field),
            None => (None, self.key.as_str()),
        };
        let table = match section {
            None => Some(&mut *recipe),
            Some(section) => recipe.get_mut(section).and_then(toml::Value::as_table_mut),
        };
        match table.and_then(|table| table.get_mut(field)) {
            Some(value) if !value.is_table() => {
                *value = self.value.clone();
                Ok(())
            }
            _ => Err(unknown(recipe)),
        }
    }
}

/// The recipe's fields with names like `key`, nearest first, at most three.
fn nearest(key: &str, recipe: &toml::Table) -> Vec<String> {
    let mut fields: Vec<(f64, String)> = recipe
        .iter()
        .flat_map(|(name, value)| match value.as_table() {
            None => vec![name.clone()],
            Some(section) => section
                .keys()
                .map(|field| format!("{name}.{field}"))
                .collect(),
        })
        .map(|field| (strsim::jaro_winkler(key, &field), field))
        .filter(|(similarity, _)| *similarity > 0.85)
        .collect();
    fields.sort_by(|a, b| b.0.total_cmp(&a.0));
    // Well behind the best is no candidate.
    let best = fields.first().map_or(0.0, |(similarity, _)| *similarity);
    fields
        .into_iter()
        .take_while(|(similarity, _)| best - similarity < 0.02)
        .take(3)
        .map(|(_, field)| field)
        .collect()
}

impl FromStr for Override {
    type Err = RecipeError;

    /// Reads `section.field=value` with the value in TOML syntax; what is no TOML is text, so quotes may be left out.
    fn from_str(text: &str) -> Result<Self, RecipeError> {
        let refused = || RecipeError::NotAnOverride {
            text: text.to_owned(),
        };
        let (key, value) = text.split_once('=').ok_or_else(refused)?;
        let key = key.trim();
        if key.is_empty() {
            return Err(refused());
        }
        let value = value.trim();
        let parsed = toml::from_str::<toml::Table>(&format!("value = {value}"))
            .ok()
            .filter(|table| table.len() == 1)
            .and_then(|mut table| table.remove("value"));
        Ok(Self {
            key: key.to_owned(),
            value: parsed.unwrap_or_else(|| toml::Value::String(value.to_owned())),
        })
    }
}

impl fmt::Display for Override {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}={}", self.key, self.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Override {
        text.parse().expect("an override")
    }

    #[test]
    fn values_are_toml_and_bare_words_are_text() {
        assert_eq!(parsed("a.b=50").value, toml::Value::Integer(50));
        assert_eq!(parsed("a.b = 1e-4").value, toml::Value::Float(1e-4));
        assert_eq!(parsed("a.b=bf16").value, toml::Value::String("bf16".into()));
        assert_eq!(parsed("a.b=/x y").value, toml::Value::String("/x y".into()));
        assert_eq!(parsed("a.b=").value, toml::Value::String(String::new()));
    }

    #[test]
    fn what_is_written_is_read_back_the_same() {
        let prompts = vec!["a \"b\" = c\nd".to_owned(), "#e".to_owned()];
        for change in [
            Override::new("sample.prompts", prompts),
            Override::new("sample.seeds", vec![1_i64, 2]),
            Override::new("sample.guidance", 7.5),
            Override::new("sample.negative_prompt", "don't \\ \"do\""),
            Override::new("sample.negative_prompt", "2"),
        ] {
            assert_eq!(parsed(&change.to_string()), change);
        }
    }

    #[test]
    fn text_without_a_key_or_a_value_is_no_override() {
        for text in ["train.steps", "=5", ""] {
            assert!(text.parse::<Override>().is_err(), "{text:?}");
        }
    }
}
