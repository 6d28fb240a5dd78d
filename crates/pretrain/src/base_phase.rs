//! The third phase: the transformer, with T5 and CLIP from scratch beside it, by flow matching.
//!
//! Latents of every version of every picture are computed once and stay on the device as mean and deviation; each use
//! draws from the posterior anew. Velocity is compared token by token, all noise levels weighted alike.

use autoencoder::{Autoencoder, AutoencoderConfig};
use burn::tensor::Distribution;
use burn::tensor::backend::Backend as _;
use flow_matching::noise::{Purpose, Stream};
use mmdit::model::BaseWeights;
use mmdit::{Adapters, LoadOptions, Mmdit, MmditConfig, MmditInput, Rope, patchify};
use random_base::{Part, initial_values};
use rayon::prelude::*;
use serde_json::json;
use tensor::{Backend, DType, Device, ParameterSpec, Precision, Tensor, Weights, device, from_f32};
use text_encoders::{ClipConfig, ClipTextModel, ClipTokenizer, T5Config, T5Encoder, T5Tokenizer};

use crate::PretrainError;
use crate::augment::variant;
use crate::clock::{HostWork, StepClock};
use crate::recipe::{BaseRecipe, PretrainRecipe};
use crate::results::{Learned, Phase};
use crate::run::{Run, Traced};
use crate::state::{Layout, TrainState};
use crate::vae_phase::{gather, to_tensor};

/// Places of the models in the state's layout.
pub(crate) const TRANSFORMER: usize = 0;
pub(crate) const CLIP: usize = 1;
pub(crate) const T5: usize = 2;

/// Pictures that the autoencoder encodes at once.
const ENCODE: usize = 128;

/// Sizes of everything that learns in this phase.
#[derive(Clone, Debug)]
pub(crate) struct BaseConfigs {
    pub transformer: MmditConfig,
    pub clip: ClipConfig,
    pub t5: T5Config,
}

impl BaseConfigs {
    /// Parameters of each model, by its place.
    pub(crate) fn parameters(&self) -> [Vec<ParameterSpec>; 3] {
        [
            self.transformer.parameters(),
            self.clip.parameters(),
            self.t5.parameters(),
        ]
    }
}

/// Captions as both tokenizers' ids.
pub(crate) struct Tokenizers {
    t5: T5Tokenizer,
    clip: ClipTokenizer,
    t5_tokens: usize,
}

/// One caption's ids.
#[derive(Clone, Debug)]
pub(crate) struct CaptionIds {
    pub t5: Vec<u32>,
    pub clip: Vec<u32>,
}

impl Tokenizers {
    pub(crate) fn open(recipe: &PretrainRecipe) -> Result<Self, PretrainError> {
        Ok(Self {
            clip: ClipTokenizer::open(&recipe.tokenizers.join("tokenizer"))?,
            t5: T5Tokenizer::open(&recipe.tokenizers.join("tokenizer_2"))?,
            t5_tokens: recipe.base.t5_tokens,
        })
    }

    /// Whether the models have a row for every id.
    pub(crate) fn check(
        &self,
        recipe: &PretrainRecipe,
        configs: &BaseConfigs,
    ) -> Result<(), PretrainError> {
        let dir = |part: &str| recipe.tokenizers.join(part);
        let (clip, t5) = (configs.clip.vocab_size, configs.t5.vocab_size);
        self.clip.check_vocabulary(&dir("tokenizer"), clip)?;
        Ok(self.t5.check_vocabulary(&dir("tokenizer_2"), t5)?)
    }

    pub(crate) fn ids(&self, caption: &str) -> Result<CaptionIds, PretrainError> {
        Ok(CaptionIds {
            t5: self.t5.encode(caption, self.t5_tokens)?.ids,
            clip: self.clip.encode(caption)?.ids,
        })
    }
}

/// Transformer and text encoders, built around one set of weights.
pub(crate) struct Models {
    pub transformer: Mmdit,
    clip: ClipTextModel,
    t5: T5Encoder,
}

