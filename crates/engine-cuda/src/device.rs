//! Which card there is, found without opening it: the driver and the libraries are looked for, and one is asked what it is.

use std::path::PathBuf;

use cudarc::driver::result as driver;
use cudarc::driver::sys;

use crate::error::CudaError;
use crate::kernels;
use crate::libraries;
use crate::stream::failed;

/// Which device, and where compiled kernels are kept.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Number of the device, as the driver counts.
    pub device: usize,
    /// Folder of compiled kernels; without one they go into the user's cache folder.
    pub kernel_cache: Option<PathBuf>,
}

/// The device's facts.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceFacts {
    /// Its name.
    pub name: String,
    /// Compute capability.
    pub compute_capability: (u32, u32),
    /// Number of multiprocessors.
    pub multiprocessors: u32,
    /// Memory in all.
    pub total_bytes: usize,
    /// The driver's CUDA version, e.g. 13000.
    pub driver_version: u32,
}

/// What is known of a device, without taking any of its memory.
///
/// # Errors
///
/// If the driver, NVRTC or cuBLASLt is not installed or the driver is older than these, there is no such device, or it is
/// older than Ampere.
pub fn probe(index: usize) -> Result<DeviceFacts, CudaError> {
    find(index).map(|(_, facts)| facts)
}

/// The driver's handle of a device, and what is known of it.
pub(crate) fn find(index: usize) -> Result<(sys::CUdevice, DeviceFacts), CudaError> {
    libraries::require_all()?;
    let no_device = |error: driver::DriverError, call| match error.0 {
        sys::CUresult::CUDA_ERROR_NO_DEVICE => CudaError::NoDevice,
        _ => failed(call)(error),
    };
    driver::init().map_err(|error| no_device(error, "cuInit"))?;
    let count = driver::device::get_count();
    let count = count.map_err(|error| no_device(error, "cuDeviceGetCount"))? as usize;
    if count == 0 {
        return Err(CudaError::NoDevice);
    }
    if index >= count {
        return Err(CudaError::NoSuchDevice { index, count });
    }
    let device = driver::device::get(index as i32).map_err(failed("cuDeviceGet"))?;
    let name = driver::device::get_name(device).map_err(failed("cuDeviceGetName"))?;
    // SAFETY: `device` comes from the driver.
    let attribute = |which| unsafe { driver::device::get_attribute(device, which) };
    use sys::CUdevice_attribute_enum as Attribute;
    let number = |which| {
        attribute(which)
            .map(|value| value as u32)
            .map_err(failed("cuDeviceGetAttribute"))
    };
    let major = number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    if major < 8 {
        return Err(CudaError::TooOld { name, major, minor });
    }
    let multiprocessors = number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    // SAFETY: `device` comes from the driver.
    let total_bytes =
        unsafe { driver::device::total_mem(device) }.map_err(failed("cuDeviceTotalMem"))?;
    let mut driver_version = 0;
    // SAFETY: the pointer is to a local number.
    unsafe { sys::cuDriverGetVersion(&mut driver_version) }
        .result()
        .map_err(failed("cuDriverGetVersion"))?;
    let (driver, library) = (
        driver_version as u32 / 1000,
        kernels::compiler_version().0 as u32,
    );
    if library > driver {
        return Err(CudaError::DriverTooOld { driver, library });
    }
    let facts = DeviceFacts {
        name,
        compute_capability: (major, minor),
        multiprocessors,
        total_bytes,
        driver_version: driver_version as u32,
    };
    Ok((device, facts))
}
