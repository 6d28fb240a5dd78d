//! The kernels in plain Rust, on host memory: the schedule can be tested on a machine without a GPU.
//!
//! Slow and simple, rounded to T where the kernels round. What the kernels themselves compute is tested on a GPU.

use crate::gemm::{Output, Product};
use crate::half_type::Half;
use crate::kernels::{Args, Launch};
use crate::ops::lora::Rectangle;
use crate::view::View;

mod full;

use full::{
    adamw_average, draw, gate_backward_sums, gelu_backward_sums, norm_backward_sums, rope_sums,
    sums, u32_at,
};

/// Reads the arguments of a launch one after the other.
struct Reader<'a> {
    words: std::slice::Iter<'a, u64>,
    t: Half,
}

/// Elements of T at a host address.
#[derive(Clone, Copy)]
struct Elements {
    address: u64,
    t: Half,
}

impl Elements {
    fn get(self, i: usize) -> f32 {
        // SAFETY: tests alone come here, with views into `allocate`d memory whose sizes the wrappers have asserted.
        let bits = unsafe { *(self.address as *const u16).add(i) };
        self.t.to_f32(&[bits])[0]
    }

    fn set(self, i: usize, value: f32) {
        // SAFETY: as in `get`.
        unsafe { *(self.address as *mut u16).add(i) = self.t.from_f32(&[value])[0] }
    }
}

/// Numbers of 32 bits at a host address.
#[derive(Clone, Copy)]
struct Floats(u64);

impl Floats {
    fn get(self, i: usize) -> f32 {
        // SAFETY: as in `Elements::get`.
        unsafe { *(self.0 as *const f32).add(i) }
    }

    fn set(self, i: usize, value: f32) {
        // SAFETY: as in `Elements::get`.
        unsafe { *(self.0 as *mut f32).add(i) = value }
    }
}

impl Reader<'_> {
    fn word(&mut self) -> u64 {
        *self
            .words
            .next()
            .expect("as many arguments as the kernel has")
    }

    fn t(&mut self) -> Elements {
        Elements {
            address: self.word(),
            t: self.t,
        }
    }

    fn floats(&mut self) -> Floats {
        Floats(self.word())
    }

    fn int(&mut self) -> usize {
        self.word() as usize
    }

    fn f32(&mut self) -> f32 {
        f32::from_bits(self.word() as u32)
    }
}

/// Host memory that is never given back: tests are short.
pub(crate) fn allocate(bytes: usize) -> u64 {
    let memory: &mut [u8] = Box::leak(vec![0xFFu8; bytes + 256].into_boxed_slice());
    (memory.as_mut_ptr() as u64).next_multiple_of(256)
}

/// Copies rows.
pub(crate) fn copy_rows(
    to: u64,
    to_stride: usize,
    from: u64,
    from_stride: usize,
    width: usize,
    rows: usize,
) {
    for row in 0..rows {
        // SAFETY: the caller has asserted both layouts.
        unsafe {
            std::ptr::copy(
                (from as *const u8).add(row * from_stride),
                (to as *mut u8).add(row * to_stride),
                width,
            );
        }
    }
}

/// Fills memory.
pub(crate) fn fill(view: View, byte: u8) {
    // SAFETY: the view is host memory of that length.
    unsafe { std::ptr::write_bytes(view.address() as *mut u8, byte, view.bytes()) }
}

/// A product.
pub(crate) fn product(t: Half, p: &Product) {
    let at = |view: View| Elements {
        address: view.address(),
        t,
    };
    let (a, b, c_half, c_f32) = (at(p.a.view), at(p.b.view), at(p.c), Floats(p.c.address()));
    let index = |transposed: bool, stride: usize, row: usize, column: usize| match transposed {
        false => row * stride + column,
        true => column * stride + row,
    };
    let mut results = Vec::with_capacity(p.m * p.n);
    for i in 0..p.m {
        for j in 0..p.n {
            let sum: f32 = (0..p.k)
                .map(|l| {
                    a.get(index(p.a.transposed, p.a.stride, i, l))
                        * b.get(index(p.b.transposed, p.b.stride, l, j))
                })
                .sum();
            results.push(sum);
        }
    }
    for i in 0..p.m {
        for j in 0..p.n {
            let place = i * p.c_stride + j;
            let before = match (p.beta == 0.0, p.output) {
                (true, _) => 0.0,
                (_, Output::Half) => c_half.get(place),
                (_, Output::F32) => c_f32.get(place),
            };
            let bias = p.bias.map_or(0.0, |bias| at(bias).get(j));
            let value = p.alpha * results[i * p.n + j] + p.beta * before + bias;
            match p.output {
                Output::Half => c_half.set(place, value),
                Output::F32 => c_f32.set(place, value),
            }
        }
    }
}

