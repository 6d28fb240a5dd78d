//! The reference fixtures through the engine: velocities, losses, gradients, trajectories.
//!
//! Their folders are given as arguments; each holds `cases.json`, `model/transformer`, `lora` and one safetensors file
//! per case.

use std::collections::BTreeMap;
use std::path::Path;

use artifacts::SafetensorsFile;
use engine_cuda::model::{
    Accuracy, Engine, EngineOptions, LoraFactors, MicroBatch, Recompute, SamplerInput, Shape,
    TrainingOptions, VelocityInput, WeightForm,
};
use engine_cuda::stream::OpenOptions;
use engine_cuda::{Half, Stream};
use lora::{LoraFile, Target};
use mmdit::MmditConfig;
use quant::{AdamWConfig, OptimizerKind};

use crate::networks::{LOSS_SCALE, distance};
use crate::report::Report;
use crate::support::name;

/// What the cases' parameters say that their files do not.
#[derive(serde::Deserialize)]
struct Cases {
    lora: String,
    spec: Spec,
    cases: Vec<Case>,
}

#[derive(serde::Deserialize)]
struct Spec {
    vae: Vae,
}

#[derive(serde::Deserialize)]
struct Vae {
    block_out_channels: Vec<usize>,
}

#[derive(serde::Deserialize)]
struct Case {
    name: String,
    file: String,
    params: serde_json::Map<String, serde_json::Value>,
}

impl Case {
    fn number(&self, key: &str) -> Option<f64> {
        self.params.get(key).and_then(serde_json::Value::as_f64)
    }
}

/// What is done with a case.
type Check = fn(&Set<'_>, &Case, &SafetensorsFile, &str, &mut Report);

struct Set<'a> {
    dir: &'a Path,
    config: MmditConfig,
    lora: LoraFile,
    t: Half,
    pixels_per_cell: usize,
}

impl Set<'_> {
    fn engine(&self, form: WeightForm) -> Engine {
        let stream = Stream::open(&OpenOptions::default()).expect("it was opened before");
        let dir = self.dir.join("model").join("transformer");
        let options = EngineOptions { t: self.t, form };
        Engine::open(stream, &dir, &self.config, options).expect("it loads")
    }

    fn factors(&self, strength: f32) -> Vec<LoraFactors> {
        let modules = self.lora.modules.iter();
        modules
            .map(|(path, module)| LoraFactors {
                path: path.clone(),
                rank: module.rank,
                scale: module.scale() * strength,
                a: module.a.clone(),
                b: module.b.clone(),
            })
            .collect()
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::of(self.t, &self.config)
    }
}

/// Runs all cases of a set in both types.
pub fn run(dir: &Path, report: &mut Report) {
    let text = fs_err::read_to_string(dir.join("cases.json")).expect("a fixture set");
    let cases: Cases = serde_json::from_str(&text).expect("a list of cases");
    let config = MmditConfig::from_file(&dir.join("model/transformer/config.json"))
        .expect("a transformer's configuration");
    let layers = config.linears().into_iter();
    let targets: Vec<Target> = layers
        .map(|layer| Target::new(layer.path, layer.in_features, layer.out_features))
        .collect();
    let lora = LoraFile::read(&dir.join(&cases.lora), &targets).expect("a LoRA");
    for t in [Half::Bf16, Half::F16] {
        let set = Set {
            dir,
            config: config.clone(),
            lora: lora.clone(),
            t,
            pixels_per_cell: 1 << (cases.spec.vae.block_out_channels.len() - 1),
        };
        for case in &cases.cases {
            let file = SafetensorsFile::open(&dir.join(&case.file)).expect("the case's file");
            let set_name = dir.file_name().unwrap_or_default().to_string_lossy();
            let label = format!("{set_name}/{} {}", case.name, name(t));
            let kinds: [(&str, Check); 3] = [
                ("transformer_", velocities),
                ("train_micro_", micro_step),
                ("sample_", trajectory),
            ];
            for (prefix, check) in kinds {
                // `sample_prompt` starts from words: the text encoders' matter.
                let has_texts = prefix != "sample_" || file.info("in.prompt_embeds").is_ok();
                if case.name.starts_with(prefix) && has_texts {
                    report.guarded(&label, |report| check(&set, case, &file, &label, report));
                }
            }
        }
    }
}

