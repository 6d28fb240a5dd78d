//! What one forward pass of training is given, on the host.

use flow_matching::TrainingPoint;
use mmdit::patches::PATCH_CELLS;
use mmdit::{image_ids, text_ids};

/// A micro-batch: everything is row-major `f32` with the sample as first axis.
#[derive(Clone, Debug, PartialEq)]
pub struct MicroBatch {
    /// Samples, channels, rows and columns of the latents.
    pub shape: [usize; 4],
    /// Latents as the transformer sees them: `x₀`.
    pub model_input: Vec<f32>,
    /// Standard normal noise: `ε`.
    pub noise: Vec<f32>,
    /// Noise level and loss weight of each sample.
    pub points: Vec<TrainingPoint>,
    /// Text tokens of each sample and their width.
    pub text_shape: [usize; 2],
    /// T5 states, `samples × tokens × width`.
    pub prompt_embeds: Vec<f32>,
    /// CLIP's pooled vectors, `samples × pooled width`.
    pub pooled: Vec<f32>,
}

impl MicroBatch {
    /// Number of samples.
    pub fn len(&self) -> usize {
        self.points.len()
    }

    /// Whether there are no samples.
    pub fn is_empty(&self) -> bool {
        self.points.is_empty()
    }

    /// Positions of one sample's tokens: text, then image.
    pub fn positions(&self) -> Vec<[f32; 3]> {
        let [_, _, h, w] = self.shape;
        let mut positions = text_ids(self.text_shape[0]);
        positions.extend(image_ids(h, w));
        positions
    }

    /// Noisy latents `(1 − σ) x₀ + σ ε` and what is to be predicted, `ε − x₀`, both as tokens `(b, n, 4c)`.
    ///
    /// # Panics
    ///
    /// If the lengths are not those of the shape, or there is half a patch.
    pub fn noisy_and_target(&self) -> [Vec<f32>; 2] {
        let [b, c, h, w] = self.shape;
        let len = c * h * w;
        assert!(
            self.model_input.len() == b * len && self.noise.len() == b * len && self.len() == b,
            "{} latents, {} noises and {} levels of shape {:?}",
            self.model_input.len(),
            self.noise.len(),
            self.len(),
            self.shape
        );
        let mut noisy = Vec::with_capacity(b * len);
        let mut target = Vec::with_capacity(b * len);
        for (sample, point) in self.points.iter().enumerate() {
            let range = sample * len..(sample + 1) * len;
            let (x, noise) = (&self.model_input[range.clone()], &self.noise[range]);
            let rest = 1.0 - point.sigma;
            for place in places([c, h, w]) {
                noisy.push(rest * x[place] + point.sigma * noise[place]);
                target.push(noise[place] - x[place]);
            }
        }
        [noisy, target]
    }
}

/// Where each number of a latent's tokens stands in the latent: token by token, `(c ph pw)`.
fn places([c, h, w]: [usize; 3]) -> impl Iterator<Item = usize> {
    const P: usize = PATCH_CELLS;
    assert!(
        h.is_multiple_of(P) && w.is_multiple_of(P),
        "a latent of {h}×{w} has no 2×2 patches"
    );
    let tokens = (0..h / P).flat_map(move |row| (0..w / P).map(move |column| (row, column)));
    tokens.flat_map(move |(row, column)| {
        let cells = (0..c).flat_map(|channel| (0..P).map(move |y| (channel, y)));
        cells.flat_map(move |(channel, y)| {
            (0..P).map(move |x| (channel * h + row * P + y) * w + column * P + x)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::device::cpu;
    use tensor::{from_f32, to_f32};

    #[test]
    fn tokens_list_their_patches_as_the_transformer_does() {
        let shape = [3, 4, 6];
        let latent: Vec<f32> = (0..72).map(|i| i as f32).collect();
        let tokens: Vec<f32> = places(shape).map(|place| latent[place]).collect();
        let expected = mmdit::patchify(from_f32(latent, [1, 3, 4, 6], &cpu()));
        assert_eq!(tokens, to_f32(&expected));
    }
}
