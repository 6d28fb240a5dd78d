//! The first two phases: an autoencoder that keeps hard edges, then its decoder alone.
//!
//! Loss: mean |x̂ − x|, plus a weight times mean |∇x̂ − ∇x| over neighbours across and down, plus a weight times mean |x̂ − x|
//! of latent cells' mean colours, plus a weight times the mean divergence of the posterior from the standard normal,
//! ½(μ² + σ² − 1 − ln σ²), per latent value. The decoder alone learns by the same loss without the last part, which does
//! not concern it.

use std::collections::BTreeMap;

use autoencoder::{Autoencoder, AutoencoderConfig, pixels};
use burn::tensor::Distribution;
use burn::tensor::backend::Backend as _;
use flow_matching::noise::{Purpose, Stream};
use pixel_art::Rgb8;
use random_base::{Part, initial_values};
use serde_json::json;
use tensor::{
    Backend, Device, IntTensor, ParameterSpec, Precision, Tensor, TensorData, device, from_f32,
};

use crate::PretrainError;
use crate::augment::BACKGROUND;
use crate::clock::{HostWork, StepClock};
use crate::recipe::AutoencoderRecipe;
use crate::results::{Learned, Phase};
use crate::run::{Run, Traced};
use crate::state::{Layout, TrainState};

/// Pictures on the device, one in a row.
pub(crate) struct Pool {
    rows: Tensor<2>,
    num: usize,
    side_px: usize,
}

/// Pictures that are converted at once.
const UPLOAD: usize = 512;

impl Pool {
    pub(crate) fn new(pictures: &[Rgb8], device: &Device) -> Option<Self> {
        let side_px = pictures.first()?.width_px as usize;
        let width = 3 * side_px * side_px;
        let rows = pictures
            .chunks(UPLOAD)
            .map(|chunk| to_tensor(chunk, device).reshape([chunk.len(), width]))
            .collect();
        Some(Self {
            rows: Tensor::cat(rows, 0),
            num: pictures.len(),
            side_px,
        })
    }

    /// `count` random pictures: `(count, 3, H, W)`.
    fn draw(&self, stream: &mut Stream, count: usize) -> Tensor<4> {
        let places: Vec<i32> = (0..count)
            .map(|_| stream.below(self.num as u64) as i32)
            .collect();
        let side = self.side_px;
        gather(&self.rows, places).reshape([count, 3, side, side])
    }
}

/// Rows of a table.
pub(crate) fn gather(rows: &Tensor<2>, places: Vec<i32>) -> Tensor<2> {
    let count = places.len();
    let places = IntTensor::<1>::from_data(TensorData::new(places, [count]), &rows.device());
    rows.clone().select(0, places)
}

/// Pictures of one size: `(b, 3, H, W)` in [−1, 1].
pub(crate) fn to_tensor(pictures: &[Rgb8], device: &Device) -> Tensor<4> {
    let buffers: Vec<&[u8]> = pictures
        .iter()
        .map(|picture| picture.pixels.as_slice())
        .collect();
    let (w, h) = (pictures[0].width_px, pictures[0].height_px);
    pixels::from_rgb8(&buffers, w as usize, h as usize, device)
}

/// What both phases learn from.
struct Pools {
    captioned: Pool,
    textures: Option<Pool>,
}

impl Pools {
    fn new(run: &Run<'_>) -> Result<Self, PretrainError> {
        let captioned: Vec<Rgb8> = run
            .corpus
            .training_pictures()
            .into_iter()
            .map(|place| run.corpus.pictures[place].over(BACKGROUND))
            .collect();
        Ok(Self {
            captioned: Pool::new(&captioned, &run.device).ok_or(PretrainError::Empty {
                what: "pictures for the autoencoder",
            })?,
            textures: Pool::new(&run.corpus.textures, &run.device),
        })
    }

    /// A batch of a step of a phase, the same whatever ended before it.
    fn batch(&self, run: &Run<'_>, phase: Phase, step: u64, count: usize) -> Tensor<4> {
        let key = format!("pretrain/{}", phase.name());
        let mut stream = Stream::new(run.recipe.seed, Purpose::Order, step, &key);
        let share = run.recipe.autoencoder.texture_share;
        let textures = self.textures.as_ref();
        batch(&self.captioned, textures, &mut stream, share, count)
    }
}

