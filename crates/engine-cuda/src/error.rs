//! What can be missing or go wrong on the GPU.

use crate::model::ModelError;

/// A call of the driver, NVRTC or cuBLASLt that failed, or what they need and do not find.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// A library is not installed.
    #[error("no {library}: none of {tried:?} can be loaded")]
    NoLibrary {
        /// What it is, in words.
        library: &'static str,
        /// The file names that were tried.
        tried: Vec<String>,
    },
    /// The driver finds no device.
    #[error("the NVIDIA driver finds no device")]
    NoDevice,
    /// The device of that number is not there.
    #[error("there is no CUDA device {index}; the driver finds {count}")]
    NoSuchDevice {
        /// The device asked for.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// The device is older than what the kernels are written for.
    #[error("{name} has compute capability {major}.{minor}; 8.0 (Ampere) or newer is needed")]
    TooOld {
        /// The device.
        name: String,
        /// Its compute capability.
        major: u32,
        /// Its compute capability, second part.
        minor: u32,
    },
    /// The device's memory does not hold what was asked for.
    #[error(
        "out of GPU memory: {asked} bytes for {purpose}, {free} of {total} bytes are free on the device"
    )]
    OutOfMemory {
        /// What it was for.
        purpose: String,
        /// Bytes asked for.
        asked: usize,
        /// Bytes free.
        free: usize,
        /// Bytes in all.
        total: usize,
    },
    /// A call of the driver failed.
    #[error("the driver's {call} failed: {code}")]
    Driver {
        /// The function, or the kernel launched.
        call: String,
        /// The driver's name for what went wrong.
        code: String,
    },
    /// NVRTC refuses a kernel, which is our bug or an NVRTC that is too old.
    #[error("NVRTC cannot compile kernels/{module}.cu with {options:?}:\n{log}")]
    Compile {
        /// The file.
        module: &'static str,
        /// The options.
        options: Vec<String>,
        /// The compiler's words.
        log: String,
    },
    /// cuBLASLt has no way to compute a product, or failed in it.
    #[error("cuBLASLt cannot compute {product}: {code}")]
    Product {
        /// Sizes and types.
        product: String,
        /// The library's name for what went wrong.
        code: String,
    },
    /// The libraries are of a newer CUDA than the driver.
    #[error(
        "the NVIDIA driver is for CUDA {driver}, and the NVRTC that is found is of CUDA {library}: the driver must not be older"
    )]
    DriverTooOld {
        /// The driver's major version of CUDA.
        driver: u32,
        /// NVRTC's.
        library: u32,
    },
    /// The model cannot be made as asked.
    #[error(transparent)]
    Model(#[from] Box<ModelError>),
}

impl From<ModelError> for CudaError {
    fn from(error: ModelError) -> Self {
        Self::Model(Box::new(error))
    }
}
