//! Embeddings survive the table bit by bit; a table that cannot be trusted is refused.

use polars::prelude::Column;

use super::*;
use crate::digest::digest_bytes;
use crate::parquet_write::write_table;

fn header() -> TextEmbeddingHeader {
    TextEmbeddingHeader {
        t5_tokens: 3,
        t5_width: 2,
        pooled_width: 5,
        t5_digest: digest_bytes(b"t5"),
        clip_digest: digest_bytes(b"clip"),
        t5_tokenizer_digest: digest_bytes(b"t5 tokenizer"),
        clip_tokenizer_digest: digest_bytes(b"clip tokenizer"),
    }
}

/// Odd numbers on purpose: subnormal, largest, negative zero, infinity.
fn row(i: usize) -> TextEmbeddingRow {
    let bits = [0x0001, 0x7bff, 0x8000, 0x7c00, 0x3c00, 0xbc01];
    TextEmbeddingRow {
        caption: format!("a knight, {i}"),
        num_t5_tokens: i as u32 % 3 + 1,
        embedding: Embedding {
            t5: (0..6).map(|k| f16::from_bits(bits[(i + k) % 6])).collect(),
            pooled: (0..5).map(|k| f16::from_f32((i * 5 + k) as f32)).collect(),
        },
    }
}

fn written(count: usize) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("text-embeddings.parquet");
    let mut writer = TextEmbeddingWriter::create(&path, &header()).expect("started");
    for i in 0..count {
        writer.push(row(i)).expect("written");
    }
    writer.finish().expect("written");
    (dir, path)
}

#[test]
fn every_embedding_is_read_back_bit_by_bit() {
    let count = 2 * ROW_GROUP_ROWS + 3; // three row groups, the last one short
    let (_dir, path) = written(count);
    let table = TextEmbeddings::open(&path).expect("sound");
    assert_eq!((table.header(), table.len()), (&header(), count));
    for i in [0, 1, ROW_GROUP_ROWS - 1, ROW_GROUP_ROWS, count - 1, 5] {
        let expected = row(i);
        let hash = caption_hash(&expected.caption);
        let found = table.row(&hash).expect("readable").expect("there");
        let bits = |row: &TextEmbeddingRow| -> Vec<u16> {
            let numbers = row.embedding.t5.iter().chain(&row.embedding.pooled);
            numbers.map(|number| number.to_bits()).collect()
        };
        assert_eq!(bits(&found), bits(&expected));
        assert_eq!(
            (found.caption, found.num_t5_tokens),
            (expected.caption.clone(), expected.num_t5_tokens)
        );
        assert_eq!(table.caption(&hash), Some(expected.caption.as_str()));
    }
    assert_eq!(table.get("no such hash").expect("readable"), None);
}

#[test]
fn an_empty_table_is_a_table() {
    let (_dir, path) = written(0);
    let table = TextEmbeddings::open(&path).expect("sound");
    assert!(table.is_empty() && table.keys().len() == 0);
}

#[test]
fn the_same_rows_give_the_same_bytes() {
    let [first, second] =
        [written(7), written(7)].map(|(_dir, path)| std::fs::read(path).expect("readable"));
    assert_eq!(first, second);
}

#[test]
fn an_embedding_of_another_size_is_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("t.parquet");
    let mut writer = TextEmbeddingWriter::create(&path, &header()).expect("started");
    let mut long = row(0);
    long.embedding.pooled.push(f16::ONE);
    let error = writer.push(long).expect_err("six of five");
    assert!(matches!(
        error,
        ArtifactError::EmbeddingSize {
            part: "pooled",
            expected: 5,
            found: 6,
            ..
        }
    ));
    drop(writer);
    assert!(!path.exists());
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("t.parquet");
    for (t5_tokens, t5_width, pooled_width) in [
        (0, 2, 5),
        (3, 0, 5),
        (3, 2, 0),
        (usize::MAX, 2, 5),
        (1 << 20, 1 << 20, 5),
    ] {
        let header = TextEmbeddingHeader {
            t5_tokens,
            t5_width,
            pooled_width,
            ..header()
        };
        let result = TextEmbeddingWriter::create(&path, &header);
        assert!(matches!(
            result.err(),
            Some(ArtifactError::EmbeddingShape { .. })
        ));
    }
}

/// A table with these columns and footer instead of ours.
fn open_other(columns: Vec<Column>, footer: &Footer) -> ArtifactError {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("t.parquet");
    write_table(&path, columns, footer).expect("written");
    TextEmbeddings::open(&path)
        .err()
        .expect("it is not one of ours")
}

fn columns(hash: &str, t5: &[f16]) -> Vec<Column> {
    let pooled = [f16::ONE; 5];
    vec![
        column("caption_hash", [hash].into_iter()),
        column("caption", ["a knight"].into_iter()),
        column("num_t5_tokens", [1u32].into_iter()),
        half_lists("t5", t5.len(), std::iter::once(t5)),
        half_lists("pooled", 5, std::iter::once(&pooled[..])),
    ]
}

#[test]
fn a_footer_that_lacks_or_garbles_an_entry_is_refused() {
    let sound = header().to_footer();
    let hash = caption_hash("a knight");
    for key in sound.keys() {
        let mut footer = sound.clone();
        footer.remove(key);
        let error = open_other(columns(&hash, &[f16::ONE; 6]), &footer);
        assert!(
            matches!(&error, ArtifactError::Footer { key: k, found: None, .. } if k == key),
            "{error}"
        );
        footer.insert(key.clone(), "-1".to_owned());
        let error = open_other(columns(&hash, &[f16::ONE; 6]), &footer);
        assert!(
            matches!(&error, ArtifactError::Footer { key: k, found: Some(_), .. } if k == key),
            "{error}"
        );
    }
}

#[test]
fn lists_of_another_length_than_the_footer_says_are_refused() {
    let error = open_other(
        columns(&caption_hash("a knight"), &[f16::ONE; 4]),
        &header().to_footer(),
    );
    let text = error.to_string();
    assert!(
        text.contains("list of 4 f16; expected list of 6 f16"),
        "{text}"
    );
}

#[test]
fn a_hash_that_is_not_its_captions_is_refused() {
    let error = open_other(
        columns(&caption_hash("a knave"), &[f16::ONE; 6]),
        &header().to_footer(),
    );
    assert!(
        matches!(&error, ArtifactError::Cell { column, .. } if column == "caption_hash"),
        "{error}"
    );
}

#[test]
fn a_caption_that_appears_twice_is_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("t.parquet");
    let mut writer = TextEmbeddingWriter::create(&path, &header()).expect("started");
    writer.push(row(0)).expect("written");
    writer.push(row(0)).expect("written");
    writer.finish().expect("written");
    let text = TextEmbeddings::open(&path)
        .err()
        .expect("twice")
        .to_string();
    assert!(text.contains("as in row 0"), "{text}");
}

#[test]
fn a_file_changed_anywhere_never_panics() {
    let (dir, path) = written(3);
    let damaged = dir.path().join("damaged.parquet");
    let sound = std::fs::read(path).expect("readable");
    for place in 0..sound.len() {
        for value in [sound[place] ^ 0x01, 0xff] {
            let mut bytes = sound.clone();
            bytes[place] = value;
            std::fs::write(&damaged, &bytes).expect("written");
            if let Ok(table) = TextEmbeddings::open(&damaged) {
                for key in table.keys() {
                    let _ = table.get(key);
                }
            }
        }
    }
}
