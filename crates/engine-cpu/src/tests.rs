//! The executor beside `mmdit`, on random models.

use mmdit::{
    Adapter, Adapters, BaseWeights, LoadOptions, Mmdit, MmditConfig, MmditInput, Rope, image_ids,
    text_ids,
};
use tensor::device::{cpu, training};
use tensor::{Precision, Tensor, Weights, from_f32, to_f32};

use super::*;

/// Numbers between −1 and 1 that differ from place to place.
fn numbers(seed: usize, count: usize) -> Vec<f32> {
    let mut state = seed as u32 * 7919 + 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Weights that keep activations near 1.
fn weights(config: &MmditConfig) -> Weights {
    let parameters = config.parameters().into_iter().enumerate();
    Weights::from_values(parameters.map(|(seed, spec)| {
        let inputs = spec.shape.last().copied().unwrap_or(1) as f32;
        let mut values = numbers(seed, spec.num_elements() as usize);
        values
            .iter_mut()
            .for_each(|value| *value *= (3.0 / inputs).sqrt());
        (spec, values)
    }))
}

/// A batch for any model.
struct Batch {
    samples: usize,
    text: usize,
    cells: [usize; 2],
    hidden_states: Vec<f32>,
    encoder_hidden_states: Vec<f32>,
    pooled_projections: Vec<f32>,
    timestep: Vec<f32>,
    guidance: Option<Vec<f32>>,
    positions: Vec<[f32; 3]>,
}

impl Batch {
    fn new(config: &MmditConfig, samples: usize, text: usize, cells: [usize; 2]) -> Self {
        let image = cells[0] * cells[1] / 4;
        let mut positions = text_ids(text);
        positions.extend(image_ids(cells[0], cells[1]));
        let unit = |seed| {
            numbers(seed, samples)
                .iter()
                .map(|v| 0.5 + 0.45 * v)
                .collect::<Vec<f32>>()
        };
        Self {
            samples,
            text,
            cells,
            hidden_states: numbers(1000, samples * image * config.in_channels),
            encoder_hidden_states: numbers(1001, samples * text * config.joint_attention_dim),
            pooled_projections: numbers(1002, samples * config.pooled_projection_dim),
            timestep: unit(1003),
            guidance: config.guidance_embeds.then(|| unit(1004)),
            positions,
        }
    }

    fn input(&self) -> Input<'_> {
        Input {
            hidden_states: &self.hidden_states,
            encoder_hidden_states: &self.encoder_hidden_states,
            pooled_projections: &self.pooled_projections,
            timestep: &self.timestep,
            guidance: self.guidance.as_deref(),
            positions: &self.positions,
        }
    }

    /// `mmdit`'s velocity, and the gradients of `Σ velocity · weight` for every factor.
    fn reference(
        &self,
        config: &MmditConfig,
        factors: &[Factors],
    ) -> (Vec<f32>, Vec<[Vec<f32>; 2]>) {
        let device = training(&cpu());
        let options = LoadOptions {
            device: device.clone(),
            precision: Precision::F32,
            base: BaseWeights::Plain,
        };
        let model = Mmdit::load(&weights(config), config.clone(), &options).expect("all are there");
        let mut adapters = Adapters::none();
        let mut leaves = Vec::new();
        for factors in factors {
            let (rank, scale) = (factors.rank, factors.scale);
            let leaf = |values: &[f32], shape| -> Tensor<2> {
                from_f32(values.to_vec(), shape, &device).require_grad()
            };
            let a = leaf(&factors.a, [rank, factors.a.len() / rank]);
            let b = leaf(&factors.b, [factors.b.len() / rank, rank]);
            leaves.push([a.clone(), b.clone()]);
            adapters.push(&factors.path, Adapter { a, b, scale });
        }
        let b = self.samples;
        let image = self.cells[0] * self.cells[1] / 4;
        let rope = Rope::new(config, &self.positions, &device);
        let input = MmditInput {
            hidden_states: from_f32(
                self.hidden_states.clone(),
                [b, image, config.in_channels],
                &device,
            ),
            encoder_hidden_states: from_f32(
                self.encoder_hidden_states.clone(),
                [b, self.text, config.joint_attention_dim],
                &device,
            ),
            pooled_projections: from_f32(
                self.pooled_projections.clone(),
                [b, config.pooled_projection_dim],
                &device,
            ),
            timestep: &self.timestep,
            guidance: self.guidance.as_deref(),
            rope: &rope,
        };
        let velocity = model.forward(&input, &adapters);
        let shape = velocity.dims();
        let weight = from_f32(numbers(5, shape.iter().product()), shape, &device);
        let gradients = (velocity.clone() * weight).sum().backward();
        let gradients = leaves
            .iter()
            .map(|pair| {
                pair.each_ref().map(|leaf| match leaf.grad(&gradients) {
                    Some(gradient) => to_f32(&gradient),
                    None => vec![0.0; leaf.dims().iter().product()],
                })
            })
            .collect();
        (to_f32(&velocity), gradients)
    }
}