fn values(file: &SafetensorsFile, name: &str) -> Vec<f32> {
    file.f32(name).expect("the case has the tensor")
}

fn shape_of(file: &SafetensorsFile, name: &str) -> Vec<usize> {
    file.info(name)
        .expect("the case has the tensor")
        .shape
        .clone()
}

fn optional(file: &SafetensorsFile, name: &str) -> Option<Vec<f32>> {
    file.names().any(|n| n == name).then(|| values(file, name))
}

/// Latent cells of a picture.
fn cells(set: &Set<'_>, case: &Case) -> [usize; 2] {
    ["height", "width"].map(|key| {
        let pixels = case.number(key).expect("a size in pixels") as usize;
        // Twice the patch, as the pipeline rounds.
        2 * (pixels / (2 * set.pixels_per_cell))
    })
}

fn velocities(
    set: &Set<'_>,
    case: &Case,
    file: &SafetensorsFile,
    label: &str,
    report: &mut Report,
) {
    let tokens = values(file, "in.hidden_states");
    let text_shape = shape_of(file, "in.encoder_hidden_states");
    let (text, pooled) = (
        values(file, "in.encoder_hidden_states"),
        values(file, "in.pooled_projections"),
    );
    let times = values(file, "in.timestep");
    let guidance = optional(file, "in.guidance");
    let input = VelocityInput {
        shape: Shape {
            b: text_shape[0],
            text: text_shape[1],
            latent_cells: cells(set, case),
        },
        tokens: &tokens,
        text: &text,
        pooled: &pooled,
        times: &times,
        guidance: guidance.as_deref(),
    };
    let mut engine = set.engine(WeightForm::Half);
    let outputs = [
        ("out.velocity", None),
        ("out.velocity_lora_1.0", Some(1.0)),
        ("out.velocity_lora_0.7", Some(0.7)),
    ];
    for (output, strength) in outputs {
        let Some(expected) = optional(file, output) else {
            continue;
        };
        if let Some(strength) = strength {
            let factors = set.factors(strength);
            engine.attach_lora(&factors, false).expect("it fits");
        }
        let found = engine.velocity(&input).expect("it runs");
        let off = distance(&found, &expected);
        report.check(&format!("{label}: {output}"), off, set.accuracy().velocity);
    }
}

