//! `spritelora plan`: what training a recipe takes on an NVIDIA card, before anything is loaded.

use std::str::FromStr;

use console::{human_seconds, print_document, print_line};
use engine::plan::{RESERVED_BYTES, card, gigabytes};
use pipeline::{Failure, Recipe};
use serde_json::{Map, Value, json};
use train::planning::{PlannedBase, plan};

use crate::cli::PlanOptions;

/// Memory of the card that is planned for where there is none: an H100.
const USUAL_BYTES: usize = 80_000_000_000;

/// A number of bytes, e.g. `24GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub usize);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.len()
            - text
                .trim_start_matches(|c: char| c.is_ascii_digit() || c == '.')
                .len();
        let (number, unit) = text.split_at(digits);
        let factor = match unit.trim() {
            "" | "B" => 1.0,
            "MB" => 1e6,
            "MiB" => f64::from(1 << 20),
            "GB" => 1e9,
            "GiB" => f64::from(1 << 30),
            _ => f64::NAN,
        };
        let bytes = number.parse::<f64>().unwrap_or(f64::NAN) * factor;
        if bytes.is_finite() && bytes >= 1.0 {
            Ok(Self(bytes as usize))
        } else {
            Err("expected a size such as 24GiB, 24GB or a number of bytes".to_owned())
        }
    }
}

/// Plans and prints; gives the exit code.
pub fn run(options: &PlanOptions) -> u8 {
    match document(options) {
        Ok(document) => {
            if options.json {
                print_document(&document);
            } else {
                tell(&document);
            }
            0
        }
        Err(failure) => {
            if options.json {
                print_document(&json!({ "error": failure.to_json() }));
            }
            console::tell(&failure);
            failure.kind().exit_code()
        }
    }
}

fn document(options: &PlanOptions) -> Result<Value, Failure> {
    let recipe = Recipe::load(&options.recipe, &options.set)?;
    let base = if options.flux_dev {
        PlannedBase::flux_dev()
    } else {
        PlannedBase::of(&recipe).map_err(|error| {
            Failure::from(error)
                .with_help("--flux-dev plans for the sizes of FLUX.1-dev, without a base")
        })?
    };
    let (name, memory) = match options.gpu_memory {
        Some(Bytes(bytes)) => (None, bytes),
        None => match card(0) {
            Some((name, bytes)) => (Some(name), bytes),
            None => (None, USUAL_BYTES),
        },
    };
    let plan = plan(&recipe, &base, memory.saturating_sub(RESERVED_BYTES))?;
    let parts: Map<String, Value> = plan
        .parts
        .iter()
        .map(|(part, bytes)| ((*part).to_owned(), json!(bytes)))
        .collect();
    Ok(json!({
        "command": "plan",
        "card": name,
        "gpu_memory_bytes": memory,
        "kept_free_bytes": RESERVED_BYTES,
        "images_per_step": images_per_step(recipe.train.micro_batch, recipe.train.accumulation),
        "micro_batches_at_once": plan.fused,
        "accumulation": recipe.train.accumulation,
        "recomputed_blocks": plan.recomputed_blocks,
        "blocks": plan.num_blocks,
        "peak_bytes": plan.total_bytes(),
        "parts": parts,
        "step_s": plan.step_s,
        "steps": recipe.train.steps,
        "time_is_for": "one H100",
    }))
}

/// Images of one optimiser step. A recipe bounds neither number, so their product is wider than they are.
fn images_per_step(micro_batch: u32, accumulation: u32) -> u64 {
    u64::from(micro_batch) * u64::from(accumulation)
}

fn tell(document: &Value) {
    let number = |key: &str| document[key].as_u64().unwrap_or_default();
    let bytes = |value: &Value| gigabytes(value.as_u64().unwrap_or_default() as usize);
    let of = match document["card"].as_str() {
        Some(card) => format!(" of {card}'s"),
        None => " of".to_owned(),
    };
    print_line(&format!(
        "peak memory: {}{of} {} ({} are left to the driver)",
        bytes(&document["peak_bytes"]),
        bytes(&document["gpu_memory_bytes"]),
        bytes(&document["kept_free_bytes"]),
    ));
    for (part, value) in document["parts"].as_object().into_iter().flatten() {
        print_line(&format!("  {part}: {}", bytes(value)));
    }
    print_line(&format!(
        "{} of {} micro-batches at once, {} of {} blocks recomputed",
        number("micro_batches_at_once"),
        number("accumulation"),
        number("recomputed_blocks"),
        number("blocks"),
    ));
    let step_s = document["step_s"].as_f64().unwrap_or_default();
    print_line(&format!(
        "step of {} images: {step_s:.3} s on one H100; {} steps: {}",
        number("images_per_step"),
        number("steps"),
        human_seconds(step_s * number("steps") as f64),
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_has_a_unit_or_is_in_bytes() {
        for (text, expected) in [
            ("24GiB", 24 << 30),
            ("24GB", 24_000_000_000),
            ("1.5GiB", 3 << 29),
            ("7", 7),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(expected)));
        }
        for text in ["", "GiB", "24TB", "-1GB", "0", "24 apples"] {
            assert!(text.parse::<Bytes>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn images_of_a_step_are_counted_beyond_32_bits() {
        assert_eq!(images_per_step(2, 3), 6);
        assert_eq!(images_per_step(1 << 31, 6), 6 << 31);
    }

    #[test]
    fn the_flux_recipe_is_planned_on_a_machine_with_neither_card_nor_base() {
        let recipe = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../configs/flux-dev-pixel-art.toml"
        );
        let mut options = PlanOptions {
            recipe: recipe.into(),
            set: vec![],
            gpu_memory: Some(Bytes(24 << 30)),
            flux_dev: true,
            json: true,
        };
        let found = document(&options).expect("it fits");
        assert!(found["peak_bytes"].as_u64() < Some(24 << 30), "{found}");
        assert_eq!(found["images_per_step"], 4);
        options.gpu_memory = Some(Bytes(2 << 30));
        let failure = document(&options).expect_err("weights alone are more");
        assert_eq!(failure.kind().exit_code(), 2);
    }
}
