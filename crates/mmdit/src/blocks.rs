//! The two kinds of block, and the modulation vectors of all of them.
//!
//! A modulation is three vectors per sample: shift and scale of a normalised input, and a gate on what the layers
//! make of it (adaLN-Zero). They depend on `temb` alone, so all are computed before the first block.
//!
//! Source: `FluxTransformerBlock`, `FluxSingleTransformerBlock`, `AdaLayerNormZero`, `AdaLayerNormZeroSingle`,
//! `AdaLayerNormContinuous`, diffusers 0.42.

use tensor::nn::{RmsNorm, gelu_tanh, layer_norm};
use tensor::{DType, Tensor};

use crate::adapters::Adapters;
use crate::attention::{attend, heads, join_heads};
use crate::config::{MLP_RATIO, MmditConfig, NORM_EPSILON};
use crate::layers::{Layer, Loader, SplitLayer};
use crate::model::MmditError;
use crate::rope::Rope;

/// Largest finite half-precision number; activations are clipped to it as upstream.
const LARGEST_F16: f32 = 65_504.0;

/// Shift and scale of a normalised input; the scale has its 1 added: `(b, 1, d)` each.
#[derive(Clone, Debug)]
pub(crate) struct Shift {
    shift: Tensor<3>,
    one_plus_scale: Tensor<3>,
}

impl Shift {
    fn new(shift: Tensor<3>, scale: Tensor<3>) -> Self {
        Self {
            shift,
            one_plus_scale: scale + 1.0,
        }
    }

    /// `norm(x)·(1 + scale) + shift`.
    fn apply(&self, x: Tensor<3>) -> Tensor<3> {
        let [_, n, _] = x.dims();
        layer_norm(x, NORM_EPSILON) * over_tokens(&self.one_plus_scale, n)
            + over_tokens(&self.shift, n)
    }
}

/// A shift and the gate on what follows, `(b, 1, d)`.
#[derive(Clone, Debug)]
pub(crate) struct Modulation {
    shift: Shift,
    gate: Tensor<3>,
}

impl Modulation {
    /// `residual + gate·update`.
    fn add(&self, residual: Tensor<3>, update: Tensor<3>) -> Tensor<3> {
        let [_, n, _] = update.dims();
        residual + update * over_tokens(&self.gate, n)
    }
}

/// One vector per sample, to be combined with `n` tokens of each: `(b, 1, d)` → that or `(b, n, d)`.
///
/// A vector for several samples is spelled out: Burn's CPU backend is 35 times slower at a broadcast over a middle
/// axis than at copying and multiplying.
fn over_tokens(vector: &Tensor<3>, n: usize) -> Tensor<3> {
    match vector.dims() {
        [1, _, _] => vector.clone(),
        _ => vector.clone().repeat_dim(1, n),
    }
}

/// `N` vectors of one modulation layer: `(b, d)` → N times `(b, 1, d)`.
fn vectors<const N: usize>(
    layer: &Layer,
    silu_temb: &Tensor<2>,
    adapters: &Adapters,
) -> [Tensor<3>; N] {
    let [b, d] = silu_temb.dims();
    let all = layer.forward(silu_temb.clone(), adapters);
    std::array::from_fn(|i| {
        all.clone()
            .slice([0..b, i * d..(i + 1) * d])
            .reshape([b, 1, d])
    })
}

fn gated_pair(layer: &Layer, silu_temb: &Tensor<2>, adapters: &Adapters) -> [Modulation; 2] {
    let [
        shift_msa,
        scale_msa,
        gate_msa,
        shift_mlp,
        scale_mlp,
        gate_mlp,
    ] = vectors(layer, silu_temb, adapters);
    [
        Modulation {
            shift: Shift::new(shift_msa, scale_msa),
            gate: gate_msa,
        },
        Modulation {
            shift: Shift::new(shift_mlp, scale_mlp),
            gate: gate_mlp,
        },
    ]
}

fn clip(x: Tensor<3>) -> Tensor<3> {
    if x.dtype() == DType::F16 {
        x.clamp(-LARGEST_F16, LARGEST_F16)
    } else {
        x
    }
}

/// Queries, keys and values of one stream, with the norms of its heads.
///
/// Three products, not one: a fused product must be taken apart again, which costs more than it saves wherever
/// a launch is cheap.
#[derive(Clone, Debug)]
struct Projections {
    q: Layer,
    k: Layer,
    v: Layer,
    norm_q: RmsNorm,
    norm_k: RmsNorm,
    num_heads: usize,
}

