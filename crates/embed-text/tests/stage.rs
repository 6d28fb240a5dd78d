//! The stage from recipe to seal, on tiny random encoders: what is encoded, what is copied, what is refused.

use std::path::{Path, PathBuf};

use artifacts::{CaptionRow, SampleRow, TensorToWrite, TextEmbeddings, write_safetensors};
use half::f16;
use pipeline::{
    Failure, Override, Recipe, RunOptions, Stage, StageReport, files, outputs, run_stage,
};
use tensor::device::cpu;
use tensor::{ParameterSpec, Precision, to_f32};
use text_encoders::{ClipConfig, ClipTextModel, ClipTokenizer, T5Config, T5Encoder, T5Tokenizer};

const DEMO: &str = include_str!("../../../configs/demo.toml");

/// Three rows in the public recipe's layout: 2 tokens of width 3, pooled width 2.
const PUBLIC: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../artifacts/tests/fixtures/public-embeddings.parquet"
);

/// A base with nothing but text encoders, and runs.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let world = Self {
            dir: tempfile::tempdir().expect("a temporary directory"),
        };
        fs_err::create_dir_all(world.path("data")).expect("writable");
        fs_err::write(world.path("data/some.png"), b"stands for the data").expect("writable");
        world.write(
            "text_encoder/config.json",
            r#"{"vocab_size": 8, "hidden_size": 2, "intermediate_size": 3, "num_hidden_layers": 1,
                "num_attention_heads": 1, "max_position_embeddings": 5, "eos_token_id": 7}"#,
        );
        world.write(
            "text_encoder_2/config.json",
            r#"{"vocab_size": 8, "d_model": 3, "d_kv": 2, "d_ff": 4, "num_layers": 1, "num_heads": 1,
                "feed_forward_proj": "gated-gelu"}"#,
        );
        world.write_weights(1);
        world.write(
            "tokenizer/vocab.json",
            r#"{"a": 0, "a</w>": 1, "b": 2, "b</w>": 3, "c": 4, "c</w>": 5, "<|startoftext|>": 6, "<|endoftext|>": 7}"#,
        );
        world.write("tokenizer/merges.txt", "#version: 0.2\n");
        world.write(
            "tokenizer/tokenizer_config.json",
            r#"{"model_max_length": 5}"#,
        );
        world.write(
            "tokenizer_2/tokenizer.json",
            r#"{"version": "1.0", "truncation": null, "padding": null,
                "added_tokens": [
                    {"id": 0, "content": "<pad>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
                    {"id": 1, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
                "normalizer": null,
                "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
                "post_processor": {"type": "TemplateProcessing",
                    "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                    "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}},
                "decoder": null,
                "model": {"type": "Unigram", "unk_id": 2, "byte_fallback": false,
                    "vocab": [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁a", -1.0], ["▁b", -1.0], ["▁c", -1.0]]}}"#,
        );
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn base(&self, name: &str) -> PathBuf {
        self.path("base").join(name)
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.base(name);
        fs_err::create_dir_all(path.parent().expect("below base")).expect("writable");
        fs_err::write(path, text).expect("writable");
    }

    fn write_weights(&self, seed: u32) {
        let clip = ClipConfig::from_file(&self.base("text_encoder/config.json"))
            .expect("a sound configuration");
        write_random(
            &self.base("text_encoder/model.safetensors"),
            &clip.parameters(),
            seed,
        );
        let t5 = T5Config::from_file(&self.base("text_encoder_2/config.json"))
            .expect("a sound configuration");
        write_random(
            &self.base("text_encoder_2/model.safetensors"),
            &t5.parameters(),
            seed,
        );
    }

    fn recipe(&self, overrides: &[&str]) -> Recipe {
        let mut all: Vec<Override> = vec![
            Override::new(
                "base.path",
                self.path("base").to_string_lossy().into_owned(),
            ),
            Override::new(
                "ingest.source",
                self.path("data").to_string_lossy().into_owned(),
            ),
            Override::new("embed_text.t5_tokens", 4),
        ];
        all.extend(
            overrides
                .iter()
                .map(|text| text.parse::<Override>().expect("an override")),
        );
        Recipe::parse(DEMO, Path::new("/w/configs/demo.toml"), &all)
            .expect("the recipe makes sense")
    }

    /// Stands for `ingest`, then runs the stage on these captions.
    fn try_run(
        &self,
        captions: &[&str],
        overrides: &[&str],
        batch: Option<usize>,
    ) -> Result<StageReport, Failure> {
        self.run_or_force(captions, overrides, batch, false)
    }

    fn run_or_force(
        &self,
        captions: &[&str],
        overrides: &[&str],
        batch: Option<usize>,
        force: bool,
    ) -> Result<StageReport, Failure> {
        // Other captions are other data.
        fs_err::write(self.path("data/some.png"), captions.concat()).expect("writable");
        let recipe = self.recipe(overrides);
        let options = RunOptions {
            device: "cpu".to_owned(),
            engine: "auto".to_owned(),
            threads: None,
            batch,
            json: false,
        };
        let (runs, progress) = (self.path("runs"), console::Progress::silent());
        run_stage(
            recipe.clone(),
            &runs,
            Stage::Ingest,
            options.clone(),
            progress.clone(),
            false,
            |context| {
                write_tables(captions, |name| context.path(name));
                let digest = artifacts::digest_bytes(captions.concat().as_bytes());
                let report = [
                    outputs::SAMPLES,
                    outputs::CAPTIONS,
                    outputs::PAIRS,
                    outputs::COMPAT_HASHES,
                ]
                .into_iter()
                .fold(context.report(), |report, name| report.output(name, digest));
                Ok::<StageReport, Failure>(report)
            },
        )
        .expect("ingest has nothing to refuse");
        run_stage(
            recipe,
            &runs,
            Stage::EmbedText,
            options,
            progress,
            force,
            embed_text::run,
        )
        .map(|(report, _)| report)
    }

    fn run(&self, captions: &[&str]) -> StageReport {
        self.try_run(captions, &[], None).expect("the stage runs")
    }
}

/// Image `i` has the hash of the single byte `i` turned by EXIF, as in the public file.
fn write_tables(captions: &[&str], path: impl Fn(&str) -> PathBuf) {
    let id = |i: usize| artifacts::digest_bytes(&[i as u8]).to_string();
    let public = artifacts::read_public_embeddings(Path::new(PUBLIC)).expect("a sound file");
    let keys: Vec<&str> = public.keys().collect();
    let samples: Vec<SampleRow> = (0..captions.len())
        .map(|i| SampleRow {
            sample_id: id(i),
            compat_sha256: format!("{i:064}"),
            compat_sha256_oriented: keys.get(i).unwrap_or(&"unknown").to_string(),
            width_px: 1,
            height_px: 1,
            has_alpha: false,
            num_colors: 1,
            source_file: format!("{i}.png"),
            source_row: None,
        })
        .collect();
    artifacts::samples::write(&path(files::SAMPLES), &samples, &Default::default())
        .expect("writable");
    let rows: Vec<CaptionRow> = captions
        .iter()
        .enumerate()
        .map(|(i, caption)| CaptionRow {
            sample_id: id(i),
            caption_hash: artifacts::captions::caption_hash(caption),
            caption: (*caption).to_owned(),
        })
        .collect();
    artifacts::captions::write(&path(files::CAPTIONS), &rows, &Default::default())
        .expect("writable");
}

fn write_random(path: &Path, parameters: &[ParameterSpec], seed: u32) {
    let mut state = seed;
    let values: Vec<Vec<f32>> = parameters
        .iter()
        .map(|spec| {
            (0..spec.num_elements())
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) as f32 / (1 << 23) as f32 - 1.0
                })
                .collect()
        })
        .collect();
    let tensors: Vec<TensorToWrite> = parameters
        .iter()
        .zip(&values)
        .map(|(spec, values)| TensorToWrite::f32(&spec.name, &spec.shape, values))
        .collect();
    write_safetensors(path, &tensors, &Default::default()).expect("writable");
}

