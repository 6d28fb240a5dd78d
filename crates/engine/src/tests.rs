//! The two engines on one model: velocities, steps, and a state that goes out and in again.

use std::collections::BTreeMap;

use flow_matching::TrainingPoint;
use lora::LoraModule;
use mmdit::{BaseWeights, LoadOptions, Mmdit, MmditConfig};
use quant::{AdamWConfig, OptimizerKind};
use tensor::device::{cpu, training};
use tensor::{Precision, Weights};

use super::*;

fn numbers(seed: usize, count: usize) -> Vec<f32> {
    let mut state = seed as u32 * 7919 + 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn weights() -> Weights {
    let parameters = MmditConfig::tiny().parameters().into_iter().enumerate();
    Weights::from_values(parameters.map(|(seed, spec)| {
        let inputs = spec.shape.last().copied().unwrap_or(1) as f32;
        let values = numbers(seed, spec.num_elements() as usize);
        (
            spec,
            values.iter().map(|v| v * (3.0 / inputs).sqrt()).collect(),
        )
    }))
}

fn mmdit(device: Device) -> Mmdit {
    let options = LoadOptions {
        device,
        precision: Precision::F32,
        base: BaseWeights::Plain,
    };
    Mmdit::load(&weights(), MmditConfig::tiny(), &options).expect("all are there")
}

fn by_hand() -> cpu::Cpu {
    let transformer =
        engine_cpu::Transformer::load(&weights(), MmditConfig::tiny(), BaseWeights::Plain)
            .expect("all are there");
    cpu::Cpu::new(transformer)
}

fn lora() -> TrainableLora {
    let layers = MmditConfig::tiny().linears().into_iter().enumerate();
    let modules: BTreeMap<String, LoraModule> = layers
        .filter(|(_, layer)| layer.path.contains("attn"))
        .map(|(seed, layer)| {
            let (i, o) = (layer.in_features, layer.out_features);
            let module =
                LoraModule::new(3.0, i, o, numbers(seed, 2 * i), numbers(seed + 90, 2 * o));
            (layer.path, module)
        })
        .collect();
    TrainableLora::from_modules(modules)
}

fn optimizer(lora: &TrainableLora) -> LoraOptimizer {
    let config = AdamWConfig {
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 1e-2,
    };
    let kind = OptimizerKind::AdamW8bit { min_8bit_size: 1 };
    LoraOptimizer::new(kind, config, 1.0, LossScaler::fixed(), lora)
}

fn batch(seed: usize) -> MicroBatch {
    let config = MmditConfig::tiny();
    let point = |sigma: f32, weight| TrainingPoint {
        index: 0,
        sigma,
        timestep: 1000.0 * sigma,
        weight,
    };
    MicroBatch {
        shape: [2, 2, 4, 6],
        model_input: numbers(seed, 96),
        noise: numbers(seed + 1, 96),
        points: vec![point(0.25, 1.0), point(0.875, 0.5)],
        text_shape: [3, config.joint_attention_dim],
        prompt_embeds: numbers(seed + 2, 2 * 3 * config.joint_attention_dim),
        pooled: numbers(seed + 3, 2 * config.pooled_projection_dim),
    }
}

fn both() -> [Box<dyn Gradients>; 2] {
    let portable = portable::PortableGradients::new(mmdit(training(&cpu())));
    [Box::new(portable), Box::new(by_hand())]
}

/// Relative to the norm.
fn difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
    norm(&mut found.iter().zip(expected).map(|(f, e)| f - e))
        / norm(&mut expected.iter().copied()).max(f32::MIN_POSITIVE)
}

#[test]
fn engines_agree_on_loss_and_gradients() {
    let lora = lora();
    let [portable, cpu] = both().map(|mut engine| {
        let micro = engine.micro_step(&lora, &batch(500), 2.0, 0.25);
        micro.expect("no card")
    });
    assert!(
        (portable.loss - cpu.loss).abs() < 1e-5 * portable.loss,
        "{portable:?} {cpu:?}"
    );
    for ((name, expected), found) in lora
        .names()
        .iter()
        .zip(&portable.gradients)
        .zip(&cpu.gradients)
    {
        let difference = difference(found, expected);
        assert!(difference < 3e-5, "{name}: {difference}");
    }
}

