//! The rules of ARCHITECTURE.md, each as a test: who may depend on whom, who may know which format, what every file must have.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use end_to_end::workspace_root;

/// Every crate of the workspace and its layer; a crate may depend on lower layers only.
const LAYERS: &[(&str, u8)] = &[
    ("artifacts", 0),
    ("console", 0),
    ("lora", 1),
    ("pixel-art", 0),
    ("pipeline", 1),
    ("quant", 0),
    ("sources", 2),
    ("tensor", 2),
    ("autoencoder", 3),
    ("flow-matching", 3),
    ("mmdit", 3),
    ("text-encoders", 3),
    ("engine-cpu", 4),
    ("engine-cuda", 4),
    ("engine", 5),
    ("ingest", 6),
    ("embed-text", 6),
    ("cache-latents", 6),
    ("train", 6),
    ("sample", 6),
    ("evaluate", 6),
    ("random-base", 6),
    ("bench", 7),
    ("parity", 7),
    ("pretrain", 7),
    ("spritelora", 8),
    ("xtask", 8),
    ("end-to-end", 9),
];

/// The layer from which on crates may use Burn.
const BURN_LAYER: u8 = 2;

struct Manifest {
    name: String,
    dir: PathBuf,
    dependencies: BTreeSet<String>,
    dev_dependencies: BTreeSet<String>,
}

fn manifests() -> Vec<Manifest> {
    let root = workspace_root();
    let mut dirs: Vec<PathBuf> = fs_err::read_dir(root.join("crates"))
        .expect("crates/ is there")
        .map(|entry| entry.expect("a readable entry").path())
        .collect();
    dirs.extend([root.join("xtask"), root.join("tests")]);
    dirs.into_iter()
        .map(|dir| {
            let text =
                fs_err::read_to_string(dir.join("Cargo.toml")).expect("every crate has a manifest");
            let manifest: toml::Table = text.parse().expect("a manifest is TOML");
            let keys = |table: &str| {
                manifest
                    .get(table)
                    .and_then(toml::Value::as_table)
                    .map(|t| t.keys().cloned().collect())
                    .unwrap_or_default()
            };
            Manifest {
                name: manifest["package"]["name"]
                    .as_str()
                    .expect("a package has a name")
                    .to_owned(),
                dependencies: keys("dependencies"),
                dev_dependencies: keys("dev-dependencies"),
                dir,
            }
        })
        .collect()
}

fn rust_files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs_err::read_dir(dir).expect("a readable directory") {
        let path = entry.expect("a readable entry").path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

fn all_rust_files() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for manifest in manifests() {
        rust_files(&manifest.dir, &mut found);
    }
    assert!(found.len() > 40, "only {} files found", found.len());
    found
}

fn layers() -> BTreeMap<&'static str, u8> {
    LAYERS.iter().copied().collect()
}

#[test]
fn every_crate_has_a_layer_and_every_layer_entry_a_crate() {
    let listed: BTreeSet<String> = LAYERS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let found: BTreeSet<String> = manifests().into_iter().map(|m| m.name).collect();
    assert_eq!(listed, found);
}

#[test]
fn dependencies_point_down_only() {
    let layers = layers();
    for manifest in manifests() {
        let own = layers[manifest.name.as_str()];
        for dependency in &manifest.dependencies {
            if let Some(&layer) = layers.get(dependency.as_str()) {
                assert!(
                    layer < own,
                    "{} (layer {own}) depends on {dependency} (layer {layer}): stages never know stages, nor models models",
                    manifest.name
                );
            }
        }
    }
}

#[test]
fn only_artifacts_knows_parquet_and_safetensors() {
    for manifest in manifests() {
        if manifest.name == "artifacts" {
            continue;
        }
        for format in ["polars", "safetensors", "parquet", "memmap2"] {
            assert!(
                !manifest.dependencies.contains(format),
                "{} depends on {format}: file layouts belong to `artifacts`",
                manifest.name
            );
        }
    }
}

#[test]
fn burn_is_known_from_the_tensor_layer_on() {
    let layers = layers();
    for manifest in manifests() {
        let burn = ["burn", "burn-store"]
            .into_iter()
            .find(|name| manifest.dependencies.contains(*name));
        if let Some(burn) = burn {
            assert!(
                layers[manifest.name.as_str()] >= BURN_LAYER,
                "{} depends on {burn}",
                manifest.name
            );
        }
        if manifest.name != "tensor" {
            assert!(
                !manifest.dependencies.contains("burn-store"),
                "{}",
                manifest.name
            );
        }
    }
}

