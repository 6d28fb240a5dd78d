//! The pieces that encoder and decoder are made of: convolution, group norm, residual block,
//! attention over all cells.
//!
//! Every tensor is `(b, c, h, w)`. Source: `ResnetBlock2D`, `Downsample2D`, `Upsample2D`,
//! `Attention` of diffusers 0.42.

use std::ops::Range;

use burn::tensor::activation::softmax;
use burn::tensor::module::conv2d;
use burn::tensor::ops::ConvOptions;
use tensor::nn::{Linear, silu};
use tensor::{DType, Device, ParameterSpec, Precision, Tensor, Weights, WeightsError, device};

/// Added to the variance in every group norm (`resnet_eps` of diffusers' encoder and decoder).
const NORM_EPSILON: f64 = 1e-6;

/// Most logits that the attention holds at once; above it, it goes through the queries in parts.
const MAX_LOGITS: usize = 1 << 25;

/// Where parameters come from and go to.
pub(crate) struct Loader<'a> {
    pub(crate) weights: &'a Weights,
    pub(crate) device: &'a Device,
    pub(crate) precision: Precision,
    /// Groups of every group norm.
    pub(crate) groups: usize,
}

/// Parameters of a convolution with a square kernel.
pub(crate) fn conv_parameters(
    name: &str,
    input: usize,
    output: usize,
    kernel: usize,
) -> Vec<ParameterSpec> {
    vec![
        ParameterSpec::new(format!("{name}.weight"), [output, input, kernel, kernel]),
        ParameterSpec::new(format!("{name}.bias"), [output]),
    ]
}

/// Parameters of a group norm.
pub(crate) fn norm_parameters(name: &str, width: usize) -> Vec<ParameterSpec> {
    vec![
        ParameterSpec::new(format!("{name}.weight"), [width]),
        ParameterSpec::new(format!("{name}.bias"), [width]),
    ]
}

/// Parameters of a residual block.
pub(crate) fn resnet_parameters(name: &str, input: usize, output: usize) -> Vec<ParameterSpec> {
    let mut specs = norm_parameters(&format!("{name}.norm1"), input);
    specs.extend(conv_parameters(&format!("{name}.conv1"), input, output, 3));
    specs.extend(norm_parameters(&format!("{name}.norm2"), output));
    specs.extend(conv_parameters(&format!("{name}.conv2"), output, output, 3));
    if input != output {
        specs.extend(conv_parameters(
            &format!("{name}.conv_shortcut"),
            input,
            output,
            1,
        ));
    }
    specs
}

/// Parameters of the attention in a middle block.
pub(crate) fn attention_parameters(name: &str, width: usize) -> Vec<ParameterSpec> {
    let mut specs = norm_parameters(&format!("{name}.group_norm"), width);
    for part in ["to_q", "to_k", "to_v", "to_out.0"] {
        specs.extend(Linear::parameters(
            &format!("{name}.{part}"),
            width,
            width,
            true,
        ));
    }
    specs
}

/// A convolution with a square kernel of odd size, stride 1, that keeps the sides.
#[derive(Debug)]
pub(crate) struct Conv {
    /// `[out, in, kernel, kernel]`.
    weight: Tensor<4>,
    bias: Tensor<1>,
}

impl Conv {
    pub(crate) fn load(
        loader: &Loader,
        name: &str,
        [input, output]: [usize; 2],
        kernel: usize,
    ) -> Result<Self, WeightsError> {
        let Loader {
            weights,
            device,
            precision,
            ..
        } = *loader;
        Ok(Self {
            weight: weights.tensor(
                &format!("{name}.weight"),
                [output, input, kernel, kernel],
                device,
                precision,
            )?,
            bias: weights.tensor(&format!("{name}.bias"), [output], device, precision)?,
        })
    }

    pub(crate) fn forward(&self, input: Tensor<4>) -> Tensor<4> {
        let [_, _, kernel, _] = self.weight.dims();
        self.apply(input, 1, kernel / 2)
    }

    /// Halves the sides (rounding down): one row and column of zeros behind the picture, none before.
    pub(crate) fn downsample(&self, input: Tensor<4>) -> Tensor<4> {
        let [b, c, h, w] = input.dims();
        let zeros = Tensor::<4>::zeros([b, c, h + 1, w + 1], (&input.device(), input.dtype()));
        self.apply(zeros.slice_assign([0..b, 0..c, 0..h, 0..w], input), 2, 0)
    }