#[test]
fn engines_agree_on_the_velocity_under_a_lora() {
    let config = MmditConfig::tiny();
    let batch = batch(600);
    let [noisy, _] = batch.noisy_and_target();
    let positions = batch.positions();
    let input = Input {
        hidden_states: &noisy,
        encoder_hidden_states: &batch.prompt_embeds,
        pooled_projections: &batch.pooled,
        timestep: &[0.3, 0.9],
        guidance: Some(&[1.0, 3.5]),
        positions: &positions,
    };
    let engines: [Box<dyn Engine>; 2] = [
        Box::new(portable::Portable::new(mmdit(cpu()))),
        Box::new(by_hand()),
    ];
    let [expected, found] = engines.map(|mut engine| {
        assert_eq!(engine.config(), &config);
        let plain = engine.velocity(&input).expect("no card");
        engine.set_lora(&lora().factors()).expect("no card");
        let adapted = engine.velocity(&input).expect("no card");
        assert!(difference(&adapted, &plain) > 1e-3);
        adapted
    });
    assert!(difference(&found, &expected) < 1e-5);
}

/// A network of the engine `cuda` on a stream without a card: nothing is computed, all sizes and names are the real ones.
fn without_card() -> engine_cuda::model::Engine {
    use engine_cuda::model::{Engine, EngineOptions, NormalWeights, WeightForm};
    let options = EngineOptions {
        t: engine_cuda::Half::Bf16,
        form: WeightForm::Half,
    };
    let weights = NormalWeights { std: 0.02 };
    let stream = engine_cuda::Stream::dry();
    let engine = Engine::load(stream, &MmditConfig::tiny(), &weights, options);
    engine.expect("a dry run has memory enough")
}

/// Training on [`without_card`].
fn on_no_card(accumulation: usize) -> cuda::CudaTraining {
    let config = MmditConfig::tiny();
    let (lora, shape) = (lora(), batch(1).shape);
    let optimizer = optimizer(&lora);
    let request = TrainingRequest {
        config: &config,
        precision: Precision::Bf16,
        base: BaseWeights::Plain,
        lora: &lora,
        optimizer: &optimizer,
        workload: Workload {
            micro_batch: shape[0],
            accumulation,
            text_tokens: 3,
            latent_cells: [shape[2], shape[3]],
            at_once: None,
        },
    };
    let plan = request.choose(1 << 30).expect("it is tiny");
    assert_eq!((plan.fused, plan.recomputed_blocks), (accumulation, 0));
    let training = cuda::CudaTraining::new(without_card(), &lora, optimizer, plan);
    training.expect("attention is trained")
}

#[test]
fn cuda_takes_as_much_memory_as_its_plan_says() {
    let mut engine = on_no_card(2);
    let [mut both, second] = [batch(1), batch(2)];
    both.shape[0] *= 2;
    both.model_input.extend(second.model_input);
    both.noise.extend(second.noise);
    both.points.extend(second.points);
    both.prompt_embeds.extend(second.prompt_embeds);
    both.pooled.extend(second.pooled);
    let step = engine.step(&[both], 1.0, 1e-3);
    step.expect("nothing fails");
    let notes = engine.notes().join("\n");
    assert!(notes.contains("2 micro-batch(es) at once"), "{notes}");
    assert!(notes.contains("0.0 %)"), "{notes}");
    let bytes = engine.measured_bytes.expect("a step was taken");
    let predicted = engine.plan.total_bytes();
    assert!(
        bytes.abs_diff(predicted) < 1 << 10,
        "{bytes} of {predicted}: {notes}"
    );
}

