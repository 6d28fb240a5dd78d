//! What can be wrong with data that came from outside.

use thiserror::Error;

/// A weight or a saved optimiser state that cannot be used.
#[derive(Debug, Error)]
pub enum QuantError {
    /// A weight is infinite or not a number, so its block has no scale.
    #[error("value {index} is {value}, and only finite values can be quantised")]
    NotFinite {
        /// Position in the flattened tensor.
        index: usize,
        /// The value found.
        value: f32,
    },
    /// An array does not have the length that the element count asks for.
    #[error("`{part}` has {found} elements, expected {expected}")]
    Length {
        /// Which array.
        part: String,
        /// Length that fits the element count.
        expected: usize,
        /// Length found.
        found: usize,
    },
    /// A saved optimiser state lacks an array.
    #[error(
        "the optimiser state lacks `{part}`; it belongs to another set of parameters or another optimiser"
    )]
    MissingPart {
        /// Which array.
        part: String,
    },
    /// A saved optimiser state has an array that no parameter asks for.
    #[error(
        "the optimiser state has `{part}`, which no parameter asks for; it belongs to another set of parameters or another optimiser"
    )]
    UnknownPart {
        /// Which array.
        part: String,
    },
    /// A saved array has the wrong element type.
    #[error("`{part}` holds {found}, expected {expected}")]
    PartType {
        /// Which array.
        part: String,
        /// Element type expected.
        expected: &'static str,
        /// Element type found.
        found: &'static str,
    },
}
