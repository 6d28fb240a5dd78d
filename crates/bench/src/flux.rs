//! FLUX.1-dev's shapes on an NVIDIA card: the engine `cuda` beside PyTorch on the same card, line by line.
//!
//! The figures are those of `engine_cuda::measure`; here they are put beside what was aimed at and beside the peer's.
//! A whole training run is [`crate::training_run`]'s. Without `gpu` only what is predicted is said, which needs no card.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use console::{note_line, print_line};
use engine_cuda::CudaError;
use engine_cuda::measure::{MEASURED, PREDICTED, draw_first, measure, soak};
use pipeline::{Failure, FailureKind, StageError};
use serde_json::{Map, Value, json};

use crate::peer::PeerError;
use crate::{finish, training_run};

/// What the peer is asked for, each in a process of its own: what the table has a ratio for, the most telling first.
const PEER_SECTIONS: [&str; 4] = ["train_nf4", "train_bf16_compiled", "sample", "mm"];

/// The public recipe: four of these are an optimiser step.
const PEER_RECIPE: &str = "train_nf4_fp16_adamw8bit_ckpt1_txt512_b1_s_per_step";

/// The strongest setting found in PyTorch: an optimiser step of four images.
const PEER_STRONGEST: &str = "train_bf16_compiled_adamw8bit_ckpt1_txt512_b4_s_per_step";

/// What is measured.
#[derive(Clone, Debug)]
pub struct FluxBench {
    /// Measure on the card; without it only predictions are said.
    pub gpu: bool,
    /// An interpreter with torch, diffusers, peft and bitsandbytes, and the script, if PyTorch is to be measured.
    pub peer: Option<(PathBuf, PathBuf)>,
    /// Optimiser steps of the training run; of fewer than the recipe's 700 the rest is reckoned.
    pub train_steps: u32,
    /// How long to train after all else, to see whether device memory grows.
    pub soak: Option<Duration>,
    /// Print one JSON document on stdout, and nothing else there; rows are told on stderr as they come.
    pub json: bool,
}

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
enum FluxBenchError {
    #[error(transparent)]
    Peer(#[from] PeerError),
    #[error("the bench needs an NVIDIA card")]
    Card(#[from] CudaError),
}

impl StageError for FluxBenchError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::Peer(error) => error.kind(),
            Self::Card(_) => FailureKind::Failed,
        }
    }

    fn help(&self) -> Option<String> {
        Some(match self {
            Self::Peer(_) => {
                "--python wants an interpreter with torch, diffusers, peft and bitsandbytes"
                    .to_owned()
            }
            Self::Card(_) => {
                "without --gpu the predictions are said, which need no card".to_owned()
            }
        })
    }
}

/// What starts [`first_image`] in a process of its own.
const FIRST_IMAGE: [&str; 2] = ["bench", "first-image"];

/// Draws one picture's latents and prints what it took, for a process that times this one; gives the exit code.
pub fn first_image() -> u8 {
    match draw_first() {
        Ok(parts) => {
            print_line(&parts.to_string());
            0
        }
        Err(error) => {
            let failure = Failure::from(FluxBenchError::Card(error));
            console::tell(&failure);
            failure.kind().exit_code()
        }
    }
}

