//! The whole model on random weights: what must hold whatever the weights are.

use tensor::device::{cpu, training};
use tensor::{Device, ParameterSpec, Precision, Weights, from_f32, to_f32};

use crate::{
    Adapter, Adapters, BaseWeights, LinearSpec, LoadOptions, Mmdit, MmditConfig, MmditError,
    MmditInput,
};

/// Numbers between −1 and 1 that differ from place to place.
fn numbers(seed: usize, count: usize) -> Vec<f32> {
    let mut state = seed as u32 * 7919 + 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Weights that keep activations near 1; `change` may alter each.
fn weights(mut change: impl FnMut(&ParameterSpec, &mut Vec<f32>)) -> Weights {
    let parameters = MmditConfig::tiny().parameters().into_iter().enumerate();
    Weights::from_values(parameters.map(|(seed, spec)| {
        let inputs = spec.shape.last().copied().unwrap_or(1) as f32;
        let mut values = numbers(seed, spec.num_elements() as usize);
        values
            .iter_mut()
            .for_each(|value| *value *= (3.0 / inputs).sqrt());
        change(&spec, &mut values);
        (spec, values)
    }))
}

fn load(weights: &Weights, device: &Device, base: BaseWeights) -> Mmdit {
    let options = LoadOptions {
        device: device.clone(),
        precision: Precision::F32,
        base,
    };
    Mmdit::load(weights, MmditConfig::tiny(), &options).expect("all parameters are there")
}

/// Two samples of 4 image and 3 text tokens; `samples` says which of them go in.
fn velocity(model: &Mmdit, adapters: &Adapters, samples: std::ops::Range<usize>) -> Vec<f32> {
    let config = model.config();
    let b = samples.len();
    let part = |seed, per_sample: usize| {
        let all = numbers(seed, 2 * per_sample);
        all[samples.start * per_sample..samples.end * per_sample].to_vec()
    };
    let device = model.device();
    let (img, txt) = (config.in_channels, config.joint_attention_dim);
    let pooled = config.pooled_projection_dim;
    let input = MmditInput {
        hidden_states: from_f32(part(100, 4 * img), [b, 4, img], device),
        encoder_hidden_states: from_f32(part(101, 3 * txt), [b, 3, txt], device),
        pooled_projections: from_f32(part(102, pooled), [b, pooled], device),
        timestep: &[0.3, 0.8][samples.clone()],
        guidance: Some(&[1.0, 3.5][samples]),
        rope: &model.rope(3, [4, 4]),
    };
    to_f32(&model.forward(&input, adapters))
}

fn assert_close(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
    let difference = norm(&mut found.iter().zip(expected).map(|(f, e)| f - e));
    let relative = difference / norm(&mut expected.iter().copied());
    assert!(relative < 1e-5, "relative difference {relative}");
}

#[test]
fn samples_of_a_batch_do_not_see_each_other() {
    let model = load(&weights(|_, _| {}), &cpu(), BaseWeights::Plain);
    let none = Adapters::none();
    let apart = [velocity(&model, &none, 0..1), velocity(&model, &none, 1..2)].concat();
    assert_close(&velocity(&model, &none, 0..2), &apart);
    assert_ne!(apart[..32], apart[32..]);
}

#[test]
fn a_device_that_records_operations_gives_the_same_velocity() {
    let weights = weights(|_, _| {});
    let plain = load(&weights, &cpu(), BaseWeights::Plain);
    let recording = load(&weights, &training(&cpu()), BaseWeights::Plain);
    let none = Adapters::none();
    assert_close(
        &velocity(&recording, &none, 0..2),
        &velocity(&plain, &none, 0..2),
    );
}

#[test]
fn an_adapter_on_any_layer_is_its_product_added_to_the_weight() {
    let layers = MmditConfig::tiny().linears();
    for (
        seed,
        LinearSpec {
            path,
            in_features,
            out_features,
        },
    ) in layers.into_iter().enumerate()
    {
        let (rank, scale) = (2, 0.5);
        let a = numbers(200 + seed, rank * in_features);
        let b = numbers(300 + seed, out_features * rank);
        let merged = weights(|spec, values| {
            if spec.name == format!("{path}.weight") {
                for (i, value) in values.iter_mut().enumerate() {
                    let (row, column) = (i / in_features, i % in_features);
                    let product = |r| b[row * rank + r] * a[r * in_features + column];
                    *value += scale * (0..rank).map(product).sum::<f32>();
                }
            }
        });
        let mut adapters = Adapters::none();
        adapters.push(&path, Adapter::from_values(a, b, rank, scale, &cpu()));
        adapters
            .check(&MmditConfig::tiny())
            .expect("the sizes are the layer's");
        let base = load(&weights(|_, _| {}), &cpu(), BaseWeights::Plain);
        let adapted = velocity(&base, &adapters, 0..2);
        let expected = velocity(
            &load(&merged, &cpu(), BaseWeights::Plain),
            &Adapters::none(),
            0..2,
        );
        assert_close(&adapted, &expected);
        assert_ne!(
            adapted,
            velocity(&base, &Adapters::none(), 0..2),
            "{path} has no effect"
        );
    }
}

#[test]
fn quantisation_changes_every_linear_weight_and_nothing_else() {
    let four_bit = load(
        &weights(|_, _| {}),
        &cpu(),
        BaseWeights::Nf4 {
            double_quant: false,
        },
    );
    let rounded = weights(|spec, values| {
        if spec.shape.len() == 2 {
            let nf4 = quant::Nf4::quantize(values, quant::StoredFloat::F32).expect("finite");
            *values = nf4.dequantize();
        }
    });
    let expected = load(&rounded, &cpu(), BaseWeights::Plain);
    let none = Adapters::none();
    assert_eq!(
        velocity(&four_bit, &none, 0..2),
        velocity(&expected, &none, 0..2)
    );
}

#[test]
fn a_weight_that_is_not_finite_cannot_be_quantised_and_is_named() {
    let broken = weights(|spec, values| {
        if spec.name == "proj_out.weight" {
            values[3] = f32::NAN;
        }
    });
    let options = LoadOptions {
        device: cpu(),
        precision: Precision::F32,
        base: BaseWeights::Nf4 { double_quant: true },
    };
    let error = Mmdit::load(&broken, MmditConfig::tiny(), &options).expect_err("a NaN");
    assert!(matches!(error, MmditError::Quantize { path, .. } if path == "proj_out"));
}

#[test]
fn frozen_weights_record_no_gradient_and_adapters_do() {
    let device = training(&cpu());
    let model = load(&weights(|_, _| {}), &device, BaseWeights::Plain);
    let path = "single_transformer_blocks.1.attn.to_v";
    let leaf = |seed, shape: [usize; 2]| {
        from_f32(numbers(seed, shape[0] * shape[1]), shape, &device).require_grad()
    };
    let (a, b) = (leaf(1, [2, 16]), leaf(2, [16, 2]));
    let mut adapters = Adapters::none();
    let adapter = Adapter {
        a: a.clone(),
        b: b.clone(),
        scale: 1.0,
    };
    adapters.push(path, adapter);
    let input = from_f32(numbers(3, 32), [1, 4, 8], &device);
    let rope = model.rope(3, [4, 4]);
    let input = MmditInput {
        hidden_states: input.clone(),
        encoder_hidden_states: from_f32(numbers(4, 18), [1, 3, 6], &device),
        pooled_projections: from_f32(numbers(5, 5), [1, 5], &device),
        timestep: &[0.5],
        guidance: Some(&[1.0]),
        rope: &rope,
    };
    let gradients = model.forward(&input, &adapters).sum().backward();
    assert!(input.hidden_states.grad(&gradients).is_none());
    for leaf in [a, b] {
        let gradient = to_f32(&leaf.grad(&gradients).expect("a leaf"));
        assert!(gradient.iter().any(|value| *value != 0.0));
    }
}
