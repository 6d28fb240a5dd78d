//! What every parameter of a random base starts as.
//!
//! Scales of norms are 1, shifts and biases 0, everything else is normal noise whose deviation keeps activations
//! near 1: `1/√fan_in` unless the model says otherwise. Noise is counter-based: it depends on the seed and on the
//! parameter's full name alone, so that another size or order of the other parameters does not change it.

use half::f16;
use tensor::ParameterSpec;

/// Which model a parameter belongs to; the name of its directory makes its noise its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// FLUX transformer.
    Transformer,
    /// AutoencoderKL.
    Vae,
    /// CLIP.
    TextEncoder,
    /// T5.
    TextEncoder2 {
        /// Size of one head's keys, which T5's queries are scaled by at initialisation instead of at each use.
        d_kv: usize,
    },
}

impl Part {
    /// The directory below the base, as `model_index.json` names it.
    pub fn dir(self) -> &'static str {
        match self {
            Self::Transformer => "transformer",
            Self::Vae => "vae",
            Self::TextEncoder => "text_encoder",
            Self::TextEncoder2 { .. } => "text_encoder_2",
        }
    }
}

/// How one parameter is filled.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fill {
    /// One value everywhere.
    Constant(f64),
    /// The first half 0, the second half this.
    UpperHalf(f64),
    /// Normal noise of this deviation.
    Normal(f64),
}

/// Modulation starts weaker than a plain layer, so that gates and scales stay near their neutral values, yet not at
/// zero: time and prompt must have an effect that a LoRA can be trained against.
const MODULATION_GAIN: f64 = 0.3;

/// Log-variance of the untrained posterior: a trained VAE's posterior is narrow, and one as wide as its means would
/// hide the picture in noise.
const POSTERIOR_LOGVAR: f64 = -6.0;

fn fill(part: Part, name: &str, shape: &[usize]) -> Fill {
    if part == Part::Vae && name == "encoder.conv_out.bias" {
        return Fill::UpperHalf(POSTERIOR_LOGVAR);
    }
    if shape.len() < 2 {
        return Fill::Constant(if name.ends_with("bias") { 0.0 } else { 1.0 });
    }
    let fan_in: usize = shape[1..].iter().product();
    let deviation = 1.0 / (fan_in as f64).sqrt();
    Fill::Normal(match part {
        Part::Transformer if name.contains("norm") => MODULATION_GAIN * deviation,
        Part::TextEncoder if name.ends_with("token_embedding.weight") => 1.0,
        Part::TextEncoder if name.ends_with("position_embedding.weight") => 0.3,
        Part::TextEncoder2 { .. } if name == "shared.weight" => 1.0,
        Part::TextEncoder2 { .. } if name.ends_with("relative_attention_bias.weight") => 1.0,
        Part::TextEncoder2 { d_kv } if name.ends_with(".q.weight") => {
            deviation / (d_kv as f64).sqrt()
        }
        _ => deviation,
    })
}

/// The values of one parameter.
pub(crate) fn values(part: Part, parameter: &ParameterSpec, seed: u64) -> Vec<f16> {
    let count: usize = parameter.shape.iter().product();
    match fill(part, &parameter.name, &parameter.shape) {
        Fill::Constant(value) => vec![f16::from_f64(value); count],
        Fill::UpperHalf(value) => (0..count)
            .map(|i| f16::from_f64(if i < count / 2 { 0.0 } else { value }))
            .collect(),
        Fill::Normal(deviation) => Noise::new(seed, part.dir(), &parameter.name)
            .map(|z| f16::from_f64(z * deviation))
            .take(count)
            .collect(),
    }
}

/// What a parameter starts from, as the `f16` that a file holds widened again: where training from scratch begins.
pub fn initial_values(part: Part, parameter: &ParameterSpec, seed: u64) -> Vec<f32> {
    values(part, parameter, seed)
        .into_iter()
        .map(f16::to_f32)
        .collect()
}

