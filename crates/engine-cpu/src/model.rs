//! The transformer's weights, laid out for products, and the factors on them.

use macerator::Arch;
use mmdit::config::{MLP_RATIO, MmditConfig, NUM_SINUSOID_CHANNELS};
use mmdit::{BaseWeights, MmditError};
use tensor::Weights;

use crate::linear::{Factors, Linear};

/// Two layers with an activation between them.
#[derive(Debug)]
pub(crate) struct Pair {
    pub first: Linear,
    pub second: Linear,
}

/// Queries, keys and values, and the norms of their heads.
#[derive(Debug)]
pub(crate) struct Projections {
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub norm_q: Vec<f32>,
    pub norm_k: Vec<f32>,
}

/// What one stream of a double block has of its own.
#[derive(Debug)]
pub(crate) struct Stream {
    pub norm: Linear,
    pub attn: Projections,
    pub out: Linear,
    pub mlp: Pair,
}

/// A block. Streams are text, then image.
#[derive(Debug)]
pub(crate) enum Block {
    Double(Box<[Stream; 2]>),
    Single(Box<Single>),
}

/// A single block; `out` takes attention's output and the MLP's side by side.
#[derive(Debug)]
pub(crate) struct Single {
    pub norm: Linear,
    pub attn: Projections,
    pub mlp: Linear,
    pub out: Linear,
}

/// The whole network.
#[derive(Debug)]
pub(crate) struct Model {
    pub config: MmditConfig,
    pub arch: Arch,
    pub x_embedder: Linear,
    pub context_embedder: Linear,
    pub timestep_embedder: Pair,
    pub guidance_embedder: Option<Pair>,
    pub text_embedder: Pair,
    pub blocks: Vec<Block>,
    pub norm_out: Linear,
    pub proj_out: Linear,
}

struct Loader<'a> {
    weights: &'a Weights,
    base: BaseWeights,
    config: &'a MmditConfig,
}

impl Loader<'_> {
    fn linear(&self, path: String, sizes: [usize; 2]) -> Result<Linear, MmditError> {
        let [weight, bias] = mmdit::linear_values(self.weights, self.base, &path, sizes)?;
        Ok(Linear::new(path, sizes, &weight, bias))
    }

    fn pair(
        &self,
        [first, second]: [String; 2],
        [i, hidden, o]: [usize; 3],
    ) -> Result<Pair, MmditError> {
        Ok(Pair {
            first: self.linear(first, [i, hidden])?,
            second: self.linear(second, [hidden, o])?,
        })
    }

    fn embedder(&self, name: &str, inputs: usize) -> Result<Pair, MmditError> {
        let path = format!("time_text_embed.{name}");
        let d = self.config.width();
        self.pair([1, 2].map(|i| format!("{path}.linear_{i}")), [inputs, d, d])
    }

    fn projections(&self, attn: &str, names: [&str; 5]) -> Result<Projections, MmditError> {
        let d = self.config.width();
        let [q, k, v, norm_q, norm_k] = names.map(|name| format!("{attn}.{name}"));
        let norm = |path: String| {
            let shape = [self.config.attention_head_dim];
            self.weights.values(&format!("{path}.weight"), &shape)
        };
        Ok(Projections {
            q: self.linear(q, [d, d])?,
            k: self.linear(k, [d, d])?,
            v: self.linear(v, [d, d])?,
            norm_q: norm(norm_q)?,
            norm_k: norm(norm_k)?,
        })
    }

    fn stream(
        &self,
        block: &str,
        [norm, out, mlp]: [&str; 3],
        projections: [&str; 5],
    ) -> Result<Stream, MmditError> {
        let d = self.config.width();
        let attn = format!("{block}.attn");
        Ok(Stream {
            norm: self.linear(format!("{block}.{norm}.linear"), [d, 6 * d])?,
            attn: self.projections(&attn, projections)?,
            out: self.linear(format!("{attn}.{out}"), [d, d])?,
            mlp: self.pair(
                ["net.0.proj", "net.2"].map(|layer| format!("{block}.{mlp}.{layer}")),
                [d, MLP_RATIO * d, d],
            )?,
        })
    }

    fn double(&self, index: usize) -> Result<Block, MmditError> {
        let block = format!("transformer_blocks.{index}");
        let text = [
            "add_q_proj",
            "add_k_proj",
            "add_v_proj",
            "norm_added_q",
            "norm_added_k",
        ];
        let image = ["to_q", "to_k", "to_v", "norm_q", "norm_k"];
        Ok(Block::Double(Box::new([
            self.stream(&block, ["norm1_context", "to_add_out", "ff_context"], text)?,
            self.stream(&block, ["norm1", "to_out.0", "ff"], image)?,
        ])))
    }

    fn single(&self, index: usize) -> Result<Block, MmditError> {
        let d = self.config.width();
        let block = format!("single_transformer_blocks.{index}");
        Ok(Block::Single(Box::new(Single {
            norm: self.linear(format!("{block}.norm.linear"), [d, 3 * d])?,
            attn: self.projections(
                &format!("{block}.attn"),
                ["to_q", "to_k", "to_v", "norm_q", "norm_k"],
            )?,
            mlp: self.linear(format!("{block}.proj_mlp"), [d, MLP_RATIO * d])?,
            out: self.linear(format!("{block}.proj_out"), [(1 + MLP_RATIO) * d, d])?,
        })))
    }
}

