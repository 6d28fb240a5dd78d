//! Data sets as pyarrow writes them (`tests/fixtures/make.py`).

use super::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

fn expected(file: usize) -> Vec<ParquetImage> {
    let row = |row, bytes: &[u8], path: Option<&str>, caption: Option<&str>| ParquetImage {
        file,
        row,
        bytes: bytes.to_vec(),
        path: path.map(str::to_owned),
        caption: caption.map(str::to_owned),
    };
    vec![
        row(0, b"first picture", Some("a.png"), Some("a knight")),
        row(1, b"second picture", None, Some("an orc, red hair")),
        row(2, b"", None, Some("nothing")),
        row(3, b"", Some("d.png"), None),
        row(4, b"first picture", Some("e.png"), Some("a knight")),
    ]
}

const FIXTURES: [&str; 4] = [
    "images-snappy.parquet",
    "images-zstd.parquet",
    "images-gzip.parquet",
    "images-v2.parquet",
];

#[test]
fn rows_of_all_shards_come_in_order() {
    let files = FIXTURES.map(fixture);
    let images = ParquetImages::open(&files, "image", "text").expect("sound");
    assert_eq!((images.len(), images.num_rows(3)), (20, 5));
    assert_eq!(images.files(), files);
    let rows: Result<Vec<ParquetImage>> = images.iter().collect();
    let all: Vec<ParquetImage> = (0..4).flat_map(expected).collect();
    assert_eq!(rows.expect("readable"), all);
}

#[test]
fn pictures_can_be_read_where_there_are_no_captions() {
    let images = ParquetImages::open_pictures(&FIXTURES.map(fixture), "image")
        .expect("no text is asked for");
    let rows: Result<Vec<ParquetImage>> = images.iter().collect();
    let expected: Vec<ParquetImage> = (0..4)
        .flat_map(expected)
        .map(|image| ParquetImage {
            caption: None,
            ..image
        })
        .collect();
    assert_eq!(rows.expect("readable"), expected);
    assert!(ParquetImages::open_pictures(&[fixture(FIXTURES[0])], "text").is_err());
}

#[test]
fn any_row_can_be_read_alone() {
    let images = ParquetImages::open(&FIXTURES.map(fixture), "image", "text").expect("sound");
    for file in [2, 0, 3, 1] {
        for row in [4u32, 0, 3, 1, 2] {
            let image = images.get(file, row).expect("there");
            assert_eq!(image, expected(file)[row as usize]);
        }
    }
}

#[test]
fn batches_smaller_than_row_groups_give_the_same_rows() {
    let mut images =
        ParquetImages::open(&[fixture("images-v2.parquet")], "image", "text").expect("sound");
    images.shards[0].batch_bytes = 2 * images.shards[0].image_bytes;
    let rows: Result<Vec<ParquetImage>> = images.iter().collect();
    assert_eq!(rows.expect("readable"), expected(0));
    let batches: Vec<Range<usize>> = images.shards[0].batches().collect();
    assert_eq!(batches, [0..2, 2..3, 3..5]); // none crosses the border at row 3
}

#[test]
fn a_batch_is_as_large_as_a_dictionary_that_must_be_decoded_anyway() {
    let mut images =
        ParquetImages::open(&[fixture("images-snappy.parquet")], "image", "text").expect("sound");
    images.shards[0].batch_bytes = 1;
    images.shards[0].image_bytes = 13; // dictionaries of 35 and 21 bytes: pictures and their lengths
    let batches: Vec<Range<usize>> = images.shards[0].batches().collect();
    assert_eq!(batches, [0..2, 2..3, 3..4, 4..5]);
    for row in [4u32, 3, 0, 2, 1, 4] {
        assert_eq!(
            images.get(0, row).expect("there"),
            expected(0)[row as usize]
        );
    }
    assert!(matches!(
        images.get(0, 5),
        Err(ArtifactError::RowOutOfRange {
            row: 5,
            rows: 5,
            ..
        })
    ));
}

#[test]
fn rows_that_were_decoded_with_a_costly_one_are_kept_and_others_are_not() {
    let file = fixture("images-snappy.parquet");
    let mut images = ParquetImages::open(&[&file], "image", "text").expect("sound");
    images.get(0, 0).expect("there");
    assert!(images.kept.get(&file, 0, 0).is_none());
    images.shards[0].batch_bytes = 26;
    images.shards[0].image_bytes = 13;
    images.get(0, 0).expect("there");
    assert_eq!(
        images.kept.get(&file, 0, 1),
        Some(expected(0).swap_remove(1))
    );
    assert!(images.kept.get(&file, 0, 3).is_none());
}