/// Factors on every layer whose path `is_target`, of ranks 1 to 5.
fn factors(config: &MmditConfig, is_target: impl Fn(&str) -> bool) -> Vec<Factors> {
    let layers = config.linears().into_iter().enumerate();
    layers
        .filter(|(_, layer)| is_target(&layer.path))
        .map(|(i, layer)| {
            let rank = 1 + i % 5;
            Factors {
                path: layer.path,
                rank,
                scale: 0.5 + (i % 3) as f32 / 4.0,
                a: numbers(2000 + i, rank * layer.in_features),
                b: numbers(3000 + i, rank * layer.out_features)
                    .iter()
                    .map(|v| 0.3 * v)
                    .collect(),
            }
        })
        .collect()
}

fn relative_difference(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut found.iter().zip(expected).map(|(f, e)| f64::from(f - e)));
    let size = norm(&mut expected.iter().map(|e| f64::from(*e)));
    if size == 0.0 {
        difference
    } else {
        difference / size
    }
}

fn ours(
    config: &MmditConfig,
    batch: &Batch,
    factors: &[Factors],
    arch: Arch,
) -> (Vec<f32>, Vec<[Vec<f32>; 2]>) {
    let mut transformer =
        Transformer::load_for(arch, &weights(config), config.clone(), BaseWeights::Plain)
            .expect("all are there");
    transformer.set_factors(factors);
    let velocity = transformer.velocity_to_train(&batch.input());
    let gradients = transformer.gradients(&numbers(5, velocity.len()));
    assert_eq!(
        transformer.velocity(&batch.input()),
        velocity,
        "without keeping activations"
    );
    (velocity, gradients)
}

/// Both compute in `f32` and sum in different orders: a velocity passes some fifty sums of up to a few hundred terms,
/// a gradient about twice as many. Relative rounding of 6e-8 each, added up at random, is a few 1e-6; a wrong formula
/// is 1e-2.
fn compare(config: &MmditConfig, batch: &Batch, factors: &[Factors], arch: Arch) {
    let (velocity, gradients) = ours(config, batch, factors, arch);
    let (expected_velocity, expected) = batch.reference(config, factors);
    let error = relative_difference(&velocity, &expected_velocity);
    assert!(error < 1e-5, "velocity: {error}");
    assert_eq!(gradients.len(), expected.len());
    for (factors, (found, expected)) in factors.iter().zip(gradients.iter().zip(&expected)) {
        for (name, (found, expected)) in ["A", "B"].iter().zip(found.iter().zip(expected)) {
            let error = relative_difference(found, expected);
            assert!(error < 3e-5, "{} of {}: {error}", name, factors.path);
        }
    }
}

fn small() -> MmditConfig {
    MmditConfig {
        num_layers: 2,
        num_single_layers: 2,
        num_attention_heads: 3,
        attention_head_dim: 20,
        axes_dims_rope: [4, 8, 8],
        joint_attention_dim: 9,
        pooled_projection_dim: 7,
        guidance_embeds: false,
        in_channels: 12,
        out_channels: 12,
        patch_size: 1,
    }
}

