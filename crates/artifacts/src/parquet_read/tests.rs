//! Row tables survive the file; files that are none, or tables of another kind, are told apart.

use super::*;
use crate::captions::{self, CaptionRow};
use crate::metrics::{self, MetricRow};
use crate::parquet_write::{column, write_table};
use crate::rejects::{self, RejectRow};
use crate::samples::{self, SampleRow};

fn temporary() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("t.parquet");
    (dir, path)
}

fn sample(i: u32) -> SampleRow {
    SampleRow {
        sample_id: format!("{i:064x}"),
        compat_sha256: format!("{:064x}", i + 1),
        compat_sha256_oriented: format!("{:064x}", i + 2),
        width_px: 32 + i,
        height_px: 64,
        has_alpha: i.is_multiple_of(2),
        num_colors: 16,
        source_file: format!("characters/char_{i}.png"),
        source_row: i.is_multiple_of(3).then_some(i),
    }
}

fn metric(step: u32) -> MetricRow {
    MetricRow {
        step,
        loss: 0.5,
        grad_norm: f32::INFINITY,
        learning_rate: 1e-4,
        mean_sigma: 0.25,
        clipped: true,
        skipped: false,
        loss_scale: 65536.0,
        step_s: 0.125,
    }
}

#[test]
fn each_table_is_read_as_it_was_written() {
    let (_dir, path) = temporary();
    let footer = Footer::from([("made by".to_owned(), "a test".to_owned())]);
    for count in [0, 1, 1000] {
        let rows: Vec<SampleRow> = (0..count).map(sample).collect();
        samples::write(&path, &rows, &footer).expect("written");
        assert_eq!(samples::read(&path).expect("sound"), rows);
        assert_eq!(ParquetFile::open(&path).expect("sound").footer(), footer);

        let rows: Vec<CaptionRow> = (0..count)
            .map(|i| {
                let caption = format!("a knight, {i} gold, ü\n\"quoted\"");
                CaptionRow {
                    sample_id: format!("{i:064x}"),
                    caption_hash: captions::caption_hash(&caption),
                    caption,
                }
            })
            .collect();
        captions::write(&path, &rows, &Footer::new()).expect("written");
        assert_eq!(captions::read(&path).expect("sound"), rows);

        let rows: Vec<RejectRow> = (0..count)
            .map(|i| RejectRow {
                source_file: "data.parquet".to_owned(),
                source_row: Some(i),
                reason: "zero-bytes".to_owned(),
                detail: String::new(),
            })
            .collect();
        rejects::write(&path, &rows, &footer).expect("written");
        assert_eq!(rejects::read(&path).expect("sound"), rows);

        let rows: Vec<MetricRow> = (1..=count).map(metric).collect();
        metrics::write(&path, &rows, &footer).expect("written");
        assert_eq!(metrics::read(&path).expect("sound"), rows);
    }
}

#[test]
fn a_caption_edited_under_its_old_hash_is_refused() {
    let (_dir, path) = temporary();
    let row = CaptionRow {
        sample_id: "0".repeat(64),
        caption_hash: captions::caption_hash("a knight"),
        caption: "a knave".to_owned(),
    };
    captions::write(&path, &[row], &Footer::new()).expect("written");
    let text = captions::read(&path).expect_err("edited").to_string();
    assert!(
        text.contains("caption_hash") && text.contains(&captions::caption_hash("a knave")),
        "{text}"
    );
}

#[test]
fn a_table_of_another_kind_is_refused_by_its_columns() {
    let (_dir, path) = temporary();
    metrics::write(&path, &[metric(1)], &Footer::new()).expect("written");
    let text = samples::read(&path).expect_err("another table").to_string();
    assert!(
        text.contains("no column \"sample_id\" (expected text)") && text.contains("step, loss"),
        "{text}"
    );
}

#[test]
fn a_column_of_another_type_is_refused_with_both() {
    let (_dir, path) = temporary();
    write_table(
        &path,
        vec![column("step", [1.5f64].into_iter())],
        &Footer::new(),
    )
    .expect("written");
    let text = metrics::read(&path).expect_err("another type").to_string();
    assert!(
        text.contains("column \"step\"") && text.contains("has type f64; expected u32"),
        "{text}"
    );
}

