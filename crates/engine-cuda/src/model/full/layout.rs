//! Where every parameter lies in one flat buffer.
//!
//! The flat order is that in which the network's weights are laid out in 16 bits, biases and fused weights included, so
//! that one offset serves the 16-bit copy, the `f32` values, their moments, average and gradients. Each piece begins at
//! a multiple of 128 elements (the arena's 256 bytes); what lies between is zero and stays zero.

use std::collections::BTreeMap;
use std::ops::Range;

use tensor::ParameterSpec;

use crate::model::linear::{Linear, LinearGradients, Weight};
use crate::model::network::Network;
use crate::view::View;

/// Names and places.
pub(super) struct Layout {
    /// In the configuration's order.
    pub(super) parameters: Vec<(ParameterSpec, Range<usize>)>,
    /// Elements in all, a multiple of 128.
    pub(super) len: usize,
}

fn weight_of(linear: &Linear) -> View {
    match &linear.weight {
        Weight::Half(view) => *view,
        Weight::Nf4(_) => unreachable!("trained weights are not quantised"),
    }
}

/// Both head norms of every attention by name.
fn norms(network: &Network) -> Vec<(String, View)> {
    let double = network.double.iter().enumerate().flat_map(|(i, block)| {
        let names = [["norm_added_q", "norm_added_k"], ["norm_q", "norm_k"]];
        let streams = block.streams.iter().zip(names);
        streams.flat_map(move |(stream, names)| {
            let path = format!("transformer_blocks.{i}.attn");
            names
                .map(|name| format!("{path}.{name}.weight"))
                .into_iter()
                .zip(stream.norms)
        })
    });
    let single = network.single.iter().enumerate().flat_map(|(i, block)| {
        let path = format!("single_transformer_blocks.{i}.attn");
        ["norm_q", "norm_k"]
            .map(|name| format!("{path}.{name}.weight"))
            .into_iter()
            .zip(block.norms)
    });
    double.chain(single).collect()
}

impl Layout {
    /// Places in `slab`, which the network's weights lie in.
    pub(super) fn new(network: &Network, slab: View) -> Self {
        let place = |view: View| (view.address() - slab.address()) as usize / 2;
        let mut places = BTreeMap::new();
        for linear in network.linears() {
            let (weight, bias) = (place(weight_of(linear)), place(linear.bias));
            let width = linear.in_features;
            for part in &linear.parts {
                places.insert(format!("{}.weight", part.path), weight + part.row * width);
                places.insert(format!("{}.bias", part.path), bias + part.row);
            }
        }
        for (name, view) in norms(network) {
            places.insert(name, place(view));
        }
        let specs = network.sizes.config.parameters().into_iter();
        let parameters = specs
            .map(|spec| {
                let start = places[&spec.name];
                let end = start + spec.num_elements() as usize;
                (spec, start..end)
            })
            .collect();
        Self {
            parameters,
            len: slab.bytes() / 2,
        }
    }

    /// Flat values as parameters.
    pub(super) fn split(&self, flat: &[f32], factor: f32) -> Vec<(ParameterSpec, Vec<f32>)> {
        let parameters = self.parameters.iter();
        parameters
            .map(|(spec, range)| {
                let values = flat[range.clone()].iter().map(|value| value * factor);
                (spec.clone(), values.collect())
            })
            .collect()
    }
}

/// Tells every layer where its gradients go: in `gradients`, `f32`, as the weights lie in `slab`.
pub(super) fn train_all(network: &mut Network, slab: View, gradients: View) {
    let of = |view: View| {
        let offset = (view.address() - slab.address()) as usize / 2;
        gradients.skip(4 * offset).take(2 * view.bytes())
    };
    for linear in network.linears_mut() {
        linear.gradients = Some(LinearGradients {
            weight: of(weight_of(linear)),
            bias: of(linear.bias),
            sums_bias: true,
        });
    }
    let elsewhere = |linear: &mut Linear| {
        linear.gradients = linear.gradients.map(|gradients| LinearGradients {
            sums_bias: false,
            ..gradients
        });
    };
    for stream in network
        .double
        .iter_mut()
        .flat_map(|block| &mut block.streams)
    {
        for linear in [
            &mut stream.qkv,
            &mut stream.out,
            &mut stream.up,
            &mut stream.down,
        ] {
            elsewhere(linear);
        }
        stream.norm_gradients = Some(stream.norms.map(of));
    }
    for block in &mut network.single {
        elsewhere(&mut block.input);
        elsewhere(&mut block.output);
        block.norm_gradients = Some(block.norms.map(of));
    }
}
