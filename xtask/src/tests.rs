//! `cargo xtask test`: the workspace's tests; with `--gpu` those that need an NVIDIA GPU.

use std::process::{Command, Stdio};

use console::print_document;
use pipeline::Failure;
use serde_json::json;

use crate::cli::TestOptions;
use crate::output;
use crate::program::{self, ProgramError};

/// Runs the tests; gives the exit code.
pub fn run(options: &TestOptions) -> u8 {
    match try_run(options) {
        Ok(passed) => {
            if options.json {
                print_document(&json!({ "command": "test", "gpu": options.gpu, "passed": passed }));
            }
            u8::from(!passed)
        }
        Err(failure) => output::failure(&failure, options.json),
    }
}

fn try_run(options: &TestOptions) -> Result<bool, Failure> {
    if options.gpu && !has_cuda_device() {
        return Err(Failure::failed(
            "the GPU tests need an NVIDIA GPU with its driver, and none is here",
        )
        .with_help("`nvidia-smi -L` must list a device; `cargo xtask test` runs all others"));
    }
    let Some(cargo) = std::env::var_os("CARGO") else {
        return Err(Failure::bad_input(
            "tests are built from source, and cargo did not start this",
        )
        .with_help("run `cargo xtask test` in the workspace"));
    };
    let mut command = Command::new(&cargo);
    command
        .args(["test", "--workspace"])
        .current_dir(program::workspace());
    if options.gpu {
        command.args(["--features", "spritelora/cuda,engine-cuda/gpu-tests"]);
    }
    if options.json {
        // stdout is for the document.
        command.stdout(Stdio::from(std::io::stderr()));
    }
    let status = command.status().map_err(|source| ProgramError::Start {
        path: cargo.into(),
        source,
    })?;
    Ok(status.success())
}

/// Whether the NVIDIA driver shows a device. Nothing here may link CUDA, so its own tool is asked.
fn has_cuda_device() -> bool {
    Command::new("nvidia-smi")
        .arg("-L")
        .stderr(Stdio::null())
        .output()
        .is_ok_and(|ended| ended.status.success() && ended.stdout.starts_with(b"GPU "))
}
