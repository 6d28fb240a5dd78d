//! Training for minutes at FLUX.1-dev's shapes, to see that it takes no more memory at the end than at the start.

use std::time::{Duration, Instant};

use mmdit::MmditConfig;
use serde_json::{Value, json};

use super::network::Batch;
use super::{Outcome, TARGETS, open, request, within_24_gb};
use crate::half_type::Half;
use crate::model::{Engine, EngineOptions, NormalWeights, WeightForm};
use crate::plan::{PlanRequest, lora_sizes, untrained};
use crate::stream::Stream;

/// Steps before memory counts: libraries are loaded and work is recorded in these.
const WARM_STEPS: usize = 10;

/// From one word of how it goes to the next.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// Trains for `duration` on 4 images a step with an NF4 base within 24 GB, and says what memory did. `tell` hears the same
/// of the part that is behind every minute, so that a run that is cut off has said something.
///
/// # Errors
///
/// If there is no card, or it fails.
pub fn soak(duration: Duration, tell: &mut dyn FnMut(&Value)) -> Outcome<Value> {
    let config = MmditConfig::flux_dev();
    let options = EngineOptions {
        t: Half::Bf16,
        form: WeightForm::Nf4 { double_quant: true },
    };
    let lora = lora_sizes(&config, &TARGETS, 4);
    let recompute = within_24_gb(&config, options, &lora)?;
    let recompute = recompute.expect("an NF4 base leaves room for four images");
    let asked = request(&config, options, &lora, 4, recompute);
    train_for(open()?, &asked, duration, tell)
}

/// Bytes of the device in use: by this process alone, if it is alone there.
fn in_use(stream: &Stream) -> Outcome<usize> {
    let (free, total) = stream.memory()?;
    Ok(total - free)
}

fn train_for(
    stream: Stream,
    asked: &PlanRequest,
    duration: Duration,
    tell: &mut dyn FnMut(&Value),
) -> Outcome<Value> {
    let mut engine = Engine::load(
        stream,
        &asked.config,
        &NormalWeights { std: 0.02 },
        asked.options,
    )?;
    engine.attach_lora(&untrained(&asked.config, &asked.lora, || 0.01), true)?;
    engine.start_training(asked.training)?;
    let batch = Batch::new(&asked.config, asked.shape);
    let step = |engine: &mut Engine| -> Outcome {
        engine.micro_step(&batch.micro(), 1.0)?;
        engine.optimizer_step(1e-4, 1.0)?;
        Ok(())
    };
    for _ in 0..WARM_STEPS {
        step(&mut engine)?;
    }
    let before = in_use(engine.stream())?;
    let start = Instant::now();
    let row = |steps: u64, most: usize, after: usize| {
        let seconds = start.elapsed().as_secs_f64();
        json!({
            "what": "training, 4 images a step, NF4 within 24 GB; device memory in use after each step",
            "seconds": seconds,
            "steps": steps,
            "step_s": seconds / steps as f64,
            "bytes_before": before,
            "bytes_after": after,
            "bytes_most": most,
            "growth_bytes": after as i64 - before as i64,
        })
    };
    let (mut steps, mut most, mut told) = (0_u64, before, Duration::ZERO);
    // At least once, and memory is looked at after every step: it costs microseconds.
    while steps == 0 || start.elapsed() < duration {
        step(&mut engine)?;
        steps += 1;
        let now = in_use(engine.stream())?;
        most = most.max(now);
        if start.elapsed() >= told + TELL_EVERY {
            told += TELL_EVERY;
            tell(&row(steps, most, now));
        }
    }
    Ok(row(steps, most, in_use(engine.stream())?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Recompute;

    #[test]
    fn even_no_time_at_all_takes_a_step() {
        let config = MmditConfig::tiny();
        let options = EngineOptions {
            t: Half::Bf16,
            form: WeightForm::Half,
        };
        let lora = lora_sizes(&config, &["to_q"], 2);
        let mut asked = request(&config, options, &lora, 1, Recompute::Everything);
        asked.shape.latent_cells = [4, 4];
        asked.shape.text = 3;
        let mut tell = |row: &Value| panic!("not a minute is over: {row}");
        let row = train_for(Stream::dry(), &asked, Duration::ZERO, &mut tell).expect("a dry run");
        assert_eq!(
            (&row["steps"], &row["growth_bytes"]),
            (&json!(1), &json!(0))
        );
    }
}
