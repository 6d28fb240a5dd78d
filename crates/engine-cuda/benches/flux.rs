//! The figures of `cargo xtask bench flux --gpu` as a small program, for a machine that has a card and little else.
//!
//! ```text
//! flux [--only SECTION[,SECTION…]] [--json FILE]     sections: plan attention products nf4 bf16 full first
//!                                             (`plan` needs no GPU)
//! flux --first-image                           what `first` starts: draws one picture's latents and ends
//! flux --soak SECONDS                          trains for so long and says what memory did, every minute and at the end
//! ```
//!
//! The row of a whole training run is not here: its loop is stage `train`'s, which `cargo xtask bench flux --gpu` has.

use std::time::Duration;

use engine_cuda::measure::{MEASURED, PREDICTED, draw_first, measure, soak};

const FIRST_IMAGE: &str = "--first-image";

fn end_with(row: Result<serde_json::Value, engine_cuda::CudaError>) {
    match row {
        Ok(row) => println!("{row}"),
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(1);
        }
    }
}

fn main() {
    let mut sections: Vec<String> = PREDICTED
        .iter()
        .chain(&MEASURED)
        .map(|&name| name.to_owned())
        .collect();
    let mut file = None;
    let mut given = std::env::args().skip(1);
    while let Some(argument) = given.next() {
        match argument.as_str() {
            "--only" => {
                let list = given.next().unwrap_or_default();
                sections = list.split(',').map(str::to_owned).collect();
            }
            "--json" => file = given.next(),
            FIRST_IMAGE => return end_with(draw_first()),
            "--soak" => {
                let seconds = given.next().and_then(|seconds| seconds.parse().ok());
                let duration = Duration::from_secs(seconds.unwrap_or(600));
                return end_with(soak(duration, &mut |row| println!("so far {row}")));
            }
            _ => {}
        }
    }
    let sections: Vec<&str> = sections.iter().map(String::as_str).collect();
    let rows = match measure(&sections, &[FIRST_IMAGE], &mut |name, value| {
        println!("{name} {value}")
    }) {
        Ok(rows) => rows,
        Err(error) => {
            eprintln!("this bench needs a card: {error}");
            std::process::exit(1);
        }
    };
    if let Some(file) = file {
        let text = serde_json::to_string_pretty(&rows).expect("a map is JSON");
        if let Err(error) = fs_err::write(&file, text) {
            eprintln!("{error}");
            std::process::exit(1);
        }
    }
}
