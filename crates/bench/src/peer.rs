//! PyTorch's side: a script that takes steps when told to and says how long they took, run by an interpreter that has
//! torch, diffusers and peft.

use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

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
    /// The script has ended (and said why on stderr), or does not know a figure.
    #[error("{} gave no `{figure}`", script.display())]
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

/// PyTorch, ready to take steps.
pub struct Peer {
    script: PathBuf,
    process: Child,
    orders: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    /// Versions and the number of threads, as the script says them.
    pub about: Value,
}

impl Peer {
    /// Starts the script, which loads its model and says what it is.
    ///
    /// # Errors
    ///
    /// If it cannot be started or says nothing.
    pub fn start(python: &Path, script: &Path, num_threads: usize) -> Result<Self, PeerError> {
        let not_started = |source| PeerError::Start {
            python: python.to_owned(),
            source,
        };
        let mut process = Command::new(python)
            .arg(script)
            .args(["--threads", &num_threads.to_string(), "--serve"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(not_started)?;
        let orders = process.stdin.take().expect("it was asked for");
        let stdout = process.stdout.take().expect("it was asked for");
        let mut peer = Self {
            script: script.to_owned(),
            process,
            orders,
            answers: BufReader::new(stdout).lines(),
            about: Value::Null,
        };
        peer.about = peer.answer("about")?;
        Ok(peer)
    }

    /// Times of some steps of a figure, in seconds.
    ///
    /// # Errors
    ///
    /// If the script has ended, or does not know the figure.
    pub fn times(&mut self, figure: &'static str, count: usize) -> Result<Vec<f64>, PeerError> {
        // A script that has ended is noticed when it does not answer.
        let _ = writeln!(self.orders, "{figure} {count}").and_then(|()| self.orders.flush());
        let answer = self.answer(figure)?;
        let times = answer.as_array().into_iter().flatten();
        Ok(times.filter_map(Value::as_f64).collect())
    }

    fn answer(&mut self, figure: &'static str) -> Result<Value, PeerError> {
        let line = self.answers.next().and_then(Result::ok);
        line.and_then(|line| serde_json::from_str(&line).ok())
            .ok_or_else(|| PeerError::Output {
                script: self.script.clone(),
                figure,
            })
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Only ever reading and computing, it has nothing to lose.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
