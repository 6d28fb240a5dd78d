//! Products of matrices whose right side was laid out beforehand.
//!
//! The right side lies in panels of 16 columns, one row of a panel after the other: what the innermost loop loads
//! stands in the order in which it is loaded. The left side is read where it lies, row by row. A tile of results stays
//! in registers while the whole depth goes by, so every result is one chain of fused multiply-adds in the order of the
//! depth: it does not depend on how rows are divided among tiles, blocks or threads.
//!
//! Weights are laid out once when they are loaded, which is why this is not a call of a general library: those lay out
//! both sides again at each call, and their entries are `unsafe`.

use bytemuck::cast_slice;
use macerator::{Arch, Scalar, Simd, Vector, WithSimd};

use crate::aligned::Aligned;

/// Columns of a panel: two registers of AVX2, one of AVX-512, four of SSE and NEON.
pub(crate) const PANEL: usize = 16;

/// Steps of depth that are written out.
const UNROLL: usize = 4;

/// A right side that owns its numbers.
#[derive(Debug)]
pub(crate) struct Panels {
    depth: usize,
    columns: usize,
    data: Aligned,
}

/// A right side, `depth` × `columns`, in panels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Right<'a> {
    pub depth: usize,
    pub columns: usize,
    /// Number `(k, c)` at `(c / 16 · depth + k) · 16 + c % 16`, on a cache line; the last panel is filled up.
    pub data: &'a [f32],
}

/// A left side: row `r` begins at `r · stride`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Left<'a> {
    pub values: &'a [f32],
    pub stride: usize,
}

/// What is there before the products are added.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Start<'a> {
    /// Nothing.
    Zero,
    /// One number per column.
    Bias(&'a [f32]),
    /// What the output holds.
    Output,
}

impl Panels {
    /// From `value(k, c)`.
    pub fn new(depth: usize, columns: usize, value: impl Fn(usize, usize) -> f32) -> Self {
        let mut panels = Self {
            depth,
            columns,
            data: Aligned::zeros(columns.div_ceil(PANEL) * depth * PANEL),
        };
        panels.fill(value);
        panels
    }

    /// Overwrites all numbers.
    pub fn fill(&mut self, value: impl Fn(usize, usize) -> f32) {
        let (depth, columns) = (self.depth, self.columns);
        for (place, number) in self.data.iter_mut().enumerate() {
            let (k, c) = (
                place / PANEL % depth,
                place / (PANEL * depth) * PANEL + place % PANEL,
            );
            if c < columns {
                *number = value(k, c);
            }
        }
    }

    /// Number `(k, c)`.
    pub fn at(&self, k: usize, c: usize) -> f32 {
        self.data[(c / PANEL * self.depth + k) * PANEL + c % PANEL]
    }

    /// The same with rows and columns exchanged.
    pub fn transposed(&self) -> Self {
        Self::new(self.columns, self.depth, |k, c| self.at(c, k))
    }

    /// As the right side of a product.
    pub fn right(&self) -> Right<'_> {
        Right {
            depth: self.depth,
            columns: self.columns,
            data: &self.data,
        }
    }
}

/// `out = start + Σ left · right` over the terms; `out` has `rows` rows, `stride` apart, as wide as the right sides.
///
/// # Panics
///
/// If the sizes do not agree.
pub(crate) fn product(
    arch: Arch,
    rows: usize,
    terms: &[(Left<'_>, Right<'_>)],
    start: Start<'_>,
    out: &mut [f32],
    stride: usize,
) {
    let columns = terms.first().map_or(0, |(_, right)| right.columns);
    for (left, right) in terms {
        assert!(
            right.columns == columns
                && right.data.len() == columns.div_ceil(PANEL) * right.depth * PANEL
                && left.stride >= right.depth
                && (rows == 0 || left.values.len() >= (rows - 1) * left.stride + right.depth),
            "a product of {rows} rows by {}x{} does not end in {columns} columns",
            right.depth,
            right.columns
        );
    }
    assert!(
        stride >= columns && (rows == 0 || out.len() >= (rows - 1) * stride + columns),
        "an output of {} does not hold {rows} rows of {columns}",
        out.len()
    );
    if let Start::Bias(bias) = start {
        assert_eq!(bias.len(), columns, "biases and columns");
    }
    arch.dispatch(Product {
        rows,
        columns,
        terms,
        start,
        out,
        stride,
    });
}

