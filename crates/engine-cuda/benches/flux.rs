//! FLUX.1-dev's shapes on random weights: steps of training and sampling, attention, products, by time and memory.
//!
//! ```text
//! flux [--only SECTION[,SECTION…]] [--json FILE]     sections: plan attention products nf4 bf16
//!                                             (`plan` needs no GPU)
//! ```
//!
//! Weights are N(0, 0.02), made on the device: speed and memory only. Times are medians; each is taken after the work
//! ran three times (by launches, recorded, replayed). `step` is what a training step of one batch costs with everything:
//! copying the batch to the device, forward, backward, clipping, AdamW.

use std::time::Instant;

use engine_cuda::gemm::{Matrix, Output, Product, WORKSPACE_BYTES};
use engine_cuda::model::{
    Engine, EngineOptions, MicroBatch, NormalWeights, Recompute, SamplerInput, Shape,
    TrainingOptions, WeightForm,
};
use engine_cuda::ops::attention::{self, AttentionShape, Strided};
use engine_cuda::plan::{LoraSize, PlanRequest, fit, lora_sizes, plan, untrained};
use engine_cuda::stream::{OpenOptions, Rates, Work};
use engine_cuda::{CudaError, Half, Stream};
use mmdit::MmditConfig;
use quant::{AdamWConfig, OptimizerKind};
use serde_json::{Map, Value, json};

/// What the bench does where a call fails: says so and goes on with the next line.
type Outcome<V = ()> = Result<V, CudaError>;

const TARGETS: [&str; 4] = ["to_q", "to_k", "to_v", "to_out.0"];
const TEXT: usize = 512;
const STEPS: usize = 7;

/// Lines of the table, by name.
struct Table {
    rows: Map<String, Value>,
}

impl Table {
    fn row(&mut self, name: &str, value: Value) {
        println!("{name} {value}");
        self.rows.insert(name.to_owned(), value);
    }

    fn guarded(&mut self, name: &str, run: impl FnOnce(&mut Self) -> Outcome) {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(self)));
        match outcome {
            Ok(Ok(())) => {}
            Ok(Err(error)) => self.row(name, json!({ "error": error.to_string() })),
            Err(_) => self.row(name, json!({ "error": "broke off" })),
        }
    }
}

