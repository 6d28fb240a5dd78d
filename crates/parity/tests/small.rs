//! Parity on the committed fixtures, and that what is wrong with fixtures or with us is found.

use std::path::{Path, PathBuf};

use engine::EngineName;
use parity::fixture::FixtureSet;
use parity::report::{CaseResult, Report};
use parity::{Outcome, check, check_dir, check_in_half, report};
use serde_json::{Value, json};
use tempfile::TempDir;

fn small() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/small")
}

/// The committed set, cut down to cases that need little, in a directory that may be changed.
struct Copy {
    dir: TempDir,
    cases: Value,
}

impl Copy {
    fn of(names: &[&str]) -> Self {
        let text = fs_err::read_to_string(small().join("cases.json")).expect("it is committed");
        let mut cases: Value = serde_json::from_str(&text).expect("it is JSON");
        let kept: Vec<Value> = cases["cases"]
            .as_array()
            .expect("a list")
            .iter()
            .filter(|case| names.iter().any(|name| case["name"] == *name))
            .cloned()
            .collect();
        assert_eq!(
            kept.len(),
            names.len(),
            "the committed set has all of {names:?}"
        );
        cases["cases"] = Value::Array(kept);
        let dir = tempfile::tempdir().expect("a temporary directory");
        fs_err::create_dir_all(dir.path().join("lora")).expect("it is writable");
        let lora = cases["lora"].as_str().expect("a path").to_owned();
        for file in names
            .iter()
            .map(|name| format!("{name}.safetensors"))
            .chain([lora])
        {
            fs_err::copy(small().join(&file), dir.path().join(&file)).expect("it is there");
        }
        Self { dir, cases }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn check(&self) -> Report {
        fs_err::write(self.path("cases.json"), self.cases.to_string()).expect("it is writable");
        check_dir(self.dir.path()).expect("a usable directory")
    }
}

fn case<'a>(report: &'a Report, name: &str) -> &'a CaseResult {
    let mut cases = report.cases.iter();
    cases.find(|case| case.name == name).expect("it was run")
}

#[test]
fn the_committed_fixtures_agree() {
    let set = FixtureSet::open(&small()).expect("it is committed");
    for engine in [EngineName::Portable, EngineName::Cpu] {
        let report = check(&set, engine, |case| println!("{}", report::lines(case)));
        assert!(report.ok, "{engine}: see the lines above");
        assert_eq!(report.cases.len(), set.cases().len());
    }
}

/// The bounds of 16 bits, and everything around them that the engine `cuda` needs a card for, with Burn on the CPU.
#[test]
fn the_transformers_cases_hold_in_sixteen_bits() {
    let set = FixtureSet::open(&small()).expect("it is committed");
    let report = check_in_half(&set, EngineName::Portable, |case| {
        println!("{}", report::lines(case));
    });
    assert!(report.ok, "see the lines above");
    let names: Vec<&str> = report.cases.iter().map(|case| case.name.as_str()).collect();
    assert!(
        names
            .iter()
            .any(|name| name.starts_with("train_micro_") && name.ends_with("in fp16"))
    );
    assert!(
        names.iter().all(|name| !name.starts_with("vae_")),
        "{names:?}"
    );
}

#[test]
fn without_a_card_the_engine_cuda_is_refused() {
    if engine_cuda::device::probe(0).is_err() {
        let outcome = parity::run(&small(), EngineName::Cuda, true);
        assert_eq!((outcome, outcome.exit_code()), (Outcome::Refused, 2));
    }
}

#[test]
fn an_unknown_case_fails_and_the_others_still_run() {
    let mut copy = Copy::of(&["euler_step"]);
    let unknown = json!({
        "name": "teleport", "file": "euler_step.safetensors", "upstream": "", "params": {}, "outputs": {}
    });
    copy.cases["cases"]
        .as_array_mut()
        .expect("a list")
        .insert(0, unknown);
    let report = copy.check();
    assert!(!report.ok && !case(&report, "teleport").ok);
    assert!(case(&report, "euler_step").ok);
}

#[test]
fn an_output_that_is_announced_and_not_there_fails() {
    let mut copy = Copy::of(&["euler_step"]);
    copy.cases["cases"][0]["outputs"]["out.velocity_of_light"] = json!(["float32", [1]]);
    let report = copy.check();
    let failed: Vec<&str> = report.cases[0]
        .tensors
        .iter()
        .filter(|tensor| !tensor.ok)
        .map(|tensor| tensor.name.as_str())
        .collect();
    assert_eq!(failed, ["velocity_of_light"]);
}

#[test]
fn a_case_without_its_file_fails() {
    let copy = Copy::of(&["euler_step", "nf4"]);
    fs_err::remove_file(copy.path("nf4.safetensors")).expect("it was copied");
    let report = copy.check();
    let nf4 = case(&report, "nf4");
    assert!(!nf4.ok && nf4.tensors.is_empty());
    let reason = nf4.stopped_by.as_deref().expect("it says why");
    assert!(reason.contains("nf4.safetensors"), "{reason}");
    assert!(case(&report, "euler_step").ok);
}

#[test]
fn a_reference_value_that_differs_is_found() {
    let copy = Copy::of(&["euler_step"]);
    let path = copy.path("euler_step.safetensors");
    let mut bytes = fs_err::read(&path).expect("it was copied");
    // The upper half of the last number's mantissa and exponent; where it lies is the file's matter.
    let last = bytes.len() - 2;
    bytes[last] ^= 0x40;
    fs_err::write(&path, bytes).expect("it is writable");
    let report = copy.check();
    assert!(!report.ok);
    let worst = report.cases[0]
        .worst
        .as_ref()
        .expect("something was compared");
    assert!(!worst.ok && worst.used > 1.0, "{worst:?}");
}

#[test]
fn a_size_that_mathematics_panics_at_fails_its_case_alone() {
    let mut copy = Copy::of(&["euler_step", "nf4"]);
    copy.cases["cases"][0]["params"]["steps"] = json!(0);
    let report = copy.check();
    let stopped_by = case(&report, "euler_step").stopped_by.as_deref();
    assert!(
        stopped_by.is_some_and(|reason| reason.contains("at least one step")),
        "{stopped_by:?}"
    );
    assert!(case(&report, "nf4").ok);
}

#[test]
fn the_document_holds_every_comparison() {
    let report = Copy::of(&["nf4"]).check();
    let document = json!(report);
    assert_eq!(document["ok"], json!(true));
    let tensors = document["cases"][0]["tensors"].as_array().expect("a list");
    assert_eq!(tensors.len(), report.cases[0].tensors.len());
    assert!(
        tensors
            .iter()
            .any(|tensor| tensor["name"] == "w48x64.packed")
    );
}
