//! How far two tensors are apart, and when that is close enough.
//!
//! A tensor of another length or shape, a value that is not finite on either side, and a reference of zeros that is
//! not met by zeros all count as infinitely far: no such thing passes under any tolerance.

/// The values of a tensor, row-major, in one of the types that fixtures hold.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// Floats; half-precision tensors are widened, which is exact.
    F32(Vec<f32>),
    /// Token ids and timestep indices.
    I32(Vec<i32>),
    /// Pixels and codes.
    U8(Vec<u8>),
}

impl Values {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::I32(v) => v.len(),
            Self::U8(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::F32(_) => "f32",
            Self::I32(_) => "i32",
            Self::U8(_) => "u8",
        }
    }

    fn to_f64(&self) -> Vec<f64> {
        match self {
            Self::F32(v) => v.iter().map(|&x| f64::from(x)).collect(),
            Self::I32(v) => v.iter().map(|&x| f64::from(x)).collect(),
            Self::U8(v) => v.iter().map(|&x| f64::from(x)).collect(),
        }
    }
}

/// What is measured, and the most that passes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Measure {
    /// Norm of the difference over the norm of the reference (Euclidean, in `f64`).
    Relative(f64),
    /// As [`Measure::Relative`], without the values that are furthest off.
    Bulk {
        /// Most that the rest may be off.
        limit: f64,
        /// Largest share of values that is left out; at least one value is.
        share: f64,
    },
    /// The number of values that differ must be zero. `-0` equals `0`.
    Exact,
    /// 8-bit values: no value may be further off than one step, and no more than this share of them at all.
    OneStep {
        /// Largest share of values that may be off by one.
        share: f64,
    },
    /// Not compared; the table says why.
    Skipped,
}

impl Measure {
    /// The limit as one number in the unit of [`Measure::unit`].
    pub fn limit(self) -> f64 {
        match self {
            Self::Relative(limit) | Self::Bulk { limit, .. } => limit,
            Self::Exact => 0.0,
            Self::OneStep { .. } => 1.0,
            Self::Skipped => f64::INFINITY,
        }
    }

    /// What the error is counted in.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Relative(_) => "relative",
            Self::Bulk { .. } => "bulk",
            Self::Exact => "values",
            Self::OneStep { .. } => "of 255",
            Self::Skipped => "",
        }
    }
}

/// Outcome of one comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Distance {
    /// The error in the measure's unit; infinite where the tensors cannot be compared.
    pub error: f64,
    /// The part of what is allowed that is used up; above 1 where it does not pass.
    pub used: f64,
    /// Whether it is within the measure.
    pub passed: bool,
    /// What a person should know beyond the number.
    pub note: Option<String>,
}

impl Distance {
    fn hopeless(note: String) -> Self {
        Self {
            error: f64::INFINITY,
            used: f64::INFINITY,
            passed: false,
            note: Some(note),
        }
    }
}

/// Compares `found` with `expected` under `measure`.
pub fn distance(
    measure: Measure,
    expected: (&Values, &[usize]),
    found: (&Values, &[usize]),
) -> Distance {
    let ((expected, expected_shape), (found, found_shape)) = (expected, found);
    if found.kind() != expected.kind() {
        let (e, f) = (expected.kind(), found.kind());
        return Distance::hopeless(format!("expected {e}, found {f}"));
    }
    let num_values = expected_shape.iter().product::<usize>();
    if found_shape != expected_shape || found.len() != num_values || expected.len() != num_values {
        return Distance::hopeless(format!(
            "expected shape {expected_shape:?}, found {found_shape:?} ({} values)",
            found.len()
        ));
    }
    let (expected, found) = (expected.to_f64(), found.to_f64());
    for (side, values) in [("reference", &expected), ("our value", &found)] {
        if let Some(at) = values.iter().position(|x| !x.is_finite()) {
            return Distance::hopeless(format!("{side} {at} is {}", values[at]));
        }
    }
    let differing = || expected.iter().zip(&found).filter(|(e, f)| e != f).count();
    let largest = || {
        let steps = expected.iter().zip(&found).map(|(e, f)| (e - f).abs());
        steps.fold(0.0, f64::max)
    };
    match measure {
        Measure::Skipped => Distance {
            error: 0.0,
            used: 0.0,
            passed: true,
            note: None,
        },
        Measure::Relative(limit) => {
            let error = relative(&expected, &found);
            let note = error
                .is_infinite()
                .then(|| "the reference is zero throughout, and ours is not".to_owned());
            Distance {
                error,
                used: if error == 0.0 { 0.0 } else { error / limit },
                passed: error <= limit,
                note,
            }
        }
        Measure::Bulk { limit, share } => {
            let num_left_out = ((num_values as f64 * share).ceil() as usize).min(num_values);
            let whole = relative(&expected, &found);
            let (expected, found) = without_worst(&expected, &found, num_left_out);
            let error = relative(&expected, &found);
            Distance {
                error,
                used: if error == 0.0 { 0.0 } else { error / limit },
                passed: error <= limit,
                note: Some(format!("{whole:.1e} with the worst {num_left_out} values")),
            }
        }
        Measure::Exact => {
            let count = differing();
            let first = expected.iter().zip(&found).position(|(e, f)| e != f);
            Distance {
                error: count as f64,
                used: count as f64,
                passed: count == 0,
                note: first.map(|i| {
                    let (e, f) = (expected[i], found[i]);
                    format!("first at {i}: expected {e}, found {f}")
                }),
            }
        }
        Measure::OneStep { share } => {
            let (steps, part) = (largest(), differing() as f64 / num_values.max(1) as f64);
            let passed = steps <= 1.0 && part <= share;
            // One step is what rounding ties leave: no measure of how near another bound is.
            Distance {
                error: steps,
                used: if passed { 0.0 } else { steps.max(part / share) },
                passed,
                note: (part > 0.0).then(|| format!("{part:.1e} of the values differ")),
            }
        }
    }
}

