//! Attention of one head of one sample, forward and backward, 16 queries at a time.
//!
//! Scores are computed transposed, a row of 16 queries per key: softmax then goes down the rows with one query per
//! lane, and the result already has the form of a right side for the product with the values. A panel of scores for
//! 320 keys is 20 KB, so it never leaves the innermost cache. Going backward, scores are computed again from the
//! saved maximum and sum: that is a tenth of the arithmetic, and reading probabilities back from memory costs as much.

use macerator::Arch;

use crate::aligned::Aligned;
use crate::kernels::{Softmax, exponentials, softmax_backward};
use crate::matmul::{Left, PANEL, Right, Start, product};

/// Panels of queries whose shares in the gradients of keys and values are added up at once.
const PANELS_AT_ONCE: usize = 4;

/// The tokens of one head, in rows of its width.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Tokens.
    pub num_tokens: usize,
    /// The first token that asks. Those before it are only keys.
    pub first_query: usize,
    /// Channels.
    pub dim: usize,
}

/// Queries, keys and values of one head, and what is laid out of them; kept by a thread and used again.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// A row per token; queries are multiplied with 1/√dim.
    pub q: Aligned,
    pub k: Aligned,
    pub v: Aligned,
    /// Gradient of the output, a row per token.
    pub d_out: Aligned,
    q_panels: Aligned,
    d_out_panels: Aligned,
    q_rows: Aligned,
    d_out_rows: Aligned,
    k_columns: Aligned,
    v_columns: Aligned,
    scores: Aligned,
    d_scores: Aligned,
    narrow: Aligned,
}

impl Shape {
    /// The queries in groups of 16: first query and number.
    fn panels(self) -> impl Iterator<Item = (usize, usize)> {
        (self.first_query..self.num_tokens)
            .step_by(PANEL)
            .map(move |first| (first, PANEL.min(self.num_tokens - first)))
    }

    fn num_panels(self) -> usize {
        (self.num_tokens - self.first_query).div_ceil(PANEL)
    }
}

/// Rows of queries from `first` on as the right side whose depth is the head's width: `[dim, 16]`.
fn lay_across(rows: &[f32], (first, count): (usize, usize), dim: usize, out: &mut [f32]) {
    out.fill(0.0);
    for (lane, row) in rows[first * dim..(first + count) * dim]
        .chunks_exact(dim)
        .enumerate()
    {
        for (out, value) in out.chunks_exact_mut(PANEL).zip(row) {
            out[lane] = *value;
        }
    }
}

/// The same rows as the right side whose depth are the 16 queries: `[16, dim]` in panels.
fn lay_down(rows: &[f32], (first, count): (usize, usize), dim: usize, out: &mut [f32]) {
    out.fill(0.0);
    for (lane, row) in rows[first * dim..(first + count) * dim]
        .chunks_exact(dim)
        .enumerate()
    {
        for (panel, part) in row.chunks(PANEL).enumerate() {
            out[(panel * PANEL + lane) * PANEL..][..part.len()].copy_from_slice(part);
        }
    }
}

/// Rows into columns: `[n, dim]` → `[dim, n]`.
fn exchange(rows: &[f32], dim: usize, out: &mut [f32]) {
    let n = rows.len() / dim;
    // 16 tokens at a time: their parts of a column are one cache line.
    for first in (0..n).step_by(PANEL) {
        let count = PANEL.min(n - first);
        for channel in 0..dim {
            for i in first..first + count {
                out[channel * n + i] = rows[i * dim + channel];
            }
        }
    }
}

impl Scratch {
    /// `softmax(QKᵀ/√d) V` into `out`, a row per token, and what softmax went through, one per 16 queries.
    pub fn forward(&mut self, arch: Arch, shape: Shape, out: &mut [f32], softmax: &mut [Softmax]) {
        let Shape {
            num_tokens: n, dim, ..
        } = shape;
        let q_panel = self.q_panels.at_least(dim * PANEL);
        let v_columns = self.v_columns.at_least(dim * n);
        let scores = self.scores.at_least(n * PANEL);
        let mixed = self.narrow.at_least(dim * PANEL);
        exchange(&self.v[..n * dim], dim, v_columns);
        for (panel, softmax) in shape.panels().zip(softmax) {
            lay_across(&self.q, panel, dim, q_panel);
            product(
                arch,
                n,
                &[(rows(&self.k, dim), across(dim, q_panel))],
                Start::Zero,
                scores,
                PANEL,
            );
            exponentials(arch, scores, softmax);
            product(
                arch,
                dim,
                &[(rows(v_columns, n), across(n, scores))],
                Start::Zero,
                mixed,
                PANEL,
            );
            let (first, count) = panel;
            for (lane, out) in out[first * dim..(first + count) * dim]
                .chunks_exact_mut(dim)
                .enumerate()
            {
                let inverse = 1.0 / softmax.sum[lane];
                for (out, mixed) in out.iter_mut().zip(mixed.chunks_exact(PANEL)) {
                    *out = mixed[lane] * inverse;
                }
            }
        }
    }

