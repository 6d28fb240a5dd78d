//! What a second run does: nothing at all, or exactly what a change asks for, with the reason.

use std::time::Duration;

use end_to_end::Project;
use serde_json::Value;

const ALL: [&str; 6] = [
    "ingest",
    "embed-text",
    "cache-latents",
    "train",
    "sample",
    "evaluate",
];

fn report<'a>(document: &'a Value, stage: &str) -> &'a Value {
    document["stages"]
        .as_array()
        .expect("a document lists stages")
        .iter()
        .find(|entry| entry["stage"] == stage)
        .map(|entry| &entry["report"])
        .expect("the stage is listed")
}

/// A small project that has run once.
fn run_once() -> Project {
    let project = Project::new(4);
    let document = project.xtask_json("run", &[]);
    assert_eq!(Project::stages_run(&document), ALL);
    let sheet = document["sheet"].as_str().expect("a run names its sheet");
    assert!(std::path::Path::new(sheet).is_file(), "{sheet}");
    project
}

#[test]
fn a_second_run_does_nothing_and_says_fresh_six_times() {
    let project = run_once();
    let before = project.fingerprint_of_artifacts();
    let ended = project.xtask("run", &[]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert_eq!(ended.stdout.matches("Fresh").count(), 6, "{}", ended.stdout);
    assert!(ended.stdout.contains("sheet.png"), "{}", ended.stdout);
    assert_eq!(project.fingerprint_of_artifacts(), before);
}

#[test]
fn touched_files_and_a_renamed_folder_change_nothing() {
    let project = run_once();
    for entry in fs_err::read_dir(project.path("data/characters")).expect("a folder") {
        let file = std::fs::File::options()
            .append(true)
            .open(entry.expect("an entry").path())
            .expect("a file");
        let later = std::time::SystemTime::now() + Duration::from_secs(100);
        file.set_modified(later).expect("a new time");
    }
    assert!(Project::stages_run(&project.xtask_json("run", &[])).is_empty());

    fs_err::rename(project.path("data/characters"), project.path("data/heroes")).expect("a rename");
    let document = project.xtask_json("run", &["ingest.source=\"data/heroes\""]);
    assert!(Project::stages_run(&document).is_empty(), "{document}");
}

#[test]
fn one_edited_pixel_encodes_one_image_and_no_text() {
    let project = run_once();
    let file = project.path("data/characters/char_0001.png");
    let mut picture = image::open(&file).expect("a PNG").to_rgba8();
    let pixel = picture
        .pixels_mut()
        .find(|pixel| pixel.0[3] == 255)
        .expect("a visible pixel");
    pixel.0[0] ^= 0x10;
    picture.save(&file).expect("a PNG");

    let status = project.xtask("status", &[]);
    assert!(status.stdout.contains("char_0001.png"), "{}", status.stdout);
    let document = project.xtask_json("run", &[]);
    assert_eq!(
        Project::stages_run(&document),
        ["ingest", "cache-latents", "train", "sample", "evaluate"]
    );
    let counts = &report(&document, "cache-latents")["counts"];
    assert_eq!(counts["encoded"], 1, "{document}");
}

#[test]
fn one_edited_caption_encodes_one_text_and_no_image() {
    let project = run_once();
    let captions = fs_err::read_to_string(project.captions()).expect("captions");
    let edited = captions.replacen("facing forward", "facing the viewer", 1);
    assert_ne!(captions, edited);
    fs_err::write(project.captions(), edited).expect("captions");

    let document = project.xtask_json("run", &[]);
    assert_eq!(
        Project::stages_run(&document),
        ["ingest", "embed-text", "train", "sample", "evaluate"]
    );
    let counts = &report(&document, "embed-text")["counts"];
    assert_eq!(counts["encoded"], 1, "{document}");
}

#[test]
fn one_changed_training_number_trains_and_draws_again() {
    let project = run_once();
    let change = ["train.learning_rate=2e-3"];
    let status = project.xtask("status", &change);
    assert!(
        status
            .stdout
            .contains("train.learning_rate changed: 0.0015 -> 0.002"),
        "{}",
        status.stdout
    );
    let document = project.xtask_json("run", &change);
    assert_eq!(
        Project::stages_run(&document),
        ["train", "sample", "evaluate"]
    );
    // The earlier artifacts are still there, and good.
    assert!(Project::stages_run(&project.xtask_json("run", &[])).is_empty());
}
