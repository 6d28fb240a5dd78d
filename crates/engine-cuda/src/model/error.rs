//! Why a model cannot be made as asked.

use artifacts::ArtifactError;

/// A configuration, checkpoint or adapter that the engine cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Widths that the kernels are not written for.
    #[error("the engine `cuda` needs {what} to be {expected}; here it is {found}")]
    Unsupported {
        /// Which size.
        what: &'static str,
        /// What it may be.
        expected: &'static str,
        /// What it is.
        found: usize,
    },
    /// A batch that the kernels cannot count or the network not be given.
    #[error("a batch needs {what} to be {expected}, and {found} are wanted")]
    Batch {
        /// Which count.
        what: &'static str,
        /// What it may be.
        expected: &'static str,
        /// What it is.
        found: usize,
    },
    /// The checkpoint cannot be read or is of another model.
    #[error(transparent)]
    Checkpoint(#[from] ArtifactError),
    /// A weight holds a number that is not finite.
    #[error(
        "the weight of `{path}` holds {count} numbers that are not finite, and cannot be quantised"
    )]
    NotFinite {
        /// The layer.
        path: String,
        /// How many.
        count: u32,
    },
    /// A LoRA changes a layer that the model does not have.
    #[error("the LoRA changes `{path}`, and the transformer has no such linear layer")]
    NoSuchLayer {
        /// The path.
        path: String,
    },
    /// LoRA factors are of another size than their layer.
    #[error(
        "the LoRA's factors for `{path}` have {a} and {b} numbers at rank {rank}; the layer has {in_features} inputs and {out_features} outputs"
    )]
    Misshapen {
        /// The path.
        path: String,
        /// Numbers in A.
        a: usize,
        /// Numbers in B.
        b: usize,
        /// The rank.
        rank: usize,
        /// The layer's inputs.
        in_features: usize,
        /// The layer's outputs.
        out_features: usize,
    },
    /// Saved optimiser state is of another run.
    #[error("the saved state has {found} for `{part}`, expected {expected}")]
    State {
        /// Which part.
        part: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
}
