//! A tiny base and hand-made artifacts of the stages before this one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use artifacts::{
    CaptionRow, Digest, Embedding, Footer, Latent, LatentCacheWriter, SampleRow, TensorToWrite,
    TextEmbeddingHeader, TextEmbeddingRow, TextEmbeddingWriter, captions, digest_bytes, samples,
    write_safetensors,
};
use flow_matching::{Density, Purpose, Scheduler, SchedulerConfig, Stream, Weighting};
use half::f16;
use mmdit::{BaseWeights, LoadOptions, Mmdit, MmditConfig};
use pipeline::recipe::Recipe;
use pipeline::{
    Artifact, DataSet, Fingerprint, Manifest, RunOptions, Stage, StageContext, StageReport,
    WeightPart, files,
};
use serde_json::json;
use tensor::{Precision, device};

use crate::batch::LatentScaling;
use crate::data::{DataFiles, Sampling, TrainingData};

/// Text tokens of an embedding.
pub const T5_TOKENS: usize = 3;
/// Channels, rows and columns of a latent; four cells of two channels are one token of the tiny transformer.
pub const LATENT_SHAPE: [usize; 3] = [2, 4, 4];

/// The VAE that made the latents.
pub fn vae_digest() -> Digest {
    digest_bytes(b"a VAE")
}

/// The shipped demonstration's recipe, cut down to a run of a second.
pub fn recipe() -> Recipe {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/demo.toml");
    let mut recipe = Recipe::load(&path, &[]).expect("the shipped recipe is valid");
    recipe.embed_text.t5_tokens = T5_TOKENS;
    recipe.train.steps = 6;
    recipe.train.micro_batch = 2;
    recipe.train.accumulation = 2;
    recipe.train.rank = 2;
    recipe.train.alpha = 4.0;
    recipe.train.learning_rate = 1e-2;
    recipe.train.min_8bit_size = 1;
    recipe.train.checkpoint_every = 2;
    recipe.train.keep_checkpoints = 2;
    recipe
}

fn normals(key: &str, count: usize) -> Vec<f32> {
    Stream::new(0, Purpose::InitialLatent, 0, key).normals(count)
}

/// A folder with a base and the artifacts of `num_images` images.
pub struct World {
    pub root: tempfile::TempDir,
    pub num_images: usize,
}

impl World {
    pub fn new(num_images: usize) -> Self {
        let world = Self {
            root: tempfile::tempdir().expect("a temporary directory"),
            num_images,
        };
        world.write_base();
        world.write_samples();
        world.write_embeddings(T5_TOKENS, MmditConfig::tiny().joint_attention_dim);
        world.write_latents(0..num_images, LATENT_SHAPE, vae_digest());
        world
    }

    pub fn path(&self, name: &str) -> PathBuf {
        let path = self.root.path().join(name);
        std::fs::create_dir_all(&path).expect("a directory");
        path
    }

