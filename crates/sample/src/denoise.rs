//! The sampling loop: noise to latents by Euler steps along the transformer's velocity.
//!
//! Latents stay `f32` from step to step whatever the transformer computes in, so that small steps are not rounded
//! away. With true classifier-free guidance both branches go through the transformer as one batch, prompts first.
//!
//! Source: `FluxPipeline.__call__`, diffusers 0.42.

use engine::{Engine, Input, RunError, Trajectory};
use flow_matching::{InferenceSchedule, euler_step, model_time};
use mmdit::{image_ids, text_ids};
use tensor::{DType, Tensor, from_f32, to_f32};

use crate::conditioning::Conditioning;

/// True classifier-free guidance: the velocity is `v₋ + scale·(v₊ − v₋)`.
#[derive(Clone, Copy, Debug)]
pub struct TrueCfg<'a> {
    /// What `v₋` is conditioned on, a row per picture.
    pub negative: &'a Conditioning,
    /// How far beyond `v₋`; 1 would be no guidance.
    pub scale: f64,
}

/// What a batch of pictures is drawn from, apart from the model.
#[derive(Clone, Debug)]
pub struct Denoising<'a> {
    /// The noise levels and what the model is told of them.
    pub schedule: &'a InferenceSchedule,
    /// Noise as tokens, `(b, n, in_channels)`.
    pub latents: Tensor<3>,
    /// Rows and columns of latent cells; `n` is a quarter of their product.
    pub latent_cells: [usize; 2],
    /// The prompts, a row per picture.
    pub conditioning: &'a Conditioning,
    /// Guidance of a model with a guidance embedding, and of no other.
    pub guidance: Option<f32>,
    /// The second branch, if there is one.
    pub true_cfg: Option<TrueCfg<'a>>,
}

/// Takes noise to latents, under the LoRAs that the engine has; `on_step` sees the number of each step, from 0, and the latents behind it.
///
/// # Errors
///
/// If the engine cannot go on.
///
/// # Panics
///
/// If sizes do not agree with one another or with the model, or `guidance` is given to a model without guidance
/// embedding (or withheld from one with it).
pub fn denoise(
    engine: &mut dyn Engine,
    denoising: &Denoising<'_>,
    mut on_step: impl FnMut(usize, &Tensor<3>),
) -> Result<Tensor<3>, RunError> {
    let Denoising {
        schedule,
        latent_cells,
        conditioning,
        guidance,
        true_cfg,
        ..
    } = denoising;
    let mut latents = denoising.latents.clone().cast(DType::F32);
    let [b, n, _] = latents.dims();
    let device = latents.device();
    let mut positions = text_ids(conditioning.prompt_embeds.dims()[1]);
    positions.extend(image_ids(latent_cells[0], latent_cells[1]));
    let [text, pooled] = [
        to_f32(&conditioning.prompt_embeds),
        to_f32(&conditioning.pooled_prompt_embeds),
    ];
    let negative = true_cfg.map(|TrueCfg { negative, scale }| {
        let [text, pooled] = [
            to_f32(&negative.prompt_embeds),
            to_f32(&negative.pooled_prompt_embeds),
        ];
        (text, pooled, scale as f32)
    });
    let times: Vec<f32> = schedule
        .timesteps
        .iter()
        .map(|&time| model_time(time))
        .collect();
    let trajectory = Trajectory {
        hidden_states: &to_f32(&latents),
        encoder_hidden_states: &text,
        pooled_projections: &pooled,
        negative: negative
            .as_ref()
            .map(|(text, pooled, scale)| (text.as_slice(), pooled.as_slice(), *scale)),
        guidance: *guidance,
        sigmas: &schedule.sigmas,
        times: &times,
        positions: &positions,
    };
    let dims = latents.dims();
    let as_tensor = |tokens: &[f32]| from_f32(tokens.to_vec(), dims, &device);
    if let Some(tokens) = engine.draw(&trajectory, &mut |step, tokens| {
        on_step(step, &as_tensor(tokens));
    })? {
        return Ok(as_tensor(&tokens));
    }
    let both;
    let conditioning = match true_cfg {
        Some(cfg) => {
            both = Conditioning::stack(&[*conditioning, cfg.negative]);
            &both
        }
        None => *conditioning,
    };
    let num_rows = if true_cfg.is_some() { 2 * b } else { b };
    let prompt_embeds = to_f32(&conditioning.prompt_embeds);
    let pooled = to_f32(&conditioning.pooled_prompt_embeds);
    let velocity_channels = engine.config().velocity_channels();
    let guidance = guidance.map(|guidance| vec![guidance; num_rows]);

    for (step, &timestep) in schedule.timesteps.iter().enumerate() {
        let hidden_states = match true_cfg {
            Some(_) => Tensor::cat(vec![latents.clone(), latents.clone()], 0), // 2b n c
            None => latents.clone(),
        };
        let velocity = engine.velocity(&Input {
            hidden_states: &to_f32(&hidden_states),
            encoder_hidden_states: &prompt_embeds,
            pooled_projections: &pooled,
            timestep: &vec![model_time(timestep); num_rows],
            guidance: guidance.as_deref(),
            positions: &positions,
        })?;
        let velocity = from_f32(velocity, [num_rows, n, velocity_channels], &device);
        let velocity = match true_cfg {
            Some(cfg) => {
                let [positive, negative] = halves(velocity);
                negative.clone() + (positive - negative) * cfg.scale
            }
            None => velocity,
        };
        let [sigma, next_sigma] = [schedule.sigmas[step], schedule.sigmas[step + 1]];
        latents = euler_step(latents, velocity, sigma, next_sigma);
        on_step(step, &latents);
    }
    Ok(latents)
}

