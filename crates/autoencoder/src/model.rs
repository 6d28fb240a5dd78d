//! Encoder and decoder: levels of residual blocks around a middle block that attends.
//!
//! ```text
//! encode: conv_in, per level (resnets, halve), resnet, attention, resnet, norm, silu, conv_out
//! decode: conv_in, resnet, attention, resnet, per level (resnets, double), norm, silu, conv_out
//! ```
//!
//! Source: `AutoencoderKL`, diffusers 0.42.

use std::path::Path;

use rayon::prelude::*;
use tensor::device::cpu;
use tensor::nn::silu;
use tensor::{Device, Precision, Tensor, Weights, WeightsError};

use crate::config::{AutoencoderConfig, AutoencoderError};
use crate::layers::{Attention, Conv, GroupNorm, Loader, Resnet};

/// Receives what leaves a block, by the block's name in the checkpoint.
type Probe<'a> = &'a mut dyn FnMut(&str, &Tensor<4>);

/// The autoencoder.
#[derive(Debug)]
pub struct Autoencoder {
    config: AutoencoderConfig,
    precision: Precision,
    encoder: Encoder,
    quant_conv: Option<Conv>,
    post_quant_conv: Option<Conv>,
    decoder: Decoder,
}

/// The distribution of a picture's latents: independent normals.
#[derive(Clone, Debug)]
pub struct Posterior {
    /// `(b, c, h, w)`.
    pub mean: Tensor<4>,
    /// Logarithm of the variance, `(b, c, h, w)`, within [−30, 20].
    pub logvar: Tensor<4>,
}

impl Posterior {
    /// `mean + exp(logvar/2)·noise`.
    ///
    /// # Panics
    ///
    /// If the noise has another shape.
    pub fn sample(&self, noise: Tensor<4>) -> Tensor<4> {
        assert_eq!(
            noise.dims(),
            self.mean.dims(),
            "noise and latents differ in shape"
        );
        self.mean.clone() + (self.logvar.clone() * 0.5).exp() * noise
    }
}

impl Autoencoder {
    /// Opens `dir`: `config.json` and `diffusion_pytorch_model.safetensors`, whole or in shards.
    ///
    /// # Errors
    ///
    /// If the configuration is refused or the weights are not its.
    pub fn open(
        dir: &Path,
        device: &Device,
        precision: Precision,
    ) -> Result<Self, AutoencoderError> {
        let (config, weights) = Self::look_at(dir)?;
        Self::load(&weights, &config, device, precision)
    }

