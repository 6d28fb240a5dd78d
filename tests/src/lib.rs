//! What the tests of the whole workspace share: the programs as a person starts them, and a small project to use them on.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;

use serde_json::Value;
use tempfile::TempDir;

/// The root of the workspace.
pub fn workspace_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests crate lies in the workspace")
        .to_owned()
}

/// Where a program of this workspace is; the first call has cargo build it.
pub fn program(name: &str) -> PathBuf {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    let directory = DIRECTORY.get_or_init(|| {
        let status = Command::new(env!("CARGO"))
            .args([
                "build",
                "--workspace",
                "--bin",
                "spritelora",
                "--bin",
                "xtask",
            ])
            .current_dir(workspace_root())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .expect("cargo runs");
        assert!(status.success(), "the programs do not build");
        // A test lies in <target>/<profile>/deps, the programs in <target>/<profile>.
        std::env::current_exe()
            .expect("a test knows where it is")
            .ancestors()
            .nth(2)
            .expect("a test lies two directories deep")
            .to_owned()
    });
    directory.join(format!("{name}{}", std::env::consts::EXE_SUFFIX))
}

/// A project of its own in a temporary directory: a recipe, a few characters, the shipped base, no artifacts yet.
pub struct Project {
    directory: TempDir,
}

/// Everything that makes the shipped recipe small enough for a test.
const SMALL: &[&str] = &[
    "cache_latents.resolution_px=64",
    "train.steps=6",
    "train.micro_batch=2",
    "train.checkpoint_every=2",
    "sample.width_px=64",
    "sample.height_px=64",
    "sample.steps=2",
    "sample.seeds=[1]",
    "sample.prompts=[\"pixel art character, red hair\"]",
    "sample.compare_with_base=false",
    "evaluate.held_out=\"\"",
    "evaluate.sigmas=[0.5]",
    "evaluate.resamples=50",
    "evaluate.permutations=50",
];

/// What a test adds to have pictures held out, and the base's drawn beside the LoRA's.
pub const HELD_OUT: &[&str] = &[
    "sample.compare_with_base=true",
    "evaluate.held_out=\"data/characters-held-out\"",
];

