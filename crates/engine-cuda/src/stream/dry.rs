//! Streams without a device: what would be done is counted, for plans, and can be told to fail, for tests.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::{Meter, Stream};
use crate::device::DeviceFacts;
use crate::error::CudaError;
use crate::gemm::Products;
use crate::kernels::Kernels;
use crate::meter::{Rates, Tally};

impl Stream {
    /// A stream without a device: allocations and launches are counted, nothing is done.
    pub fn dry() -> Self {
        Self {
            context: None,
            facts: DeviceFacts {
                name: "dry run".to_owned(),
                compute_capability: (9, 0),
                multiprocessors: 132,
                total_bytes: usize::MAX,
                driver_version: 0,
            },
            kernels: Kernels::new((9, 0), None),
            products: Products::dry(),
            meter: RefCell::new(Meter::Count(Rates::H100, [Tally::default(); 4])),
            allocated: Rc::new(Cell::new(0)),
            until_failure: Cell::new(None),
            recording: Cell::new(false),
            #[cfg(test)]
            host: false,
        }
    }

    /// A stream whose kernels are plain Rust on host memory.
    #[cfg(test)]
    pub(crate) fn host() -> Self {
        Self {
            host: true,
            ..Self::dry()
        }
    }

    /// Whether this only counts.
    pub fn is_dry(&self) -> bool {
        #[cfg(test)]
        if self.host {
            return false;
        }
        self.context.is_none()
    }

    #[cfg(test)]
    pub(crate) fn is_host(&self) -> bool {
        self.host
    }

    /// Has a dry run pretend, after so many more launches, a card that is lost: that launch and all that follow fail.
    /// So what becomes of a failing card can be tried without one.
    ///
    /// # Panics
    ///
    /// If there is a device.
    pub fn fail_after(&self, launches: u64) {
        assert!(self.context.is_none(), "only a dry run fails on demand");
        self.until_failure.set(Some(launches));
    }

    /// The failure that was asked for, once it is its turn.
    pub(super) fn pretend_failure(&self, call: &str) -> Result<(), CudaError> {
        match self.until_failure.get() {
            None => Ok(()),
            Some(0) => Err(CudaError::Driver {
                call: call.to_owned(),
                code: "CUDA_ERROR_LAUNCH_FAILED".to_owned(),
            }),
            Some(left) => {
                self.until_failure.set(Some(left - 1));
                Ok(())
            }
        }
    }
}
