//! The whole stage on small sources: the three layouts, and every kind of bad input with what the person is told.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use artifacts::{CaptionRow, RejectRow, SampleRow, captions, rejects, samples};
use console::Progress;
use pipeline::{
    DataSet, Failure, Recipe, RunOptions, Stage, StageReport, files, outputs, run_stage,
};
use pixel_art::{Rgba8, encode_png_rgba, identity};
use tempfile::TempDir;

/// A data folder and a runs directory.
struct World {
    dir: TempDir,
    source: PathBuf,
    max_rejects: u64,
    max_pixels: u64,
    threads: usize,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let source = dir.path().join("data");
        std::fs::create_dir(&source).expect("created");
        Self {
            dir,
            source,
            max_rejects: 0,
            max_pixels: 10_000,
            threads: 2,
        }
    }

    fn shards() -> Self {
        let mut world = Self::new();
        world.source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/shards");
        world
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> &Self {
        let path = self.source.join(name);
        std::fs::create_dir_all(path.parent().expect("below the source")).expect("created");
        std::fs::write(path, bytes).expect("written");
        self
    }

    /// `metadata.jsonl` from pairs.
    fn metadata(&self, lines: &[(&str, &str)]) -> &Self {
        let mut text = String::new();
        for (file_name, caption) in lines {
            let _ = writeln!(
                text,
                "{{\"file_name\": {file_name:?}, \"text\": {caption:?}}}"
            );
        }
        self.write("metadata.jsonl", text)
    }

    fn run(&self) -> Result<StageReport, Failure> {
        let demo = include_str!("../../../configs/demo.toml");
        let place = self.dir.path().join("configs/demo.toml");
        let mut recipe = Recipe::parse(demo, &place, &[]).expect("the demo's recipe is sound");
        recipe.ingest.source.clone_from(&self.source);
        recipe.ingest.max_rejects = self.max_rejects;
        recipe.ingest.max_pixels = self.max_pixels;
        let options = RunOptions {
            device: "cpu".to_owned(),
            engine: "auto".to_owned(),
            threads: Some(self.threads),
            batch: None,
            json: false,
        };
        let runs = self.dir.path().join("runs");
        run_stage(
            recipe,
            &runs,
            Stage::Ingest,
            options,
            Progress::silent(),
            true,
            crate::run,
        )
        .map(|(report, _)| report)
    }

    fn tables(&self) -> (StageReport, Vec<SampleRow>, Vec<CaptionRow>, Vec<RejectRow>) {
        let report = self
            .run()
            .unwrap_or_else(|failure| panic!("{:#?}", failure.messages()));
        let path = |name: &str| report.dir.join(name);
        let samples = samples::read(&path(files::SAMPLES)).expect("readable");
        let captions = captions::read(&path(files::CAPTIONS)).expect("readable");
        let rejects = rejects::read(&path(files::REJECTS)).expect("readable");
        (report, samples, captions, rejects)
    }

    /// What the person is told; the failure must be theirs to mend, and an earlier artifact must stand as it was.
    fn refused(&self) -> String {
        let runs = self.dir.path().join("runs");
        let before = files_below(&runs);
        let failure = self.run().expect_err("bad input");
        assert_eq!(failure.kind().exit_code(), 2, "{failure}");
        let after = files_below(&runs);
        assert_eq!(before, after);
        let help = failure.help().unwrap_or_default().to_owned();
        format!("{}\n{help}", failure.messages().join(": "))
    }
}

fn files_below(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            found.extend(files_below(&path));
        } else if !path.ends_with(".digest-cache.json") && !path.ends_with(".lock") {
            let bytes = std::fs::read(&path).expect("readable");
            found.push((path, bytes));
        }
    }
    found.sort();
    found
}

fn picture(color: [u8; 4]) -> Rgba8 {
    Rgba8::new(2, 1, [[0, 0, 0, 255], color].concat())
}

fn png(color: [u8; 4]) -> Vec<u8> {
    encode_png_rgba(&picture(color), &[]).expect("encodable")
}

const RED: [u8; 4] = [255, 0, 0, 255];
const GREEN: [u8; 4] = [0, 255, 0, 255];

