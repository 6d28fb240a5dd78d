//! All weights of the transformer in one slab, in the order of the forward pass.
//!
//! Loading runs twice over the same code: once on a dry stream with a counting arena, which tells the slab's size, and
//! once for good. On the way every tensor lies in host memory as its file has it (memory-mapped) and on the device once
//! as it came; quantising happens there.

use crate::arena::Arena;
use crate::error::CudaError;
use crate::half_type::Half;
use crate::model::error::ModelError;
use crate::model::linear::{Linear, Nf4Part, Part, Weight};
use crate::model::sizes::Sizes;
use crate::model::source::{NormalWeights, Tensor, WeightSource};
use crate::ops::elementwise;
use crate::ops::nf4::{self, Absmax, Source};
use crate::stream::{Buffer, Stream};
use crate::view::View;

/// Weights of one NF4 block.
const NF4_BLOCK: usize = 64;
/// Scales of one block of double quantisation.
const ABSMAX_BLOCK: usize = 256;

/// In what form linear layers are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightForm {
    /// In T.
    Half,
    /// In 4 bits, blocks of 64; scales in `f32` or themselves in 8 bits.
    Nf4 {
        /// Whether scales are in 8 bits.
        double_quant: bool,
    },
}

/// Layers and head norms of one stream of a double block.
#[derive(Clone, Debug)]
pub struct DoubleStream {
    /// Six modulation vectors.
    pub norm: Linear,
    /// Queries, keys, values.
    pub qkv: Linear,
    /// After attention.
    pub out: Linear,
    /// First layer of the MLP.
    pub up: Linear,
    /// Second layer of the MLP.
    pub down: Linear,
    /// T `[dh]` each: norms of queries and keys.
    pub norms: [View; 2],
    /// `f32 [dh]` each: where their gradients go, if the weights are trained.
    pub norm_gradients: Option<[View; 2]>,
}

/// A double block: text and image.
#[derive(Clone, Debug)]
pub struct DoubleWeights {
    /// 0 is text, 1 is image.
    pub streams: [DoubleStream; 2],
}

/// A single block.
#[derive(Clone, Debug)]
pub struct SingleWeights {
    /// Three modulation vectors.
    pub norm: Linear,
    /// Queries, keys, values and the MLP's input.
    pub input: Linear,
    /// From attention and MLP side by side.
    pub output: Linear,
    /// T `[dh]` each: norms of queries and keys.
    pub norms: [View; 2],
    /// `f32 [dh]` each: where their gradients go, if the weights are trained.
    pub norm_gradients: Option<[View; 2]>,
}

/// Two layers with SiLU between them.
#[derive(Clone, Debug)]
pub struct EmbedderWeights {
    /// The first.
    pub linear_1: Linear,
    /// The second.
    pub linear_2: Linear,
}

/// All weights.
#[derive(Clone, Debug)]
pub struct Network {
    /// Sizes.
    pub sizes: Sizes,
    /// Image tokens in.
    pub x_embedder: Linear,
    /// Text tokens in.
    pub context_embedder: Linear,
    /// Time.
    pub timestep: EmbedderWeights,
    /// Guidance, where the model has it.
    pub guidance: Option<EmbedderWeights>,
    /// The pooled caption.
    pub pooled: EmbedderWeights,
    /// Double blocks.
    pub double: Vec<DoubleWeights>,
    /// Single blocks.
    pub single: Vec<SingleWeights>,
    /// Two modulation vectors of the last norm.
    pub norm_out: Linear,
    /// Velocity out.
    pub proj_out: Linear,
}