/// `(2b, n, c)` → the first and the last `b`.
fn halves(both: Tensor<3>) -> [Tensor<3>; 2] {
    let [rows, n, c] = both.dims();
    let b = rows / 2;
    [
        both.clone().slice([0..b, 0..n, 0..c]),
        both.slice([b..rows, 0..n, 0..c]),
    ]
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use super::*;
    use engine::Factors;
    use engine::cpu::Cpu;
    use engine::portable::Portable;
    use flow_matching::{Scheduler, SchedulerConfig};
    use mmdit::{BaseWeights, LoadOptions, Mmdit, MmditConfig};
    use tensor::device::cpu;
    use tensor::{Precision, Weights};

    static SCHEDULE: LazyLock<InferenceSchedule> =
        LazyLock::new(|| Scheduler::new(SchedulerConfig::flux_dev()).inference(3, 6));

    /// Numbers in (−1, 1) without a pattern that a layer could cancel.
    fn scrambled(count: usize, salt: u32) -> Vec<f32> {
        (0..count as u32)
            .map(|i| {
                let hash = (i ^ salt.wrapping_mul(0x9e37_79b9)).wrapping_mul(0x85eb_ca6b);
                (hash ^ hash >> 15) as i32 as f32 / i32::MAX as f32
            })
            .collect()
    }

    fn weights() -> Weights {
        let values = MmditConfig::tiny()
            .parameters()
            .into_iter()
            .enumerate()
            .map(|(i, spec)| {
                let count = spec.num_elements() as usize;
                let fan_in = *spec.shape.last().expect("no parameter is a scalar") as f32;
                let values = scrambled(count, i as u32);
                (spec, values.iter().map(|v| v / fan_in.sqrt()).collect())
            });
        Weights::from_values(values)
    }

    fn portable() -> Portable {
        let options = LoadOptions {
            device: cpu(),
            precision: Precision::F32,
            base: BaseWeights::Plain,
        };
        let model = Mmdit::load(&weights(), MmditConfig::tiny(), &options);
        Portable::new(model.expect("all are there"))
    }

    fn cpu_engine() -> Cpu {
        let config = MmditConfig::tiny();
        let transformer = engine_cpu::Transformer::load(&weights(), config, BaseWeights::Plain);
        Cpu::new(transformer.expect("all are there"))
    }

    fn conditioning(rows: usize, salt: u32) -> Conditioning {
        Conditioning {
            prompt_embeds: from_f32(scrambled(rows * 3 * 6, salt), [rows, 3, 6], &cpu()),
            pooled_prompt_embeds: from_f32(scrambled(rows * 5, salt + 1), [rows, 5], &cpu()),
        }
    }

    fn noise(rows: usize) -> Tensor<3> {
        from_f32(scrambled(rows * 6 * 8, 99), [rows, 6, 8], &cpu())
    }

    fn denoising(latents: Tensor<3>, conditioning: &Conditioning) -> Denoising<'_> {
        Denoising {
            schedule: &SCHEDULE,
            latents,
            latent_cells: [4, 6],
            conditioning,
            guidance: Some(3.5),
            true_cfg: None,
        }
    }

    fn drawn(denoising: &Denoising<'_>) -> Vec<f32> {
        let [expected, found] = [
            denoise(&mut portable(), denoising, |_, _| {}),
            denoise(&mut cpu_engine(), denoising, |_, _| {}),
        ]
        .map(|latents| to_f32(&latents.expect("no card")));
        assert!(distance(&found, &expected) < 1e-4, "engines differ");
        found
    }

    fn distance(a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len());
        a.iter()
            .zip(b)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max)
    }

    #[test]
    fn every_step_is_seen_and_the_last_is_the_result() {
        let prompts = conditioning(1, 1);
        let mut seen = Vec::new();
        let result = denoise(
            &mut portable(),
            &denoising(noise(1), &prompts),
            |step, latents| seen.push((step, to_f32(latents))),
        )
        .expect("no card");
        let steps: Vec<usize> = seen.iter().map(|(step, _)| *step).collect();
        assert_eq!(steps, [0, 1, 2]);
        assert_eq!(seen[2].1, to_f32(&result));
        assert!(distance(&seen[0].1, &seen[1].1) > 1e-3);
    }

    #[test]
    fn a_picture_does_not_depend_on_the_others_in_its_batch() {
        let prompts = conditioning(2, 1);
        let together = drawn(&denoising(noise(2), &prompts));
        for row in 0..2 {
            let alone = Conditioning {
                prompt_embeds: prompts.prompt_embeds.clone().narrow(0, row, 1),
                pooled_prompt_embeds: prompts.pooled_prompt_embeds.clone().narrow(0, row, 1),
            };
            let alone = drawn(&denoising(noise(2).narrow(0, row, 1), &alone));
            let size = alone.len();
            assert!(distance(&alone, &together[row * size..][..size]) < 1e-5);
        }
    }

    #[test]
    fn two_equal_branches_are_no_guidance() {
        let prompts = conditioning(1, 1);
        let plain = denoising(noise(1), &prompts);
        let guided = Denoising {
            true_cfg: Some(TrueCfg {
                negative: &prompts,
                scale: 4.0,
            }),
            ..plain.clone()
        };
        assert!(distance(&drawn(&plain), &drawn(&guided)) < 1e-4);
    }

    #[test]
    fn scale_0_is_the_negative_branch_and_scale_1_the_prompt() {
        let (prompts, negative) = (conditioning(1, 1), conditioning(1, 50));
        let with_scale = |scale| {
            drawn(&Denoising {
                true_cfg: Some(TrueCfg {
                    negative: &negative,
                    scale,
                }),
                ..denoising(noise(1), &prompts)
            })
        };
        let of_negative = drawn(&denoising(noise(1), &negative));
        let of_prompt = drawn(&denoising(noise(1), &prompts));
        assert!(distance(&of_negative, &of_prompt) > 1e-3);
        assert!(distance(&with_scale(0.0), &of_negative) < 1e-5);
        assert!(distance(&with_scale(1.0), &of_prompt) < 1e-5);
    }

    #[test]
    fn an_adapter_changes_the_picture_and_at_strength_0_does_not() {
        let prompts = conditioning(1, 1);
        let with_strength = |strength| {
            let mut engine = cpu_engine();
            let set = engine.set_lora(&[Factors {
                path: "transformer_blocks.0.attn.to_q".to_owned(),
                rank: 1,
                scale: strength,
                a: scrambled(16, 5),
                b: scrambled(16, 6),
            }]);
            set.expect("no card");
            let drawn = denoise(&mut engine, &denoising(noise(1), &prompts), |_, _| {});
            to_f32(&drawn.expect("no card"))
        };
        let plain = drawn(&denoising(noise(1), &prompts));
        assert_eq!(with_strength(0.0), plain);
        assert!(distance(&with_strength(1.0), &plain) > 1e-4);
    }
}
