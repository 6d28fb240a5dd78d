//! The one program that does the stages' work: `spritelora <stage> --recipe FILE --runs DIR`.
//!
//! `cargo xtask` decides what must run and starts this; it can also be used by itself. A stage that is fresh is left
//! alone unless forced. stdout holds the result (one JSON document with `--json`), stderr talk and progress, and
//! `<runs>/logs/<stage>-<time>.log` the log. Exit codes: 0 done, 1 the work failed, 2 wrong usage or bad input.

#![forbid(unsafe_code)]

mod cli;

mod pretraining;
mod stage;
mod untrained;

use std::process::ExitCode;

use clap::Parser;

use cli::{Bench, Cli, Command};
use pipeline::Stage;

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
        Command::Ingest(options) => stage::run(Stage::Ingest, &options),
        Command::EmbedText(options) => stage::run(Stage::EmbedText, &options),
        Command::CacheLatents(options) => stage::run(Stage::CacheLatents, &options),
        Command::Train(options) => stage::run(Stage::Train, &options),
        Command::Sample(options) => stage::run(Stage::Sample, &options),
        Command::RandomBase(options) => untrained::run(&options),
        Command::Pretrain(options) => pretraining::run(&options),
        Command::Bench(Bench::Cpu(options)) => bench::run(&options.measurement()),
        Command::Parity(options) => {
            parity::run(&options.fixtures, options.engine.name(), options.json).exit_code()
        }
    }
}
