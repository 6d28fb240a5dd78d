//! The files in `fixtures/` as Pillow reads them, to the bit; `fixtures/make_pillow_fixtures.py` wrote them and the
//! digests.

use std::path::{Path, PathBuf};

use pixel_art::{Limits, Rgb8, decode, resize_short_side};
use sha2::{Digest, Sha256};

const LIMITS: Limits = Limits { max_pixels: 10_000 };

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn sha256(image: &Rgb8) -> String {
    let digest = Sha256::digest(&image.pixels);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn modes_raw_bytes_conversions_and_resizes_are_pillows() {
    let table = std::fs::read_to_string(fixtures().join("digests.tsv")).expect("a table");
    let mut wrong = Vec::new();
    for line in table.lines() {
        let columns: Vec<&str> = line.split('\t').collect();
        let bytes = std::fs::read(fixtures().join(columns[0])).expect("a fixture");
        let image = decode(&bytes, &LIMITS).unwrap_or_else(|e| panic!("{}: {e:?}", columns[0]));
        let rgb = image.compat_rgb();
        let found = [
            image.pil.mode().name().to_owned(),
            image.pil.width_px().to_string(),
            image.pil.height_px().to_string(),
            image.compat_sha256(),
            image.compat_sha256_oriented(),
            sha256(&rgb),
            sha256(&resize_short_side(&rgb, 13)),
        ];
        if found[..] != columns[1..] {
            wrong.push(format!("{line}\n found {found:?}"));
        }
    }
    assert!(table.lines().count() > 50, "the table is short");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn an_upright_picture_has_its_own_identity_whatever_the_file_says() {
    let read = |name: &str| {
        let bytes = std::fs::read(fixtures().join(name)).expect("a fixture");
        decode(&bytes, &LIMITS).expect("an image")
    };
    let turned = read("exif6.jpg");
    assert_eq!((turned.pil.width_px(), turned.pil.height_px()), (16, 25));
    assert_eq!(
        (turned.picture.width_px, turned.picture.height_px),
        (25, 16)
    );
    assert_eq!(turned.picture.drop_alpha(), turned.compat_rgb());
}

#[test]
fn damaged_files_are_errors_or_images_but_never_panics() {
    let mut state = 1u64;
    let mut random = |below: usize| -> usize {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as usize % below
    };
    for entry in std::fs::read_dir(fixtures()).expect("a folder") {
        let path = entry.expect("an entry").path();
        let name = path.to_string_lossy();
        if name.ends_with(".py") || name.ends_with(".tsv") {
            continue;
        }
        let whole = std::fs::read(&path).expect("a fixture");
        for _ in 0..60 {
            let mut bytes = whole.clone();
            for _ in 0..=random(4) {
                let at = random(bytes.len());
                bytes[at] = random(256) as u8;
            }
            if random(3) == 0 {
                bytes.truncate(random(bytes.len()));
            }
            let _ = decode(&bytes, &LIMITS);
        }
    }
}

#[test]
fn a_truncated_jpeg_is_refused() {
    for name in ["420.jpg", "420_progressive.jpg"] {
        let bytes = std::fs::read(fixtures().join(name)).expect("a fixture");
        let error = decode(&bytes[..bytes.len() * 3 / 4], &LIMITS).expect_err("truncated");
        assert_eq!(error.reason(), "undecodable");
    }
}
