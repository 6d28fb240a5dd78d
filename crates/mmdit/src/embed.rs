//! Time, guidance and the pooled caption as one vector, `temb`, from which all modulations come.
//!
//! Times are sinusoids of 256 channels, cosines first, computed in `f32` on the host whatever the precision of the
//! network: in bfloat16 only 506 of the 1000 training times would stay distinct.
//!
//! Source: `CombinedTimestepGuidanceTextProjEmbeddings`, diffusers 0.42.

use tensor::nn::silu;
use tensor::{Tensor, from_f32};

use crate::adapters::Adapters;
use crate::config::{MmditConfig, NUM_SINUSOID_CHANNELS};
use crate::layers::{Layer, Loader};
use crate::model::MmditError;

/// The sinusoids of `times` (0 to 1000): `[times, 256]`, row-major, 128 cosines and then 128 sines.
///
/// Channel `i` has the frequency `10⁴^(−i/128)`.
///
/// Source: `get_timestep_embedding(flip_sin_to_cos=True, downscale_freq_shift=0)`, diffusers 0.42.
pub fn sinusoids(times: &[f32]) -> Vec<f32> {
    const HALF: usize = NUM_SINUSOID_CHANNELS / 2;
    const MAX_PERIOD: f64 = 10_000.0;
    let log_period = -MAX_PERIOD.ln() as f32;
    let frequencies: Vec<f32> = (0..HALF)
        .map(|i| (log_period * i as f32 / HALF as f32).exp())
        .collect();
    let mut values = Vec::with_capacity(times.len() * NUM_SINUSOID_CHANNELS);
    for &time in times {
        values.extend(frequencies.iter().map(|f| (time * f).cos()));
        values.extend(frequencies.iter().map(|f| (time * f).sin()));
    }
    values
}

/// Two layers with SiLU between them.
#[derive(Clone, Debug)]
struct Mlp {
    linear_1: Layer,
    linear_2: Layer,
}

impl Mlp {
    fn load(loader: &Loader<'_>, name: &str, inputs: usize, d: usize) -> Result<Self, MmditError> {
        let path = format!("time_text_embed.{name}");
        Ok(Self {
            linear_1: loader.linear(format!("{path}.linear_1"), inputs, d)?,
            linear_2: loader.linear(format!("{path}.linear_2"), d, d)?,
        })
    }

    fn forward(&self, x: Tensor<2>, adapters: &Adapters) -> Tensor<2> {
        let hidden = silu(self.linear_1.forward(x, adapters));
        self.linear_2.forward(hidden, adapters)
    }
}

/// Makes `temb`.
#[derive(Clone, Debug)]
pub(crate) struct TimeTextEmbed {
    timestep_embedder: Mlp,
    guidance_embedder: Option<Mlp>,
    text_embedder: Mlp,
}

impl TimeTextEmbed {
    pub fn load(loader: &Loader<'_>, config: &MmditConfig) -> Result<Self, MmditError> {
        let d = config.width();
        let sinusoid = |name| Mlp::load(loader, name, NUM_SINUSOID_CHANNELS, d);
        Ok(Self {
            timestep_embedder: sinusoid("timestep_embedder")?,
            guidance_embedder: config
                .guidance_embeds
                .then(|| sinusoid("guidance_embedder"))
                .transpose()?,
            text_embedder: Mlp::load(loader, "text_embedder", config.pooled_projection_dim, d)?,
        })
    }

    /// `timestep` and `guidance` one number per sample (0 to 1, and the scale itself), `pooled` `(b, p)` → `(b, d)`.
    ///
    /// # Panics
    ///
    /// If guidance is given to a model without guidance embedding, or withheld from one with it.
    pub fn forward(
        &self,
        timestep: &[f32],
        guidance: Option<&[f32]>,
        pooled: Tensor<2>,
        adapters: &Adapters,
    ) -> Tensor<2> {
        let device = pooled.device();
        let dtype = pooled.dtype();
        let embed = |mlp: &Mlp, values: &[f32]| {
            let thousandfold: Vec<f32> = values.iter().map(|v| v * 1000.0).collect();
            let waves = from_f32(
                sinusoids(&thousandfold),
                [values.len(), NUM_SINUSOID_CHANNELS],
                &device,
            );
            mlp.forward(waves.cast(dtype), adapters)
        };
        let mut temb = embed(&self.timestep_embedder, timestep);
        match (&self.guidance_embedder, guidance) {
            (Some(mlp), Some(guidance)) => temb = temb + embed(mlp, guidance),
            (None, None) => {}
            (Some(_), None) => panic!("this transformer needs a guidance scale"),
            (None, Some(_)) => panic!("this transformer has no guidance embedding"),
        }
        temb + self.text_embedder.forward(pooled, adapters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosines_come_first_and_the_first_frequency_is_one() {
        let values = sinusoids(&[0.5]);
        assert_eq!(values.len(), 256);
        assert!((values[0] - 0.5f32.cos()).abs() < 1e-7);
        assert!((values[128] - 0.5f32.sin()).abs() < 1e-7);
        // Frequency 64 of 128: 10⁴^(−1/2) = 0.01.
        assert!((values[64] - 0.005f32.cos()).abs() < 1e-7);
    }
}