    /// Configuration and weights of `dir`, checked as [`Self::open`] checks them and not loaded: for who needs them late
    /// and wants to know early.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub fn look_at(dir: &Path) -> Result<(AutoencoderConfig, Weights), AutoencoderError> {
        let config = AutoencoderConfig::from_file(&dir.join("config.json"))?;
        let weights = Weights::open(dir, "diffusion_pytorch_model")?;
        weights.check(&config.parameters())?;
        Ok((config, weights))
    }

    /// Builds the autoencoder from its weights, after a check of all names and shapes.
    ///
    /// # Errors
    ///
    /// If weights are unknown, missing or misshapen, or cannot be read.
    pub fn load(
        weights: &Weights,
        config: &AutoencoderConfig,
        device: &Device,
        precision: Precision,
    ) -> Result<Self, AutoencoderError> {
        weights.check(&config.parameters())?;
        let loader = Loader {
            weights,
            device,
            precision,
            groups: config.norm_num_groups,
        };
        let z = config.latent_channels;
        let pointwise = |used: bool, name, width| {
            used.then(|| Conv::load(&loader, name, [width, width], 1))
                .transpose()
        };
        Ok(Self {
            encoder: Encoder::load(&loader, config)?,
            quant_conv: pointwise(config.use_quant_conv, "quant_conv", 2 * z)?,
            post_quant_conv: pointwise(config.use_post_quant_conv, "post_quant_conv", z)?,
            decoder: Decoder::load(&loader, config)?,
            precision,
            config: config.clone(),
        })
    }

    /// The sizes that it was built with.
    pub fn config(&self) -> &AutoencoderConfig {
        &self.config
    }

    /// Distribution of the latents of pictures in [−1, 1]: `(b, 3, H, W)` → `(b, c, H/f, W/f)`, in the precision that
    /// the weights were loaded in, whatever the pictures come in.
    ///
    /// # Panics
    ///
    /// If the sides are no positive multiples of `f` (see [`AutoencoderConfig::check_size`]).
    pub fn encode(&self, pictures: Tensor<4>) -> Posterior {
        let posteriors = one_by_one_on_cpu(pictures, |pictures| {
            self.encode_traced(pictures, &mut |_, _| {})
        });
        let (means, logvars) = posteriors
            .into_iter()
            .map(|posterior| (posterior.mean, posterior.logvar))
            .unzip();
        Posterior {
            mean: Tensor::cat(means, 0),
            logvar: Tensor::cat(logvars, 0),
        }
    }

    /// [`Self::encode`], showing what leaves each block (`encoder.conv_in`,
    /// `encoder.down_blocks.0`, …, `encoder.mid_block`).
    pub fn encode_traced(&self, pictures: Tensor<4>, probe: Probe) -> Posterior {
        let [_, c, height_px, width_px] = pictures.dims();
        assert_eq!(c, self.config.in_channels, "channels of the picture");
        if let Err(error) = self.config.check_size(width_px, height_px) {
            panic!("{error}");
        }
        let pictures = pictures.cast(self.precision.dtype());
        let mut moments = self.encoder.forward(pictures, probe);
        if let Some(conv) = &self.quant_conv {
            moments = conv.forward(moments);
        }
        let [b, channels, h, w] = moments.dims();
        let half = channels / 2;
        Posterior {
            mean: moments.clone().slice([0..b, 0..half, 0..h, 0..w]),
            logvar: moments
                .slice([0..b, half..channels, 0..h, 0..w])
                .clamp(-30.0, 20.0),
        }
    }

    /// Pictures, nominally in [−1, 1], of latents: `(b, c, h, w)` → `(b, 3, f·h, f·w)`, in the precision that the
    /// weights were loaded in, whatever the latents come in.
    ///
    /// # Panics
    ///
    /// If the latents have another number of channels.
    pub fn decode(&self, latents: Tensor<4>) -> Tensor<4> {
        Tensor::cat(
            one_by_one_on_cpu(latents, |latents| {
                self.decode_traced(latents, &mut |_, _| {})
            }),
            0,
        )
    }

    /// [`Self::decode`], showing what leaves each block (`decoder.conv_in`, `decoder.mid_block`,
    /// `decoder.up_blocks.0`, …).
    pub fn decode_traced(&self, latents: Tensor<4>, probe: Probe) -> Tensor<4> {
        let [_, c, _, _] = latents.dims();
        assert_eq!(c, self.config.latent_channels, "channels of the latents");
        let latents = latents.cast(self.precision.dtype());
        let latents = match &self.post_quant_conv {
            Some(conv) => conv.forward(latents),
            None => latents,
        };
        self.decoder.forward(latents, probe)
    }
}

/// Applies a network to a batch: on the CPU picture by picture on all cores, elsewhere to all at once.
///
/// Many of the CPU backend's passes use one thread, so this takes a third of the time (measured on two cores, 128²),
/// and what a picture becomes does not depend on its batch.
fn one_by_one_on_cpu<T: Send>(
    batch: Tensor<4>,
    apply: impl Fn(Tensor<4>) -> T + Send + Sync,
) -> Vec<T> {
    let [b, _, _, _] = batch.dims();
    if b == 1 || batch.device() != cpu() {
        return vec![apply(batch)];
    }
    batch.chunk(b, 0).into_par_iter().map(apply).collect()
}

#[derive(Debug)]
struct Encoder {
    conv_in: Conv,
    down_blocks: Vec<Level>,
    mid_block: MidBlock,
    conv_norm_out: GroupNorm,
    conv_out: Conv,
}

