//! The whole pipeline with pictures held out: what is measured, what a change redoes, what is refused.

use end_to_end::{HELD_OUT, Project};
use serde_json::Value;

#[test]
fn a_run_with_held_out_pictures_ends_in_a_report() {
    let project = Project::new(4);
    let document = project.xtask_json("run", HELD_OUT);
    let held_out = ["ingest", "embed-text", "cache-latents"].map(|s| format!("{s} (held-out)"));
    let ran = Project::stages_run(&document);
    assert_eq!(ran.len(), 9, "{ran:?}");
    assert_eq!(ran[3..6], held_out);
    assert_eq!(ran[8], "evaluate");

    let report = &document["evaluation"];
    let loss = &report["held_out"];
    let number = |value: &Value| value.as_f64().expect("a number");
    assert_eq!(loss["pictures"].as_array().map(Vec::len), Some(2));
    let (base, lora) = (number(&loss["base"]["mean"]), number(&loss["lora"]["mean"]));
    assert!(base > 0.0 && lora > 0.0 && base != lora, "{loss}");
    assert!((number(&loss["change"]) - (lora / base - 1.0)).abs() < 1e-9);
    let groups = report["groups"].as_array().expect("groups");
    let kinds: Vec<&str> = groups.iter().filter_map(|g| g["kind"].as_str()).collect();
    assert_eq!(kinds, ["with-loras", "base", "real-sprites"]);
    // One prompt: nothing can be exchanged, so chance gives the same.
    assert_eq!(groups[0]["attributes"]["hit_rate"]["p"], 1.0);
    let sheet = document["comparison_sheet"].as_str().expect("a sheet");
    assert!(sheet.ends_with("before-after.png"), "{sheet}");
    let page = fs_err::read_to_string(project.artifact("evaluate", "report.md")).expect("a page");
    assert!(page.contains("| mean |"), "{page}");

    // Nothing is left to do; a change of the measure alone measures again, the same.
    let ended = project.xtask("run", HELD_OUT);
    assert_eq!(ended.stdout.matches("Fresh").count(), 9, "{}", ended.stdout);
    let change = [HELD_OUT, &["evaluate.permutations=60"]].concat();
    let again = project.xtask_json("evaluate", &change);
    assert_eq!(Project::stages_run(&again), ["evaluate"]);
    assert_eq!(&again["evaluation"]["held_out"], loss);
}

#[test]
fn a_held_out_picture_that_is_trained_on_is_named_by_both_files() {
    let project = Project::new(3);
    assert_eq!(project.xtask("run", &[]).code, 0);
    let held_out = project.path("data/characters-held-out");
    let leaked = held_out.join("char_0072.png");
    fs_err::copy(project.path("data/characters/char_0001.png"), leaked).expect("a copy");
    let changes = ["evaluate.held_out=\"data/characters-held-out\""];
    project.xtask("evaluate", &changes).is_bad_input(&[
        "char_0072.png",
        "char_0001.png",
        "trained on",
    ]);
}

#[test]
fn held_out_pictures_that_are_not_there_are_named_before_the_training() {
    let project = Project::new(3);
    project
        .xtask("run", &["evaluate.held_out=\"data/nowhere\""])
        .is_bad_input(&["evaluate.held_out", "nowhere"]);
    assert!(!project.runs().join("train").exists());
}