fn open() -> Outcome<Stream> {
    Stream::open(&OpenOptions::default())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Milliseconds of `work` on the device, `inner` runs between two events.
fn device_ms(stream: &Stream, inner: usize, mut work: impl FnMut() -> Outcome) -> Outcome<f64> {
    work()?;
    let mut times = Vec::new();
    for _ in 0..STEPS {
        let before = stream.event()?;
        for _ in 0..inner {
            work()?;
        }
        times.push(f64::from(stream.event()?.milliseconds_since(&before)?) / inner as f64);
    }
    Ok(median(times))
}

fn main() {
    let mut only: Option<Vec<String>> = None;
    let mut file = None;
    let mut given = std::env::args().skip(1);
    while let Some(argument) = given.next() {
        match argument.as_str() {
            "--only" => {
                only = given
                    .next()
                    .map(|list| list.split(',').map(str::to_owned).collect());
            }
            "--json" => file = given.next(),
            _ => {}
        }
    }
    let wanted = |section: &str| {
        only.as_ref()
            .is_none_or(|only| only.iter().any(|name| name == section))
    };
    let mut table = Table { rows: Map::new() };
    if wanted("plan") {
        table.guarded("plan", plan_rows);
    }
    let on_the_card = ["attention", "products", "nf4", "bf16"];
    if on_the_card.iter().any(|section| wanted(section)) {
        run_on_the_card(&mut table, &wanted);
    }
    if let Some(file) = file {
        let text = serde_json::to_string_pretty(&table.rows).expect("a map is JSON");
        if let Err(error) = fs_err::write(&file, text) {
            eprintln!("{error}");
            std::process::exit(1);
        }
    }
}

fn run_on_the_card(table: &mut Table, wanted: &dyn Fn(&str) -> bool) {
    match open() {
        Ok(stream) => {
            let facts = stream.facts();
            table.row(
                "device",
                json!({
                    "name": facts.name,
                    "memory_bytes": facts.total_bytes,
                    "driver": facts.driver_version,
                }),
            );
        }
        Err(error) => {
            eprintln!("this bench needs a card: {error}");
            std::process::exit(1);
        }
    }
    if wanted("attention") {
        table.guarded("attention", attention_rows);
    }
    if wanted("products") {
        table.guarded("products", product_rows);
    }
    let nf4 = WeightForm::Nf4 { double_quant: true };
    if wanted("nf4") {
        table.guarded("nf4", |table| model_rows(table, "nf4", nf4));
    }
    if wanted("bf16") {
        table.guarded("bf16", |table| model_rows(table, "bf16", WeightForm::Half));
    }
}

/// What twelve ways of training are predicted to take.
fn plan_rows(table: &mut Table) -> Outcome {
    let config = MmditConfig::flux_dev();
    let lora = lora_sizes(&config, &TARGETS, 4);
    for (name, form) in [
        ("nf4", WeightForm::Nf4 { double_quant: true }),
        ("bf16", WeightForm::Half),
    ] {
        for b in [1, 2, 4] {
            for recompute in [Recompute::Everything, Recompute::Nothing] {
                let options = EngineOptions {
                    t: Half::Bf16,
                    form,
                };
                let request = request(&config, options, &lora, b, recompute);
                let planned = plan(&request, Rates::H100)?;
                let parts: Map<String, Value> = planned
                    .parts
                    .iter()
                    .map(|(part, bytes)| ((*part).to_owned(), json!(bytes)))
                    .collect();
                let by_kind: Map<String, Value> = Work::ALL
                    .iter()
                    .zip(planned.micro_step)
                    .map(|(work, tally)| {
                        let row = json!({
                            "s": tally.seconds,
                            "launches": tally.launches,
                            "tflop": tally.flops / 1e12,
                            "gbyte": tally.bytes / 1e9,
                        });
                        (format!("{work:?}"), row)
                    })
                    .collect();
                table.row(
                    &format!("plan_{name}_b{b}_{recompute:?}"),
                    json!({
                        "gigabytes": planned.total_bytes() as f64 / 1e9,
                        "micro_step_s": planned.micro_step_s(),
                        "parts": parts,
                        "by_kind": by_kind,
                    }),
                );
            }
        }
    }
    Ok(())
}

fn attention_rows(table: &mut Table) -> Outcome {
    let stream = open()?;
    let (h, dh) = (24, 128);
    for n in [1536, 4608] {
        for t in [Half::Bf16, Half::F16] {
            let d = h * dh;
            let buffers = (0..8)
                .map(|_| stream.allocate(2 * n * d, "attention"))
                .collect::<Outcome<Vec<_>>>()?;
            for (i, buffer) in buffers.iter().enumerate() {
                let (view, seed) = (buffer.view(), i as u64);
                engine_cuda::ops::elementwise::fill_normal(&stream, t, view, n * d, seed, 1.0)?;
            }
            let lse = stream.allocate(4 * h * n, "attention")?;
            let strided = |i: usize| Strided {
                view: buffers[i].view(),
                token: d,
                head: dh,
                batch: n * d,
            };
            let shape = AttentionShape {
                b: 1,
                h,
                n,
                dh,
                scale: (dh as f32).sqrt().recip(),
            };
            let scratch =
                stream.allocate(attention::backward_scratch_bytes(&shape), "attention")?;
            let [q, k, v, o, d_o, dq, dk, dv] = std::array::from_fn(strided);
            let forward = || attention::forward(&stream, t, o, lse.view(), q, k, v, shape);
            let backward = || {
                let (lse, scratch) = (lse.view(), scratch.view());
                attention::backward(&stream, t, dq, dk, dv, d_o, o, lse, q, k, v, scratch, shape)
            };
            let flops = 4.0 * (h * dh) as f64 * (n as f64).powi(2);
            let forward_ms = device_ms(&stream, 20, forward)?;
            let backward_ms = device_ms(&stream, 20, backward)?;
            table.row(
                &format!("attention_24x{n}x128_{t:?}"),
                json!({
                    "forward_ms": forward_ms,
                    "backward_ms": backward_ms,
                    "forward_tflops": flops / forward_ms / 1e9,
                    "backward_tflops": 2.5 * flops / backward_ms / 1e9,
                }),
            );
        }
    }
    Ok(())
}

fn product_rows(table: &mut Table) -> Outcome {
    let stream = open()?;
    let t = Half::Bf16;
    for (m, n, k) in [
        (1536, 21504, 3072),
        (1536, 3072, 15360),
        (1536, 12288, 3072),
        (1024, 9216, 3072),
        (512, 9216, 3072),
        (1024, 3072, 3072),
        (6144, 21504, 3072),
        (6144, 3072, 15360),
        (1536, 16, 3072),
        (1536, 9216, 16),
        (1, 18432, 3072),
    ] {
        let a = stream.allocate(2 * m * k, "A")?;
        let b = stream.allocate(2 * n * k, "B")?;
        let c = stream.allocate(2 * m * n, "C")?;
        for (buffer, count) in [(&a, m * k), (&b, n * k)] {
            let view = buffer.view();
            engine_cuda::ops::elementwise::fill_normal(&stream, t, view, count, 1, 1.0)?;
        }
        let mut row = Map::new();
        for (name, b_matrix) in [
            ("forward", Matrix::transposed(b.view(), k)),
            ("backward", Matrix::rows(b.view(), n)),
        ] {
            let product = Product {
                m,
                n,
                k,
                a: Matrix::rows(a.view(), k),
                b: b_matrix,
                c: c.view(),
                c_stride: n,
                output: Output::Half,
                alpha: 1.0,
                beta: 0.0,
                bias: None,
            };
            let ms = device_ms(&stream, 20, || stream.product(t, &product))?;
            let tflops = 2.0 * (m * n) as f64 * k as f64 / ms / 1e9;
            row.insert(name.to_owned(), json!({ "ms": ms, "tflops": tflops }));
        }
        table.row(&format!("product_{m}x{n}x{k}"), Value::Object(row));
    }
    Ok(())
}

/// Random host values of a batch.
struct Batch {
    shape: Shape,
    latents: Vec<f32>,
    per_sample: Vec<f32>,
    text: Vec<f32>,
    pooled: Vec<f32>,
}

impl Batch {
    fn new(config: &MmditConfig, shape: Shape) -> Self {
        let mut state = 1u32;
        let mut numbers = |count: usize| -> Vec<f32> {
            (0..count)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) as f32 / (1 << 23) as f32 - 1.0
                })
                .collect()
        };
        Self {
            shape,
            latents: numbers(shape.rows(1) * config.in_channels),
            per_sample: vec![0.5; shape.b],
            text: numbers(shape.rows(0) * config.joint_attention_dim),
            pooled: numbers(shape.b * config.pooled_projection_dim),
        }
    }

    fn micro(&self) -> MicroBatch<'_> {
        MicroBatch {
            shape: self.shape,
            latents: &self.latents,
            noise: &self.latents,
            sigmas: &self.per_sample,
            times: &self.per_sample,
            weights: &self.per_sample,
            text: &self.text,
            pooled: &self.pooled,
            guidance: Some(&self.per_sample),
        }
    }
}

