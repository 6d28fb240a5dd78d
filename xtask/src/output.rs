//! Words or JSON on stdout. Failures are told on stderr, and with `--json` also as the document on stdout.

use console::{print_document, shown_path};
use pipeline::{DataSet, DirtyReason, Failure, StageState, Task};
use serde_json::{Value, json};

/// Tells a failure on stderr, and on stdout if the caller reads JSON; gives the exit code.
pub fn failure(failure: &Failure, json: bool) -> u8 {
    if json {
        print_document(&json!({ "error": failure.to_json() }));
    }
    console::tell(failure);
    failure.kind().exit_code()
}

/// A task's state as JSON.
pub fn state_value(task: Task, state: &StageState) -> Value {
    let (stage, held_out) = (task.stage, task.data == DataSet::HeldOut);
    match state {
        StageState::Fresh(artifact) => json!({
            "stage": stage,
            "held_out": held_out,
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
            "held_out": held_out,
            "state": "dirty",
            "dir": dir,
            "fingerprint": fingerprint,
            "reasons": reasons_value(reasons),
        }),
        StageState::Blocked { upstream } => json!({
            "stage": stage,
            "held_out": held_out,
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

/// A task's state in words, with a short path.
pub fn state_words(task: Task, state: &StageState) -> String {
    match state {
        StageState::Fresh(artifact) => format!("{task}: Fresh ({})", shown_path(&artifact.dir)),
        other => format!("{task}: {other}"),
    }
}
