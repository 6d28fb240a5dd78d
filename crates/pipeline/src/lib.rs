//! What the stages are, what each reads and writes, and whether its output is still good.
//!
//! A **recipe** ([`Recipe`]) says everything that decides a result. A **stage** ([`Stage`]) turns artifacts of earlier
//! stages into one of its own, in `runs/<stage>/<fingerprint>/`. A **task** ([`Task`]) is a stage at work on the
//! training pictures or on those held out. The **fingerprint** is the BLAKE3 of its components:
//! the recipe's fields, the digests of the weights that the stage uses, and the logical digests of its inputs; paths,
//! times, device, threads and batch size stay out. A `manifest.json`, written last, **seals** the directory; one
//! without it is an interrupted run and is never read. [`Pipeline::state`] compares what a run would have as
//! components with what the newest sealed run had, and says `Fresh`, or `Dirty` and why.
//!
//! A stage crate has one entry, `run(&StageContext) -> Result<StageReport, XError>` where `XError: StageError`. It
//! writes only below [`StageContext::dir`] and never writes the seal: [`StageRun`] does, after checking that every
//! promised output is there.
//!
//! Nothing here knows Burn, Parquet or safetensors: `cargo xtask` links this crate and must stay light.

#![forbid(unsafe_code)]

mod clock;
mod context;
mod digest_cache;
mod error;
mod failure;
mod fingerprint;
mod lock;
mod manifest;
mod pipeline;
pub mod recipe;
mod run;
mod source;
mod stage;
mod state;
mod task;

pub use clock::{file_timestamp, utc_timestamp};
pub use context::{RunOptions, StageContext, StageReport};
pub use digest_cache::DigestCache;
pub use error::PipelineError;
pub use failure::{Failure, FailureKind, StageError};
pub use fingerprint::Fingerprint;
pub use lock::FileLock;
pub use manifest::{Artifact, MANIFEST_FILE, Manifest, earlier_artifacts};
pub use pipeline::Pipeline;
pub use recipe::{Override, Recipe};
pub use run::{Begin, StageLock, StageRun, run_stage};
pub use source::{SourceFile, list_source};
pub use stage::{Stage, WeightPart, files, outputs};
pub use state::{DirtyReason, StageState};
pub use task::{DataSet, Task};