impl Network {
    /// Every product, in the order of the forward pass.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        let embedders = [
            Some(&self.timestep),
            self.guidance.as_ref(),
            Some(&self.pooled),
        ];
        [&self.x_embedder, &self.context_embedder]
            .into_iter()
            .chain(
                embedders
                    .into_iter()
                    .flatten()
                    .flat_map(|e| [&e.linear_1, &e.linear_2]),
            )
            .chain(self.double.iter().flat_map(|block| {
                block
                    .streams
                    .iter()
                    .flat_map(|s| [&s.norm, &s.qkv, &s.out, &s.up, &s.down])
            }))
            .chain(
                self.single
                    .iter()
                    .flat_map(|b| [&b.norm, &b.input, &b.output]),
            )
            .chain([&self.norm_out, &self.proj_out])
    }

    /// As [`Network::linears`], to be changed.
    pub fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let mut all = vec![&mut self.x_embedder, &mut self.context_embedder];
        for embedder in [
            Some(&mut self.timestep),
            self.guidance.as_mut(),
            Some(&mut self.pooled),
        ]
        .into_iter()
        .flatten()
        {
            all.extend([&mut embedder.linear_1, &mut embedder.linear_2]);
        }
        for s in self.double.iter_mut().flat_map(|block| &mut block.streams) {
            all.extend([&mut s.norm, &mut s.qkv, &mut s.out, &mut s.up, &mut s.down]);
        }
        for b in &mut self.single {
            all.extend([&mut b.norm, &mut b.input, &mut b.output]);
        }
        all.extend([&mut self.norm_out, &mut self.proj_out]);
        all
    }

    /// Elements of the largest products' weights and of the largest that are smaller: what dequantising needs at once.
    pub fn largest_weights(&self) -> [usize; 2] {
        let sizes = || {
            let linears = self.linears();
            linears.map(|linear| linear.in_features * linear.out_features)
        };
        let largest = sizes().max().unwrap_or(0);
        let smaller = sizes().filter(|&size| size < largest).max();
        [smaller.unwrap_or(0), largest]
    }
}

/// Puts weights into a slab.
struct Loader<'a> {
    stream: &'a Stream,
    arena: &'a Arena,
    source: &'a dyn WeightSource,
    sizes: &'a Sizes,
    t: Half,
    form: WeightForm,
    /// Room for one tensor as it came, one in `f32`, and what quantising needs; none in a dry run.
    staging: Option<Staging>,
}

/// Memory that is given back after loading.
struct Staging {
    raw: Buffer,
    converted: Buffer,
    absmax: Buffer,
    double: Buffer,
    not_finite: Buffer,
}

impl Staging {
    fn new(stream: &Stream, largest: usize) -> Result<Self, CudaError> {
        let take = |bytes, what| stream.allocate(bytes, what);
        Ok(Self {
            raw: take(4 * largest, "loading weights")?,
            converted: take(4 * largest, "loading weights")?,
            absmax: take(4 * largest.div_ceil(NF4_BLOCK), "quantising weights")?,
            double: take(nf4::DOUBLE_SCRATCH, "quantising scales")?,
            not_finite: take(4, "quantising weights")?,
        })
    }
}

/// The weights and the memory that they lie in.
pub struct LoadedNetwork {
    /// The weights.
    pub network: Network,
    /// Keeps their memory.
    pub slab: Buffer,
}

/// Loads all weights.
///
/// # Errors
///
/// If the device has too little memory, or a tensor cannot be read or quantised.
pub fn load(
    stream: &Stream,
    source: &dyn WeightSource,
    sizes: &Sizes,
    t: Half,
    form: WeightForm,
) -> Result<LoadedNetwork, CudaError> {
    let dry = Stream::dry();
    let counting = Arena::counting();
    let planned = Loader {
        stream: &dry,
        arena: &counting,
        source,
        sizes,
        t,
        form,
        staging: None,
    }
    .network()?;
    let slab = stream.allocate(counting.peak_bytes(), "the weights")?;
    let staging = match stream.is_dry() {
        true => None,
        false => {
            let one = |linear: &Linear| {
                linear.in_features * linear.parts.iter().map(|part| part.rows).max().unwrap_or(0)
            };
            let largest = planned.linears().map(one).max().unwrap_or(0);
            Some(Staging::new(stream, largest.max(1 << 16))?)
        }
    };
    let network = Loader {
        stream,
        arena: &Arena::over(slab.view()),
        source,
        sizes,
        t,
        form,
        staging,
    }
    .network()?;
    stream.synchronize()?;
    Ok(LoadedNetwork { network, slab })
}

/// Where all weights lie in 16 bits; none is loaded.
///
/// # Errors
///
/// None: nothing is done on a device.
pub(crate) fn arrange(arena: &Arena, sizes: &Sizes, t: Half) -> Result<Network, CudaError> {
    Loader {
        stream: &Stream::dry(),
        arena,
        source: &NormalWeights { std: 0.0 },
        sizes,
        t,
        form: WeightForm::Half,
        staging: None,
    }
    .network()
}

