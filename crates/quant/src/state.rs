//! An optimiser's moments as named arrays, for checkpoints.
//!
//! Tensor `p` gives `p.first` and `p.second` in `f32`, or codes under these names in `u8` and scales under
//! `p.first.absmax` and `p.second.absmax`. The bits survive the round trip, so a restored run continues exactly.

use std::collections::BTreeMap;

use crate::adamw::Moments;
use crate::{Blockwise, Optimizer, QuantError};

/// The elements of a saved array.
#[derive(Clone, Debug, PartialEq)]
pub enum StateValues {
    /// Moments, or scales of codes.
    F32(Vec<f32>),
    /// Codes.
    U8(Vec<u8>),
}

impl StateValues {
    fn type_name(&self) -> &'static str {
        match self {
            Self::F32(_) => "f32",
            Self::U8(_) => "u8",
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::U8(values) => values.len(),
        }
    }
}

/// One saved array.
#[derive(Clone, Debug, PartialEq)]
pub struct StatePart {
    /// The parameter's name with the array's role.
    pub name: String,
    /// The elements.
    pub values: StateValues,
}

impl Optimizer {
    /// All moments, tensor by tensor. The number of steps ([`Optimizer::num_steps`]) has to be saved besides.
    pub fn export(&self) -> Vec<StatePart> {
        let mut parts = Vec::new();
        for slot in &self.slots {
            let mut push = |role: &str, values| {
                parts.push(StatePart {
                    name: format!("{}.{role}", slot.name),
                    values,
                })
            };
            match &slot.moments {
                Moments::Full { first, second } => {
                    push("first", StateValues::F32(first.clone()));
                    push("second", StateValues::F32(second.clone()));
                }
                Moments::Blockwise { first, second } => {
                    push("first", StateValues::U8(first.codes().to_vec()));
                    push("first.absmax", StateValues::F32(first.absmax().to_vec()));
                    push("second", StateValues::U8(second.codes().to_vec()));
                    push("second.absmax", StateValues::F32(second.absmax().to_vec()));
                }
            }
        }
        parts
    }

    /// Takes over saved moments and their number of steps. On an error the optimiser is unchanged.
    ///
    /// # Errors
    ///
    /// If an array is missing, left over, of another type or of another length than this optimiser's tensors ask for.
    pub fn import(&mut self, num_steps: u64, parts: Vec<StatePart>) -> Result<(), QuantError> {
        let mut parts: BTreeMap<String, StateValues> = parts
            .into_iter()
            .map(|part| (part.name, part.values))
            .collect();
        let mut slots = self.slots.clone();
        for slot in &mut slots {
            let name = &slot.name;
            slot.moments = match &slot.moments {
                Moments::Full { .. } => Moments::Full {
                    first: take_f32(&mut parts, format!("{name}.first"), slot.len)?,
                    second: take_f32(&mut parts, format!("{name}.second"), slot.len)?,
                },
                Moments::Blockwise { first, .. } => {
                    let num_blocks = first.absmax().len();
                    let mut take = |role: &str| {
                        Blockwise::from_parts(
                            take_u8(&mut parts, format!("{name}.{role}"), slot.len)?,
                            take_f32(&mut parts, format!("{name}.{role}.absmax"), num_blocks)?,
                        )
                    };
                    Moments::Blockwise {
                        first: take("first")?,
                        second: take("second")?,
                    }
                }
            };
        }
        if let Some((part, _)) = parts.pop_first() {
            return Err(QuantError::UnknownPart { part });
        }
        self.slots = slots;
        self.num_steps = num_steps;
        Ok(())
    }
}

fn take(
    parts: &mut BTreeMap<String, StateValues>,
    part: &str,
    expected: usize,
) -> Result<StateValues, QuantError> {
    let values = parts.remove(part).ok_or_else(|| QuantError::MissingPart {
        part: part.to_owned(),
    })?;
    if values.len() != expected {
        return Err(QuantError::Length {
            part: part.to_owned(),
            expected,
            found: values.len(),
        });
    }
    Ok(values)
}

fn take_f32(
    parts: &mut BTreeMap<String, StateValues>,
    part: String,
    len: usize,
) -> Result<Vec<f32>, QuantError> {
    match take(parts, &part, len)? {
        StateValues::F32(values) => Ok(values),
        other => Err(QuantError::PartType {
            part,
            expected: "f32",
            found: other.type_name(),
        }),
    }
}

fn take_u8(
    parts: &mut BTreeMap<String, StateValues>,
    part: String,
    len: usize,
) -> Result<Vec<u8>, QuantError> {
    match take(parts, &part, len)? {
        StateValues::U8(values) => Ok(values),
        other => Err(QuantError::PartType {
            part,
            expected: "u8",
            found: other.type_name(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AdamWConfig, OptimizerKind};

    const CONFIG: AdamWConfig = AdamWConfig {
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.1,
    };

    fn fresh() -> Optimizer {
        let sizes = [("a".to_owned(), 300), ("b".to_owned(), 7)];
        Optimizer::new(
            OptimizerKind::AdamW8bit { min_8bit_size: 100 },
            CONFIG,
            &sizes,
        )
    }

    fn gradients(step: u16) -> Vec<Vec<f32>> {
        let gradient = |len: u16| {
            (0..len)
                .map(|i| (f32::from(i * 7 + step * 13) * 0.37).sin() * 0.01)
                .collect()
        };
        vec![gradient(300), gradient(7)]
    }

    #[test]
    fn a_restored_optimiser_continues_to_the_same_bits() {
        let mut straight = (fresh(), vec![vec![0.3; 300], vec![-0.2; 7]]);
        for step in 0..6 {
            straight.0.step(1e-2, &mut straight.1, &gradients(step));
        }
        let mut broken = (fresh(), vec![vec![0.3; 300], vec![-0.2; 7]]);
        for step in 0..6 {
            let mut restored = fresh();
            restored
                .import(broken.0.num_steps(), broken.0.export())
                .expect("own export");
            broken.0 = restored;
            broken.0.step(1e-2, &mut broken.1, &gradients(step));
        }
        assert_eq!(broken, straight);
    }

    #[test]
    fn a_state_of_other_tensors_is_refused_and_changes_nothing() {
        let mut optimizer = fresh();
        let mut parts = optimizer.export();
        parts.retain(|part| part.name != "b.second");
        let error = optimizer.import(3, parts).expect_err("an array is missing");
        assert!(error.to_string().contains("lacks `b.second`"), "{error}");
        let mut parts = optimizer.export();
        parts[0].values = StateValues::F32(vec![0.0; 300]);
        let error = optimizer.import(3, parts).expect_err("codes are u8");
        assert_eq!(error.to_string(), "`a.first` holds f32, expected u8");
        assert_eq!(optimizer, fresh());
    }

    #[test]
    fn left_over_arrays_are_refused() {
        let mut parts = fresh().export();
        parts.push(StatePart {
            name: "c.first".to_owned(),
            values: StateValues::F32(vec![]),
        });
        let error = fresh().import(0, parts).expect_err("no tensor c");
        assert!(matches!(error, QuantError::UnknownPart { part } if part == "c.first"));
    }
}
