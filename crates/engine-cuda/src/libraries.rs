//! Finding the driver, NVRTC and cuBLASLt before the bindings look for them: these panic where a library is missing.
//!
//! Names without a folder go through the system's search (`LD_LIBRARY_PATH`, `ld.so.conf`). After that the usual
//! folders of a toolkit are tried by full path; a library that is loaded so is what the bindings then get by its name.

use std::path::PathBuf;

use libloading::Library;

use crate::error::CudaError;

/// The libraries that a stream needs.
pub(crate) fn require_all() -> Result<(), CudaError> {
    require(
        "NVIDIA driver (libcuda)",
        &["libcuda.so.1", "libcuda.so"],
        &[],
    )?;
    let folders = toolkit_folders();
    require(
        "NVRTC, CUDA's run-time compiler (libnvrtc, 12.0 or newer)",
        &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"],
        &folders,
    )?;
    require(
        "cuBLASLt (libcublasLt, 12.0 or newer)",
        &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"],
        &folders,
    )
}

fn toolkit_folders() -> Vec<PathBuf> {
    ["CUDA_HOME", "CUDA_PATH"]
        .iter()
        .filter_map(std::env::var_os)
        .map(PathBuf::from)
        .chain([PathBuf::from("/usr/local/cuda")])
        .flat_map(|root| ["lib64", "lib", "targets/x86_64-linux/lib"].map(|lib| root.join(lib)))
        .collect()
}

/// Loads the first of `names` that is there, and keeps it.
fn require(library: &'static str, names: &[&str], folders: &[PathBuf]) -> Result<(), CudaError> {
    let by_name = names.iter().map(PathBuf::from);
    let by_path = folders
        .iter()
        .flat_map(|folder| names.iter().map(|name| folder.join(name)));
    for candidate in by_name.chain(by_path) {
        // SAFETY: NVIDIA's libraries run no code at loading that could break Rust's rules; they stay loaded for good.
        if let Ok(found) = unsafe { Library::new(&candidate) } {
            std::mem::forget(found);
            return Ok(());
        }
    }
    Err(CudaError::NoLibrary {
        library,
        tried: names.iter().map(|name| (*name).to_owned()).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_named_with_what_was_tried() {
        let error = require("imaginary library", &["libnone-such.so.7"], &[]).expect_err("absent");
        assert_eq!(
            error.to_string(),
            "no imaginary library: none of [\"libnone-such.so.7\"] can be loaded"
        );
    }
}
