//! Everything between the products, on rows that a product has just written or will read next: norms with their
//! modulation, rotary turns, GELU, gates, softmax, and their derivatives.
//!
//! Loops are plain and run over 16 numbers at a time where they sum, so that every instruction set adds in the same
//! order; [`macerator`] compiles each of them once per instruction set and picks at run time.

use macerator::{Arch, Simd, WithSimd};

use crate::matmul::PANEL;

/// Declares a function that is compiled for every instruction set.
macro_rules! vectorized {
    ($(#[$meta:meta])* fn $name:ident<$a:lifetime>($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        pub(crate) fn $name<$a>(arch: Arch, $($arg: $ty),*) {
            struct Call<$a> {
                $($arg: $ty,)*
            }
            impl<$a> WithSimd for Call<$a> {
                type Output = ();

                #[inline(always)]
                fn with_simd<S: Simd>(self) {
                    let Self { $($arg),* } = self;
                    $body
                }
            }
            arch.dispatch(Call { $($arg),* });
        }
    };
}

/// Shift and scale of a normalised row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shift<'a> {
    pub shift: &'a [f32],
    pub scale: &'a [f32],
}

/// The norm of a head and the turns of some positions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Turn<'a> {
    /// The norm's weight, one number per channel of a head.
    pub weight: &'a [f32],
    /// Cosines, a row per position and a number per channel of a head, every value twice.
    pub cos: &'a [f32],
    /// As `cos`.
    pub sin: &'a [f32],
}

const EPSILON: f32 = mmdit::config::NORM_EPSILON as f32;

/// Sum of `term(i)` in 16 partial sums.
#[inline(always)]
fn sum(count: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut partial = [0f32; PANEL];
    let whole = count / PANEL * PANEL;
    for start in (0..whole).step_by(PANEL) {
        for (lane, partial) in partial.iter_mut().enumerate() {
            *partial += term(start + lane);
        }
    }
    for (lane, partial) in partial.iter_mut().enumerate().take(count - whole) {
        *partial += term(whole + lane);
    }
    let mut width = PANEL;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            partial[lane] += partial[lane + width];
        }
    }
    partial[0]
}

/// Mean, and one over the standard deviation.
#[inline(always)]
fn moments(x: &[f32]) -> (f32, f32) {
    let count = x.len() as f32;
    let mean = sum(x.len(), |i| x[i]) / count;
    let variance = sum(x.len(), |i| (x[i] - mean) * (x[i] - mean)) / count;
    (mean, 1.0 / (variance + EPSILON).sqrt())
}

/// eˣ to about two units in the last place; below e⁻⁸⁷ it stays there, above e⁸⁸ too.
///
/// x = n·ln 2 + r with |r| ≤ ½ ln 2; eʳ by its polynomial of degree 6, 2ⁿ by the exponent's bits.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// 1.5·2²³: adding it rounds to a whole number and leaves that number in the low bits.
    const ROUNDER: f32 = 12_582_912.0;
    /// ln 2 in two parts, the first of which times any n is exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let x = x.clamp(-87.0, 88.0);
    let rounded = x * std::f32::consts::LOG2_E + ROUNDER;
    let n = rounded - ROUNDER;
    let r = (x - n * LN_2[0]) - n * LN_2[1];
    let mut polynomial = 1.0 / 720.0;
    for coefficient in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        polynomial = polynomial * r + coefficient;
    }
    let power = f32::from_bits((rounded.to_bits() << 23).wrapping_add(0x3f80_0000));
    polynomial * power
}

/// √(2/π) and the cubic term of GELU's tanh form.
const GELU: [f32; 2] = [0.797_884_6, 0.044_715];

/// `½(1 + tanh u)` as a logistic of `2u`.
#[inline(always)]
fn gelu_gate(x: f32) -> f32 {
    let u = GELU[0] * (x + GELU[1] * x * x * x);
    1.0 / (1.0 + exp(-2.0 * u))
}

