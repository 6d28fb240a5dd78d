//! The device, the one stream that all work goes through, its memory, graphs and measurements.

mod dry;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use cudarc::driver::result as driver;
use cudarc::driver::sys;

pub use crate::device::{DeviceFacts, OpenOptions};
use crate::error::CudaError;
use crate::gemm::Products;
pub use crate::handles::{Buffer, Event, Graph};
pub(crate) use crate::handles::{Context, failed, pointer};
use crate::kernels::{Args, Kernels, Launch, Module};
pub use crate::meter::{Rates, Tally, Work};
use crate::view::View;

/// What is noted about each launch.
enum Meter {
    Off,
    Count(Rates, [Tally; 4]),
    /// Kind of work, name, and events around it.
    Time(Vec<(Work, String, Event, Event)>),
}

/// One device and one stream of work on it, or a dry run of that.
pub struct Stream {
    context: Option<Rc<Context>>,
    facts: DeviceFacts,
    kernels: Kernels,
    products: Products,
    meter: RefCell<Meter>,
    allocated: Rc<Cell<usize>>,
    /// Launches until a dry run pretends that one fails.
    until_failure: Cell<Option<u64>>,
    /// Whether work is being recorded: then nothing that lies on the host may be copied, as it may be gone at the replay.
    recording: Cell<bool>,
    /// Whether the kernels' plain forms run on host memory.
    #[cfg(test)]
    host: bool,
}

impl Stream {
    /// Opens a device.
    ///
    /// # Errors
    ///
    /// If the driver, NVRTC or cuBLASLt is not installed, there is no such device, or it is older than Ampere.
    pub fn open(options: &OpenOptions) -> Result<Self, CudaError> {
        let (device, facts) = crate::device::find(options.device)?;
        // SAFETY: `device` comes from the driver; the context is made current before anything is done in it, and
        // `Context` releases both handles once.
        let context = unsafe {
            let handle =
                driver::primary_ctx::retain(device).map_err(failed("cuDevicePrimaryCtxRetain"))?;
            driver::ctx::set_current(handle).map_err(failed("cuCtxSetCurrent"))?;
            let stream = driver::stream::create(driver::stream::StreamKind::NonBlocking)
                .map_err(failed("cuStreamCreate"))?;
            let context = Context { device, stream };
            Rc::new(context)
        };
        let allocated = Rc::new(Cell::new(0));
        let products = Products::new(&context)?;
        let kernels = Kernels::new(facts.compute_capability, options.kernel_cache.clone());
        Ok(Self {
            context: Some(context),
            facts,
            kernels,
            products,
            meter: RefCell::new(Meter::Off),
            allocated,
            until_failure: Cell::new(None),
            recording: Cell::new(false),
            #[cfg(test)]
            host: false,
        })
    }

    /// The device's facts.
    pub fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    /// Compute capability, major and minor.
    pub fn compute_capability(&self) -> (u32, u32) {
        self.facts.compute_capability
    }

    /// Number of multiprocessors.
    pub fn multiprocessors(&self) -> u32 {
        self.facts.multiprocessors
    }

    /// Bytes in buffers that are alive: ours, not the driver's context nor kernels' code.
    pub fn allocated_bytes(&self) -> usize {
        self.allocated.get()
    }

    pub(crate) fn products(&self) -> &Products {
        &self.products
    }

    pub(crate) fn raw(&self) -> Option<sys::CUstream> {
        self.context.as_ref().map(|context| context.stream)
    }

