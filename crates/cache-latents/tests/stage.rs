//! The stage from recipe to seal, on a tiny random VAE: what is encoded, what is taken over, what is refused.

use std::path::{Path, PathBuf};

use artifacts::{LatentCache, SampleRow, TensorToWrite, write_safetensors};
use autoencoder::{Autoencoder, AutoencoderConfig, pixels};
use pipeline::{
    Failure, Override, Recipe, RunOptions, Stage, StageReport, files, outputs, run_stage,
};
use pixel_art::{Limits, Rgba8, encode_png_rgba};
use tensor::Precision;
use tensor::device::cpu;

const DEMO: &str = include_str!("../../../configs/demo.toml");

/// A base with nothing but a VAE (2 pixels a cell), a folder of images, and runs.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new(images: &[u8]) -> Self {
        let world = Self {
            dir: tempfile::tempdir().expect("a temporary directory"),
        };
        fs_err::create_dir_all(world.path("data")).expect("writable");
        world.write_vae(1);
        for &image in images {
            world.write_image(image);
        }
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write_vae(&self, seed: u32) {
        let dir = self.path("base/vae");
        fs_err::create_dir_all(&dir).expect("writable");
        let config = r#"{"block_out_channels": [2, 4], "norm_num_groups": 2, "latent_channels": 2,
                         "use_quant_conv": false, "use_post_quant_conv": false}"#;
        fs_err::write(dir.join("config.json"), config).expect("writable");
        let config =
            AutoencoderConfig::from_file(&dir.join("config.json")).expect("a sound configuration");
        let mut state = seed;
        let parameters = config.parameters();
        let values: Vec<Vec<f32>> = parameters
            .iter()
            .map(|spec| {
                (0..spec.num_elements())
                    .map(|_| {
                        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
                    })
                    .collect()
            })
            .collect();
        let tensors: Vec<TensorToWrite> = parameters
            .iter()
            .zip(&values)
            .map(|(spec, values)| TensorToWrite::f32(&spec.name, &spec.shape, values))
            .collect();
        let path = dir.join("diffusion_pytorch_model.safetensors");
        write_safetensors(&path, &tensors, &Default::default()).expect("writable");
    }

    /// A picture of 4×3 pixels that depends on its number.
    fn write_image(&self, number: u8) {
        let pixels = (0..12)
            .flat_map(|i| [number, i * 20, 255 - number, 255])
            .collect();
        let png = encode_png_rgba(&Rgba8::new(4, 3, pixels), &[]).expect("a small PNG");
        fs_err::write(self.path(&format!("data/{number}.png")), png).expect("writable");
    }

    fn recipe(&self, overrides: &[&str]) -> Recipe {
        let mut all: Vec<Override> = vec![
            Override::new(
                "base.path",
                self.path("base").to_string_lossy().into_owned(),
            ),
            Override::new(
                "ingest.source",
                self.path("data").to_string_lossy().into_owned(),
            ),
            Override::new("cache_latents.resolution_px", 16),
        ];
        all.extend(
            overrides
                .iter()
                .map(|text| text.parse::<Override>().expect("an override")),
        );
        Recipe::parse(DEMO, Path::new("/w/configs/demo.toml"), &all)
            .expect("the recipe makes sense")
    }

    fn options(batch: Option<usize>) -> RunOptions {
        RunOptions {
            device: "cpu".to_owned(),
            engine: "auto".to_owned(),
            threads: None,
            batch,
            json: false,
        }
    }

    /// Stands for `ingest`: lists the images of the data folder.
    fn ingest(&self, recipe: &Recipe) {
        let (runs, stage) = (self.path("runs"), Stage::Ingest);
        let progress = console::Progress::silent();
        run_stage(
            recipe.clone(),
            &runs,
            stage,
            Self::options(None),
            progress,
            false,
            |context| {
                let rows = self.samples();
                artifacts::samples::write(
                    &context.path(files::SAMPLES),
                    &rows,
                    &Default::default(),
                )
                .map_err(Failure::failed)?;
                let ids: Vec<&str> = rows.iter().map(|row| row.sample_id.as_str()).collect();
                let digest = artifacts::digest_bytes(ids.concat().as_bytes());
                let report = [
                    outputs::SAMPLES,
                    outputs::CAPTIONS,
                    outputs::PAIRS,
                    outputs::COMPAT_HASHES,
                ]
                .into_iter()
                .fold(context.report(), |report, name| report.output(name, digest));
                Ok::<StageReport, Failure>(report)
            },
        )
        .expect("ingest has nothing to refuse");
    }

    fn samples(&self) -> Vec<SampleRow> {
        let mut names: Vec<String> = fs_err::read_dir(self.path("data"))
            .expect("readable")
            .map(|entry| {
                entry
                    .expect("readable")
                    .file_name()
                    .to_string_lossy()
                    .into_owned()
            })
            .collect();
        names.sort();
        names
            .into_iter()
            .map(|source_file| {
                let bytes = fs_err::read(self.path("data").join(&source_file)).expect("readable");
                let decoded =
                    pixel_art::decode(&bytes, &Limits { max_pixels: 100 }).expect("a PNG");
                SampleRow {
                    sample_id: decoded.identity(),
                    compat_sha256: decoded.compat_sha256(),
                    compat_sha256_oriented: decoded.compat_sha256_oriented(),
                    width_px: decoded.picture.width_px,
                    height_px: decoded.picture.height_px,
                    has_alpha: false,
                    num_colors: 12,
                    source_file,
                    source_row: None,
                }
            })
            .collect()
    }

    fn try_run(
        &self,
        overrides: &[&str],
        batch: Option<usize>,
    ) -> Result<(StageReport, bool), Failure> {
        self.run_or_force(overrides, batch, false)
    }

    fn run_or_force(
        &self,
        overrides: &[&str],
        batch: Option<usize>,
        force: bool,
    ) -> Result<(StageReport, bool), Failure> {
        let recipe = self.recipe(overrides);
        self.ingest(&recipe);
        run_stage(
            recipe,
            &self.path("runs"),
            Stage::CacheLatents,
            Self::options(batch),
            console::Progress::silent(),
            force,
            cache_latents::run,
        )
    }

    fn run(&self, overrides: &[&str]) -> StageReport {
        let (report, worked) = self.try_run(overrides, None).expect("the stage runs");
        assert!(worked, "there was something to do");
        report
    }
}

