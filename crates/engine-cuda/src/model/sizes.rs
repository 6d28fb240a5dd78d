//! What a configuration and a batch amount to in elements, checked once.

use mmdit::MmditConfig;
use mmdit::config::MLP_RATIO;

use super::error::ModelError;

/// The two streams of a double block: text and image.
pub const STREAMS: [usize; 2] = [0, 1];

/// Sizes of the model that the schedule uses again and again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// The configuration that they come from.
    pub config: MmditConfig,
    /// Width of the model.
    pub d: usize,
    /// Attention heads.
    pub h: usize,
    /// Width of a head.
    pub dh: usize,
    /// Width of the MLPs.
    pub mlp: usize,
}

impl Sizes {
    /// Checks a configuration.
    ///
    /// # Errors
    ///
    /// If a size is none that the kernels are written for.
    pub fn new(config: &MmditConfig) -> Result<Self, ModelError> {
        let (d, dh) = (config.width(), config.attention_head_dim);
        let unsupported = |what, expected, found| ModelError::Unsupported {
            what,
            expected,
            found,
        };
        if !d.is_multiple_of(8) {
            return Err(unsupported("the width", "a multiple of 8", d));
        }
        if !dh.is_multiple_of(2) || dh > 256 {
            return Err(unsupported("the head width", "even and at most 256", dh));
        }
        Ok(Self {
            config: config.clone(),
            d,
            h: config.num_attention_heads,
            dh,
            mlp: MLP_RATIO * d,
        })
    }

    /// Modulation vectors of all blocks together, in elements per sample.
    pub fn modulation_width(&self) -> usize {
        let config = &self.config;
        (12 * config.num_layers + 3 * config.num_single_layers + 2) * self.d
    }

    /// Where a double block's twelve vectors begin: text (shift, scale, gate; shift, scale, gate), then image.
    pub fn double_modulation(&self, block: usize) -> usize {
        12 * block * self.d
    }

    /// Where a single block's three vectors begin: shift, scale, gate.
    pub fn single_modulation(&self, block: usize) -> usize {
        (12 * self.config.num_layers + 3 * block) * self.d
    }

    /// Where the last norm's two vectors begin: scale, shift.
    pub fn out_modulation(&self) -> usize {
        (12 * self.config.num_layers + 3 * self.config.num_single_layers) * self.d
    }

    /// Number of blocks, double ones first.
    pub fn num_blocks(&self) -> usize {
        self.config.num_layers + self.config.num_single_layers
    }
}

/// How many samples of how many tokens go through at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Shape {
    /// Samples.
    pub b: usize,
    /// Text tokens of a sample.
    pub text: usize,
    /// Rows and columns of latent cells; both even.
    pub latent_cells: [usize; 2],
}

impl Shape {
    /// Image tokens of a sample.
    pub fn image(&self) -> usize {
        self.latent_cells[0] / 2 * (self.latent_cells[1] / 2)
    }

    /// Text and image tokens of a sample.
    pub fn tokens(&self) -> usize {
        self.text + self.image()
    }

    /// Tokens of one stream in all samples: 0 is text, 1 is image.
    pub fn rows(&self, stream: usize) -> usize {
        self.b * [self.text, self.image()][stream]
    }

    /// Tokens of both streams in all samples.
    pub fn all_rows(&self) -> usize {
        self.b * self.tokens()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flux_dev_has_344_modulation_vectors() {
        let sizes = Sizes::new(&MmditConfig::flux_dev()).expect("it is the model");
        assert_eq!(sizes.modulation_width(), 344 * 3072);
        assert_eq!(sizes.out_modulation(), 342 * 3072);
        assert_eq!(sizes.single_modulation(0), sizes.double_modulation(19));
    }

    #[test]
    fn an_odd_width_is_refused_with_the_number() {
        let config = MmditConfig {
            num_attention_heads: 3,
            attention_head_dim: 4,
            ..MmditConfig::tiny()
        };
        let error = Sizes::new(&config).expect_err("12 is no multiple of 8");
        assert!(error.to_string().ends_with("this transformer has 12"));
    }

    #[test]
    fn tokens_are_patches_of_two_by_two_cells() {
        let shape = Shape {
            b: 2,
            text: 3,
            latent_cells: [4, 6],
        };
        assert_eq!(
            (shape.image(), shape.tokens(), shape.all_rows()),
            (6, 9, 18)
        );
        assert_eq!([shape.rows(0), shape.rows(1)], [6, 12]);
    }
}
