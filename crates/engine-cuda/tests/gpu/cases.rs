//! Models, batches and LoRAs that the engine is tested on on a card.

use std::collections::BTreeMap;

use engine_cuda::model::{Engine, EngineOptions, Shape, WeightForm};
use engine_cuda::stream::OpenOptions;
use engine_cuda::{Half, Stream};
use mmdit::MmditConfig;

use crate::networks::{ALL_LINEAR, CONDITIONS};

/// The public recipe's.
pub const RECIPE: [&str; 4] = ["to_q", "to_k", "to_v", "to_out.0"];

/// One configuration and batch.
pub struct Case {
    pub label: &'static str,
    pub config: MmditConfig,
    pub shape: Shape,
    pub targets: &'static [&'static str],
    pub rank: usize,
}

/// Three heads of 16, 2 + 3 blocks.
pub fn small() -> MmditConfig {
    MmditConfig {
        num_layers: 2,
        num_single_layers: 3,
        num_attention_heads: 3,
        attention_head_dim: 16,
        axes_dims_rope: [4, 6, 6],
        joint_attention_dim: 16,
        pooled_projection_dim: 24,
        guidance_embeds: true,
        in_channels: 16,
        out_channels: 16,
        patch_size: 1,
    }
}

pub fn cases() -> Vec<Case> {
    let shape = |b, text, latent_cells| Shape {
        b,
        text,
        latent_cells,
    };
    vec![
        Case {
            label: "head 16, batch 2",
            config: small(),
            shape: shape(2, 5, [6, 10]),
            targets: &ALL_LINEAR,
            rank: 3,
        },
        Case {
            label: "head 16, modulations",
            config: small(),
            shape: shape(2, 5, [6, 10]),
            targets: &CONDITIONS,
            rank: 3,
        },
        Case {
            label: "head 28, no guidance",
            config: MmditConfig {
                num_layers: 1,
                num_attention_heads: 2,
                attention_head_dim: 28,
                axes_dims_rope: [4, 12, 12],
                joint_attention_dim: 12,
                pooled_projection_dim: 20,
                guidance_embeds: false,
                ..small()
            },
            shape: shape(1, 21, [4, 6]),
            targets: &ALL_LINEAR,
            rank: 8,
        },
        Case {
            label: "head 64, batch 3",
            config: MmditConfig {
                num_attention_heads: 2,
                attention_head_dim: 64,
                axes_dims_rope: [16, 24, 24],
                joint_attention_dim: 40,
                num_single_layers: 2,
                ..small()
            },
            shape: shape(3, 37, [10, 14]),
            targets: &ALL_LINEAR,
            rank: 4,
        },
        Case {
            label: "head 128, recipe's targets",
            config: MmditConfig {
                num_attention_heads: 3,
                attention_head_dim: 128,
                axes_dims_rope: [16, 56, 56],
                joint_attention_dim: 64,
                ..small()
            },
            shape: shape(2, 77, [16, 12]),
            targets: &RECIPE,
            rank: 4,
        },
        Case {
            label: "FLUX.1-dev widths, 1+1 blocks, modulations",
            config: MmditConfig {
                num_layers: 1,
                num_single_layers: 1,
                ..MmditConfig::flux_dev()
            },
            shape: shape(1, 77, [16, 14]),
            targets: &CONDITIONS,
            rank: 4,
        },
        Case {
            label: "FLUX.1-dev widths, 1+1 blocks",
            config: MmditConfig {
                num_layers: 1,
                num_single_layers: 1,
                ..MmditConfig::flux_dev()
            },
            shape: shape(1, 77, [16, 14]),
            targets: &RECIPE,
            rank: 4,
        },
    ]
}

/// The largest relative distance among gradients, with the tensor's name, and that of all of them together.
///
/// A tensor is measured against its own norm, but at least against a thousandth of the largest: what is nothing in
/// exact arithmetic (keys' gradients under softmax, where values are all alike) has no digits to compare.
pub fn gradient_distance(
    found: &BTreeMap<String, Vec<f32>>,
    expected: &BTreeMap<String, Vec<f32>>,
) -> (f64, String, f64) {
    let norm = |values: &[f32]| values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
    let largest = expected
        .values()
        .map(|g| norm(g))
        .fold(0.0, f64::max)
        .sqrt();
    let (mut worst, mut sum) = ((0.0, String::new()), [0.0; 2]);
    for (name, expected) in expected {
        let difference: Vec<f32> = match found.get(name) {
            Some(found) => found.iter().zip(expected).map(|(f, e)| f - e).collect(),
            None => vec![f32::NAN],
        };
        let (d, e) = (norm(&difference), norm(expected));
        sum = [sum[0] + d, sum[1] + e];
        let relative = d.sqrt() / e.sqrt().max(1e-3 * largest);
        if relative > worst.0 || relative.is_nan() {
            worst = (relative, name.clone());
        }
    }
    (worst.0, worst.1, (sum[0] / sum[1]).sqrt())
}

pub fn open() -> Stream {
    Stream::open(&OpenOptions::default()).expect("it was opened before")
}

pub fn engine(
    config: &MmditConfig,
    weights: &BTreeMap<String, Vec<f32>>,
    t: Half,
    form: WeightForm,
) -> Engine {
    Engine::load(open(), config, weights, EngineOptions { t, form }).expect("it loads")
}