    /// Doubles the sides by nearest, then convolves.
    pub(crate) fn upsample(&self, input: Tensor<4>) -> Tensor<4> {
        self.forward(double_nearest(input))
    }

    fn apply(&self, input: Tensor<4>, stride: usize, padding: usize) -> Tensor<4> {
        // Without autotuning Burn's CUDA backend convolves without tensor cores.
        if device::is_cpu(&input.device()) {
            let options = ConvOptions::new([stride; 2], [padding; 2], [1, 1], 1);
            conv2d(input, self.weight.clone(), Some(self.bias.clone()), options)
        } else {
            convolve_by_product(input, &self.weight, &self.bias, stride, padding)
        }
    }
}

/// Most values of unfolded input that a convolution by product makes at once; above it, it goes picture by picture.
const MAX_UNFOLDED: usize = 1 << 29;

/// A convolution as one matrix product over unfolded input, the same sums in another order: for devices whose
/// convolutions are slow: `(b, c, h, w)` → `(b, o, h', w')`.
fn convolve_by_product(
    input: Tensor<4>,
    weight: &Tensor<4>,
    bias: &Tensor<1>,
    stride: usize,
    padding: usize,
) -> Tensor<4> {
    let [b, c, h, w] = input.dims();
    let [o, _, kernel, _] = weight.dims();
    if b > 1 && b * c * kernel * kernel * h * w / (stride * stride) > MAX_UNFOLDED {
        let half = b / 2;
        let part = |range: Range<usize>| {
            let part = input.clone().slice([range, 0..c, 0..h, 0..w]);
            convolve_by_product(part, weight, bias, stride, padding)
        };
        return Tensor::cat(vec![part(0..half), part(half..b)], 0);
    }
    let side = |length: usize| (length + 2 * padding - kernel) / stride + 1;
    let (out_h, out_w) = (side(h), side(w));
    let (columns, row) = unfold(input, kernel, stride, padding, out_h); // b (c k k) (h' row)
    let rows = weight.clone().reshape([1, o, c * kernel * kernel]); // 1 o (c k k)
    let output = rows.matmul(columns).reshape([b, o, out_h, row]); // b o h' row
    let output = if row == out_w {
        output
    } else {
        output.slice([0..b, 0..o, 0..out_h, 0..out_w])
    };
    output + bias.clone().reshape([1, o, 1, 1])
}

/// What the kernel sees at every place it stops at, and how many places a row has: `(b, c, h, w)` →
/// `(b, c·k·k, h'·row)`, columns in the order of a weight `[out, c, k, k]`.
///
/// With stride 1 the padded picture is one line of values per channel: a step of the kernel is a shift along that line,
/// and so one plain copy. Places behind `w'` in a row look round its end and mean nothing. With a larger stride there
/// is such a line for each phase.
fn unfold(
    input: Tensor<4>,
    kernel: usize,
    stride: usize,
    padding: usize,
    out_h: usize,
) -> (Tensor<3>, usize) {
    let [b, c, h, w] = input.dims();
    if kernel == 1 && stride == 1 && padding == 0 {
        return (input.reshape([b, c, h * w]), w);
    }
    // One row more than is looked at: the last shifts run over.
    let padded_h = (h + 2 * padding).next_multiple_of(stride) + stride;
    let padded_w = (w + 2 * padding).next_multiple_of(stride);
    let zeros = Tensor::<4>::zeros([b, c, padded_h, padded_w], (&input.device(), input.dtype()));
    let inside = [0..b, 0..c, padding..padding + h, padding..padding + w];
    let padded = zeros.slice_assign(inside, input);
    let (lines, row) = (padded_h / stride, padded_w / stride);
    let phases: Vec<Tensor<3>> = (0..stride * stride)
        .map(|phase| {
            if stride == 1 {
                return padded.clone().reshape([b, c, lines * row]);
            }
            let (y, x) = (phase / stride, phase % stride);
            padded
                .clone()
                .reshape([b, c, lines, stride, row, stride]) // b c lines phase row phase
                .slice([0..b, 0..c, 0..lines, y..y + 1, 0..row, x..x + 1])
                .reshape([b, c, lines * row]) // b c (lines row)
        })
        .collect();
    let places = out_h * row;
    let shifts = (0..kernel * kernel)
        .map(|tap| {
            let (y, x) = (tap / kernel, tap % kernel);
            let start = (y / stride) * row + x / stride;
            phases[(y % stride) * stride + x % stride]
                .clone()
                .slice([0..b, 0..c, start..start + places])
                .reshape([b, c, 1, places])
        })
        .collect();
    let columns = Tensor::<4>::cat(shifts, 2) // b c (k k) (h' row)
        .reshape([b, c * kernel * kernel, places]);
    (columns, row)
}

