//! A frozen linear layer with its LoRA factors: `y = x Wᵀ + b + Σ (x Aᵀ)(s B)ᵀ`.
//!
//! The factors are extra terms of the same product: the rows `x Aᵀ` times `s B` forward, and the rows `dy (s B)`
//! times `A` backward. Nothing is merged into the weight, so its bits are those of the base.

use macerator::Arch;

use crate::aligned::Aligned;
use crate::kernels::add_outer;
use crate::matmul::{Left, Panels, Right, Start, product};

/// LoRA factors on one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Factors {
    /// Path of the layer, e.g. `transformer_blocks.0.attn.to_q`.
    pub path: String,
    /// Inner width.
    pub rank: usize,
    /// What the product is multiplied with: alpha / rank, times a strength.
    pub scale: f32,
    /// `[rank, in]`, row-major.
    pub a: Vec<f32>,
    /// `[out, rank]`, row-major.
    pub b: Vec<f32>,
}

/// All factors on one layer, one below the other.
#[derive(Debug)]
pub(crate) struct Adapter {
    /// Inner widths added up.
    pub rank: usize,
    /// Where each of them comes from: its place in the list, its inner width, its scale.
    pub members: Vec<(usize, usize, f32)>,
    /// First number of this layer in a list of all gradients; A's, then B's transposed.
    pub offset: usize,
    a_forward: Panels,
    b_forward: Panels,
    a_backward: Panels,
    b_backward: Panels,
}

/// A layer.
#[derive(Debug)]
pub(crate) struct Linear {
    pub path: String,
    pub in_features: usize,
    pub out_features: usize,
    forward: Panels,
    backward: Option<Panels>,
    bias: Vec<f32>,
    pub adapter: Option<Adapter>,
}

/// Rows of the width of the factors, kept by whoever calls.
#[derive(Debug, Default)]
pub(crate) struct Inner {
    /// `x Aᵀ`.
    pub u: Aligned,
    /// `dy (s B)`.
    pub g: Aligned,
}

impl Linear {
    /// From a row-major weight `[out, in]` and a bias.
    pub fn new(
        path: String,
        [in_features, out_features]: [usize; 2],
        weight: &[f32],
        bias: Vec<f32>,
    ) -> Self {
        Self {
            path,
            in_features,
            out_features,
            forward: Panels::new(in_features, out_features, |k, c| {
                weight[c * in_features + k]
            }),
            backward: None,
            bias,
            adapter: None,
        }
    }

    /// Lays the weight out for going backward too.
    pub fn prepare_backward(&mut self) {
        if self.backward.is_none() {
            self.backward = Some(self.forward.transposed());
        }
    }

    /// Puts factors on the layer, or takes all of them off. `chosen` are places in `factors`.
    pub fn adapt(&mut self, factors: &[Factors], chosen: &[usize], offset: usize) {
        let (i, o) = (self.in_features, self.out_features);
        for &place in chosen {
            let Factors { rank, a, b, .. } = &factors[place];
            assert!(
                a.len() == rank * i && b.len() == rank * o,
                "factors of rank {rank} with {} and {} numbers on `{}` of {i} inputs and {o} outputs",
                a.len(),
                b.len(),
                self.path
            );
        }
        let members: Vec<_> = chosen
            .iter()
            .map(|&place| (place, factors[place].rank, factors[place].scale))
            .collect();
        let rank = members.iter().map(|(_, rank, _)| rank).sum();
        let fits = self
            .adapter
            .as_ref()
            .is_some_and(|adapter| adapter.members == members && adapter.offset == offset);
        if !fits {
            self.adapter = (!members.is_empty()).then(|| Adapter {
                rank,
                members,
                offset,
                a_forward: Panels::new(i, rank, |_, _| 0.0),
                b_forward: Panels::new(rank, o, |_, _| 0.0),
                a_backward: Panels::new(rank, i, |_, _| 0.0),
                b_backward: Panels::new(o, rank, |_, _| 0.0),
            });
        }
        if let Some(adapter) = &mut self.adapter {
            adapter.fill(factors, [i, o]);
        }
    }

    /// `rows` rows of inputs into rows of outputs, neither with gaps.
    pub fn forward(&self, arch: Arch, rows: usize, x: &[f32], out: &mut [f32], inner: &mut Inner) {
        let start = Start::Bias(&self.bias);
        let x = Left {
            values: x,
            stride: self.in_features,
        };
        let base = (x, self.forward.right());
        let Some(adapter) = &self.adapter else {
            return product(arch, rows, &[base], start, out, self.out_features);
        };
        let u = inner.u.at_least(rows * adapter.rank);
        product(
            arch,
            rows,
            &[(x, adapter.a_forward.right())],
            Start::Zero,
            u,
            adapter.rank,
        );
        let u = Left {
            values: u,
            stride: adapter.rank,
        };
        let terms = [base, (u, adapter.b_forward.right())];
        product(arch, rows, &terms, start, out, self.out_features);
    }

