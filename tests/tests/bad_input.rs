//! Bad input of every kind: a message that names it, exit code 2, and artifacts left as they were.

use std::path::Path;

use end_to_end::{Ended, Project};

/// A project that has run once, then was spoilt: the command must refuse and leave everything sealed alone.
fn refuses(spoil: impl FnOnce(&Project), command: &str, changes: &[&str], says: &[&str]) {
    let project = Project::new(3);
    let ended = project.xtask("run", &[]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    spoil(&project);
    let before = project.fingerprint_of_artifacts();
    project.xtask(command, changes).is_bad_input(says);
    let after = project.fingerprint_of_artifacts();
    for file in &before {
        assert!(after.contains(file), "{} was changed", file.0.display());
    }
    let sealed = |files: &[(std::path::PathBuf, blake3::Hash)]| {
        files
            .iter()
            .filter(|(path, _)| path.ends_with("manifest.json"))
            .count()
    };
    assert_eq!(sealed(&before), sealed(&after), "a refused run was sealed");
}

fn edit_captions(project: &Project, edit: impl Fn(usize, &str) -> Option<String>) {
    let captions = fs_err::read_to_string(project.captions()).expect("captions");
    let edited: Vec<String> = captions
        .lines()
        .enumerate()
        .filter_map(|(index, line)| edit(index, line))
        .collect();
    fs_err::write(project.captions(), edited.join("\n") + "\n").expect("captions");
}

fn picture(project: &Project, index: usize) -> std::path::PathBuf {
    project.path(&format!("data/characters/char_{index:04}.png"))
}

/// The header of a PNG of any size, with a valid checksum and no pixels.
fn png_header(width: u32, height: u32) -> Vec<u8> {
    let mut chunk = b"IHDR".to_vec();
    chunk.extend(width.to_be_bytes());
    chunk.extend(height.to_be_bytes());
    chunk.extend([8, 6, 0, 0, 0]);
    let mut crc = !0_u32;
    for byte in &chunk {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 {
                crc >> 1 ^ 0xedb8_8320
            } else {
                crc >> 1
            };
        }
    }
    let mut file = b"\x89PNG\r\n\x1a\n\0\0\0\x0d".to_vec();
    file.extend(chunk);
    file.extend((!crc).to_be_bytes());
    file
}

#[test]
fn a_missing_caption() {
    refuses(
        |project| edit_captions(project, |index, line| (index != 1).then(|| line.to_owned())),
        "ingest",
        &[],
        &["char_0001.png", "caption"],
    );
}

#[test]
fn an_empty_caption() {
    refuses(
        |project| {
            edit_captions(project, |index, line| {
                Some(match index {
                    1 => r#"{"file_name": "char_0001.png", "text": "  "}"#.to_owned(),
                    _ => line.to_owned(),
                })
            });
        },
        "ingest",
        &[],
        &["char_0001.png", "empty"],
    );
}