    /// Free and total bytes of the device, whoever uses it.
    ///
    /// # Errors
    ///
    /// If the driver fails.
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        if self.context.is_none() {
            return Ok((usize::MAX, usize::MAX));
        }
        driver::mem_get_info().map_err(failed("cuMemGetInfo"))
    }

    /// Takes device memory. Its content is undefined.
    ///
    /// # Errors
    ///
    /// [`CudaError::OutOfMemory`] with what it was for and how much is free.
    pub fn allocate(&self, bytes: usize, purpose: &str) -> Result<Buffer, CudaError> {
        let asked = crate::arena::aligned(bytes.max(1));
        let address = match &self.context {
            #[cfg(test)]
            None if self.host => crate::host::allocate(asked),
            // Pretended addresses differ, so that a mix-up of views shows in a dry run too.
            None => (1 << 44) + self.allocated.get() as u64,
            // SAFETY: the context is current; the address is freed once, by `Buffer`.
            Some(_) => match unsafe { driver::malloc_sync(asked) } {
                Ok(address) => address,
                Err(error) if error.0 == sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY => {
                    let (free, total) = self.memory()?;
                    return Err(CudaError::OutOfMemory {
                        purpose: purpose.to_owned(),
                        asked,
                        free,
                        total,
                    });
                }
                Err(error) => return Err(failed("cuMemAlloc")(error)),
            },
        };
        self.allocated.set(self.allocated.get() + asked);
        Ok(Buffer {
            view: View::new(address, bytes),
            asked,
            context: self.context.clone(),
            allocated: Rc::clone(&self.allocated),
        })
    }

    /// Launches a kernel.
    ///
    /// # Errors
    ///
    /// If it cannot be compiled or launched.
    ///
    /// # Safety
    ///
    /// The arguments are the kernel's, and every view is as large as the kernel reaches.
    pub unsafe fn launch(
        &self,
        module: &'static Module,
        defines: &[&str],
        kernel: &str,
        launch: Launch,
        args: Args,
    ) -> Result<(), CudaError> {
        let work = Work::of_module(module.name);
        let bytes = args.view_bytes() as f64;
        self.metered(work, kernel, 0.0, bytes, |stream| {
            #[cfg(test)]
            if self.host {
                crate::host::launch(defines, kernel, launch, &args);
            }
            let Some(stream) = stream else { return Ok(()) };
            let function = self.kernels.function(module, defines, kernel, launch)?;
            // SAFETY: the function is of a module that lives as long as `self`; the rest is promised by the caller.
            unsafe { args.launch(function, launch, stream) }.map_err(failed(kernel))
        })
    }

    /// Runs `action` on the stream (`None` in a dry run) and notes it.
    pub(crate) fn metered(
        &self,
        work: Work,
        name: &str,
        flops: f64,
        bytes: f64,
        action: impl FnOnce(Option<sys::CUstream>) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        self.pretend_failure(name)?;
        let stream = self.raw();
        if let Meter::Count(rates, tallies) = &mut *self.meter.borrow_mut() {
            let tally = &mut tallies[work as usize];
            tally.launches += 1;
            tally.flops += flops;
            tally.bytes += bytes;
            tally.seconds += rates.launch_s + rates.seconds(work, flops, bytes);
        }
        let timing = matches!(&*self.meter.borrow(), Meter::Time(_));
        if !timing {
            return action(stream);
        }
        let before = self.event()?;
        action(stream)?;
        let after = self.event()?;
        if let Meter::Time(launches) = &mut *self.meter.borrow_mut() {
            launches.push((work, name.to_owned(), before, after));
        }
        Ok(())
    }

    /// Counts arithmetic that a launch's arguments do not show.
    pub(crate) fn count_flops(&self, work: Work, flops: f64) {
        if let Meter::Count(rates, tallies) = &mut *self.meter.borrow_mut() {
            let tally = &mut tallies[work as usize];
            tally.flops += flops;
            tally.seconds += rates.seconds(work, flops, 0.0);
        }
    }

    /// Starts counting launches.
    pub fn start_counting(&self) {
        self.start_counting_at(Rates::H100);
    }

    /// Starts counting launches, and what they take at these rates.
    pub fn start_counting_at(&self, rates: Rates) {
        *self.meter.borrow_mut() = Meter::Count(rates, [Tally::default(); 4]);
    }

    /// What was launched since counting began, in the order of [`Work::ALL`]. A dry stream always counts.
    pub fn tallies(&self) -> [Tally; 4] {
        match &*self.meter.borrow() {
            Meter::Count(_, tallies) => *tallies,
            _ => [Tally::default(); 4],
        }
    }

    /// Starts timing each launch by itself; that costs a few microseconds a launch, so sums are compared, not added up
    /// to a step.
    pub fn start_timing(&self) {
        if !self.is_dry() {
            *self.meter.borrow_mut() = Meter::Time(Vec::new());
        }
    }

    /// Stops timing: kind of work, name, milliseconds of every launch.
    ///
    /// # Errors
    ///
    /// If the stream's work failed.
    pub fn stop_timing(&self) -> Result<Vec<(Work, String, f32)>, CudaError> {
        self.synchronize()?;
        let meter = std::mem::replace(&mut *self.meter.borrow_mut(), Meter::Off);
        let Meter::Time(launches) = meter else {
            return Ok(Vec::new());
        };
        launches
            .into_iter()
            .map(|(work, name, before, after)| Ok((work, name, after.milliseconds_since(&before)?)))
            .collect()
    }

    /// Notes this moment of the stream's work.
    ///
    /// # Errors
    ///
    /// If the driver fails.
    pub fn event(&self) -> Result<Event, CudaError> {
        let Some(context) = &self.context else {
            return Ok(Event {
                handle: std::ptr::null_mut(),
                context: None,
            });
        };
        let handle = driver::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)
            .map_err(failed("cuEventCreate"))?;
        let event = Event {
            handle,
            context: Some(Rc::clone(context)),
        };
        // SAFETY: event and stream are alive.
        unsafe { driver::event::record(handle, context.stream) }
            .map_err(failed("cuEventRecord"))?;
        Ok(event)
    }

    /// Waits until everything launched so far is done.
    ///
    /// # Errors
    ///
    /// If any of it failed.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        match self.raw() {
            None => Ok(()),
            // SAFETY: the stream is alive.
            Some(stream) => unsafe { driver::stream::synchronize(stream) }
                .map_err(failed("cuStreamSynchronize")),
        }
    }

    fn assert_not_recording(&self) {
        assert!(
            !self.recording.get(),
            "a copy between host and device cannot be recorded"
        );
    }

    /// Copies numbers to the device, in the stream's order. `values` may be dropped at once.
    ///
    /// # Errors
    ///
    /// If the driver fails.
    ///
    /// # Panics
    ///
    /// If the view is shorter, or work is being recorded.
    pub fn upload<V: bytemuck::NoUninit>(&self, to: View, values: &[V]) -> Result<(), CudaError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        to.holds(bytes.len(), "the destination of an upload");
        self.assert_not_recording();
        #[cfg(test)]
        if self.host {
            let (from, len) = (bytes.as_ptr() as u64, bytes.len());
            crate::host::copy_rows(to.address(), len, from, len, len, 1);
        }
        match self.raw() {
            Some(stream) if !bytes.is_empty() => {
                // SAFETY: the view holds the bytes; from pageable memory the driver has staged them when it returns.
                unsafe { driver::memcpy_htod_async(to.address(), bytes, stream) }
                    .map_err(failed("cuMemcpyHtoDAsync"))
            }
            _ => Ok(()),
        }
    }

    /// Copies numbers from the device, after everything launched so far. In a dry run they are zeros.
    ///
    /// # Errors
    ///
    /// If the driver fails.
    ///
    /// # Panics
    ///
    /// If the view is shorter, or work is being recorded.
    pub fn download<V: bytemuck::AnyBitPattern + bytemuck::NoUninit>(
        &self,
        from: View,
        count: usize,
    ) -> Result<Vec<V>, CudaError> {
        let mut values = vec![V::zeroed(); count];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
        from.holds(bytes.len(), "the source of a download");
        self.assert_not_recording();
        #[cfg(test)]
        if self.host {
            let (to, len) = (bytes.as_mut_ptr() as u64, bytes.len());
            crate::host::copy_rows(to, len, from.address(), len, len, 1);
        }
        if let Some(stream) = self.raw()
            && !bytes.is_empty()
        {
            // SAFETY: the view holds the bytes; the copy has ended before `values` is touched.
            unsafe { driver::memcpy_dtoh_async(bytes, from.address(), stream) }
                .map_err(failed("cuMemcpyDtoHAsync"))?;
            self.synchronize()?;
        }
        Ok(values)
    }

    /// Sets every byte.
    ///
    /// # Errors
    ///
    /// If the driver fails.
    pub fn fill(&self, view: View, byte: u8) -> Result<(), CudaError> {
        let bytes = view.bytes() as f64;
        self.metered(Work::Elementwise, "fill", 0.0, bytes, |stream| {
            #[cfg(test)]
            if self.host {
                crate::host::fill(view, byte);
            }
            let Some(stream) = stream else { return Ok(()) };
            // SAFETY: the view's memory is alive.
            unsafe { driver::memset_d8_async(view.address(), byte, view.bytes(), stream) }
                .map_err(failed("cuMemsetD8Async"))
        })
    }

    /// Copies `rows` rows of `width` bytes between layouts of different row strides (in bytes).
    ///
    /// # Errors
    ///
    /// If the driver fails.
    ///
    /// # Panics
    ///
    /// If a view is shorter than its layout.
    pub fn copy_rows(
        &self,
        to: View,
        to_stride: usize,
        from: View,
        from_stride: usize,
        width: usize,
        rows: usize,
    ) -> Result<(), CudaError> {
        if rows == 0 || width == 0 {
            return Ok(());
        }
        to.holds((rows - 1) * to_stride + width, "the destination of a copy");
        from.holds((rows - 1) * from_stride + width, "the source of a copy");
        let bytes = (2 * rows * width) as f64;
        self.metered(Work::Elementwise, "copy_rows", 0.0, bytes, |stream| {
            #[cfg(test)]
            if self.host {
                let (to, from) = (to.address(), from.address());
                crate::host::copy_rows(to, to_stride, from, from_stride, width, rows);
            }
            let Some(stream) = stream else { return Ok(()) };
            let device = sys::CUmemorytype_enum::CU_MEMORYTYPE_DEVICE;
            let copy = sys::CUDA_MEMCPY2D {
                srcXInBytes: 0,
                srcY: 0,
                srcMemoryType: device,
                srcHost: std::ptr::null(),
                srcDevice: from.address(),
                srcArray: std::ptr::null_mut(),
                srcPitch: from_stride,
                dstXInBytes: 0,
                dstY: 0,
                dstMemoryType: device,
                dstHost: std::ptr::null_mut(),
                dstDevice: to.address(),
                dstArray: std::ptr::null_mut(),
                dstPitch: to_stride,
                WidthInBytes: width,
                Height: rows,
            };
            // SAFETY: both views hold their layouts, as asserted above.
            unsafe { sys::cuMemcpy2DAsync_v2(&copy, stream) }
                .result()
                .map_err(failed("cuMemcpy2DAsync"))
        })
    }

    /// Records what `work` launches, without doing it, as a graph that does it at one call.
    ///
    /// Kernels and products that `work` needs must have run once before: compiling is no part of a graph.
    ///
    /// # Errors
    ///
    /// If `work` fails, or does what a graph cannot hold (allocating, waiting).
    ///
    /// # Panics
    ///
    /// If `work` copies from or to the host.
    pub fn capture(
        &self,
        work: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<Graph, CudaError> {
        let recording = Recording::begin(self)?;
        work()?;
        let graph = recording.end()?;
        let Some(context) = &self.context else {
            return Ok(Graph {
                handle: std::ptr::null_mut(),
                context: None,
            });
        };
        let mut handle = std::ptr::null_mut();
        // SAFETY: `graph` was made above.
        let instantiated =
            unsafe { sys::cuGraphInstantiateWithFlags(&mut handle, graph, 0) }.result();
        // SAFETY: the executable graph does not need its template.
        unsafe { driver::graph::destroy(graph) }.map_err(failed("cuGraphDestroy"))?;
        instantiated.map_err(failed("cuGraphInstantiate"))?;
        Ok(Graph {
            handle,
            context: Some(Rc::clone(context)),
        })
    }

    /// Does what a graph holds.
    ///
    /// # Errors
    ///
    /// If the driver fails.
    pub fn replay(&self, graph: &Graph) -> Result<(), CudaError> {
        match self.raw() {
            None => Ok(()),
            // SAFETY: graph and stream are alive; the graph's memory is kept by whoever keeps the graph.
            Some(stream) => unsafe { driver::graph::launch(graph.handle, stream) }
                .map_err(failed("cuGraphLaunch")),
        }
    }
}