fn counts(report: &StageReport) -> (u64, u64) {
    (report.counts["encoded"], report.counts["reused"])
}

fn table(report: &StageReport) -> TextEmbeddings {
    TextEmbeddings::open(&report.dir.join(files::EMBEDDINGS)).expect("a sound table")
}

#[test]
fn a_distinct_caption_has_one_row_with_what_the_encoders_say() {
    let world = World::new();
    let report = world.run(&["a b", "c", "a b"]);
    assert_eq!(counts(&report), (2, 0));
    let table = table(&report);
    assert_eq!(
        (
            table.len(),
            table.header().t5_width,
            table.header().pooled_width
        ),
        (2, 3, 2)
    );

    let t5_ids = T5Tokenizer::open(&world.base("tokenizer_2"))
        .expect("opens")
        .encode("a b", 4)
        .expect("encodes");
    assert_eq!(t5_ids.ids, [3, 4, 1, 0]);
    let clip_ids = ClipTokenizer::open(&world.base("tokenizer"))
        .expect("opens")
        .encode("a b")
        .expect("encodes");
    assert_eq!(clip_ids.ids, [6, 1, 3, 7, 7]);
    let t5 = T5Encoder::open(&world.base("text_encoder_2"), &cpu(), Precision::F32).expect("loads");
    let clip =
        ClipTextModel::open(&world.base("text_encoder"), &cpu(), Precision::F32).expect("loads");
    let row = table
        .row(&artifacts::captions::caption_hash("a b"))
        .expect("readable")
        .expect("there");
    assert_eq!(row.num_t5_tokens, 3);
    let close = |found: &[f16], expected: Vec<f32>| {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(&expected) {
            assert!(
                (f.to_f32() - e).abs() < 2e-3 * (1.0 + e.abs()),
                "{found:?} is not {expected:?}"
            );
        }
    };
    close(&row.embedding.t5, to_f32(&t5.encode(&[t5_ids.ids])));
    close(
        &row.embedding.pooled,
        to_f32(&clip.encode(&[clip_ids.ids]).pooled),
    );
}

