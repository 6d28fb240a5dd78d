//! What the driver hands out and wants back: context, memory, events, recorded work.

use std::cell::Cell;
use std::ffi::c_void;
use std::rc::Rc;

use cudarc::driver::result::{self as driver, DriverError};
use cudarc::driver::sys;

use crate::error::CudaError;
use crate::view::View;

/// A context on a device. The driver's handles are valid until this is dropped.
pub(crate) struct Context {
    pub(crate) device: sys::CUdevice,
    pub(crate) stream: sys::CUstream,
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: both handles come from `Stream::open` and are released once, here; errors at the end change nothing.
        unsafe {
            let _ = driver::stream::synchronize(self.stream);
            let _ = driver::stream::destroy(self.stream);
            let _ = driver::primary_ctx::release(self.device);
        }
    }
}

pub(crate) fn failed(call: &str) -> impl FnOnce(DriverError) -> CudaError + '_ {
    move |error| CudaError::Driver {
        call: call.to_owned(),
        code: format!("{:?}", error.0),
    }
}

/// Device memory of our own. Freed when dropped, after the stream's work is done.
pub struct Buffer {
    pub(crate) view: View,
    pub(crate) asked: usize,
    pub(crate) context: Option<Rc<Context>>,
    pub(crate) allocated: Rc<Cell<usize>>,
}

impl Buffer {
    /// All of it.
    pub fn view(&self) -> View {
        self.view
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.allocated.set(self.allocated.get() - self.asked);
        if let Some(context) = &self.context {
            // SAFETY: nothing on the stream uses the memory any more once it is synchronised; it is freed once.
            unsafe {
                let _ = driver::stream::synchronize(context.stream);
                let _ = driver::free_sync(self.view.address());
            }
        }
    }
}

/// A moment of the stream's work.
pub struct Event {
    pub(crate) handle: sys::CUevent,
    pub(crate) context: Option<Rc<Context>>,
}

impl Event {
    /// Waits for both and takes the difference. 0 in a dry run.
    ///
    /// # Errors
    ///
    /// If the work before this event failed.
    pub fn milliseconds_since(&self, earlier: &Self) -> Result<f32, CudaError> {
        if self.context.is_none() {
            return Ok(0.0);
        }
        // SAFETY: both events were recorded on the one stream, and are alive.
        unsafe {
            driver::event::synchronize(self.handle).map_err(failed("cuEventSynchronize"))?;
            driver::event::elapsed(earlier.handle, self.handle)
                .map_err(failed("cuEventElapsedTime"))
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.is_some() {
            // SAFETY: made by `Stream::event`, destroyed once.
            let _ = unsafe { driver::event::destroy(self.handle) };
        }
    }
}

/// Recorded work. The memory that it touches must outlive it.
pub struct Graph {
    pub(crate) handle: sys::CUgraphExec,
    pub(crate) context: Option<Rc<Context>>,
}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Some(context) = &self.context {
            // SAFETY: made by `Stream::capture`, destroyed once, when it no longer runs.
            unsafe {
                let _ = driver::stream::synchronize(context.stream);
                let _ = driver::graph::exec_destroy(self.handle);
            }
        }
    }
}

/// A device pointer as C functions want it.
pub(crate) fn pointer(view: View) -> *mut c_void {
    view.address() as *mut c_void
}