/// Standard normal numbers by Box and Muller's transform from a BLAKE3 output stream.
struct Noise {
    stream: blake3::OutputReader,
    spare: Option<f64>,
}

impl Noise {
    fn new(seed: u64, part: &str, name: &str) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("spritelora random-base 1");
        hasher.update(&seed.to_le_bytes());
        hasher.update(part.as_bytes());
        hasher.update(b"/");
        hasher.update(name.as_bytes());
        Self {
            stream: hasher.finalize_xof(),
            spare: None,
        }
    }

    /// Uniform in (0, 1], 53 bits.
    fn uniform(&mut self) -> f64 {
        let mut bytes = [0; 8];
        self.stream.fill(&mut bytes);
        ((u64::from_le_bytes(bytes) >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }
}

impl Iterator for Noise {
    type Item = f64;

    fn next(&mut self) -> Option<f64> {
        if let Some(spare) = self.spare.take() {
            return Some(spare);
        }
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * self.uniform()).sin_cos();
        self.spare = Some(radius * sin);
        Some(radius * cos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(part: Part, name: &str, shape: &[usize]) -> (f64, f64) {
        let values = values(part, &ParameterSpec::new(name, shape), 7);
        let count = values.len() as f64;
        let mean = values.iter().map(|v| v.to_f64()).sum::<f64>() / count;
        let square = values
            .iter()
            .map(|v| (v.to_f64() - mean).powi(2))
            .sum::<f64>();
        (mean, (square / count).sqrt())
    }

    #[test]
    fn a_linear_layer_keeps_the_size_of_what_it_is_given() {
        let (mean, deviation) = spread(Part::Transformer, "x_embedder.weight", &[128, 64]);
        assert!(mean.abs() < 0.01, "{mean}");
        assert!((deviation - 0.125).abs() < 0.005, "{deviation}");
    }

    #[test]
    fn a_convolution_counts_its_window_as_inputs() {
        let (_, deviation) = spread(Part::Vae, "decoder.conv_in.weight", &[32, 16, 3, 3]);
        assert!((deviation - 1.0 / 12.0).abs() < 0.005, "{deviation}");
    }

    #[test]
    fn norms_scale_by_one_and_biases_add_nothing() {
        let scale = spread(
            Part::Transformer,
            "transformer_blocks.0.attn.norm_q.weight",
            &[8],
        );
        assert_eq!(scale, (1.0, 0.0));
        assert_eq!(
            spread(Part::Transformer, "x_embedder.bias", &[8]),
            (0.0, 0.0)
        );
    }

    #[test]
    fn modulation_is_small_and_not_zero() {
        let name = "transformer_blocks.0.norm1.linear.weight";
        let (_, deviation) = spread(Part::Transformer, name, &[96, 64]);
        assert!((0.03..0.05).contains(&deviation), "{deviation}");
    }

    #[test]
    fn the_posterior_starts_narrow() {
        let bias = ParameterSpec::new("encoder.conv_out.bias", [4]);
        let values = values(Part::Vae, &bias, 0);
        assert_eq!(values.map_to_f32(), [0.0, 0.0, -6.0, -6.0]);
    }

    trait MapToF32 {
        fn map_to_f32(&self) -> Vec<f32>;
    }

    impl MapToF32 for Vec<f16> {
        fn map_to_f32(&self) -> Vec<f32> {
            self.iter().map(|v| v.to_f32()).collect()
        }
    }

    #[test]
    fn noise_depends_on_the_seed_and_on_the_name_and_on_nothing_else() {
        let draw =
            |seed, name: &str, rows| values(Part::Vae, &ParameterSpec::new(name, [rows, 4]), seed);
        let first = draw(1, "a.weight", 2);
        assert_eq!(first, draw(1, "a.weight", 3)[..8]);
        assert_ne!(first, draw(2, "a.weight", 2));
        assert_ne!(first, draw(1, "b.weight", 2));
    }
}