    /// Gradients of queries (before their scale), keys and values, a row per token each. Those of tokens that do not
    /// ask are zeros.
    pub fn backward(
        &mut self,
        arch: Arch,
        shape: Shape,
        softmax: &[Softmax],
        gradients: [&mut [f32]; 3],
    ) {
        let Shape {
            num_tokens: n, dim, ..
        } = shape;
        let [dq, dk, dv] = gradients;
        let num_panels = shape.num_panels();
        let across_len = dim * PANEL;
        let down_len = dim.div_ceil(PANEL) * PANEL * PANEL;
        let k_columns = self.k_columns.at_least(dim * n);
        exchange(&self.k[..n * dim], dim, k_columns);
        let q_panels = self.q_panels.at_least(num_panels * across_len);
        let d_out_panels = self.d_out_panels.at_least(num_panels * across_len);
        let q_rows = self.q_rows.at_least(num_panels * down_len);
        let d_out_rows = self.d_out_rows.at_least(num_panels * down_len);
        for (i, panel) in shape.panels().enumerate() {
            lay_across(
                &self.q,
                panel,
                dim,
                &mut q_panels[i * across_len..][..across_len],
            );
            lay_across(
                &self.d_out,
                panel,
                dim,
                &mut d_out_panels[i * across_len..][..across_len],
            );
            lay_down(&self.q, panel, dim, &mut q_rows[i * down_len..][..down_len]);
            lay_down(
                &self.d_out,
                panel,
                dim,
                &mut d_out_rows[i * down_len..][..down_len],
            );
        }
        let size = n * PANEL;
        let scores = self.scores.at_least(PANELS_AT_ONCE * size);
        let d_scores = self.d_scores.at_least(PANELS_AT_ONCE * size);
        let narrow = self.narrow.at_least(across_len);
        let scale = (dim as f32).sqrt().recip();
        dq[..shape.first_query * dim].fill(0.0);
        dk.fill(0.0);
        dv.fill(0.0);

        let panels: Vec<(usize, (usize, usize))> = shape.panels().enumerate().collect();
        for group in panels.chunks(PANELS_AT_ONCE) {
            let parts = scores
                .chunks_exact_mut(size)
                .zip(d_scores.chunks_exact_mut(size));
            for (&(i, (first, count)), (scores, d_scores)) in group.iter().zip(parts) {
                let q = across(dim, &q_panels[i * across_len..][..across_len]);
                let d_out = across(dim, &d_out_panels[i * across_len..][..across_len]);
                product(
                    arch,
                    n,
                    &[(rows(&self.k, dim), q)],
                    Start::Zero,
                    scores,
                    PANEL,
                );
                product(
                    arch,
                    n,
                    &[(rows(&self.v, dim), d_out)],
                    Start::Zero,
                    d_scores,
                    PANEL,
                );
                softmax_backward(arch, scores, d_scores, &softmax[i]);
                product(
                    arch,
                    dim,
                    &[(rows(k_columns, n), across(n, d_scores))],
                    Start::Zero,
                    narrow,
                    PANEL,
                );
                for (lane, dq) in dq[first * dim..(first + count) * dim]
                    .chunks_exact_mut(dim)
                    .enumerate()
                {
                    for (dq, narrow) in dq.iter_mut().zip(narrow.chunks_exact(PANEL)) {
                        *dq = narrow[lane] * scale;
                    }
                }
            }
            let shares = |of: &'_ [f32], across: &'_ [f32], out: &mut [f32]| {
                let terms: Vec<_> = group
                    .iter()
                    .zip(of.chunks_exact(size))
                    .map(|(&(i, _), part)| {
                        let right = Right {
                            depth: PANEL,
                            columns: dim,
                            data: &across[i * down_len..][..down_len],
                        };
                        (rows(part, PANEL), right)
                    })
                    .collect();
                product(arch, n, &terms, Start::Output, out, dim);
            };
            shares(d_scores, q_rows, dk);
            shares(scores, d_out_rows, dv);
        }
    }
}

fn rows(values: &[f32], stride: usize) -> Left<'_> {
    Left { values, stride }
}

/// One panel.
fn across(depth: usize, data: &[f32]) -> Right<'_> {
    Right {
        depth,
        columns: PANEL,
        data,
    }
}
