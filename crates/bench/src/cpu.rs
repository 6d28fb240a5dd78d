//! A training step and a sampling step of the base `small` on the CPU.
//!
//! 128 px through a VAE ÷4 are 256 image tokens, with 64 text tokens; 2 double and 3 single blocks of width 256; LoRA
//! of rank 4 on the recipe's targets; a training step is a batch of four with noising, loss, backward pass, clipping
//! and AdamW. Weights are random. Both sides take turns of a few steps, so that a machine that slows down meanwhile slows
//! both; the first turn of each is not counted.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use console::print_line;
use engine::cpu::Cpu;
use engine::portable::{Portable, PortableGradients};
use engine::{
    Engine, EngineName, Factors, Gradients, HostEngine, Input, LoraOptimizer, LossScaler,
    MicroBatch, RunError, TrainableLora, TrainingEngine,
};
use engine_cpu::Transformer;
use flow_matching::{Purpose, Stream, TrainingPoint};
use lora::{LoraModule, Target};
use mmdit::{BaseWeights, LoadOptions, Mmdit, MmditConfig};
use quant::{AdamWConfig, OptimizerKind};
use random_base::{Part, initial_values};
use serde::Serialize;
use serde_json::{Value, json};
use tensor::device::{cpu, training};
use tensor::{Device, Precision, Weights};

use crate::finish;
use crate::peer::{Peer, PeerError};

const TEXT_TOKENS: usize = 64;
const LATENT_CELLS: usize = 32;
const BATCH: usize = 4;
const RANK: usize = 4;
const TARGETS: [&str; 4] = [".to_q", ".to_k", ".to_v", ".to_out.0"];

/// Steps that one side takes before the other's turn.
const STEPS_A_TURN: usize = 4;

/// As long as PyTorch's threads wait actively for more work.
const SPIN: Duration = Duration::from_millis(300);

/// Figures by PyTorch's names for them.
const FIGURES: [&str; 4] = [
    "training_step",
    "sampling_step",
    "sampling_step_of_4",
    "sampling_step_with_lora",
];

