//! A batch from tables on the device: latents, noise, mixture, target, captions. Kernels: `draw.cu`.
//!
//! Normal numbers come from Philox4x32-10 and Box–Muller, so that a seed and a position give the same number anywhere:
//! [`normals`] is the definition on the host.
//!
//! Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).

#![allow(clippy::too_many_arguments)] // a kernel's

use crate::error::CudaError;
use crate::half_type::Half;
use crate::kernels::{Args, Launch, Module};
use crate::ops::extent::{blocks, elements, vectors};
use crate::stream::Stream;
use crate::view::View;

static DRAW: Module = Module {
    name: "draw",
    source: include_str!("../../kernels/draw.cu"),
};

/// `DRAW_THREADS` of the kernels.
const THREADS: usize = 256;

/// What normal numbers are drawn for: each has a sequence of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The latent's posterior.
    Posterior = 0,
    /// The noise that is mixed in.
    Noise = 1,
}

fn philox(index: u64, purpose: Purpose, seed: u64) -> [u32; 4] {
    let mut c = [index as u32, (index >> 32) as u32, purpose as u32, 0];
    let mut key = [seed as u32, (seed >> 32) as u32];
    for _ in 0..10 {
        let wide = |factor: u32, word: u32| u64::from(factor) * u64::from(word);
        let (a, b) = (wide(0xD251_1F53, c[0]), wide(0xCD9E_8D57, c[2]));
        c = [
            (b >> 32) as u32 ^ c[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ c[3] ^ key[1],
            a as u32,
        ];
        key = [
            key[0].wrapping_add(0x9E37_79B9),
            key[1].wrapping_add(0xBB67_AE85),
        ];
    }
    c
}

fn box_muller(a: u32, b: u32) -> [f32; 2] {
    const UNIT: f32 = 1.0 / (1 << 24) as f32;
    let radius = (-2.0 * (((a >> 8) as f32 + 0.5) * UNIT).ln()).sqrt();
    let turn = f64::from(b >> 8) / f64::from(1 << 23) * std::f64::consts::PI;
    [radius * turn.cos() as f32, radius * turn.sin() as f32]
}

/// The first `count` normal numbers of a seed, in the order of a batch's tokens.
pub fn normals(seed: u64, purpose: Purpose, count: usize) -> Vec<f32> {
    let draws = (0..count.div_ceil(4) as u64).flat_map(|index| {
        let [a, b, c, d] = philox(index, purpose, seed);
        let [first, second] = [box_muller(a, b), box_muller(c, d)];
        [first[0], first[1], second[0], second[1]]
    });
    draws.take(count).collect()
}

/// Sizes of a batch of latents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatentSizes {
    /// Samples.
    pub b: usize,
    /// Channels.
    pub c: usize,
    /// Rows of cells, even.
    pub h: usize,
    /// Cells of a row, even.
    pub w: usize,
    /// Pictures in the tables.
    pub rows: usize,
}

/// Draws `x₀ = mean + deviation·n` of the `pictures` (u32 `[b]`) from f32 tables `[rows, c, h, w]` and mixes noise ε in:
/// `x_t = (1 − σ)x₀ + σε` (T) and `target = ε − x₀` (f32), both as tokens `[b, h/2·w/2, 4c]`.
///
/// `sigma` is f32 `[b]`, `seed` one u64, both on the device. n and ε are [`normals`] of the seed.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a view is too short, a side is odd, or the tables are empty. A place beyond the tables' last picture is the last.
pub fn draw(
    s: &Stream,
    t: Half,
    x_t: View,
    target: View,
    mean: View,
    deviation: View,
    pictures: View,
    sigma: View,
    seed: View,
    sizes: LatentSizes,
) -> Result<(), CudaError> {
    let LatentSizes { b, c, h, w, rows } = sizes;
    assert!(
        h.is_multiple_of(2) && w.is_multiple_of(2),
        "latents of {h}×{w} cells have no patches of 2×2"
    );
    assert!(rows > 0, "tables without a picture");
    let n = b * c * h * w;
    let table = |view, what| elements(view, rows * c * h * w, 4, what);
    let args = Args::new()
        .ptr(vectors(x_t, n, 2, "the noisy sample"))
        .ptr(vectors(target, n, 4, "the target"))
        .ptr(table(mean, "means"))
        .ptr(table(deviation, "deviations"))
        .ptr(elements(pictures, b, 4, "places of pictures"))
        .ptr(elements(sigma, b, 4, "noise levels"))
        .ptr(elements(seed, 1, 8, "the seed"))
        .i32(b)
        .i32(c)
        .i32(h)
        .i32(w)
        .i32(rows);
    let launch = Launch {
        grid: [blocks((n / 4).div_ceil(THREADS).max(1)), 1, 1],
        block: [THREADS as u32, 1, 1],
        shared_bytes: 0,
    };
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { s.launch(&DRAW, &[t.define()], "draw", launch, args) }
}

/// `out[i] = table[rows[i]]`: T `[b, width]` from T `[num_rows, width]` by u32 `[b]`.
///
/// # Errors
///
/// If the launch fails.
///
/// # Panics
///
/// If a view is too short, or the table is empty. A place beyond the table's last row is the last.
pub fn gather(
    s: &Stream,
    t: Half,
    out: View,
    table: View,
    rows: View,
    b: usize,
    num_rows: usize,
    width: usize,
) -> Result<(), CudaError> {
    assert!(num_rows > 0, "a table without a row");
    let args = Args::new()
        .ptr(vectors(out, b * width, 2, "gathered rows"))
        .ptr(vectors(table, num_rows * width, 2, "the table"))
        .ptr(elements(rows, b, 4, "places of rows"))
        .i32(width)
        .i32(num_rows);
    let launch = Launch {
        grid: [blocks(b), blocks(width.div_ceil(8 * THREADS)), 1],
        block: [THREADS as u32, 1, 1],
        shared_bytes: 0,
    };
    // SAFETY: the kernel's arguments; every view was compared with the sizes.
    unsafe { s.launch(&DRAW, &[t.define()], "gather_rows", launch, args) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_is_that_of_the_paper() {
        // The known answers of Random123 for zeros.
        assert_eq!(
            philox(0, Purpose::Posterior, 0),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
    }

    #[test]
    fn normals_have_mean_0_and_variance_1_and_purposes_differ() {
        let numbers = normals(7, Purpose::Noise, 100_000);
        let mean = numbers.iter().sum::<f32>() / 1e5;
        let variance = numbers.iter().map(|x| x * x).sum::<f32>() / 1e5;
        assert!(mean.abs() < 0.01 && (variance - 1.0).abs() < 0.02);
        assert_ne!(numbers[..8], normals(7, Purpose::Posterior, 8));
    }
}