#[test]
fn a_folder_with_metadata_becomes_three_tables() {
    let world = World::new();
    world
        .write("a.png", png(RED))
        .write("sub/b.png", png([9, 9, 9, 0]))
        .metadata(&[("a.png", "red"), ("./sub/b.png", "clear")]);
    let (report, samples, captions, rejects) = world.tables();
    let mut expected = [identity(&picture(RED)), identity(&picture([0; 4]))];
    expected.sort();
    let ids: Vec<&str> = samples.iter().map(|row| row.sample_id.as_str()).collect();
    assert_eq!(ids, expected);
    let red = &samples[usize::from(samples[0].source_file != "a.png")];
    assert_eq!(
        (
            red.width_px,
            red.height_px,
            red.has_alpha,
            red.num_colors,
            red.source_row
        ),
        (2, 1, false, 2, None)
    );
    let clear = &samples[usize::from(samples[0].source_file == "a.png")];
    assert_eq!(
        (clear.source_file.as_str(), clear.has_alpha),
        ("sub/b.png", true)
    );
    assert_ne!(red.compat_sha256, clear.compat_sha256);
    assert_eq!(
        captions
            .iter()
            .map(|row| &row.sample_id)
            .collect::<Vec<_>>(),
        ids
    );
    let of_red = captions
        .iter()
        .find(|row| row.sample_id == red.sample_id)
        .expect("there");
    assert_eq!(of_red.caption, "red");
    assert!(rejects.is_empty());
    assert_eq!((report.counts["images"], report.counts["samples"]), (2, 2));
    for name in [
        outputs::SAMPLES,
        outputs::CAPTIONS,
        outputs::PAIRS,
        outputs::COMPAT_HASHES,
    ] {
        assert_eq!(report.outputs[name].len(), 64, "{name}");
    }
}

#[test]
fn metadata_below_a_subfolder_names_images_from_there() {
    let world = World::new();
    world
        .write(
            "train/metadata.csv",
            "file_name,text\na.png,\"red, bright\"\n",
        )
        .write("train/a.png", png(RED));
    let (_, samples, captions, _) = world.tables();
    assert_eq!(samples[0].source_file, "train/a.png");
    assert_eq!(captions[0].caption, "red, bright");
}

#[test]
fn text_files_beside_images_are_their_captions() {
    let world = World::new();
    world
        .write("a.png", png(RED))
        .write("a.txt", "\u{feff} a red knight\r\n")
        .write("b.png", png(GREEN))
        .write("b.txt", "green")
        .write("LICENSE.txt", "CC0");
    let (report, _, captions, _) = world.tables();
    let mut texts: Vec<&str> = captions.iter().map(|row| row.caption.as_str()).collect();
    texts.sort_unstable();
    assert_eq!(texts, ["a red knight", "green"]);
    assert!(
        report.notes[0].contains("LICENSE.txt"),
        "{:?}",
        report.notes
    );
}

#[test]
fn parquet_shards_are_read_with_their_rows() {
    let mut world = World::shards();
    world.max_rejects = 4;
    let (report, samples, _, rejects) = world.tables();
    let mut places: Vec<(&str, Option<u32>)> = samples
        .iter()
        .map(|row| (row.source_file.as_str(), row.source_row))
        .collect();
    places.sort_unstable();
    let (first, second) = (
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    );
    assert_eq!(
        places,
        [(first, Some(0)), (first, Some(1)), (second, Some(0))]
    );
    let reasons: Vec<(&str, Option<u32>, &str)> = rejects
        .iter()
        .map(|row| {
            (
                row.source_file.as_str(),
                row.source_row,
                row.reason.as_str(),
            )
        })
        .collect();
    assert_eq!(
        reasons,
        [
            (first, Some(2), "duplicate"),
            (second, Some(1), "missing-caption"),
            (second, Some(2), "zero-bytes"),
            (second, Some(3), "undecodable"),
            (second, Some(4), "empty-caption"),
        ]
    );
    assert_eq!(
        (report.counts["duplicates"], report.counts["rejects"]),
        (1, 4)
    );
    let red = samples
        .iter()
        .find(|row| row.source_file == first && row.source_row == Some(0));
    assert_eq!(red.expect("taken").sample_id, identity(&picture(RED)));
}

#[test]
fn one_parquet_file_is_a_source_too() {
    let mut world = World::shards();
    world.source = world.source.join("train-00000-of-00002.parquet");
    let (_, samples, _, rejects) = world.tables();
    assert_eq!((samples.len(), rejects.len()), (2, 1));
}

