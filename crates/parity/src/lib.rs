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

use checker::{CaseRun, Execution};
use console::{print_document, print_line};
use engine::EngineName;
use fixture::{Case, FixtureError, FixtureSet};
use pipeline::Failure;
use report::{CaseResult, Report};
use tensor::Precision;

/// What a parity run ends with, as an exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every case is within its tolerances.
    Passed,
    /// At least one is not.
    Failed,
    /// The directory cannot be used, or the engine has no card; the reason is on stderr.
    Refused,
}

impl Outcome {
    /// 0, 1 or 2.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Passed => 0,
            Self::Failed => 1,
            Self::Refused => 2,
        }
    }
}

/// Runs every case of a fixture directory, the transformer in `engine`, and prints what it found on stdout: a line per case as it ends, or with
/// `json` one document at the end.
pub fn run(fixtures: &Path, engine: EngineName, json: bool) -> Outcome {
    let set = match open(fixtures, engine) {
        Ok(set) => set,
        Err(failure) => {
            if json {
                print_document(&serde_json::json!({ "error": failure.to_json() }));
            }
            console::tell(&failure);
            return Outcome::Refused;
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

/// The set, once it is sure that the engine can run it.
fn open(fixtures: &Path, engine: EngineName) -> Result<FixtureSet, Failure> {
    let set = FixtureSet::open(fixtures).map_err(|error| {
        Failure::bad_input(error).with_help(
            "give a directory that the oracle's make_fixtures.py wrote, see docs/parity.md",
        )
    })?;
    if engine == EngineName::Cuda {
        engine::choice::require_card(0).map_err(|error| {
            let help = error.help("train");
            Failure::bad_input(error).with_help(help)
        })?;
    }
    Ok(set)
}

/// Runs the cases of an opened set; `each` sees the results as they come.
///
/// What only `mmdit` can say (what happens between blocks) is `mmdit`'s with any engine. The engine `cuda` computes in 16
/// bits, so with it the cases are [`check_in_half`]'s.
pub fn check(set: &FixtureSet, engine: EngineName, each: impl FnMut(&CaseResult)) -> Report {
    if engine == EngineName::Cuda {
        return check_in_half(set, engine, each);
    }
    let execution = Execution {
        engine,
        ..Execution::PORTABLE
    };
    let cases = set.cases().iter().map(|case| (case, execution));
    check_all(set, cases, each)
}

/// Runs the cases of the transformer at work, each in bf16 and in fp16, under bounds of 16 bits
/// ([`tolerances::accuracy`]).
pub fn check_in_half(
    set: &FixtureSet,
    engine: EngineName,
    each: impl FnMut(&CaseResult),
) -> Report {
    let of_the_transformer = |case: &&Case| cases::is_of_the_transformer(&case.name);
    let cases = set.cases().iter().filter(of_the_transformer);
    let twice = cases.flat_map(|case| {
        [Precision::Bf16, Precision::F16].map(|precision| (case, Execution { engine, precision }))
    });
    check_all(set, twice, each)
}

fn check_all<'a>(
    set: &FixtureSet,
    cases: impl Iterator<Item = (&'a Case, Execution)>,
    mut each: impl FnMut(&CaseResult),
) -> Report {
    let results = cases.map(|(case, execution)| {
        let result = check_case(set, case, execution);
        each(&result);
        result
    });
    let results = results.collect();
    Report::new(set, results)
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
fn check_case(set: &FixtureSet, case: &Case, execution: Execution) -> CaseResult {
    let start = Instant::now();
    let (tensors, stopped_by) = match CaseRun::open_for(set, case, execution) {
        Err(error) => (Vec::new(), Some(error.to_string())),
        Ok(mut run) => {
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
    let name = match execution.precision {
        Precision::F32 => case.name.clone(),
        Precision::Bf16 => format!("{} in bf16", case.name),
        Precision::F16 => format!("{} in fp16", case.name),
    };
    CaseResult::new(&name, tensors, stopped_by, start.elapsed().as_secs_f64())
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