/// Mean and `1/σ` of a row.
fn stats(x: Elements, at: usize, d: usize, eps: f32) -> (f32, f32) {
    let mean = (0..d).map(|i| x.get(at + i)).sum::<f32>() / d as f32;
    let variance = (0..d).map(|i| (x.get(at + i) - mean).powi(2)).sum::<f32>() / d as f32;
    (mean, (variance + eps).sqrt().recip())
}

fn gelu(x: f32) -> f32 {
    let inner = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
    0.5 * x * (1.0 + inner.tanh())
}

fn gelu_slope(x: f32) -> f32 {
    let h = 1e-3;
    (gelu(x + h) - gelu(x - h)) / (2.0 * h)
}

/// Runs a kernel.
pub(crate) fn launch(defines: &[&str], kernel: &str, launch: Launch, args: &Args) {
    let t = match defines.contains(&Half::F16.define()) {
        true => Half::F16,
        false => Half::Bf16,
    };
    let mut r = Reader {
        words: args.words().iter(),
        t,
    };
    let rows = launch.grid[0] as usize;
    match kernel {
        "ln_modulate" | "norm_rows_1" | "gate_residual_ln_modulate" => {
            let gated = (kernel == "gate_residual_ln_modulate").then(|| r.t());
            let (out, kept, x) = (r.t(), r.floats(), r.t());
            let update = gated.map(|sum| (sum, r.floats(), r.t()));
            let (shift, scale) = (r.floats(), r.floats());
            let (stride, rows, tokens, d, eps) = (r.int(), r.int(), r.int(), r.int(), r.f32());
            let x = match update {
                None => x,
                Some((sum, gate, y)) => {
                    for i in 0..rows * d {
                        let g = gate.get(i / d / tokens * stride + i % d);
                        sum.set(i, x.get(i) + g * y.get(i));
                    }
                    sum
                }
            };
            for row in 0..rows {
                let (mean, inverse) = stats(x, row * d, d, eps);
                if kept.0 != 0 {
                    kept.set(2 * row, mean);
                    kept.set(2 * row + 1, inverse);
                }
                for i in 0..d {
                    let m = row / tokens * stride + i;
                    let n = (x.get(row * d + i) - mean) * inverse;
                    out.set(row * d + i, n * (1.0 + scale.get(m)) + shift.get(m));
                }
            }
        }
        "ln_modulate_backward" => {
            let (dx, dy, x, _, scale) = (r.t(), r.t(), r.t(), r.word(), r.floats());
            let (stride, _, tokens, d, eps) = (r.int(), r.int(), r.int(), r.int(), r.f32());
            let accumulate = r.int() != 0;
            for row in 0..rows {
                let (mean, inverse) = stats(x, row * d, d, eps);
                let values: Vec<(f32, f32)> = (0..d)
                    .map(|i| {
                        let g = dy.get(row * d + i) * (1.0 + scale.get(row / tokens * stride + i));
                        (g, (x.get(row * d + i) - mean) * inverse)
                    })
                    .collect();
                let mean_g = values.iter().map(|(g, _)| g).sum::<f32>() / d as f32;
                let mean_gn = values.iter().map(|(g, n)| g * n).sum::<f32>() / d as f32;
                for (i, (g, n)) in values.into_iter().enumerate() {
                    let before = if accumulate { dx.get(row * d + i) } else { 0.0 };
                    dx.set(row * d + i, before + (g - mean_g - n * mean_gn) * inverse);
                }
            }
        }
        "gate_residual" | "gate_rows" => {
            let (out, residual, gate) = (r.t(), r.t(), r.floats());
            let stride = r.int();
            let y = r.t();
            let rows = if kernel == "gate_rows" { r.int() } else { rows };
            let (tokens, d) = (r.int(), r.int());
            for i in 0..rows * d {
                let g = gate.get(i / d / tokens * stride + i % d);
                out.set(i, residual.get(i) + g * y.get(i));
            }
        }
        "gate_backward" => {
            let (dy, dout, gate, stride) = (r.t(), r.t(), r.floats(), r.int());
            let (tokens, d) = (r.int(), r.int());
            for i in 0..rows * d {
                dy.set(i, gate.get(i / d / tokens * stride + i % d) * dout.get(i));
            }
        }
        "gelu_tanh" => {
            let (out, x, columns, out_stride, in_stride) =
                (r.t(), r.t(), r.int(), r.int(), r.int());
            for row in 0..rows {
                for i in 0..columns {
                    out.set(row * out_stride + i, gelu(x.get(row * in_stride + i)));
                }
            }
        }
        "gelu_tanh_backward" => {
            let (dx, dy, x, columns) = (r.t(), r.t(), r.t(), r.int());
            let (dx_stride, dy_stride, x_stride) = (r.int(), r.int(), r.int());
            for row in 0..rows {
                for i in 0..columns {
                    let slope = gelu_slope(x.get(row * x_stride + i));
                    dx.set(row * dx_stride + i, dy.get(row * dy_stride + i) * slope);
                }
            }
        }
        "silu" => {
            let (out, out_half, x_half, x) = (r.floats(), r.t(), r.t(), r.floats());
            for i in 0..r.int() {
                let value = x.get(i);
                let active = value / (1.0 + (-value).exp());
                x_half.set(i, value);
                out_half.set(i, active);
                out.set(i, active);
            }
        }
        "silu_backward" => {
            let (dx, dy, x, n) = (r.t(), r.t(), r.t(), r.int());
            for i in 0..n {
                let sigmoid = 1.0 / (1.0 + (-x.get(i)).exp());
                let slope = sigmoid * (1.0 + x.get(i) * (1.0 - sigmoid));
                dx.set(i, dy.get(i) * slope);
            }
        }
        "column_sums" | "norm_sums" => sums(&mut r, kernel, rows),
        "finish_sums_half" | "finish_sums_f32" => {
            let (out, partials) = ([r.word(), r.word()], r.floats());
            let (splits, columns) = (r.int(), r.int());
            let (outputs, stride) = (r.int(), r.int());
            let [_, segments, wanted] = launch.grid.map(|size| size as usize);
            for (segment, o) in (0..segments).flat_map(|i| (0..wanted).map(move |o| (i, o))) {
                for column in 0..columns {
                    let at = |split| ((segment * splits + split) * outputs + o) * columns + column;
                    let sum: f32 = (0..splits).map(|split| partials.get(at(split))).sum();
                    let place = segment * stride + column;
                    match kernel {
                        "finish_sums_f32" => Floats(out[o]).set(place, sum),
                        _ => Elements { address: out[o], t }.set(place, sum),
                    }
                }
            }
        }
        "gate_backward_sums" => gate_backward_sums(&mut r, rows),
        "gelu_backward_sums" => gelu_backward_sums(&mut r, rows),
        "norm_backward_sums_1" => norm_backward_sums(&mut r, rows),
        "finish_gated" => {
            let (out, partials, gate, stride) = (r.floats(), r.floats(), r.floats(), r.int());
            let (segments, splits, columns) = (r.int(), r.int(), r.int());
            for column in 0..columns {
                let part = |i: usize| {
                    let gate = gate.get(i / splits * stride + column);
                    gate * partials.get((2 * i + 1) * columns + column)
                };
                out.set(column, (0..segments * splits).map(part).sum());
            }
        }
        "draw" => draw(&mut r),
        "gather_rows" => {
            let (out, table, places) = (r.t(), r.t(), r.word());
            let (width, num_rows) = (r.int(), r.int());
            for i in 0..rows * width {
                let row = (u32_at(places, i / width) as usize).min(num_rows - 1);
                out.set(i, table.get(row * width + i % width));
            }
        }
        "sum_squares" => {
            // Each block's part is an f64 on the device; here the first holds everything.
            let (partials, g, n, unscale) = (r.floats(), r.floats(), r.int(), r.f32());
            let squares = (0..n).map(|i| f64::from(g.get(i) * unscale).powi(2));
            partials.set(0, squares.sum::<f64>() as f32);
        }
        "finish_norm" => {
            let (norm, partials) = (r.floats(), r.floats());
            norm.set(0, partials.get(0).sqrt());
        }
        "clip_factor" => {
            let (factor, flag, norm) = (r.floats(), r.floats(), r.floats());
            let (most, unscale) = (r.f32(), r.f32());
            let clipped = (most / (norm.get(0) + 1e-6)).min(1.0) * unscale;
            let finite = norm.get(0).is_finite();
            factor.set(0, if finite { clipped } else { 0.0 });
            flag.set(0, f32::from_bits(u32::from(!finite)));
        }
        "adamw_average" => adamw_average(&mut r),
        "cast_to_half" => {
            let (out, x, n) = (r.t(), r.floats(), r.int());
            (0..n).for_each(|i| out.set(i, x.get(i)));
        }
        "cast_to_f32" => {
            let (out, x, n) = (r.floats(), r.t(), r.int());
            (0..n).for_each(|i| out.set(i, x.get(i)));
        }
        "sinusoids" => {
            let (out, out_half, times) = (r.floats(), r.t(), r.floats());
            for row in 0..rows {
                let waves = mmdit::embed::sinusoids(&[times.get(row)]);
                for (i, wave) in waves.into_iter().enumerate() {
                    out.set(row * 256 + i, wave);
                    out_half.set(row * 256 + i, wave);
                }
            }
        }
        kernel if kernel.starts_with("product_rows_half") || kernel == "product_rows_any" => {
            let (out, x, bias) = (r.floats(), r.floats(), r.t());
            let [rows, n, k, stride] = [r.int(), r.int(), r.int(), r.int()];
            let (accumulate, w) = (r.int() != 0, r.t());
            for (row, column) in (0..rows).flat_map(|row| (0..n).map(move |column| (row, column))) {
                let terms = (0..k).map(|i| x.get(row * k + i) * w.get(column * k + i));
                let place = row * stride + column;
                let before = if accumulate { out.get(place) } else { 0.0 };
                out.set(place, before + terms.sum::<f32>() + bias.get(column));
            }
        }
        "noise_mix" => {
            let (x_t, target, x0, eps) = (r.t(), r.floats(), r.floats(), r.floats());
            let (sigma, b, per_sample) = (r.floats(), r.int(), r.int());
            for i in 0..b * per_sample {
                let s = sigma.get(i / per_sample);
                x_t.set(i, (1.0 - s) * x0.get(i) + s * eps.get(i));
                target.set(i, eps.get(i) - x0.get(i));
            }
        }
        "weighted_mse" => {
            let (partials, dvelocity, velocity) = (r.floats(), r.t(), r.t());
            let (target, weight, b, per_sample) = (r.floats(), r.floats(), r.int(), r.int());
            let scale = r.f32();
            let mut sum = 0.0;
            for i in 0..b * per_sample {
                let (w, e) = (weight.get(i / per_sample), velocity.get(i) - target.get(i));
                sum += w * e * e;
                dvelocity.set(i, scale * w * e);
            }
            (0..rows).for_each(|i| partials.set(i, if i == 0 { sum } else { 0.0 }));
        }
        "add_loss" => {
            let (loss, partials, count, mean_over) = (r.floats(), r.floats(), r.int(), r.f32());
            let sum: f32 = (0..count).map(|i| partials.get(i)).sum();
            loss.set(0, loss.get(0) + sum / mean_over);
        }
        "euler_cfg" => {
            let (sample, input, velocity, coefficients) = (r.floats(), r.t(), r.t(), r.floats());
            let (n, copies) = (r.int(), r.int());
            for i in 0..n {
                let mut v = velocity.get(i);
                if copies == 2 {
                    let negative = velocity.get(n + i);
                    v = negative + coefficients.get(1) * (v - negative);
                }
                sample.set(i, sample.get(i) + coefficients.get(0) * v);
                (0..copies).for_each(|copy| input.set(copy * n + i, sample.get(i)));
            }
        }
        "lora_pack" | "lora_unpack" => {
            let (target, source, list) = (r.word(), r.word(), r.word());
            for index in 0..launch.grid[1] as usize {
                // SAFETY: the list has as many rectangles as the grid has rows.
                let x = unsafe { *(list as *const Rectangle).add(index) };
                for row in 0..x.rows as usize {
                    for column in 0..x.columns as usize {
                        let from = x.source as usize + row * x.source_stride as usize + column;
                        let to = x.target as usize + row * x.target_stride as usize + column;
                        let value = Floats(source).get(from) * x.scale;
                        match kernel {
                            "lora_pack" => Elements { address: target, t }.set(to, value),
                            _ => Floats(target).set(to, value),
                        }
                    }
                }
            }
        }
        "qk_norm_rope_any" => rope(&mut r, rows, false),
        "qk_norm_rope_backward_any" => rope(&mut r, rows, true),
        "qk_norm_rope_backward_sums_any" => rope_sums(&mut r, rows),
        "attention_any_forward" => attention_forward(&mut r, launch),
        "attention_any_backward_q" => attention_backward(&mut r, launch, true),
        "attention_any_backward_kv" => attention_backward(&mut r, launch, false),
        other => panic!("no plain form of `{other}`"),
    }
}

