//! Whether there is a GPU to use, and if not, why: asked before anything that would panic without a driver.

use std::panic::catch_unwind;

use cudarc::driver::sys;

use super::check;

/// Kernels are compiled by CUDA 13; older drivers do not read its images.
const MIN_DRIVER_VERSION: i32 = 13_000;

/// Why CUDA cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// Nothing called libcuda.
    #[error("no CUDA driver: libcuda.so.1 was not found")]
    NoDriver,
    /// The driver is older than the kernels.
    #[error("the driver supports CUDA {}.{}, and this build needs {}.{}", .found / 1000, .found % 1000 / 10, .needed / 1000, .needed % 1000 / 10)]
    DriverTooOld {
        /// As the driver says it: 1000 · major + 10 · minor.
        found: i32,
        /// As `found`.
        needed: i32,
    },
    /// A driver, but no such GPU.
    #[error("no GPU {ordinal}: the driver shows {count} (CUDA_VISIBLE_DEVICES may hide some)")]
    NoDevice {
        /// The GPU asked for.
        ordinal: u32,
        /// How many there are.
        count: u32,
    },
    /// The build has no kernels.
    #[error("this build has no CUDA kernels (it was built with QUIRE_NVCC=skip)")]
    NoKernels,
    /// cuBLASLt is missing.
    #[error("libcublasLt.so.13 was not found; install the CUDA 13 libraries or set LD_LIBRARY_PATH")]
    NoCublasLt,
    /// NCCL is missing, and several GPUs are to work together.
    #[error(
        "libnccl.so.2 was not found, which a model split over GPUs needs; install NCCL for CUDA 13 or set LD_LIBRARY_PATH"
    )]
    NoNccl,
    /// Initialisation failed.
    #[error("the CUDA driver does not start: {0}")]
    Failed(String),
}

/// What the driver offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Driver {
    /// 1000 · major + 10 · minor of the newest CUDA it supports.
    pub version: i32,
    /// GPUs.
    pub num_devices: u32,
}

/// Loads and initialises the driver.
///
/// # Errors
/// There is none, it is too old, or it fails. Never panics.
pub fn probe() -> Result<Driver, Unavailable> {
    // SAFETY: opens libraries by their names, as later calls would.
    if !unsafe { sys::is_culib_present() } {
        return Err(Unavailable::NoDriver);
    }
    // A driver so old that it lacks a symbol makes cudarc panic.
    catch_unwind(start).unwrap_or_else(|_| Err(Unavailable::Failed("it lacks a function".into())))
}

/// Whether the library for matrix products can be opened.
///
/// # Errors
/// It is missing.
pub fn probe_cublaslt() -> Result<(), Unavailable> {
    // SAFETY: opens libraries by their names, as later calls would.
    let is_present = unsafe { cudarc::cublaslt::sys::is_culib_present() };
    if is_present { Ok(()) } else { Err(Unavailable::NoCublasLt) }
}

fn start() -> Result<Driver, Unavailable> {
    let failed = |error: super::CudaError| Unavailable::Failed(error.to_string());
    let (mut version, mut count) = (0, 0);
    // SAFETY: plain calls with valid pointers; none needs a context.
    unsafe {
        check("cuDriverGetVersion", sys::cuDriverGetVersion(&raw mut version)).map_err(failed)?;
        if version < MIN_DRIVER_VERSION {
            return Err(Unavailable::DriverTooOld { found: version, needed: MIN_DRIVER_VERSION });
        }
        match sys::cuInit(0) {
            sys::CUresult::CUDA_ERROR_NO_DEVICE => {
                return Err(Unavailable::NoDevice { ordinal: 0, count: 0 });
            }
            status => check("cuInit", status).map_err(failed)?,
        }
        check("cuDeviceGetCount", sys::cuDeviceGetCount(&raw mut count)).map_err(failed)?;
    }
    Ok(Driver { version, num_devices: count.max(0) as u32 })
}
