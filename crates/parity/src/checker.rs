//! One case while it runs: its inputs, and the comparisons made so far.
//!
//! A case says what it computed ([`CaseRun::output`]); the tolerance comes from the table in
//! [`crate::tolerances`], never from the case. When it ends, every tensor that the case's file holds or `cases.json`
//! announces must have been compared, so that a forgotten output is a failure and not a silence.

use std::collections::BTreeSet;

use artifacts::{Dtype, SafetensorsFile};
use engine::EngineName;
use engine_cuda::model::Accuracy;
use mmdit::MmditConfig;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tensor::{Device, Precision, Tensor};

use crate::compare::{Distance, Measure, Values, distance};
use crate::fixture::{Case, FixtureSet};
use crate::tolerances::{self, half_of};

/// Why a case could not be run to its end: an error of whichever crate it went through, for a person to read.
pub type CaseError = Box<dyn std::error::Error + Send + Sync>;

/// What can be wrong with a case's own file.
#[derive(Debug, thiserror::Error)]
enum CaseFileError {
    #[error("{file}: tensor `{name}` is {found:?}, which this case cannot use")]
    Dtype {
        file: String,
        name: String,
        found: Dtype,
    },
    #[error("{file}: tensor `{name}` has shape {found:?}, expected {expected} axes")]
    Axes {
        file: String,
        name: String,
        found: Vec<usize>,
        expected: usize,
    },
    #[error("the params of case `{case}` in cases.json are not as expected")]
    Params {
        case: String,
        source: serde_json::Error,
    },
}

/// The outcome for one tensor.
#[derive(Clone, Debug, Serialize)]
pub struct TensorResult {
    /// Its name, without `out.`.
    pub name: String,
    /// How far ours is from the reference, in `unit`; `null` in JSON where they cannot be compared.
    pub error: f64,
    /// The most that passes.
    pub tolerance: f64,
    /// What the error is counted in: `relative`, `bulk` (relative, without outliers), `values` (that differ),
    /// `of 255`.
    pub unit: &'static str,
    /// The part of what is allowed that is used up: by this the worst tensor of a case is found.
    pub used: f64,
    /// Whether it is within the tolerance.
    pub ok: bool,
    /// What a person should know beyond the number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

impl TensorResult {
    /// The worst of several: the failure that is furthest off, or what came nearest to its limit.
    pub fn worst(results: &[Self]) -> Option<&Self> {
        // The first of equals, so that the report is the same on every machine.
        results.iter().reduce(|worst, next| {
            let failed = worst.ok.cmp(&next.ok);
            if failed.then(next.used.total_cmp(&worst.used)).is_gt() {
                next
            } else {
                worst
            }
        })
    }
}

/// What executes the transformer, and in what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Execution {
    /// The engine.
    pub engine: EngineName,
    /// What it computes in.
    pub precision: Precision,
}

impl Execution {
    /// `mmdit` in `f32`.
    pub const PORTABLE: Self = Self {
        engine: EngineName::Portable,
        precision: Precision::F32,
    };

    /// Its 16-bit float, if it computes in one.
    pub fn in_half(self) -> bool {
        half_of(self.precision).is_some()
    }
}

/// A case that is being run.
pub struct CaseRun<'a> {
    /// The set it belongs to: model, LoRA files, tokenizers.
    pub set: &'a FixtureSet,
    /// What executes the transformer.
    pub execution: Execution,
    /// What it may be off by, if it computes in 16 bits.
    accuracy: Option<Accuracy>,
    case: &'a Case,
    file: SafetensorsFile,
    done: BTreeSet<String>,
    results: Vec<TensorResult>,
}

impl<'a> CaseRun<'a> {
    /// Opens the case's file, to be run with the portable engine.
    ///
    /// # Errors
    ///
    /// If it is not there or damaged.
    pub fn open(set: &'a FixtureSet, case: &'a Case) -> Result<Self, CaseError> {
        Self::open_for(set, case, Execution::PORTABLE)
    }

    /// Opens the case's file.
    ///
    /// # Errors
    ///
    /// If it is not there or damaged.
    pub fn open_for(
        set: &'a FixtureSet,
        case: &'a Case,
        execution: Execution,
    ) -> Result<Self, CaseError> {
        let file = SafetensorsFile::open(&set.dir().join(&case.file))?;
        let accuracy = match half_of(execution.precision) {
            Some(t) => {
                let path = set.model().join("transformer").join("config.json");
                Some(tolerances::accuracy(t, &MmditConfig::from_file(&path)?))
            }
            None => None,
        };
        Ok(Self {
            set,
            execution,
            accuracy,
            case,
            file,
            done: BTreeSet::new(),
            results: Vec::new(),
        })
    }