#[test]
fn the_same_data_gives_the_same_bytes_from_any_number_of_threads_and_any_folder() {
    let world = |threads| {
        let mut world = World::new();
        world.threads = threads;
        for shade in 0..40u8 {
            let name = format!("{shade:02}.png");
            world.write(&name, png([shade, 1, 2, 255]));
            world.write(&format!("{shade:02}.txt"), format!("shade {}", shade / 2));
        }
        world
            .write("zz.png", png([7, 1, 2, 255]))
            .write("zz.txt", "shade 3");
        world.write("zzz.png", "").write("zzz.txt", "empty");
        world.max_rejects = 1;
        let report = world.run().expect("it runs");
        let tables = [files::SAMPLES, files::CAPTIONS, files::REJECTS]
            .map(|name| std::fs::read(report.dir.join(name)).expect("written"));
        (tables, report.outputs, report.counts)
    };
    let one = world(1);
    assert_eq!(one, world(3));
    assert_eq!(one.2["distinct_captions"], 20);
}

#[test]
fn each_digest_changes_with_what_it_covers_only() {
    let outputs_of = |change: &dyn Fn(&World)| {
        let world = World::new();
        world.write("a.png", png(RED)).write("b.png", png(GREEN));
        world.metadata(&[("a.png", "red"), ("b.png", "green")]);
        change(&world);
        let report = world.run().expect("it runs");
        [
            outputs::SAMPLES,
            outputs::CAPTIONS,
            outputs::PAIRS,
            outputs::COMPAT_HASHES,
        ]
        .map(|name| report.outputs[name].clone())
    };
    let base = outputs_of(&|_| {});
    let differs = |change: &dyn Fn(&World)| {
        let changed = outputs_of(change);
        std::array::from_fn(|index| changed[index] != base[index])
    };
    let renamed = differs(&|world| {
        std::fs::rename(world.source.join("a.png"), world.source.join("c.png")).expect("renamed");
        world.metadata(&[("b.png", "green"), ("c.png", "red")]);
    });
    assert_eq!(renamed, [false; 4]);
    let caption = differs(&|world| {
        world.metadata(&[("a.png", "scarlet"), ("b.png", "green")]);
    });
    assert_eq!(caption, [false, true, true, false]);
    let swapped = differs(&|world| {
        world.metadata(&[("a.png", "green"), ("b.png", "red")]);
    });
    assert_eq!(swapped, [false, false, true, false]);
    let pixel = differs(&|world| {
        world.write("a.png", png([254, 0, 0, 255]));
    });
    assert_eq!(pixel, [true, false, true, true]);
    // Hidden colour shows in the public recipe's hash only.
    let hidden = |color: [u8; 4]| {
        outputs_of(&|world: &World| {
            world.write("a.png", png(color));
        })
    };
    let (one, other) = (hidden([1, 2, 3, 0]), hidden([4, 5, 6, 0]));
    assert_eq!(
        std::array::from_fn(|at| one[at] != other[at]),
        [false, false, false, true]
    );
}

#[test]
fn a_failed_run_leaves_the_earlier_artifact() {
    let world = World::new();
    world.write("a.png", png(RED)).metadata(&[("a.png", "red")]);
    world.run().expect("it runs");
    world.write("a.png", "");
    let text = world.refused();
    assert!(
        text.contains("a.png: the file is empty (0 bytes) (zero-bytes)"),
        "{text}"
    );
}

/// A good image and one that is bad in some way.
fn with_bad(bad: impl Fn(&World)) -> String {
    let world = World::new();
    world
        .write("good.png", png(GREEN))
        .write("good.txt", "green");
    bad(&world);
    world.refused()
}

/// A PNG file's signature and header chunk (CRC included) of a picture of 60,000 × 60,000.
const HUGE_PNG: &[u8] =
    b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\xea\x60\0\0\xea\x60\x08\x06\0\0\0\x80\xd2\x75\x42";

#[test]
fn every_bad_image_is_named_with_its_reason_and_what_to_do() {
    let cases: [(&str, &[u8], &str, &str); 6] = [
        (
            "bad.png",
            b"",
            "the file is empty (0 bytes) (zero-bytes)",
            "fetch the file again",
        ),
        (
            "bad.png",
            b"hello",
            "is not a PNG, JPEG",
            "convert the image to PNG",
        ),
        (
            "bad.tiff",
            b"II*\0",
            "is not a PNG, JPEG",
            "convert the image to PNG",
        ),
        (
            "bad.png",
            b"\x89PNG\r\n\x1a\n",
            "cannot be decoded",
            "save the image again",
        ),
        (
            "bad.jpg",
            b"\xff\xd8\xff\xd9",
            "cannot be decoded",
            "save the image again",
        ),
        (
            "bad.png",
            HUGE_PNG,
            "60000×60000 px; at most 10000 pixels",
            "raise ingest.max_pixels",
        ),
    ];
    for (name, bytes, said, advised) in cases {
        let text = with_bad(|world| {
            world.write(name, bytes).write("bad.txt", "bad");
        });
        assert!(
            text.contains("1 image cannot be used, and ingest.max_rejects is 0"),
            "{text}"
        );
        assert!(
            text.contains(&format!("- {name}: ")) && text.contains(said),
            "{text}"
        );
        assert!(
            text.contains(advised) && text.contains("ingest.max_rejects = 1"),
            "{text}"
        );
    }
}

