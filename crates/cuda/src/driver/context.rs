//! A GPU and its context.

use std::cell::Cell;
use std::ffi::{CStr, c_char};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::sys;

use super::presence::{Unavailable, probe};
use super::{CudaError, check};

thread_local! {
    /// The context bound last by this thread, so that binding it again costs nothing. Only this layer binds.
    static BOUND: Cell<u64> = const { Cell::new(0) };
}

/// Contexts made so far. A number, unlike an address, is never used twice.
static MADE: AtomicU64 = AtomicU64::new(0);

/// The primary context of a GPU, retained.
#[derive(Debug)]
pub struct Context {
    raw: sys::CUcontext,
    id: u64,
    device: sys::CUdevice,
    ordinal: u32,
    name: String,
    sm_count: u32,
    compute_capability: (u32, u32),
}

// SAFETY: contexts may be used from any thread that binds them, and every use here binds first.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks what contexts share.
unsafe impl Sync for Context {}

impl Context {
    /// Takes GPU `ordinal`.
    ///
    /// # Errors
    /// No driver, no such GPU, or the driver fails.
    pub fn new(ordinal: u32) -> Result<Arc<Self>, Unavailable> {
        let driver = probe()?;
        if ordinal >= driver.num_devices {
            return Err(Unavailable::NoDevice { ordinal, count: driver.num_devices });
        }
        Self::open(ordinal).map(Arc::new).map_err(|error| Unavailable::Failed(error.to_string()))
    }

    fn open(ordinal: u32) -> Result<Self, CudaError> {
        let mut device = 0;
        let mut raw = std::ptr::null_mut();
        // SAFETY: plain calls with valid pointers.
        unsafe {
            check("cuDeviceGet", sys::cuDeviceGet(&raw mut device, ordinal as i32))?;
            check("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&raw mut raw, device))?;
        }
        use sys::CUdevice_attribute_enum as Attribute;
        let id = 1 + MADE.fetch_add(1, Ordering::Relaxed);
        let name = String::new();
        let mut context = Self { raw, id, device, ordinal, name, sm_count: 0, compute_capability: (0, 0) };
        context.name = context.query_name()?;
        context.sm_count = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        context.compute_capability = (
            context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        context.bind()?;
        Ok(context)
    }

    fn query_name(&self) -> Result<String, CudaError> {
        let mut buffer = [0 as c_char; 256];
        // SAFETY: the buffer has the length given; the driver ends the name with a zero.
        unsafe {
            check("cuDeviceGetName", sys::cuDeviceGetName(buffer.as_mut_ptr(), 255, self.device))?;
            Ok(CStr::from_ptr(buffer.as_ptr()).to_string_lossy().into_owned())
        }
    }

    fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<u32, CudaError> {
        let mut value = 0;
        // SAFETY: a plain call with a valid pointer.
        let status = unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, self.device) };
        check("cuDeviceGetAttribute", status)?;
        Ok(value.max(0) as u32)
    }

    /// Makes it the context of this thread.
    ///
    /// # Errors
    /// The driver failed.
    pub fn bind(&self) -> Result<(), CudaError> {
        if BOUND.get() == self.id {
            return Ok(());
        }
        // SAFETY: the context is retained until `self` is dropped.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.raw) })?;
        BOUND.set(self.id);
        Ok(())
    }

    /// To be called after a library that may have bound a context by itself.
    pub(crate) fn forget_bound() {
        BOUND.set(0);
    }

    /// Free and total bytes of device memory.
    ///
    /// # Errors
    /// The driver failed.
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: plain call with valid pointers under a bound context.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
        Ok((free as u64, total as u64))
    }

    /// Index of the GPU.
    pub fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// As the driver calls it: `NVIDIA H200`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Streaming multiprocessors.
    pub fn sm_count(&self) -> u32 {
        self.sm_count
    }

    /// Major and minor: (9, 0) is Hopper.
    pub fn compute_capability(&self) -> (u32, u32) {
        self.compute_capability
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained in `open`, and everything made in it holds an `Arc` of `self`. A failure leaves nothing to do.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}
