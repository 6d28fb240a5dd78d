//! What a configuration and a batch amount to in elements, checked once.

use mmdit::MmditConfig;
use mmdit::config::MLP_RATIO;

use super::error::ModelError;
use crate::ops::{attention, attention_any};

/// The two streams of a double block: text and image.
pub const STREAMS: [usize; 2] = [0, 1];

/// Most tokens of a batch, text and image, of all samples: beyond any card's memory, and within what kernels count with.
pub const MAX_TOKENS: usize = 1 << 27;

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

    /// Checks what a batch amounts to: counts of it have to fit what kernels count with.
    ///
    /// # Errors
    ///
    /// If there are no samples or no image tokens, too many tokens, or more in a sample than the attention for this width
    /// of heads has room for.
    pub fn check_shape(&self, shape: Shape) -> Result<(), ModelError> {
        let refused = |what, expected, found| {
            Err(ModelError::Batch {
                what,
                expected,
                found,
            })
        };
        let [h, w] = shape.latent_cells;
        for side in [h, w] {
            if side == 0 || !side.is_multiple_of(2) {
                return refused("the sides in latent cells", "even and above 0", side);
            }
        }
        let tokens = (h / 2).saturating_mul(w / 2).saturating_add(shape.text);
        let all = tokens.saturating_mul(shape.b);
        if all == 0 || all > MAX_TOKENS {
            return refused("its tokens, text and image,", "1 to 134217728", all);
        }
        if !attention::supports(self.dh) && tokens > attention_any::MOST_TOKENS {
            return Err(ModelError::Unsupported {
                what: "a sample's tokens",
                expected: "at most 12000 where heads are not 64 or 128 wide",
                found: tokens,
            });
        }
        Ok(())
    }

    /// Checks that velocities can be compared with latents of `shape`, and added to them.
    ///
    /// # Errors
    ///
    /// If the two have different numbers of channels (a network that is given more than latents, as FLUX.1 Fill is), or a
    /// sample's number of elements is no multiple of 8.
    pub fn check_velocity(&self, shape: Shape) -> Result<(), ModelError> {
        let channels = self.config.velocity_channels();
        if channels != self.config.in_channels {
            return Err(ModelError::Unsupported {
                what: "the velocity's channels",
                expected: "those of the latent tokens",
                found: channels,
            });
        }
        let elements = shape.image() * channels;
        if !elements.is_multiple_of(8) {
            return Err(ModelError::Batch {
                what: "the numbers of a sample's latents",
                expected: "a multiple of 8",
                found: elements,
            });
        }
        Ok(())
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
    fn batches_that_no_kernel_can_count_are_refused_with_the_number() {
        let refusal = |config: &MmditConfig, b, text, latent_cells: [usize; 2]| {
            let sizes = Sizes::new(config).expect("supported widths");
            let shape = Shape {
                b,
                text,
                latent_cells,
            };
            match sizes.check_shape(shape) {
                Ok(()) => None,
                Err(
                    ModelError::Batch { what, found, .. }
                    | ModelError::Unsupported { what, found, .. },
                ) => Some((what, found)),
                Err(error) => panic!("{error}"),
            }
        };
        let flux = MmditConfig::flux_dev();
        assert_eq!(refusal(&flux, 4, 512, [256, 256]), None);
        for (b, text, cells, what) in [
            (1, 512, [1, 64], "the sides in latent cells"),
            (1, 512, [64, 0], "the sides in latent cells"),
            (0, 512, [64, 64], "its tokens, text and image,"),
            (3_000_000, 512, [64, 64], "its tokens, text and image,"),
            (
                70_000 * 70_000,
                512,
                [64, 64],
                "its tokens, text and image,",
            ),
            (1, 4_000_000_000, [64, 64], "its tokens, text and image,"),
            (
                usize::MAX,
                usize::MAX,
                [64, 64],
                "its tokens, text and image,",
            ),
        ] {
            let refused = refusal(&flux, b, text, cells).map(|(what, _)| what);
            assert_eq!(refused, Some(what), "{b} {text} {cells:?}");
        }
        let tiny = MmditConfig::tiny();
        assert_eq!(
            refusal(&tiny, 1, 64, [220, 220]),
            Some(("a sample's tokens", 12_164))
        );
    }

    #[test]
    fn a_network_that_is_given_more_than_latents_is_refused_for_training() {
        let shape = Shape {
            b: 1,
            text: 512,
            latent_cells: [64, 64],
        };
        let mut config = MmditConfig::flux_dev();
        let check = |config: &MmditConfig, shape| {
            let sizes = Sizes::new(config).expect("supported widths");
            sizes
                .check_velocity(shape)
                .map_err(|error| error.to_string())
        };
        assert_eq!(check(&config, shape), Ok(()));
        (config.in_channels, config.out_channels) = (12, 12);
        let odd = Shape {
            latent_cells: [10, 10],
            ..shape
        };
        assert!(check(&config, odd).is_err_and(|error| error.contains("300")));
        (config.in_channels, config.out_channels) = (384, 64);
        assert!(check(&config, shape).is_err_and(|error| error.contains("64")));
    }

    #[test]
    fn an_odd_width_is_refused_with_the_number() {
        let config = MmditConfig {
            num_attention_heads: 3,
            attention_head_dim: 4,
            ..MmditConfig::tiny()
        };
        let error = Sizes::new(&config).expect_err("12 is no multiple of 8");
        assert!(error.to_string().ends_with("here it is 12"));
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
