//! All gradients against `mmdit` under automatic differentiation, and the optimiser against its formulas, without a GPU.

use super::*;
use crate::full_setting::{Gradients, SEED, Setting};
use crate::networks::{distance, weights};

const T: Half = Half::F16;

fn setting(label: &'static str, guidance_embeds: bool) -> Setting {
    Setting {
        label,
        config: MmditConfig {
            num_layers: 2,
            guidance_embeds,
            ..MmditConfig::tiny()
        },
        shape: Shape {
            b: 3,
            text: 3,
            latent_cells: [4, 6],
        },
    }
}

fn guided() -> Setting {
    setting("with guidance", true)
}

fn plain() -> Setting {
    setting("without guidance", false)
}

/// A decay and a bound of the norm that are felt in a few steps.
fn options(setting: &Setting) -> FullOptions {
    FullOptions {
        weight_decay: 0.1,
        max_grad_norm: 0.5,
        ..setting.options(T)
    }
}

fn trainer(setting: &Setting) -> FullTrainer {
    let weights = weights(&setting.config, T);
    let mut trainer = setting.trainer(Stream::host(), options(setting), &weights);
    trainer.use_graphs(false);
    trainer
}

fn all(tensors: &Gradients) -> Vec<f32> {
    tensors
        .iter()
        .flat_map(|(_, values)| values)
        .copied()
        .collect()
}

#[test]
fn loss_and_the_gradients_of_all_weights_are_those_of_the_portable_network() {
    for setting in [guided(), plain()] {
        let (loss, expected) = setting.expected(&weights(&setting.config, T));
        let (found_loss, found) = setting.gradients(&mut trainer(&setting), SEED);
        assert!(
            (found_loss / loss - 1.0).abs() < 2e-3,
            "{found_loss} {loss} {}",
            setting.label
        );
        let largest = all(&expected)
            .iter()
            .fold(0.0f32, |most, v| most.max(v.abs()));
        for ((spec, found), (other, expected)) in found.iter().zip(&expected) {
            assert_eq!(spec, other);
            // A key's bias moves all scores of a query alike: its gradient is nothing but rounding.
            if expected.iter().all(|v| v.abs() < 1e-5 * largest) {
                continue;
            }
            let off = distance(found, expected);
            assert!(
                off < 2e-2,
                "{} {} is off by {off}",
                spec.name,
                setting.label
            );
        }
        let off = distance(&all(&found), &all(&expected));
        assert!(off < 4e-3, "all together are off by {off}");
    }
}

#[test]
fn a_step_is_pretrains_arithmetic_on_the_same_gradients() {
    let setting = plain();
    let mut trainer = trainer(&setting);
    let o = options(&setting);
    let mut values = all(&trainer.weights(false).expect("they are there"));
    let (mut first, mut second) = (vec![0.0f32; values.len()], vec![0.0f32; values.len()]);
    let mut averaged = values.clone();
    for step in 0..3u64 {
        let (_, gradients) = setting.gradients(&mut trainer, SEED + step);
        let gradients = all(&gradients);
        let rate = 1e-2 / (step + 1) as f64;
        setting.step(&mut trainer, SEED + step, rate);
        let norm = gradients.iter().map(|g| g * g).sum::<f32>().sqrt();
        assert!(norm > o.max_grad_norm as f32, "{norm} is not clipped");
        let report = trainer.report().expect("it ran");
        assert!((report.grad_norm / norm - 1.0).abs() < 1e-4);
        assert!(report.loss.is_finite());
        let shrink = (o.max_grad_norm as f32 / (norm + 1e-6)).min(1.0);
        let count = step as i32 + 1;
        let decay = o.ema_decay.min((step + 1) as f64 / (step + 10) as f64);
        for i in 0..values.len() {
            let g = gradients[i] * shrink;
            first[i] = first[i] * o.beta1 as f32 + g * (1.0 - o.beta1) as f32;
            second[i] = second[i] * o.beta2 as f32 + g * g * (1.0 - o.beta2) as f32;
            let corrected = second[i] / (1.0 - o.beta2.powi(count)) as f32;
            let root = corrected.sqrt() + o.epsilon as f32;
            let update = first[i] / root * (rate / (1.0 - o.beta1.powi(count))) as f32;
            values[i] = values[i] * (1.0 - rate * o.weight_decay) as f32 - update;
            averaged[i] = averaged[i] * decay as f32 + values[i] * (1.0 - decay) as f32;
        }
        let found = all(&trainer.weights(false).expect("they are there"));
        let off = distance(&found, &values);
        assert!(off < 1e-5, "weights after step {step} are off by {off}");
        let found = all(&trainer.weights(true).expect("they are there"));
        let off = distance(&found, &averaged);
        assert!(off < 1e-5, "the average after step {step} is off by {off}");
        // The next step starts where the device is: differences of rounding do not add up.
        values = all(&trainer.weights(false).expect("they are there"));
    }
}

#[test]
fn thirty_steps_on_one_batch_make_the_loss_fall() {
    let setting = plain();
    let mut trainer = trainer(&setting);
    let mut losses = Vec::new();
    for _ in 0..30 {
        setting.step(&mut trainer, SEED, 3e-3);
        losses.push(trainer.report().expect("it ran").loss);
    }
    assert!(losses[29] < 0.8 * losses[0], "{losses:?}");
}

#[test]
fn a_restored_run_goes_on_to_the_same_bits() {
    let setting = guided();
    let mut straight = trainer(&setting);
    let step = |trainer: &mut FullTrainer| {
        setting.step(trainer, SEED + trainer.num_steps(), 1e-2);
    };
    step(&mut straight);
    let kept = straight.state().expect("it is there");
    step(&mut straight);
    let mut resumed = trainer(&setting);
    resumed.restore(&kept).expect("it is of this model");
    step(&mut resumed);
    assert!(resumed.state().expect("it is there") == straight.state().expect("it is there"));
    let short = FullState {
        first: vec![0.0],
        ..kept
    };
    let error = resumed.restore(&short).expect_err("one number");
    assert!(error.to_string().contains("`first`"), "{error}");
}