impl Model {
    pub fn load(
        weights: &Weights,
        config: MmditConfig,
        base: BaseWeights,
        arch: Arch,
    ) -> Result<Self, MmditError> {
        weights.check(&config.parameters())?;
        let loader = Loader {
            weights,
            base,
            config: &config,
        };
        let d = config.width();
        let mut blocks = Vec::new();
        for index in 0..config.num_layers {
            blocks.push(loader.double(index)?);
        }
        for index in 0..config.num_single_layers {
            blocks.push(loader.single(index)?);
        }
        Ok(Self {
            arch,
            x_embedder: loader.linear("x_embedder".to_owned(), [config.in_channels, d])?,
            context_embedder: loader.linear(
                "context_embedder".to_owned(),
                [config.joint_attention_dim, d],
            )?,
            timestep_embedder: loader.embedder("timestep_embedder", NUM_SINUSOID_CHANNELS)?,
            guidance_embedder: config
                .guidance_embeds
                .then(|| loader.embedder("guidance_embedder", NUM_SINUSOID_CHANNELS))
                .transpose()?,
            text_embedder: loader.embedder("text_embedder", config.pooled_projection_dim)?,
            blocks,
            norm_out: loader.linear("norm_out.linear".to_owned(), [d, 2 * d])?,
            proj_out: loader.linear("proj_out".to_owned(), [d, config.velocity_channels()])?,
            config,
        })
    }

    /// The layers whose outputs are modulations: block by block (text, then image), then the last norm.
    pub fn modulations(&self) -> Vec<&Linear> {
        let mut layers = Vec::new();
        for block in &self.blocks {
            match block {
                Block::Double(streams) => layers.extend(streams.iter().map(|stream| &stream.norm)),
                Block::Single(single) => layers.push(&single.norm),
            }
        }
        layers.push(&self.norm_out);
        layers
    }

    /// The embedders of time, guidance and pooled text.
    pub fn embedders(&self) -> impl Iterator<Item = &Pair> {
        [
            Some(&self.timestep_embedder),
            self.guidance_embedder.as_ref(),
            Some(&self.text_embedder),
        ]
        .into_iter()
        .flatten()
    }

    /// Every layer, in a fixed order.
    fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let mut layers = vec![&mut self.x_embedder, &mut self.context_embedder];
        let pairs = [
            Some(&mut self.timestep_embedder),
            self.guidance_embedder.as_mut(),
            Some(&mut self.text_embedder),
        ];
        for pair in pairs.into_iter().flatten() {
            layers.extend([&mut pair.first, &mut pair.second]);
        }
        for block in &mut self.blocks {
            match block {
                Block::Double(streams) => {
                    for Stream {
                        norm,
                        attn,
                        out,
                        mlp,
                    } in streams.iter_mut()
                    {
                        layers.extend([norm, &mut attn.q, &mut attn.k, &mut attn.v, out]);
                        layers.extend([&mut mlp.first, &mut mlp.second]);
                    }
                }
                Block::Single(single) => {
                    let Single {
                        norm,
                        attn,
                        mlp,
                        out,
                    } = single.as_mut();
                    layers.extend([norm, &mut attn.q, &mut attn.k, &mut attn.v, mlp, out]);
                }
            }
        }
        layers.extend([&mut self.norm_out, &mut self.proj_out]);
        layers
    }

    /// Replaces all factors; gives the number of their numbers.
    ///
    /// # Panics
    ///
    /// If factors are on no layer, or of another size than theirs.
    pub fn adapt(&mut self, factors: &[Factors]) -> usize {
        let mut offset = 0;
        let mut num_placed = 0;
        for layer in self.linears_mut() {
            let chosen: Vec<usize> = (0..factors.len())
                .filter(|&place| factors[place].path == layer.path)
                .collect();
            num_placed += chosen.len();
            layer.adapt(factors, &chosen, offset);
            offset += layer.num_factors();
        }
        assert_eq!(
            num_placed,
            factors.len(),
            "factors on layers that the transformer has"
        );
        offset
    }

    /// Lays all weights out for going backward.
    pub fn prepare_backward(&mut self) {
        for layer in self.linears_mut() {
            layer.prepare_backward();
        }
    }

    /// Gradients of all factors, in their order, out of one list.
    pub fn gradients(&mut self, all: &[f32], num_factors: usize) -> Vec<[Vec<f32>; 2]> {
        let mut out = vec![[vec![], vec![]]; num_factors];
        for layer in self.linears_mut() {
            layer.take_gradients(all, &mut out);
        }
        out
    }
}
