//! What a parity run found: a table for people, one document for programs.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::checker::TensorResult;
use crate::fixture::FixtureSet;

/// Most lines of detail that a failed case gets in the table; the document has them all.
const MAX_DETAILS: usize = 8;

/// Packages named above the table: those whose numbers are compared. The document has all.
const SHOWN_VERSIONS: [&str; 3] = ["bitsandbytes", "diffusers", "torch"];

/// Outcome of one case.
#[derive(Clone, Debug, Serialize)]
pub struct CaseResult {
    /// Its name.
    pub name: String,
    /// Whether it ran to its end and every tensor is within its tolerance.
    pub ok: bool,
    /// The tensor that is furthest off, or came nearest to its limit.
    pub worst: Option<TensorResult>,
    /// Why it did not run to its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stopped_by: Option<String>,
    /// How long it took.
    pub seconds: f64,
    /// Every comparison that it made.
    pub tensors: Vec<TensorResult>,
}

impl CaseResult {
    /// The result of a case that compared `tensors`, and stopped early if there is a reason.
    pub fn new(
        name: &str,
        tensors: Vec<TensorResult>,
        stopped_by: Option<String>,
        seconds: f64,
    ) -> Self {
        Self {
            name: name.to_owned(),
            ok: stopped_by.is_none() && tensors.iter().all(|t| t.ok),
            worst: TensorResult::worst(&tensors).cloned(),
            stopped_by,
            seconds,
            tensors,
        }
    }
}

/// Outcome of a fixture directory.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The directory as it was given.
    pub fixtures: String,
    /// Which of the oracle's variants.
    pub variant: String,
    /// The seed of its random numbers.
    pub seed: u64,
    /// The Python packages that wrote the reference values.
    pub versions: BTreeMap<String, String>,
    /// Whether every case is ok.
    pub ok: bool,
    /// The cases in the order of `cases.json`.
    pub cases: Vec<CaseResult>,
}

impl Report {
    /// A report of the cases of `set`.
    pub fn new(set: &FixtureSet, cases: Vec<CaseResult>) -> Self {
        let (variant, seed) = set.origin();
        Self {
            fixtures: set.dir().display().to_string(),
            variant: variant.to_owned(),
            seed,
            versions: set.versions().clone(),
            ok: cases.iter().all(|c| c.ok),
            cases,
        }
    }
}

/// The lines above the table.
pub fn head(set: &FixtureSet) -> String {
    let (variant, seed) = set.origin();
    let versions: Vec<String> = set
        .versions()
        .iter()
        .filter(|(name, _)| SHOWN_VERSIONS.contains(&name.as_str()))
        .map(|(name, version)| format!("{name} {version}"))
        .collect();
    format!(
        "{} (variant {variant}, seed {seed}; {})\n\n{:<28} {:>9} {:>9}  {:<8}  {:<4}  worst tensor",
        set.dir().display(),
        versions.join(", "),
        "case",
        "error",
        "tolerance",
        "unit",
        "",
    )
}

/// The line of one case, and below it what failed.
pub fn lines(case: &CaseResult) -> String {
    let verdict = if case.ok { "ok" } else { "FAIL" };
    let (error, tolerance, unit, name) = match &case.worst {
        Some(worst) => (
            number(worst.error),
            number(worst.tolerance),
            worst.unit,
            worst.name.as_str(),
        ),
        None => ("-".to_owned(), "-".to_owned(), "", "-"),
    };
    let mut lines = vec![format!(
        "{:<28} {error:>9} {tolerance:>9}  {unit:<8}  {verdict:<4}  {name}",
        case.name
    )];
    lines.extend(case.stopped_by.iter().map(|reason| format!("    {reason}")));
    let failed: Vec<&TensorResult> = case.tensors.iter().filter(|t| !t.ok).collect();
    for tensor in failed.iter().take(MAX_DETAILS) {
        let note = tensor.note.as_deref();
        lines.push(format!(
            "    {}: {} {}, tolerance {}{}",
            tensor.name,
            number(tensor.error),
            tensor.unit,
            number(tensor.tolerance),
            note.map_or(String::new(), |note| format!("; {note}")),
        ));
    }
    if failed.len() > MAX_DETAILS {
        lines.push(format!("    … and {} more", failed.len() - MAX_DETAILS));
    }
    lines.join("\n")
}

/// The line below the table.
pub fn sum(report: &Report) -> String {
    let num_cases = report.cases.len();
    let num_ok = report.cases.iter().filter(|c| c.ok).count();
    let num_tensors: usize = report.cases.iter().map(|c| c.tensors.len()).sum();
    let seconds: f64 = report.cases.iter().map(|c| c.seconds).sum();
    format!(
        "\n{num_cases} cases, {num_tensors} comparisons: {num_ok} ok, {} failed ({seconds:.1} s)",
        num_cases - num_ok
    )
}

/// `0`, `1.2e-7` or `inf`: one width for all magnitudes.
fn number(value: f64) -> String {
    if value == 0.0 || (value.fract() == 0.0 && value.abs() < 1e6) {
        format!("{value}")
    } else if value.is_finite() {
        format!("{value:.1e}")
    } else {
        "inf".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(ok: bool) -> TensorResult {
        TensorResult {
            name: "velocity".to_owned(),
            error: if ok { 2e-7 } else { f64::INFINITY },
            tolerance: 1e-4,
            unit: "relative",
            used: 0.0,
            ok,
            note: None,
        }
    }

    #[test]
    fn a_case_that_stopped_early_fails_even_if_all_it_compared_passed() {
        let case = CaseResult::new(
            "vae_0",
            vec![tensor(true)],
            Some("no such file".into()),
            0.0,
        );
        assert!(!case.ok);
        let line = lines(&case);
        assert!(
            line.contains("FAIL") && line.contains("no such file"),
            "{line}"
        );
    }

    #[test]
    fn the_line_names_the_worst_tensor_its_error_and_its_tolerance() {
        let line = lines(&CaseResult::new("x", vec![tensor(true)], None, 0.0));
        for part in ["2.0e-7", "1.0e-4", "ok", "velocity"] {
            assert!(line.contains(part), "{line}");
        }
    }

    #[test]
    fn an_infinite_error_is_null_in_json() {
        let text = serde_json::to_string(&tensor(false)).expect("it is serialisable");
        assert!(text.contains("\"error\":null"), "{text}");
    }
}