    fn write_base(&self) {
        let config = MmditConfig::tiny();
        let dir = self.path("base/transformer");
        let text = json!({
            "_class_name": "FluxTransformer2DModel",
            "num_layers": config.num_layers, "num_single_layers": config.num_single_layers,
            "num_attention_heads": config.num_attention_heads,
            "attention_head_dim": config.attention_head_dim, "axes_dims_rope": config.axes_dims_rope,
            "joint_attention_dim": config.joint_attention_dim,
            "pooled_projection_dim": config.pooled_projection_dim,
            "guidance_embeds": config.guidance_embeds, "in_channels": config.in_channels,
            "patch_size": 1,
        });
        std::fs::write(dir.join("config.json"), text.to_string()).expect("written");
        let parameters = config.parameters();
        let values: Vec<Vec<f32>> = parameters
            .iter()
            .map(|p| {
                let fan_in = p.shape.last().copied().unwrap_or(1) as f32;
                let values = normals(&p.name, p.num_elements() as usize);
                values.into_iter().map(|v| v / fan_in.sqrt()).collect()
            })
            .collect();
        let tensors: Vec<TensorToWrite<'_>> = parameters
            .iter()
            .zip(&values)
            .map(|(p, values)| TensorToWrite::f32(&p.name, &p.shape, values))
            .collect();
        let path = dir.join("diffusion_pytorch_model.safetensors");
        write_safetensors(&path, &tensors, &BTreeMap::new()).expect("written");

        let vae = json!({
            "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3,
            "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"],
            "block_out_channels": [8], "layers_per_block": 1, "latent_channels": 2,
            "norm_num_groups": 2, "scaling_factor": 0.5, "shift_factor": 0.1, "act_fn": "silu",
            "use_quant_conv": false, "use_post_quant_conv": false,
        });
        std::fs::write(self.path("base/vae").join("config.json"), vae.to_string())
            .expect("written");
        let scheduler = json!({"num_train_timesteps": 1000, "use_dynamic_shifting": true});
        let path = self.path("base/scheduler").join("scheduler_config.json");
        std::fs::write(path, scheduler.to_string()).expect("written");
    }

    pub fn sample_id(&self, image: usize) -> String {
        digest_bytes(format!("image {image}").as_bytes()).to_string()
    }

    /// Two images share each caption.
    pub fn caption(&self, image: usize) -> String {
        format!("a knight of kind {}", image / 2)
    }

    fn write_samples(&self) {
        let rows: Vec<SampleRow> = (0..self.num_images)
            .map(|image| SampleRow {
                sample_id: self.sample_id(image),
                compat_sha256: String::new(),
                compat_sha256_oriented: String::new(),
                width_px: 32,
                height_px: 32,
                has_alpha: false,
                num_colors: 4,
                source_file: format!("knight_{image}.png"),
                source_row: None,
            })
            .collect();
        samples::write(
            &self.path("ingest").join(files::SAMPLES),
            &rows,
            &Footer::new(),
        )
        .expect("written");
        let rows: Vec<CaptionRow> = (0..self.num_images)
            .map(|image| {
                let caption = self.caption(image);
                CaptionRow {
                    sample_id: self.sample_id(image),
                    caption_hash: captions::caption_hash(&caption),
                    caption,
                }
            })
            .collect();
        captions::write(
            &self.path("ingest").join(files::CAPTIONS),
            &rows,
            &Footer::new(),
        )
        .expect("written");
    }

    pub fn write_embeddings(&self, t5_tokens: usize, t5_width: usize) {
        let pooled_width = MmditConfig::tiny().pooled_projection_dim;
        let digest = digest_bytes(b"encoders");
        let header = TextEmbeddingHeader {
            t5_tokens,
            t5_width,
            pooled_width,
            t5_digest: digest,
            clip_digest: digest,
            t5_tokenizer_digest: digest,
            clip_tokenizer_digest: digest,
        };
        let path = self.path("embed-text").join(files::EMBEDDINGS);
        let mut writer = TextEmbeddingWriter::create(&path, &header).expect("started");
        let half = |values: Vec<f32>| values.into_iter().map(f16::from_f32).collect();
        for image in (0..self.num_images).step_by(2) {
            let caption = self.caption(image);
            let row = TextEmbeddingRow {
                embedding: Embedding {
                    t5: half(normals(&format!("t5 {caption}"), t5_tokens * t5_width)),
                    pooled: half(normals(&format!("pooled {caption}"), pooled_width)),
                },
                caption,
                num_t5_tokens: 2,
            };
            writer.push(row).expect("pushed");
        }
        writer.finish().expect("finished");
    }

    pub fn write_latents(
        &self,
        images: impl IntoIterator<Item = usize>,
        shape: [usize; 3],
        vae: Digest,
    ) {
        let mut writer = LatentCacheWriter::create(&self.path("cache-latents"), vae, "test");
        for image in images {
            for view in 0..2 {
                let sample_id = self.sample_id(image);
                let count = shape.iter().product();
                let latent = Latent {
                    mean: normals(&format!("mean {image} {view}"), count),
                    logvar: vec![-2.0; count],
                    sample_id,
                    view,
                    shape,
                    flipped: view == 1,
                    crop_x_px: 0,
                    crop_y_px: 0,
                };
                writer.push(latent).expect("pushed");
            }
        }
        writer.finish().expect("finished");
    }

    pub fn data(&self, seed: u64) -> TrainingData {
        let files = DataFiles {
            samples: self.path("ingest").join(files::SAMPLES),
            captions: self.path("ingest").join(files::CAPTIONS),
            embeddings: self.path("embed-text").join(files::EMBEDDINGS),
            latents: self.path("cache-latents"),
        };
        let sampling = Sampling {
            seed,
            density: Density::Uniform,
            weighting: Weighting::None,
            scheduler: Scheduler::new(SchedulerConfig::flux_dev()),
            scaling: LatentScaling {
                shift: 0.1,
                scale: 0.5,
            },
        };
        TrainingData::open(
            &files,
            &MmditConfig::tiny(),
            T5_TOKENS,
            vae_digest(),
            sampling,
        )
        .expect("the pairs belong together")
    }

    pub fn model(&self) -> Mmdit {
        let options = LoadOptions {
            device: device::training(&device::cpu()),
            precision: Precision::F32,
            base: BaseWeights::Plain,
        };
        Mmdit::open(&self.path("base/transformer"), &options).expect("the tiny base")
    }

    /// A stage that will write into `dir`.
    pub fn context(&self, dir: &str, recipe: Recipe) -> StageContext {
        let mut recipe = recipe;
        recipe.base.path = self.path("base");
        let artifact = |stage: Stage| Artifact {
            dir: self.path(stage.name()),
            manifest: manifest(stage),
        };
        let inputs = [Stage::Ingest, Stage::EmbedText, Stage::CacheLatents];
        let digest = |part: WeightPart| match part {
            WeightPart::Vae => vae_digest(),
            _ => digest_bytes(part.name().as_bytes()),
        };
        StageContext {
            stage: Stage::Train,
            data: DataSet::Training,
            recipe,
            runs: self.root.path().to_owned(),
            dir: self.path(dir),
            forced: false,
            inputs: inputs.map(|stage| (stage.into(), artifact(stage))).into(),
            components: WeightPart::ALL
                .map(|part| (format!("weights.{}", part.name()), digest(part).to_string()))
                .into(),
            options: RunOptions {
                device: "cpu".to_owned(),
                engine: "auto".to_owned(),
                threads: None,
                batch: None,
                json: false,
            },
            progress: console::Progress::silent(),
        }
    }
}

fn manifest(stage: Stage) -> Manifest {
    Manifest {
        manifest_version: 1,
        stage,
        recipe_name: String::new(),
        fingerprint: Fingerprint::of(&BTreeMap::new()),
        components: BTreeMap::new(),
        outputs: BTreeMap::new(),
        files: BTreeMap::new(),
        created: String::new(),
        created_unix_ms: 0,
        program_version: String::new(),
        report: StageReport {
            stage,
            data: DataSet::Training,
            dir: PathBuf::new(),
            seconds: 0.0,
            counts: BTreeMap::new(),
            outputs: BTreeMap::new(),
            notes: Vec::new(),
        },
    }
}