/// Every cell becomes 2×2 of itself: `(b, c, h, w)` → `(b, c, 2h, 2w)`.
pub(crate) fn double_nearest(input: Tensor<4>) -> Tensor<4> {
    let [b, c, h, w] = input.dims();
    input
        .reshape([b, c, h, 1, w, 1]) // b c h 1 w 1
        .expand([b, c, h, 2, w, 2]) // b c h 2 w 2
        .reshape([b, c, 2 * h, 2 * w]) // b c 2h 2w
}

/// Group norm with scale and shift per channel; statistics in `f32`.
#[derive(Debug)]
pub(crate) struct GroupNorm {
    weight: Tensor<1>,
    bias: Tensor<1>,
    groups: usize,
}

impl GroupNorm {
    pub(crate) fn load(loader: &Loader, name: &str, width: usize) -> Result<Self, WeightsError> {
        let Loader {
            weights,
            device,
            precision,
            groups,
        } = *loader;
        Ok(Self {
            weight: weights.tensor(&format!("{name}.weight"), [width], device, precision)?,
            bias: weights.tensor(&format!("{name}.bias"), [width], device, precision)?,
            groups,
        })
    }

    pub(crate) fn forward(&self, input: Tensor<4>) -> Tensor<4> {
        let dtype = input.dtype();
        let input = input.cast(DType::F32);
        let output = if device::is_cpu(&input.device()) {
            self.forward_by_lines(input)
        } else {
            self.forward_by_rows(input)
        };
        output.cast(dtype)
    }

    /// Sums over a whole group at once, and channels as long lines: what the CPU is quickest at.
    fn forward_by_lines(&self, input: Tensor<4>) -> Tensor<4> {
        let [b, c, h, w] = input.dims();
        let per_group = c / self.groups * h * w;
        let grouped = input.reshape([b, self.groups, per_group]); // b g (c/g h w)
        let centred = grouped.clone() - grouped.mean_dim(2);
        let variance = centred.clone().powi_scalar(2).mean_dim(2); // b g 1
        let rows = (centred / (variance + NORM_EPSILON).sqrt()).reshape([b, c, h * w]); // b c (h w)
        let scale = self.weight.clone().cast(DType::F32).reshape([1, c, 1]);
        let shift = self.bias.clone().cast(DType::F32).reshape([1, c, 1]);
        (rows * scale + shift).reshape([b, c, h, w]) // b c h w
    }

    /// The same, with every sum taken axis by axis: a card without autotuning sums few long lines on one of its
    /// processors (measured: 0.6 ms each, more than half of a training step), and many short ones on all.
    fn forward_by_rows(&self, input: Tensor<4>) -> Tensor<4> {
        let [b, c, h, w] = input.dims();
        let grouped = input.reshape([b, self.groups, c / self.groups * h, w]); // b g (c/g h) w
        let mean = |x: Tensor<4>| x.mean_dim(3).mean_dim(2); // b g 1 1
        let centred = grouped.clone() - mean(grouped);
        let variance = mean(centred.clone().powi_scalar(2));
        let normed = (centred / (variance + NORM_EPSILON).sqrt()).reshape([b, c, h, w]);
        let scale = self.weight.clone().cast(DType::F32).reshape([1, c, 1, 1]);
        let shift = self.bias.clone().cast(DType::F32).reshape([1, c, 1, 1]);
        normed * scale + shift
    }
}

/// `x + conv2(silu(norm2(conv1(silu(norm1(x))))))`, with a 1×1 convolution on `x` where widths differ.
#[derive(Debug)]
pub(crate) struct Resnet {
    norm1: GroupNorm,
    conv1: Conv,
    norm2: GroupNorm,
    conv2: Conv,
    conv_shortcut: Option<Conv>,
}