/// What is measured.
#[derive(Clone, Debug)]
pub struct CpuBench {
    /// An interpreter with torch, diffusers and peft, if PyTorch is to be measured.
    pub python: Option<PathBuf>,
    /// `docs/benchmarks/cpu_step.py`.
    pub script: PathBuf,
    /// Steps of each kind, at least one, rounded up to whole turns.
    pub repeats: usize,
    /// Whether the portable engine is measured too.
    pub portable: bool,
    /// Print one JSON document on stdout, and nothing else there.
    pub json: bool,
}

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
enum BenchError {
    #[error("there is no {}, PyTorch's side of the measurement", path.display())]
    NoScript { path: PathBuf },
    #[error(transparent)]
    Peer(#[from] PeerError),
    #[error(transparent)]
    Transformer(#[from] mmdit::MmditError),
    #[error(transparent)]
    Engine(#[from] RunError),
    #[error(transparent)]
    Config(#[from] mmdit::ConfigError),
    #[error("cannot write the configuration of the transformer")]
    Write(#[from] std::io::Error),
}

impl pipeline::StageError for BenchError {
    fn kind(&self) -> pipeline::FailureKind {
        match self {
            Self::NoScript { .. } => pipeline::FailureKind::BadInput,
            Self::Peer(error) => error.kind(),
            _ => pipeline::FailureKind::Failed,
        }
    }

    fn help(&self) -> Option<String> {
        match self {
            Self::NoScript { .. } => Some(
                "start this through `cargo xtask` or in the root of the repository, or name the script with --script \
                 (docs/benchmarks/cpu_step.py of the repository)"
                    .to_owned(),
            ),
            Self::Peer(error) => error.help(),
            _ => None,
        }
    }
}

/// Median and least, in seconds.
#[derive(Clone, Copy, Debug, Serialize)]
struct Seconds {
    median_s: f64,
    least_s: f64,
    repeats: usize,
}

impl Seconds {
    fn of(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        Self {
            median_s: times.get(times.len() / 2).copied().unwrap_or(f64::NAN),
            least_s: times.first().copied().unwrap_or(f64::NAN),
            repeats: times.len(),
        }
    }
}

/// Measures and prints; gives the exit code.
pub fn run(bench: &CpuBench) -> u8 {
    finish(measure(bench), bench.json, tell)
}

fn tell(document: &Value) {
    let milliseconds = |value: &Value| {
        value["median_s"]
            .as_f64()
            .map(|s| format!("{:.1} ms", 1e3 * s))
    };
    for figure in FIGURES {
        let mut line = format!("{figure}:");
        for engine in ["cpu", "portable", "pytorch"] {
            if let Some(time) = milliseconds(&document[engine][figure]) {
                line += &format!(" {engine} {time}");
            }
        }
        if let Some(ratio) = document["times_pytorch_speed"][figure].as_f64() {
            line += &format!(" ({ratio:.2} times PyTorch's speed)");
        }
        print_line(&line);
    }
}

fn measure(bench: &CpuBench) -> Result<Value, BenchError> {
    if bench.python.is_some() && !bench.script.is_file() {
        // The interpreter would be blamed for it.
        return Err(BenchError::NoScript {
            path: bench.script.clone(),
        });
    }
    let model = Model::new();
    let mut names = vec![EngineName::Cpu];
    if bench.portable {
        names.push(EngineName::Portable);
    }
    let mut contestants = names
        .into_iter()
        .map(|name| Contestant::new(name, &model))
        .collect::<Result<Vec<_>, _>>()?;
    let num_threads = rayon::current_num_threads();
    let mut peer = match &bench.python {
        Some(python) => Some(Peer::start(python, &bench.script, num_threads)?),
        None => None,
    };
    let mut peer_times: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for round in 0..=bench.repeats.div_ceil(STEPS_A_TURN) {
        for figure in FIGURES {
            for contestant in &mut contestants {
                contestant.take_turn(figure, round > 0)?;
            }
            if let Some(peer) = &mut peer {
                let times = peer.times(figure, STEPS_A_TURN)?;
                // Its threads go on spinning for a while when their work is done.
                std::thread::sleep(SPIN);
                if round > 0 {
                    peer_times.entry(figure).or_default().extend(times);
                }
            }
        }
    }

    let mut document = json!({
        "model": "small: 2 double and 3 single blocks of width 256, 256 image and 64 text tokens",
        "threads": num_threads,
        "processor": processor(),
        "training_batch": BATCH,
        "lora_rank": RANK,
    });
    for contestant in &contestants {
        let figures: BTreeMap<&str, Seconds> = contestant
            .times
            .iter()
            .map(|(figure, times)| (*figure, Seconds::of(times.clone())))
            .collect();
        document[contestant.name.to_string()] = json!(figures);
    }
    if let Some(peer) = &peer {
        let figures: BTreeMap<&str, Seconds> = peer_times
            .into_iter()
            .map(|(figure, times)| (figure, Seconds::of(times)))
            .collect();
        let ratios: BTreeMap<&str, f64> = figures
            .iter()
            .map(|(figure, theirs)| {
                let ours = document["cpu"][figure]["median_s"].as_f64();
                (*figure, theirs.median_s / ours.unwrap_or(f64::NAN))
            })
            .collect();
        document["pytorch"] = json!(figures);
        document["pytorch"]["about"] = peer.about.clone();
        document["times_pytorch_speed"] = json!(ratios);
    }
    Ok(document)
}

/// What the system calls the processor, where it says so.
fn processor() -> Option<String> {
    let text = fs_err::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The transformer of the base `small`, in memory.
struct Model {
    config: MmditConfig,
    weights: Weights,
}

impl Model {
    fn new() -> Self {
        let config = MmditConfig::small();
        let parameters = config.parameters().into_iter();
        let weights = Weights::from_values(parameters.map(|spec| {
            let values = initial_values(Part::Transformer, &spec, 0);
            (spec, values)
        }));
        Self { config, weights }
    }

    fn portable(&self, device: Device) -> Result<Mmdit, mmdit::MmditError> {
        let options = LoadOptions {
            device,
            precision: Precision::F32,
            base: BaseWeights::Plain,
        };
        Mmdit::load(&self.weights, self.config.clone(), &options)
    }

    fn by_hand(&self) -> Result<Cpu, mmdit::MmditError> {
        let transformer =
            Transformer::load(&self.weights, self.config.clone(), BaseWeights::Plain)?;
        Ok(Cpu::new(transformer))
    }

    fn lora(&self) -> TrainableLora {
        let layers = self.config.linears().into_iter();
        let targets =
            layers.filter(|layer| TARGETS.iter().any(|target| layer.path.ends_with(target)));
        let modules = targets.map(|layer| {
            let mut stream = Stream::new(0, Purpose::LoraInit, 0, &layer.path);
            let target = Target::new(layer.path, layer.in_features, layer.out_features);
            let module = LoraModule::gaussian(RANK, RANK as f32, &target, || stream.normal())
                .expect("every layer is wider than the rank");
            (target.path, module)
        });
        TrainableLora::from_modules(modules.collect())
    }

    fn batch(&self, samples: usize) -> MicroBatch {
        let channels = self.config.in_channels / 4;
        let normals =
            |key: &str, count: usize| Stream::new(0, Purpose::Noise, 0, key).normals(count);
        let point = |sample: usize| {
            let sigma = (sample as f32 + 0.5) / samples as f32;
            TrainingPoint {
                index: 0,
                timestep: 1000.0 * sigma,
                sigma,
                weight: 1.0,
            }
        };
        let cells = LATENT_CELLS * LATENT_CELLS;
        MicroBatch {
            shape: [samples, channels, LATENT_CELLS, LATENT_CELLS],
            model_input: normals("latents", samples * channels * cells),
            noise: normals("noise", samples * channels * cells),
            points: (0..samples).map(point).collect(),
            text_shape: [TEXT_TOKENS, self.config.joint_attention_dim],
            prompt_embeds: normals(
                "text",
                samples * TEXT_TOKENS * self.config.joint_attention_dim,
            ),
            pooled: normals("pooled", samples * self.config.pooled_projection_dim),
        }
    }
}

/// One engine with everything that it is measured on.
struct Contestant {
    name: EngineName,
    drawing: Box<dyn Engine>,
    training: HostEngine,
    factors: Vec<Factors>,
    batches: [MicroBatch; 2],
    times: BTreeMap<&'static str, Vec<f64>>,
}

impl Contestant {
    fn new(name: EngineName, model: &Model) -> Result<Self, BenchError> {
        let (drawing, gradients): (Box<dyn Engine>, Box<dyn Gradients>) = if name == EngineName::Cpu
        {
            (Box::new(model.by_hand()?), Box::new(model.by_hand()?))
        } else {
            (
                Box::new(Portable::new(model.portable(cpu())?)),
                Box::new(PortableGradients::new(model.portable(training(&cpu()))?)),
            )
        };
        let lora = model.lora();
        let config = AdamWConfig {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 1e-4,
        };
        let optimizer = LoraOptimizer::new(
            OptimizerKind::AdamW,
            config,
            1.0,
            LossScaler::fixed(),
            &lora,
        );
        Ok(Self {
            name,
            drawing,
            factors: lora.factors(),
            training: HostEngine::new(gradients, lora, optimizer),
            batches: [model.batch(1), model.batch(BATCH)],
            times: BTreeMap::new(),
        })
    }

    /// Takes some steps of a figure, and keeps their times if they count.
    fn take_turn(&mut self, figure: &'static str, counts: bool) -> Result<(), RunError> {
        let [one, four] = &self.batches;
        let lora: &[Factors] = match figure {
            "sampling_step_with_lora" => &self.factors,
            _ => &[],
        };
        self.drawing.set_lora(lora)?;
        for _ in 0..STEPS_A_TURN {
            let start = Instant::now();
            match figure {
                "training_step" => {
                    self.training.step(std::slice::from_ref(four), 1.0, 1e-3)?;
                }
                "sampling_step_of_4" => draw(self.drawing.as_mut(), four)?,
                _ => draw(self.drawing.as_mut(), one)?,
            }
            if counts {
                let times = self.times.entry(figure).or_default();
                times.push(start.elapsed().as_secs_f64());
            }
        }
        Ok(())
    }
}

/// A sampling step: the velocity and the Euler update.
fn draw(engine: &mut dyn Engine, batch: &MicroBatch) -> Result<(), RunError> {
    let [mut latents, _] = batch.noisy_and_target();
    let times: Vec<f32> = batch.points.iter().map(|point| point.sigma).collect();
    let velocity = engine.velocity(&Input {
        hidden_states: &latents,
        encoder_hidden_states: &batch.prompt_embeds,
        pooled_projections: &batch.pooled,
        timestep: &times,
        guidance: None,
        positions: &batch.positions(),
    })?;
    for (latent, velocity) in latents.iter_mut().zip(velocity) {
        *latent -= 0.02 * velocity;
    }
    std::hint::black_box(latents);
    Ok(())
}

#[cfg(test)]
mod tests {
    use pipeline::{FailureKind, StageError as _};

    use super::*;

    #[test]
    fn an_absent_script_is_named_before_anything_is_measured() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let bench = CpuBench {
            python: Some("python3".into()),
            script: dir.path().join("cpu_step.py"),
            repeats: 1,
            portable: false,
            json: true,
        };
        let error = measure(&bench).expect_err("there is no script");
        assert_eq!(error.kind(), FailureKind::BadInput);
        assert!(error.to_string().contains("cpu_step.py"), "{error}");
        assert!(error.help().is_some_and(|help| help.contains("--script")));
    }
}
