//! Both layouts, and every way in which they can be incomplete.

use std::collections::BTreeMap;

use super::*;
use crate::safetensors_file::{TensorToWrite, write_safetensors};

fn write(dir: &Path, file: &str, names: &[&str]) {
    let tensors: Vec<TensorToWrite<'_>> = names
        .iter()
        .map(|name| TensorToWrite::f32(name, &[2], &[1.0, 2.0]))
        .collect();
    write_safetensors(&dir.join(file), &tensors, &BTreeMap::new()).expect("written");
}

fn write_index(dir: &Path, stem: &str, map: &[(&str, &str)]) {
    let map: BTreeMap<&str, &str> = map.iter().copied().collect();
    let json = serde_json::json!({"metadata": {"total_size": 0}, "weight_map": map});
    fs::write(
        dir.join(format!("{stem}.safetensors.index.json")),
        json.to_string(),
    )
    .expect("written");
}

fn sharded() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write(dir.path(), "model-00001-of-00002.safetensors", &["a", "b"]);
    write(dir.path(), "model-00002-of-00002.safetensors", &["c"]);
    write_index(
        dir.path(),
        "model",
        &[
            ("a", "model-00001-of-00002.safetensors"),
            ("b", "model-00001-of-00002.safetensors"),
            ("c", "model-00002-of-00002.safetensors"),
        ],
    );
    dir
}

#[test]
fn a_single_file_is_a_checkpoint() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write(dir.path(), "diffusion_pytorch_model.safetensors", &["a"]);
    let checkpoint = Checkpoint::open(dir.path(), "diffusion_pytorch_model").expect("sound");
    assert_eq!(checkpoint.f32("a").expect("there"), [1.0, 2.0]);
    assert_eq!(checkpoint.files().len(), 1);
}

#[test]
fn shards_are_one_checkpoint() {
    let dir = sharded();
    let checkpoint = Checkpoint::open(dir.path(), "model").expect("sound");
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(checkpoint.f32("c").expect("there"), [1.0, 2.0]);
    assert_eq!(checkpoint.files().len(), 3); // the index counts
}

#[test]
fn a_directory_without_weights_says_what_it_holds() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    fs::write(dir.path().join("pytorch_model.bin"), b"").expect("written");
    let text = Checkpoint::open(dir.path(), "model")
        .expect_err("no weights")
        .to_string();
    assert!(
        text.contains("model.safetensors.index.json") && text.contains("pytorch_model.bin"),
        "{text}"
    );
    assert!(matches!(
        Checkpoint::open(&dir.path().join("missing"), "model"),
        Err(ArtifactError::Io { .. })
    ));
}

#[test]
fn a_shard_name_that_leaves_the_directory_is_refused() {
    for shard in [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..",
        "",
        "x.bin",
        "c:\\x.safetensors",
    ] {
        let dir = sharded();
        write_index(dir.path(), "model", &[("a", shard)]);
        let result = Checkpoint::open(dir.path(), "model");
        assert!(
            matches!(result, Err(ArtifactError::ShardName { .. })),
            "{shard:?}"
        );
    }
}

#[test]
fn an_index_and_shards_that_disagree_are_refused_with_the_keys() {
    let dir = sharded();
    let first = "model-00001-of-00002.safetensors";
    write_index(dir.path(), "model", &[("a", first), ("d", first)]);
    let text = Checkpoint::open(dir.path(), "model")
        .expect_err("they disagree")
        .to_string();
    assert!(
        text.contains("not in the shard: d (") && text.contains("not in the index: b ("),
        "{text}"
    );
}

#[test]
fn a_missing_shard_is_named() {
    let dir = sharded();
    fs::remove_file(dir.path().join("model-00002-of-00002.safetensors")).expect("removed");
    let text = Checkpoint::open(dir.path(), "model")
        .expect_err("incomplete")
        .to_string();
    assert!(text.contains("model-00002-of-00002.safetensors"), "{text}");
}

#[test]
fn an_index_that_is_not_json_is_refused() {
    let dir = sharded();
    for text in ["", "{}", "[1]", r#"{"weight_map": {"a": 1}}"#] {
        fs::write(dir.path().join("model.safetensors.index.json"), text).expect("written");
        assert!(matches!(
            Checkpoint::open(dir.path(), "model"),
            Err(ArtifactError::CheckpointIndex { .. })
        ));
    }
}

#[test]
fn a_checkpoint_that_fits_passes() {
    let dir = sharded();
    let checkpoint = Checkpoint::open(dir.path(), "model").expect("sound");
    let shapes: Vec<(String, Vec<usize>)> = ["a", "b", "c"]
        .map(|name| (name.to_owned(), vec![2]))
        .to_vec();
    checkpoint.check(&shapes).expect("it fits");
    checkpoint
        .check_with_optional(&shapes[..2], &shapes[2..])
        .expect("an optional key may be there");
    let absent = [("absent".to_owned(), vec![1])];
    checkpoint
        .check_with_optional(&shapes, &absent)
        .expect("or not");
}

#[test]
fn keys_that_do_not_fit_are_listed_with_the_nearest_names() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write(
        dir.path(),
        "model.safetensors",
        &["blocks.0.to_q.weight", "blocks.0.norm", "extra"],
    );
    let checkpoint = Checkpoint::open(dir.path(), "model").expect("sound");
    let expected = [
        ("blocks.0.to_q.bias".to_owned(), vec![2]),
        ("blocks.0.norm".to_owned(), vec![3]),
    ];
    let error = checkpoint.check(&expected).expect_err("it does not fit");
    let text = error.to_string();
    for part in [
        "1 missing:\n    blocks.0.to_q.bias [2] (nearest: blocks.0.to_q.weight)",
        "2 unknown:\n    blocks.0.to_q.weight [2] (nearest: blocks.0.to_q.bias)",
        "1 of another shape:\n    blocks.0.norm: expected [3], found [2]",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
}

#[test]
fn a_long_list_of_keys_is_cut() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write(dir.path(), "model.safetensors", &["a"]);
    let checkpoint = Checkpoint::open(dir.path(), "model").expect("sound");
    let expected: Vec<(String, Vec<usize>)> =
        (0..100).map(|i| (format!("key.{i}"), vec![1])).collect();
    let text = checkpoint
        .check(&expected)
        .expect_err("it does not fit")
        .to_string();
    assert!(
        text.contains("100 missing") && text.contains("and 92 more"),
        "{text}"
    );
    assert!(text.lines().count() < 20, "{text}");
}
