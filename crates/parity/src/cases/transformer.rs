//! `pack_rope`, `time_embed`, `transformer_*`: crate `mmdit`, with adapters read by crate `lora`.

use std::path::Path;

use engine::{Engine, Factors, Input, Opening, RunError};
use lora::{LoraFile, Target};
use mmdit::{
    Adapters, BaseWeights, LoadOptions, Mmdit, MmditConfig, MmditInput, Rope, embed::sinusoids,
    image_ids, patchify, unpatchify,
};
use serde::Deserialize;
use tensor::device::cpu;
use tensor::{Device, Precision, Tensor, from_f32, to_f32};

use crate::checker::{CaseError, CaseRun};
use crate::compare::Values;

/// The set's transformer on `device`, in `f32`.
pub(super) fn open(run: &CaseRun, device: &Device, base: BaseWeights) -> Result<Mmdit, CaseError> {
    let options = LoadOptions {
        device: device.clone(),
        precision: Precision::F32,
        base,
    };
    Ok(Mmdit::open(&run.set.model().join("transformer"), &options)?)
}

/// The layers of a transformer as crate `lora` wants to know them.
pub(super) fn targets(config: &MmditConfig) -> Vec<Target> {
    let layers = config.linears().into_iter();
    layers
        .map(|layer| Target::new(layer.path, layer.in_features, layer.out_features))
        .collect()
}

/// The set's transformer in the run's engine and precision; Burn's is on the CPU.
pub(super) fn open_engine(run: &CaseRun) -> Result<Box<dyn Engine>, CaseError> {
    let opening = Opening {
        dir: &run.set.model().join("transformer"),
        device: cpu(),
        card: 0,
        precision: run.execution.precision,
        base: BaseWeights::Plain,
    };
    Ok(engine::open(run.execution.engine, &opening)?)
}

/// A LoRA's factors at a strength.
pub(super) fn factors(file: &LoraFile, strength: f32) -> Vec<Factors> {
    let modules = file.modules.iter();
    modules
        .map(|(path, module)| Factors {
            path: path.clone(),
            rank: module.rank,
            scale: module.scale() * strength,
            a: module.a.clone(),
            b: module.b.clone(),
        })
        .collect()
}

/// Tokens of a latent, their positions, and the rotation by position.
pub fn pack_rope(run: &mut CaseRun) -> Result<(), CaseError> {
    #[derive(Deserialize)]
    struct Params {
        latent_height: usize,
        latent_width: usize,
        axes_dims_rope: [usize; 3],
        theta: f64,
    }
    let params: Params = run.params()?;
    let config_path = run.set.model().join("transformer").join("config.json");
    let config = MmditConfig::from_file(&config_path)?;
    let expected = format!("{:?} {}", params.axes_dims_rope, params.theta);
    let found = format!("{:?} {}", config.axes_dims_rope, mmdit::config::ROPE_THETA);
    run.text("axes_dims_rope, theta", &expected, &found);

    let latents: Tensor<4> = run.tensor("in.latents", &cpu())?;
    let packed = patchify(latents.clone());
    run.output_tensor("packed", &packed);
    let (h, w) = (params.latent_height, params.latent_width);
    let back = Values::F32(tensor::to_f32(&unpatchify(packed, h, w)));
    let (expected, shape) = run.values("in.latents")?;
    run.against("unpacked", (&expected, &shape), (&back, &latents.dims()));

    let ids = image_ids(h, w);
    run.output_f32("img_ids", ids.concat(), &[ids.len(), 3]);
    let mut positions = positions(run, "in.txt_ids")?;
    positions.extend(ids);
    let shape = [positions.len(), config.attention_head_dim];
    let [cos, sin] = mmdit::rope::angles(&config, &positions);
    run.output_f32("cos", cos, &shape);
    run.output_f32("sin", sin, &shape);
    let rope = Rope::new(&config, &positions, &cpu());
    let q: Tensor<4> = run.tensor("in.q", &cpu())?; // b n h d
    run.output_tensor("q_rotated", &rope.rotate(q));
    Ok(())
}

fn positions(run: &CaseRun, name: &str) -> Result<Vec<[f32; 3]>, CaseError> {
    let (values, shape) = run.f32(name)?;
    let [_, _]: [usize; 2] = run.axes(name, shape)?;
    Ok(values.chunks_exact(3).map(|p| [p[0], p[1], p[2]]).collect())
}

/// Sinusoids of times and guidance scales, and the vector that modulates all blocks.
pub fn time_embed(run: &mut CaseRun) -> Result<(), CaseError> {
    let model = open(run, &cpu(), BaseWeights::Plain)?;
    let (timestep, _) = run.f32("in.timestep")?;
    let guidance = given_guidance(run)?;
    for (name, values) in [
        ("sinusoid_timestep", Some(&timestep)),
        ("sinusoid_guidance", guidance.as_ref()),
    ] {
        if let Some(values) = values {
            let thousandfold: Vec<f32> = values.iter().map(|v| v * 1000.0).collect();
            let waves = sinusoids(&thousandfold);
            let num_channels = waves.len() / values.len().max(1);
            run.output_f32(name, waves, &[values.len(), num_channels]);
        }
    }
    let pooled = run.tensor("in.pooled", &cpu())?;
    let temb = model.time_text_embed(&timestep, guidance.as_deref(), pooled, &Adapters::none());
    run.output_tensor("temb", &temb);
    Ok(())
}