#[derive(Debug)]
struct Decoder {
    conv_in: Conv,
    mid_block: MidBlock,
    up_blocks: Vec<Level>,
    conv_norm_out: GroupNorm,
    conv_out: Conv,
}

/// Residual blocks of one resolution, then the convolution that goes with the step to the next.
#[derive(Debug)]
struct Level {
    resnets: Vec<Resnet>,
    resample: Option<Conv>,
}

#[derive(Debug)]
struct MidBlock {
    before: Resnet,
    attention: Option<Attention>,
    after: Resnet,
}

impl Encoder {
    fn load(loader: &Loader, config: &AutoencoderConfig) -> Result<Self, WeightsError> {
        let channels = &config.block_out_channels;
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let down_blocks = load_levels(
            loader,
            channels,
            config.layers_per_block,
            |level| format!("encoder.down_blocks.{level}"),
            "downsamplers.0.conv",
        )?;
        Ok(Self {
            conv_in: Conv::load(loader, "encoder.conv_in", [config.in_channels, first], 3)?,
            down_blocks,
            mid_block: MidBlock::load(loader, "encoder.mid_block", last, config)?,
            conv_norm_out: GroupNorm::load(loader, "encoder.conv_norm_out", last)?,
            conv_out: Conv::load(
                loader,
                "encoder.conv_out",
                [last, 2 * config.latent_channels],
                3,
            )?,
        })
    }

    fn forward(&self, pictures: Tensor<4>, probe: Probe) -> Tensor<4> {
        let mut x = self.conv_in.forward(pictures);
        probe("encoder.conv_in", &x);
        for (index, level) in self.down_blocks.iter().enumerate() {
            x = level.resnets(x);
            if let Some(conv) = &level.resample {
                x = conv.downsample(x);
            }
            probe(&format!("encoder.down_blocks.{index}"), &x);
        }
        x = self.mid_block.forward(x);
        probe("encoder.mid_block", &x);
        self.conv_out.forward(silu(self.conv_norm_out.forward(x)))
    }
}

impl Decoder {
    fn load(loader: &Loader, config: &AutoencoderConfig) -> Result<Self, WeightsError> {
        let channels: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let (last, first) = (channels[0], channels[channels.len() - 1]);
        let up_blocks = load_levels(
            loader,
            &channels,
            config.layers_per_block + 1,
            |level| format!("decoder.up_blocks.{level}"),
            "upsamplers.0.conv",
        )?;
        Ok(Self {
            conv_in: Conv::load(loader, "decoder.conv_in", [config.latent_channels, last], 3)?,
            mid_block: MidBlock::load(loader, "decoder.mid_block", last, config)?,
            up_blocks,
            conv_norm_out: GroupNorm::load(loader, "decoder.conv_norm_out", first)?,
            conv_out: Conv::load(loader, "decoder.conv_out", [first, config.out_channels], 3)?,
        })
    }

    fn forward(&self, latents: Tensor<4>, probe: Probe) -> Tensor<4> {
        let mut x = self.conv_in.forward(latents);
        probe("decoder.conv_in", &x);
        x = self.mid_block.forward(x);
        probe("decoder.mid_block", &x);
        for (index, level) in self.up_blocks.iter().enumerate() {
            x = level.resnets(x);
            if let Some(conv) = &level.resample {
                x = conv.upsample(x);
            }
            probe(&format!("decoder.up_blocks.{index}"), &x);
        }
        self.conv_out.forward(silu(self.conv_norm_out.forward(x)))
    }
}

/// Levels in the order of `channels`; every one but the last steps to another resolution.
fn load_levels(
    loader: &Loader,
    channels: &[usize],
    layers: usize,
    name: impl Fn(usize) -> String,
    resample: &str,
) -> Result<Vec<Level>, WeightsError> {
    let mut levels = Vec::with_capacity(channels.len());
    let mut previous = channels[0];
    for (index, &width) in channels.iter().enumerate() {
        let name = name(index);
        let mut resnets = Vec::with_capacity(layers);
        for layer in 0..layers {
            let layer = format!("{name}.resnets.{layer}");
            resnets.push(Resnet::load(loader, &layer, [previous, width])?);
            previous = width;
        }
        let step = || Conv::load(loader, &format!("{name}.{resample}"), [width, width], 3);
        let resample = (index + 1 < channels.len()).then(step).transpose()?;
        levels.push(Level { resnets, resample });
    }
    Ok(levels)
}

