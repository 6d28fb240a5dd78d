//! From the start of a program to its first picture: another process of this program is started, and timed from outside.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use mmdit::MmditConfig;
use serde_json::{Value, json};

use super::network::Batch;
use super::{Outcome, open, shape};
use crate::half_type::Half;
use crate::model::{Engine, EngineOptions, NormalWeights, SamplerInput, WeightForm};
use crate::stream::Stream;

/// Denoising steps of the picture.
const STEPS: usize = 28;

/// Draws the latents of one picture of 512 pixels at FLUX.1-dev's shapes in bf16 and says what its parts took. Weights are
/// made on the card; there are no text encoders and no VAE.
///
/// # Errors
///
/// If there is no card, or it fails.
pub fn draw_first() -> Outcome<Value> {
    let start = Instant::now();
    let stream = open()?;
    let device_s = start.elapsed().as_secs_f64();
    let mut drawn = draw(stream, &MmditConfig::flux_dev(), 512)?;
    drawn["device_s"] = json!(device_s);
    Ok(drawn)
}

fn draw(stream: Stream, config: &MmditConfig, pixels: usize) -> Outcome<Value> {
    let start = Instant::now();
    let options = EngineOptions {
        t: Half::Bf16,
        form: WeightForm::Half,
    };
    let mut engine = Engine::load(stream, config, &NormalWeights { std: 0.02 }, options)?;
    engine.stream().synchronize()?;
    let load_s = start.elapsed().as_secs_f64();
    let batch = Batch::new(config, shape(1, pixels));
    let sigmas: Vec<f32> = (0..=STEPS).map(|i| 1.0 - i as f32 / STEPS as f32).collect();
    let start = Instant::now();
    engine.start_sampling(&SamplerInput {
        shape: batch.shape,
        tokens: &batch.latents,
        sigmas: &sigmas,
        times: &sigmas[..STEPS],
        text: &batch.text,
        pooled: &batch.pooled,
        negative: None,
        guidance: config.guidance_embeds.then_some(3.5),
    })?;
    while engine.sample_step()? {}
    let latents = engine.samples()?;
    Ok(json!({
        "steps": STEPS,
        "latents": latents.len(),
        "load_s": load_s,
        "draw_s": start.elapsed().as_secs_f64(),
    }))
}

/// The row: two processes one after the other. The first leaves the kernels compiled, the second is what counts.
pub(super) fn row(again: &[&str]) -> Value {
    let mut row = match timed(again) {
        Ok((before_s, _)) => match timed(again) {
            Ok((s, parts)) => {
                json!({ "s": s, "with_kernels_as_found_s": before_s, "parts": parts })
            }
            Err(error) => json!({ "error": error }),
        },
        Err(error) => json!({ "error": error }),
    };
    row["what"] = json!(
        "process start to the latents of one 512 px picture, 28 steps, bf16, compiled kernels on disk, weights made on the \
         card and not read, no text encoders, no VAE"
    );
    row
}

/// Seconds from the start of this program with `again` to its line, and the line.
fn timed(again: &[&str]) -> Result<(f64, Value), String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let start = Instant::now();
    let mut process = Command::new(program)
        .args(again)
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| error.to_string())?;
    let mut line = String::new();
    let read = match process.stdout.take() {
        Some(stdout) => BufReader::new(stdout).read_line(&mut line),
        None => Ok(0),
    };
    let seconds = start.elapsed().as_secs_f64();
    let ended = process.wait().map_err(|error| error.to_string())?;
    read.map_err(|error| error.to_string())?;
    match serde_json::from_str(&line) {
        Ok(parts) if ended.success() => Ok((seconds, parts)),
        _ => Err(format!("the second process ended with {ended}: {line}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_steps_are_taken_to_the_latents() {
        let drawn = draw(Stream::dry(), &MmditConfig::tiny(), 32).expect("a dry run");
        // 4×4 cells are 4 tokens.
        assert_eq!(drawn["latents"], 4 * MmditConfig::tiny().in_channels);
    }

    #[test]
    fn a_program_that_does_not_draw_is_an_error_and_no_figure() {
        // This test program knows no such option.
        let row = row(&["--first-image"]);
        assert!(row["error"].is_string() && row["s"].is_null(), "{row}");
    }
}
