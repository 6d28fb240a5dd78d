//! The last phase: the transformer alone, its captions encoded once.
//!
//! Text encoders are small and slow: many of a step's launches are theirs. Once they have settled, every caption's
//! states are computed a single time and lie on the device, and a step is the transformer's alone. On a CUDA card in
//! `bf16` our own engine makes the steps, otherwise Burn's autodiff; both minimise the same loss over the same draws of
//! pictures, captions and noise levels, with noise of their own.

use autoencoder::Autoencoder;
use burn::tensor::backend::Backend as _;
use mmdit::model::BaseWeights;
use mmdit::{LoadOptions, Mmdit, Rope};
use serde_json::json;
use tensor::{Backend, Precision, Tensor, device};

use crate::PretrainError;
use crate::base_phase::{
    BaseConfigs, CLIP, CaptionIds, Examples, Models, T5, TRANSFORMER, velocity,
};
use crate::clock::{HostWork, StepClock};
use crate::evaluate::PRECISION;
use crate::refine_engine::OnEngine;
use crate::results::{Learned, Phase};
use crate::run::{Run, Traced, Training};
use crate::state::{Layout, TrainState};
use crate::vae_phase::gather;

/// Captions that the text encoders read at once.
const ENCODE: usize = 256;

/// States of [`Examples::captions`], row by row.
pub(crate) struct Texts {
    /// `(rows, n·d)`.
    pub states: Tensor<2>,
    /// `(rows, d)`.
    pub pooled: Tensor<2>,
    pub num_tokens: usize,
}

impl Texts {
    fn encode(models: &Models, examples: &Examples) -> Self {
        let all: Vec<&CaptionIds> = examples.captions.iter().collect();
        let mut num_tokens = 0;
        let (mut states, mut pooled) = (Vec::new(), Vec::new());
        for chunk in all.chunks(ENCODE) {
            let (t5, clip) = models.texts(chunk);
            let [b, n, d] = t5.dims();
            num_tokens = n;
            states.push(t5.reshape([b, n * d]));
            pooled.push(clip);
        }
        Self {
            states: Tensor::cat(states, 0),
            pooled: Tensor::cat(pooled, 0),
            num_tokens,
        }
    }

    /// States `(b, n, d)` and pooled states `(b, d)`.
    fn rows(&self, captions: &[usize]) -> (Tensor<3>, Tensor<2>) {
        let places: Vec<i32> = captions.iter().map(|&place| place as i32).collect();
        let [_, width] = self.states.dims();
        let shape = [captions.len(), self.num_tokens, width / self.num_tokens];
        let states = gather(&self.states, places.clone()).reshape(shape);
        (states, gather(&self.pooled, places))
    }
}

/// The transformer of what the base has learned, learning on, if that is wanted or done.
pub(crate) fn train(
    run: &Run<'_>,
    vae: &Autoencoder,
    configs: &BaseConfigs,
    base: &Learned,
) -> Result<Option<Learned>, PretrainError> {
    let optimizer = &run.recipe.refine.optimizer;
    let models = [configs.transformer.parameters()];
    let upstream = run
        .results()
        .digest(Phase::Base, base.models.len())?
        .to_string();
    let settings = json!([run.recipe.refine, run.recipe.base, run.tokenizers]);
    let name = run.name(Phase::Refine, &upstream, &settings);
    run.learn(Phase::Refine, &name, optimizer, &models, || {
        let refine = &run.recipe.refine;
        let examples = Examples::new(run, vae, refine.variants, refine.original_share)?;
        let weights = [TRANSFORMER, CLIP, T5].map(|model| base.weights(model));
        let learned = Models::load(&weights, configs, &run.device, PRECISION)?;
        let texts = Texts::encode(&learned, &examples);
        match device::cuda_index(&run.device) {
            Some(_) if optimizer.precision() == Some(Precision::Bf16) => Ok(Box::new(
                OnEngine::begin(run, vae, configs, base, examples, &texts, &name)?,
            )),
            _ => traced(run, vae, configs, base, examples, texts, &name),
        }
    })
}

/// Steps through Burn's autodiff.
fn traced<'a>(
    run: &'a Run<'_>,
    vae: &'a Autoencoder,
    configs: &'a BaseConfigs,
    base: &Learned,
    examples: Examples,
    texts: Texts,
    name: &str,
) -> Result<Box<dyn Training + 'a>, PretrainError> {
    let optimizer = &run.recipe.refine.optimizer;
    let precision = optimizer.precision().expect("a checked recipe");
    let layout = Layout::new(vec![configs.transformer.parameters()]);
    let mut state = TrainState::from_values(layout, &run.device, &base.models[TRANSFORMER]);
    state.resume(&run.checkpoint(Phase::Refine), name)?;
    let options = LoadOptions {
        device: device::training(&run.device),
        precision,
        base: BaseWeights::Plain,
    };
    let [_, h, w] = examples.latents.shape;
    let rope = Rope::for_latent(
        &configs.transformer,
        texts.num_tokens,
        [h, w],
        &options.device,
    );
    let loss = move |state: &TrainState, clock: &mut StepClock| {
        let drawn = examples.draw(run, Phase::Refine, state.step, optimizer.batch);
        Backend::seed(&run.device, run.recipe.seed ^ (state.step << 8) ^ 4);
        let (noisy, target) = examples.noised(&drawn, vae.config(), &run.device);
        let (states, pooled) = texts.rows(&drawn.captions);
        clock.did(HostWork::Draw);
        let leaves = state.leaves();
        let config = configs.transformer.clone();
        let transformer = Mmdit::load(&leaves.weights[0], config, &options)?;
        clock.did(HostWork::Build);
        let texts = (Tensor::from_inner(states), Tensor::from_inner(pooled));
        let noisy = Tensor::from_inner(noisy);
        let velocity = velocity(&transformer, noisy, texts, &drawn.sigmas, &rope);
        let target: Tensor<3> = Tensor::from_inner(target);
        let loss = (velocity - target).powi_scalar(2).mean();
        Ok((leaves, loss))
    };
    Ok(Traced::begin(run, state, optimizer, loss))
}
