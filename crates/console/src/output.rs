//! Results on stdout and failures on stderr, the same for every program of the workspace.

use std::io::{IsTerminal, Write};
use std::path::Path;

use miette::{Diagnostic, GraphicalReportHandler, GraphicalTheme};

use crate::progress::above_the_bars;

/// Prints a line on stdout. A reader that has closed its end (`| head`) wants no more lines: that is no failure.
pub fn print_line(text: &str) {
    above_the_bars(|| {
        let _ = writeln!(std::io::stdout(), "{text}");
    });
}

/// Prints a line on stderr, where stdout is for a document: what is already known, of work that takes long.
pub fn note_line(text: &str) {
    above_the_bars(|| {
        let _ = writeln!(std::io::stderr(), "{text}");
    });
}

/// Prints the one JSON document of a command on stdout.
pub fn print_document(document: &serde_json::Value) {
    print_line(&format!("{document:#}"));
}

/// Tells what went wrong on stderr: message, causes and advice; in colour and wrapped only on a terminal.
pub fn tell(diagnostic: &dyn Diagnostic) {
    let handler = if std::io::stderr().is_terminal() {
        GraphicalReportHandler::new()
    } else {
        GraphicalReportHandler::new_themed(GraphicalTheme::none()).with_wrap_lines(false)
    };
    let mut text = String::new();
    if handler.render_report(&mut text, diagnostic).is_err() {
        text = diagnostic.to_string();
    }
    above_the_bars(|| {
        let _ = writeln!(std::io::stderr(), "Error:\n{}", text.trim_end());
    });
}

/// A path as a person would type it from the current directory.
pub fn shown_path(path: &Path) -> String {
    let here = std::env::current_dir().unwrap_or_default();
    path.strip_prefix(&here)
        .unwrap_or(path)
        .display()
        .to_string()
}