fn counts(report: &StageReport) -> (u64, u64) {
    (report.counts["encoded"], report.counts["reused"])
}

#[test]
fn a_latent_is_the_posterior_of_the_scaled_picture() {
    let world = World::new(&[10, 20]);
    let report = world.run(&[]);
    assert_eq!(counts(&report), (2, 0));
    let cache = LatentCache::open(&report.dir).expect("a sound cache");
    let vae =
        Autoencoder::open(&world.path("base/vae"), &cpu(), Precision::F32).expect("the VAE loads");
    for sample in world.samples() {
        let bytes = fs_err::read(world.path("data").join(&sample.source_file)).expect("readable");
        let decoded = pixel_art::decode(&bytes, &Limits { max_pixels: 100 }).expect("a PNG");
        let placed = pixel_art::place_on_canvas(&decoded.picture, 16, [255; 3]).expect("it fits");
        let picture = pixels::from_rgb8(&[&placed.picture.pixels], 16, 16, &cpu());
        let expected = vae.encode(picture);
        let latent = cache.get(&sample.sample_id, 0).expect("it was cached");
        assert_eq!(latent.shape, [2, 8, 8]);
        for (found, expected) in [
            (&latent.mean, expected.mean),
            (&latent.logvar, expected.logvar),
        ] {
            for (f, e) in found.iter().zip(tensor::to_f32(&expected)) {
                assert!((f - e).abs() < 1e-5, "{f} is not {e}");
            }
        }
    }
}

#[test]
fn two_new_images_cost_two_encodings_and_a_removed_one_none() {
    let world = World::new(&[1, 2, 3]);
    let first = world.run(&[]);
    world.write_image(4);
    world.write_image(5);
    let second = world.run(&[]);
    assert_eq!(counts(&second), (2, 3));
    assert_ne!(first.outputs, second.outputs);

    fs_err::remove_file(world.path("data/1.png")).expect("removed");
    let third = world.run(&[]);
    assert_eq!(counts(&third), (0, 4));
    assert_eq!(
        LatentCache::open(&third.dir)
            .expect("a sound cache")
            .rows()
            .len(),
        4
    );

    // All images at once in a fresh world: the same latents, however they came together.
    let other = World::new(&[2, 3, 4, 5]);
    let (report, _) = other.try_run(&[], Some(1)).expect("the stage runs");
    assert_eq!(report.counts["encoded"], 4);
    assert_eq!(report.outputs, third.outputs);
}

