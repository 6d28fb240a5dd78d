//! Rows that earlier runs made with the same encoders.

use std::collections::BTreeMap;
use std::path::Path;

use artifacts::{TextEmbeddingHeader, TextEmbeddings};
use pipeline::{StageContext, files};

/// Earlier tables whose rows are what this run would compute, newest first.
pub(crate) struct Earlier {
    tables: Vec<TextEmbeddings>,
}

impl Earlier {
    /// Looks through the sealed artifacts, and at a table that an interrupted run of this fingerprint left.
    pub(crate) fn open(context: &StageContext, header: &TextEmbeddingHeader) -> Self {
        let own = context.path(files::EMBEDDINGS);
        let sealed = context
            .earlier_artifacts()
            .into_iter()
            .filter(|artifact| same_encoding(&artifact.manifest.components, &context.components))
            .map(|artifact| artifact.path(files::EMBEDDINGS));
        let tables = sealed
            .chain(own.is_file().then_some(own))
            .filter_map(|path| open_same(&path, header))
            .collect();
        Self { tables }
    }

    /// The table that has a caption.
    pub(crate) fn find(&self, caption_hash: &str) -> Option<&TextEmbeddings> {
        self.tables
            .iter()
            .find(|table| table.contains(caption_hash))
    }
}

fn open_same(path: &Path, header: &TextEmbeddingHeader) -> Option<TextEmbeddings> {
    match TextEmbeddings::open(path) {
        Ok(table) => (table.header() == header).then_some(table),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "earlier embeddings passed over");
            None
        }
    }
}

/// Whether two runs would give a caption the same embedding: same format, encoders, tokenizers, length and precision,
/// and neither took embeddings from elsewhere.
fn same_encoding(a: &BTreeMap<String, String>, b: &BTreeMap<String, String>) -> bool {
    let decides = |key: &str| {
        key == "schema"
            || key.starts_with("weights.")
            || key == "recipe.embed_text.t5_tokens"
            || key == "recipe.embed_text.precision"
    };
    let from_elsewhere = |components: &BTreeMap<String, String>| {
        components.keys().any(|key| key.starts_with("file."))
    };
    let deciding = |components: &BTreeMap<String, String>| -> BTreeMap<String, String> {
        components
            .iter()
            .filter(|(key, _)| decides(key))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    };
    !from_elsewhere(a) && !from_elsewhere(b) && deciding(a) == deciding(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn components(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        [
            ("schema", "embed-text/1"),
            ("weights.t5", "a"),
            ("recipe.embed_text.t5_tokens", "77"),
        ]
        .iter()
        .chain(pairs)
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
    }

    #[test]
    fn other_captions_and_another_rule_for_long_ones_do_not_matter() {
        let one = components(&[
            ("input.captions", "x"),
            ("recipe.embed_text.long_captions", "\"stop\""),
        ]);
        let other = components(&[
            ("input.captions", "y"),
            ("recipe.embed_text.long_captions", "\"truncate\""),
        ]);
        assert!(same_encoding(&one, &other));
    }

    #[test]
    fn another_length_encoder_or_precision_matters() {
        let base = components(&[]);
        for change in [
            ("recipe.embed_text.t5_tokens", "512"),
            ("weights.t5", "b"),
            ("weights.clip_tokenizer", "c"),
            ("recipe.embed_text.precision", "\"bf16\""),
        ] {
            assert!(!same_encoding(&base, &components(&[change])), "{change:?}");
        }
    }

    #[test]
    fn imported_embeddings_are_never_taken_for_computed_ones() {
        let imported = components(&[("file.embed_text.public_embeddings", "d")]);
        assert!(!same_encoding(&components(&[]), &imported));
        assert!(!same_encoding(&imported, &components(&[])));
    }
}
