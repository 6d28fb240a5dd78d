//! Training that is killed without warning and started again ends with the same bytes.

use std::time::{Duration, Instant, SystemTime};

use end_to_end::Project;

const LORA: &str = "pytorch_lora_weights.safetensors";

/// Long enough to be hit, with checkpoints close together.
const LONG: &[&str] = &[
    "train.steps=60",
    "train.checkpoint_every=3",
    "train.accumulation=2",
];

fn ready_to_train() -> Project {
    let project = Project::new(5);
    for command in ["prepare", "cache-latents"] {
        let ended = project.xtask(command, LONG);
        assert_eq!(ended.code, 0, "{}", ended.stderr);
    }
    project
}

#[test]
fn training_killed_at_five_random_moments_ends_with_the_same_bytes() {
    let undisturbed = ready_to_train();
    let started = Instant::now();
    let status = undisturbed.start("train", LONG).wait().expect("it ends");
    assert!(status.success());
    let whole = started.elapsed();

    let project = ready_to_train();
    let seed = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .expect("a clock after 1970")
        .as_nanos();
    let moments = blake3::hash(&seed.to_le_bytes());
    let mut kills = 0;
    for moment in &moments.as_bytes()[..5] {
        // Each part is at most a third of the whole, so that five of them meet every phase and none all of it.
        let after = whole.mul_f64(f64::from(*moment) / 255.0 / 3.0);
        let mut child = project.start("train", LONG);
        std::thread::sleep(after.max(Duration::from_millis(1)));
        // SIGKILL, on Unix.
        child.kill().expect("it can be killed");
        let status = child.wait().expect("it ends");
        kills += usize::from(!status.success());
    }
    assert!(kills >= 1, "no kill of seed {seed} met the training");
    let status = project.start("train", LONG).wait().expect("it ends");
    assert!(status.success(), "seed {seed}");
    let bytes = |p: &Project| fs_err::read(p.artifact("train", LORA)).expect("a LoRA");
    assert!(
        bytes(&undisturbed) == bytes(&project),
        "the LoRA differs after {kills} kills of seed {seed}"
    );
}