#[cfg(unix)]
#[test]
fn an_earlier_shard_is_linked_not_copied() {
    use std::os::unix::fs::MetadataExt as _;
    let world = World::new(&[1, 2]);
    let first = world.run(&[]);
    world.write_image(3);
    let second = world.run(&[]);
    let inode = |report: &StageReport| {
        let path = report.dir.join("latents-00000.safetensors");
        fs_err::metadata(path).expect("a shard").ino()
    };
    assert_eq!(inode(&first), inode(&second));
}

#[test]
fn a_forced_run_takes_nothing_over() {
    let world = World::new(&[1, 2]);
    let first = world.run(&[]);
    let (forced, _) = world.run_or_force(&[], None, true).expect("the stage runs");
    assert_eq!(counts(&forced), (2, 0));
    assert_eq!((forced.outputs, forced.dir), (first.outputs, first.dir));
}

#[test]
fn a_renamed_data_folder_is_the_same_data() {
    let world = World::new(&[1]);
    world.run(&[]);
    fs_err::rename(world.path("data"), world.path("moved")).expect("renamed");
    let source = format!("ingest.source='{}'", world.path("moved").display());
    let recipe = world.recipe(&[&source]);
    let mut pipeline =
        pipeline::Pipeline::open(recipe, &world.path("runs"), console::Progress::silent())
            .expect("the runs directory is there");
    let state = pipeline
        .state(Stage::CacheLatents)
        .expect("the state can be told");
    assert!(matches!(state, pipeline::StageState::Fresh(_)), "{state}");
}

#[test]
fn more_views_leave_the_first_ones_as_they_are() {
    let world = World::new(&[1, 2]);
    let random = [
        "cache_latents.crop=random",
        "cache_latents.flip_probability=0.5",
    ];
    world.run(&[random[0], random[1], "cache_latents.views=1"]);
    let report = world.run(&[random[0], random[1], "cache_latents.views=3"]);
    assert_eq!(counts(&report), (4, 2));
}

#[test]
fn another_vae_or_geometry_encodes_everything_anew() {
    let world = World::new(&[1, 2]);
    let first = world.run(&[]);
    assert_eq!(
        counts(&world.run(&["cache_latents.background=\"#000000\""])),
        (2, 0)
    );
    world.write_vae(2);
    let report = world.run(&[]);
    assert_eq!(counts(&report), (2, 0));
    assert_ne!(report.outputs, first.outputs);
}

#[test]
fn shards_of_a_killed_run_are_kept() {
    let world = World::new(&[1, 2]);
    let first = world.run(&[]);
    // As if it had been killed before the index.
    for name in ["manifest.json", "index.parquet"] {
        fs_err::remove_file(first.dir.join(name)).expect("removed");
    }
    let second = world.run(&[]);
    assert_eq!(counts(&second), (0, 2));
    assert_eq!((second.outputs, second.dir), (first.outputs, first.dir));
}

#[test]
fn an_image_that_does_not_fit_the_canvas_is_bad_input() {
    let world = World::new(&[1]);
    let failure = world
        .try_run(&["cache_latents.resolution_px=4"], None)
        .map(drop);
    assert!(failure.is_ok(), "4 pixels on 4 fit: {failure:?}");
    let pixels = [7, 7, 7, 255].repeat(17);
    let png = encode_png_rgba(&Rgba8::new(17, 1, pixels), &[]).expect("a small PNG");
    fs_err::write(world.path("data/wide.png"), png).expect("writable");
    let failure = world
        .try_run(&[], None)
        .expect_err("17 pixels do not fit 16");
    assert_eq!(failure.kind().exit_code(), 2);
    assert!(failure.to_string().contains("wide.png"), "{failure}");
}

#[test]
fn an_image_that_changed_behind_ingests_back_is_refused() {
    let world = World::new(&[1]);
    let recipe = world.recipe(&[]);
    world.ingest(&recipe);
    let failure = run_stage(
        recipe,
        &world.path("runs"),
        Stage::CacheLatents,
        World::options(None),
        console::Progress::silent(),
        false,
        |context| {
            world.write_image(2);
            fs_err::rename(world.path("data/2.png"), world.path("data/1.png")).expect("renamed");
            cache_latents::run(context).map_err(Failure::from)
        },
    )
    .expect_err("the pixels are others");
    assert_eq!(failure.kind().exit_code(), 2);
    assert!(
        failure
            .to_string()
            .contains("1.png is not the image that was ingested"),
        "{failure}"
    );
}