impl Models {
    pub(crate) fn load(
        weights: &[Weights],
        configs: &BaseConfigs,
        device: &Device,
        precision: Precision,
    ) -> Result<Self, PretrainError> {
        let options = LoadOptions {
            device: device.clone(),
            precision,
            base: BaseWeights::Plain,
        };
        Ok(Self {
            transformer: Mmdit::load(&weights[TRANSFORMER], configs.transformer.clone(), &options)?,
            // Small, and gradients of common words are sums of thousands: half precision would lose them.
            clip: ClipTextModel::load(&weights[CLIP], &configs.clip, device, Precision::F32)?,
            t5: T5Encoder::load(&weights[T5], &configs.t5, device, Precision::F32)?,
        })
    }

    /// Velocity of noisy latents as tokens `(b, n, 4c)`, in `f32`.
    pub(crate) fn velocity(
        &self,
        tokens: Tensor<3>,
        captions: &[&CaptionIds],
        sigmas: &[f32],
        rope: &Rope,
    ) -> Tensor<3> {
        velocity(
            &self.transformer,
            tokens,
            self.texts(captions),
            sigmas,
            rope,
        )
    }

    /// T5's states `(b, n, d)` and CLIP's pooled states `(b, d)` of captions.
    pub(crate) fn texts(&self, captions: &[&CaptionIds]) -> (Tensor<3>, Tensor<2>) {
        let t5: Vec<Vec<u32>> = captions.iter().map(|ids| ids.t5.clone()).collect();
        let clip: Vec<Vec<u32>> = captions.iter().map(|ids| ids.clip.clone()).collect();
        (self.t5.encode(&t5), self.clip.encode(&clip).pooled)
    }
}

/// Velocity of noisy latents as tokens `(b, n, 4c)`, in `f32`.
pub(crate) fn velocity(
    transformer: &Mmdit,
    tokens: Tensor<3>,
    (states, pooled): (Tensor<3>, Tensor<2>),
    sigmas: &[f32],
    rope: &Rope,
) -> Tensor<3> {
    let guidance = vec![1.0; sigmas.len()];
    let is_guided = transformer.config().guidance_embeds;
    let input = MmditInput {
        hidden_states: tokens,
        encoder_hidden_states: states,
        pooled_projections: pooled,
        timestep: sigmas,
        guidance: is_guided.then_some(guidance.as_slice()),
        rope,
    };
    transformer
        .forward(&input, &Adapters::none())
        .cast(DType::F32)
}

/// Means and deviations of latents, one picture in a row.
pub(crate) struct Latents {
    pub mean: Tensor<2>,
    pub deviation: Tensor<2>,
    /// `c h w`.
    pub shape: [usize; 3],
}

impl Latents {
    /// Latents as the transformer sees them, `(x − shift)·scale`, drawn from their posteriors: `(b, c, h, w)`.
    pub(crate) fn draw(&self, places: Vec<i32>, vae: &AutoencoderConfig) -> Tensor<4> {
        let b = places.len();
        let [c, h, w] = self.shape;
        let mean = gather(&self.mean, places.clone());
        let noise =
            Tensor::<2>::random(mean.dims(), Distribution::Normal(0.0, 1.0), &mean.device());
        let latents = mean + gather(&self.deviation, places) * noise;
        vae.to_model(latents.reshape([b, c, h, w]))
    }

    /// Encodes pictures that `make` gives one by one.
    pub(crate) fn encode(
        vae: &Autoencoder,
        num: usize,
        device: &Device,
        make: impl Fn(usize) -> pixel_art::Rgb8 + Sync,
    ) -> Self {
        let (mut means, mut deviations) = (Vec::new(), Vec::new());
        let mut shape = [0; 3];
        for start in (0..num).step_by(ENCODE) {
            let end = (start + ENCODE).min(num);
            let pictures: Vec<_> = (start..end).into_par_iter().map(&make).collect();
            let posterior = vae.encode(to_tensor(&pictures, device));
            let [b, c, h, w] = posterior.mean.dims();
            shape = [c, h, w];
            means.push(posterior.mean.reshape([b, c * h * w]));
            deviations.push((posterior.logvar * 0.5).exp().reshape([b, c * h * w]));
        }
        Self {
            mean: Tensor::cat(means, 0),
            deviation: Tensor::cat(deviations, 0),
            shape,
        }
    }

    /// Mean and standard deviation of all latent values, posterior's spread included.
    pub(crate) fn statistics(&self) -> (f64, f64) {
        let scalar = |value: Tensor<1>| f64::from(tensor::to_f32(&value)[0]);
        let mean = scalar(self.mean.clone().mean());
        let spread = scalar((self.mean.clone() - mean).powi_scalar(2).mean())
            + scalar(self.deviation.clone().powi_scalar(2).mean());
        (mean, spread.sqrt())
    }
}

