//! The schedule without a GPU: kernels in plain Rust, results against `mmdit`.

use mmdit::{BaseWeights, Mmdit, MmditConfig};
use tensor::device::{cpu, training};
use tensor::{from_f32, to_f32};

use super::*;
use crate::half_type::Half;
use crate::networks::{
    ALL_LINEAR, Batch, CONDITIONS, LOSS_SCALE, adapters, distance, numbers, reference,
    reference_step, reference_velocity, training_options, unscaled_gradients, weights,
};
use crate::plan::lora_sizes;
use crate::stream::Stream;

const T: Half = Half::F16;

const SHAPE: Shape = Shape {
    b: 2,
    text: 3,
    latent_cells: [4, 6],
};

fn config() -> MmditConfig {
    MmditConfig {
        num_layers: 2,
        ..MmditConfig::tiny()
    }
}

fn portable() -> Mmdit {
    let weights = weights(&config(), T);
    reference(&config(), &weights, &training(&cpu()), BaseWeights::Plain)
}

fn engine() -> Engine {
    let options = EngineOptions {
        t: T,
        form: WeightForm::Half,
    };
    Engine::load(Stream::host(), &config(), &weights(&config(), T), options).expect("it loads")
}

fn factors(targets: &[&str]) -> Vec<LoraFactors> {
    crate::networks::factors(&config(), &lora_sizes(&config(), targets, 3))
}

fn batch() -> Batch {
    Batch::new(&config(), SHAPE)
}

fn start(engine: &mut Engine, recompute: Recompute) {
    let options = training_options(recompute);
    engine.start_training(options).expect("it starts");
    engine.use_graphs(false);
}

#[test]
fn loss_and_every_gradient_are_those_of_the_portable_network() {
    let (model, batch) = (portable(), batch());
    for targets in [
        ALL_LINEAR.as_slice(),
        &["to_v"],
        &["ff.net.2", "to_q", "proj_mlp"],
    ] {
        let factors = factors(targets);
        let (loss, expected) = reference_step(&model, &batch, &factors);
        let mut engine = engine();
        engine.attach_lora(&factors, true).expect("it fits");
        start(&mut engine, Recompute::Nothing);
        engine
            .micro_step(&batch.micro(), LOSS_SCALE)
            .expect("it runs");
        let (found_loss, _) = engine.loss_sum().expect("it is there");
        assert!(
            (found_loss / loss - 1.0).abs() < 5e-3,
            "{found_loss} {loss}"
        );
        let found = unscaled_gradients(&engine);
        assert_eq!(found.len(), expected.len());
        for (name, found) in &found {
            let expected = &expected[name];
            let off = distance(found, expected);
            assert!(off < 2e-2, "{name} is off by {off}");
        }
    }
}

#[test]
fn recomputed_blocks_and_samples_one_by_one_give_the_same_gradients() {
    let factors = factors(&ALL_LINEAR);
    let mut engine = engine();
    engine.attach_lora(&factors, true).expect("it fits");
    let batch = batch();
    let mut all = Vec::new();
    for recompute in [
        Recompute::Nothing,
        Recompute::Everything,
        Recompute::First(3),
    ] {
        start(&mut engine, recompute);
        engine
            .micro_step(&batch.micro(), LOSS_SCALE)
            .expect("it runs");
        all.push(unscaled_gradients(&engine));
    }
    assert!(all[0] == all[1] && all[0] == all[2], "not the same bits");
    start(&mut engine, Recompute::Everything);
    for i in 0..2 {
        engine
            .micro_step(&batch.sample(i).micro(), LOSS_SCALE / 2.0)
            .expect("it runs");
    }
    for ((name, found), (_, expected)) in unscaled_gradients(&engine).iter().zip(&all[0]) {
        let off = distance(found, expected);
        assert!(off < 1e-2, "{name} is off by {off}");
    }
}

#[test]
fn the_velocity_and_a_guided_step_are_those_of_the_portable_network() {
    let factors = factors(&ALL_LINEAR);
    let (config, model, batch) = (config(), portable(), batch());
    let [noisy, _] = batch.tokens(&config);
    let tokens = from_f32(noisy.clone(), [SHAPE.b, SHAPE.image(), 8], model.device());
    let adapters = adapters(&model, &factors);
    let expected = reference_velocity(&model, &batch, tokens, &batch.sigmas, &adapters);
    let mut engine = engine();
    engine.attach_lora(&factors, false).expect("it fits");
    let input = VelocityInput {
        shape: SHAPE,
        tokens: &noisy,
        text: &batch.text,
        pooled: &batch.pooled,
        times: &batch.sigmas,
        guidance: batch.guidance.as_deref(),
    };
    let found = engine.velocity(&input).expect("it runs");
    let off = distance(&found, &to_f32(&expected));
    assert!(off < 5e-3, "{off}");

    // Two velocities, put together by hand, against one guided step.
    let other_text = numbers(70, batch.text.len(), 1.0);
    let velocity = |engine: &mut Engine, text: &[f32]| {
        let input = VelocityInput {
            text,
            times: &[0.5; 2],
            guidance: Some(&[2.0; 2]),
            ..input
        };
        engine.velocity(&input).expect("it runs")
    };
    let plus = velocity(&mut engine, &batch.text);
    let minus = velocity(&mut engine, &other_text);
    let expected: Vec<f32> = (0..noisy.len())
        .map(|i| noisy[i] - 0.5 * (minus[i] + 3.0 * (plus[i] - minus[i])))
        .collect();
    let sampler = SamplerInput {
        shape: SHAPE,
        tokens: &noisy,
        sigmas: &[0.5, 0.0],
        times: &[0.5],
        text: &batch.text,
        pooled: &batch.pooled,
        negative: Some((&other_text, &batch.pooled, 3.0)),
        guidance: Some(2.0),
    };
    engine.start_sampling(&sampler).expect("it fits");
    assert!(!engine.sample_step().expect("it runs"));
    let found = engine.samples().expect("they are there");
    let off = distance(&found, &expected);
    assert!(off < 1e-3, "{off}");
}

#[test]
fn factors_on_modulations_and_their_embedders_have_the_portable_networks_gradients() {
    let every: Vec<&str> = ALL_LINEAR.iter().chain(&CONDITIONS).copied().collect();
    let (model, batch) = (portable(), batch());
    // Modulations alone do not go on to the embedders; one layer alone is reached through all blocks.
    for targets in [
        every.as_slice(),
        &CONDITIONS[..4],
        &["norm1.linear"],
        &["timestep_embedder.linear_1"],
        &["to_q", "norm_out.linear"],
    ] {
        let factors = factors(targets);
        let (_, expected) = reference_step(&model, &batch, &factors);
        let mut engine = engine();
        engine.attach_lora(&factors, true).expect("it fits");
        let mut first = None;
        for recompute in [Recompute::Nothing, Recompute::Everything] {
            start(&mut engine, recompute);
            engine
                .micro_step(&batch.micro(), LOSS_SCALE)
                .expect("it runs");
            let found = unscaled_gradients(&engine);
            assert_eq!(found.len(), expected.len());
            for (name, found) in &found {
                let off = distance(found, &expected[name]);
                assert!(off < 2e-2, "{name} of {targets:?} is off by {off}");
            }
            let before = first.get_or_insert_with(|| found.clone());
            assert!(*before == found, "not the same bits");
        }
    }
}
