//! `train_lora FIXTURES DIR`: trains a LoRA on a fixture's model and writes it, with our velocities under it, into DIR
//! for `tests/fixtures/lora-in-diffusers/check.py`.

use std::path::PathBuf;
use std::process::ExitCode;

use parity::checker::CaseError;
use parity::fixture::FixtureSet;
use parity::trained_lora;

fn main() -> ExitCode {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [fixtures, out] = arguments.as_slice() else {
        eprintln!("usage: train_lora FIXTURES DIR");
        return ExitCode::from(2);
    };
    match write(fixtures.clone(), out.clone()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn write(fixtures: PathBuf, out: PathBuf) -> Result<(), CaseError> {
    let set = FixtureSet::open(&fixtures)?;
    fs_err::create_dir_all(&out)?;
    let lora = out.join("lora.safetensors");
    trained_lora::train(&set, &lora)?;
    let velocities = trained_lora::velocities(&set, &lora)?;
    trained_lora::write_velocities(&out.join("ours.safetensors"), &velocities)
}