#[test]
fn one_edited_caption_costs_one_encoding() {
    let world = World::new();
    let first = world.run(&["a", "b", "c"]);
    let second = world.run(&["a", "b b", "c"]);
    assert_eq!(counts(&second), (1, 2));
    assert_ne!(first.outputs, second.outputs);
    // The same captions at once, one by one: the same embeddings.
    let other = World::new();
    let whole = other
        .try_run(&["c", "b b", "a"], &[], Some(1))
        .expect("the stage runs");
    assert_eq!(counts(&whole), (3, 0));
    assert_eq!(whole.outputs, second.outputs);
}

#[test]
fn a_forced_run_takes_nothing_over() {
    let world = World::new();
    let first = world.run(&["a", "b"]);
    let forced = world
        .run_or_force(&["a", "b"], &[], None, true)
        .expect("the stage runs");
    assert_eq!(counts(&forced), (2, 0));
    assert_eq!((forced.outputs, forced.dir), (first.outputs, first.dir));
}

#[test]
fn other_encoders_or_another_length_encode_everything_anew() {
    let world = World::new();
    world.run(&["a", "b"]);
    let longer = world
        .try_run(&["a", "b"], &["embed_text.t5_tokens=5"], None)
        .expect("the stage runs");
    assert_eq!(counts(&longer), (2, 0));
    world.write_weights(2);
    assert_eq!(counts(&world.run(&["a", "b"])), (2, 0));
}

#[test]
fn a_caption_over_the_limit_stops_the_stage_with_its_count() {
    let world = World::new();
    let failure = world
        .try_run(&["a", "a b c a b", "a b c a"], &[], None)
        .expect_err("4 positions hold 3 words and the end");
    assert_eq!(failure.kind().exit_code(), 2);
    let text = failure.to_string();
    for part in [
        "\"a b c a b\"",
        "1.png",
        "6 T5 tokens",
        "limit is 4",
        "one more caption",
    ] {
        assert!(text.contains(part), "{part} is not in: {text}");
    }
    assert!(failure.help().expect("advice").contains("at least 6"));
    let sealed = fs_err::read_dir(world.path("runs/embed-text")).expect("readable");
    assert!(
        sealed
            .filter_map(Result::ok)
            .all(|entry| !entry.path().join("manifest.json").exists())
    );
}

