//! Kernel images, the functions in them, and their launches.

use std::ffi::{CString, c_void};
use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::sys;

use super::{Context, CudaError, Stream, check};

/// What every architecture grants without asking.
const STATIC_SMEM_LIMIT: u32 = 48 << 10;

/// The images of a build, loaded.
#[derive(Debug)]
pub struct Modules {
    context: Arc<Context>,
    modules: Vec<sys::CUmodule>,
}

// SAFETY: modules may be used from any thread that bound their context.
unsafe impl Send for Modules {}

/// A kernel that takes one struct `P` by value.
#[derive(Debug)]
pub struct Function<P> {
    name: String,
    raw: sys::CUfunction,
    max_dynamic_smem: u32,
    params: PhantomData<fn(P)>,
}

// SAFETY: as for `Modules`, which the owner keeps loaded.
unsafe impl<P> Send for Function<P> {}

/// How many threads run a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchShape {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Bytes of shared memory beside what the kernel declares.
    pub dynamic_smem: u32,
}

impl LaunchShape {
    /// `blocks` blocks of `threads` threads.
    pub const fn linear(blocks: u32, threads: u32) -> Self {
        Self { grid: [blocks, 1, 1], block: [threads, 1, 1], dynamic_smem: 0 }
    }
}

impl Modules {
    /// Loads every image for the GPU of `context`; those whose names end in `_sm90a` only on Hopper.
    ///
    /// # Errors
    /// None of an image's architectures fits, or the driver failed.
    pub fn load(context: &Arc<Context>, images: &[(&str, &[u8])]) -> Result<Self, CudaError> {
        context.bind()?;
        let mut modules = Self { context: context.clone(), modules: Vec::with_capacity(images.len()) };
        let is_hopper = context.compute_capability() == (9, 0);
        for (name, image) in images.iter().filter(|(name, _)| is_hopper || !name.ends_with("_sm90a")) {
            if image.is_empty() {
                return Err(CudaError::new("cuModuleLoadData", format!("image {name} is empty")));
            }
            let mut raw = std::ptr::null_mut();
            // SAFETY: the image is one that nvcc wrote; the driver reads its header for the length.
            let status = unsafe { sys::cuModuleLoadData(&raw mut raw, image.as_ptr().cast()) };
            check("cuModuleLoadData", status)
                .map_err(|error| CudaError { status: format!("{} (image {name})", error.status), ..error })?;
            modules.modules.push(raw);
        }
        Ok(modules)
    }

    /// Finds a kernel in any of the images, with up to `dynamic_smem` bytes of shared memory at launch.
    ///
    /// # Errors
    /// There is none of this name, or it cannot have that much memory.
    pub fn function<P: Copy>(&self, name: &str, dynamic_smem: u32) -> Result<Function<P>, CudaError> {
        self.context.bind()?;
        let c_name =
            CString::new(name).map_err(|_| CudaError::new("cuModuleGetFunction", "a zero in a name"))?;
        let mut raw = std::ptr::null_mut();
        let found = self.modules.iter().any(|&module| {
            // SAFETY: the module is loaded, the name ends in a zero.
            let status = unsafe { sys::cuModuleGetFunction(&raw mut raw, module, c_name.as_ptr()) };
            status == sys::CUresult::CUDA_SUCCESS
        });
        if !found {
            return Err(CudaError::new("cuModuleGetFunction", format!("no kernel {name} in the images")));
        }
        if dynamic_smem > STATIC_SMEM_LIMIT {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function was found above.
            let status = unsafe { sys::cuFuncSetAttribute(raw, attribute, dynamic_smem as i32) };
            check("cuFuncSetAttribute", status)?;
        }
        let max_dynamic_smem = dynamic_smem.max(STATIC_SMEM_LIMIT);
        Ok(Function { name: name.to_owned(), raw, max_dynamic_smem, params: PhantomData })
    }
}

impl Drop for Modules {
    fn drop(&mut self) {
        let _ = self.context.bind();
        for &module in &self.modules {
            // SAFETY: loaded once above, and the owner drops its functions with it.
            let _ = unsafe { sys::cuModuleUnload(module) };
        }
    }
}

impl<P: Copy> Function<P> {
    /// The kernel's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Enqueues a launch. It may begin while the kernel before it ends (programmatic dependent launch): our kernels wait
    /// for their inputs themselves.
    ///
    /// # Errors
    /// The driver failed.
    ///
    /// # Safety
    /// `P` is the kernel's parameter struct, and its addresses are valid for what the kernel does with them, until it is
    /// done.
    pub unsafe fn launch(&self, stream: &Stream, shape: LaunchShape, params: &P) -> Result<(), CudaError> {
        debug_assert!(shape.dynamic_smem <= self.max_dynamic_smem, "{}: shared memory", self.name);
        stream.bind()?;
        let mut attributes = [sys::CUlaunchAttribute_st {
            id: sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue_union { programmaticStreamSerializationAllowed: 1 },
        }];
        // Before Hopper the attribute is refused.
        let has_pdl = stream.context().compute_capability() >= (9, 0);
        let config = sys::CUlaunchConfig_st {
            gridDimX: shape.grid[0],
            gridDimY: shape.grid[1],
            gridDimZ: shape.grid[2],
            blockDimX: shape.block[0],
            blockDimY: shape.block[1],
            blockDimZ: shape.block[2],
            sharedMemBytes: shape.dynamic_smem,
            hStream: stream.raw(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: u32::from(has_pdl),
        };
        let mut arguments: [*mut c_void; 1] = [std::ptr::from_ref(params).cast_mut().cast()];
        // SAFETY: the driver copies the one argument, of the size it knows from the image, before it returns.
        let status = unsafe {
            sys::cuLaunchKernelEx(&raw const config, self.raw, arguments.as_mut_ptr(), std::ptr::null_mut())
        };
        check("cuLaunchKernelEx", status)
            .map_err(|error| CudaError { status: format!("{} ({})", error.status, self.name), ..error })
    }
}