/// A line of the table.
struct Line {
    name: &'static str,
    /// The row and the field that it is.
    figure: (&'static str, &'static str),
    unit: &'static str,
    target: f64,
    stretch: Option<f64>,
    /// The peer's row for the same work, and how many of it make one of our unit.
    peer: Option<(&'static str, f64)>,
}

const fn line(
    name: &'static str,
    figure: (&'static str, &'static str),
    unit: &'static str,
    target: f64,
    stretch: Option<f64>,
) -> Line {
    Line {
        name,
        figure,
        unit,
        target,
        stretch,
        peer: None,
    }
}

impl Line {
    const fn beside(self, peer: &'static str, in_our_unit: f64) -> Self {
        Self {
            peer: Some((peer, in_our_unit)),
            ..self
        }
    }
}

const LINES: [Line; 14] = [
    line(
        "training micro-step, NF4, recompute everywhere",
        ("nf4_train_recompute_b1", "micro_step_s"),
        "s",
        0.20,
        Some(0.12),
    )
    .beside(PEER_RECIPE, 1.0),
    line(
        "its memory",
        ("nf4_train_recompute_b1", "device_bytes"),
        "bytes",
        7.5e9,
        None,
    ),
    line(
        "training micro-step, NF4, no recompute",
        ("nf4_train_keep_b1", "micro_step_s"),
        "s",
        0.14,
        Some(0.09),
    )
    .beside("train_nf4_fp16_adamw8bit_ckpt0_txt512_b1_s_per_step", 1.0),
    line(
        "optimiser step of 4 images within 24 GB, NF4",
        ("nf4_train_within_24GB_b4", "step_s"),
        "s",
        0.50,
        Some(0.42),
    ),
    line(
        "sampling step bf16, 512 px",
        ("bf16_sample_512", "step_s"),
        "s",
        0.044,
        Some(0.036),
    )
    .beside("sample_bf16_512px_ms_per_step", 1e-3),
    line(
        "sampling step bf16, 1024 px",
        ("bf16_sample_1024", "step_s"),
        "s",
        0.130,
        Some(0.105),
    )
    .beside("sample_bf16_1024px_ms_per_step", 1e-3),
    line(
        "sampling step NF4, 512 px",
        ("nf4_sample_512", "step_s"),
        "s",
        0.060,
        Some(0.045),
    )
    .beside("sample_nf4_bf16_512px_ms_per_step", 1e-3),
    line(
        "true guidance, times a step without",
        ("bf16_sample_512", "true_guidance_ratio"),
        "",
        1.8,
        None,
    ),
    line(
        "attention 24x1536x128 forward",
        ("attention_24x1536x128_Bf16", "forward_ms"),
        "ms",
        0.10,
        Some(0.065),
    )
    .beside("attention_1536", 1.0),
    line(
        "attention 24x1536x128 backward",
        ("attention_24x1536x128_Bf16", "backward_ms"),
        "ms",
        0.35,
        Some(0.20),
    )
    .beside("attention_backward_1536", 1.0),
    line("load NF4", ("nf4_load", "s"), "s", 15.0, None),
    line(
        "700 steps of 4 images with data loading and checkpoints (weights made on the card)",
        ("bf16_training_run", "all_steps_s"),
        "s",
        420.0,
        Some(300.0),
    ),
    line(
        "process start to first latents, 512 px, bf16, compiled kernels (weights made on the card; no text encoders, no VAE)",
        ("bf16_first_image", "s"),
        "s",
        15.0,
        None,
    ),
    line(
        "growth of device memory over minutes of training",
        ("nf4_soak", "growth_bytes"),
        "bytes",
        0.0,
        None,
    ),
];

/// Measures and prints; gives the exit code.
pub fn run(bench: &FluxBench) -> u8 {
    // Rows are told as they come.
    finish(take(bench), bench.json, |_| {})
}

fn take(bench: &FluxBench) -> Result<Value, FluxBenchError> {
    let sections: Vec<&str> = match bench.gpu {
        true => PREDICTED.iter().chain(&MEASURED).copied().collect(),
        false => PREDICTED.to_vec(),
    };
    let say = if bench.json { note_line } else { print_line };
    let mut tell = |name: &str, value: &Value| say(&format!("{name} {value}"));
    let mut rows = measure(&sections, &FIRST_IMAGE, &mut tell)?;
    if bench.gpu {
        let mut add = |name: &str, outcome: Result<Value, String>| {
            let row = outcome.unwrap_or_else(|error| json!({ "error": error }));
            tell(name, &row);
            rows.insert(name.to_owned(), row);
        };
        let run = training_run::row(bench.train_steps);
        add("bf16_training_run", run.map_err(|error| error.to_string()));
        if let Some(duration) = bench.soak {
            let outcome = soak(duration, &mut |row| say(&format!("nf4_soak so far {row}")));
            add("nf4_soak", outcome.map_err(|error| error.to_string()));
        }
    }
    let peer = match &bench.peer {
        Some((python, script)) => Some(peer_rows(python, script, &mut tell)?),
        None => None,
    };
    let table = table(&rows, peer.as_ref());
    if !bench.json && bench.gpu {
        for row in &table {
            print_line(&words(row));
        }
    }
    let mut document =
        json!({ "bench": "flux", "measured": bench.gpu, "table": table, "rows": rows });
    if let Some(peer) = peer {
        document["peer"] = Value::Object(peer);
    }
    Ok(document)
}

/// The lines for which there are figures.
fn table(rows: &Map<String, Value>, peer: Option<&Map<String, Value>>) -> Vec<Value> {
    let field = |row: &str, field: &str| rows.get(row).and_then(|row| row[field].as_f64());
    let theirs = |name: &str| peer.and_then(|peer| peer.get(name)?.as_f64());
    let with_targets = |name: &str, value: f64, unit: &str, target: f64, stretch: Option<f64>| {
        json!({
            "line": name, "value": value, "unit": unit, "target": target, "stretch": stretch,
            "reached": value <= target, "stretch_reached": stretch.map(|stretch| value <= stretch),
        })
    };
    let mut lines: Vec<Value> = LINES
        .iter()
        .filter_map(|line| {
            let value = field(line.figure.0, line.figure.1)?;
            let mut said = with_targets(line.name, value, line.unit, line.target, line.stretch);
            if rows[line.figure.0]["extrapolated"] == json!(true) {
                said["extrapolated"] = json!(true);
            }
            if let Some((row, in_our_unit)) = line.peer
                && let Some(theirs) = theirs(row)
            {
                said["times_the_peer"] = json!(theirs * in_our_unit / value);
            }
            Some(said)
        })
        .collect();
    let training = || rows.iter().filter(|(name, _)| name.contains("_train_"));
    let of_four = training().filter(|(name, _)| name.ends_with("_b4"));
    let best = of_four
        .filter_map(|(name, row)| Some((row["step_s"].as_f64()?, name)))
        .min_by(|a, b| a.0.total_cmp(&b.0));
    if let Some((seconds, name)) = best {
        let what = "optimiser step of 4 images, best plan";
        let mut line = with_targets(what, seconds, "s", 0.40, Some(0.30));
        line["row"] = json!(name);
        if let Some(micro) = theirs(PEER_RECIPE) {
            line["times_the_published_recipe"] = json!(4.0 * micro / seconds);
        }
        if let Some(step) = theirs(PEER_STRONGEST) {
            line["times_the_strongest_setting"] = json!(step / seconds);
        }
        lines.push(line);
    }
    let errors = training().filter_map(|(_, row)| {
        let [found, planned] = ["allocated_bytes", "planned_bytes"].map(|key| row[key].as_f64());
        Some((found? / planned? - 1.0).abs())
    });
    if let Some(worst) = errors.max_by(f64::total_cmp) {
        let what = "predicted against measured peak, worst";
        lines.push(with_targets(what, worst, "", 0.05, Some(0.02)));
    }
    lines
}

fn words(line: &Value) -> String {
    let number = |key: &str| line[key].as_f64().unwrap_or(f64::NAN);
    let mut text = format!(
        "{}: {:.4} {} (target {}",
        line["line"].as_str().unwrap_or_default(),
        number("value"),
        line["unit"].as_str().unwrap_or_default(),
        number("target"),
    );
    if let Some(stretch) = line["stretch"].as_f64() {
        text += &format!(", stretch {stretch}");
    }
    text.push(')');
    if line["extrapolated"] == json!(true) {
        text += " reckoned from a part of the steps";
    }
    for key in [
        "times_the_peer",
        "times_the_published_recipe",
        "times_the_strongest_setting",
    ] {
        if let Some(ratio) = line[key].as_f64() {
            text += &format!(" {ratio:.2} {}", key.replace('_', " "));
        }
    }
    text
}

/// Runs the peer's sections one after the other: the numbers of its lines `ROW name value …`, by name. `tell` hears each
/// as it comes. A section that breaks off gives the lines it came to.
fn peer_rows(
    python: &Path,
    script: &Path,
    tell: &mut impl FnMut(&str, &Value),
) -> Result<Map<String, Value>, PeerError> {
    let mut rows = Map::new();
    for section in PEER_SECTIONS {
        let cannot = |source| PeerError::Start {
            python: python.to_owned(),
            source,
        };
        let mut process = Command::new(python)
            .arg(script)
            .arg(section)
            .stdout(Stdio::piped())
            .spawn()
            .map_err(cannot)?;
        let stdout = process.stdout.take().into_iter().map(BufReader::new);
        for line in stdout.flat_map(BufReader::lines).map_while(Result::ok) {
            if let Some((name, value)) = parse(&line) {
                tell(&format!("peer {name}"), &value);
                rows.insert(name, value);
            }
        }
        process.wait().map_err(cannot)?;
    }
    if rows.is_empty() {
        return Err(PeerError::Output {
            script: script.to_owned(),
            figure: "ROW",
        });
    }
    Ok(rows)
}

/// Name and value of a line `ROW name value …`: its number if it begins with one, else its words.
fn parse(line: &str) -> Option<(String, Value)> {
    let (name, value) = line.strip_prefix("ROW ")?.split_once(' ')?;
    let first = value.split(' ').next().unwrap_or_default();
    let value = match first.parse::<f64>() {
        Ok(number) => json!(number),
        Err(_) => json!(value),
    };
    Some((name.to_owned(), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peers_lines_are_numbers_by_name() {
        let row = |line| parse(line).map(|(_, value)| value);
        assert_eq!(row("ROW a_s_per_step 0.5 peakGB 7.4"), Some(json!(0.5)));
        assert_eq!(row("ROW b OOM"), Some(json!("OOM")));
        assert_eq!(row("noise"), None);
    }

    #[test]
    fn the_peers_sections_run_by_themselves_and_one_that_breaks_off_costs_no_other() {
        let folder = tempfile::tempdir().expect("a folder");
        let script = folder.path().join("peer.sh");
        let lines = "[ $1 = sample ] && exit 3\necho \"ROW $1 2.0 GB\"\necho noise\n";
        fs_err::write(&script, lines).expect("written");
        let mut told = Vec::new();
        let mut tell = |name: &str, _: &Value| told.push(name.to_owned());
        let rows = peer_rows(Path::new("sh"), &script, &mut tell).expect("there are rows");
        assert_eq!((rows.len(), told.len()), (3, 3));
        assert_eq!(rows["train_nf4"], json!(2.0));
        assert_eq!(told[0], "peer train_nf4");
    }

    #[test]
    fn a_line_says_how_many_times_faster_than_the_peers_it_is() {
        let rows = json!({ "bf16_sample_512": { "step_s": 0.04 } });
        let peer = json!({ "sample_bf16_512px_ms_per_step": 100.0 });
        let lines = table(rows.as_object().expect("rows"), peer.as_object());
        assert_eq!(lines[0]["times_the_peer"], json!(2.5));
        assert!(words(&lines[0]).ends_with("2.50 times the peer"));
    }

    #[test]
    fn a_run_that_was_not_taken_to_its_end_says_so() {
        let run = |part: bool| {
            let row = json!({ "all_steps_s": 250.0, "extrapolated": part });
            let rows = Map::from_iter([("bf16_training_run".to_owned(), row)]);
            words(&table(&rows, None)[0])
        };
        assert!(run(true).ends_with("reckoned from a part of the steps"));
        assert!(run(false).ends_with("stretch 300)"), "{}", run(false));
    }

    #[test]
    fn the_table_has_the_best_step_beside_the_peers_and_the_worst_prediction() {
        let row = |step: f64, found: f64| json!({ "step_s": step, "allocated_bytes": found, "planned_bytes": 100.0 });
        let mut rows = Map::new();
        rows.insert("nf4_train_keep_b4".to_owned(), row(0.5, 103.0));
        rows.insert("bf16_train_keep_b4".to_owned(), row(0.25, 99.0));
        rows.insert(
            "bf16_sample_512".to_owned(),
            json!({ "error": "out of memory" }),
        );
        let peer = [PEER_RECIPE, PEER_STRONGEST].into_iter().zip([1.0, 0.5]);
        let peer = peer.map(|(name, seconds)| (name.to_owned(), json!(seconds)));
        let peer: Map<String, Value> = peer.collect();
        let lines = table(&rows, Some(&peer));
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert_eq!(lines[0]["row"], "bf16_train_keep_b4");
        assert_eq!(lines[0]["times_the_published_recipe"], json!(16.0));
        assert_eq!(lines[0]["times_the_strongest_setting"], json!(2.0));
        assert_eq!(lines[0]["stretch_reached"], json!(true));
        let worst = lines[1]["value"].as_f64().expect("a number");
        assert!((worst - 0.03).abs() < 1e-9 && lines[1]["stretch_reached"] == json!(false));
        assert!(words(&lines[0]).contains("16.00 times the published recipe"));
    }
}