fn rope(r: &mut Reader<'_>, rows: usize, backward: bool) {
    let d_input = backward.then(|| r.t());
    let outputs = [r.t(), r.t(), r.t()];
    let input = r.t();
    let norms = [r.t(), r.t()];
    let (cos, sin) = (r.floats(), r.floats());
    let (n, n_total, offset, heads, dh) = (r.int(), r.int(), r.int(), r.int(), r.int());
    let (in_stride, out_stride, eps) = (r.int(), r.int(), r.f32());
    let d = heads * dh;
    for row in 0..rows {
        let position = offset + row % n;
        let out_row = (row / n * n_total + position) * out_stride;
        for part in 0..3 {
            for head in 0..heads {
                let (at, out) = (row * in_stride + part * d + head * dh, out_row + head * dh);
                if part == 2 {
                    for i in 0..dh {
                        match d_input {
                            Some(dx) => dx.set(at + i, outputs[2].get(out + i)),
                            None => outputs[2].set(out + i, input.get(at + i)),
                        }
                    }
                    continue;
                }
                let x: Vec<f32> = (0..dh).map(|i| input.get(at + i)).collect();
                let square = x.iter().map(|v| v * v).sum::<f32>() / dh as f32;
                let inverse = (square + eps).sqrt().recip();
                let w = |i: usize| norms[part].get(i);
                let turn = |i: usize| (cos.get(position * dh + i), sin.get(position * dh + i));
                match d_input {
                    None => {
                        for i in (0..dh).step_by(2) {
                            let (a, b) = (x[i] * inverse * w(i), x[i + 1] * inverse * w(i + 1));
                            let (c, s) = turn(i);
                            outputs[part].set(out + i, a * c - b * s);
                            outputs[part].set(out + i + 1, b * c + a * s);
                        }
                    }
                    Some(dx) => {
                        let mut g = vec![0.0; dh];
                        for i in (0..dh).step_by(2) {
                            let (c, s) = turn(i);
                            let (a, b) =
                                (outputs[part].get(out + i), outputs[part].get(out + i + 1));
                            g[i] = (a * c + b * s) * w(i);
                            g[i + 1] = (b * c - a * s) * w(i + 1);
                        }
                        let mean = g.iter().zip(&x).map(|(g, x)| g * x).sum::<f32>() / dh as f32;
                        for i in 0..dh {
                            dx.set(at + i, inverse * (g[i] - x[i] * mean * inverse * inverse));
                        }
                    }
                }
            }
        }
    }
}