impl Level {
    fn resnets(&self, input: Tensor<4>) -> Tensor<4> {
        self.resnets
            .iter()
            .fold(input, |x, resnet| resnet.forward(x))
    }
}

impl MidBlock {
    fn load(
        loader: &Loader,
        name: &str,
        width: usize,
        config: &AutoencoderConfig,
    ) -> Result<Self, WeightsError> {
        let attention = || Attention::load(loader, &format!("{name}.attentions.0"), width);
        Ok(Self {
            before: Resnet::load(loader, &format!("{name}.resnets.0"), [width, width])?,
            attention: config.mid_block_add_attention.then(attention).transpose()?,
            after: Resnet::load(loader, &format!("{name}.resnets.1"), [width, width])?,
        })
    }

    fn forward(&self, input: Tensor<4>) -> Tensor<4> {
        let mut x = self.before.forward(input);
        if let Some(attention) = &self.attention {
            x = attention.forward(x);
        }
        self.after.forward(x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::weights::num_parameters;
    use tensor::{from_f32, to_f32};

    fn tiny() -> AutoencoderConfig {
        AutoencoderConfig {
            in_channels: 3,
            out_channels: 3,
            block_out_channels: vec![2, 4],
            layers_per_block: 1,
            latent_channels: 2,
            norm_num_groups: 2,
            scaling_factor: 0.5,
            shift_factor: 0.25,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }

    /// Different, reproducible values for every parameter.
    fn model(config: &AutoencoderConfig) -> Autoencoder {
        in_precision(config, Precision::F32)
    }

    fn in_precision(config: &AutoencoderConfig, precision: Precision) -> Autoencoder {
        let mut state = 7u32;
        let weights = Weights::from_values(config.parameters().into_iter().map(|spec| {
            let values = (0..spec.num_elements())
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) as f32 / (1 << 24) as f32 - 0.5
                })
                .collect();
            (spec, values)
        }));
        Autoencoder::load(&weights, config, &cpu(), precision).expect("all weights are there")
    }