#[test]
fn xtask_links_neither_burn_nor_polars() {
    let output = std::process::Command::new(env!("CARGO"))
        .args([
            "tree",
            "--package",
            "xtask",
            "--edges",
            "normal",
            "--prefix",
            "none",
            "--offline",
        ])
        .env_remove("CARGO_RESOLVER_FEATURE_UNIFICATION")
        .current_dir(workspace_root())
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let tree = String::from_utf8(output.stdout).expect("cargo prints UTF-8");
    assert!(tree.starts_with("xtask "), "{tree}");
    for heavy in [
        "burn",
        "polars",
        "tokenizers",
        "image",
        "tensor",
        "artifacts",
    ] {
        assert!(
            !tree
                .lines()
                .any(|line| line.split(' ').next() == Some(heavy)),
            "xtask links {heavy}"
        );
    }
}

#[test]
fn every_file_says_what_it_is_for() {
    for path in all_rust_files() {
        let text = fs_err::read_to_string(&path).expect("a readable file");
        assert!(
            text.starts_with("//!"),
            "{} has no module doc",
            path.display()
        );
    }
}

#[test]
fn no_code_is_generic_over_the_backend() {
    for path in all_rust_files() {
        if path.ends_with("tests/tests/architecture.rs") {
            continue;
        }
        let text = fs_err::read_to_string(&path).expect("a readable file");
        assert!(!text.contains("<B: Backend"), "{}", path.display());
    }
}

#[test]
fn unsafe_code_is_forbidden_outside_the_memory_maps() {
    for manifest in manifests() {
        if ["artifacts", "engine-cuda"].contains(&manifest.name.as_str()) {
            continue;
        }
        for root in ["src/lib.rs", "src/main.rs"] {
            let path = manifest.dir.join(root);
            if path.exists() {
                let text = fs_err::read_to_string(&path).expect("a readable file");
                assert!(
                    text.contains("#![forbid(unsafe_code)]"),
                    "{} does not forbid unsafe code",
                    path.display()
                );
            }
        }
    }
}

#[test]
fn no_test_is_skipped_and_no_work_left_as_a_mark() {
    for path in all_rust_files() {
        if path.ends_with("tests/tests/architecture.rs") {
            continue;
        }
        let text = fs_err::read_to_string(&path).expect("a readable file");
        for mark in [
            "#[ignore",
            "todo!(",
            "unimplemented!(",
            "TODO",
            "FIXME",
            "XXX",
        ] {
            assert!(!text.contains(mark), "{} has {mark}", path.display());
        }
    }
}

#[test]
fn architecture_md_names_every_crate_and_every_rule_of_this_file() {
    let root = workspace_root();
    let page =
        fs_err::read_to_string(root.join("ARCHITECTURE.md")).expect("ARCHITECTURE.md is there");
    for (name, _) in LAYERS {
        assert!(
            page.contains(&format!("`{name}`")),
            "ARCHITECTURE.md does not name {name}"
        );
    }
    let own = fs_err::read_to_string(root.join("tests/tests/architecture.rs")).expect("this file");
    for line in own.lines().filter_map(|line| line.strip_prefix("fn ")) {
        let name = line.split('(').next().expect("a function has a name");
        if own.contains(&format!("#[test]\nfn {name}(")) {
            assert!(
                page.contains(name),
                "ARCHITECTURE.md does not name the test {name}"
            );
        }
    }
}

#[test]
fn tests_use_their_own_fixtures_and_no_path_of_one_machine() {
    for path in all_rust_files() {
        if path.ends_with("tests/tests/architecture.rs") {
            continue;
        }
        let text = fs_err::read_to_string(&path).expect("a readable file");
        for foreign in ["/work/", "/root/", "/home/", "../shared"] {
            assert!(
                !text.contains(foreign),
                "{} names {foreign}",
                path.display()
            );
        }
    }
    for manifest in manifests() {
        assert!(
            !manifest.dev_dependencies.contains("end-to-end"),
            "{}",
            manifest.name
        );
    }
}
