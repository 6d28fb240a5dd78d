//! What can end an engine's work in its middle: a card that fails, or has no memory left.

use engine_cuda::CudaError;
use engine_cuda::model::ModelError;
use pipeline::{FailureKind, StageError};
use quant::QuantError;

/// Why an engine cannot go on with what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A call on the card failed; the card or its memory is not to be relied on any more.
    #[error("the engine `cuda` cannot go on")]
    Card(#[from] CudaError),
}

impl StageError for RunError {
    fn kind(&self) -> FailureKind {
        let Self::Card(error) = self;
        kind_of(error)
    }

    fn help(&self) -> Option<String> {
        let Self::Card(error) = self;
        Some(match error {
            CudaError::Model(error) => return advice(error),
            CudaError::OutOfMemory { .. } => {
                "the card has less free memory than when the run began: end what else uses it (nvidia-smi lists it), or \
                 ask for less at once"
                    .to_owned()
            }
            CudaError::Driver { .. } | CudaError::Product { .. } => {
                "the card or its driver failed: nvidia-smi and the system's log (lines with `Xid`) say more; a kernel that \
                 fails is reported by the next call that waits for it"
                    .to_owned()
            }
            _ => return None,
        })
    }
}

/// What to do about a network or a batch that the engine `cuda` refuses.
pub(crate) fn advice(error: &ModelError) -> Option<String> {
    Some(match error {
        ModelError::Unsupported { .. } => "--engine portable does it, slowly".to_owned(),
        ModelError::Batch { .. } => {
            "smaller pictures, fewer T5 tokens or a smaller micro-batch".to_owned()
        }
        ModelError::NotFinite { .. } => "the base's file is damaged: fetch it again".to_owned(),
        _ => return None,
    })
}

/// Whether a card's error is the input's fault.
pub(crate) fn kind_of(error: &CudaError) -> FailureKind {
    match error {
        CudaError::OutOfMemory { .. }
        | CudaError::Driver { .. }
        | CudaError::Compile { .. }
        | CudaError::Product { .. } => FailureKind::Failed,
        _ => FailureKind::BadInput,
    }
}

/// Why a saved state was not taken over.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// It is of another LoRA or optimiser.
    #[error(transparent)]
    State(#[from] QuantError),
    /// It may well be right, but the engine cannot go on.
    #[error(transparent)]
    Run(#[from] RunError),
}

impl From<CudaError> for ImportError {
    fn from(error: CudaError) -> Self {
        Self::Run(error.into())
    }
}