/// Work that is being recorded: ended by [`Recording::end`], or, where the work failed or panicked, when this is dropped.
struct Recording<'a> {
    stream: &'a Stream,
}

impl<'a> Recording<'a> {
    fn begin(stream: &'a Stream) -> Result<Self, CudaError> {
        if let Some(raw) = stream.raw() {
            let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            // SAFETY: the stream is alive; every capture that begins is ended once, below.
            unsafe { driver::stream::begin_capture(raw, mode) }
                .map_err(failed("cuStreamBeginCapture"))?;
        }
        stream.recording.set(true);
        Ok(Self { stream })
    }

    /// What was recorded; null in a dry run.
    fn end(self) -> Result<sys::CUgraph, CudaError> {
        let recording = std::mem::ManuallyDrop::new(self);
        recording.finish()
    }

    fn finish(&self) -> Result<sys::CUgraph, CudaError> {
        self.stream.recording.set(false);
        match self.stream.raw() {
            None => Ok(std::ptr::null_mut()),
            // SAFETY: the capture was begun, and is ended here only.
            Some(raw) => {
                unsafe { driver::stream::end_capture(raw) }.map_err(failed("cuStreamEndCapture"))
            }
        }
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        if let Ok(graph) = self.finish()
            && !graph.is_null()
        {
            // SAFETY: nobody else has the graph. That it stays for good if the driver refuses is no harm.
            let _ = unsafe { driver::graph::destroy(graph) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_to_the_host_cannot_be_recorded_and_a_broken_recording_is_ended() {
        let stream = Stream::dry();
        let memory = stream.allocate(4, "a number").expect("it is dry");
        let copy = || stream.capture(|| stream.upload(memory.view(), &[1.0f32]));
        let copied = std::panic::catch_unwind(std::panic::AssertUnwindSafe(copy));
        assert!(copied.is_err(), "the number would be gone at the replay");
        stream
            .upload(memory.view(), &[1.0f32])
            .expect("outside of a recording");
        let failing = stream.capture(|| Err(CudaError::NoDevice));
        assert!(failing.is_err() && !stream.recording.get());
    }

    #[test]
    fn a_dry_stream_counts_memory_and_gives_it_back() {
        let stream = Stream::dry();
        let buffer = stream.allocate(1000, "a test").expect("nothing is taken");
        assert_eq!(stream.allocated_bytes(), 1024);
        assert_eq!(buffer.view().bytes(), 1000);
        drop(buffer);
        assert_eq!(stream.allocated_bytes(), 0);
    }

    #[test]
    fn without_a_driver_the_error_says_so() {
        // On a machine with a driver and a card this opens one, which is as good.
        match Stream::open(&OpenOptions::default()) {
            Ok(stream) => assert!(!stream.is_dry()),
            Err(error) => {
                let text = error.to_string();
                assert!(
                    ["NVIDIA driver", "NVRTC", "cuBLASLt", "no device"]
                        .iter()
                        .any(|part| text.contains(part)),
                    "{text}"
                );
            }
        }
    }

    #[test]
    fn a_dry_stream_counts_copies() {
        let stream = Stream::dry();
        let buffer = stream.allocate(64, "a test").expect("nothing is taken");
        stream
            .copy_rows(buffer.view(), 16, buffer.view().skip(8), 16, 8, 3)
            .expect("nothing is done");
        let tally = stream.tallies()[Work::Elementwise as usize];
        assert_eq!((tally.launches, tally.bytes), (1, 48.0));
    }
}