struct Product<'a> {
    rows: usize,
    columns: usize,
    terms: &'a [(Left<'a>, Right<'a>)],
    start: Start<'a>,
    out: &'a mut [f32],
    stride: usize,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self) {
        // As many rows as registers hold: 12 registers of sums (of 16, or of 32 with AVX-512).
        match PANEL / <f32 as Scalar>::lanes::<S>() {
            1 => self.run::<S, 12, 6, 1>(),
            2 => self.run::<S, 6, 3, 2>(),
            4 => self.run::<S, 3, 1, 4>(),
            8 => self.run::<S, 1, 1, 8>(),
            _ => self.run::<S, 1, 1, 16>(),
        }
    }
}

impl Product<'_> {
    /// `MR` rows at a time, at the end `HALF`, by one panel of `NV` registers.
    #[inline(always)]
    fn run<S: Simd, const MR: usize, const HALF: usize, const NV: usize>(mut self) {
        for panel in 0..self.columns.div_ceil(PANEL) {
            let mut row = 0;
            while row < self.rows {
                if self.rows - row > HALF {
                    self.tile::<S, MR, NV>(panel, row);
                    row += MR;
                } else {
                    self.tile::<S, HALF, NV>(panel, row);
                    row += HALF;
                }
            }
        }
    }

    /// Up to `MR` rows of a panel.
    #[inline(always)]
    fn tile<S: Simd, const MR: usize, const NV: usize>(&mut self, panel: usize, first_row: usize) {
        let mut sums = [[0f32.splat::<S>(); NV]; MR];
        let last_row = self.rows - 1;
        for (left, right) in self.terms {
            let size = right.depth * PANEL;
            let steps: &[Vector<S, f32>] = cast_slice(&right.data[panel * size..][..size]);
            let mut rest = left.values[first_row * left.stride..].chunks(left.stride);
            let mut row: &[f32] = &[];
            let rows: [&[f32]; MR] = std::array::from_fn(|i| {
                // Rows beyond the end repeat the last; their sums are not kept.
                if first_row + i <= last_row
                    && let Some(next) = rest.next()
                {
                    row = &next[..right.depth];
                }
                row
            });
            // In and out by value: behind a reference, every sum would be stored at every step.
            sums = multiply::<S, MR, NV>(rows, steps, sums);
        }
        let first_column = panel * PANEL;
        let width = PANEL.min(self.columns - first_column);
        let start = first_row * self.stride + first_column;
        if matches!(self.start, Start::Zero) && self.stride == PANEL && first_row + MR <= self.rows
        {
            // Rows without gaps, as panels of scores have them, are one piece.
            let (out, _) = self.out[start..start + MR * PANEL].as_chunks_mut::<PANEL>();
            for (out, sums) in out.iter_mut().zip(&sums) {
                out.copy_from_slice(cast_slice(sums));
            }
            return;
        }
        for (i, sums) in sums.iter().enumerate().take(self.rows - first_row) {
            let sums: &[f32] = cast_slice(sums);
            let place = start + i * self.stride;
            let out = &mut self.out[place..place + width];
            match self.start {
                Start::Zero => copy(out, sums),
                Start::Bias(bias) => {
                    copy(out, sums);
                    add(out, &bias[first_column..first_column + width]);
                }
                Start::Output => add(out, sums),
            }
        }
    }
}

#[inline(always)]
fn copy(out: &mut [f32], values: &[f32]) {
    match out.as_chunks_mut::<PANEL>() {
        ([whole], []) => whole.copy_from_slice(&values[..PANEL]),
        _ => out.copy_from_slice(&values[..out.len()]),
    }
}