#[test]
fn a_row_past_the_end_is_an_error() {
    let images = ParquetImages::open(&[fixture(FIXTURES[0])], "image", "text").expect("sound");
    let error = images.get(0, 5).expect_err("there are five");
    assert!(matches!(
        error,
        ArtifactError::RowOutOfRange {
            row: 5,
            rows: 5,
            ..
        }
    ));
    assert!(images.get(0, u32::MAX).is_err());
}

#[test]
fn a_missing_column_is_named_with_those_there_are() {
    let open = |image, text| ParquetImages::open(&[fixture(FIXTURES[0])], image, text).err();
    let text = open("picture", "text").expect("no such column").to_string();
    assert!(
        text.contains("\"picture\"") && text.contains("image, text"),
        "{text}"
    );
    let text = open("image", "caption")
        .expect("no such column")
        .to_string();
    assert!(
        text.contains("\"caption\"") && text.contains("image, text"),
        "{text}"
    );
}

#[test]
fn columns_of_another_type_are_refused_with_both_types() {
    let open = |image, text| ParquetImages::open(&[fixture(FIXTURES[0])], image, text).err();
    let text = open("text", "text").expect("text is no image").to_string();
    assert!(
        text.contains("has type text; expected struct<bytes: binary"),
        "{text}"
    );
    let text = open("image", "image")
        .expect("an image is no text")
        .to_string();
    assert!(
        text.contains("has type struct<bytes: binary, path: text>; expected text"),
        "{text}"
    );
}

#[test]
fn no_files_are_an_empty_data_set() {
    let images = ParquetImages::open::<&Path>(&[], "image", "text").expect("nothing to refuse");
    assert!(images.is_empty() && images.iter().next().is_none());
}

/// Reads everything in a file both ways; errors are welcome, panics and aborts are not.
fn read_all(path: &Path) {
    if let Ok(images) = ParquetImages::open(&[path], "image", "text") {
        let rows = images.iter().take(64).count();
        for row in 0..rows.min(5) {
            let _ = images.get(0, row as u32); // right or wrong, it returns
        }
    }
}

#[test]
fn a_file_cut_or_changed_anywhere_never_panics() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let damaged = dir.path().join("damaged.parquet");
    for name in FIXTURES {
        let sound = std::fs::read(fixture(name)).expect("readable");
        for cut in (0..sound.len()).step_by(7) {
            std::fs::write(&damaged, &sound[..cut]).expect("written");
            assert!(
                ParquetImages::open(&[&damaged], "image", "text").is_err(),
                "{name} cut to {cut}"
            );
        }
        for place in 0..sound.len() {
            for value in [sound[place] ^ 0x01, 0xff] {
                let mut bytes = sound.clone();
                bytes[place] = value;
                std::fs::write(&damaged, &bytes).expect("written");
                read_all(&damaged);
            }
        }
    }
}

#[test]
fn rows_that_share_a_picture_do_not_multiply_it() {
    const PICTURE_BYTES: usize = 1 << 20;
    let file = fixture("images-repeated.parquet"); // 5000 rows, 5 GB if each had its own
    assert!(std::fs::metadata(&file).expect("there").len() < 4096);
    let images = ParquetImages::open(&[&file], "image", "text").expect("sound");
    let shard = &images.shards[0];
    let longest = shard.batches().max_by_key(Range::len).expect("has rows");
    assert!(longest.len() > 200, "{longest:?}");
    let batch = shard.read(0, longest).expect("readable");
    assert!(
        batch.num_bytes() < 4 * PICTURE_BYTES,
        "{}",
        batch.num_bytes()
    );
    let mut rows = 0;
    for image in images.iter() {
        let image = image.expect("readable");
        assert_eq!((image.row, image.bytes.len()), (rows, PICTURE_BYTES));
        assert_eq!(image.caption.as_deref(), Some("a knight"));
        rows += 1;
    }
    assert_eq!(rows, 5000);
    let last = images.get(0, 4999).expect("there");
    assert_eq!(last.bytes.len(), PICTURE_BYTES);
}