fn given_guidance(run: &CaseRun) -> Result<Option<Vec<f32>>, CaseError> {
    Ok(if run.has("in.guidance") {
        Some(run.f32("in.guidance")?.0)
    } else {
        None
    })
}

/// What a forward pass of a case is given.
struct Inputs {
    hidden_states: Tensor<3>,
    encoder_hidden_states: Tensor<3>,
    pooled_projections: Tensor<2>,
    timestep: Vec<f32>,
    guidance: Option<Vec<f32>>,
    positions: Vec<[f32; 3]>,
    rope: Rope,
}

impl Inputs {
    fn read(run: &CaseRun, config: &MmditConfig) -> Result<Self, CaseError> {
        let mut positions_of_all = positions(run, "in.txt_ids")?;
        positions_of_all.extend(positions(run, "in.img_ids")?);
        Ok(Self {
            hidden_states: run.tensor("in.hidden_states", &cpu())?,
            encoder_hidden_states: run.tensor("in.encoder_hidden_states", &cpu())?,
            pooled_projections: run.tensor("in.pooled_projections", &cpu())?,
            timestep: run.f32("in.timestep")?.0,
            guidance: given_guidance(run)?,
            rope: Rope::new(config, &positions_of_all, &cpu()),
            positions: positions_of_all,
        })
    }

    fn as_input(&self) -> MmditInput<'_> {
        MmditInput {
            hidden_states: self.hidden_states.clone(),
            encoder_hidden_states: self.encoder_hidden_states.clone(),
            pooled_projections: self.pooled_projections.clone(),
            timestep: &self.timestep,
            guidance: self.guidance.as_deref(),
            rope: &self.rope,
        }
    }
}

/// The engine's velocity on a case's inputs, under factors or without any.
fn velocity_of(
    engine: &mut dyn Engine,
    inputs: &Inputs,
    factors: &[Factors],
) -> Result<Tensor<3>, RunError> {
    engine.set_lora(factors)?;
    let [b, n, _] = inputs.hidden_states.dims();
    let velocity = engine.velocity(&Input {
        hidden_states: &to_f32(&inputs.hidden_states),
        encoder_hidden_states: &to_f32(&inputs.encoder_hidden_states),
        pooled_projections: &to_f32(&inputs.pooled_projections),
        timestep: &inputs.timestep,
        guidance: inputs.guidance.as_deref(),
        positions: &inputs.positions,
    })?;
    let shape = [b, n, engine.config().velocity_channels()];
    Ok(from_f32(velocity, shape, &cpu()))
}

/// The velocity on a case's inputs, under a LoRA file at a strength or without any.
pub fn velocity(run: &CaseRun, lora: Option<(&Path, f32)>) -> Result<Tensor<3>, CaseError> {
    let mut engine = open_engine(run)?;
    let inputs = Inputs::read(run, engine.config())?;
    let factors = match lora {
        Some((path, strength)) => {
            let file = LoraFile::read(path, &targets(engine.config()))?;
            factors(&file, strength)
        }
        None => Vec::new(),
    };
    Ok(velocity_of(engine.as_mut(), &inputs, &factors)?)
}

/// One forward pass: without a LoRA (block by block where the reference has that), and with the set's LoRA, read
/// from both of its files, at every strength that the reference has.
pub fn forward(run: &mut CaseRun) -> Result<(), CaseError> {
    let model = open(run, &cpu(), BaseWeights::Plain)?;
    let inputs = Inputs::read(run, model.config())?;
    let mut engine = open_engine(run)?;
    let velocity = velocity_of(engine.as_mut(), &inputs, &[])?;
    run.output_tensor("velocity", &velocity);
    let (_, trace) = model.forward_traced(&inputs.as_input(), &Adapters::none());
    if run.has("out.temb") {
        run.output_tensor("temb", &trace.temb);
        run.output_tensor("norm_out", &trace.norm_out);
        for (kind, blocks) in [("double", &trace.double), ("single", &trace.single)] {
            for (index, [txt, img]) in blocks.iter().enumerate() {
                run.output_tensor(&format!("{kind}.{index}.txt"), txt);
                run.output_tensor(&format!("{kind}.{index}.img"), img);
            }
        }
    }

    let targets = targets(model.config());
    let diffusers = LoraFile::read(&run.set.lora(), &targets)?;
    let kohya = LoraFile::read(&run.set.lora_kohya(), &targets)?;
    for full in run.names("out.velocity_lora_") {
        let output = &full["out.".len()..];
        let Ok(strength) = output["velocity_lora_".len()..].parse() else {
            continue; // not compared, so it ends as a failure
        };
        let found = velocity_of(engine.as_mut(), &inputs, &factors(&diffusers, strength))?;
        run.output_tensor(output, &found);
        let found = velocity_of(engine.as_mut(), &inputs, &factors(&kohya, strength))?;
        let values = Values::F32(tensor::to_f32(&found));
        let (expected, shape) = run.values(&full)?;
        let name = format!("{output} (kohya keys)");
        run.against(&name, (&expected, &shape), (&values, &found.dims()));
    }
    Ok(())
}