    fn picture(b: usize, h: usize, w: usize) -> Tensor<4> {
        let values = (0..b * 3 * h * w).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0);
        from_f32(values.collect(), [b, 3, h, w], &cpu())
    }

    #[test]
    fn flux_has_the_published_number_of_parameters() {
        assert_eq!(
            num_parameters(&AutoencoderConfig::flux().parameters()),
            83_819_683
        );
    }

    #[test]
    fn sides_shrink_and_grow_by_the_scale_factor_and_need_not_be_equal() {
        let model = model(&tiny());
        let posterior = model.encode(picture(1, 4, 6));
        assert_eq!(posterior.mean.dims(), [1, 2, 2, 3]);
        assert_eq!(posterior.logvar.dims(), [1, 2, 2, 3]);
        assert_eq!(model.decode(posterior.mean).dims(), [1, 3, 4, 6]);
    }

    #[test]
    fn what_comes_in_another_precision_than_the_weights_is_converted() {
        let exact = model(&tiny());
        let mean = exact.encode(picture(1, 4, 6)).mean;
        let decoded = to_f32(&exact.decode(mean.clone()));
        for precision in [Precision::Bf16, Precision::F16] {
            let model = in_precision(&tiny(), precision);
            let rounded = model.encode(picture(1, 4, 6)).mean;
            assert_eq!(rounded.dtype(), precision.dtype());
            for (found, expected) in [
                (to_f32(&rounded), to_f32(&mean)),
                (to_f32(&model.decode(mean.clone())), decoded.clone()),
            ] {
                let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
                for (found, expected) in found.iter().zip(&expected) {
                    assert!(
                        (found - expected).abs() <= 0.05 * largest,
                        "{found} {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn three_levels_without_attention_or_pointwise_convolutions_work_too() {
        let config = AutoencoderConfig {
            block_out_channels: vec![2, 4, 4],
            use_quant_conv: false,
            use_post_quant_conv: false,
            mid_block_add_attention: false,
            ..tiny()
        };
        assert_eq!(config.scale_factor_px(), 4);
        let model = model(&config);
        assert_eq!(
            model.decode(model.encode(picture(1, 8, 4)).mean).dims(),
            [1, 3, 8, 4]
        );
    }

    #[test]
    fn pictures_of_a_batch_do_not_touch_each_other() {
        let model = model(&tiny());
        let both = picture(2, 4, 4);
        let second = both.clone().slice([1..2, 0..3, 0..4, 0..4]);
        let together = to_f32(&model.encode(both).mean);
        let alone = to_f32(&model.encode(second).mean);
        assert_eq!(together[8..], alone);
    }

    #[test]
    fn a_trace_names_every_block_in_order() {
        let model = model(&tiny());
        let mut names = Vec::new();
        let posterior =
            model.encode_traced(picture(1, 4, 4), &mut |name, _| names.push(name.to_owned()));
        model.decode_traced(posterior.mean, &mut |name, _| names.push(name.to_owned()));
        let expected = [
            "encoder.conv_in",
            "encoder.down_blocks.0",
            "encoder.down_blocks.1",
            "encoder.mid_block",
            "decoder.conv_in",
            "decoder.mid_block",
            "decoder.up_blocks.0",
            "decoder.up_blocks.1",
        ];
        assert_eq!(names, expected);
    }

    #[test]
    fn a_sample_without_noise_is_the_mean_and_scaling_goes_both_ways() {
        let posterior = Posterior {
            mean: from_f32(vec![1.0, 2.0], [1, 2, 1, 1], &cpu()),
            logvar: from_f32(vec![0.0, 2.0 * 3f32.ln()], [1, 2, 1, 1], &cpu()),
        };
        let noise = |values: [f32; 2]| from_f32(values.to_vec(), [1, 2, 1, 1], &cpu());
        assert_eq!(to_f32(&posterior.sample(noise([0.0, 0.0]))), [1.0, 2.0]);
        let sample = to_f32(&posterior.sample(noise([1.0, 1.0])));
        assert!(
            (sample[0] - 2.0).abs() < 1e-6 && (sample[1] - 5.0).abs() < 1e-5,
            "{sample:?}"
        );
        let config = tiny();
        let x0 = config.to_model(posterior.mean.clone());
        assert_eq!(to_f32(&x0), [0.375, 0.875]);
        assert_eq!(to_f32(&config.from_model(x0)), [1.0, 2.0]);
    }

    #[test]
    fn sides_that_do_not_divide_are_refused_with_the_multiple() {
        let error = AutoencoderConfig::flux()
            .check_size(64, 60)
            .expect_err("60 is no multiple of 8");
        assert!(error.to_string().contains("multiples of 8"), "{error}");
        AutoencoderConfig::flux()
            .check_size(0, 8)
            .expect_err("there is no picture");
    }

    #[test]
    fn a_configuration_for_other_blocks_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("config.json");
        let load = |text: &str| {
            fs_err::write(&path, text).expect("the test directory can be written");
            AutoencoderConfig::from_file(&path)
        };
        let attends =
            r#"{"block_out_channels":[32],"down_block_types":["AttnDownEncoderBlock2D"]}"#;
        let error = load(attends)
            .expect_err("levels do not attend here")
            .to_string();
        assert!(error.contains("down_block_types"), "{error}");
        let error = load(r#"{"block_out_channels":[33]}"#)
            .expect_err("32 groups")
            .to_string();
        assert!(error.contains("norm_num_groups = 32"), "{error}");
        let known = load(r#"{"block_out_channels":[32, 64]}"#).expect("the rest has defaults");
        assert_eq!((known.scale_factor_px(), known.use_quant_conv), (2, true));
    }
}
