//! Streams and events.

use std::sync::Arc;

use cudarc::driver::sys;

use super::{Context, CudaError, DeviceSlice, check};

/// Work in order. Does not wait for the default stream.
#[derive(Debug)]
pub struct Stream {
    context: Arc<Context>,
    raw: sys::CUstream,
}

// SAFETY: a stream may be used from any thread that bound its context, and `&self` methods only enqueue.
unsafe impl Send for Stream {}

impl Stream {
    /// An empty stream.
    ///
    /// # Errors
    /// The driver failed; so for all methods.
    pub fn new(context: &Arc<Context>) -> Result<Self, CudaError> {
        context.bind()?;
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: plain call with a valid pointer under a bound context.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&raw mut raw, flags) })?;
        Ok(Self { context: context.clone(), raw })
    }

    pub(crate) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Makes its context that of this thread.
    pub(crate) fn bind(&self) -> Result<(), CudaError> {
        self.context.bind()
    }

    /// Waits for everything enqueued so far.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the stream lives.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.raw) })
    }

    /// What is enqueued from now on begins after `event`, as recorded last.
    pub fn wait(&self, event: &Event) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: both live, in one context.
        check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(self.raw, event.raw, 0) })
    }

    /// Enqueues a copy within the device.
    pub fn copy(&self, from: DeviceSlice, to: DeviceSlice) -> Result<(), CudaError> {
        assert!(from.bytes() <= to.bytes(), "{} bytes to {}", from.bytes(), to.bytes());
        self.bind()?;
        // SAFETY: both sides hold the bytes, in arenas that outlive the work enqueued on them.
        let status =
            unsafe { sys::cuMemcpyDtoDAsync_v2(to.address(), from.address(), from.bytes(), self.raw) };
        check("cuMemcpyDtoDAsync", status)
    }

    /// Enqueues a copy of a rectangle within the device: `rows` rows of `width` bytes, that many bytes apart on each side.
    ///
    /// # Panics
    /// It is not inside both slices.
    pub fn copy_rows(
        &self,
        (from, from_pitch): (DeviceSlice, usize),
        (to, to_pitch): (DeviceSlice, usize),
        width: usize,
        rows: usize,
    ) -> Result<(), CudaError> {
        if width == 0 || rows == 0 {
            return Ok(());
        }
        let inside =
            |slice: DeviceSlice, pitch: usize| width <= pitch && (rows - 1) * pitch + width <= slice.bytes();
        assert!(inside(from, from_pitch) && inside(to, to_pitch), "{rows} rows of {width} bytes");
        self.bind()?;
        let device = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
        let rectangle = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: device,
            srcHost: std::ptr::null(),
            srcDevice: from.address(),
            srcArray: std::ptr::null_mut(),
            srcPitch: from_pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: device,
            dstHost: std::ptr::null_mut(),
            dstDevice: to.address(),
            dstArray: std::ptr::null_mut(),
            dstPitch: to_pitch,
            WidthInBytes: width,
            Height: rows,
        };
        // SAFETY: both sides hold the rectangle, in arenas that outlive the work enqueued on them.
        check("cuMemcpy2DAsync", unsafe { sys::cuMemcpy2DAsync_v2(&raw const rectangle, self.raw) })
    }

    /// Enqueues filling with one byte.
    pub fn fill(&self, to: DeviceSlice, byte: u8) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the slice lies in an arena that outlives the work enqueued on it.
        let status = unsafe { sys::cuMemsetD8Async(to.address(), byte, to.bytes(), self.raw) };
        check("cuMemsetD8Async", status)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.bind();
        // SAFETY: made in `new`, destroyed once; the driver finishes what is enqueued.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.raw) };
    }
}

/// A point in a stream.
#[derive(Debug)]
pub struct Event {
    context: Arc<Context>,
    raw: sys::CUevent,
}

// SAFETY: as for `Stream`.
unsafe impl Send for Event {}

impl Event {
    /// Not recorded yet: waiting for it returns at once. Without a time stamp, which would cost.
    ///
    /// # Errors
    /// The driver failed; so for all methods.
    pub fn new(context: &Arc<Context>) -> Result<Self, CudaError> {
        Self::with_flags(context, sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32)
    }

    /// With a time stamp.
    ///
    /// # Errors
    /// The driver failed.
    pub fn timed(context: &Arc<Context>) -> Result<Self, CudaError> {
        Self::with_flags(context, 0)
    }

    fn with_flags(context: &Arc<Context>, flags: u32) -> Result<Self, CudaError> {
        context.bind()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: plain call with a valid pointer under a bound context.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut raw, flags) })?;
        Ok(Self { context: context.clone(), raw })
    }

    /// Moves it to the present end of `stream`.
    pub fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        stream.bind()?;
        // SAFETY: both live, in one context.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.raw, stream.raw) })
    }

    /// Waits until the stream got there.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.context.bind()?;
        // SAFETY: the event lives.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.raw) })
    }

    /// Milliseconds from `start` to this event; both timed, and both reached.
    pub fn milliseconds_since(&self, start: &Self) -> Result<f32, CudaError> {
        self.context.bind()?;
        let mut milliseconds = 0.0;
        // SAFETY: both live.
        let status = unsafe { sys::cuEventElapsedTime_v2(&raw mut milliseconds, start.raw, self.raw) };
        check("cuEventElapsedTime", status)?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: made in `with_flags`, destroyed once.
        let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
    }
}
