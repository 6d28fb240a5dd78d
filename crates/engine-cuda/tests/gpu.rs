//! Tests that need an NVIDIA card: every kernel, value and gradient, against plain Rust; the network against `mmdit`;
//! the reference fixtures.
//!
//! ```text
//! gpu [--only SECTION[,SECTION…]] [FIXTURES…]
//! ```
//!
//! `FIXTURES` are folders with `cases.json`; under cargo, those of the repository unless others are named. One line is printed
//! per check, a table of sections at the end, and a section that breaks off fails alone.

#[path = "gpu/attention.rs"]
mod attention;
#[path = "gpu/cases.rs"]
mod cases;
#[path = "gpu/elementwise.rs"]
mod elementwise;
#[path = "gpu/fixtures.rs"]
mod fixtures;
#[path = "gpu/full.rs"]
mod full;
#[path = "gpu/full_kernels.rs"]
mod full_kernels;
#[path = "gpu/full_setting.rs"]
mod full_setting;
#[path = "gpu/loss.rs"]
mod loss;
#[path = "gpu/network.rs"]
mod network;
#[path = "gpu/networks.rs"]
mod networks;
#[path = "gpu/nf4.rs"]
mod nf4;
#[path = "gpu/norm.rs"]
mod norm;
#[path = "gpu/optimizer.rs"]
mod optimizer;
#[path = "gpu/report.rs"]
mod report;
#[path = "gpu/rope.rs"]
mod rope;
#[path = "gpu/support.rs"]
mod support;

use std::path::PathBuf;

use engine_cuda::Stream;
use engine_cuda::stream::OpenOptions;
use report::Report;

/// Name and body of each section.
type Section = (&'static str, fn(&Stream, &mut Report));

const SECTIONS: &[Section] = &[
    ("attention", attention::run),
    ("norm", norm::run),
    ("rope", rope::run),
    ("elementwise", elementwise::run),
    ("loss", loss::run),
    ("nf4", nf4::run),
    ("optimizer", optimizer::run),
    ("network", |_, report| network::run(report)),
    ("full", full::run),
];

/// What the command line asks for.
struct Arguments {
    only: Option<Vec<String>>,
    fixtures: Vec<PathBuf>,
}

fn arguments() -> Arguments {
    let mut arguments = Arguments {
        only: None,
        fixtures: Vec::new(),
    };
    let mut given = std::env::args().skip(1);
    while let Some(argument) = given.next() {
        match argument.as_str() {
            "--only" => {
                let list = given.next().unwrap_or_default();
                arguments.only = Some(list.split(',').map(str::to_owned).collect());
            }
            // What `cargo test` passes on is none of ours.
            option if option.starts_with('-') => {}
            folder => arguments.fixtures.push(folder.into()),
        }
    }
    if let Some(package) = std::env::var_os("CARGO_MANIFEST_DIR")
        && arguments.fixtures.is_empty()
    {
        let package = PathBuf::from(package);
        arguments
            .fixtures
            .push(package.join("../../tests/fixtures/small"));
    }
    arguments
}

fn main() {
    let Arguments { only, fixtures } = arguments();
    let wanted = |section: &str| {
        only.as_ref()
            .is_none_or(|only| only.iter().any(|name| name == section))
    };
    let stream = match Stream::open(&OpenOptions::default()) {
        Ok(stream) => stream,
        Err(error) => {
            eprintln!("these tests need a card: {error}");
            std::process::exit(1);
        }
    };
    println!("{:?}", stream.facts());
    let mut report = Report::default();
    for (name, run) in SECTIONS {
        if wanted(name) {
            report.section(name, |report| run(&stream, report));
        }
    }
    if wanted("fixtures") {
        for folder in &fixtures {
            let variant = folder.file_name().unwrap_or(folder.as_os_str());
            let name = format!("fixtures {}", variant.display());
            report.section(&name, |report| fixtures::run(folder, report));
        }
    }
    if !report.holds() {
        std::process::exit(1);
    }
}