#[test]
fn a_caption_over_the_token_limit_is_named_with_its_count() {
    let long = format!("a knight{}", " with a very long sword".repeat(40));
    refuses(
        |project| {
            edit_captions(project, |index, line| {
                Some(match index {
                    1 => format!(r#"{{"file_name": "char_0001.png", "text": "{long}"}}"#),
                    _ => line.to_owned(),
                })
            });
            assert_eq!(project.xtask("ingest", &[]).code, 0);
        },
        "embed-text",
        &[],
        &["a knight with", "64", "tokens"],
    );
}

#[test]
fn an_undecodable_image() {
    refuses(
        |project| fs_err::write(picture(project, 1), b"this is no picture").expect("a file"),
        "ingest",
        &[],
        &["char_0001.png"],
    );
}

#[test]
fn a_zero_byte_file() {
    refuses(
        |project| fs_err::write(picture(project, 1), b"").expect("a file"),
        "ingest",
        &[],
        &["char_0001.png", "empty"],
    );
}

#[test]
fn a_header_that_announces_60000_by_60000_pixels() {
    refuses(
        |project| fs_err::write(picture(project, 1), png_header(60_000, 60_000)).expect("a file"),
        "ingest",
        &[],
        &["char_0001.png", "60000"],
    );
}

#[test]
fn one_picture_with_two_captions() {
    refuses(
        |project| {
            fs_err::copy(picture(project, 0), picture(project, 1)).expect("a copy");
        },
        "ingest",
        &[],
        &["char_0000.png", "char_0001.png", "two"],
    );
}

#[test]
fn a_parquet_data_set_without_the_column() {
    refuses(
        |_| {},
        "ingest",
        &[
            &format!("ingest.source={:?}", small_parquet().display().to_string()),
            "ingest.caption_column=\"description\"",
        ],
        &["description", "text"],
    );
}

/// Three characters as a Hugging Face Parquet file.
fn small_parquet() -> std::path::PathBuf {
    end_to_end::workspace_root().join("tests/fixtures/characters.parquet")
}

#[test]
fn a_recipe_with_an_unknown_field() {
    refuses(
        |project| {
            let recipe = fs_err::read_to_string(project.recipe()).expect("the recipe");
            let recipe = recipe.replace("[train]\n", "[train]\nlearnign_rate = 1e-4\n");
            fs_err::write(project.recipe(), recipe).expect("the recipe");
        },
        "run",
        &[],
        &["learnign_rate", "learning_rate"],
    );
}

#[test]
fn an_empty_data_folder() {
    refuses(
        |project| {
            fs_err::remove_dir_all(project.path("data/characters")).expect("removed");
            fs_err::create_dir(project.path("data/characters")).expect("a directory");
        },
        "ingest",
        &[],
        &["characters", "no "],
    );
}

#[test]
fn a_lora_with_unknown_keys() {
    refuses(
        |project| {
            // One module renamed to one that no FLUX transformer has; both names are equally long.
            let file = project.artifact("train", "pytorch_lora_weights.safetensors");
            let mut bytes = fs_err::read(file).expect("a LoRA");
            let (from, to) = (
                b"transformer_blocks.0.attn.to_q",
                b"transformer_blocks.0.attn.to_x",
            );
            let places: Vec<usize> = (0..bytes.len() - from.len())
                .filter(|&at| bytes[at..].starts_with(from))
                .collect();
            for at in places {
                bytes[at..at + to.len()].copy_from_slice(to);
            }
            fs_err::write(project.path("odd.safetensors"), bytes).expect("a file");
        },
        "sample",
        &["sample.loras=[{path=\"odd.safetensors\", scale=1.0}]"],
        &["odd.safetensors", "transformer_blocks.0.attn.to_x"],
    );
}

#[test]
fn a_negative_prompt_that_would_do_nothing() {
    refuses(
        |_| {},
        "sample",
        &[
            "sample.negative_prompt=\"blurry\"",
            "sample.true_cfg_scale=1.0",
        ],
        &["negative", "true_cfg_scale"],
    );
}

#[test]
fn latents_of_another_autoencoder() {
    refuses(
        |project| {
            let other = Project::new(3);
            let odd = other_base(&other);
            let base = format!("base.path={odd:?}");
            for command in ["ingest", "cache-latents"] {
                assert_eq!(other.xtask(command, &[&base]).code, 0);
            }
            // Its index and shards in the place of ours, under our seal.
            let ours = project.artifact("cache-latents", "index.parquet");
            let theirs = other.artifact("cache-latents", "index.parquet");
            let (ours, theirs) = (parent(&ours), parent(&theirs));
            for entry in fs_err::read_dir(theirs).expect("a directory") {
                let entry = entry.expect("an entry");
                if entry.file_name() != "manifest.json" {
                    fs_err::remove_file(ours.join(entry.file_name())).expect("removed");
                    fs_err::copy(entry.path(), ours.join(entry.file_name())).expect("a copy");
                }
            }
        },
        "train",
        &["train.seed=99"],
        &["latents"],
    );
}

fn parent(path: &Path) -> &Path {
    path.parent().expect("a file lies in a directory")
}

/// A base whose autoencoder has other weights.
fn other_base(project: &Project) -> String {
    let base = project.path("other-base");
    let shipped = end_to_end::workspace_root().join("data/base");
    for (published, of_base) in [("clip", "tokenizer"), ("t5", "tokenizer_2")] {
        let folder = project.path("tokenizers").join(published);
        fs_err::create_dir_all(&folder).expect("a directory");
        for entry in fs_err::read_dir(shipped.join(of_base)).expect("a directory") {
            let entry = entry.expect("an entry");
            fs_err::copy(entry.path(), folder.join(entry.file_name())).expect("a copy");
        }
    }
    let ended = Ended::of(
        std::process::Command::new(end_to_end::program("spritelora"))
            .args(["random-base", "--preset", "small", "--seed", "5", "--out"])
            .arg(&base)
            .arg("--tokenizers")
            .arg(project.path("tokenizers")),
    );
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    base.display().to_string()
}

#[test]
fn embeddings_of_another_length_than_the_model_wants() {
    let public = end_to_end::workspace_root()
        .join("crates/artifacts/tests/fixtures/public-embeddings.parquet");
    refuses(
        |_| {},
        "embed-text",
        &[&format!(
            "embed_text.public_embeddings={:?}",
            public.display().to_string()
        )],
        &["public-embeddings.parquet", "2 T5 tokens", "64"],
    );
}

#[test]
fn embeddings_put_in_the_place_of_others() {
    refuses(
        |project| {
            let other = Project::new(3);
            let length = ["embed_text.t5_tokens=48", "sample.t5_tokens=48"];
            assert_eq!(other.xtask("prepare", &length).code, 0);
            let theirs = other.artifact("embed-text", "embeddings.parquet");
            let ours = project.artifact("embed-text", "embeddings.parquet");
            fs_err::copy(theirs, ours).expect("a copy");
        },
        "train",
        &["train.seed=99"],
        &["embeddings.parquet", "damaged"],
    );
}

#[test]
fn a_directory_that_cannot_be_written() {
    let project = Project::new(3);
    // Not even root creates directories in /proc.
    let mut command = std::process::Command::new(end_to_end::program("xtask"));
    command
        .args([
            "ingest",
            "--device",
            "cpu",
            "--runs",
            "/proc/spritelora",
            "--recipe",
        ])
        .arg(project.recipe())
        .env_remove("CARGO")
        .env_remove("CARGO_MANIFEST_DIR");
    Ended::of(&mut command).is_bad_input(&["/proc/spritelora"]);
}
