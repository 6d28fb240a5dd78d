//! `sample_*`: crate `sample` from prompts or embeddings and given noise to a picture, step by step.

use autoencoder::Autoencoder;
use console::Progress;
use flow_matching::{Scheduler, SchedulerConfig, latent_seq_len};
use pipeline::recipe::LongText;
use sample::{Conditioning, Denoising, Encoders, LoraChoice, LoraStack, TrueCfg, decode, denoise};
use serde::Deserialize;
use tensor::device::cpu;
use tensor::{Precision, Tensor};

use super::schedules::output_schedule;
use super::transformer;
use crate::checker::{CaseError, CaseRun};
use crate::compare::Values;

#[derive(Deserialize)]
struct Params {
    height: usize,
    width: usize,
    steps: usize,
    guidance_scale: f32,
    true_cfg_scale: f64,
    lora: bool,
    lora_scale: Option<f64>,
    prompt: String,
    negative_prompt: Option<String>,
    max_sequence_length: usize,
}

/// One sampling run: latents behind every step, and the picture.
pub fn sample(run: &mut CaseRun) -> Result<(), CaseError> {
    let params: Params = run.params()?;
    let mut engine = transformer::open_engine(run)?;
    let vae = Autoencoder::open(&run.set.model().join("vae"), &cpu(), Precision::F32)?;
    let cell_px = vae.config().scale_factor_px();
    let latent_cells = [params.height / cell_px, params.width / cell_px];

    let path = run.set.model().join("scheduler/scheduler_config.json");
    let scheduler = Scheduler::new(SchedulerConfig::from_file(&path)?);
    let num_tokens = latent_seq_len(latent_cells[0], latent_cells[1]);
    let schedule = scheduler.inference(params.steps, num_tokens);
    output_schedule(run, "", &schedule);

    let (conditioning, negative) = if run.has("in.prompt_embeds") {
        let negative = run.has("in.negative_prompt_embeds");
        (
            given(run, "in.")?,
            negative.then(|| given(run, "in.negative_")).transpose()?,
        )
    } else {
        encoded(run, &params)?
    };
    let choices = if params.lora {
        let scale = params.lora_scale.unwrap_or(1.0);
        vec![LoraChoice::file(&run.set.lora(), scale)]
    } else {
        vec![]
    };
    let stack = LoraStack::read(&choices, engine.config())?;
    engine.set_lora(&stack.factors())?;
    let has_cfg = params.true_cfg_scale > 1.0;
    let denoising = Denoising {
        schedule: &schedule,
        latents: run.tensor("in.latents", &cpu())?,
        latent_cells,
        conditioning: &conditioning,
        guidance: engine
            .config()
            .guidance_embeds
            .then_some(params.guidance_scale),
        true_cfg: negative
            .as_ref()
            .filter(|_| has_cfg)
            .map(|negative| TrueCfg {
                negative,
                scale: params.true_cfg_scale,
            }),
    };
    if has_cfg {
        run.widen(params.true_cfg_scale);
    }
    let mut steps = Vec::new();
    let latents = denoise(engine.as_mut(), &denoising, |_, latents| {
        steps.push(latents.clone());
    })?;
    run.output_tensor("latents", &Tensor::stack::<4>(steps, 0));
    if let Some(picture) = decode(&vae, latents, latent_cells)?.into_iter().next() {
        let shape = [picture.height_px as usize, picture.width_px as usize, 3];
        run.output("image_u8", Values::U8(picture.pixels), &shape);
    }
    Ok(())
}

fn given(run: &CaseRun, prefix: &str) -> Result<Conditioning, CaseError> {
    Ok(Conditioning {
        prompt_embeds: run.tensor(&format!("{prefix}prompt_embeds"), &cpu())?,
        pooled_prompt_embeds: run.tensor(&format!("{prefix}pooled_prompt_embeds"), &cpu())?,
    })
}

/// The prompt and the negative prompt, if there is one, through both encoders.
fn encoded(
    run: &CaseRun,
    params: &Params,
) -> Result<(Conditioning, Option<Conditioning>), CaseError> {
    let (model, tokenizers) = (run.set.model(), run.set.tokenizers());
    let encoders = Encoders {
        clip: model.join("text_encoder"),
        clip_tokenizer: tokenizers.join("tokenizer"),
        t5: model.join("text_encoder_2"),
        t5_tokenizer: tokenizers.join("tokenizer_2"),
        t5_tokens: params.max_sequence_length,
        long_texts: LongText::Truncate,
        batch: 1,
        device: cpu(),
        precision: Precision::F32,
    };
    let mut texts = vec![params.prompt.as_str()];
    texts.extend(params.negative_prompt.as_deref());
    let encoded = encoders.encode(&texts, &Progress::silent())?;
    let negative = params.negative_prompt.as_deref();
    Ok((
        encoded.get(&params.prompt).clone(),
        negative.map(|text| encoded.get(text).clone()),
    ))
}