impl Projections {
    fn load(
        loader: &Loader<'_>,
        config: &MmditConfig,
        attn: &str,
        [q, k, v, norm_q, norm_k]: [&str; 5],
    ) -> Result<Self, MmditError> {
        let d = config.width();
        let linear = |name| loader.linear(format!("{attn}.{name}"), d, d);
        let norm = |name| {
            let weight = format!("{attn}.{name}");
            loader
                .rms_norm(&weight, config.attention_head_dim)
                .map_err(MmditError::from)
        };
        Ok(Self {
            q: linear(q)?,
            k: linear(k)?,
            v: linear(v)?,
            norm_q: norm(norm_q)?,
            norm_k: norm(norm_k)?,
            num_heads: config.num_attention_heads,
        })
    }

    /// `(b, n, d)` → queries, keys, values, each `(b, n, h, d/h)`.
    fn forward(&self, x: Tensor<3>, adapters: &Adapters) -> [Tensor<4>; 3] {
        let h = self.num_heads;
        [
            heads(self.q.forward(x.clone(), adapters), h, Some(&self.norm_q)),
            heads(self.k.forward(x.clone(), adapters), h, Some(&self.norm_k)),
            heads(self.v.forward(x, adapters), h, None),
        ]
    }
}

/// `(b, n, h, d)` each → attention's output, `(b, n, h·d)`.
fn rotate_and_attend([q, k, v]: [Tensor<4>; 3], rope: &Rope) -> Tensor<3> {
    let [q, k, v] = [rope.rotate(q), rope.rotate(k), v].map(|x| x.swap_dims(1, 2)); // b h n d
    join_heads(attend(q, k, v))
}

/// Linear, GELU, linear.
#[derive(Clone, Debug)]
struct FeedForward {
    proj: Layer,
    out: Layer,
}

impl FeedForward {
    fn load(loader: &Loader<'_>, path: &str, d: usize) -> Result<Self, MmditError> {
        Ok(Self {
            proj: loader.linear(format!("{path}.net.0.proj"), d, MLP_RATIO * d)?,
            out: loader.linear(format!("{path}.net.2"), MLP_RATIO * d, d)?,
        })
    }

    fn forward(&self, x: Tensor<3>, adapters: &Adapters) -> Tensor<3> {
        let hidden = gelu_tanh(self.proj.forward(x, adapters));
        self.out.forward(hidden, adapters)
    }
}

/// Modulations of one double block: before attention and before the MLP, per stream.
#[derive(Clone, Debug)]
pub(crate) struct DoubleModulation {
    img: [Modulation; 2],
    txt: [Modulation; 2],
}

/// Two streams with their own weights that attend to each other.
#[derive(Clone, Debug)]
pub(crate) struct DoubleBlock {
    norm1: Layer,
    norm1_context: Layer,
    img: Projections,
    txt: Projections,
    to_out: Layer,
    to_add_out: Layer,
    ff: FeedForward,
    ff_context: FeedForward,
}

impl DoubleBlock {
    pub fn load(
        loader: &Loader<'_>,
        config: &MmditConfig,
        index: usize,
    ) -> Result<Self, MmditError> {
        let d = config.width();
        let block = format!("transformer_blocks.{index}");
        let attn = format!("{block}.attn");
        Ok(Self {
            norm1: loader.linear(format!("{block}.norm1.linear"), d, 6 * d)?,
            norm1_context: loader.linear(format!("{block}.norm1_context.linear"), d, 6 * d)?,
            img: Projections::load(
                loader,
                config,
                &attn,
                ["to_q", "to_k", "to_v", "norm_q", "norm_k"],
            )?,
            txt: Projections::load(
                loader,
                config,
                &attn,
                [
                    "add_q_proj",
                    "add_k_proj",
                    "add_v_proj",
                    "norm_added_q",
                    "norm_added_k",
                ],
            )?,
            to_out: loader.linear(format!("{attn}.to_out.0"), d, d)?,
            to_add_out: loader.linear(format!("{attn}.to_add_out"), d, d)?,
            ff: FeedForward::load(loader, &format!("{block}.ff"), d)?,
            ff_context: FeedForward::load(loader, &format!("{block}.ff_context"), d)?,
        })
    }

    pub fn modulation(&self, silu_temb: &Tensor<2>, adapters: &Adapters) -> DoubleModulation {
        DoubleModulation {
            img: gated_pair(&self.norm1, silu_temb, adapters),
            txt: gated_pair(&self.norm1_context, silu_temb, adapters),
        }
    }

