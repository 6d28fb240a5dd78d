//! The cases: each calls the crates that it is about with a case's inputs, and hands over what they give.
//!
//! No formula of the pipeline is written here a second time. Where a case needs several crates one after another
//! (training, sampling), it goes through the stage's own functions.

mod autoencoder;
mod images;
mod quantisation;
mod sampling;
mod schedules;
mod text;
mod training;
mod transformer;

use crate::checker::{CaseError, CaseRun};

pub(crate) use training::trained;
pub(crate) use transformer::velocity;

/// A name that none of the cases has.
#[derive(Debug, thiserror::Error)]
#[error("case `{name}` is unknown to this program, so nothing was compared")]
struct UnknownCase {
    name: String,
}

/// Whether a case is one of the transformer at work in its engine: velocities, gradients, trajectories.
pub(crate) fn is_of_the_transformer(name: &str) -> bool {
    ["transformer_", "train_micro_", "sample_"]
        .iter()
        .any(|prefix| name.starts_with(prefix))
}

/// Runs the case that `run` belongs to.
pub(crate) fn run(run: &mut CaseRun) -> Result<(), CaseError> {
    match run.name() {
        "tokenize" => text::tokenize(run),
        "clip_text" => text::clip(run),
        name if name.starts_with("t5_encode_") => text::t5(run),
        "vae_debug" => autoencoder::blocks(run),
        name if name.starts_with("vae_") => autoencoder::round_trip(run),
        "image_processor" => autoencoder::image_processor(run),
        "pack_rope" => transformer::pack_rope(run),
        "time_embed" => transformer::time_embed(run),
        name if name.starts_with("transformer_") => transformer::forward(run),
        "schedule" => schedules::schedule(run),
        "euler_step" => schedules::euler(run),
        "train_density" => schedules::density(run),
        name if name.starts_with("sample_") => sampling::sample(run),
        name if name.starts_with("train_micro_") => training::micro(run),
        name if name.starts_with("train_opt_") => training::optimise(run),
        "nf4" => quantisation::nf4(run),
        "adamw8bit" => quantisation::adamw8bit(run),
        "image_compat" => images::compat(run),
        name => Err(UnknownCase {
            name: name.to_owned(),
        }
        .into()),
    }
}
