//! The one program that does the stages' work: `spritelora <stage> --recipe FILE --runs DIR`.
//!
//! `cargo xtask` decides what must run and starts this; it can also be used by itself. A stage that is fresh is left
//! alone unless forced. stdout holds the result (one JSON document with `--json`), stderr talk and progress, and
//! `<runs>/logs/<stage>-<time>.log` the log. Exit codes: 0 done, 1 the work failed, 2 wrong usage or bad input.

#![forbid(unsafe_code)]

mod cli;

mod planning;
mod pretraining;
mod stage;
mod untrained;

use std::process::ExitCode;

use clap::Parser;

use cli::{Bench, Cli, Command, PreparationOptions};
use pipeline::{DataSet, Stage, Task};

/// Exit code of a bug: the work failed.
const FAILED: u8 = 1;

fn main() -> ExitCode {
    let command = Cli::parse().command;
    // Mathematics panics; the message is out by then, and the exit code must not be Rust's 101.
    let code = std::panic::catch_unwind(|| run(command)).unwrap_or(FAILED);
    ExitCode::from(code)
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