/// Token, head and batch strides.
fn strides<const N: usize>(r: &mut Reader<'_>) -> [[usize; 3]; N] {
    std::array::from_fn(|_| [r.int(), r.int(), r.int()])
}

fn offset([token, head, batch]: [usize; 3], b: usize, h: usize, n: usize) -> usize {
    b * batch + h * head + n * token
}

fn dot(a: Elements, at_a: usize, b: Elements, at_b: usize, dh: usize) -> f32 {
    (0..dh).map(|c| a.get(at_a + c) * b.get(at_b + c)).sum()
}

fn attention_forward(r: &mut Reader<'_>, launch: Launch) {
    let (o, lse, q, k, v) = (r.t(), r.floats(), r.t(), r.t(), r.t());
    let [so, sq, sk, sv] = strides(r);
    let (n, dh, scale) = (r.int(), r.int(), r.f32());
    let [_, heads, batch] = launch.grid.map(|size| size as usize);
    for b in 0..batch {
        for h in 0..heads {
            for row in 0..n {
                let at = offset(sq, b, h, row);
                let scores: Vec<f32> = (0..n)
                    .map(|j| scale * dot(q, at, k, offset(sk, b, h, j), dh))
                    .collect();
                let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f32 = scores.iter().map(|s| (s - most).exp()).sum();
                for c in 0..dh {
                    let mixed: f32 = scores
                        .iter()
                        .enumerate()
                        .map(|(j, s)| (s - most).exp() * v.get(offset(sv, b, h, j) + c))
                        .sum();
                    o.set(offset(so, b, h, row) + c, mixed / sum);
                }
                lse.set((b * heads + h) * n + row, most + sum.ln());
            }
        }
    }
}