fn shape(b: usize, pixels: usize) -> Shape {
    Shape {
        b,
        text: TEXT,
        latent_cells: [pixels / 8, pixels / 8],
    }
}

fn model_rows(table: &mut Table, name: &str, form: WeightForm) -> Outcome {
    let config = MmditConfig::flux_dev();
    let options = EngineOptions {
        t: Half::Bf16,
        form,
    };
    let stream = open()?;
    let (free_before, _) = stream.memory()?;
    let start = Instant::now();
    let weights = NormalWeights { std: 0.02 };
    let mut engine = Engine::load(stream, &config, &weights, options)?;
    table.row(
        &format!("{name}_load"),
        json!({ "s": start.elapsed().as_secs_f64() }),
    );
    sampling_rows(table, name, &mut engine)?;
    let lora = lora_sizes(&config, &TARGETS, 4);
    engine.attach_lora(&untrained(&config, &lora, || 0.01), true)?;
    let mut lines = vec![
        ("recompute_b1", 1, Recompute::Everything),
        ("keep_b1", 1, Recompute::Nothing),
        ("recompute_b4", 4, Recompute::Everything),
        ("keep_b4", 4, Recompute::Nothing),
    ];
    if let Some((recompute, _)) = fit(
        &request(&config, options, &lora, 4, Recompute::Nothing),
        23_500_000_000,
        Rates::H100,
    )? {
        lines.push(("within_24GB_b4", 4, recompute));
    }
    for (line, b, recompute) in lines {
        let line = format!("{name}_train_{line}");
        table.guarded(&line.clone(), |table| {
            let request = request(&config, options, &lora, b, recompute);
            training_row(table, &line, &mut engine, &request, free_before)
        });
    }
    Ok(())
}

fn request(
    config: &MmditConfig,
    options: EngineOptions,
    lora: &[LoraSize],
    b: usize,
    recompute: Recompute,
) -> PlanRequest {
    PlanRequest {
        config: config.clone(),
        options,
        lora: lora.to_vec(),
        shape: shape(b, 512),
        training: TrainingOptions {
            recompute,
            optimizer: OptimizerKind::AdamW8bit {
                min_8bit_size: 4096,
            },
            adamw: AdamWConfig {
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.01,
            },
            max_grad_norm: 1.0,
        },
    }
}

