//! Runs on a tiny random model with hand-made artifacts: determinism, continuing, and every refusal.

mod continuing;
mod pairs;
mod refusals;
pub mod support;