#[test]
fn every_bad_caption_is_named_with_its_reason_and_what_to_do() {
    let text = with_bad(|world| {
        world.write("bad.png", png(RED));
    });
    assert!(
        text.contains("there is no bad.txt beside it (missing-caption)"),
        "{text}"
    );
    let text = with_bad(|world| {
        world.write("bad.png", png(RED)).write("bad.txt", " \n");
    });
    assert!(
        text.contains("its caption is empty (empty-caption)"),
        "{text}"
    );
    assert!(text.contains("write the caption"), "{text}");
    let text = with_bad(|world| {
        world
            .write("bad.png", png(RED))
            .write("bad.txt", b"\xff\xfe");
    });
    assert!(
        text.contains("bad.txt is not UTF-8") && text.contains("(caption-not-text)"),
        "{text}"
    );
    let text = with_bad(|world| {
        world
            .write("bad.png", png(RED))
            .metadata(&[("good.png", "green")]);
    });
    assert!(
        text.contains("bad.png: no line of metadata.jsonl names it (missing-caption)"),
        "{text}"
    );
}

#[test]
fn a_file_with_more_bytes_than_its_pixels_could_need_is_not_read() {
    let mut world = World::new();
    world.max_pixels = 4;
    world
        .write("good.png", png(GREEN))
        .write("good.txt", "green");
    world
        .write("bad.png", vec![0; (16 << 20) + 33])
        .write("bad.txt", "bad");
    let text = world.refused();
    assert!(
        text.contains("the file has more than 16777248 bytes") && text.contains("(too-large)"),
        "{text}"
    );
}

#[test]
fn metadata_that_names_no_file_of_the_folder_is_refused() {
    let world = World::new();
    world.write("a.png", png(RED));
    std::fs::write(world.dir.path().join("secret.png"), png(GREEN)).expect("written");
    for (name, said) in [
        ("../secret.png", "without \"..\" (path-escapes)"),
        ("/etc/passwd", "must be relative"),
        ("sub/../../secret.png", "(path-escapes)"),
        (
            "absent.png",
            "line 2 of metadata.jsonl names it, but there is no such file (missing-image)",
        ),
        (
            "A.PNG",
            "(there is a.png: letter case counts) (missing-image)",
        ),
    ] {
        world.metadata(&[("a.png", "red"), (name, "x")]);
        let text = world.refused();
        assert!(
            text.contains(said) && text.contains(&format!("- {name}: ")),
            "{text}"
        );
    }
}

#[test]
fn damaged_metadata_is_named_with_its_line() {
    let world = World::new();
    world
        .write("a.png", png(RED))
        .write("metadata.jsonl", "{\"file_name\": \"a.png\",");
    let text = world.refused();
    assert!(
        text.contains("metadata.jsonl, line 1: is not a JSON object"),
        "{text}"
    );
    world.write(
        "metadata.jsonl",
        "{\"file_name\": \"a.png\", \"prompt\": \"red\"}",
    );
    let text = world.refused();
    assert!(
        text.contains("no column \"text\"") && text.contains("file_name, prompt"),
        "{text}"
    );
    assert!(text.contains("ingest.caption_column"), "{text}");
    world
        .metadata(&[("a.png", "red")])
        .write("metadata.csv", "file_name,text\n");
    assert!(
        world
            .refused()
            .contains("both metadata.jsonl and metadata.csv")
    );
}

#[test]
fn the_same_picture_with_the_same_caption_is_taken_once() {
    let world = World::new();
    world.write("b.png", png(RED)).write("a.png", png(RED));
    world.metadata(&[("b.png", "red"), ("a.png", "red"), ("a.png", "red")]);
    let (report, samples, _, rejects) = world.tables();
    assert_eq!(samples.len(), 1);
    assert_eq!(samples[0].source_file, "a.png");
    let found: Vec<(&str, &str, &str)> = rejects
        .iter()
        .map(|row| {
            (
                row.source_file.as_str(),
                row.reason.as_str(),
                row.detail.as_str(),
            )
        })
        .collect();
    let detail = "the same picture with the same caption is a.png";
    assert_eq!(
        found,
        [
            ("a.png", "duplicate", detail),
            ("b.png", "duplicate", detail)
        ]
    );
    assert_eq!(
        (report.counts["duplicates"], report.counts["rejects"]),
        (2, 0)
    );
}

