//! How a stage fails: whose turn it is (the person's or ours), the error, and the advice apart from it.

use std::error::Error;
use std::fmt;

/// Who has to act, and so the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// Wrong usage, or a file or recipe that cannot be used as it is: exit code 2.
    BadInput,
    /// The work itself failed: disk full, device lost, a bug. Exit code 1.
    Failed,
}

impl FailureKind {
    /// The process's exit code.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::BadInput => 2,
            Self::Failed => 1,
        }
    }
}

/// What every stage's error type says beyond its message. Implement it on the stage's `thiserror` enum.
pub trait StageError: Error + Send + Sync + 'static {
    /// Whose turn it is.
    fn kind(&self) -> FailureKind;

    /// What the person can do, apart from what happened.
    fn help(&self) -> Option<String>;
}

/// Any stage's error on its way to the person: rendered by `miette`, turned into an exit code.
#[derive(Debug)]
pub struct Failure {
    kind: FailureKind,
    error: Box<dyn Error + Send + Sync>,
    help: Option<String>,
}

impl Failure {
    /// A failure that the person can mend: exit code 2.
    pub fn bad_input(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self {
            kind: FailureKind::BadInput,
            error: error.into(),
            help: None,
        }
    }

    /// A failure of the work: exit code 1.
    pub fn failed(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self {
            kind: FailureKind::Failed,
            error: error.into(),
            help: None,
        }
    }

    /// Adds advice, shown apart from the message.
    #[must_use]
    pub fn with_help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Whose turn it is.
    pub fn kind(&self) -> FailureKind {
        self.kind
    }

    /// The advice.
    pub fn help(&self) -> Option<&str> {
        self.help.as_deref()
    }

    /// The failure as programs read it with `--json`.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "messages": self.messages(),
            "help": self.help,
            "exit_code": self.kind.exit_code(),
        })
    }

    /// Message and the causes below it, outermost first.
    pub fn messages(&self) -> Vec<String> {
        let mut messages = vec![self.error.to_string()];
        let mut cause = self.error.source();
        while let Some(error) = cause {
            messages.push(error.to_string());
            cause = error.source();
        }
        messages
    }
}

impl<E: StageError> From<E> for Failure {
    fn from(error: E) -> Self {
        Self {
            kind: error.kind(),
            help: error.help(),
            error: Box::new(error),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(formatter)
    }
}

impl Error for Failure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.error.source()
    }
}

impl miette::Diagnostic for Failure {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.help
            .as_ref()
            .map(|help| Box::new(help) as Box<dyn fmt::Display>)
    }
}
