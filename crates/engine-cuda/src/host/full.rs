//! The kernels of full-weight training in plain Rust.

use super::{Elements, Floats, Reader, gelu_slope, rope};

pub(super) fn u32_at(address: u64, i: usize) -> u32 {
    Floats(address).get(i).to_bits()
}

/// Parts of sums over rows.
pub(super) fn sums(r: &mut Reader<'_>, kernel: &str, blocks: usize) {
    let partials = r.floats();
    let a = r.t();
    let (of_a_norm, stride) = match kernel {
        "column_sums" => (None, Some(r.int())),
        _ => (Some((r.t(), r.floats())), None),
    };
    let (rows, columns, splits) = (r.int(), r.int(), r.int());
    let stride = stride.unwrap_or(columns);
    let outputs = 1 + usize::from(of_a_norm.is_some());
    for (block, column) in (0..blocks).flat_map(|b| (0..columns).map(move |c| (b, c))) {
        let (segment, split) = (block / splits, block % splits);
        let mut totals = [0.0; 2];
        for row in rows * split / splits..rows * (split + 1) / splits {
            let row = segment * rows + row;
            let x = a.get(row * stride + column);
            totals[0] += x;
            if let Some((b, stats)) = of_a_norm {
                let centred = b.get(row * stride + column) - stats.get(2 * row);
                totals[1] += x * centred * stats.get(2 * row + 1);
            }
        }
        for (o, total) in totals.into_iter().enumerate().take(outputs) {
            partials.set((block * outputs + o) * columns + column, total);
        }
    }
}

/// The rows of a block's part.
fn part(block: usize, rows: usize, splits: usize) -> std::ops::Range<usize> {
    let (segment, split) = (block / splits, block % splits);
    let first = segment * rows;
    first + rows * split / splits..first + rows * (split + 1) / splits
}

pub(super) fn gate_backward_sums(r: &mut Reader<'_>, blocks: usize) {
    let (partials, dy, dout, y) = (r.floats(), r.t(), r.t(), r.t());
    let (gate, stride) = (r.floats(), r.int());
    let (rows, columns, splits) = (r.int(), r.int(), r.int());
    for (block, column) in (0..blocks).flat_map(|b| (0..columns).map(move |c| (b, c))) {
        let mut totals = [0.0; 2];
        for row in part(block, rows, splits) {
            let at = row * columns + column;
            let g = dout.get(at);
            totals[0] += g * y.get(at);
            totals[1] += g;
            dy.set(at, gate.get(block / splits * stride + column) * g);
        }
        for (o, total) in totals.into_iter().enumerate() {
            partials.set((2 * block + o) * columns + column, total);
        }
    }
}

pub(super) fn gelu_backward_sums(r: &mut Reader<'_>, blocks: usize) {
    let (partials, dx, dy, x) = (r.floats(), r.t(), r.t(), r.t());
    let [dx_stride, dy_stride, x_stride] = [r.int(), r.int(), r.int()];
    let (rows, columns, splits) = (r.int(), r.int(), r.int());
    for (block, column) in (0..blocks).flat_map(|b| (0..columns).map(move |c| (b, c))) {
        let mut total = 0.0;
        for row in part(block, rows, splits) {
            let slope = gelu_slope(x.get(row * x_stride + column));
            let gradient = dy.get(row * dy_stride + column) * slope;
            total += gradient;
            dx.set(row * dx_stride + column, gradient);
        }
        partials.set(block * columns + column, total);
    }
}

pub(super) fn norm_backward_sums(r: &mut Reader<'_>, blocks: usize) {
    let (partials, dx, dy, x) = (r.floats(), r.t(), r.t(), r.t());
    let (stats, scale, stride) = (r.floats(), r.floats(), r.int());
    let (accumulate, rows, d, splits) = (r.int() != 0, r.int(), r.int(), r.int());
    for block in 0..blocks {
        let mut totals = vec![0.0; 2 * d];
        for row in part(block, rows, splits) {
            let (mean, inverse) = (stats.get(2 * row), stats.get(2 * row + 1));
            let n: Vec<f32> = (0..d)
                .map(|i| (x.get(row * d + i) - mean) * inverse)
                .collect();
            let factor = |i: usize| 1.0 + scale.get(block / splits * stride + i);
            let g: Vec<f32> = (0..d).map(|i| dy.get(row * d + i) * factor(i)).collect();
            let mean_g = g.iter().sum::<f32>() / d as f32;
            let mean_gn = g.iter().zip(&n).map(|(g, n)| g * n).sum::<f32>() / d as f32;
            for i in 0..d {
                totals[i] += dy.get(row * d + i);
                totals[d + i] += dy.get(row * d + i) * n[i];
                let before = if accumulate { dx.get(row * d + i) } else { 0.0 };
                let gradient = (g[i] - mean_g - n[i] * mean_gn) * inverse;
                dx.set(row * d + i, before + gradient);
            }
        }
        for (i, total) in totals.into_iter().enumerate() {
            partials.set(2 * block * d + i, total);
        }
    }
}