/// Every version of every pair, as latents and as ids.
pub(crate) struct Examples {
    pub latents: Latents,
    /// A caption for each picture, and one of no words last.
    pub captions: Vec<CaptionIds>,
    num_pairs: usize,
    versions: usize,
    /// Share of draws that are pictures as they are.
    original_share: f64,
}

/// What one step learns from.
pub(crate) struct Drawn {
    /// Places of the pictures in [`Examples::latents`].
    pub pictures: Vec<usize>,
    /// Places in [`Examples::captions`]: the picture's own, or the last where the caption is dropped.
    pub captions: Vec<usize>,
    /// Noise levels.
    pub sigmas: Vec<f32>,
}

impl Examples {
    pub(crate) fn new(
        run: &Run<'_>,
        vae: &Autoencoder,
        variants: usize,
        original_share: f64,
    ) -> Result<Self, PretrainError> {
        let began = std::time::Instant::now();
        let seed = run.recipe.seed;
        let tokenizers = Tokenizers::open(run.recipe)?;
        let corpus = run.corpus;
        let versions = 1 + variants;
        let num = corpus.pairs.len() * versions;
        let version = |index: usize| {
            let (place, number) = (index / versions, index % versions);
            let pair = &corpus.pairs[place];
            let picture = &corpus.pictures[pair.picture];
            variant(picture, &pair.caption, place, number, seed)
        };
        let mut captions = (0..num)
            .into_par_iter()
            .map(|index| tokenizers.ids(&version(index).1))
            .collect::<Result<Vec<_>, _>>()?;
        captions.push(tokenizers.ids("")?);
        let examples = Self {
            latents: Latents::encode(vae, num, &run.device, |index| version(index).0),
            captions,
            num_pairs: corpus.pairs.len(),
            versions,
            original_share,
        };
        run.log(&json!({
            "phase": "latents", "pictures": num, "latent_shape": examples.latents.shape,
            "elapsed_s": began.elapsed().as_secs_f64(),
        }))?;
        Ok(examples)
    }

    /// A batch of a step of a phase, the same whatever ended before it.
    pub(crate) fn draw(&self, run: &Run<'_>, phase: Phase, step: u64, batch: usize) -> Drawn {
        let recipe = &run.recipe.base;
        let key = format!("pretrain/{}", phase.name());
        let mut stream = Stream::new(run.recipe.seed, Purpose::Order, step, &key);
        let pictures: Vec<usize> = (0..batch)
            .map(|_| {
                let pair = stream.below(self.num_pairs as u64) as usize;
                let is_original = f64::from(stream.uniform()) < self.original_share;
                let number = if self.versions == 1 || is_original {
                    0
                } else {
                    1 + stream.below(self.versions as u64 - 1) as usize
                };
                pair * self.versions + number
            })
            .collect();
        let empty = self.captions.len() - 1;
        let captions = pictures
            .iter()
            .map(|&place| {
                let is_dropped = f64::from(stream.uniform()) < recipe.caption_dropout;
                if is_dropped { empty } else { place }
            })
            .collect();
        Drawn {
            pictures,
            captions,
            sigmas: times(&mut stream, recipe, batch),
        }
    }

    /// Noisy tokens and the velocity to be learned, with noise from the backend's seed.
    pub(crate) fn noised(
        &self,
        drawn: &Drawn,
        vae: &AutoencoderConfig,
        device: &Device,
    ) -> (Tensor<3>, Tensor<3>) {
        let places = drawn.pictures.iter().map(|&place| place as i32).collect();
        let clean = self.latents.draw(places, vae);
        let noise = Tensor::<4>::random(clean.dims(), Distribution::Normal(0.0, 1.0), device);
        noised(clean, noise, &drawn.sigmas)
    }
}

