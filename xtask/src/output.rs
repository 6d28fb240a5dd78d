//! Words or JSON on stdout. Failures are told on stderr, and with `--json` also as the document on stdout.

use console::{print_document, shown_path};
use pipeline::{DirtyReason, Failure, Stage, StageState};
use serde_json::{Value, json};

/// Tells a failure on stderr, and on stdout if the caller reads JSON; gives the exit code.
pub fn failure(failure: &Failure, json: bool) -> u8 {
    if json {
        print_document(&json!({ "error": failure.to_json() }));
    }
    console::tell(failure);
    failure.kind().exit_code()
}

/// A stage's state as JSON.
pub fn state_value(stage: Stage, state: &StageState) -> Value {
    match state {
        StageState::Fresh(artifact) => json!({
            "stage": stage,
            "state": "fresh",
            "dir": artifact.dir,
            "fingerprint": artifact.manifest.fingerprint,
            "created": artifact.manifest.created,
        }),
        StageState::Dirty {
            reasons,
            fingerprint,
            dir,
        } => json!({
            "stage": stage,
            "state": "dirty",
            "dir": dir,
            "fingerprint": fingerprint,
            "reasons": reasons_value(reasons),
        }),
        StageState::Blocked { upstream } => json!({
            "stage": stage,
            "state": "blocked",
            "upstream": upstream,
        }),
    }
}

fn reasons_value(reasons: &[DirtyReason]) -> Vec<Value> {
    reasons
        .iter()
        .map(|reason| json!({ "text": reason.to_string(), "detail": reason }))
        .collect()
}

/// A stage's state in words, with a short path.
pub fn state_words(stage: Stage, state: &StageState) -> String {
    match state {
        StageState::Fresh(artifact) => format!("{stage}: Fresh ({})", shown_path(&artifact.dir)),
        other => format!("{stage}: {other}"),
    }
}