/// What the autoencoder's run is called.
fn name(run: &Run<'_>) -> String {
    let mut settings = json!(run.recipe.autoencoder);
    if let Some(settings) = settings.as_object_mut() {
        settings.remove("decoder");
    }
    run.name(Phase::Autoencoder, "", &settings)
}

/// Encoder and decoder together, until done or out of time.
///
/// # Errors
///
/// Also if they are neither wanted nor done.
pub(crate) fn train(run: &Run<'_>, config: &AutoencoderConfig) -> Result<Learned, PretrainError> {
    let recipe = &run.recipe.autoencoder;
    let optimizer = &recipe.optimizer;
    let precision = optimizer.precision().expect("a checked recipe");
    let name = name(run);
    let models = [config.parameters()];
    let learned = run.learn(Phase::Autoencoder, &name, optimizer, &models, || {
        let layout = Layout::new(models.to_vec());
        let mut state = TrainState::new(layout, &run.device, |_, spec| {
            initial_values(Part::Vae, spec, run.recipe.seed)
        });
        state.resume(&run.checkpoint(Phase::Autoencoder), &name)?;
        let pools = Pools::new(run)?;
        let training = device::training(&run.device);
        let loss = move |state: &TrainState, clock: &mut StepClock| {
            let step = state.step;
            let pictures = pools.batch(run, Phase::Autoencoder, step, optimizer.batch);
            clock.did(HostWork::Draw);
            Backend::seed(&run.device, run.recipe.seed ^ (step << 8));
            let leaves = state.leaves();
            let model = Autoencoder::load(&leaves.weights[0], config, &training, precision)?;
            clock.did(HostWork::Build);
            let pictures: Tensor<4> = Tensor::from_inner(pictures);
            let posterior = model.encode(pictures.clone());
            let mean = posterior.mean.cast(tensor::DType::F32);
            let logvar = posterior.logvar.cast(tensor::DType::F32);
            let noise = Tensor::from_inner(Tensor::<4>::random(
                mean.dims(),
                Distribution::Normal(0.0, 1.0),
                &run.device,
            ));
            let latents = mean.clone() + (logvar.clone() * 0.5).exp() * noise;
            let decoded = model.decode(latents).cast(tensor::DType::F32);
            let kl = (mean.powi_scalar(2) + logvar.clone().exp() - 1.0 - logvar).mean() * 0.5;
            let loss = distance(decoded, pictures, config.scale_factor_px(), recipe)
                + kl * recipe.kl_weight;
            Ok((leaves, loss))
        };
        Ok(Traced::begin(run, state, optimizer, loss))
    })?;
    learned.ok_or(PretrainError::NotDone {
        phase: Phase::Autoencoder.name(),
    })
}

/// Whether a parameter belongs to the way back to pictures.
fn is_of_decoder(spec: &ParameterSpec) -> bool {
    spec.name.starts_with("decoder.") || spec.name.starts_with("post_quant_conv.")
}