impl Loader<'_> {
    fn network(&self) -> Result<Network, CudaError> {
        let Sizes { config, d, mlp, .. } = self.sizes;
        let (d, mlp) = (*d, *mlp);
        let one = |path: &str, inputs, outputs| self.linear(&[(path.to_owned(), outputs)], inputs);
        let embedder = |name: &str, inputs| -> Result<EmbedderWeights, CudaError> {
            let path = format!("time_text_embed.{name}");
            Ok(EmbedderWeights {
                linear_1: one(&format!("{path}.linear_1"), inputs, d)?,
                linear_2: one(&format!("{path}.linear_2"), d, d)?,
            })
        };
        let sinusoids = mmdit::config::NUM_SINUSOID_CHANNELS;
        Ok(Network {
            sizes: self.sizes.clone(),
            x_embedder: one("x_embedder", config.in_channels, d)?,
            context_embedder: one("context_embedder", config.joint_attention_dim, d)?,
            timestep: embedder("timestep_embedder", sinusoids)?,
            guidance: match config.guidance_embeds {
                true => Some(embedder("guidance_embedder", sinusoids)?),
                false => None,
            },
            pooled: embedder("text_embedder", config.pooled_projection_dim)?,
            double: (0..config.num_layers)
                .map(|i| self.double(i, d, mlp))
                .collect::<Result<_, _>>()?,
            single: (0..config.num_single_layers)
                .map(|i| self.single(i, d, mlp))
                .collect::<Result<_, _>>()?,
            norm_out: one("norm_out.linear", d, 2 * d)?,
            proj_out: one("proj_out", d, config.velocity_channels())?,
        })
    }

    fn double(&self, index: usize, d: usize, mlp: usize) -> Result<DoubleWeights, CudaError> {
        let block = format!("transformer_blocks.{index}");
        let stream = |norm: &str, qkv: [&str; 3], out: &str, ff: &str, norms: [&str; 2]| {
            let qkv = qkv.map(|name| (format!("{block}.attn.{name}"), d));
            let one = |path: String, inputs, outputs| self.linear(&[(path, outputs)], inputs);
            let [q, k] = norms.map(|name| self.norm(&format!("{block}.attn.{name}")));
            Ok::<_, CudaError>(DoubleStream {
                norm: one(format!("{block}.{norm}.linear"), d, 6 * d)?,
                qkv: self.linear(&qkv, d)?,
                out: one(format!("{block}.attn.{out}"), d, d)?,
                up: one(format!("{block}.{ff}.net.0.proj"), d, mlp)?,
                down: one(format!("{block}.{ff}.net.2"), mlp, d)?,
                norms: [q?, k?],
                norm_gradients: None,
            })
        };
        Ok(DoubleWeights {
            streams: [
                stream(
                    "norm1_context",
                    ["add_q_proj", "add_k_proj", "add_v_proj"],
                    "to_add_out",
                    "ff_context",
                    ["norm_added_q", "norm_added_k"],
                )?,
                stream(
                    "norm1",
                    ["to_q", "to_k", "to_v"],
                    "to_out.0",
                    "ff",
                    ["norm_q", "norm_k"],
                )?,
            ],
        })
    }

    fn single(&self, index: usize, d: usize, mlp: usize) -> Result<SingleWeights, CudaError> {
        let block = format!("single_transformer_blocks.{index}");
        let input = [
            (format!("{block}.attn.to_q"), d),
            (format!("{block}.attn.to_k"), d),
            (format!("{block}.attn.to_v"), d),
            (format!("{block}.proj_mlp"), mlp),
        ];
        Ok(SingleWeights {
            norm: self.linear(&[(format!("{block}.norm.linear"), 3 * d)], d)?,
            input: self.linear(&input, d)?,
            output: self.linear(&[(format!("{block}.proj_out"), d)], d + mlp)?,
            norms: [
                self.norm(&format!("{block}.attn.norm_q"))?,
                self.norm(&format!("{block}.attn.norm_k"))?,
            ],
            norm_gradients: None,
        })
    }

    fn norm(&self, path: &str) -> Result<View, CudaError> {
        let view = self.arena.take(2 * self.sizes.dh);
        self.fill_half(&format!("{path}.weight"), view, self.sizes.dh)?;
        Ok(view)
    }

    /// Layers of one input as one product.
    fn linear(&self, layers: &[(String, usize)], in_features: usize) -> Result<Linear, CudaError> {
        let mut parts = Vec::new();
        let mut row = 0;
        for (path, rows) in layers {
            parts.push(Part {
                path: path.clone(),
                row,
                rows: *rows,
            });
            row += rows;
        }
        let bias = self.arena.take(2 * row);
        for part in &parts {
            let view = bias.elements_from(part.row).take(2 * part.rows);
            self.fill_half(&format!("{}.bias", part.path), view, part.rows)?;
        }
        let weight = match self.form {
            WeightForm::Half => {
                let view = self.arena.take(2 * row * in_features);
                for part in &parts {
                    let n = part.rows * in_features;
                    let view = view.elements_from(part.row * in_features).take(2 * n);
                    self.fill_half(&format!("{}.weight", part.path), view, n)?;
                }
                Weight::Half(view)
            }
            WeightForm::Nf4 { double_quant } => Weight::Nf4(
                parts
                    .iter()
                    .map(|part| self.nf4(&part.path, part.rows * in_features, double_quant))
                    .collect::<Result<_, _>>()?,
            ),
        };
        Ok(Linear {
            parts,
            in_features,
            out_features: row,
            weight,
            bias,
            factors: None,
            gradients: None,
        })
    }

    /// A tensor on the device as it came, and its type.
    fn stage(&self, staging: &Staging, name: &str, n: usize) -> Result<(View, Source), CudaError> {
        let raw = staging.raw.view();
        let upload = |bytes: &[u8], element: usize| {
            assert_eq!(bytes.len(), element * n, "bytes of `{name}`");
            self.stream.upload(raw, bytes)
        };
        Ok(match self.source.tensor(name)? {
            Tensor::F32(bytes) => {
                upload(bytes, 4)?;
                (raw.take(4 * n), Source::F32)
            }
            Tensor::Converted(values) => {
                upload(bytemuck::cast_slice(&values), 4)?;
                (raw.take(4 * n), Source::F32)
            }
            Tensor::Bf16(bytes) => {
                upload(bytes, 2)?;
                (raw.take(2 * n), Source::Half(Half::Bf16))
            }
            Tensor::F16(bytes) => {
                upload(bytes, 2)?;
                (raw.take(2 * n), Source::Half(Half::F16))
            }
            Tensor::Normal { std, seed } => {
                elementwise::fill_normal(self.stream, self.t, raw.take(2 * n), n, seed, std)?;
                (raw.take(2 * n), Source::Half(self.t))
            }
        })
    }

    /// A tensor of `n` elements into T.
    fn fill_half(&self, name: &str, target: View, n: usize) -> Result<(), CudaError> {
        let Some(staging) = &self.staging else {
            return Ok(());
        };
        let (raw, source) = self.stage(staging, name, n)?;
        match source {
            Source::Half(half) if half == self.t => {
                self.stream.copy_rows(target, 2 * n, raw, 2 * n, 2 * n, 1)
            }
            Source::Half(half) => {
                let wide = staging.converted.view().take(4 * n);
                elementwise::to_f32(self.stream, half, wide, raw, n)?;
                elementwise::to_half(self.stream, self.t, target, wide, n)
            }
            Source::F32 => elementwise::to_half(self.stream, self.t, target, raw, n),
        }
    }

    /// A layer's weight of `n` elements into NF4.
    fn nf4(&self, path: &str, n: usize, double_quant: bool) -> Result<Nf4Part, CudaError> {
        let num_blocks = n.div_ceil(NF4_BLOCK);
        let packed = self.arena.take(n.div_ceil(2));
        let absmax = if double_quant {
            Absmax::Double {
                codes: self.arena.take(num_blocks),
                absmax: self.arena.take(4 * num_blocks.div_ceil(ABSMAX_BLOCK)),
                offset: self.arena.take(4),
            }
        } else {
            Absmax::Plain {
                absmax: self.arena.take(4 * num_blocks),
            }
        };
        let part = Nf4Part { packed, absmax, n };
        let Some(staging) = &self.staging else {
            return Ok(part);
        };
        let (raw, source) = self.stage(staging, &format!("{path}.weight"), n)?;
        let not_finite = staging.not_finite.view();
        self.stream.fill(not_finite, 0)?;
        let plain = match absmax {
            Absmax::Plain { absmax } => absmax,
            Absmax::Double { .. } => staging.absmax.view().take(4 * num_blocks),
        };
        nf4::quantise(self.stream, packed, plain, not_finite, raw, source, n)?;
        if let Absmax::Double {
            codes,
            absmax,
            offset,
        } = absmax
        {
            let scratch = staging.double.view();
            nf4::double_quantise(
                self.stream,
                codes,
                absmax,
                offset,
                plain,
                scratch,
                num_blocks,
            )?;
        }
        let count = self.stream.download::<u32>(not_finite, 1)?[0];
        if count > 0 {
            return Err(ModelError::NotFinite {
                path: path.to_owned(),
                count,
            }
            .into());
        }
        Ok(part)
    }
}
