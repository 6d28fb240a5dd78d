//! FLUX.1-dev's shapes on random weights: steps of training and sampling, attention, products, by time and memory; and
//! training of all weights at the small base's; the first picture of a program that was just started; and memory over
//! minutes of training.
//!
//! Weights are N(0, 0.02), made on the device: speed and memory only. Times are medians; each is taken after the work
//! ran three times (by launches, recorded, replayed). `step` is what a training step of one batch costs with everything:
//! copying the batch to the device, forward, backward, clipping, AdamW.

mod first;
mod full;
mod network;
mod parts;
mod soak;

use mmdit::MmditConfig;
use quant::{AdamWConfig, OptimizerKind};
use serde_json::{Map, Value, json};

use crate::error::CudaError;
use crate::half_type::Half;
use crate::model::{EngineOptions, Recompute, Shape, TrainingOptions, WeightForm};
use crate::plan::{LoraSize, PlanRequest, fit, lora_sizes, plan};
use crate::stream::{OpenOptions, Rates, Stream, Work};

pub use first::draw_first;
pub use soak::soak;

/// What fails is said in its line, and the next line follows.
type Outcome<V = ()> = Result<V, CudaError>;

/// The sections that need no card.
pub const PREDICTED: [&str; 1] = ["plan"];

/// The sections that need one.
pub const MEASURED: [&str; 6] = ["attention", "products", "nf4", "bf16", "full", "first"];

const TARGETS: [&str; 4] = ["to_q", "to_k", "to_v", "to_out.0"];
const TEXT: usize = 512;
const STEPS: usize = 7;

/// Lines of the table, by name.
struct Table<'a> {
    rows: Map<String, Value>,
    told: &'a mut dyn FnMut(&str, &Value),
}

impl Table<'_> {
    fn row(&mut self, name: &str, value: Value) {
        (self.told)(name, &value);
        self.rows.insert(name.to_owned(), value);
    }

    fn guarded(&mut self, name: &str, run: impl FnOnce(&mut Self) -> Outcome) {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(self)));
        match outcome {
            Ok(Ok(())) => {}
            Ok(Err(error)) => self.row(name, json!({ "error": error.to_string() })),
            Err(_) => self.row(name, json!({ "error": "broke off" })),
        }
    }
}