/// The decoder alone, on the posterior's means of an encoder that stays as it is: what [`train`] left, with a better
/// decoder, if it is wanted or done. Whole, as [`train`] gives it.
pub(crate) fn train_decoder(
    run: &Run<'_>,
    config: &AutoencoderConfig,
    autoencoder: &Learned,
) -> Result<Option<Learned>, PretrainError> {
    let recipe = &run.recipe.autoencoder;
    let optimizer = &recipe.decoder;
    let precision = optimizer.precision().expect("a checked recipe");
    let upstream = run.results().digest(Phase::Autoencoder, 1)?.to_string();
    let settings = json!([
        recipe.cell_weight,
        recipe.gradient_weight,
        recipe.texture_share,
        optimizer
    ]);
    let name = run.name(Phase::Decoder, &upstream, &settings);
    let values = &autoencoder.models[0];
    let of_decoder = config.parameters().into_iter().filter(is_of_decoder);
    let models = [of_decoder.collect::<Vec<_>>()];
    let decoder = run.learn(Phase::Decoder, &name, optimizer, &models, || {
        let layout = Layout::new(models.to_vec());
        let mut state = TrainState::from_values(layout, &run.device, values);
        state.resume(&run.checkpoint(Phase::Decoder), &name)?;
        let pools = Pools::new(run)?;
        let training = device::training(&run.device);
        let encoder =
            Autoencoder::load(&autoencoder.weights(0), config, &run.device, Precision::F32)?;
        // Beside the decoder's leaves the model wants the encoder's values, which nothing tracks.
        let rest: Vec<(ParameterSpec, Tensor<1>)> = values
            .iter()
            .filter(|(spec, _)| !is_of_decoder(spec))
            .map(|(spec, values)| {
                let value = from_f32(values.clone(), [values.len()], &run.device);
                (spec.clone(), Tensor::from_inner(value))
            })
            .collect();
        let loss = move |state: &TrainState, clock: &mut StepClock| {
            let pictures = pools.batch(run, Phase::Decoder, state.step, optimizer.batch);
            let latents = encoder.encode(pictures.clone()).mean;
            clock.did(HostWork::Draw);
            let leaves = state.leaves_beside(&rest);
            let model = Autoencoder::load(&leaves.weights[0], config, &training, precision)?;
            clock.did(HostWork::Build);
            let latents: Tensor<4> = Tensor::from_inner(latents);
            let decoded = model.decode(latents).cast(tensor::DType::F32);
            let pictures = Tensor::from_inner(pictures);
            let loss = distance(decoded, pictures, config.scale_factor_px(), recipe);
            Ok((leaves, loss))
        };
        Ok(Traced::begin(run, state, optimizer, loss))
    })?;
    let Some(decoder) = decoder else {
        return Ok(None);
    };
    let mut better: BTreeMap<String, Vec<f32>> = decoder
        .models
        .into_iter()
        .flatten()
        .map(|(spec, values)| (spec.name, values))
        .collect();
    let whole = values.iter().map(|(spec, values)| {
        let better = better.remove(&spec.name);
        (spec.clone(), better.unwrap_or_else(|| values.clone()))
    });
    let whole = vec![whole.collect()];
    Ok(Some(Learned::new(whole, decoder.step, decoder.ended)))
}

/// Captioned pictures and textures, all turned and recoloured the same way: edges and colours of any kind.
fn batch(
    captioned: &Pool,
    textures: Option<&Pool>,
    stream: &mut Stream,
    texture_share: f64,
    count: usize,
) -> Tensor<4> {
    let num_textures = match textures {
        Some(_) => ((count as f64 * texture_share).round() as usize).min(count),
        None => 0,
    };
    let mut parts = Vec::new();
    if num_textures < count {
        parts.push(captioned.draw(stream, count - num_textures));
    }
    if let Some(textures) = textures.filter(|_| num_textures > 0) {
        parts.push(textures.draw(stream, num_textures));
    }
    let mut pictures = Tensor::cat(parts, 0);
    if stream.uniform() < 0.5 {
        pictures = pictures.flip([3]);
    }
    if stream.uniform() < 0.5 {
        let mut order = [0, 1, 2];
        stream.shuffle(&mut order);
        let [b, _, h, w] = pictures.dims();
        let channel = |c: usize| pictures.clone().slice([0..b, c..c + 1, 0..h, 0..w]);
        pictures = Tensor::cat(order.map(channel).to_vec(), 1);
    }
    pictures
}

/// L1 of pixels, of neighbours' differences, and of the mean colours of latent cells.
fn distance(
    decoded: Tensor<4>,
    pictures: Tensor<4>,
    cell_px: usize,
    recipe: &AutoencoderRecipe,
) -> Tensor<1> {
    let [b, c, h, w] = decoded.dims();
    let error = decoded - pictures;
    let across = error.clone().slice([0..b, 0..c, 0..h, 1..w])
        - error.clone().slice([0..b, 0..c, 0..h, 0..w - 1]);
    let down = error.clone().slice([0..b, 0..c, 1..h, 0..w])
        - error.clone().slice([0..b, 0..c, 0..h - 1, 0..w]);
    let cells = error
        .clone()
        .reshape([b, c, h / cell_px, cell_px, w / cell_px, cell_px]) // b c rows f columns f
        .mean_dim(5)
        .mean_dim(3);
    error.abs().mean()
        + (across.abs().mean() + down.abs().mean()) * recipe.gradient_weight
        + cells.abs().mean() * recipe.cell_weight
}