fn attention_backward(r: &mut Reader<'_>, launch: Launch, queries: bool) {
    let first = r.t();
    let second = (!queries).then(|| r.t());
    let (delta, d_o) = (r.floats(), r.t());
    let o = queries.then(|| r.t());
    let (lse, q, k, v) = (r.floats(), r.t(), r.t(), r.t());
    let [s_first] = strides(r);
    let s_second = second.map(|_| strides::<1>(r)[0]);
    let [s_do] = strides(r);
    let s_o = o.map(|_| strides::<1>(r)[0]);
    let [sq, sk, sv] = strides(r);
    let (n, dh, scale) = (r.int(), r.int(), r.f32());
    let [_, heads, batch] = launch.grid.map(|size| size as usize);
    for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
        let index = |row: usize| (b * heads + h) * n + row;
        if let (Some(o), Some(s_o)) = (o, s_o) {
            for row in 0..n {
                let sum = dot(d_o, offset(s_do, b, h, row), o, offset(s_o, b, h, row), dh);
                delta.set(index(row), sum);
            }
        }
        let p = |i: usize, j: usize| {
            let score = scale * dot(q, offset(sq, b, h, i), k, offset(sk, b, h, j), dh);
            (score - lse.get(index(i))).exp()
        };
        let ds = |i: usize, j: usize| {
            let dp = dot(d_o, offset(s_do, b, h, i), v, offset(sv, b, h, j), dh);
            p(i, j) * (dp - delta.get(index(i))) * scale
        };
        for x in 0..n {
            let (mut g1, mut g2) = (vec![0.0; dh], vec![0.0; dh]);
            for y in 0..n {
                let (ds, p) = match queries {
                    true => (ds(x, y), 0.0),
                    false => (ds(y, x), p(y, x)),
                };
                for c in 0..dh {
                    g1[c] += match queries {
                        true => ds * k.get(offset(sk, b, h, y) + c),
                        false => ds * q.get(offset(sq, b, h, y) + c),
                    };
                    g2[c] += p * d_o.get(offset(s_do, b, h, y) + c);
                }
            }
            (0..dh).for_each(|c| first.set(offset(s_first, b, h, x) + c, g1[c]));
            if let (Some(second), Some(strides)) = (second, s_second) {
                (0..dh).for_each(|c| second.set(offset(strides, b, h, x) + c, g2[c]));
            }
        }
    }
}