const RECIPE_TARGETS: [&str; 4] = [".to_q", ".to_k", ".to_v", ".to_out.0"];

fn is_recipe_target(path: &str) -> bool {
    RECIPE_TARGETS.iter().any(|target| path.ends_with(target))
}

#[test]
fn with_factors_on_every_layer_velocity_and_gradients_are_the_portable_ones() {
    let tiny = MmditConfig::tiny();
    compare(
        &tiny,
        &Batch::new(&tiny, 2, 3, [4, 6]),
        &factors(&tiny, |_| true),
        Arch::new(),
    );
    let small = small();
    let batch = Batch::new(&small, 3, 19, [10, 14]);
    compare(&small, &batch, &factors(&small, |_| true), Arch::new());
}

#[test]
fn with_the_recipes_targets_too() {
    let config = small();
    let batch = Batch::new(&config, 2, 50, [12, 10]);
    compare(
        &config,
        &batch,
        &factors(&config, is_recipe_target),
        Arch::new(),
    );
}

#[test]
fn wherever_the_lowest_factors_are() {
    let config = small();
    let batch = Batch::new(&config, 1, 5, [6, 6]);
    for target in [
        "proj_out",
        "norm_out.linear",
        "single_transformer_blocks.1.proj_mlp",
        "single_transformer_blocks.0.attn.to_v",
        "transformer_blocks.1.ff.net.2",
        "transformer_blocks.0.attn.add_k_proj",
        "transformer_blocks.0.norm1.linear",
        "context_embedder",
        "time_text_embed.text_embedder.linear_1",
    ] {
        compare(
            &config,
            &batch,
            &factors(&config, |path| path == target),
            Arch::new(),
        );
    }
}

#[test]
fn models_without_one_kind_of_block() {
    for (num_layers, num_single_layers) in [(2, 0), (0, 2), (0, 0)] {
        let config = MmditConfig {
            num_layers,
            num_single_layers,
            ..small()
        };
        let batch = Batch::new(&config, 2, 5, [6, 4]);
        compare(&config, &batch, &factors(&config, |_| true), Arch::new());
    }
}

#[test]
fn several_factors_on_one_layer_add_up() {
    let config = MmditConfig::tiny();
    let batch = Batch::new(&config, 1, 3, [4, 4]);
    let mut both = factors(&config, is_recipe_target);
    let mut others = factors(&config, |path| {
        path.ends_with("to_q") || path.ends_with("proj_mlp")
    });
    for factors in &mut others {
        factors.scale = -0.7;
        factors.a.reverse();
    }
    both.extend(others);
    compare(&config, &batch, &both, Arch::new());
}

#[cfg(target_arch = "x86_64")]
#[test]
fn other_instruction_sets_compute_the_same() {
    let config = small();
    let batch = Batch::new(&config, 1, 5, [6, 6]);
    for arch in [Arch::V2, Arch::Scalar] {
        compare(&config, &batch, &factors(&config, |_| true), arch);
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let config = small();
    let batch = Batch::new(&config, 3, 30, [12, 14]);
    let factors = factors(&config, |_| true);
    let with_threads = |count: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(count)
            .build()
            .expect("threads");
        pool.install(|| ours(&config, &batch, &factors, Arch::new()))
    };
    let alone = with_threads(1);
    for count in [2, 3, 7] {
        assert!(with_threads(count) == alone, "{count} threads");
    }
}

#[test]
fn a_second_batch_finds_nothing_of_the_first() {
    let config = small();
    let [one, other] = [[6, 6], [8, 4]].map(|cells| Batch::new(&config, 2, 7, cells));
    let factors = factors(&config, |_| true);
    let mut transformer = Transformer::load(&weights(&config), config.clone(), BaseWeights::Plain)
        .expect("all are there");
    transformer.set_factors(&factors);
    for batch in [&one, &other, &one, &one] {
        let velocity = transformer.velocity_to_train(&batch.input());
        let gradients = transformer.gradients(&numbers(5, velocity.len()));
        assert!((velocity, gradients) == ours(&config, batch, &factors, Arch::new()));
    }
}
