//! The inverse cosine transform in integers, as libjpeg's `islow` rounds it.
//!
//! Loeffler, Ligtenberg and Moschytz (1989): eleven multiplications per 8 values, constants with 13 fractional bits.
//! Columns keep 2 extra bits, rows then drop everything; the factor 8 of the two passes goes with the last shift.

/// Natural position of the n-th coefficient in the file.
pub(super) const ZIGZAG: [usize; 64] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20,
    13, 6, 7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59,
    52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
];

const FRACTION_BITS: u32 = 13;
const EXTRA_BITS: u32 = 2;

/// A constant with 13 fractional bits, rounded.
const fn fixed(value: f64) -> i64 {
    (value * (1 << FRACTION_BITS) as f64 + 0.5) as i64
}

/// One block: coefficients in natural order and their quantization steps → samples, row by row.
pub(super) fn inverse(coefficients: &[i16; 64], steps: &[u16; 64]) -> [u8; 64] {
    let mut columns = [0i64; 64];
    for x in 0..8 {
        let input = std::array::from_fn(|y| {
            // 16 bits, as in the vector code that libjpeg-turbo runs.
            let step = steps[8 * y + x] as i16;
            i64::from(coefficients[8 * y + x].wrapping_mul(step))
        });
        let output = eight(input);
        for (y, value) in output.into_iter().enumerate() {
            columns[8 * y + x] = round_shift(value, FRACTION_BITS - EXTRA_BITS);
        }
    }
    let mut samples = [0; 64];
    for y in 0..8 {
        let output = eight(std::array::from_fn(|x| columns[8 * y + x]));
        for (x, value) in output.into_iter().enumerate() {
            let sample = round_shift(value, FRACTION_BITS + EXTRA_BITS + 3) + 128;
            samples[8 * y + x] = sample.clamp(0, 255) as u8;
        }
    }
    samples
}

fn round_shift(value: i64, bits: u32) -> i64 {
    (value + (1 << (bits - 1))) >> bits
}

/// One dimension; the output has 13 more fractional bits than the input.
fn eight(input: [i64; 8]) -> [i64; 8] {
    let [x0, x1, x2, x3, x4, x5, x6, x7] = input;

    // Even part.
    let shared = (x2 + x6) * fixed(0.541_196_100);
    let low = shared - x6 * fixed(1.847_759_065);
    let high = shared + x2 * fixed(0.765_366_865);
    let sum = (x0 + x4) << FRACTION_BITS;
    let difference = (x0 - x4) << FRACTION_BITS;
    let even = [sum + high, difference + low, difference - low, sum - high];

    // Odd part.
    let cross = (x7 + x3 + x5 + x1) * fixed(1.175_875_602);
    let a = (x7 + x1) * -fixed(0.899_976_223);
    let b = (x5 + x3) * -fixed(2.562_915_447);
    let c = (x7 + x3) * -fixed(1.961_570_560) + cross;
    let d = (x5 + x1) * -fixed(0.390_180_644) + cross;
    let odd = [
        x1 * fixed(1.501_321_110) + a + d,
        x3 * fixed(3.072_711_026) + b + c,
        x5 * fixed(2.053_119_869) + b + d,
        x7 * fixed(0.298_631_336) + a + c,
    ];

    std::array::from_fn(|at| {
        if at < 4 {
            even[at] + odd[at]
        } else {
            even[7 - at] - odd[7 - at]
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lone_dc_coefficient_is_a_flat_block() {
        let mut coefficients = [0; 64];
        coefficients[0] = 20;
        // 20·4/8 + 128
        assert_eq!(inverse(&coefficients, &[4; 64]), [138; 64]);
    }

    #[test]
    fn the_transform_is_the_cosine_sum_within_rounding() {
        let mut coefficients = [0i16; 64];
        for (at, value) in [(0, -30), (1, 55), (8, -41), (10, 17), (35, -23), (63, 12)] {
            coefficients[at] = value;
        }
        let samples = inverse(&coefficients, &[1; 64]);
        for y in 0..8 {
            for x in 0..8 {
                let mut sum = 0.0f64;
                for v in 0..8 {
                    for u in 0..8 {
                        let scale = |k: usize| if k == 0 { 0.5f64.sqrt() } else { 1.0 };
                        let wave = |k: usize, at: usize| {
                            ((2 * at + 1) as f64 * k as f64 * std::f64::consts::PI / 16.0).cos()
                        };
                        sum += scale(u)
                            * scale(v)
                            * f64::from(coefficients[8 * v + u])
                            * wave(u, x)
                            * wave(v, y);
                    }
                }
                let expected = sum / 4.0 + 128.0;
                let found = f64::from(samples[8 * y + x]);
                assert!(
                    (found - expected).abs() < 0.6,
                    "{x},{y}: {found} {expected}"
                );
            }
        }
    }

    #[test]
    fn zigzag_visits_every_coefficient_once() {
        let mut seen = ZIGZAG;
        seen.sort_unstable();
        assert!(seen.into_iter().eq(0..64));
    }
}