/// Transformer and text encoders, if they are wanted or done.
pub(crate) fn train(
    run: &Run<'_>,
    vae: &Autoencoder,
    configs: &BaseConfigs,
) -> Result<Option<Learned>, PretrainError> {
    let optimizer = &run.recipe.base.optimizer;
    let seed = run.recipe.seed;
    let precision = optimizer.precision().expect("a checked recipe");
    let models = configs.parameters();
    let d_kv = configs.t5.d_kv;
    let upstream = run.results().digest(Phase::Autoencoder, 1)?.to_string();
    let settings = json!([run.recipe.base, run.recipe.corpus.variants, run.tokenizers]);
    let name = run.name(Phase::Base, &upstream, &settings);
    run.learn(Phase::Base, &name, optimizer, &models, || {
        let layout = Layout::new(models.to_vec());
        let mut state = TrainState::new(layout, &run.device, |model, spec| {
            initial(model, spec, seed, d_kv)
        });
        state.resume(&run.checkpoint(Phase::Base), &name)?;
        let recipe = run.recipe;
        let examples = Examples::new(run, vae, recipe.corpus.variants, recipe.base.original_share)?;
        let training = device::training(&run.device);
        let [_, h, w] = examples.latents.shape;
        let t5_tokens = run.recipe.base.t5_tokens;
        let rope = Rope::for_latent(&configs.transformer, t5_tokens, [h, w], &training);
        let loss = move |state: &TrainState, clock: &mut StepClock| {
            let step = state.step;
            let drawn = examples.draw(run, Phase::Base, step, optimizer.batch);
            let captions = drawn.captions.iter();
            let ids: Vec<&CaptionIds> = captions.map(|&place| &examples.captions[place]).collect();
            Backend::seed(&run.device, seed ^ (step << 8) ^ 1);
            let (noisy, target) = examples.noised(&drawn, vae.config(), &run.device);
            clock.did(HostWork::Draw);
            let leaves = state.leaves();
            let models = Models::load(&leaves.weights, configs, &training, precision)?;
            clock.did(HostWork::Build);
            let noisy = Tensor::from_inner(noisy);
            let velocity = models.velocity(noisy, &ids, &drawn.sigmas, &rope);
            let target: Tensor<3> = Tensor::from_inner(target);
            let loss = (velocity - target).powi_scalar(2).mean();
            Ok((leaves, loss))
        };
        Ok(Traced::begin(run, state, optimizer, loss))
    })
}

/// `(1 − σ) x₀ + σ ε` and `ε − x₀` as tokens.
pub(crate) fn noised(clean: Tensor<4>, noise: Tensor<4>, sigmas: &[f32]) -> (Tensor<3>, Tensor<3>) {
    let sigma = from_f32(sigmas.to_vec(), [sigmas.len(), 1, 1, 1], &clean.device());
    let target = noise - clean.clone();
    let noisy = clean + target.clone() * sigma;
    (patchify(noisy), patchify(target))
}

/// Noise levels of a batch.
fn times(stream: &mut Stream, recipe: &BaseRecipe, count: usize) -> Vec<f32> {
    (0..count)
        .map(|_| {
            let z = recipe.logit_mean + recipe.logit_std * f64::from(stream.normal());
            shifted(1.0 / (1.0 + (-z).exp()), recipe.shift_mu) as f32
        })
        .collect()
}

/// The noise level of a larger picture that hides as much as `sigma` does of a small one.
pub(crate) fn shifted(sigma: f64, mu: f64) -> f64 {
    let factor = mu.exp();
    factor * sigma / (1.0 + (factor - 1.0) * sigma)
}

/// Where training starts: as a random base does, but blocks pass their input through and no velocity is said.
fn initial(model: usize, spec: &ParameterSpec, seed: u64, d_kv: usize) -> Vec<f32> {
    let part = match model {
        TRANSFORMER => Part::Transformer,
        CLIP => Part::TextEncoder,
        _ => Part::TextEncoder2 { d_kv },
    };
    let is_modulation = spec.name.contains("norm") && spec.name.contains("linear");
    if model == TRANSFORMER && (is_modulation || spec.name.starts_with("proj_out")) {
        return vec![0.0; spec.num_elements() as usize];
    }
    initial_values(part, spec, seed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shift_keeps_the_ends_and_raises_the_middle() {
        assert_eq!(shifted(0.0, 0.5), 0.0);
        assert!((shifted(1.0, 0.5) - 1.0).abs() < 1e-12);
        let e = 0.5f64.exp();
        assert!((shifted(0.5, 0.5) - e / (1.0 + e)).abs() < 1e-12);
    }
}
