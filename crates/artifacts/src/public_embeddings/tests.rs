//! Files as the public recipe writes them, made by pyarrow (`tests/fixtures/make.py`).

use std::path::PathBuf;

use super::*;
use crate::error::ArtifactError;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

#[test]
fn sizes_follow_from_the_lists_and_numbers_from_the_hash() {
    let embeddings = read_public_embeddings(&fixture("public-embeddings.parquet")).expect("sound");
    assert_eq!(
        (
            embeddings.t5_tokens(),
            embeddings.t5_width(),
            embeddings.pooled_width()
        ),
        (2, 3, 2)
    );
    let keys: Vec<&str> = embeddings.keys().collect();
    assert_eq!((keys.len(), keys[0].len()), (3, 64));
    for (i, key) in keys.iter().enumerate().rev() {
        let embedding = embeddings.get(key).expect("readable").expect("there");
        let first = i as f32;
        let t5: Vec<f32> = (0..6).map(|k| first + k as f32 / 8.0).collect();
        assert_eq!(
            (embedding.t5, embedding.pooled),
            (t5, vec![first - 0.5, first + 0.5])
        );
    }
    assert_eq!(embeddings.get("0000").expect("readable"), None);
}

#[test]
fn a_row_of_another_length_is_refused_with_both() {
    let embeddings = read_public_embeddings(&fixture("public-embeddings-ragged.parquet"))
        .expect("row 0 is sound");
    let keys: Vec<&str> = embeddings.keys().collect();
    assert!(embeddings.get(keys[0]).expect("sound").is_some());
    let text = embeddings
        .get(keys[1])
        .expect_err("five numbers")
        .to_string();
    assert!(
        text.contains("row 1: found 5 numbers; expected 6 numbers as in row 0"),
        "{text}"
    );
}

#[test]
fn numbers_that_are_none_are_refused() {
    let embeddings = read_public_embeddings(&fixture("public-embeddings-not-finite.parquet"))
        .expect("row 0 is sound");
    let keys: Vec<&str> = embeddings.keys().collect();
    let text = embeddings.get(keys[1]).expect_err("NaN").to_string();
    assert!(text.contains("NaN at place 1"), "{text}");
    let text = embeddings
        .get(keys[2])
        .expect_err("an empty cell")
        .to_string();
    assert!(text.contains("an empty cell"), "{text}");
}

#[test]
fn text_ids_that_are_no_triples_are_refused() {
    let error = read_public_embeddings(&fixture("public-embeddings-partial-token.parquet"))
        .err()
        .expect("five ids");
    assert!(
        matches!(&error, ArtifactError::Cell { column, row: 0, .. } if column == "text_ids"),
        "{error}"
    );
}

#[test]
fn another_table_is_refused_by_its_columns() {
    let text = read_public_embeddings(&fixture("images-snappy.parquet"))
        .err()
        .expect("no hashes")
        .to_string();
    assert!(
        text.contains("image_hash") && text.contains("image, text"),
        "{text}"
    );
}

#[test]
fn a_file_changed_anywhere_never_panics() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let damaged = dir.path().join("damaged.parquet");
    let sound = std::fs::read(fixture("public-embeddings.parquet")).expect("readable");
    for place in 0..sound.len() {
        for value in [sound[place] ^ 0x01, 0xff] {
            let mut bytes = sound.clone();
            bytes[place] = value;
            std::fs::write(&damaged, &bytes).expect("written");
            if let Ok(embeddings) = read_public_embeddings(&damaged) {
                for key in embeddings.keys() {
                    let _ = embeddings.get(key);
                }
            }
        }
    }
}
