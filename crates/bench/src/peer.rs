//! PyTorch's side: a script that prints one JSON document, run by an interpreter that has torch, diffusers and peft.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use pipeline::{FailureKind, StageError};
use serde_json::Value;

/// Why PyTorch's figures are not there.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// The interpreter cannot be started.
    #[error("cannot start {}", python.display())]
    Start {
        /// The interpreter.
        python: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The script failed; it has said why.
    #[error("{} ended with {status}", script.display())]
    Failed {
        /// The script.
        script: PathBuf,
        /// How it ended.
        status: ExitStatus,
    },
    /// The script's last line is no document, or lacks a figure.
    #[error("{} printed no figure `{figure}`", script.display())]
    Output {
        /// The script.
        script: PathBuf,
        /// What is missing.
        figure: &'static str,
    },
}

impl StageError for PeerError {
    fn kind(&self) -> FailureKind {
        FailureKind::BadInput
    }

    fn help(&self) -> Option<String> {
        Some("give an interpreter that has torch, diffusers and peft with --python".to_owned())
    }
}

/// PyTorch's figures.
#[derive(Clone, Debug, PartialEq)]
pub struct Peer {
    /// The script's document.
    pub document: Value,
    script: PathBuf,
}

impl Peer {
    /// Runs the script.
    ///
    /// # Errors
    ///
    /// If it cannot be run or prints no document.
    pub fn run(
        python: &Path,
        script: &Path,
        num_threads: usize,
        repeats: usize,
    ) -> Result<Self, PeerError> {
        let output = Command::new(python)
            .arg(script)
            .args(["--threads", &num_threads.to_string()])
            .args(["--repeats", &repeats.to_string()])
            .stderr(Stdio::inherit())
            .output()
            .map_err(|source| PeerError::Start {
                python: python.to_owned(),
                source,
            })?;
        if !output.status.success() {
            return Err(PeerError::Failed {
                script: script.to_owned(),
                status: output.status,
            });
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let document = text
            .lines()
            .last()
            .and_then(|line| serde_json::from_str(line).ok());
        Ok(Self {
            document: document.ok_or(PeerError::Output {
                script: script.to_owned(),
                figure: "{}",
            })?,
            script: script.to_owned(),
        })
    }

    /// The median and the least time of a figure, in seconds.
    ///
    /// # Errors
    ///
    /// If the document lacks it.
    pub fn seconds(&self, figure: &'static str) -> Result<[f64; 2], PeerError> {
        let number = |key: &str| self.document[figure][key].as_f64();
        match (number("median_s"), number("least_s")) {
            (Some(median), Some(least)) => Ok([median, least]),
            _ => Err(PeerError::Output {
                script: self.script.clone(),
                figure,
            }),
        }
    }
}