vectorized! {
    /// `(x − mean)/deviation · (1 + scale) + shift` of each row.
    fn modulate<'a>(x: &'a [f32], by: Shift<'a>, out: &'a mut [f32]) {
        let width = by.shift.len();
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let (mean, scale) = moments(x);
            for i in 0..width {
                out[i] = (x[i] - mean) * scale * (1.0 + by.scale[i]) + by.shift[i];
            }
        }
    }
}

vectorized! {
    /// Adds to `dx` what `d_out` is worth in terms of the rows that [`modulate`] was given.
    fn modulate_backward<'a>(x: &'a [f32], by: Shift<'a>, d_out: &'a [f32], dx: &'a mut [f32]) {
        let width = by.shift.len();
        let rows = x.chunks_exact(width).zip(d_out.chunks_exact(width));
        for ((x, d_out), dx) in rows.zip(dx.chunks_exact_mut(width)) {
            let (mean, scale) = moments(x);
            let slope = |i: usize| d_out[i] * (1.0 + by.scale[i]);
            let normed = |i: usize| (x[i] - mean) * scale;
            let mean_slope = sum(width, slope) / width as f32;
            let mean_product = sum(width, |i| slope(i) * normed(i)) / width as f32;
            for (i, dx) in dx.iter_mut().enumerate() {
                *dx += scale * (slope(i) - mean_slope - normed(i) * mean_product);
            }
        }
    }
}

vectorized! {
    /// Adds to `sums`, shift first, the gradients of what [`modulate`] modulated by.
    fn modulation_gradients<'a>(x: &'a [f32], d_out: &'a [f32], sums: &'a mut [f32]) {
        let width = sums.len() / 2;
        let (shift, scale) = sums.split_at_mut(width);
        for (x, d_out) in x.chunks_exact(width).zip(d_out.chunks_exact(width)) {
            let (mean, deviation) = moments(x);
            for i in 0..width {
                shift[i] += d_out[i];
                scale[i] += d_out[i] * (x[i] - mean) * deviation;
            }
        }
    }
}

vectorized! {
    /// `out = x + gate·y`.
    fn add_gated<'a>(x: &'a [f32], y: &'a [f32], gate: &'a [f32], out: &'a mut [f32]) {
        let width = gate.len();
        let rows = x.chunks_exact(width).zip(y.chunks_exact(width));
        for ((x, y), out) in rows.zip(out.chunks_exact_mut(width)) {
            for i in 0..width {
                out[i] = x[i] + gate[i] * y[i];
            }
        }
    }
}

vectorized! {
    /// `out = gate·x`.
    fn gated<'a>(x: &'a [f32], gate: &'a [f32], out: &'a mut [f32]) {
        let width = gate.len();
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            for i in 0..width {
                out[i] = gate[i] * x[i];
            }
        }
    }
}

vectorized! {
    /// Adds `Σ x·y` over the rows to `sums`: the gradient of a gate.
    fn add_products<'a>(x: &'a [f32], y: &'a [f32], sums: &'a mut [f32]) {
        let width = sums.len();
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact(width)) {
            for i in 0..width {
                sums[i] += x[i] * y[i];
            }
        }
    }
}

vectorized! {
    /// Normalises each head of each row by its root mean square, weighs it and turns it by its position.
    fn norm_and_turn<'a>(raw: &'a [f32], by: Turn<'a>, width: usize, out: &'a mut [f32]) {
        let dim = by.weight.len();
        let rows = raw.chunks_exact(width).zip(out.chunks_exact_mut(width));
        let turns = by.cos.chunks_exact(dim).zip(by.sin.chunks_exact(dim));
        for ((raw, out), (cos, sin)) in rows.zip(turns) {
            for (raw, out) in raw.chunks_exact(dim).zip(out.chunks_exact_mut(dim)) {
                let scale = root_mean_square_scale(raw);
                for i in (0..dim).step_by(2) {
                    let a = raw[i] * scale * by.weight[i];
                    let b = raw[i + 1] * scale * by.weight[i + 1];
                    out[i] = a * cos[i] - b * sin[i];
                    out[i + 1] = b * cos[i] + a * sin[i];
                }
            }
        }
    }
}

