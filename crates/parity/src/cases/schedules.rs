//! `schedule`, `euler_step`, `train_density`: crate `flow-matching`.

use std::collections::{BTreeMap, BTreeSet};

use flow_matching::{
    Density, InferenceSchedule, Scheduler, SchedulerConfig, TimeShift, Weighting, euler_step,
    image_seq_len,
};
use serde::Deserialize;
use serde_json::Value;
use tensor::Tensor;
use tensor::device::cpu;

use crate::checker::{CaseError, CaseRun};
use crate::compare::Values;

/// Pixels per latent cell that the rows' sizes are meant for.
const SCALE_FACTOR_PX: usize = 8;

/// A scheduler from a configuration that stands in `cases.json`.
fn scheduler(run: &CaseRun, config: &Value) -> Result<Scheduler, CaseError> {
    let path = run.set.dir().join("cases.json");
    let config = SchedulerConfig::from_json(&path, &config.to_string())?;
    Ok(Scheduler::new(config))
}

/// Hands over both halves of a schedule.
pub(super) fn output_schedule(run: &mut CaseRun, prefix: &str, schedule: &InferenceSchedule) {
    for (name, values) in [
        ("sigmas", &schedule.sigmas),
        ("timesteps", &schedule.timesteps),
    ] {
        run.output_f32(&format!("{prefix}{name}"), values.clone(), &[values.len()]);
    }
}

#[derive(Deserialize)]
struct ScheduleParams {
    rows: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    key: String,
    config: Value,
    steps: usize,
    height: usize,
    width: usize,
    image_seq_len: usize,
    mu: f32,
}

/// Sampling schedules by configuration, steps and size, and the configurations' training tables.
pub fn schedule(run: &mut CaseRun) -> Result<(), CaseError> {
    let params: ScheduleParams = run.params()?;
    let mut trained = BTreeSet::new();
    for row in &params.rows {
        let scheduler = scheduler(run, &row.config)?;
        let found = image_seq_len(row.height, row.width, SCALE_FACTOR_PX);
        let expected = row.image_seq_len.to_string();
        run.text(
            &format!("{}.image_seq_len", row.key),
            &expected,
            &found.to_string(),
        );
        if let shift @ TimeShift::Dynamic { .. } = scheduler.config().time_shift {
            let expected = Values::F32(vec![row.mu]);
            let found = Values::F32(vec![shift.mu(found) as f32]);
            run.against(
                &format!("{}.mu", row.key),
                (&expected, &[1]),
                (&found, &[1]),
            );
        }
        let schedule = scheduler.inference(row.steps, found);
        output_schedule(run, &format!("{}.", row.key), &schedule);

        let config_name = row.key.split('.').next().unwrap_or_default();
        if trained.insert(config_name) {
            let (sigmas, timesteps) = (scheduler.train_sigmas(), scheduler.train_timesteps());
            let name = |what| format!("{config_name}.train.{what}");
            run.output_f32(&name("sigmas"), sigmas.to_vec(), &[sigmas.len()]);
            run.output_f32(&name("timesteps"), timesteps.to_vec(), &[timesteps.len()]);
        }
    }
    Ok(())
}

/// Consecutive steps along given velocities.
pub fn euler(run: &mut CaseRun) -> Result<(), CaseError> {
    #[derive(Deserialize)]
    struct Params {
        config: Value,
        steps: usize,
        image_seq_len_for_mu: usize,
    }
    let params: Params = run.params()?;
    let scheduler = scheduler(run, &params.config)?;
    let schedule = scheduler.inference(params.steps, params.image_seq_len_for_mu);
    output_schedule(run, "", &schedule);
    let velocities: Tensor<4> = run.tensor("in.velocity", &cpu())?;
    let mut sample: Tensor<3> = run.tensor("in.sample", &cpu())?;
    let mut samples = Vec::new();
    for (sigmas, velocity) in schedule.sigmas.windows(2).zip(velocities.iter_dim(0)) {
        sample = euler_step(sample, velocity.squeeze_dim(0), sigmas[0], sigmas[1]);
        samples.push(sample.clone());
    }
    run.output_tensor("samples", &Tensor::stack::<4>(samples, 0));
    Ok(())
}

/// What a weighting scheme of the reference is here: how noise levels are drawn, and what the loss weighs.
#[derive(Debug, thiserror::Error)]
#[error("weighting scheme `{found}` is none of none, sigma_sqrt, logit_normal, cosmap, mode")]
struct UnknownScheme {
    found: String,
}

/// The reference's scheme as a weighting.
pub(super) fn weighting(scheme: &str) -> Result<Weighting, CaseError> {
    match scheme {
        "none" | "logit_normal" | "mode" => Ok(Weighting::None),
        "sigma_sqrt" => Ok(Weighting::SigmaSqrt),
        "cosmap" => Ok(Weighting::Cosmap),
        found => Err(UnknownScheme {
            found: found.to_owned(),
        }
        .into()),
    }
}

#[derive(Deserialize)]
struct DensityParams {
    logit_mean: f32,
    logit_std: f32,
    mode_scale: f32,
}

/// From raw random numbers to `u`, and from the reference's `u` to table entries and weights.
pub fn density(run: &mut CaseRun) -> Result<(), CaseError> {
    let params: DensityParams = run.params()?;
    let path = run.set.model().join("scheduler/scheduler_config.json");
    let scheduler = Scheduler::new(SchedulerConfig::from_file(&path)?);
    for full in run.names("in.") {
        let Some(scheme) = full["in.".len()..].strip_suffix(".raw") else {
            continue;
        };
        let density = match scheme {
            "logit_normal" => Density::LogitNormal {
                mean: params.logit_mean,
                std: params.logit_std,
            },
            "mode" => Density::Mode {
                scale: params.mode_scale,
            },
            _ => Density::Uniform,
        };
        let (raw, shape) = run.f32(&full)?;
        let u = raw.iter().map(|&raw| density.u(raw)).collect();
        run.output_f32(&format!("{scheme}.u"), u, &shape);

        // A u that is off in its last bit may fall on the other side of a table entry; so the reference's is used.
        let (u, _) = run.f32(&format!("out.{scheme}.u"))?;
        let weighting = weighting(scheme)?;
        let mut points: BTreeMap<&str, Vec<f32>> = BTreeMap::new();
        let mut indices = Vec::new();
        for u in u {
            let point = scheduler.training_point(u, weighting);
            indices.push(point.index as i32);
            for (name, value) in [
                ("timestep", point.timestep),
                ("sigma", point.sigma),
                ("weighting", point.weight),
            ] {
                points.entry(name).or_default().push(value);
            }
        }
        run.output(&format!("{scheme}.index"), Values::I32(indices), &shape);
        for (name, values) in points {
            run.output_f32(&format!("{scheme}.{name}"), values, &shape);
        }
    }
    Ok(())
}
