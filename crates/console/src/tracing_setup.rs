//! Where log events go: warnings (or what `SPRITELORA_LOG` asks for) to stderr, everything from `info` to the run's file.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::Mutex;

use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::fmt;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::progress::above_the_bars;

/// The environment variable with the filter of what is shown on stderr, e.g. `SPRITELORA_LOG=train=debug`.
const FILTER_VARIABLE: &str = "SPRITELORA_LOG";

/// Starts logging: to stderr, and to `log_file` (created with its directory) when one is given.
///
/// Only the first call of a process has an effect on where events go; later ones (tests) are ignored.
///
/// # Errors
///
/// If the log file cannot be created; the message names the path.
pub fn init_tracing(log_file: Option<&Path>) -> io::Result<()> {
    let on_stderr =
        EnvFilter::try_from_env(FILTER_VARIABLE).unwrap_or_else(|_| EnvFilter::new("warn"));
    let stderr_layer = fmt::layer()
        .without_time()
        .with_target(false)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(|| StderrAboveBars)
        .with_filter(on_stderr);
    let file_layer = match log_file {
        None => None,
        Some(path) => {
            if let Some(parent) = path.parent() {
                fs_err::create_dir_all(parent)?;
            }
            let file = fs_err::File::create(path)?;
            let layer = fmt::layer()
                .with_ansi(false)
                .with_writer(Mutex::new(file))
                .with_filter(EnvFilter::new("info"));
            Some(layer)
        }
    };
    // A second initialisation fails; the first one stays in force, which is what a test process wants.
    let _ = tracing_subscriber::registry()
        .with(stderr_layer)
        .with(file_layer)
        .try_init();
    Ok(())
}

struct StderrAboveBars;

impl Write for StderrAboveBars {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        above_the_bars(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