vectorized! {
    /// Replaces the gradient of [`norm_and_turn`]'s output by that of its input.
    fn norm_and_turn_backward<'a>(raw: &'a [f32], by: Turn<'a>, width: usize, d: &'a mut [f32]) {
        let dim = by.weight.len();
        let rows = raw.chunks_exact(width).zip(d.chunks_exact_mut(width));
        let turns = by.cos.chunks_exact(dim).zip(by.sin.chunks_exact(dim));
        for ((raw, d), (cos, sin)) in rows.zip(turns) {
            for (raw, d) in raw.chunks_exact(dim).zip(d.chunks_exact_mut(dim)) {
                let scale = root_mean_square_scale(raw);
                for i in (0..dim).step_by(2) {
                    let (a, b) = (d[i], d[i + 1]);
                    d[i] = (a * cos[i] + b * sin[i]) * by.weight[i];
                    d[i + 1] = (b * cos[i] - a * sin[i]) * by.weight[i + 1];
                }
                let mean_product = sum(dim, |i| d[i] * raw[i] * scale) / dim as f32;
                for i in 0..dim {
                    d[i] = scale * (d[i] - raw[i] * scale * mean_product);
                }
            }
        }
    }
}

#[inline(always)]
fn root_mean_square_scale(x: &[f32]) -> f32 {
    let mean_square = sum(x.len(), |i| x[i] * x[i]) / x.len() as f32;
    1.0 / (mean_square + EPSILON).sqrt()
}

vectorized! {
    /// GELU in its tanh form, rows of `width` into rows `stride` apart.
    fn gelu<'a>(x: &'a [f32], width: usize, out: &'a mut [f32], stride: usize) {
        for (x, out) in x.chunks_exact(width).zip(out.chunks_mut(stride)) {
            for (x, out) in x.iter().zip(out) {
                *out = x * gelu_gate(*x);
            }
        }
    }
}

vectorized! {
    /// Multiplies gradients with GELU's slope: rows `stride` apart into rows of `width`.
    fn gelu_backward<'a>(x: &'a [f32], width: usize, d_out: &'a [f32], stride: usize, dx: &'a mut [f32]) {
        let rows = x.chunks_exact(width).zip(d_out.chunks(stride));
        for ((x, d_out), dx) in rows.zip(dx.chunks_exact_mut(width)) {
            for ((x, d_out), dx) in x.iter().zip(d_out).zip(dx) {
                let gate = gelu_gate(*x);
                let inner_slope = 2.0 * GELU[0] * (1.0 + 3.0 * GELU[1] * x * x);
                *dx = d_out * (gate + x * gate * (1.0 - gate) * inner_slope);
            }
        }
    }
}

vectorized! {
    /// Adds `Σ coefficientⱼ · row` over the rows to each of `sums`, one after the other: rows of `width`, and a row of
    /// coefficients for each.
    fn add_outer<'a>(coefficients: &'a [f32], rows: &'a [f32], width: usize, sums: &'a mut [f32]) {
        let rank = sums.len() / width;
        let mut fours = rows.chunks_exact(4 * width);
        let mut coefficient_fours = coefficients.chunks_exact(4 * rank);
        for (x, c) in (&mut fours).zip(&mut coefficient_fours) {
            let [x0, x1, x2, x3] = [0, 1, 2, 3].map(|i| &x[i * width..(i + 1) * width]);
            for (j, sums) in sums.chunks_exact_mut(width).enumerate() {
                let [c0, c1, c2, c3] = [0, 1, 2, 3].map(|i| c[i * rank + j]);
                for i in 0..width {
                    sums[i] += (c0 * x0[i] + c1 * x1[i]) + (c2 * x2[i] + c3 * x3[i]);
                }
            }
        }
        let rest = fours.remainder().chunks_exact(width);
        for (x, c) in rest.zip(coefficient_fours.remainder().chunks_exact(rank)) {
            for (c, sums) in c.iter().zip(sums.chunks_exact_mut(width)) {
                for i in 0..width {
                    sums[i] += c * x[i];
                }
            }
        }
    }
}

