//! What a person at a terminal sees: results, failures, progress on anything over a second, and logs.
//!
//! stdout is data, stderr is talk. [`Progress`] draws bars with rate
//! and time left when stderr is a terminal and prints a plain line now and then when it is not. [`init_tracing`]
//! sends `tracing` events to stderr and to a file per run, without tearing a bar that is being drawn.

#![forbid(unsafe_code)]

mod output;
mod progress;
mod tracing_setup;

pub use output::{note_line, print_document, print_line, shown_path, tell};
pub use progress::{Job, Progress, human_seconds};
pub use tracing_setup::init_tracing;