impl Resnet {
    pub(crate) fn load(
        loader: &Loader,
        name: &str,
        [input, output]: [usize; 2],
    ) -> Result<Self, WeightsError> {
        let shortcut = || Conv::load(loader, &format!("{name}.conv_shortcut"), [input, output], 1);
        Ok(Self {
            norm1: GroupNorm::load(loader, &format!("{name}.norm1"), input)?,
            conv1: Conv::load(loader, &format!("{name}.conv1"), [input, output], 3)?,
            norm2: GroupNorm::load(loader, &format!("{name}.norm2"), output)?,
            conv2: Conv::load(loader, &format!("{name}.conv2"), [output, output], 3)?,
            conv_shortcut: (input != output).then(shortcut).transpose()?,
        })
    }

    pub(crate) fn forward(&self, input: Tensor<4>) -> Tensor<4> {
        let inner = self.conv1.forward(silu(self.norm1.forward(input.clone())));
        let inner = self.conv2.forward(silu(self.norm2.forward(inner)));
        let residual = match &self.conv_shortcut {
            Some(conv) => conv.forward(input),
            None => input,
        };
        residual + inner
    }
}

/// One head over all cells, added to its input.
#[derive(Debug)]
pub(crate) struct Attention {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl Attention {
    pub(crate) fn load(loader: &Loader, name: &str, width: usize) -> Result<Self, WeightsError> {
        let linear = |part: &str| {
            let Loader {
                weights,
                device,
                precision,
                ..
            } = *loader;
            Linear::load(
                weights,
                &format!("{name}.{part}"),
                [width, width],
                true,
                device,
                precision,
            )
        };
        Ok(Self {
            group_norm: GroupNorm::load(loader, &format!("{name}.group_norm"), width)?,
            to_q: linear("to_q")?,
            to_k: linear("to_k")?,
            to_v: linear("to_v")?,
            to_out: linear("to_out.0")?,
        })
    }

    pub(crate) fn forward(&self, input: Tensor<4>) -> Tensor<4> {
        let [b, c, h, w] = input.dims();
        let n = h * w;
        let cells = self
            .group_norm
            .forward(input.clone())
            .reshape([b, c, n]) // b c n
            .swap_dims(1, 2); // b n c
        let q = self.to_q.forward(cells.clone()) * (c as f64).powf(-0.5);
        let k = self.to_k.forward(cells.clone()).transpose(); // b c n
        let v = self.to_v.forward(cells);
        let mixed = attend(q, k, v, (MAX_LOGITS / (b * n)).max(1)); // b n c
        let output = self
            .to_out
            .forward(mixed)
            .swap_dims(1, 2)
            .reshape([b, c, h, w]); // b c h w
        input + output
    }
}

/// `softmax(q k) v`, `rows` queries at a time; `q`, `v` are `(b, n, c)`, `k` is `(b, c, n)`.
fn attend(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, rows: usize) -> Tensor<3> {
    let [b, n, c] = q.dims();
    let dtype = q.dtype();
    let part = |q: Tensor<3>| {
        let logits = q.matmul(k.clone()).cast(DType::F32); // b rows n
        softmax(logits, 2).cast(dtype).matmul(v.clone()) // b rows c
    };
    if rows >= n {
        return part(q);
    }
    let parts = (0..n)
        .step_by(rows)
        .map(|start| part(q.clone().slice([0..b, start..(start + rows).min(n), 0..c])))
        .collect();
    Tensor::cat(parts, 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::device::cpu;
    use tensor::{from_f32, to_f32};

    fn close(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() < 1e-5, "{found:?} is not {expected:?}");
        }
    }

    fn conv(weight: Vec<f32>, kernel: usize) -> Conv {
        Conv {
            weight: from_f32(weight, [1, 1, kernel, kernel], &cpu()),
            bias: from_f32(vec![0.5], [1], &cpu()),
        }
    }

    #[test]
    fn a_convolution_keeps_the_sides_and_correlates() {
        let mut weight = vec![0.0; 9];
        weight[5] = 1.0; // looks one to the right
        let input = from_f32((0..6).map(|i| i as f32).collect(), [1, 1, 2, 3], &cpu());
        let output = conv(weight, 3).forward(input);
        assert_eq!(output.dims(), [1, 1, 2, 3]);
        close(&to_f32(&output), &[1.5, 2.5, 0.5, 4.5, 5.5, 0.5]);
    }

