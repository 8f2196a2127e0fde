//! Errors of the driver and of the libraries on top of it.

use std::ffi::CStr;

use cudarc::driver::sys;

/// A call that failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {status}")]
pub struct CudaError {
    /// The function.
    pub call: &'static str,
    /// What it returned, by name.
    pub status: String,
    /// Whether memory was all that lacked.
    pub is_out_of_memory: bool,
}

impl CudaError {
    /// Another library's error.
    pub fn new(call: &'static str, status: impl Into<String>) -> Self {
        Self { call, status: status.into(), is_out_of_memory: false }
    }
}

/// Turns the status of `call` into a result.
pub(crate) fn check(call: &'static str, status: sys::CUresult) -> Result<(), CudaError> {
    if status == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let is_out_of_memory = status == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
    Err(CudaError { call, status: name(status), is_out_of_memory })
}

fn name(status: sys::CUresult) -> String {
    let mut name = std::ptr::null();
    // SAFETY: the driver is loaded, since it gave this status; it writes a pointer to a static string.
    let known = unsafe { sys::cuGetErrorName(status, &raw mut name) } == sys::CUresult::CUDA_SUCCESS;
    if !known || name.is_null() {
        return format!("{status:?}");
    }
    // SAFETY: as above.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}
