//! `cargo xtask`: decides which stages must run, builds `spritelora` only then, and has it run them.
//!
//! This program links neither Burn nor Polars, so it is built in seconds and answers `Fresh` at once. Exit codes:
//! 0 done, 1 the work failed, 2 wrong usage or bad input.
//!
//! * [`cli`]: the commands and their options. * [`overrides`]: options of `sample` as changes to the recipe.
//! * [`program`]: building, finding and starting `spritelora`. * [`stages`]: freshness and runs. * [`status`]: the same
//!   without running. * [`tests`]: `cargo xtask test`. * [`output`]: words or JSON on stdout.

#![forbid(unsafe_code)]

mod cli;

mod overrides;

mod program;

mod stages;

mod status;

mod tests;

mod output;

use std::process::ExitCode;

use clap::Parser;
use pipeline::Stage;

use cli::{Cli, Command};

fn main() -> ExitCode {
    let code = match Cli::parse().command {
        Command::Ingest(options) => stages::run("ingest", &[Stage::Ingest], &options, &[]),
        Command::EmbedText(options) => {
            stages::run("embed-text", &[Stage::EmbedText], &options, &[])
        }
        Command::Prepare(options) => {
            stages::run("prepare", &[Stage::Ingest, Stage::EmbedText], &options, &[])
        }
        Command::CacheLatents(options) => {
            stages::run("cache-latents", &[Stage::CacheLatents], &options, &[])
        }
        Command::Train(options) => stages::run("train", &[Stage::Train], &options, &[]),
        Command::Sample(options) => stages::run(
            "sample",
            &[Stage::Sample],
            &options.stage,
            &overrides::of_sample(&options),
        ),
        Command::Evaluate(options) => stages::run("evaluate", &[Stage::Evaluate], &options, &[]),
        Command::Run(options) => stages::run("run", &Stage::ALL, &options, &[]),
        Command::Status(options) => status::show(&options),
        Command::Parity(options) => program::pass_through("parity", &options.arguments),
        Command::Bench(options) => program::pass_through("bench", &options.arguments),
        Command::Plan(options) => program::pass_through("plan", &options.arguments),
        Command::RandomBase(options) => program::pass_through("random-base", &options.arguments),
        Command::Pretrain(options) => program::pass_through("pretrain", &options.arguments),
        Command::Test(options) => tests::run(&options),
    };
    ExitCode::from(code)
}