/// What softmax makes of 16 queries.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Softmax {
    /// Largest score of each.
    pub max: [f32; PANEL],
    /// Sum of the exponentials of each.
    pub sum: [f32; PANEL],
}

vectorized! {
    /// Scores of 16 queries, a row per key, become exponentials of their distance from the largest.
    fn exponentials<'a>(scores: &'a mut [f32], softmax: &'a mut Softmax) {
        let (scores, _) = scores.as_chunks_mut::<PANEL>();
        let mut max = [f32::NEG_INFINITY; PANEL];
        for row in scores.iter() {
            for lane in 0..PANEL {
                max[lane] = if row[lane] > max[lane] { row[lane] } else { max[lane] };
            }
        }
        let mut sum = [0f32; PANEL];
        for row in scores.iter_mut() {
            for lane in 0..PANEL {
                row[lane] = exp(row[lane] - max[lane]);
                sum[lane] += row[lane];
            }
        }
        *softmax = Softmax { max, sum };
    }
}

vectorized! {
    /// Scores of 16 queries become probabilities, and gradients of the probabilities those of the scores.
    fn softmax_backward<'a>(scores: &'a mut [f32], gradients: &'a mut [f32], softmax: &'a Softmax) {
        let (scores, _) = scores.as_chunks_mut::<PANEL>();
        let (gradients, _) = gradients.as_chunks_mut::<PANEL>();
        let inverse = softmax.sum.map(|sum| 1.0 / sum);
        let mut mean = [0f32; PANEL];
        for (row, gradient) in scores.iter_mut().zip(gradients.iter()) {
            for lane in 0..PANEL {
                row[lane] = exp(row[lane] - softmax.max[lane]) * inverse[lane];
                mean[lane] += row[lane] * gradient[lane];
            }
        }
        for (row, gradient) in scores.iter().zip(gradients.iter_mut()) {
            for lane in 0..PANEL {
                gradient[lane] = row[lane] * (gradient[lane] - mean[lane]);
            }
        }
    }
}

/// `x·sigmoid(x)`.
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

/// The slope of [`silu`].
pub(crate) fn silu_slope(x: f32) -> f32 {
    let gate = 1.0 / (1.0 + (-x).exp());
    gate * (1.0 + x * (1.0 - gate))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_right_to_two_units_in_the_last_place() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let expected = f64::from(x).exp();
            let error = (f64::from(exp(x)) - expected).abs() / expected;
            assert!(error < 2.5e-7, "e^{x}: {error}");
        }
        assert!(exp(-1000.0) < 1e-37);
    }

    #[test]
    fn gelu_and_its_slope_are_the_tanh_form() {
        let form = |x: f64| {
            0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044_715 * x.powi(3))).tanh())
        };
        let xs: Vec<f32> = (-90..=90).map(|i| i as f32 / 10.0).collect();
        let mut values = vec![0.0; xs.len()];
        gelu(Arch::new(), &xs, xs.len(), &mut values, xs.len());
        let ones = vec![1.0; xs.len()];
        let mut slopes = vec![0.0; xs.len()];
        gelu_backward(Arch::new(), &xs, xs.len(), &ones, xs.len(), &mut slopes);
        for ((&x, value), slope) in xs.iter().zip(values).zip(slopes) {
            let x = f64::from(x);
            let expected = (form(x + 1e-5) - form(x - 1e-5)) / 2e-5;
            assert!((f64::from(value) - form(x)).abs() < 1e-6 * x.abs().max(1.0));
            assert!((f64::from(slope) - expected).abs() < 2e-6, "slope at {x}");
        }
    }
}