    /// The case's name.
    pub fn name(&self) -> &'a str {
        &self.case.name
    }

    /// Its `params` of `cases.json`, as far as the case asks for them.
    ///
    /// # Errors
    ///
    /// If a field is missing or of another type.
    pub fn params<P: DeserializeOwned>(&self) -> Result<P, CaseError> {
        let params = serde_json::from_value(self.case.params.clone());
        Ok(params.map_err(|source| CaseFileError::Params {
            case: self.case.name.clone(),
            source,
        })?)
    }

    /// Whether its file holds a tensor of this full name (`in.guidance`).
    pub fn has(&self, name: &str) -> bool {
        self.file.names().any(|n| n == name)
    }

    /// The full names of all tensors in its file that begin with `prefix`.
    pub fn names(&self, prefix: &str) -> Vec<String> {
        let names = self.file.names().filter(|n| n.starts_with(prefix));
        names.map(str::to_owned).collect()
    }

    /// A tensor of its file by full name, in the type it has there (half precision widened).
    ///
    /// # Errors
    ///
    /// If it is not there.
    pub fn values(&self, name: &str) -> Result<(Values, Vec<usize>), CaseError> {
        let info = self.file.info(name)?;
        let values = match info.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => Values::F32(self.file.f32(name)?),
            Dtype::I32 => Values::I32(self.file.i32(name)?),
            Dtype::U8 => Values::U8(self.file.u8(name)?),
            found => {
                return Err(CaseFileError::Dtype {
                    file: self.case.file.clone(),
                    name: name.to_owned(),
                    found,
                }
                .into());
            }
        };
        Ok((values, info.shape.clone()))
    }

    /// A tensor's type in the file.
    ///
    /// # Errors
    ///
    /// If it is not there.
    pub fn dtype(&self, name: &str) -> Result<Dtype, CaseError> {
        Ok(self.file.info(name)?.dtype)
    }

    /// A float tensor of its file by full name: values and shape.
    ///
    /// # Errors
    ///
    /// If it is not there or not of floats.
    pub fn f32(&self, name: &str) -> Result<(Vec<f32>, Vec<usize>), CaseError> {
        match self.values(name)? {
            (Values::F32(values), shape) => Ok((values, shape)),
            _ => Err(self.wrong_dtype(name)),
        }
    }

    /// An `i32` tensor of its file by full name: values and shape.
    ///
    /// # Errors
    ///
    /// If it is not there or not of `i32`.
    pub fn i32(&self, name: &str) -> Result<(Vec<i32>, Vec<usize>), CaseError> {
        match self.values(name)? {
            (Values::I32(values), shape) => Ok((values, shape)),
            _ => Err(self.wrong_dtype(name)),
        }
    }

    /// A `u8` tensor of its file by full name: values and shape.
    ///
    /// # Errors
    ///
    /// If it is not there or not of `u8`.
    pub fn u8(&self, name: &str) -> Result<(Vec<u8>, Vec<usize>), CaseError> {
        match self.values(name)? {
            (Values::U8(values), shape) => Ok((values, shape)),
            _ => Err(self.wrong_dtype(name)),
        }
    }

    /// A float tensor of its file on a device.
    ///
    /// # Errors
    ///
    /// If it is not there, not of floats, or has not `D` axes.
    pub fn tensor<const D: usize>(
        &self,
        name: &str,
        device: &Device,
    ) -> Result<Tensor<D>, CaseError> {
        let (values, shape) = self.f32(name)?;
        let shape = self.axes(name, shape)?;
        Ok(tensor::from_f32(values, shape, device))
    }

    /// A shape with a known number of axes.
    ///
    /// # Errors
    ///
    /// If it has another number.
    pub fn axes<const D: usize>(
        &self,
        name: &str,
        shape: Vec<usize>,
    ) -> Result<[usize; D], CaseError> {
        shape.try_into().map_err(|found| {
            CaseFileError::Axes {
                file: self.case.file.clone(),
                name: name.to_owned(),
                found,
                expected: D,
            }
            .into()
        })
    }

    fn wrong_dtype(&self, name: &str) -> CaseError {
        match self.file.info(name) {
            Ok(info) => CaseFileError::Dtype {
                file: self.case.file.clone(),
                name: name.to_owned(),
                found: info.dtype,
            }
            .into(),
            Err(error) => error.into(),
        }
    }

    /// Compares what we computed for output `name` (without `out.`) with the file.
    pub fn output(&mut self, name: &str, values: Values, shape: &[usize]) {
        self.done.insert(name.to_owned());
        match self.values(&format!("out.{name}")) {
            Ok((expected, expected_shape)) => {
                self.against(name, (&expected, &expected_shape), (&values, shape));
            }
            Err(error) => self.failed(name, error.to_string()),
        }
    }

    /// [`CaseRun::output`] for a tensor.
    pub fn output_tensor<const D: usize>(&mut self, name: &str, found: &Tensor<D>) {
        let values = Values::F32(tensor::to_f32(found));
        self.output(name, values, &found.dims());
    }

    /// [`CaseRun::output`] for floats.
    pub fn output_f32(&mut self, name: &str, values: Vec<f32>, shape: &[usize]) {
        self.output(name, Values::F32(values), shape);
    }

    /// Compares two things of which the file holds neither as an output, under the table's row for `name`.
    pub fn against(
        &mut self,
        name: &str,
        expected: (&Values, &[usize]),
        found: (&Values, &[usize]),
    ) {
        let in_half = self
            .accuracy
            .and_then(|accuracy| tolerances::in_half(accuracy, &self.case.name, name));
        let in_table = || tolerances::find(&self.case.name, name).map(|row| row.measure);
        match in_half.or_else(in_table) {
            Some(measure) => {
                let distance = distance(measure, expected, found);
                self.record(name, measure, distance);
            }
            None => self.failed(name, "no row of the tolerance table covers it".to_owned()),
        }
    }

    /// Has what the engine computes be off by `factor` times as much, where it computes in 16 bits: what a case
    /// multiplies, it multiplies with its rounding.
    pub fn widen(&mut self, factor: f64) {
        if let Some(accuracy) = &mut self.accuracy {
            accuracy.velocity *= factor;
        }
    }

    /// Compares two texts, exactly.
    pub fn text(&mut self, name: &str, expected: &str, found: &str) {
        let differs = f64::from(u8::from(expected != found));
        let distance = Distance {
            error: differs,
            used: differs,
            passed: expected == found,
            note: (expected != found).then(|| format!("expected {expected}, found {found}")),
        };
        self.record(name, Measure::Exact, distance);
    }

    /// Records a failure that is no comparison.
    pub fn failed(&mut self, name: &str, note: String) {
        let distance = Distance {
            error: f64::INFINITY,
            used: f64::INFINITY,
            passed: false,
            note: Some(note),
        };
        self.record(name, Measure::Exact, distance);
    }

    fn record(&mut self, name: &str, measure: Measure, distance: Distance) {
        self.results.push(TensorResult {
            name: name.to_owned(),
            error: distance.error,
            tolerance: measure.limit(),
            unit: measure.unit(),
            used: distance.used,
            ok: distance.passed,
            note: distance.note,
        });
    }

    /// The comparisons of a case that stopped early.
    pub fn results_so_far(self) -> Vec<TensorResult> {
        self.results
    }

    /// Ends the case: outputs that nothing compared become failures, save those that the table skips.
    pub fn finish(mut self) -> Vec<TensorResult> {
        let mut expected = self.set.announced_outputs(self.case);
        let held = self.names("out.");
        expected.extend(held.iter().map(|n| n["out.".len()..].to_owned()));
        let skipped = |name: &str| {
            let row = tolerances::find(&self.case.name, name);
            row.is_some_and(|row| row.measure == Measure::Skipped)
        };
        let forgotten: Vec<String> = expected
            .into_iter()
            .filter(|name| !self.done.contains(name) && !skipped(name))
            .collect();
        for name in forgotten {
            self.failed(&name, "this case computes no such output".to_owned());
        }
        if self.results.is_empty() {
            self.failed("*", "the case compared nothing".to_owned());
        }
        self.results
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(name: &str, error: f64, tolerance: f64) -> TensorResult {
        TensorResult {
            name: name.to_owned(),
            error,
            tolerance,
            unit: "relative",
            used: error / tolerance,
            ok: error <= tolerance,
            note: None,
        }
    }

    #[test]
    fn the_worst_is_what_is_nearest_to_its_own_limit() {
        let results = [result("a", 1e-5, 1e-4), result("b", 9e-7, 1e-6)];
        assert_eq!(
            TensorResult::worst(&results).map(|r| r.name.as_str()),
            Some("b")
        );
    }

    #[test]
    fn a_failure_is_worse_than_anything_that_passes() {
        let results = [result("a", 99.0, 100.0), result("b", 1.5, 1.0)];
        assert_eq!(
            TensorResult::worst(&results).map(|r| r.name.as_str()),
            Some("b")
        );
    }
}
