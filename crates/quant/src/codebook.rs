//! Tables of values that codes stand for, and the search for the entry nearest to a value.
//!
//! The dynamic 8-bit map covers [-1, 1] (or [0, 1]) with seven decades: decade `10^(i-6)` for `i = 0…6` is cut into
//! `2^i` (signed; mirrored) or `2^(i+1)` (unsigned) equal parts between a tenth of it and all of it, and the middle of
//! each part is a value. 0 and 1 are added.
//!
//! Source: `create_dynamic_map`, bitsandbytes 0.50.2, on `torch.linspace` of a CPU with fused multiply-add.

use std::sync::LazyLock;

const DECADES: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];

static SIGNED: LazyLock<Codebook> = LazyLock::new(|| Codebook::from_sorted(dynamic_map(true)));
static UNSIGNED: LazyLock<Codebook> = LazyLock::new(|| Codebook::from_sorted(dynamic_map(false)));

/// A sorted table of values and the midpoints between them.
#[derive(Clone, Debug, PartialEq)]
pub struct Codebook {
    values: Vec<f32>,
    midpoints: Vec<f32>,
}

impl Codebook {
    /// A table of 2 to 256 values.
    ///
    /// # Panics
    ///
    /// If `values` has another length or is not in strictly ascending order.
    pub fn from_sorted(values: Vec<f32>) -> Self {
        assert!(
            (2..=256).contains(&values.len()),
            "a codebook has 2 to 256 values, got {}",
            values.len()
        );
        assert!(
            values.windows(2).all(|pair| pair[0] < pair[1]),
            "codebook values must ascend"
        );
        let midpoints = values
            .windows(2)
            .map(|pair| (pair[0] + pair[1]) / 2.0)
            .collect();
        Self { values, midpoints }
    }

    /// The signed dynamic 8-bit map: first moments, and scales of doubly quantised weights.
    pub fn signed_dynamic() -> &'static Self {
        &SIGNED
    }

    /// The unsigned dynamic 8-bit map: second moments.
    pub fn unsigned_dynamic() -> &'static Self {
        &UNSIGNED
    }

    /// The values, ascending.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The value that a code stands for.
    ///
    /// # Panics
    ///
    /// If `code` is past the table's end.
    pub fn value(&self, code: u8) -> f32 {
        self.values[usize::from(code)]
    }

    /// The code nearest to `value`: the number of midpoints that `value` is strictly greater than.
    pub fn nearest(&self, value: f32) -> u8 {
        u8::try_from(self.midpoints.partition_point(|midpoint| *midpoint < value))
            .expect("at most 255 midpoints")
    }
}

/// `count` values from 0.1 to 1, each half counted from its own end, as torch does it.
fn tenth_to_one(count: u16) -> Vec<f32> {
    let (start, end) = (0.1f32, 1.0f32);
    let step = (end - start) / f32::from(count - 1);
    (0..count)
        .map(|i| {
            if i < count / 2 {
                step.mul_add(f32::from(i), start)
            } else {
                (-step).mul_add(f32::from(count - i - 1), end)
            }
        })
        .collect()
}

fn dynamic_map(signed: bool) -> Vec<f32> {
    let mut values = vec![0.0, 1.0];
    for (i, decade) in DECADES.iter().enumerate() {
        let parts = 1u16 << if signed { i } else { i + 1 };
        let bounds = tenth_to_one(parts + 1);
        for pair in bounds.windows(2) {
            let middle = decade * ((pair[0] + pair[1]) / 2.0);
            values.push(middle);
            if signed {
                values.push(-middle);
            }
        }
    }
    values.sort_by(f32::total_cmp);
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_dynamic_maps_have_256_values() {
        assert_eq!(Codebook::signed_dynamic().values().len(), 256);
        assert_eq!(Codebook::unsigned_dynamic().values().len(), 256);
    }

    #[test]
    fn zero_is_code_127_when_signed_and_code_0_when_unsigned() {
        assert_eq!(Codebook::signed_dynamic().nearest(0.0), 127);
        assert_eq!(Codebook::signed_dynamic().value(127), 0.0);
        assert_eq!(Codebook::unsigned_dynamic().nearest(0.0), 0);
        assert_eq!(Codebook::unsigned_dynamic().value(0), 0.0);
    }

    #[test]
    fn the_maps_equal_bitsandbytes_to_the_last_bit() {
        // FNV-1a over the little-endian bytes of `create_dynamic_map(signed)`, bitsandbytes 0.50.2.
        let digest = |book: &Codebook| {
            let bytes = book.values().iter().flat_map(|value| value.to_le_bytes());
            bytes.fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
            })
        };
        assert_eq!(digest(Codebook::signed_dynamic()), 0xd677_f22a_9666_5bc4);
        assert_eq!(digest(Codebook::unsigned_dynamic()), 0x4381_1b16_730a_873e);
    }

    #[test]
    fn a_value_on_a_midpoint_takes_the_lower_code() {
        let book = Codebook::from_sorted(vec![-1.0, 0.0, 1.0]);
        assert_eq!(book.nearest(0.5), 1);
        assert_eq!(book.nearest(0.5f32.next_up()), 2);
        assert_eq!(book.nearest(-0.5), 0);
        assert_eq!(book.nearest(9.0), 2);
    }
}