pub(super) fn draw(r: &mut Reader<'_>) {
    let (x_t, target, mean, deviation) = (r.t(), r.floats(), r.floats(), r.floats());
    let (pictures, sigma, seed) = (r.word(), r.floats(), r.word());
    let (b, c, h, w, rows) = (r.int(), r.int(), r.int(), r.int(), r.int());
    let seed = u64::from(u32_at(seed, 0)) | u64::from(u32_at(seed, 1)) << 32;
    let draws = |purpose| crate::ops::draw::normals(seed, purpose, b * c * h * w);
    let posterior = draws(crate::ops::draw::Purpose::Posterior);
    let noise = draws(crate::ops::draw::Purpose::Noise);
    let mut i = 0;
    for sample in 0..b {
        let picture = (u32_at(pictures, sample) as usize).min(rows - 1);
        for (row, column) in (0..h)
            .step_by(2)
            .flat_map(|r| (0..w).step_by(2).map(move |c| (r, c)))
        {
            for (channel, k) in (0..c).flat_map(|channel| (0..4).map(move |k| (channel, k))) {
                let at = ((picture * c + channel) * h + row + k / 2) * w + column + k % 2;
                let x = deviation.get(at) * posterior[i] + mean.get(at);
                let s = sigma.get(sample);
                x_t.set(i, (1.0 - s) * x + s * noise[i]);
                target.set(i, noise[i] - x);
                i += 1;
            }
        }
    }
}

pub(super) fn adamw_average(r: &mut Reader<'_>) {
    let [values, first, second, averaged] = std::array::from_fn(|_| r.floats());
    let (shadow, gradients, factor) = (r.t(), r.floats(), r.floats());
    let (flag, numbers, n) = (r.word(), r.floats(), r.int());
    if u32_at(flag, 0) != 0 {
        return;
    }
    let [
        beta1,
        rest1,
        beta2,
        rest2,
        correction2,
        epsilon,
        rate,
        kept,
        decay,
        rest,
    ] = std::array::from_fn(|i| numbers.get(i));
    for i in 0..n {
        let g = gradients.get(i) * factor.get(0);
        let m = first.get(i) * beta1 + g * rest1;
        let v = second.get(i) * beta2 + g * g * rest2;
        let p = values.get(i) * kept - m / ((v / correction2).sqrt() + epsilon) * rate;
        first.set(i, m);
        second.set(i, v);
        values.set(i, p);
        averaged.set(i, averaged.get(i) * decay + p * rest);
        shadow.set(i, p);
    }
}

/// [`rope`] going back, and the sums for the norms' weights: all in the first block's part.
pub(super) fn rope_sums(r: &mut Reader<'_>, blocks: usize) {
    let words: Vec<u64> = r.words.as_slice().to_vec();
    let t = r.t;
    let (partials, dh) = (Floats(words[1]), words[15] as usize);
    let (rows, heads) = (words[10] as usize, words[14] as usize);
    let (n, n_total, offset) = (words[11] as usize, words[12] as usize, words[13] as usize);
    let (in_stride, out_stride) = (words[16] as usize, words[17] as usize);
    let eps = f32::from_bits(words[18] as u32);
    (0..2 * blocks * dh).for_each(|i| partials.set(i, 0.0));
    let at = |i: usize| Elements {
        address: words[i],
        t,
    };
    let (cos, sin, input) = (Floats(words[8]), Floats(words[9]), at(5));
    for row in 0..rows {
        let position = offset + row % n;
        let out_row = (row / n * n_total + position) * out_stride;
        for (part, head) in (0..2).flat_map(|part| (0..heads).map(move |head| (part, head))) {
            let x_at = row * in_stride + part * heads * dh + head * dh;
            let square = (0..dh).map(|i| input.get(x_at + i).powi(2)).sum::<f32>() / dh as f32;
            let inverse = (square + eps).sqrt().recip();
            let gradient = at(2 + part);
            for i in 0..dh {
                let g = |i: usize| gradient.get(out_row + head * dh + i);
                let (c, s) = (cos.get(position * dh + i), sin.get(position * dh + i));
                let turned = match i % 2 {
                    0 => g(i) * c + g(i + 1) * s,
                    _ => g(i) * c - g(i - 1) * s,
                };
                let place = part * dh + i;
                let sum = partials.get(place) + turned * input.get(x_at + i) * inverse;
                partials.set(place, sum);
            }
        }
    }
    let mut plain: Vec<u64> = words.clone();
    plain.remove(10);
    plain.remove(1);
    let mut reader = Reader {
        words: plain.iter(),
        t,
    };
    rope(&mut reader, rows, true);
}
