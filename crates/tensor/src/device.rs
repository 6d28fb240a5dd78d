//! Devices and precisions: what a person asks for, and what it becomes.

use burn::tensor::DType;

/// A device of the dispatch backend, e.g. the CPU or the first NVIDIA card.
///
/// [`training`] wraps one so that operations on its tensors are recorded for differentiation.
pub type Device = burn::DispatchDevice;

/// Why a device cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The name is none that we know.
    #[error("device `{name}` is not known: expected `auto`, `cpu`, `cuda` or `cuda:<index>`")]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// The program was built without Burn's CUDA backend.
    #[error("device `{name}` needs a build with the cargo feature `cuda`, and this one has it not")]
    NotBuiltIn {
        /// What was asked for.
        name: String,
    },
    /// No such card.
    #[error("device `{name}` is not there: the driver shows {found} NVIDIA device(s)")]
    Absent {
        /// What was asked for.
        name: String,
        /// How many devices the driver reports; 0 without a driver.
        found: usize,
    },
}

/// The CPU.
pub fn cpu() -> Device {
    Device::Flex(Default::default())
}

/// The same device, with operations recorded for differentiation.
///
/// Frozen weights belong on it too (Burn does not mix recorded and plain tensors in one operation);
/// a tensor without `require_grad` gets no gradient computed.
pub fn training(device: &Device) -> Device {
    Device::autodiff(device.clone())
}

/// Whether it is the CPU, recorded or not. Some operations are written in another form for a card, where Burn without
/// autotuning (see this crate's feature `cuda`) has no good kernel for the usual one.
pub fn is_cpu(device: &Device) -> bool {
    match device {
        Device::Flex(_) => true,
        Device::Autodiff(inner) => is_cpu(inner),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => false,
    }
}

/// Number of the CUDA device that it is, as the driver counts; none for the CPU.
pub fn cuda_index(device: &Device) -> Option<usize> {
    match device {
        Device::Flex(_) => None,
        Device::Autodiff(inner) => cuda_index(inner),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => Some(device.index),
    }
}

/// Finds the device that a person names: `auto`, `cpu`, `cuda` or `cuda:<index>`.
///
/// `auto` is the first CUDA device where there is one and the build supports it, else the CPU.
///
/// # Errors
///
/// If the name is unknown, or names a device that this build or this machine does not have.
pub fn select(name: &str) -> Result<Device, DeviceError> {
    match name {
        "cpu" => Ok(cpu()),
        "auto" => Ok(cuda("cuda", 0).unwrap_or_else(|_| cpu())),
        "cuda" => cuda(name, 0),
        _ => {
            let index = name.strip_prefix("cuda:").and_then(|i| i.parse().ok());
            match index {
                Some(index) => cuda(name, index),
                None => Err(DeviceError::Unknown {
                    name: name.to_owned(),
                }),
            }
        }
    }
}

#[cfg(feature = "cuda")]
fn cuda(name: &str, index: usize) -> Result<Device, DeviceError> {
    use burn::backend::cuda::{Cuda, CudaDevice};
    use burn::tensor::backend::{Backend, DeviceId, DeviceOps as _};

    let device = CudaDevice::new(index);
    let DeviceId { type_id, .. } = burn::tensor::backend::Device::to_id(device.inner());
    // Without a driver the loader of its library panics: that is "no device", not a crash.
    let found = std::panic::catch_unwind(|| <Cuda as Backend>::device_count(type_id)).unwrap_or(0);
    if index < found {
        Ok(Device::Cuda(device))
    } else {
        Err(DeviceError::Absent {
            name: name.to_owned(),
            found,
        })
    }
}

#[cfg(not(feature = "cuda"))]
fn cuda(name: &str, _index: usize) -> Result<Device, DeviceError> {
    Err(DeviceError::NotBuiltIn {
        name: name.to_owned(),
    })
}

/// The number format that activations and frozen weights are computed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// 32-bit IEEE.
    F32,
    /// bfloat16: 8 exponent bits, 7 mantissa bits.
    Bf16,
    /// IEEE half: 5 exponent bits, 10 mantissa bits; overflows beyond 65,504.
    F16,
}

impl Precision {
    /// Burn's name for it.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_device_is_refused_by_name() {
        let error = select("tpu").expect_err("no such device");
        assert!(error.to_string().contains("`tpu`"), "{error}");
        assert!(select("cuda:x").is_err());
    }

    #[test]
    fn the_cpu_is_always_there() {
        assert_eq!(select("cpu").expect("the CPU needs nothing"), cpu());
    }
}