    #[test]
    fn downsampling_pads_behind_only() {
        let mut weight = vec![0.0; 9];
        weight[8] = 1.0; // looks at the last of its 3×3 window
        let input = from_f32((0..16).map(|i| i as f32).collect(), [1, 1, 4, 4], &cpu());
        let output = conv(weight, 3).downsample(input);
        assert_eq!(output.dims(), [1, 1, 2, 2]);
        close(&to_f32(&output), &[10.5, 0.5, 0.5, 0.5]);
    }

    #[test]
    fn a_convolution_by_product_is_the_convolution() {
        let values = |count: usize, salt: usize| -> Vec<f32> {
            (0..count)
                .map(|i| ((i * 37 + salt * 11) % 29) as f32 / 14.0 - 1.0)
                .collect()
        };
        let device = tensor::device::training(&cpu());
        for (kernel, stride, padding) in [(3, 1, 1), (3, 2, 0), (1, 1, 0)] {
            let [b, c, o, h, w] = [3, 2, 4, 7, 9];
            let results = [false, true].map(|by_product| {
                let make = |count, salt, shape| {
                    from_f32(values(count, salt), shape, &device).require_grad()
                };
                let input: Tensor<4> = make(b * c * h * w, 1, [b, c, h, w]);
                let weight: Tensor<4> = make(o * c * kernel * kernel, 2, [o, c, kernel, kernel]);
                let bias = from_f32(values(o, 3), [o], &device).require_grad();
                let output = if by_product {
                    convolve_by_product(input.clone(), &weight, &bias, stride, padding)
                } else {
                    let options = ConvOptions::new([stride; 2], [padding; 2], [1, 1], 1);
                    conv2d(input.clone(), weight.clone(), Some(bias.clone()), options)
                };
                let gradients = output.clone().powi_scalar(2).sum().backward();
                [
                    to_f32(&output.inner()),
                    to_f32(&input.grad(&gradients).expect("it was asked for")),
                    to_f32(&weight.grad(&gradients).expect("it was asked for")),
                    to_f32(&bias.grad(&gradients).expect("it was asked for")),
                ]
            });
            let [library, product] = results;
            for (library, product) in library.iter().zip(&product) {
                assert_eq!(library.len(), product.len());
                for (l, p) in library.iter().zip(product) {
                    assert!((l - p).abs() <= 1e-4 * l.abs().max(1.0), "{l} is not {p}");
                }
            }
        }
    }

    #[test]
    fn doubling_repeats_each_cell_in_both_directions() {
        let input = from_f32(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1, 1, 2, 3], &cpu());
        let output = double_nearest(input);
        assert_eq!(output.dims(), [1, 1, 4, 6]);
        let expected = [
            1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, //
            4.0, 4.0, 5.0, 5.0, 6.0, 6.0, 4.0, 4.0, 5.0, 5.0, 6.0, 6.0,
        ];
        close(&to_f32(&output), &expected);
    }

    #[test]
    fn a_group_is_normed_over_its_channels_and_cells_together() {
        let norm = GroupNorm {
            weight: from_f32(vec![1.0, 2.0], [2], &cpu()),
            bias: from_f32(vec![0.0, 1.0], [2], &cpu()),
            groups: 1,
        };
        let input = from_f32(vec![1.0, 1.0, 3.0, 3.0], [1, 2, 1, 2], &cpu());
        for output in [norm.forward(input.clone()), norm.forward_by_rows(input)] {
            close(&to_f32(&output), &[-1.0, -1.0, 3.0, 3.0]);
        }
    }

    #[test]
    fn attention_in_parts_is_the_same_attention() {
        let values = |seed: usize| {
            (0..30)
                .map(|i| ((i * seed) % 7) as f32 * 0.3 - 1.0)
                .collect()
        };
        let q = from_f32(values(3), [2, 5, 3], &cpu());
        let k = from_f32(values(5), [2, 3, 5], &cpu());
        let v = from_f32(values(2), [2, 5, 3], &cpu());
        let whole = to_f32(&attend(q.clone(), k.clone(), v.clone(), 5));
        close(&to_f32(&attend(q, k, v, 2)), &whole);
    }
}