#[test]
fn cudas_state_is_named_and_sized_as_the_host_optimisers() {
    let mut engine = on_no_card(1);
    let mut state = engine.export().expect("nothing fails");
    let expected = HostEngine::new(Box::new(by_hand()), lora(), optimizer(&lora())).export();
    let expected = expected.expect("no card");
    let names = |state: &TrainingState| -> Vec<String> {
        let parts = state.optimizer.iter();
        parts.map(|part| part.name.clone()).collect()
    };
    assert_eq!(names(&state), names(&expected));
    assert_eq!(
        state.lora.iter().map(Vec::len).collect::<Vec<_>>(),
        expected.lora.iter().map(Vec::len).collect::<Vec<_>>()
    );
    state.num_steps = 7;
    engine.import(state.clone()).expect("its own state");
    assert_eq!(engine.num_steps(), 7);
    state.optimizer.pop();
    assert!(engine.import(state).is_err());
    assert_eq!(engine.num_steps(), 7);
}

#[test]
fn a_state_that_goes_out_and_in_again_continues_to_the_same_bits() {
    for gradients in both() {
        let lora = lora();
        let mut engine = HostEngine::new(gradients, lora.clone(), optimizer(&lora));
        let name = engine.name();
        let step = |engine: &mut dyn TrainingEngine, seed| {
            let step = engine.step(&[batch(seed), batch(seed + 50)], 1.0, 1e-2);
            step.expect("no card")
        };
        step(&mut engine, 100);
        let middle = engine.export().expect("no card");
        let report = step(&mut engine, 200);
        let end = engine.export().expect("no card");
        assert_ne!(end.lora, middle.lora);
        engine.import(middle).expect("its own state");
        assert_eq!(engine.num_steps(), 1);
        assert_eq!(step(&mut engine, 200), report);
        assert!(engine.export().expect("no card") == end, "{name}");
    }
}

fn launches(engine: &engine_cuda::model::Engine) -> u64 {
    let tallies = engine.stream().tallies();
    tallies.iter().map(|tally| tally.launches).sum()
}

/// The error says which call failed and what to do, and ends a stage with exit code 1.
fn assert_says_what_failed(error: &RunError) {
    let RunError::Card(CudaError::Driver { call, code }) = error else {
        panic!("{error:?}");
    };
    assert!(!call.is_empty() && code == "CUDA_ERROR_LAUNCH_FAILED");
    assert_eq!(error.kind().exit_code(), 1);
    assert!(error.help().is_some_and(|help| help.contains("Xid")));
}

#[test]
fn a_card_that_is_lost_in_a_step_is_an_error_wherever_it_happens() {
    let step = |engine: &mut cuda::CudaTraining| engine.step(&[batch(1), batch(2)], 1.0, 1e-3);
    let mut whole = on_no_card(2);
    let before = launches(&whole.engine);
    step(&mut whole).expect("nothing fails");
    let count = launches(&whole.engine) - before;
    assert!(count > 20, "{count}");
    for failing in [0, 1, count / 3, count / 2, count - 1] {
        let mut engine = on_no_card(2);
        engine.engine.stream().fail_after(failing);
        let error = step(&mut engine).expect_err("a launch fails");
        assert_says_what_failed(&error);
        assert_eq!(engine.num_steps(), 0);
        // What is saved before the end says so too, in place of values that nobody computed.
        assert!(step(&mut engine).is_err());
    }
    let mut engine = on_no_card(2);
    engine.engine.stream().fail_after(count);
    step(&mut engine).expect("the failure comes after it");
}

#[test]
fn a_card_that_is_lost_while_drawing_is_an_error() {
    let batch = batch(600);
    let positions = batch.positions();
    let mut drawing = cuda::Cuda {
        engine: without_card(),
    };
    drawing.engine.stream().fail_after(7);
    let velocity = drawing.velocity(&Input {
        hidden_states: &batch.noisy_and_target()[0],
        encoder_hidden_states: &batch.prompt_embeds,
        pooled_projections: &batch.pooled,
        timestep: &[0.3, 0.9],
        guidance: Some(&[1.0, 3.5]),
        positions: &positions,
    });
    assert_says_what_failed(&velocity.expect_err("a launch fails"));
    let error = drawing.set_lora(&lora().factors());
    assert_says_what_failed(&error.expect_err("the card is lost"));
}
