//! The first phase: an autoencoder that keeps hard edges.
//!
//! Loss: mean |x̂ − x|, plus a weight times mean |∇x̂ − ∇x| over neighbours across and down, plus a weight times mean |x̂ − x|
//! of latent cells' mean colours, plus a weight times the mean divergence of the posterior from the standard normal,
//! ½(μ² + σ² − 1 − ln σ²), per latent value.

use autoencoder::{Autoencoder, AutoencoderConfig, pixels};
use burn::tensor::Distribution;
use burn::tensor::backend::Backend as _;
use flow_matching::noise::{Purpose, Stream};
use pixel_art::Rgb8;
use random_base::{Part, initial_values};
use tensor::{Backend, Device, IntTensor, Precision, Tensor, TensorData, device};

use crate::PretrainError;
use crate::augment::BACKGROUND;
use crate::clock::HostWork;
use crate::recipe::AutoencoderRecipe;
use crate::run::{Ended, Run};
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
    pixels::from_rgb8(&buffers, w as usize, h as usize, device, Precision::F32)
}

/// Trains until done or out of time.
pub(crate) fn train(
    run: &Run<'_>,
    config: &AutoencoderConfig,
) -> Result<(TrainState, Ended), PretrainError> {
    let recipe = &run.recipe.autoencoder;
    let optimizer = &recipe.optimizer;
    let precision = optimizer.precision().expect("a checked recipe");
    let layout = Layout::new(vec![config.parameters()]);
    let mut state = TrainState::new(layout, &run.device, |_, spec| {
        initial_values(Part::Vae, spec, run.recipe.seed)
    });
    let name = run.name("autoencoder", "");
    state.resume(&run.work.join("autoencoder.safetensors"), &name)?;
    if state.step >= optimizer.steps {
        return Ok((state, Ended::Done));
    }

    let captioned: Vec<Rgb8> = run
        .corpus
        .training_pictures()
        .into_iter()
        .map(|place| run.corpus.pictures[place].over(BACKGROUND))
        .collect();
    let captioned = Pool::new(&captioned, &run.device).ok_or(PretrainError::Empty {
        what: "pictures for the autoencoder",
    })?;
    let textures = Pool::new(&run.corpus.textures, &run.device);
    let training = device::training(&run.device);

    let ended = run.train(
        "autoencoder",
        &name,
        optimizer,
        &mut state,
        |state, clock| {
            let step = state.step;
            let mut stream = Stream::new(
                run.recipe.seed,
                Purpose::Order,
                step,
                "pretrain/autoencoder",
            );
            let pictures = batch(
                &captioned,
                textures.as_ref(),
                &mut stream,
                recipe.texture_share,
                optimizer.batch,
            );
            clock.did(HostWork::Draw);
            Backend::seed(&run.device, run.recipe.seed ^ (step << 8));
            let leaves = state.leaves();
            let model = Autoencoder::load(&leaves.weights[0], config, &training, precision)?;
            clock.did(HostWork::Build);
            let pictures: Tensor<4> = Tensor::from_inner(pictures);
            let posterior = model.encode(pictures.clone().cast(precision.dtype()));
            let mean = posterior.mean.cast(tensor::DType::F32);
            let logvar = posterior.logvar.cast(tensor::DType::F32);
            let noise = Tensor::from_inner(Tensor::<4>::random(
                mean.dims(),
                Distribution::Normal(0.0, 1.0),
                &run.device,
            ));
            let latents = mean.clone() + (logvar.clone() * 0.5).exp() * noise;
            let decoded = model
                .decode(latents.cast(precision.dtype()))
                .cast(tensor::DType::F32);
            let kl = (mean.powi_scalar(2) + logvar.clone().exp() - 1.0 - logvar).mean() * 0.5;
            let loss = distance(decoded, pictures, config.scale_factor_px(), recipe)
                + kl * recipe.kl_weight;
            clock.did(HostWork::Forward);
            let gradients = loss.backward();
            clock.did(HostWork::Backward);
            let norm = state.update(&leaves, &gradients, optimizer);
            Ok([loss.inner(), norm])
        },
    )?;
    Ok((state, ended))
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
