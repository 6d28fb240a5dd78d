//! The whole stage on a small untrained base with tokenizers of a few words.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use artifacts::{Dtype, TensorToWrite, write_safetensors};
use pipeline::recipe::{LongText, LoraChoice, PrecisionChoice, Recipe};
use pipeline::{
    DataSet, FailureKind, RunOptions, Stage, StageContext, StageError as _, StageReport, WeightPart,
};
use sample::SampleError;
use serde_json::json;

/// A base, and a directory to draw into.
struct Workshop {
    dir: tempfile::TempDir,
}

impl Workshop {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let tokenizers = dir.path().join("tokenizers");
        write_tokenizers(&tokenizers);
        let base = dir.path().join("base");
        random_base::write(&base, random_base::Preset::Demo, 0, &tokenizers).expect("written");
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The demo's recipe cut down to one small picture.
    fn recipe(&self) -> Recipe {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/demo.toml");
        let mut recipe = Recipe::load(&demo, &[]).expect("the demo's recipe");
        recipe.base.path = self.path("base");
        let sample = &mut recipe.sample;
        sample.prompts = vec!["a red knight".to_owned()];
        sample.seeds = vec![1];
        sample.steps = 2;
        (sample.width_px, sample.height_px) = (32, 48);
        sample.use_trained_lora = false;
        sample.compare_with_base = false;
        sample.t5_tokens = 16;
        recipe
    }

    fn draw_into(
        &self,
        name: &str,
        recipe: &Recipe,
        batch: Option<usize>,
    ) -> Result<StageReport, Box<SampleError>> {
        let dir = self.path(name);
        fs_err::create_dir_all(&dir).expect("made");
        sample::run(&StageContext {
            stage: Stage::Sample,
            data: DataSet::Training,
            recipe: recipe.clone(),
            runs: self.path("runs"),
            dir,
            forced: false,
            inputs: BTreeMap::new(),
            components: WeightPart::ALL
                .map(|part| (format!("weights.{}", part.name()), "0".repeat(64)))
                .into(),
            options: RunOptions {
                device: "cpu".to_owned(),
                engine: "auto".to_owned(),
                threads: None,
                batch,
                json: false,
            },
            progress: console::Progress::silent(),
        })
        .map_err(Box::new)
    }

    fn draw(&self, name: &str, recipe: &Recipe) -> StageReport {
        self.draw_into(name, recipe, None).expect("drawn")
    }

    /// The message of a run that must fail through the person's fault, and leave nothing behind.
    fn refusal(&self, recipe: &Recipe) -> String {
        let error = self
            .draw_into("refused", recipe, None)
            .expect_err("cannot be drawn");
        assert_eq!(error.kind(), FailureKind::BadInput, "{error}");
        assert_eq!(files(&self.path("refused")).len(), 0, "nothing was written");
        error.to_string()
    }

    /// A LoRA of rank 1 on the given module, every number `value`.
    fn lora(&self, name: &str, module: &str, value: f32) -> LoraChoice {
        let path = self.path(name);
        let bytes: Vec<u8> = [value; 96].iter().flat_map(|v| v.to_le_bytes()).collect();
        let keys = ["A", "B"].map(|half| format!("transformer.{module}.lora_{half}.weight"));
        let tensor = |name, shape| TensorToWrite {
            name,
            dtype: Dtype::F32,
            shape,
            bytes: &bytes,
        };
        let tensors = [tensor(&keys[0], &[1, 96]), tensor(&keys[1], &[96, 1])];
        write_safetensors(&path, &tensors, &BTreeMap::new()).expect("written");
        LoraChoice { path, scale: 1.0 }
    }
}

fn write_tokenizers(dir: &Path) {
    let write = |name: &str, text: &str| {
        let path = dir.join(name);
        fs_err::create_dir_all(path.parent().expect("below dir")).expect("made");
        fs_err::write(path, text).expect("written");
    };
    let vocabulary = json!({"a</w>": 0, "red</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3});
    write("clip/vocab.json", &vocabulary.to_string());
    write("clip/merges.txt", "#version: 0.2\n");
    write("clip/special_tokens_map.json", "{}");
    write("clip/tokenizer_config.json", r#"{"model_max_length": 77}"#);
    let pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁a", -1.0),
        ("▁red", -1.0),
        ("▁", -2.0),
    ];
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}
        },
        "decoder": null,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces, "byte_fallback": false}
    });
    write("t5/tokenizer.json", &tokenizer.to_string());
    write("t5/spiece.model", "");
    write("t5/special_tokens_map.json", "{}");
    write("t5/tokenizer_config.json", "{}");
}

/// Names and bytes of a directory's files.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fs_err::read_dir(dir)
        .expect("a directory")
        .map(|entry| {
            let entry = entry.expect("an entry");
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, fs_err::read(entry.path()).expect("readable"))
        })
        .collect()
}

