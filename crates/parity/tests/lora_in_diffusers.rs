//! A LoRA that we trained means the same to diffusers as to us: the golden files hold the LoRA and diffusers' velocities.
//!
//! How they were made stands in `docs/parity.md`.

use std::path::{Path, PathBuf};

use artifacts::SafetensorsFile;
use parity::compare::{Measure, Values, distance};
use parity::fixture::FixtureSet;
use parity::trained_lora;

/// Issue 2: the same velocity within 1e-4.
const VELOCITY: Measure = Measure::Relative(1e-4);

/// As the table has it for a run with 8-bit states: a flipped code moves its element.
const RETRAINED: Measure = Measure::Bulk {
    limit: 1e-3,
    share: 1e-2,
};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

fn set() -> FixtureSet {
    FixtureSet::open(&fixtures().join("small")).expect("it is committed")
}

fn golden(name: &str) -> PathBuf {
    fixtures().join("lora-in-diffusers").join(name)
}

fn open(path: &Path) -> SafetensorsFile {
    SafetensorsFile::open(path).expect("a safetensors file")
}

fn f32(file: &SafetensorsFile, name: &str) -> (Values, Vec<usize>) {
    let values = file.f32(name).expect("it is there");
    let shape = file.info(name).expect("it is there").shape.clone();
    (Values::F32(values), shape)
}

#[test]
fn diffusers_and_we_see_the_same_velocity_through_a_lora_of_ours() {
    let theirs = open(&golden("diffusers.safetensors"));
    let ours = trained_lora::velocities(&set(), &golden("lora.safetensors")).expect("it fits");
    assert_eq!(theirs.names().len(), ours.len());
    for velocity in ours {
        let (expected, shape) = f32(&theirs, &velocity.name);
        let found = Values::F32(velocity.values);
        let result = distance(VELOCITY, (&expected, &shape), (&found, &velocity.shape));
        assert!(result.passed, "{}: {result:?}", velocity.name);
    }
}

#[test]
fn the_lora_changes_the_velocity_by_much_more_than_the_tolerance() {
    let base = trained_lora::velocity_of_base(&set()).expect("the base runs");
    let theirs = open(&golden("diffusers.safetensors"));
    for name in theirs.names() {
        let (expected, shape) = f32(&theirs, name);
        let base = Values::F32(base.clone());
        let effect = distance(VELOCITY, (&expected, &shape), (&base, &shape)).error;
        assert!(effect > 0.1, "{name}: {effect}");
    }
}

#[test]
fn training_again_gives_the_lora_that_diffusers_was_shown() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("lora.safetensors");
    trained_lora::train(&set(), &path).expect("the base trains");
    let (shown, again) = (open(&golden("lora.safetensors")), open(&path));
    assert_eq!(shown.metadata(), again.metadata());
    assert_eq!(
        shown.names().collect::<Vec<_>>(),
        again.names().collect::<Vec<_>>()
    );
    for name in shown.names() {
        let ((expected, expected_shape), (found, shape)) = (f32(&shown, name), f32(&again, name));
        let result = distance(RETRAINED, (&expected, &expected_shape), (&found, &shape));
        assert!(result.passed, "{name}: {result:?}");
    }
}
