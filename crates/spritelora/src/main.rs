//! The one program that does the stages' work: `spritelora <stage> --recipe FILE --runs DIR`.
//!
//! `cargo xtask` decides what must run and starts this; it can also be used by itself. A stage that is fresh is left
//! alone unless forced. stdout holds the result (one JSON document with `--json`), stderr talk and progress, and
//! `<runs>/logs/<stage>-<time>.log` the log. Exit codes: 0 done, 1 the work failed (a panic too, which with `--json` has
//! its document like every other failure), 2 wrong usage or bad input.

#![forbid(unsafe_code)]

mod cli;

mod planning;
mod pretraining;
mod stage;
mod untrained;

use std::any::Any;
use std::process::ExitCode;

use clap::Parser;
use console::print_document;

use cli::{Bench, Cli, Command, PreparationOptions};
use pipeline::{DataSet, Failure, Stage, Task};
use serde_json::json;

fn main() -> ExitCode {
    let command = Cli::parse().command;
    let wants_json = command.wants_json();
    // Mathematics panics; the message is on stderr by then, and the exit code must not be Rust's 101.
    let code = std::panic::catch_unwind(|| run(command)).unwrap_or_else(|panic| {
        let failure = bug(&*panic);
        if wants_json {
            print_document(&json!({ "error": failure.to_json() }));
        }
        failure.kind().exit_code()
    });
    ExitCode::from(code)
}

/// What a panic means to the person.
fn bug(panic: &(dyn Any + Send)) -> Failure {
    let message = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&'static str>().copied())
        .unwrap_or("it panicked without a message");
    Failure::failed(message.to_owned())
        .with_help("this is a bug in spritelora; stderr says where in the program")
}

fn run(command: Command) -> u8 {
    match command {
        Command::Ingest(options) => prepare(Stage::Ingest, &options),
        Command::EmbedText(options) => prepare(Stage::EmbedText, &options),
        Command::CacheLatents(options) => prepare(Stage::CacheLatents, &options),
        Command::Train(options) => stage::run(Stage::Train.into(), &options),
        Command::Sample(options) => stage::run(Stage::Sample.into(), &options),
        Command::Evaluate(options) => stage::run(Stage::Evaluate.into(), &options),
        Command::RandomBase(options) => untrained::run(&options),
        Command::Plan(options) => planning::run(&options),
        Command::Pretrain(options) => pretraining::run(&options),
        Command::Bench(Bench::Cpu(options)) => bench::run(&options.measurement()),
        Command::Bench(Bench::Flux(options)) => bench::flux::run(&options.measurement()),
        Command::Bench(Bench::FirstImage) => bench::flux::first_image(),
        Command::Parity(options) => {
            parity::run(&options.fixtures, options.engine.name(), options.json).exit_code()
        }
    }
}

fn prepare(stage: Stage, options: &PreparationOptions) -> u8 {
    let data = if options.held_out {
        DataSet::HeldOut
    } else {
        DataSet::Training
    };
    stage::run(Task { stage, data }, &options.stage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_failure_with_its_message() {
        let panics: [Box<dyn Any + Send>; 2] = [
            Box::new("7 rows of no ids"),
            Box::new(format!("{} rows of no ids", 7)),
        ];
        for panic in panics {
            let failure = bug(&*panic);
            assert_eq!(failure.messages(), ["7 rows of no ids"]);
            assert_eq!(failure.to_json()["exit_code"], 1);
        }
        assert_eq!(bug(&()).kind().exit_code(), 1);
    }
}
