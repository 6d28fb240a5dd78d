//! Says of each stage whether its output is still good, and if not why; runs nothing.

use console::{print_document, print_line};
use pipeline::{DataSet, Failure, Task};
use serde_json::json;

use crate::cli::StageOptions;
use crate::output;
use crate::stages::Place;

/// Shows the state of all stages; gives the exit code. That a stage is dirty is an answer, not a failure.
pub fn show(options: &StageOptions) -> u8 {
    let (place, mut look) = match Place::new(options, &[]).and_then(|place| {
        let look = place.look()?;
        Ok((place, look))
    }) {
        Ok(found) => found,
        Err(failure) => return output::failure(&failure, options.json),
    };
    let mut values = Vec::new();
    let mut first_failure: Option<Failure> = None;
    for task in Task::all(&place.recipe) {
        match look.state(task) {
            Ok(state) => {
                if !options.json {
                    print_line(&output::state_words(task, &state));
                }
                values.push(output::state_value(task, &state));
            }
            Err(error) => {
                let failure = Failure::from(error);
                if !options.json {
                    print_line(&format!("{task}: Error: {failure}"));
                }
                values.push(json!({
                    "stage": task.stage,
                    "held_out": task.data == DataSet::HeldOut,
                    "state": "error",
                    "error": failure.to_json(),
                }));
                first_failure.get_or_insert(failure);
            }
        }
    }
    if options.json {
        print_document(&json!({
            "command": "status",
            "recipe": place.recipe.name,
            "runs": place.runs,
            "stages": values,
        }));
    }
    first_failure.map_or(0, |failure| {
        console::tell(&failure);
        failure.kind().exit_code()
    })
}
