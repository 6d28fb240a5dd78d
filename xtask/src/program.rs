//! Building, finding and starting `spritelora`, the program that does the stages' work.
//!
//! Started by `cargo xtask`, it is built first (a plain dev build, which does nothing when nothing changed). Started by
//! itself, as on a GPU machine without Rust, the one beside this executable is taken as it is.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use pipeline::{Failure, FailureKind, StageError};

use crate::output;

/// Why `spritelora` cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// The build failed; cargo has said why.
    #[error("spritelora does not build")]
    Build,
    /// A program cannot be started.
    #[error("cannot start {}", path.display())]
    Start {
        /// The program.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// There is no program to start.
    #[error("there is no {}", path.display())]
    Absent {
        /// Where it should be.
        path: PathBuf,
    },
    /// This program does not know where it is.
    #[error("cannot tell where this executable is")]
    Whereabouts(#[source] std::io::Error),
    /// The program was ended from outside, or ended in a way that it never does by itself.
    #[error("spritelora {command} was ended by {status}")]
    Ended {
        /// What it was doing.
        command: String,
        /// How it ended.
        status: ExitStatus,
    },
}

impl StageError for ProgramError {
    fn kind(&self) -> FailureKind {
        FailureKind::Failed
    }

    fn help(&self) -> Option<String> {
        match self {
            Self::Absent { .. } => Some(
                "start this through `cargo xtask`, or put the program spritelora beside xtask".to_owned(),
            ),
            Self::Ended { .. } => Some(
                "nothing half-done was sealed; run the same command again, training continues from its newest \
                 checkpoint"
                    .to_owned(),
            ),
            Self::Build | Self::Start { .. } | Self::Whereabouts(_) => None,
        }
    }
}

/// The directory at which default paths start: the workspace under cargo, the current directory else.
pub fn workspace() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR")
        .and_then(|xtask| Path::new(&xtask).parent().map(Path::to_owned))
        .unwrap_or_else(|| PathBuf::from("."))
}

/// Builds `spritelora` if cargo started us, and says where it is.
///
/// # Errors
///
/// If it does not build or is not there.
pub fn prepare(with_cuda: bool) -> Result<PathBuf, ProgramError> {
    if let Some(cargo) = std::env::var_os("CARGO") {
        let mut build = Command::new(&cargo);
        build
            // The whole workspace, so that dependencies have the features that the tests build them with.
            .args(["build", "--workspace", "--bin", "spritelora"])
            .current_dir(workspace())
            .stdout(Stdio::null());
        if with_cuda {
            build.args(["--features", "spritelora/cuda"]);
        }
        let status = build.status().map_err(|source| ProgramError::Start {
            path: cargo.into(),
            source,
        })?;
        if !status.success() {
            return Err(ProgramError::Build);
        }
    }
    let this = std::env::current_exe().map_err(ProgramError::Whereabouts)?;
    let path = this.with_file_name(format!("spritelora{}", std::env::consts::EXE_SUFFIX));
    if path.is_file() {
        Ok(path)
    } else {
        Err(ProgramError::Absent { path })
    }
}

/// The exit code that a child's end means here: its own 0, 1 or 2.
///
/// # Errors
///
/// If it was killed or crashed.
pub fn code_of(status: ExitStatus, command: &str) -> Result<u8, ProgramError> {
    match status.code() {
        Some(code @ 0..=2) => Ok(code as u8),
        _ => Err(ProgramError::Ended {
            command: command.to_owned(),
            status,
        }),
    }
}

/// Runs `spritelora <command> <arguments>` and passes its exit code on.
pub fn pass_through(command: &str, arguments: &[OsString]) -> u8 {
    let ended = prepare(asks_for_cuda(arguments)).and_then(|path| {
        let status = Command::new(&path)
            .arg(command)
            .args(arguments)
            .status()
            .map_err(|source| ProgramError::Start { path, source })?;
        code_of(status, command)
    });
    ended.unwrap_or_else(|error| {
        let json = arguments.iter().any(|argument| argument == "--json");
        output::failure(&Failure::from(error), json)
    })
}

fn asks_for_cuda(arguments: &[OsString]) -> bool {
    let is_cuda = |value: &OsStr| value.to_string_lossy().starts_with("cuda");
    arguments
        .windows(2)
        .any(|pair| pair[0] == "--device" && is_cuda(&pair[1]))
        || arguments
            .iter()
            .any(|argument| argument.to_string_lossy().starts_with("--device=cuda"))
}

#[cfg(test)]
mod unit_tests {
    use super::*;

    #[test]
    fn cuda_is_built_in_only_when_asked_for() {
        let asks = |arguments: &[&str]| {
            asks_for_cuda(&arguments.iter().map(OsString::from).collect::<Vec<_>>())
        };
        assert!(asks(&["--fixtures", "d", "--device", "cuda:1"]));
        assert!(asks(&["--device=cuda"]));
        assert!(!asks(&["--device", "cpu", "--fixtures", "cuda"]));
    }
}