/// A PNG's pixels, red, green, blue and alpha in turn.
fn pixels(path: &Path) -> Vec<u8> {
    let bytes = fs_err::read(path).expect("it was drawn");
    let limits = pixel_art::Limits {
        max_pixels: 1 << 20,
    };
    let decoded = pixel_art::decode(&bytes, &limits).expect("a PNG");
    decoded.picture.pixels
}

#[test]
fn a_run_leaves_a_picture_for_every_prompt_and_seed_a_sheet_and_an_index() {
    let workshop = Workshop::new();
    let mut recipe = workshop.recipe();
    recipe.sample.prompts.push("a".to_owned());
    recipe.sample.seeds = vec![1, 2];
    let report = workshop.draw("drawn", &recipe);
    let names: Vec<String> = files(&workshop.path("drawn")).into_keys().collect();
    assert_eq!(
        names,
        [
            "0000-a-red-knight-s1.png",
            "0001-a-red-knight-s2.png",
            "0002-a-s1.png",
            "0003-a-s2.png",
            "images.json",
            "sheet.png",
        ]
    );
    assert_eq!(report.counts["images"], 4);
    let notes = report.notes.join("\n");
    assert!(notes.contains("these pictures are noise"), "{notes}");
}

#[test]
fn a_comparison_draws_each_picture_once_more_by_the_base_alone() {
    let workshop = Workshop::new();
    let mut recipe = workshop.recipe();
    workshop.draw("plain", &recipe);
    let module = "transformer_blocks.0.attn.to_v";
    recipe.sample.loras = vec![workshop.lora("cape.safetensors", module, 0.3)];
    recipe.sample.compare_with_base = true;
    let report = workshop.draw("compared", &recipe);
    assert_eq!(report.counts["images"], 2);
    let (plain, compared) = (
        files(&workshop.path("plain")),
        files(&workshop.path("compared")),
    );
    let names: Vec<&str> = compared.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "0000-a-red-knight-s1-base.png",
            "0000-a-red-knight-s1.png",
            "before-after.png",
            "images.json",
            "sheet.png",
        ]
    );
    assert!(
        compared["0000-a-red-knight-s1-base.png"] == plain["0000-a-red-knight-s1.png"],
        "without LoRAs it is the base's own picture"
    );
    let images =
        artifacts::images::read(&workshop.path("compared/images.json")).expect("the index");
    assert_eq!(
        images.iter().map(|i| i.without_loras).collect::<Vec<_>>(),
        [false, true]
    );
    assert_ne!(images[0].pixels, images[1].pixels);
}

#[test]
fn the_same_request_gives_the_same_bytes() {
    let workshop = Workshop::new();
    let recipe = workshop.recipe();
    workshop.draw("first", &recipe);
    workshop.draw("second", &recipe);
    assert_eq!(
        files(&workshop.path("first")),
        files(&workshop.path("second"))
    );
}

#[test]
fn a_picture_is_the_same_whatever_else_is_drawn() {
    let workshop = Workshop::new();
    let mut recipe = workshop.recipe();
    workshop.draw("alone", &recipe);
    recipe.sample.prompts.insert(0, "a".to_owned());
    recipe.sample.seeds.insert(0, 9);
    workshop.draw("among", &recipe);
    let alone = &files(&workshop.path("alone"))["0000-a-red-knight-s1.png"];
    let among = &files(&workshop.path("among"))["0003-a-red-knight-s1.png"];
    assert_eq!(alone, among);
}

#[test]
fn a_larger_batch_changes_a_picture_by_rounding_at_most() {
    let workshop = Workshop::new();
    let mut recipe = workshop.recipe();
    recipe.sample.seeds = vec![1, 2, 3];
    workshop.draw("one", &recipe);
    workshop.draw_into("two", &recipe, Some(2)).expect("drawn");
    for seed in 1..=3 {
        let name = format!("{:04}-a-red-knight-s{seed}.png", seed - 1);
        let [one, two] = ["one", "two"].map(|dir| pixels(&workshop.path(dir).join(&name)));
        assert_eq!(one.len(), two.len());
        assert!(
            one.iter().zip(&two).all(|(a, b)| a.abs_diff(*b) <= 1),
            "seed {seed}"
        );
    }
}

#[test]
fn sixteen_bits_draw_nearly_the_picture_of_thirty_two() {
    let workshop = Workshop::new();
    let mut recipe = workshop.recipe();
    workshop.draw("f32", &recipe);
    let exact = pixels(&workshop.path("f32/0000-a-red-knight-s1.png"));
    assert!(exact.iter().any(|value| *value != exact[0]));
    for precision in [PrecisionChoice::Bf16, PrecisionChoice::Fp16] {
        recipe.sample.precision = precision;
        workshop.draw("half", &recipe);
        let found = pixels(&workshop.path("half/0000-a-red-knight-s1.png"));
        let difference: f64 = found
            .iter()
            .zip(&exact)
            .map(|(a, b)| f64::from(a.abs_diff(*b)))
            .sum();
        let mean = difference / exact.len() as f64;
        assert!(mean < 3.0, "{precision:?}: {mean} of 255");
    }
}

