//! `spritelora pretrain`: a small base from scratch, by a recipe of its own.

use std::time::Duration;

use console::{print_document, print_line};
use engine::plan::card;
use pipeline::Failure;
use pretrain::{Corpus, PretrainRecipe, PretrainReport};
use serde_json::json;
use tensor::Device;

use crate::cli::PretrainOptions;

/// Trains what is left to train; gives the exit code.
pub fn run(options: &PretrainOptions) -> u8 {
    match try_run(options) {
        Ok(report) => {
            if options.json {
                print_document(
                    &json!({ "done": report.is_done, "paused": report.is_paused, "evaluation": report.evaluation }),
                );
            } else {
                let how = if report.is_done {
                    "done"
                } else if report.is_paused {
                    "paused, the same command goes on"
                } else {
                    "the phases that were wanted are done, others are left"
                };
                print_line(&format!("{}: {how}", options.out.display()));
                print_line(&format!("{:#}", report.evaluation));
            }
            0
        }
        Err(failure) => {
            if options.json {
                print_document(&json!({ "error": failure.to_json() }));
            }
            console::tell(&failure);
            failure.kind().exit_code()
        }
    }
}

fn try_run(options: &PretrainOptions) -> Result<PretrainReport, Failure> {
    let recipe = PretrainRecipe::load(&options.recipe)?;
    let device = tensor::device::select(&options.device).map_err(pretrain::PretrainError::from)?;
    let corpus = Corpus::read(&recipe)?;
    let options = pretrain::PretrainOptions {
        out: options.out.clone(),
        work: options.work.clone(),
        hardware: options
            .hardware
            .clone()
            .unwrap_or_else(|| hardware_of(&device)),
        device,
        max_time: options.max_seconds.map(Duration::from_secs),
        phases: options.only.iter().map(|&phase| phase.into()).collect(),
    };
    Ok(pretrain::run(&recipe, &corpus, &options)?)
}

/// A device as a model card calls it: the card's own name.
fn hardware_of(device: &Device) -> String {
    match tensor::device::cuda_index(device) {
        None => "CPU".to_owned(),
        Some(index) => card(index).map_or_else(|| format!("cuda:{index}"), |(name, _)| name),
    }
}
