//! LoRA factors by the path of the layer that they change: `y += scale · (x Aᵀ) Bᵀ`.
//!
//! Several adapters on one layer add up, in the order in which they were given.

use std::collections::BTreeMap;

use tensor::nn::matmul_nt;
use tensor::{Tensor, from_f32};

use crate::config::{LinearSpec, MmditConfig};

/// The two factors on one layer.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// `[rank, in]`.
    pub a: Tensor<2>,
    /// `[out, rank]`.
    pub b: Tensor<2>,
    /// `alpha / rank`, times the strength that a person chose.
    pub scale: f32,
}

/// Adapters by module path, e.g. `transformer_blocks.0.attn.to_q`.
#[derive(Clone, Debug, Default)]
pub struct Adapters {
    by_path: BTreeMap<String, Vec<Adapter>>,
}

/// Why adapters do not fit a model.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum AdapterError {
    /// The model has no such linear layer.
    #[error("the LoRA changes `{path}`, and the transformer has no such linear layer")]
    NoSuchLayer {
        /// The path.
        path: String,
    },
    /// The factors are of another size than the layer.
    #[error(
        "the LoRA's factors for `{path}` are A {a:?} and B {b:?}; the layer has {in_features} inputs and {out_features} outputs"
    )]
    Misshapen {
        /// The path.
        path: String,
        /// Shape of A.
        a: [usize; 2],
        /// Shape of B.
        b: [usize; 2],
        /// What A's second axis should be.
        in_features: usize,
        /// What B's first axis should be.
        out_features: usize,
    },
}

impl Adapters {
    /// No adapters: the base alone.
    pub fn none() -> Self {
        Self::default()
    }

    /// Adds an adapter to the layer at `path`.
    pub fn push(&mut self, path: impl Into<String>, adapter: Adapter) {
        self.by_path.entry(path.into()).or_default().push(adapter);
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_path.is_empty()
    }

    /// The paths that are adapted, sorted.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.by_path.keys().map(String::as_str)
    }

    /// The adapters of one layer.
    pub fn at(&self, path: &str) -> &[Adapter] {
        self.by_path.get(path).map_or(&[], Vec::as_slice)
    }

    /// Compares paths and shapes with a model's layers.
    ///
    /// # Errors
    ///
    /// At the first adapter that has no layer, or not its size.
    pub fn check(&self, config: &MmditConfig) -> Result<(), AdapterError> {
        let layers: BTreeMap<String, LinearSpec> = config
            .linears()
            .into_iter()
            .map(|layer| (layer.path.clone(), layer))
            .collect();
        for (path, adapters) in &self.by_path {
            let layer = layers
                .get(path)
                .ok_or_else(|| AdapterError::NoSuchLayer { path: path.clone() })?;
            for adapter in adapters {
                let (a, b) = (adapter.a.dims(), adapter.b.dims());
                if a[1] != layer.in_features || b[0] != layer.out_features || a[0] != b[1] {
                    return Err(AdapterError::Misshapen {
                        path: path.clone(),
                        a,
                        b,
                        in_features: layer.in_features,
                        out_features: layer.out_features,
                    });
                }
            }
        }
        Ok(())
    }

    /// What the adapters at `path` add to the layer's output, or nothing: `(…, in)` → `(…, out)`.
    ///
    /// Only the input columns from `first_column` on are given, as many as `x` has.
    pub(crate) fn delta<const D: usize>(
        &self,
        path: &str,
        x: &Tensor<D>,
        first_column: usize,
    ) -> Option<Tensor<D>> {
        let width = x.dims()[D - 1];
        self.at(path)
            .iter()
            .map(|adapter| {
                let [rank, in_features] = adapter.a.dims();
                let a = if width == in_features {
                    adapter.a.clone()
                } else {
                    adapter
                        .a
                        .clone()
                        .slice([0..rank, first_column..first_column + width])
                };
                let inner = matmul_nt(x.clone(), a.cast(x.dtype()));
                let inner = if adapter.scale == 1.0 {
                    inner
                } else {
                    inner * adapter.scale
                };
                matmul_nt(inner, adapter.b.clone().cast(x.dtype()))
            })
            .reduce(|sum, delta| sum + delta)
    }
}

impl Adapter {
    /// Factors from row-major values: `a` is `[rank, in]`, `b` is `[out, rank]`.
    ///
    /// # Panics
    ///
    /// If a length is not the product of its sizes.
    pub fn from_values(
        a: Vec<f32>,
        b: Vec<f32>,
        rank: usize,
        scale: f32,
        device: &tensor::Device,
    ) -> Self {
        let (in_features, out_features) = (a.len() / rank, b.len() / rank);
        Self {
            a: from_f32(a, [rank, in_features], device),
            b: from_f32(b, [out_features, rank], device),
            scale,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::device::cpu;
    use tensor::to_f32;

    fn doubling(scale: f32) -> Adapter {
        // A picks the second input, B puts twice that onto the first output.
        Adapter::from_values(vec![0.0, 1.0], vec![2.0, 0.0], 1, scale, &cpu())
    }

    #[test]
    fn adapters_of_one_layer_add_up() {
        let mut adapters = Adapters::none();
        adapters.push("layer", doubling(1.0));
        adapters.push("layer", doubling(0.5));
        let x = from_f32(vec![3.0, 5.0], [1, 2], &cpu());
        let delta = adapters.delta("layer", &x, 0).expect("two are there");
        assert_eq!(to_f32(&delta), [15.0, 0.0]);
        assert!(adapters.delta("elsewhere", &x, 0).is_none());
    }

    #[test]
    fn a_part_of_the_input_meets_its_own_columns_of_a() {
        let mut adapters = Adapters::none();
        adapters.push("layer", doubling(1.0));
        let second = from_f32(vec![5.0], [1, 1], &cpu());
        let delta = adapters.delta("layer", &second, 1).expect("it is there");
        assert_eq!(to_f32(&delta), [10.0, 0.0]);
    }

    #[test]
    fn another_width_is_refused_with_both_sizes() {
        let mut adapters = Adapters::none();
        adapters.push("x_embedder", doubling(1.0));
        let error = adapters
            .check(&MmditConfig::tiny())
            .expect_err("the layer is wider")
            .to_string();
        assert!(
            error.contains("A [1, 2]") && error.contains("8 inputs"),
            "{error}"
        );
        let mut adapters = Adapters::none();
        adapters.push("no.such.layer", doubling(1.0));
        assert!(matches!(
            adapters.check(&MmditConfig::tiny()),
            Err(AdapterError::NoSuchLayer { .. })
        ));
    }
}