#[test]
fn a_picture_that_came_to_nothing_is_told_and_not_painted_black() {
    let workshop = Workshop::new();
    let mut recipe = workshop.recipe();
    let module = "transformer_blocks.0.attn.to_v";
    recipe.sample.loras = vec![workshop.lora("wild.safetensors", module, 1e20)];
    let error = workshop
        .draw_into("wild", &recipe, None)
        .expect_err("numbers beyond all range");
    assert_eq!(error.kind(), FailureKind::Failed);
    let message = error.to_string();
    assert!(
        message.contains("a red knight") && message.contains("LoRA"),
        "{message}"
    );
    assert!(error.help().is_some_and(|help| help.contains("strength")));
}

#[test]
fn a_sheet_beyond_all_size_is_refused_before_anything_is_drawn() {
    let workshop = Workshop::new();
    let mut recipe = workshop.recipe();
    recipe.sample.sheet_magnify = u32::MAX;
    let message = workshop.refusal(&recipe);
    assert!(
        message.contains("sample.sheet_magnify = 4294967295"),
        "{message}"
    );
}

#[test]
fn a_torn_vae_is_refused_before_anything_is_drawn() {
    let workshop = Workshop::new();
    let file = workshop.path("base/vae/diffusion_pytorch_model.safetensors");
    let bytes = fs_err::read(&file).expect("the base's");
    fs_err::write(&file, &bytes[..bytes.len() / 2]).expect("torn");
    let mut recipe = workshop.recipe();
    // Nothing is left of the transformer: whoever came so far would stop at that.
    fs_err::remove_file(workshop.path("base/transformer/diffusion_pytorch_model.safetensors"))
        .expect("removed");
    recipe.sample.steps = 1;
    let message = workshop.refusal(&recipe);
    assert!(message.contains("vae"), "{message}");
}

#[test]
fn loras_and_true_cfg_change_the_picture_and_are_in_its_parameters() {
    let workshop = Workshop::new();
    let mut recipe = workshop.recipe();
    let plain = workshop.draw("plain", &recipe);
    let module = "transformer_blocks.0.attn.to_v";
    recipe.sample.loras = vec![workshop.lora("cape.safetensors", module, 0.3); 2];
    let adapted = workshop.draw("adapted", &recipe);
    recipe.sample.true_cfg_scale = 3.0;
    recipe.sample.negative_prompt = "a".to_owned();
    let guided = workshop.draw("guided", &recipe);
    assert_ne!(plain.outputs, adapted.outputs);
    assert_ne!(adapted.outputs, guided.outputs);
    let bytes = &files(&workshop.path("guided"))["0000-a-red-knight-s1.png"];
    let texts = pixel_art::read_png_text(bytes).expect("a PNG");
    let (_, text) = texts
        .iter()
        .find(|(keyword, _)| keyword == "parameters")
        .expect("there");
    assert!(
        text.starts_with("a red knight <lora:cape:1> <lora:cape:1>\nNegative prompt: a\n"),
        "{text}"
    );
}

#[test]
fn a_size_between_tokens_is_refused_with_the_nearest_one() {
    let workshop = Workshop::new();
    let mut recipe = workshop.recipe();
    (recipe.sample.width_px, recipe.sample.height_px) = (100, 48);
    let message = workshop.refusal(&recipe);
    assert!(
        message.contains("multiples of 16") && message.contains("96×48"),
        "{message}"
    );
}

#[test]
fn a_long_prompt_is_refused_with_its_count_and_cut_when_asked_to() {
    let workshop = Workshop::new();
    let mut recipe = workshop.recipe();
    recipe.sample.prompts = vec![["a"; 30].join(" ")];
    let message = workshop.refusal(&recipe);
    assert!(
        message.contains("31 T5 tokens") && message.contains("limit is 16"),
        "{message}"
    );
    recipe.sample.long_prompts = LongText::Truncate;
    let notes = workshop.draw("cut", &recipe).notes.join("\n");
    assert!(notes.contains("was cut to 16"), "{notes}");
}

#[test]
fn a_lora_with_unknown_keys_is_refused_by_their_names() {
    let workshop = Workshop::new();
    let mut recipe = workshop.recipe();
    let module = "transformer_blocks.40.attn.to_q";
    recipe.sample.loras = vec![workshop.lora("other.safetensors", module, 0.0)];
    let message = workshop.refusal(&recipe);
    assert!(
        message.contains(module) && message.contains("other.safetensors"),
        "{message}"
    );
}

#[test]
fn parts_of_different_models_are_refused() {
    let workshop = Workshop::new();
    let path = workshop.path("base/vae/config.json");
    let config = fs_err::read_to_string(&path).expect("there");
    let config = config.replace("\"latent_channels\": 16", "\"latent_channels\": 4");
    fs_err::write(&path, config).expect("written");
    let message = workshop.refusal(&workshop.recipe());
    assert!(
        message.contains("64 by the transformer and 16 by the VAE"),
        "{message}"
    );
}