fn micro_step(
    set: &Set<'_>,
    case: &Case,
    file: &SafetensorsFile,
    label: &str,
    report: &mut Report,
) {
    let form = match case.params.get("base").and_then(serde_json::Value::as_str) {
        Some("nf4") => WeightForm::Nf4 {
            double_quant: false,
        },
        _ => WeightForm::Half,
    };
    let text_shape = shape_of(file, "in.prompt_embeds");
    let latent_shape = shape_of(file, "out.model_input");
    let (latents, noise) = (values(file, "out.model_input"), values(file, "in.noise"));
    let (sigmas, weights) = (values(file, "out.sigma"), values(file, "out.weighting"));
    let times: Vec<f32> = values(file, "out.timestep")
        .iter()
        .map(|t| t / 1000.0)
        .collect();
    let (text, pooled) = (
        values(file, "in.prompt_embeds"),
        values(file, "in.pooled_prompt_embeds"),
    );
    let b = text_shape[0];
    let scale = case.number("guidance_scale").expect("a guidance scale") as f32;
    let guidance = set.config.guidance_embeds.then(|| vec![scale; b]);
    let batch = MicroBatch {
        shape: Shape {
            b,
            text: text_shape[1],
            latent_cells: [latent_shape[2], latent_shape[3]],
        },
        latents: &latents,
        noise: &noise,
        sigmas: &sigmas,
        times: &times,
        weights: &weights,
        text: &text,
        pooled: &pooled,
        guidance: guidance.as_deref(),
    };
    let mut engine = set.engine(form);
    engine
        .attach_lora(&set.factors(1.0), true)
        .expect("it fits");
    let options = TrainingOptions {
        recompute: Recompute::Everything,
        optimizer: OptimizerKind::AdamW,
        adamw: AdamWConfig {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
        },
        max_grad_norm: 1.0,
    };
    engine.start_training(options).expect("a LoRA is attached");
    // Weightings reach a million; the scale keeps gradients inside half precision's range.
    let largest = weights.iter().copied().fold(1.0, f32::max);
    let factor = LOSS_SCALE / largest;
    engine.micro_step(&batch, factor).expect("it runs");
    let (loss, _) = engine.loss_sum().expect("it is there");
    let expected = values(file, "out.loss")[0];
    let off = f64::from((loss - expected).abs() / expected.abs());
    report.check(
        &format!("{label}: loss"),
        off,
        2.0 * set.accuracy().velocity,
    );
    let found: BTreeMap<String, Vec<f32>> = engine
        .gradients()
        .expect("they are there")
        .into_iter()
        .collect();
    let (mut worst, mut at) = (0.0, String::new());
    let (mut all, mut all_expected) = (Vec::new(), Vec::new());
    for (name, gradient) in &found {
        let expected = values(file, &format!("out.grad.transformer.{name}"));
        let gradient: Vec<f32> = gradient.iter().map(|v| v / factor).collect();
        let off = distance(&gradient, &expected);
        if off > worst {
            (worst, at) = (off, name.clone());
        }
        all.extend(gradient);
        all_expected.extend(expected);
    }
    let together = distance(&all, &all_expected);
    report.check(
        &format!("{label}: all gradients together"),
        together,
        set.accuracy().gradients,
    );
    report.check(
        &format!("{label}: worst gradient, {at}"),
        worst,
        set.accuracy().gradient,
    );
}

fn trajectory(
    set: &Set<'_>,
    case: &Case,
    file: &SafetensorsFile,
    label: &str,
    report: &mut Report,
) {
    let text_shape = shape_of(file, "in.prompt_embeds");
    let (tokens, expected) = (values(file, "in.latents"), values(file, "out.latents"));
    let sigmas = values(file, "out.sigmas");
    let times: Vec<f32> = values(file, "out.timesteps")
        .iter()
        .map(|t| t / 1000.0)
        .collect();
    let (text, pooled) = (
        values(file, "in.prompt_embeds"),
        values(file, "in.pooled_prompt_embeds"),
    );
    let negative = optional(file, "in.negative_prompt_embeds")
        .zip(optional(file, "in.negative_pooled_prompt_embeds"));
    let scale = case.number("true_cfg_scale").unwrap_or(1.0) as f32;
    let guidance = case.number("guidance_scale").map(|g| g as f32);
    let input = SamplerInput {
        shape: Shape {
            b: text_shape[0],
            text: text_shape[1],
            latent_cells: cells(set, case),
        },
        tokens: &tokens,
        sigmas: &sigmas,
        times: &times,
        text: &text,
        pooled: &pooled,
        negative: negative
            .as_ref()
            .filter(|_| scale > 1.0)
            .map(|(text, pooled)| (text.as_slice(), pooled.as_slice(), scale)),
        guidance: guidance.filter(|_| set.config.guidance_embeds),
    };
    let mut engine = set.engine(WeightForm::Half);
    if case.params.get("lora") == Some(&serde_json::Value::Bool(true)) {
        let strength = case.number("lora_scale").unwrap_or(1.0) as f32;
        engine
            .attach_lora(&set.factors(strength), false)
            .expect("it fits");
    }
    engine.start_sampling(&input).expect("it fits");
    let mut worst = 0.0f64;
    let mut more = true;
    for expected in expected.chunks_exact(tokens.len()) {
        assert!(more, "as many steps as the case has");
        more = engine.sample_step().expect("it runs");
        let found = engine.samples().expect("they are there");
        worst = worst.max(distance(&found, expected));
    }
    report.check(
        &format!("{label}: latents, worst of all steps"),
        worst,
        set.accuracy().velocity * f64::from(scale.max(1.0)),
    );
}
