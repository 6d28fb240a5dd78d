//! `spritelora random-base`: a base of random weights, to try the pipeline on before a trained one is there.

use console::print_line;
use pipeline::Failure;
use random_base::RandomBaseError;

use crate::cli::RandomBaseOptions;

/// Writes the base; gives the exit code.
pub fn run(options: &RandomBaseOptions) -> u8 {
    let RandomBaseOptions {
        out,
        preset,
        seed,
        tokenizers,
    } = options;
    match random_base::write(out, *preset, *seed, tokenizers) {
        Ok(base) => {
            let num_parameters: u64 = base.num_parameters.values().sum();
            print_line(&format!(
                "{}: {num_parameters} parameters, {:.1} MB, untrained",
                out.display(),
                base.size_bytes as f64 / 1e6
            ));
            0
        }
        Err(error) => {
            let failure = failure(error);
            console::tell(&failure);
            failure.kind().exit_code()
        }
    }
}

fn failure(error: RandomBaseError) -> Failure {
    match error {
        RandomBaseError::WouldOverwrite { .. } | RandomBaseError::Tokenizer(_) => {
            Failure::bad_input(error)
        }
        _ => Failure::failed(error),
    }
}
