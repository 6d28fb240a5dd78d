//! How fast the transformer is, beside the same model in PyTorch, in the same run on the same cores.
//!
//! * [`cpu`]: a training step and a sampling step of the base `small`. * [`peer`]: PyTorch's side of it.
//! * [`flux`]: FLUX.1-dev's shapes on an NVIDIA card. * [`training_run`]: a whole run there.
#![forbid(unsafe_code)]

pub mod cpu;
pub mod flux;
pub mod peer;
pub mod training_run;

pub use cpu::{CpuBench, run};
pub use flux::FluxBench;

use console::print_document;
use pipeline::{Failure, StageError};
use serde_json::{Value, json};

/// Prints what was measured, or tells it where no JSON is wanted, or says why there is nothing; gives the exit code.
fn finish<E: StageError>(outcome: Result<Value, E>, json: bool, tell: impl FnOnce(&Value)) -> u8 {
    match outcome {
        Ok(document) => {
            if json {
                print_document(&document);
            } else {
                tell(&document);
            }
            0
        }
        Err(error) => {
            let failure = Failure::from(error);
            if json {
                print_document(&json!({ "error": failure.to_json() }));
            }
            console::tell(&failure);
            failure.kind().exit_code()
        }
    }
}