#[test]
fn an_empty_cell_is_refused_with_its_row() {
    let (_dir, path) = temporary();
    let cells = [Some(1u32), Some(2), None];
    write_table(
        &path,
        vec![column("step", cells.into_iter())],
        &Footer::new(),
    )
    .expect("written");
    let text = metrics::read(&path).expect_err("an empty cell").to_string();
    assert!(text.contains("row 2: found an empty cell"), "{text}");
}

fn damage(bytes: &[u8]) -> ParquetProblem {
    let (_dir, path) = temporary();
    std::fs::write(&path, bytes).expect("written");
    match ParquetFile::open(&path) {
        Err(ArtifactError::DamagedParquet { problem, .. }) => problem,
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("the file was believed"),
    }
}

#[test]
fn what_is_not_parquet_is_called_so() {
    for bytes in [
        &b""[..],
        b"PAR1",
        b"PAR1PAR1",
        b"\x89PNG and so on, long enough",
        b"PAR1........PAR0",
    ] {
        assert!(matches!(damage(bytes), ParquetProblem::Magic), "{bytes:?}");
    }
}

#[test]
fn a_footer_longer_than_the_file_is_not_allocated() {
    for claimed in [5u32, 1 << 30, u32::MAX] {
        let mut bytes = b"PAR1".to_vec();
        bytes.extend([0; 4]);
        bytes.extend(claimed.to_le_bytes());
        bytes.extend(b"PAR1");
        assert!(
            matches!(damage(&bytes), ParquetProblem::FooterLength { .. }),
            "{claimed}"
        );
    }
}

#[test]
fn a_missing_file_is_named() {
    let text = samples::read(Path::new("/no/such/file.parquet"))
        .expect_err("missing")
        .to_string();
    assert_eq!(text, "cannot open /no/such/file.parquet");
}

#[test]
fn a_page_header_gives_kind_and_sizes() {
    // i32 fields 1, 2, 3 as zigzag varints: 2 (a dictionary), 300, 150.
    let header =
        PageHeader::parse(&[0x15, 0x04, 0x15, 0xd8, 0x04, 0x15, 0xac, 0x02]).expect("sound");
    assert!(header.is_dictionary);
    assert_eq!(
        (header.uncompressed_bytes, header.compressed_bytes),
        (300, 150)
    );
    let negative = [0x15, 0x04, 0x15, 0x01, 0x15, 0x02];
    let endless = [0x15, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    for bytes in [&negative[..], &endless, &[], &[0x15], &[0x16, 0x04]] {
        assert!(PageHeader::parse(bytes).is_none(), "{bytes:?}");
    }
}

#[test]
fn a_decoders_panic_becomes_an_error() {
    let result = guarded::<()>("column \"x\"", || panic!("offsets do not fit"));
    let text = match result {
        Err(failure) => failure
            .in_file("decode", Path::new("t.parquet"))
            .to_string(),
        Ok(()) => panic!("it panicked"),
    };
    assert_eq!(
        text,
        "t.parquet is damaged: column \"x\" cannot be decoded (offsets do not fit)"
    );
}

#[test]
fn a_table_cut_or_changed_anywhere_never_panics() {
    let (dir, path) = temporary();
    let rows: Vec<SampleRow> = (0..20).map(sample).collect();
    samples::write(&path, &rows, &Footer::new()).expect("written");
    let sound = std::fs::read(&path).expect("readable");
    let damaged = dir.path().join("damaged.parquet");
    for cut in 0..sound.len() {
        std::fs::write(&damaged, &sound[..cut]).expect("written");
        assert!(samples::read(&damaged).is_err(), "cut to {cut}");
    }
    for place in 0..sound.len() {
        for value in [sound[place] ^ 0x01, sound[place] ^ 0x80, 0xff] {
            let mut bytes = sound.clone();
            bytes[place] = value;
            std::fs::write(&damaged, &bytes).expect("written");
            let _ = samples::read(&damaged);
        }
    }
}

#[test]
fn captions_that_come_to_gigabytes_are_refused() {
    let file =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/captions-repeated.parquet");
    assert!(std::fs::metadata(&file).expect("there").len() < 4096);
    let error = captions::read(&file).expect_err("absurd").to_string();
    assert!(error.contains("captions-repeated.parquet"), "{error}");
    assert!(
        error.contains("column \"caption\" has 1310720000 bytes of text"),
        "{error}"
    );
}
