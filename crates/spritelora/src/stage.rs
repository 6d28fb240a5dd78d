//! One stage from options to exit code: recipe, log, lock, work, seal.

use console::{Progress, human_seconds, print_document, print_line, shown_path};
use pipeline::{
    DataSet, Failure, Recipe, RunOptions, Stage, StageContext, StageReport, Task, file_timestamp,
    run_stage,
};
use serde_json::json;

use crate::cli::StageOptions;

/// Runs a stage unless it is fresh; gives the exit code.
pub fn run(task: Task, options: &StageOptions) -> u8 {
    let stage = task.stage;
    match try_run(task, options) {
        Ok((report, ran)) => {
            if options.json {
                print_document(&json!({ "stage": stage, "ran": ran, "report": report }));
            } else {
                tell(&report, ran);
            }
            0
        }
        Err(failure) => {
            // For the log file; stderr gets it rendered.
            tracing::info!(messages = ?failure.messages(), "failed");
            if options.json {
                print_document(&json!({ "error": failure.to_json() }));
            }
            console::tell(&failure);
            failure.kind().exit_code()
        }
    }
}

fn try_run(task: Task, options: &StageOptions) -> Result<(StageReport, bool), Failure> {
    let stage = task.stage;
    let recipe = Recipe::load(&options.recipe, &options.set)?;
    if task.data == DataSet::HeldOut && recipe.evaluate.held_out.is_none() {
        return Err(Failure::bad_input(
            "--held-out was given, and this recipe holds no pictures out",
        )
        .with_help("set evaluate.held_out"));
    }
    let log = options
        .runs
        .join("logs")
        .join(format!("{stage}-{}.log", file_timestamp()));
    console::init_tracing(Some(&log)).map_err(|error| {
        Failure::bad_input(error)
            .with_help("choose a directory that you may write to with --runs DIR")
    })?;
    tracing::info!(
        %task,
        recipe = %options.recipe.display(),
        set = ?options.set.iter().map(ToString::to_string).collect::<Vec<_>>(),
        device = options.device,
        version = env!("CARGO_PKG_VERSION"),
        "run",
    );
    log_panics();
    if let Some(threads) = options.threads {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads.get())
            .build_global()
            .map_err(Failure::failed)?;
    }
    let run_options = RunOptions {
        device: options.device.clone(),
        engine: options.engine.clone(),
        threads: options.threads.map(Into::into),
        batch: options.batch.map(Into::into),
        json: options.json,
    };
    run_stage(
        recipe,
        &options.runs,
        task,
        run_options,
        Progress::stderr(),
        options.force,
        |context| work(stage, context),
    )
}

/// Puts panics into the log file too.
fn log_panics() {
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tracing::info!(%panic, "panicked");
        told(panic);
    }));
}

/// The stage crates' entries.
fn work(stage: Stage, context: &StageContext) -> Result<StageReport, Failure> {
    match stage {
        Stage::Ingest => Ok(ingest::run(context)?),
        Stage::EmbedText => Ok(embed_text::run(context)?),
        Stage::CacheLatents => Ok(cache_latents::run(context)?),
        Stage::Train => Ok(train::run(context)?),
        Stage::Sample => Ok(sample::run(context)?),
        Stage::Evaluate => Ok(evaluate::run(context)?),
    }
}

/// The report in words.
fn tell(report: &StageReport, ran: bool) {
    let task = report.task();
    if !ran {
        print_line(&format!("{task}: Fresh ({})", shown_path(&report.dir)));
        return;
    }
    let counts: Vec<String> = report
        .counts
        .iter()
        .map(|(what, count)| format!("{what} {count}"))
        .collect();
    let counts = if counts.is_empty() {
        String::new()
    } else {
        format!(": {}", counts.join(", "))
    };
    print_line(&format!(
        "{task}: done in {} ({}){counts}",
        human_seconds(report.seconds),
        shown_path(&report.dir)
    ));
    for note in &report.notes {
        print_line(&format!("{task}: {note}"));
    }
}
