//! Tests that need an NVIDIA card: every kernel, value and gradient, against plain Rust.

#[path = "gpu/elementwise.rs"]
mod elementwise;
#[path = "gpu/loss.rs"]
mod loss;
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

use engine_cuda::Stream;
use engine_cuda::stream::OpenOptions;

fn main() {
    let stream = match Stream::open(&OpenOptions::default()) {
        Ok(stream) => stream,
        Err(error) => {
            eprintln!("these tests need a card: {error}");
            std::process::exit(1);
        }
    };
    let mut report = report::Report::default();
    norm::run(&stream, &mut report);
    rope::run(&stream, &mut report);
    elementwise::run(&stream, &mut report);
    loss::run(&stream, &mut report);
    nf4::run(&stream, &mut report);
    optimizer::run(&stream, &mut report);
    if !report.holds() {
        std::process::exit(1);
    }
}