/// Both sides without the `count` values that are furthest apart.
fn without_worst(expected: &[f64], found: &[f64], count: usize) -> (Vec<f64>, Vec<f64>) {
    let mut pairs: Vec<(f64, f64)> = expected
        .iter()
        .copied()
        .zip(found.iter().copied())
        .collect();
    pairs.sort_by(|(e, f), (g, h)| (g - h).abs().total_cmp(&(e - f).abs()));
    pairs.into_iter().skip(count).unzip()
}

/// ‖found − expected‖ / ‖expected‖; against a reference of zeros: 0 for zeros, else infinite.
fn relative(expected: &[f64], found: &[f64]) -> f64 {
    // Scaled by the largest magnitude, so that the squares of values around 1e-30 do not vanish.
    let scale = expected.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
    let difference = expected
        .iter()
        .zip(found)
        .fold(0.0_f64, |m, (e, f)| m.max((e - f).abs()));
    if difference == 0.0 {
        return 0.0;
    }
    if scale == 0.0 {
        return f64::INFINITY;
    }
    let norm = |values: &mut dyn Iterator<Item = f64>| {
        values.map(|x| (x / scale).powi(2)).sum::<f64>().sqrt()
    };
    let above = norm(&mut expected.iter().zip(found).map(|(e, f)| e - f));
    above / norm(&mut expected.iter().copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floats(measure: Measure, expected: &[f32], found: &[f32]) -> Distance {
        distance(
            measure,
            (&Values::F32(expected.to_vec()), &[expected.len()]),
            (&Values::F32(found.to_vec()), &[found.len()]),
        )
    }

    fn pixels(measure: Measure, expected: &[u8], found: &[u8]) -> Distance {
        distance(
            measure,
            (&Values::U8(expected.to_vec()), &[expected.len()]),
            (&Values::U8(found.to_vec()), &[found.len()]),
        )
    }

    #[test]
    fn relative_error_is_norm_over_norm() {
        let d = floats(Measure::Relative(0.6), &[3.0, 4.0], &[3.0, 1.0]);
        assert!((d.error - 0.6).abs() < 1e-12 && d.passed, "{d:?}");
        assert!(!floats(Measure::Relative(0.59), &[3.0, 4.0], &[3.0, 1.0]).passed);
    }

    #[test]
    fn relative_error_of_tiny_values_does_not_underflow() {
        let d = floats(Measure::Relative(1.0), &[3e-38, 4e-38], &[3e-38, 1e-38]);
        assert!((d.error - 0.6).abs() < 1e-6, "{d:?}");
    }

    #[test]
    fn a_zero_reference_is_met_by_zeros_only() {
        let measure = Measure::Relative(1e9);
        assert!(floats(measure, &[0.0, 0.0], &[0.0, -0.0]).passed);
        let d = floats(measure, &[0.0, 0.0], &[0.0, 1e-30]);
        assert!(!d.passed && d.error.is_infinite(), "{d:?}");
    }

    #[test]
    fn a_nan_never_passes() {
        for measure in [Measure::Relative(f64::INFINITY), Measure::Exact] {
            assert!(!floats(measure, &[1.0], &[f32::NAN]).passed);
            assert!(!floats(measure, &[f32::NAN], &[f32::NAN]).passed);
            assert!(!floats(measure, &[f32::INFINITY], &[f32::INFINITY]).passed);
        }
    }

    #[test]
    fn another_shape_never_passes_even_with_the_same_values() {
        let values = Values::F32(vec![1.0; 6]);
        let d = distance(
            Measure::Relative(f64::INFINITY),
            (&values, &[2, 3]),
            (&values, &[3, 2]),
        );
        assert!(!d.passed, "{d:?}");
    }

    #[test]
    fn another_type_never_passes() {
        let d = distance(
            Measure::Exact,
            (&Values::U8(vec![1]), &[1]),
            (&Values::F32(vec![1.0]), &[1]),
        );
        assert!(!d.passed, "{d:?}");
    }

    #[test]
    fn pixels_may_be_one_off_but_few_of_them() {
        let few = Measure::OneStep { share: 0.25 };
        assert!(pixels(few, &[10, 20, 30, 40], &[10, 21, 30, 40]).passed);
        assert!(!pixels(few, &[10, 20, 30, 40], &[10, 22, 30, 40]).passed);
        assert!(!pixels(few, &[10, 20, 30, 40], &[11, 21, 31, 41]).passed);
    }

    #[test]
    fn exact_counts_what_differs_and_shows_the_first() {
        let d = pixels(Measure::Exact, &[1, 2, 3], &[1, 9, 9]);
        assert_eq!((d.error, d.passed), (2.0, false));
        let note = d.note.expect("it says where");
        assert!(note.contains("first at 1: expected 2, found 9"), "{note}");
    }

    #[test]
    fn the_bulk_forgives_single_values_and_nothing_more() {
        let measure = Measure::Bulk {
            limit: 1e-6,
            share: 0.3,
        };
        let expected = [1.0, 2.0, 3.0, 4.0];
        assert!(floats(measure, &expected, &[1.0, 9.0, 3.0, -4.0]).passed);
        assert!(!floats(measure, &expected, &[1.1, 9.0, 3.0, -4.0]).passed);
        assert!(!floats(measure, &expected, &[1.0, f32::NAN, 3.0, 4.0]).passed);
    }

    #[test]
    fn an_empty_tensor_equals_an_empty_tensor() {
        assert!(floats(Measure::Relative(0.0), &[], &[]).passed);
    }
}