    /// `(b, n_txt, d)`, `(b, n_img, d)` → the same.
    pub fn forward(
        &self,
        [txt, img]: [Tensor<3>; 2],
        modulation: &DoubleModulation,
        rope: &Rope,
        adapters: &Adapters,
    ) -> [Tensor<3>; 2] {
        let [img_attn, img_mlp] = &modulation.img;
        let [txt_attn, txt_mlp] = &modulation.txt;
        let [b, n_txt, d] = txt.dims();
        let [_, n_img, _] = img.dims();

        let txt_qkv = self
            .txt
            .forward(txt_attn.shift.apply(txt.clone()), adapters);
        let img_qkv = self
            .img
            .forward(img_attn.shift.apply(img.clone()), adapters);
        let mut pairs = txt_qkv.into_iter().zip(img_qkv);
        let joined = std::array::from_fn(|_| {
            let (txt, img) = pairs.next().expect("both streams have three parts");
            Tensor::cat(vec![txt, img], 1) // b n_txt+n_img h d/h
        });
        let mixed = rotate_and_attend(joined, rope);
        let from_txt = mixed.clone().slice([0..b, 0..n_txt, 0..d]);
        let from_img = mixed.slice([0..b, n_txt..n_txt + n_img, 0..d]);

        let img = img_attn.add(img, self.to_out.forward(from_img, adapters));
        let img_update = self.ff.forward(img_mlp.shift.apply(img.clone()), adapters);
        let img = img_mlp.add(img, img_update);

        let txt = txt_attn.add(txt, self.to_add_out.forward(from_txt, adapters));
        let txt_update = self
            .ff_context
            .forward(txt_mlp.shift.apply(txt.clone()), adapters);
        // Upstream clips the text stream only: it is the one that overflows.
        let txt = clip(txt_mlp.add(txt, txt_update));
        [txt, img]
    }
}

/// Text and image as one sequence; attention and MLP side by side.
#[derive(Clone, Debug)]
pub(crate) struct SingleBlock {
    norm: Layer,
    attn: Projections,
    proj_mlp: Layer,
    proj_out: SplitLayer,
}

impl SingleBlock {
    pub fn load(
        loader: &Loader<'_>,
        config: &MmditConfig,
        index: usize,
    ) -> Result<Self, MmditError> {
        let d = config.width();
        let mlp = MLP_RATIO * d;
        let block = format!("single_transformer_blocks.{index}");
        Ok(Self {
            norm: loader.linear(format!("{block}.norm.linear"), d, 3 * d)?,
            attn: Projections::load(
                loader,
                config,
                &format!("{block}.attn"),
                ["to_q", "to_k", "to_v", "norm_q", "norm_k"],
            )?,
            proj_mlp: loader.linear(format!("{block}.proj_mlp"), d, mlp)?,
            proj_out: SplitLayer::new(loader.linear(format!("{block}.proj_out"), d + mlp, d)?, d),
        })
    }

    pub fn modulation(&self, silu_temb: &Tensor<2>, adapters: &Adapters) -> Modulation {
        let [shift, scale, gate] = vectors(&self.norm, silu_temb, adapters);
        Modulation {
            shift: Shift::new(shift, scale),
            gate,
        }
    }

    /// `(b, n, d)`, text first → the same.
    pub fn forward(
        &self,
        x: Tensor<3>,
        modulation: &Modulation,
        rope: &Rope,
        adapters: &Adapters,
    ) -> Tensor<3> {
        let normed = modulation.shift.apply(x.clone());
        let mlp = gelu_tanh(self.proj_mlp.forward(normed.clone(), adapters));
        let mixed = rotate_and_attend(self.attn.forward(normed, adapters), rope);
        let update = self.proj_out.forward(mixed, mlp, adapters);
        clip(modulation.add(x, update))
    }
}

/// The last norm, modulated by `temb` without a gate; its layer gives the scale before the shift.
#[derive(Clone, Debug)]
pub(crate) struct NormOut {
    linear: Layer,
}

impl NormOut {
    pub fn load(loader: &Loader<'_>, d: usize) -> Result<Self, MmditError> {
        Ok(Self {
            linear: loader.linear("norm_out.linear", d, 2 * d)?,
        })
    }

    pub fn modulation(&self, silu_temb: &Tensor<2>, adapters: &Adapters) -> Shift {
        let [scale, shift] = vectors(&self.linear, silu_temb, adapters);
        Shift::new(shift, scale)
    }

    pub fn forward(&self, x: Tensor<3>, modulation: &Shift) -> Tensor<3> {
        modulation.apply(x)
    }
}