    /// Adds the gradients of the factors to `gradients`, and leaves in `inner` what [`Linear::backward_terms`] needs.
    ///
    /// `x` are the layer's inputs and `dy` its outputs' gradients.
    pub fn factor_gradients(
        &self,
        arch: Arch,
        rows: usize,
        [x, dy]: [&[f32]; 2],
        gradients: &mut [f32],
        inner: &mut Inner,
    ) {
        let Some(adapter) = &self.adapter else {
            return;
        };
        let (i, o, rank) = (self.in_features, self.out_features, adapter.rank);
        let left = |values, stride| Left { values, stride };
        let u = inner.u.at_least(rows * rank);
        product(
            arch,
            rows,
            &[(left(x, i), adapter.a_forward.right())],
            Start::Zero,
            u,
            rank,
        );
        let g = inner.g.at_least(rows * rank);
        product(
            arch,
            rows,
            &[(left(dy, o), adapter.b_backward.right())],
            Start::Zero,
            g,
            rank,
        );
        let (a, b) =
            gradients[adapter.offset..adapter.offset + rank * (i + o)].split_at_mut(rank * i);
        add_outer(arch, &g[..rows * rank], &x[..rows * i], i, a);
        add_outer(arch, &u[..rows * rank], &dy[..rows * o], o, b);
    }

    /// What the inputs' gradient is a sum of, given the outputs' and [`Linear::factor_gradients`]' `inner`.
    ///
    /// # Panics
    ///
    /// If the weight was not laid out by [`Linear::prepare_backward`].
    pub fn backward_terms<'a>(&'a self, dy: &'a [f32], inner: &'a Inner) -> Terms<'a> {
        let backward = self
            .backward
            .as_ref()
            .expect("training lays out every weight for going backward");
        let dy = Left {
            values: dy,
            stride: self.out_features,
        };
        let base = (dy, backward.right());
        let factors = self.adapter.as_ref().map(|adapter| {
            let g = Left {
                values: &inner.g,
                stride: adapter.rank,
            };
            (g, adapter.a_backward.right())
        });
        Terms { base, factors }
    }

    /// Number of numbers of its factors.
    pub fn num_factors(&self) -> usize {
        self.adapter.as_ref().map_or(0, |adapter| {
            adapter.rank * (self.in_features + self.out_features)
        })
    }

    /// Takes the gradients of its factors out of a list of all: A and B of each, with the place that they came from.
    pub fn take_gradients(&self, gradients: &[f32], out: &mut [[Vec<f32>; 2]]) {
        let Some(adapter) = &self.adapter else {
            return;
        };
        let (i, o) = (self.in_features, self.out_features);
        let (a, b) =
            gradients[adapter.offset..][..adapter.rank * (i + o)].split_at(adapter.rank * i);
        let mut first = 0;
        for &(place, rank, scale) in &adapter.members {
            let a = a[first * i..(first + rank) * i].to_vec();
            // dB = s · dyᵀ (x Aᵀ), kept transposed and without s so far.
            let b = (0..o)
                .flat_map(|row| (first..first + rank).map(move |j| scale * b[j * o + row]))
                .collect();
            out[place] = [a, b];
            first += rank;
        }
    }
}

/// The base's term of a product and that of the factors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms<'a> {
    base: (Left<'a>, Right<'a>),
    factors: Option<(Left<'a>, Right<'a>)>,
}

/// The gradient of the inputs that some layers share.
pub(crate) fn input_gradient<const N: usize>(
    arch: Arch,
    rows: usize,
    layers: [Terms<'_>; N],
    out: &mut [f32],
) {
    let mut terms = Vec::with_capacity(2 * N);
    for layer in layers {
        terms.push(layer.base);
        terms.extend(layer.factors);
    }
    let width = terms[0].1.columns;
    product(arch, rows, &terms, Start::Zero, out, width);
}

impl Adapter {
    fn fill(&mut self, factors: &[Factors], [i, o]: [usize; 2]) {
        // Which factors an inner column belongs to, and which of theirs it is.
        let columns: Vec<(&Factors, usize)> = self
            .members
            .iter()
            .flat_map(|&(place, rank, _)| (0..rank).map(move |j| (&factors[place], j)))
            .collect();
        let a = |column: usize, k: usize| {
            let (factors, j) = columns[column];
            factors.a[j * i + k]
        };
        let b = |row: usize, column: usize| {
            let (factors, j) = columns[column];
            factors.scale * factors.b[row * factors.rank + j]
        };
        debug_assert!(self.b_forward.right().columns == o, "outputs");
        self.a_forward.fill(|k, column| a(column, k));
        self.a_backward.fill(a);
        self.b_forward.fill(|column, row| b(row, column));
        self.b_backward.fill(b);
    }
}
