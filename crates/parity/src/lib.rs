//! Parity: the pipeline's own crates against reference values from the published Python stack.
//!
//! A fixture directory (see `docs/parity.md`) holds inputs and outputs of diffusers, transformers, peft and
//! bitsandbytes on a small random model. Every case of it is run through the crates that the stages are made of:
//! nothing is implemented here a second time, so a case that passes says something about the program that people run.
//!
//! * [`fixture`]: the directory. * [`compare`]: what "close" means. * [`tolerances`]: how close, per tensor, and why.
//! * [`checker`]: one case while it runs. * `cases`: the cases. * [`report`]: the table and the document.
//! * [`trained_lora`]: a LoRA of ours for diffusers to load, which no fixture can hold.
#![forbid(unsafe_code)]

pub mod fixture;

pub mod compare;
pub mod tolerances;

pub mod checker;
pub mod report;

mod cases;

pub mod trained_lora;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Instant;

use checker::CaseRun;
use console::{print_document, print_line};
use engine::EngineName;
use fixture::{Case, FixtureError, FixtureSet};
use pipeline::Failure;
use report::{CaseResult, Report};

/// What a parity run ends with, as an exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every case is within its tolerances.
    Passed,
    /// At least one is not.
    Failed,
    /// The directory cannot be used; the reason is on stderr.
    BadDirectory,
}

impl Outcome {
    /// 0, 1 or 2.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Passed => 0,
            Self::Failed => 1,
            Self::BadDirectory => 2,
        }
    }
}

/// Runs every case of a fixture directory, the transformer in `engine`, and prints what it found on stdout: a line per case as it ends, or with
/// `json` one document at the end.
pub fn run(fixtures: &Path, engine: EngineName, json: bool) -> Outcome {
    let set = match FixtureSet::open(fixtures) {
        Ok(set) => set,
        Err(error) => {
            let failure = Failure::bad_input(error).with_help(
                "give a directory that the oracle's make_fixtures.py wrote, see docs/parity.md",
            );
            if json {
                print_document(&serde_json::json!({ "error": failure.to_json() }));
            }
            console::tell(&failure);
            return Outcome::BadDirectory;
        }
    };
    let report = if json {
        let report = check(&set, engine, |_| {});
        print_document(&serde_json::json!(report));
        report
    } else {
        print_line(&report::head(&set));
        let report = check(&set, engine, |case| print_line(&report::lines(case)));
        print_line(&report::sum(&report));
        report
    };
    if report.ok {
        Outcome::Passed
    } else {
        Outcome::Failed
    }
}

/// Runs every case of an opened set; `each` sees the results as they come.
///
/// What only `mmdit` can say (what happens between blocks) is `mmdit`'s with any engine.
pub fn check(set: &FixtureSet, engine: EngineName, mut each: impl FnMut(&CaseResult)) -> Report {
    let mut cases = Vec::with_capacity(set.cases().len());
    for case in set.cases() {
        let result = check_case(set, case, engine);
        each(&result);
        cases.push(result);
    }
    Report::new(set, cases)
}

/// Opens a directory and runs it with the portable engine, for tests.
///
/// # Errors
///
/// If the directory cannot be used.
pub fn check_dir(fixtures: &Path) -> Result<Report, FixtureError> {
    Ok(check(
        &FixtureSet::open(fixtures)?,
        EngineName::Portable,
        |_| {},
    ))
}

/// Runs one case. An error or a panic in it (mathematics panics on wrong sizes) fails this case and no other.
fn check_case(set: &FixtureSet, case: &Case, engine: EngineName) -> CaseResult {
    let start = Instant::now();
    let (tensors, stopped_by) = match CaseRun::open(set, case) {
        Err(error) => (Vec::new(), Some(error.to_string())),
        Ok(mut run) => {
            run.engine = engine;
            let ended = catch_unwind(AssertUnwindSafe(|| cases::run(&mut run)));
            let stopped_by = match ended {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(with_causes(error.as_ref())),
                Err(panic) => Some(format!("panicked: {}", panic_text(panic.as_ref()))),
            };
            match stopped_by {
                None => (run.finish(), None),
                some => (run.results_so_far(), some),
            }
        }
    };
    CaseResult::new(
        &case.name,
        tensors,
        stopped_by,
        start.elapsed().as_secs_f64(),
    )
}

fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let line = next.to_string();
        if !text.contains(&line) {
            text.push_str(": ");
            text.push_str(&line);
        }
        cause = next.source();
    }
    text
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("without a message")
}