#[test]
fn the_same_picture_with_two_captions_is_refused_whatever_max_rejects_is() {
    let mut world = World::new();
    world.max_rejects = 100;
    world
        .write("a.png", png(RED))
        .write("b.png", png(RED))
        .write("c.png", png(GREEN));
    world.metadata(&[("a.png", "red"), ("b.png", "crimson"), ("c.png", "green")]);
    let text = world.refused();
    assert!(text.contains("the same picture has two captions"), "{text}");
    assert!(
        text.contains("a.png: \"red\"") && text.contains("b.png: \"crimson\""),
        "{text}"
    );
    assert!(text.contains("keep one caption"), "{text}");
}

#[test]
fn rejects_up_to_the_limit_are_rows_and_beyond_it_a_failure_that_lists_twenty() {
    let mut world = World::new();
    world
        .write("good.png", png(GREEN))
        .write("good.txt", "green");
    for number in 0..25 {
        world
            .write(&format!("{number:02}.png"), "")
            .write(&format!("{number:02}.txt"), "x");
    }
    world.max_rejects = 24;
    let text = world.refused();
    assert!(
        text.contains("25 images cannot be used, and ingest.max_rejects is 24"),
        "{text}"
    );
    assert_eq!(text.matches("(zero-bytes)").count(), 20);
    assert!(text.contains("and 5 more"), "{text}");
    world.max_rejects = 25;
    let (report, samples, _, rejects) = world.tables();
    assert_eq!((samples.len(), rejects.len()), (1, 25));
    assert!(
        report.notes[0].contains("25 of 26 images were left out"),
        "{:?}",
        report.notes
    );
}

#[test]
fn nothing_left_is_a_failure_whatever_max_rejects_is() {
    let mut world = World::new();
    world.max_rejects = 9;
    world.write("a.png", "").write("a.txt", "x");
    let text = world.refused();
    assert!(
        text.contains("no image of") && text.contains("a.png: the file is empty"),
        "{text}"
    );
}

#[test]
fn a_source_of_no_known_layout_is_refused() {
    let world = World::new();
    assert!(world.refused().contains("holds no files"));
    world.write("notes.md", "x");
    let text = world.refused();
    assert!(
        text.contains("neither images nor .parquet files (it holds notes.md)"),
        "{text}"
    );
    world.write("a.png", png(RED)).write("b.parquet", "x");
    let text = world.refused();
    assert!(
        text.contains("holds an image folder (a.png) and Parquet files (b.parquet)"),
        "{text}"
    );
    world.metadata(&[("a.png", "red")]);
    assert!(
        world
            .refused()
            .contains("(metadata.jsonl) and Parquet files (b.parquet)")
    );
    let mut world = World::new();
    world.write("a.zip", "x");
    world.source = world.source.join("a.zip");
    assert!(
        world
            .refused()
            .contains("a file must be a Parquet data set")
    );
    world.source = world.dir.path().join("nowhere");
    assert!(world.refused().contains("does not exist"));
}

#[test]
fn parquet_without_the_column_or_damaged_is_refused() {
    let world = World::new();
    let shard = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/shards/train-00000-of-00002.parquet");
    let bytes = std::fs::read(shard).expect("a fixture");
    world.write("a.parquet", &bytes[..bytes.len() / 2]);
    let text = world.refused();
    assert!(text.contains("a.parquet is damaged"), "{text}");

    world.write("a.parquet", &bytes);
    let demo = include_str!("../../../configs/demo.toml");
    let place = world.dir.path().join("configs/demo.toml");
    let mut recipe = Recipe::parse(demo, &place, &[]).expect("sound").ingest;
    recipe.source.clone_from(&world.source);
    recipe.caption_column = "caption".to_owned();
    let error = crate::open(&recipe, DataSet::Training)
        .map(|_| ())
        .expect_err("no such column");
    let failure = Failure::from(error);
    assert_eq!(failure.kind().exit_code(), 2);
    let text = failure.to_string();
    assert!(
        text.contains("no column \"caption\"") && text.contains("image, text"),
        "{text}"
    );
}
