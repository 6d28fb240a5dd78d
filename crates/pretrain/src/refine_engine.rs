//! The last phase's steps on a CUDA card: [`engine_cuda::model::FullTrainer`] between the phase's draws and its log.
//!
//! Latents and texts go to the engine once; a step hands over a few hundred numbers. What the engine computes is what
//! [`crate::state::TrainState::update`] computes after Burn's autodiff, in `bf16` with `f32` masters.

use std::path::Path;

use autoencoder::Autoencoder;
use engine_cuda::model::{FullOptions, FullState, FullTrainer, Shape};
use engine_cuda::stream::OpenOptions;
use engine_cuda::{Half, Stream};
use tensor::{ParameterSpec, to_f32};

use crate::PretrainError;
use crate::base_phase::{BaseConfigs, Examples, TRANSFORMER};
use crate::clock::{HostWork, StepClock};
use crate::refine_phase::Texts;
use crate::results::{Learned, Phase, Values, by_name};
use crate::run::{Run, Training};
use crate::state::Snapshot;

/// Training on the engine.
pub(crate) struct OnEngine<'a> {
    run: &'a Run<'a>,
    trainer: FullTrainer,
    examples: Examples,
}

impl<'a> OnEngine<'a> {
    /// Starts from what the base has learned, or from the phase's checkpoint.
    pub(crate) fn begin(
        run: &'a Run<'a>,
        vae: &Autoencoder,
        configs: &BaseConfigs,
        base: &Learned,
        examples: Examples,
        texts: &Texts,
        name: &str,
    ) -> Result<Self, PretrainError> {
        let device = tensor::device::cuda_index(&run.device).expect("the phase asked");
        let recipe = &run.recipe.refine.optimizer;
        let [_, h, w] = examples.latents.shape;
        let options = FullOptions {
            t: Half::Bf16,
            shape: Shape {
                b: recipe.batch,
                text: texts.num_tokens,
                latent_cells: [h, w],
            },
            beta1: recipe.beta1,
            beta2: recipe.beta2,
            epsilon: recipe.epsilon,
            weight_decay: recipe.weight_decay,
            max_grad_norm: recipe.max_grad_norm,
            ema_decay: recipe.ema_decay,
            guidance: configs.transformer.guidance_embeds.then_some(1.0),
            loss_scale: 1.0,
        };
        let stream = Stream::open(&OpenOptions {
            device,
            kernel_cache: None,
        })?;
        let start = by_name(&base.models[TRANSFORMER]);
        let mut value_of = |spec: &ParameterSpec| start[spec.name.as_str()].clone();
        let mut trainer = FullTrainer::new(stream, &configs.transformer, &mut value_of, options)?;
        let shift = |mean| vae.config().to_model(mean);
        let num_pictures = examples.latents.mean.dims()[0];
        trainer.set_latents(
            &to_f32(&shift(examples.latents.mean.clone())),
            &to_f32(&(examples.latents.deviation.clone() * vae.config().scaling_factor)),
            num_pictures,
        )?;
        let num_texts = texts.states.dims()[0];
        trainer.set_texts(&to_f32(&texts.states), &to_f32(&texts.pooled), num_texts)?;
        let mut training = Self {
            run,
            trainer,
            examples,
        };
        let length = training.trainer.state()?.values.len();
        let checkpoint = run.checkpoint(Phase::Refine);
        if let Some(snapshot) = Snapshot::read(&checkpoint, &on_engine(name), length)? {
            let [values, first, second, averaged] = snapshot.parts;
            training.trainer.restore(&FullState {
                step: snapshot.step,
                values,
                first,
                second,
                averaged,
            })?;
        }
        Ok(training)
    }
}

/// The engine's checkpoints lie in another order than Burn's.
fn on_engine(name: &str) -> String {
    format!("{name} on the engine")
}

impl Training for OnEngine<'_> {
    fn step(&self) -> u64 {
        self.trainer.num_steps()
    }

    fn advance(&mut self, clock: &mut StepClock) -> Result<(), PretrainError> {
        let optimizer = &self.run.recipe.refine.optimizer;
        let step = self.step();
        let drawn = self
            .examples
            .draw(self.run, Phase::Refine, step, optimizer.batch);
        let [pictures, texts] = [&drawn.pictures, &drawn.captions]
            .map(|places| places.iter().map(|&place| place as u32).collect::<Vec<_>>());
        clock.did(HostWork::Draw);
        let seed = self.run.recipe.seed ^ (step << 8) ^ 4;
        let learning_rate = optimizer.learning_rate_at(step);
        self.trainer
            .step(&pictures, &texts, &drawn.sigmas, seed, learning_rate)?;
        Ok(())
    }

    fn figures(&mut self) -> Result<[f32; 2], PretrainError> {
        let report = self.trainer.report()?;
        Ok([report.loss, report.grad_norm])
    }

    fn broken(&mut self) -> Result<Option<f32>, PretrainError> {
        // A step whose gradients are not finite has changed nothing.
        let [loss, _] = self.figures()?;
        Ok((!loss.is_finite()).then_some(loss))
    }

    fn wait(&mut self) -> Result<(), PretrainError> {
        Ok(self.trainer.stream().synchronize()?)
    }

    fn save(&mut self, path: &Path, run: &str) -> Result<(), PretrainError> {
        let state = self.trainer.state()?;
        Snapshot {
            step: state.step,
            parts: [state.values, state.first, state.second, state.averaged],
        }
        .write(path, &on_engine(run))
    }

    fn averaged(&mut self) -> Result<Vec<Values>, PretrainError> {
        Ok(vec![self.trainer.weights(true)?])
    }
}