#[inline(always)]
fn add(out: &mut [f32], values: &[f32]) {
    match out.as_chunks_mut::<PANEL>() {
        ([whole], []) => {
            for (out, value) in whole.iter_mut().zip(&values[..PANEL]) {
                *out += value;
            }
        }
        _ => {
            for (out, value) in out.iter_mut().zip(values) {
                *out += value;
            }
        }
    }
}

/// The innermost loops: every row's number times every register of the panel's row.
#[inline(always)]
fn multiply<S: Simd, const MR: usize, const NV: usize>(
    rows: [&[f32]; MR],
    steps: &[Vector<S, f32>],
    mut sums: [[Vector<S, f32>; NV]; MR],
) -> [[Vector<S, f32>; NV]; MR] {
    let (steps, _) = steps.as_chunks::<NV>();
    let (fours, rest) = steps.as_chunks::<UNROLL>();
    for (n, four) in fours.iter().enumerate() {
        let numbers: [&[f32; UNROLL]; MR] = std::array::from_fn(|i| {
            rows[i][n * UNROLL..]
                .first_chunk()
                .expect("rows are as long as the panel is deep")
        });
        for (k, step) in four.iter().enumerate() {
            for i in 0..MR {
                let number = numbers[i][k].splat::<S>();
                for j in 0..NV {
                    sums[i][j] = number.mul_add(step[j], sums[i][j]);
                }
            }
        }
    }
    let done = fours.len() * UNROLL;
    for (k, step) in rest.iter().enumerate() {
        for i in 0..MR {
            let number = rows[i][done + k].splat::<S>();
            for j in 0..NV {
                sums[i][j] = number.mul_add(step[j], sums[i][j]);
            }
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count)
            .map(|i| ((i * 37 + seed * 101) % 61) as f32 / 30.0 - 1.0)
            .collect()
    }

    #[test]
    fn products_are_sums_of_products_at_odd_sizes() {
        for (rows, depth, columns) in [(1, 1, 1), (7, 5, 17), (13, 33, 31), (6, 16, 48)] {
            let stride = depth + 3;
            let a = numbers(rows * stride, 1);
            let b = numbers(depth * columns, 2);
            let bias = numbers(columns, 3);
            let right = Panels::new(depth, columns, |k, c| b[k * columns + c]);
            let left = Left { values: &a, stride };
            let mut out = vec![0.5; rows * columns];
            let terms = [(left, right.right()), (left, right.right())];
            product(
                Arch::new(),
                rows,
                &terms,
                Start::Bias(&bias),
                &mut out,
                columns,
            );
            product(
                Arch::new(),
                rows,
                &terms[..1],
                Start::Output,
                &mut out,
                columns,
            );
            for r in 0..rows {
                for c in 0..columns {
                    let sum: f32 = (0..depth)
                        .map(|k| a[r * stride + k] * b[k * columns + c])
                        .sum();
                    let expected = 3.0 * sum + bias[c];
                    let found = out[r * columns + c];
                    assert!((found - expected).abs() < 1e-4, "{found} is not {expected}");
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_rows_beside_it() {
        let (rows, depth, columns) = (29, 40, 20);
        let a = numbers(rows * depth, 4);
        let b = numbers(depth * columns, 5);
        let right = Panels::new(depth, columns, |k, c| b[k * columns + c]);
        let multiply = |first: usize, rows: usize| {
            let mut out = vec![0.0; rows * columns];
            let left = Left {
                values: &a[first * depth..],
                stride: depth,
            };
            product(
                Arch::new(),
                rows,
                &[(left, right.right())],
                Start::Zero,
                &mut out,
                columns,
            );
            out
        };
        let together = multiply(0, rows);
        for row in 0..rows {
            assert_eq!(multiply(row, 1), together[row * columns..][..columns]);
        }
    }
}