impl Project {
    /// A project with the first `num_characters` of the shipped characters.
    pub fn new(num_characters: usize) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let project = Self { directory };
        let root = workspace_root();
        let recipe = fs_err::read_to_string(root.join("configs/demo.toml")).expect("the recipe");
        let base = root.join("data/base");
        let recipe = recipe.replace(
            "\"data/base\"",
            &format!("{:?}", base.display().to_string()),
        );
        assert!(
            recipe.contains(&*base.to_string_lossy()),
            "the recipe names data/base"
        );
        fs_err::create_dir_all(project.path("configs")).expect("a directory");
        fs_err::write(project.recipe(), recipe).expect("a file");
        project.copy_shipped("data/characters", num_characters);
        project.copy_shipped("data/characters-held-out", 2);
        project
    }

    /// Takes over the first pictures of a shipped folder.
    fn copy_shipped(&self, folder: &str, count: usize) {
        let shipped = workspace_root().join(folder);
        let captions =
            fs_err::read_to_string(shipped.join("metadata.jsonl")).expect("shipped captions");
        fs_err::create_dir_all(self.path(folder)).expect("a directory");
        let mut kept = String::new();
        for line in captions.lines().take(count) {
            let row: Value = serde_json::from_str(line).expect("a row of JSON");
            let name = row["file_name"].as_str().expect("a file name");
            fs_err::copy(shipped.join(name), self.path(folder).join(name)).expect("a copy");
            kept.push_str(line);
            kept.push('\n');
        }
        fs_err::write(self.path(folder).join("metadata.jsonl"), kept).expect("a file");
    }

    /// A path inside the project.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The recipe file.
    pub fn recipe(&self) -> PathBuf {
        self.path("configs/demo.toml")
    }

    /// The file of captions.
    pub fn captions(&self) -> PathBuf {
        self.path("data/characters/metadata.jsonl")
    }

    /// The directory of artifacts.
    pub fn runs(&self) -> PathBuf {
        self.path("runs")
    }

    /// `program command --recipe … --runs … --set …`, ready to start.
    pub fn command(&self, name: &str, command: &str, changes: &[&str]) -> Command {
        let mut start = Command::new(program(name));
        start
            .arg(command)
            .arg("--recipe")
            .arg(self.recipe())
            .arg("--runs")
            .arg(self.runs())
            .current_dir(self.directory.path())
            .env_remove("CARGO")
            .env_remove("CARGO_MANIFEST_DIR")
            .stdin(Stdio::null());
        for change in SMALL.iter().chain(changes) {
            start.args(["--set", change]);
        }
        start
    }

    /// Runs `xtask command` to its end.
    pub fn xtask(&self, command: &str, changes: &[&str]) -> Ended {
        Ended::of(
            self.command("xtask", command, changes)
                .args(["--device", "cpu"]),
        )
    }

    /// Runs `xtask command --json`, which must succeed, and gives its document.
    pub fn xtask_json(&self, command: &str, changes: &[&str]) -> Value {
        let ended = Ended::of(
            self.command("xtask", command, changes)
                .args(["--device", "cpu", "--json"]),
        );
        assert_eq!(ended.code, 0, "{}", ended.stderr);
        serde_json::from_str(&ended.stdout).expect("stdout is one JSON document")
    }

    /// Starts `spritelora command` and leaves it running.
    pub fn start(&self, command: &str, changes: &[&str]) -> Child {
        self.command("spritelora", command, changes)
            .args(["--device", "cpu"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("spritelora starts")
    }

    /// The tasks that a run executed, as people read them, from its JSON document.
    pub fn stages_run(document: &Value) -> Vec<String> {
        document["stages"]
            .as_array()
            .expect("a document lists stages")
            .iter()
            .filter(|stage| stage["ran"] == true)
            .map(|stage| {
                let name = stage["stage"].as_str().expect("a stage has a name");
                if stage["held_out"] == true {
                    format!("{name} (held-out)")
                } else {
                    name.to_owned()
                }
            })
            .collect()
    }

    /// A digest of every sealed file: what bad input must leave as it was.
    pub fn fingerprint_of_artifacts(&self) -> Vec<(PathBuf, blake3::Hash)> {
        let mut files: Vec<_> = walkdir::WalkDir::new(self.runs())
            .into_iter()
            .filter_map(Result::ok)
            .filter(|entry| entry.file_type().is_file())
            .map(|entry| entry.path().to_owned())
            .filter(|path| {
                let hidden = path
                    .file_name()
                    .is_some_and(|n| n.to_string_lossy().starts_with('.'));
                !hidden && !path.starts_with(self.runs().join("logs"))
            })
            .map(|path| {
                let digest = blake3::hash(&fs_err::read(&path).expect("a readable artifact"));
                (path, digest)
            })
            .collect();
        files.sort_by(|a, b| a.0.cmp(&b.0));
        files
    }

    /// The only file of this name among the artifacts of a stage.
    pub fn artifact(&self, stage: &str, name: &str) -> PathBuf {
        let found: Vec<_> = walkdir::WalkDir::new(self.runs().join(stage))
            .into_iter()
            .filter_map(Result::ok)
            .filter(|entry| entry.file_name().to_string_lossy() == name)
            .map(|entry| entry.path().to_owned())
            .collect();
        assert_eq!(found.len(), 1, "{stage} has {found:?}");
        found[0].clone()
    }
}

/// A program that has ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit code.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Ended {
    /// Runs a command to its end.
    pub fn of(command: &mut Command) -> Self {
        let Output {
            status,
            stdout,
            stderr,
        } = command.output().expect("the program starts");
        Self {
            code: status.code().expect("the program was not killed"),
            stdout: String::from_utf8(stdout).expect("stdout is UTF-8"),
            stderr: String::from_utf8(stderr).expect("stderr is UTF-8"),
        }
    }

    /// Asserts bad input: exit code 2, and a message that names all of `parts`.
    pub fn is_bad_input(&self, parts: &[&str]) {
        assert_eq!(
            self.code, 2,
            "stdout: {}\nstderr: {}",
            self.stdout, self.stderr
        );
        // The message is wrapped to the width of the terminal.
        let words = self.stderr.split_whitespace().collect::<Vec<_>>().join(" ");
        let message = words.replace("│ ", "");
        for part in parts {
            assert!(message.contains(part), "`{part}` is not in: {message}");
        }
    }
}