fn open() -> Outcome<Stream> {
    Stream::open(&OpenOptions::default())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Milliseconds of `work` on the device, `inner` runs between two events.
fn device_ms(stream: &Stream, inner: usize, mut work: impl FnMut() -> Outcome) -> Outcome<f64> {
    work()?;
    let mut times = Vec::new();
    for _ in 0..STEPS {
        let before = stream.event()?;
        for _ in 0..inner {
            work()?;
        }
        times.push(f64::from(stream.event()?.milliseconds_since(&before)?) / inner as f64);
    }
    Ok(median(times))
}

/// Takes the figures of some sections ([`PREDICTED`] and [`MEASURED`]); `told` sees each line as it comes.
///
/// `again` are the arguments with which the running program, started anew, prints what [`draw_first`] says.
///
/// # Errors
///
/// If a section needs a card and there is none that will do. What fails later is said in its line.
pub fn measure(
    sections: &[&str],
    again: &[&str],
    told: &mut dyn FnMut(&str, &Value),
) -> Result<Map<String, Value>, CudaError> {
    let wanted = |section: &str| sections.contains(&section);
    let on_the_card = MEASURED.iter().any(|section| wanted(section));
    let mut table = Table {
        rows: Map::new(),
        told,
    };
    if on_the_card {
        let facts = open()?.facts().clone();
        let value = json!({
            "name": facts.name,
            "memory_bytes": facts.total_bytes,
            "driver": facts.driver_version,
        });
        table.row("device", value);
    }
    if wanted("plan") {
        table.guarded("plan", plan_rows);
    }
    if wanted("attention") {
        table.guarded("attention", parts::attention_rows);
    }
    if wanted("products") {
        table.guarded("products", parts::product_rows);
    }
    let nf4 = WeightForm::Nf4 { double_quant: true };
    for (name, form) in [("nf4", nf4), ("bf16", WeightForm::Half)] {
        if wanted(name) {
            table.guarded(name, |table| network::model_rows(table, name, form));
        }
    }
    if wanted("full") {
        table.guarded("full", full::rows);
    }
    if wanted("first") {
        table.row("bf16_first_image", first::row(again));
    }
    Ok(table.rows)
}

/// What twelve ways of training are predicted to take.
fn plan_rows(table: &mut Table) -> Outcome {
    let config = MmditConfig::flux_dev();
    let lora = lora_sizes(&config, &TARGETS, 4);
    for (name, form) in [
        ("nf4", WeightForm::Nf4 { double_quant: true }),
        ("bf16", WeightForm::Half),
    ] {
        for b in [1, 2, 4] {
            for recompute in [Recompute::Everything, Recompute::Nothing] {
                let options = EngineOptions {
                    t: Half::Bf16,
                    form,
                };
                let request = request(&config, options, &lora, b, recompute);
                let planned = plan(&request, Rates::H100)?;
                let parts: Map<String, Value> = planned
                    .parts
                    .iter()
                    .map(|(part, bytes)| ((*part).to_owned(), json!(bytes)))
                    .collect();
                let by_kind: Map<String, Value> = Work::ALL
                    .iter()
                    .zip(planned.micro_step)
                    .map(|(work, tally)| {
                        let row = json!({
                            "s": tally.seconds,
                            "launches": tally.launches,
                            "tflop": tally.flops / 1e12,
                            "gbyte": tally.bytes / 1e9,
                        });
                        (format!("{work:?}"), row)
                    })
                    .collect();
                table.row(
                    &format!("plan_{name}_b{b}_{recompute:?}"),
                    json!({
                        "gigabytes": planned.total_bytes() as f64 / 1e9,
                        "micro_step_s": planned.micro_step_s(),
                        "parts": parts,
                        "by_kind": by_kind,
                    }),
                );
            }
        }
    }
    Ok(())
}

fn shape(b: usize, pixels: usize) -> Shape {
    Shape {
        b,
        text: TEXT,
        latent_cells: [pixels / 8, pixels / 8],
    }
}

fn request(
    config: &MmditConfig,
    options: EngineOptions,
    lora: &[LoraSize],
    b: usize,
    recompute: Recompute,
) -> PlanRequest {
    PlanRequest {
        config: config.clone(),
        options,
        lora: lora.to_vec(),
        shape: shape(b, 512),
        training: TrainingOptions {
            recompute,
            optimizer: OptimizerKind::AdamW8bit {
                min_8bit_size: 4096,
            },
            adamw: AdamWConfig {
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.01,
            },
            max_grad_norm: 1.0,
        },
    }
}

/// How many blocks are computed again so that four images a step fit into a card of 24 GB, if any number will do.
fn within_24_gb(
    config: &MmditConfig,
    options: EngineOptions,
    lora: &[LoraSize],
) -> Outcome<Option<Recompute>> {
    /// A card of 24 GB, less what the driver takes.
    const LIMIT_BYTES: usize = 23_500_000_000;
    let request = request(config, options, lora, 4, Recompute::Nothing);
    let fitting = fit(&request, LIMIT_BYTES, Rates::H100)?;
    Ok(fitting.map(|(recompute, _)| recompute))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn predictions_need_no_card() {
        let mut lines = 0;
        let rows = measure(&PREDICTED, &[], &mut |_, _| lines += 1).expect("no card is asked for");
        assert_eq!((rows.len(), lines), (12, 12));
        let bytes = rows["plan_nf4_b1_Everything"]["gigabytes"].as_f64();
        assert!(bytes.is_some_and(|bytes| bytes < 8.0), "{rows:?}");
    }

    #[test]
    fn a_line_that_fails_is_said_and_the_next_one_follows() {
        let mut told = Vec::new();
        let mut tell = |name: &str, _: &Value| told.push(name.to_owned());
        let mut table = Table {
            rows: Map::new(),
            told: &mut tell,
        };
        table.guarded("first", |_| Err(CudaError::NoDevice));
        table.guarded("second", |table| {
            table.row("second", json!(1));
            Ok(())
        });
        assert_eq!(
            table.rows["first"]["error"],
            "the NVIDIA driver finds no device"
        );
        assert_eq!(told, ["first", "second"]);
    }
}
