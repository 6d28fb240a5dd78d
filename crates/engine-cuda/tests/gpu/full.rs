//! Training of all weights: kernels, all gradients against `mmdit` under automatic differentiation, recorded steps
//! against launched ones, learning, restored runs.

use std::collections::BTreeMap;

use engine_cuda::model::{Accuracy, FullTrainer, Shape};
use engine_cuda::{Half, Stream};
use mmdit::MmditConfig;

use crate::cases::{gradient_distance, open, small};
use crate::full_setting::{Gradients, SEED, Setting};
use crate::networks::weights;
use crate::report::Report;
use crate::support::name;

fn settings() -> Vec<Setting> {
    let small = MmditConfig {
        num_single_layers: 2,
        joint_attention_dim: 12,
        pooled_projection_dim: 20,
        ..small()
    };
    let shape = |b, text, latent_cells| Shape {
        b,
        text,
        latent_cells,
    };
    vec![
        Setting {
            label: "head 16, guidance",
            config: small.clone(),
            shape: shape(2, 5, [6, 10]),
        },
        Setting {
            label: "head 28, batch 1",
            config: MmditConfig {
                num_layers: 1,
                num_attention_heads: 2,
                attention_head_dim: 28,
                axes_dims_rope: [4, 12, 12],
                guidance_embeds: false,
                ..small.clone()
            },
            shape: shape(1, 21, [4, 6]),
        },
        Setting {
            label: "the small base's widths, head 64",
            config: MmditConfig::small(),
            shape: shape(5, 19, [10, 14]),
        },
        Setting {
            label: "head 128",
            config: MmditConfig {
                num_layers: 1,
                num_single_layers: 1,
                num_attention_heads: 3,
                attention_head_dim: 128,
                axes_dims_rope: [16, 56, 56],
                ..small.clone()
            },
            shape: shape(2, 33, [8, 12]),
        },
        Setting {
            label: "width 1152, beyond what a warp takes",
            config: MmditConfig {
                num_layers: 1,
                num_single_layers: 1,
                num_attention_heads: 9,
                attention_head_dim: 128,
                axes_dims_rope: [16, 56, 56],
                ..small
            },
            shape: shape(2, 9, [6, 4]),
        },
    ]
}

/// Runs everything.
pub fn run(s: &Stream, report: &mut Report) {
    report.guarded("full: kernels", |report| {
        crate::full_kernels::run(s, report)
    });
    for setting in settings() {
        for t in [Half::Bf16, Half::F16] {
            let label = format!("full: {} {}", setting.label, name(t));
            report.guarded(&label, |report| one(&setting, t, &label, report));
        }
    }
}

fn one(setting: &Setting, t: Half, label: &str, report: &mut Report) {
    let weights = weights(&setting.config, t);
    let (expected_loss, expected) = setting.expected(&weights);
    // Adam moves all inputs of an output alike: the wider, the smaller its steps must be.
    let learning_rate = 0.15 / setting.config.width() as f64;
    let trainer = || setting.trainer(open(), setting.options(t), &weights);
    let step = |trainer: &mut FullTrainer, seed| setting.step(trainer, seed, learning_rate);

    let mut first = trainer();
    let (loss, found) = setting.gradients(&mut first, SEED);
    let again = setting.gradients(&mut first, SEED);
    report.check(
        &format!("{label}: a repeated pass differs in a bit"),
        f64::from(u8::from(again != (loss, found.clone()))),
        0.0,
    );
    let off = f64::from((loss - expected_loss).abs() / expected_loss);
    report.check(
        &format!("{label}: loss"),
        off,
        Accuracy::of(t, &setting.config).velocity,
    );
    let by_name = |gradients: Gradients| -> BTreeMap<String, Vec<f32>> {
        gradients
            .into_iter()
            .map(|(spec, g)| (spec.name, g))
            .collect()
    };
    let (worst, at, all) = gradient_distance(&by_name(found), &by_name(expected));
    let bound = match t {
        Half::Bf16 => 2e-2,
        Half::F16 => 4e-3,
    };
    report.check(&format!("{label}: all gradients together"), all, bound);
    // Small tensors of a deep network collect the rounding of everything before them.
    report.check(
        &format!("{label}: worst gradient, {at}"),
        worst,
        3.0 * bound,
    );

    // Recorded steps against launched ones.
    let run = |graphs: bool| {
        let mut trainer = trainer();
        trainer.use_graphs(graphs);
        for seed in 0..4 {
            step(&mut trainer, SEED + seed);
        }
        let outcome = trainer.report().expect("it ran");
        (trainer.state().expect("it is there"), outcome, trainer)
    };
    let (state, outcome, mut recorded) = run(true);
    let (launched, launched_outcome, _) = run(false);
    report.check(
        &format!("{label}: recorded steps differ from launched ones"),
        f64::from(u8::from(state != launched || outcome != launched_outcome)),
        0.0,
    );

    // A state that is taken out and put back goes on to the same bits.
    step(&mut recorded, SEED + 9);
    let straight = recorded.state().expect("it is there");
    let mut resumed = trainer();
    resumed.restore(&state).expect("it is of this model");
    step(&mut resumed, SEED + 9);
    report.check(
        &format!("{label}: a restored run differs"),
        f64::from(u8::from(resumed.state().expect("it is there") != straight)),
        0.0,
    );

    // One batch again and again.
    let mut trainer = trainer();
    let mut losses = Vec::new();
    for _ in 0..30 {
        step(&mut trainer, SEED);
        losses.push(trainer.report().expect("it ran").loss);
    }
    report.check(
        &format!("{label}: loss after 30 steps on one batch against the first"),
        f64::from(losses[29] / losses[0]),
        0.7,
    );
}
