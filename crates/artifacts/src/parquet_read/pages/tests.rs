//! Reads of single rows from columns of many pages, as pyarrow writes them (`tests/fixtures/make.py`).

use std::path::{Path, PathBuf};

use polars_arrow::array::{
    Array, BinaryViewArray, ListArray, PrimitiveArray, StructArray, Utf8ViewArray,
};

use crate::parquet_read::ParquetFile;

fn open(name: &str) -> (PathBuf, ParquetFile) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name);
    let file = ParquetFile::open(&path).expect("sound");
    (path, file)
}

const FIXTURES: [&str; 2] = ["paged-v1.parquet", "paged-v2.parquet"];
const NUM_ROWS: usize = 60;

fn lists(file: &ParquetFile, rows: std::ops::Range<usize>) -> Vec<Option<Vec<f64>>> {
    let field = file.field("list", "lists").expect("there");
    let arrays = file
        .decode_as::<ListArray<i64>>(field, rows)
        .expect("readable");
    let numbers = |list: Box<dyn Array>| {
        let list = list.as_any().downcast_ref::<PrimitiveArray<f64>>();
        list.expect("f64").values().as_slice().to_vec()
    };
    arrays
        .iter()
        .flat_map(|array| array.iter())
        .map(|list| list.map(numbers))
        .collect()
}

fn list(row: usize) -> Option<Vec<f64>> {
    let number = |k: usize| row as f64 + k as f64 / 64.0;
    (row % 11 != 7).then(|| (0..row * 37 % 50).map(number).collect())
}

#[test]
fn any_rows_of_lists_that_go_on_over_pages_are_those_asked_for() {
    for name in FIXTURES {
        let (_, file) = open(name);
        assert_eq!(file.num_rows(), NUM_ROWS);
        for start in 0..NUM_ROWS {
            for end in start..=NUM_ROWS {
                let expected: Vec<_> = (start..end).map(list).collect();
                assert_eq!(lists(&file, start..end), expected, "{name} {start}..{end}");
            }
        }
    }
}

#[test]
fn any_rows_of_structs_are_those_asked_for_though_their_fields_have_other_pages() {
    for name in FIXTURES {
        let (_, file) = open(name);
        let field = file.field("image", "structs").expect("there");
        let image_pages = |leaf: usize| {
            file.decode(field, 0..1).expect("readable");
            let index = file.page_indices[0][leaf].get().expect("found");
            index.as_ref().expect("sound").pages.len()
        };
        assert!(image_pages(1) > 1, "{name} has one page only");
        for start in 0..NUM_ROWS {
            for end in start + 1..=NUM_ROWS {
                let arrays = file
                    .decode_as::<StructArray>(field, start..end)
                    .expect("readable");
                let [array] = &arrays[..] else {
                    panic!("one row group gives one array");
                };
                let bytes = array.values()[0].as_any().downcast_ref::<BinaryViewArray>();
                let path = array.values()[1].as_any().downcast_ref::<Utf8ViewArray>();
                let (bytes, path) = (bytes.expect("bytes"), path.expect("text"));
                assert_eq!(array.len(), end - start);
                for place in 0..array.len() {
                    let row = start + place;
                    let is_valid = row % 13 != 5;
                    assert_eq!(array.is_valid(place), is_valid, "{name} {row}");
                    let expected = vec![row as u8; row * 29 % 70];
                    assert_eq!(bytes.get(place), is_valid.then_some(&expected[..]));
                    let named = is_valid && row % 7 != 3;
                    let expected = format!("{}.png", row % 9);
                    assert_eq!(path.get(place), named.then_some(&expected[..]));
                }
            }
        }
    }
}

#[test]
fn a_row_is_read_from_its_own_pages_alone() {
    // The data of a later page are of an encoding that nobody knows: only reads of its rows may notice.
    let (path, file) = open("paged-v1.parquet");
    for (leaf, column) in [(0, "list"), (1, "image")] {
        let field = file.field(column, "").expect("there").clone();
        file.decode(&field, 0..1).expect("readable");
        let index = file.page_indices[0][leaf].get().expect("found");
        let pages = &index.as_ref().expect("sound").pages;
        let page = &pages[pages.len() - 2];
        let chunk = &file.metadata.row_groups[0].parquet_columns()[leaf];
        let mut bytes = std::fs::read(&path).expect("readable");
        // Thrift: three i32 fields as varints, then the data page's header (field 5, a struct) with the number of values
        // and the encoding, a zigzag varint of one byte.
        let mut at = chunk.byte_range().start as usize + page.start;
        for _ in 0..3 {
            assert_eq!(bytes[at], 0x15);
            at = after_varint(&bytes, at + 1);
        }
        assert_eq!(bytes[at..at + 2], [0x2c, 0x15]);
        at = after_varint(&bytes, at + 2);
        assert_eq!(bytes[at], 0x15);
        bytes[at + 1] = 100;

        let dir = tempfile::tempdir().expect("a temporary directory");
        let damaged = dir.path().join("damaged.parquet");
        std::fs::write(&damaged, &bytes).expect("written");
        let damaged = ParquetFile::open(&damaged).expect("the footer is sound");
        damaged.decode(&field, 0..1).expect("it is in another page");
        let last = NUM_ROWS - 1;
        damaged
            .decode(&field, last..last + 1)
            .expect("so is the last");
        damaged
            .decode(&field, page.first_row..page.first_row + 1)
            .expect_err("it is in that page");
    }
}

fn after_varint(bytes: &[u8], at: usize) -> usize {
    at + 1 + bytes[at..].iter().take_while(|byte| **byte >= 0x80).count()
}

#[test]
fn a_file_changed_anywhere_never_panics() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let damaged = dir.path().join("damaged.parquet");
    for name in FIXTURES {
        let sound = std::fs::read(open(name).0).expect("readable");
        for place in (0..sound.len()).step_by(17) {
            let mut bytes = sound.clone();
            bytes[place] ^= if place % 2 == 0 { 0x01 } else { 0xff };
            std::fs::write(&damaged, &bytes).expect("written");
            let Ok(file) = ParquetFile::open(&damaged) else {
                continue;
            };
            for column in ["list", "image", "constant"] {
                if let Ok(field) = file.field(column, "").cloned() {
                    for row in [0, 17, 59] {
                        let _ = file.decode(&field, row..row + 1); // right or wrong, it returns
                    }
                }
            }
        }
    }
}