#[test]
fn long_captions_are_cut_with_a_note_when_the_recipe_says_so() {
    let world = World::new();
    let report = world
        .try_run(
            &["a", "a b c a b"],
            &["embed_text.long_captions=truncate"],
            None,
        )
        .expect("the stage runs");
    let notes = report.notes.join("\n");
    assert!(
        notes.contains("1 captions were cut to 4 T5 tokens"),
        "{notes}"
    );
    assert!(notes.contains("first 5 tokens of 1 captions"), "{notes}");
    let row = table(&report)
        .row(&artifacts::captions::caption_hash("a b c a b"))
        .expect("readable")
        .expect("there");
    assert_eq!(row.num_t5_tokens, 4);
}

#[test]
fn public_embeddings_are_aligned_by_either_hash() {
    let world = World::new();
    let public = format!("embed_text.public_embeddings='{PUBLIC}'");
    let overrides = ["embed_text.t5_tokens=2", &public];
    let report = world
        .try_run(&["b", "a"], &overrides, None)
        .expect("the stage runs");
    assert_eq!(report.counts["imported"], 2);
    let embedding = table(&report)
        .get(&artifacts::captions::caption_hash("a"))
        .expect("readable")
        .expect("there");
    // Image 1 of the file: 1 + k/8, pooled 0.5 and 1.5.
    assert_eq!(embedding.t5[..3], [1.0, 1.125, 1.25].map(f16::from_f32));
    assert_eq!(embedding.pooled, [0.5, 1.5].map(f16::from_f32));
    // They are never taken for embeddings of the base's own encoders.
    let own = world
        .try_run(&["b", "a"], &["embed_text.t5_tokens=2"], None)
        .expect("the stage runs");
    assert_eq!(counts(&own), (2, 0));
}

#[test]
fn public_embeddings_of_another_length_or_of_other_images_are_bad_input() {
    let world = World::new();
    let public = format!("embed_text.public_embeddings='{PUBLIC}'");
    let failure = world
        .try_run(&["a"], &[&public], None)
        .expect_err("the file has 2 tokens");
    assert_eq!(failure.kind().exit_code(), 2);
    let text = failure.to_string();
    assert!(
        text.contains("2 T5 tokens") && text.contains("embed_text.t5_tokens says 4"),
        "{text}"
    );

    let overrides = ["embed_text.t5_tokens=2", &public];
    let failure = world
        .try_run(
            &["a", "b", "c", "a b c"],
            &[
                "embed_text.long_captions=truncate",
                overrides[0],
                overrides[1],
            ],
            None,
        )
        .expect_err("the file has three images");
    let text = failure.to_string();
    assert!(
        text.contains("no row for 1 of 4 images") && text.contains("3.png"),
        "{text}"
    );

    let failure = world
        .try_run(&["a", "a"], &overrides, None)
        .expect_err("one caption, two embeddings");
    let text = failure.to_string();
    assert!(
        text.contains("0.png and 1.png have the same caption"),
        "{text}"
    );
}

#[test]
fn files_of_public_embeddings_that_have_the_same_image_must_agree() {
    let world = World::new();
    let folder = world.path("public");
    fs_err::create_dir_all(&folder).expect("writable");
    let public = format!("embed_text.public_embeddings='{}'", folder.display());
    let overrides = ["embed_text.t5_tokens=2", &public];
    for name in ["one.parquet", "two.parquet"] {
        fs_err::copy(PUBLIC, folder.join(name)).expect("writable");
    }
    let report = world.try_run(&["a"], &overrides, None);
    assert_eq!(report.expect("they agree").counts["imported"], 1);

    // The same images with other pooled vectors.
    let other = PUBLIC.replace(".parquet", "-not-finite.parquet");
    fs_err::copy(other, folder.join("two.parquet")).expect("writable");
    let failure = world
        .try_run(&["a"], &overrides, None)
        .expect_err("two embeddings of one image");
    assert_eq!(failure.kind().exit_code(), 2);
    let text = failure.to_string();
    assert!(
        text.contains("one.parquet and ") && text.contains("two.parquet have different"),
        "{text}"
    );
}

#[test]
fn a_long_caption_is_shown_by_its_beginning() {
    let world = World::new();
    let caption = "a ".repeat(5000);
    let failure = world
        .try_run(&[&caption], &[], None)
        .expect_err("it has more than four tokens");
    let text = failure.to_string();
    assert!(
        text.contains("…\" of 0.png has") && text.len() < 300,
        "{text}"
    );
}