fn training_row(
    table: &mut Table,
    line: &str,
    engine: &mut Engine,
    request: &PlanRequest,
    free_before: usize,
) -> Outcome {
    let planned = plan(request, Rates::H100)?;
    engine.release_activations()?;
    engine.start_training(request.training)?;
    let batch = Batch::new(&request.config, request.shape);
    let step = |engine: &mut Engine| -> Outcome {
        engine.micro_step(&batch.micro(), 1.0)?;
        engine.optimizer_step(1e-4, 1.0)?;
        Ok(())
    };
    for _ in 0..3 {
        step(engine)?;
    }
    let (mut steps, mut micro_steps) = (Vec::new(), Vec::new());
    for _ in 0..STEPS {
        engine.stream().synchronize()?;
        let start = Instant::now();
        step(engine)?;
        engine.stream().synchronize()?;
        steps.push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        engine.micro_step(&batch.micro(), 1.0)?;
        engine.stream().synchronize()?;
        micro_steps.push(start.elapsed().as_secs_f64());
    }
    let (free, _) = engine.stream().memory()?;
    let allocated = engine.stream().allocated_bytes() + WORKSPACE_BYTES;
    engine.use_graphs(false);
    step(engine)?;
    engine.stream().start_timing();
    engine.micro_step(&batch.micro(), 1.0)?;
    let launches = engine.stream().stop_timing()?;
    let sum = |work: Work| -> f64 {
        let of = launches.iter().filter(|(kind, ..)| *kind == work);
        of.map(|(_, _, ms)| f64::from(*ms)).sum()
    };
    let mut by_name: Map<String, Value> = Map::new();
    for (_, name, ms) in &launches {
        let sum = by_name.get(name).and_then(Value::as_f64).unwrap_or(0.0) + f64::from(*ms);
        by_name.insert(name.clone(), json!(sum));
    }
    let shares: Map<String, Value> = Work::ALL
        .iter()
        .map(|work| (format!("{work:?}_ms"), json!(sum(*work))))
        .collect();
    table.row(
        line,
        json!({
            "recompute": format!("{:?}", request.training.recompute),
            "step_s": median(steps),
            "micro_step_s": median(micro_steps),
            "planned_micro_step_s": planned.micro_step_s(),
            "allocated_bytes": allocated,
            "planned_bytes": planned.total_bytes(),
            "device_bytes": free_before.saturating_sub(free),
            "launches": launches.len(),
            "by_kind": shares,
            "by_name_ms": by_name,
        }),
    );
    Ok(())
}

fn sampling_rows(table: &mut Table, name: &str, engine: &mut Engine) -> Outcome {
    const SAMPLER_STEPS: usize = 12;
    let config = engine.config().clone();
    let sigmas: Vec<f32> = (0..=SAMPLER_STEPS)
        .map(|i| 1.0 - i as f32 / SAMPLER_STEPS as f32)
        .collect();
    for pixels in [512, 1024] {
        let mut times = Vec::new();
        for guided in [false, true] {
            let batch = Batch::new(&config, shape(1, pixels));
            let input = SamplerInput {
                shape: batch.shape,
                tokens: &batch.latents,
                sigmas: &sigmas,
                times: &sigmas[..SAMPLER_STEPS],
                text: &batch.text,
                pooled: &batch.pooled,
                negative: guided.then_some((batch.text.as_slice(), batch.pooled.as_slice(), 4.0)),
                guidance: Some(3.5),
            };
            let start = Instant::now();
            engine.start_sampling(&input)?;
            engine.stream().synchronize()?;
            let prepared_s = start.elapsed().as_secs_f64();
            for _ in 0..3 {
                engine.sample_step()?;
            }
            let mut steps = Vec::new();
            for _ in 3..SAMPLER_STEPS {
                engine.stream().synchronize()?;
                let start = Instant::now();
                engine.sample_step()?;
                engine.stream().synchronize()?;
                steps.push(start.elapsed().as_secs_f64());
            }
            times.push((median(steps), prepared_s));
        }
        table.row(
            &format!("{name}_sample_{pixels}"),
            json!({
                "step_s": times[0].0,
                "true_guidance_step_s": times[1].0,
                "true_guidance_ratio": times[1].0 / times[0].0,
                "prepare_s": times[0].1,
            }),
        );
    }
    Ok(())
}
