//! Device memory in a few large allocations, and pinned host memory.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys;

use super::{Context, CudaError, Stream, check};

/// Every tensor begins at a multiple of this, as vector loads and cuBLASLt like it.
const ALIGNMENT: usize = 256;

/// Part of an arena: lives as long as the arena. Plain data, so that structs of kernel arguments can hold addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceSlice {
    address: u64,
    bytes: usize,
}

impl DeviceSlice {
    /// Nothing: a null pointer, for optional arguments.
    pub const NULL: Self = Self { address: 0, bytes: 0 };

    /// The device address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its length.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The part from byte `start` on, `bytes` long.
    ///
    /// # Panics
    /// It is not inside: a mistake in the caller's layout.
    pub fn part(&self, start: usize, bytes: usize) -> Self {
        assert!(start + bytes <= self.bytes, "part {start}+{bytes} of a slice of {} bytes", self.bytes);
        Self { address: self.address + start as u64, bytes }
    }
}

/// What is at least this part of a chunk is an allocation of its own, so that little of a chunk is left unused.
const LARGE_PART: usize = 8;

/// Hands out device memory from chunks and frees all of it at once. Growing it is for start-up only.
#[derive(Debug)]
pub struct Arena {
    context: Arc<Context>,
    chunk_bytes: usize,
    /// Everything taken from the device.
    allocations: Vec<DeviceSlice>,
    /// What is left of the last chunk.
    rest: DeviceSlice,
}

impl Arena {
    /// An empty arena that grows by at least `chunk_bytes`. With 0 every tensor is an allocation of its own, so that an
    /// access out of bounds can be found.
    pub fn new(context: Arc<Context>, chunk_bytes: usize) -> Self {
        Self { context, chunk_bytes, allocations: Vec::new(), rest: DeviceSlice::NULL }
    }

    /// Memory with undefined content, at least 16 bytes.
    ///
    /// # Errors
    /// Out of memory, or the driver failed.
    pub fn alloc(&mut self, bytes: usize) -> Result<DeviceSlice, CudaError> {
        let bytes = bytes.max(16);
        let rounded = bytes.next_multiple_of(ALIGNMENT);
        if rounded >= self.chunk_bytes / LARGE_PART {
            return self.allocate(bytes);
        }
        if self.rest.bytes < rounded {
            self.rest = self.allocate(self.chunk_bytes)?;
        }
        let slice = self.rest.part(0, bytes);
        self.rest = self.rest.part(rounded, self.rest.bytes - rounded);
        Ok(slice)
    }

    /// Bytes taken from the device.
    pub fn bytes(&self) -> u64 {
        self.allocations.iter().map(|allocation| allocation.bytes as u64).sum()
    }

    fn allocate(&mut self, bytes: usize) -> Result<DeviceSlice, CudaError> {
        self.context.bind()?;
        let mut address = 0;
        // SAFETY: plain call with a valid pointer under a bound context.
        check("cuMemAlloc", unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) })?;
        let allocation = DeviceSlice { address, bytes };
        self.allocations.push(allocation);
        Ok(allocation)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let _ = self.context.bind();
        for allocation in &self.allocations {
            // SAFETY: allocated above and freed once; freeing waits for the work that uses it.
            let _ = unsafe { sys::cuMemFree_v2(allocation.address) };
        }
    }
}

/// Page-locked host memory: the only kind that copies run from and to without waiting.
#[derive(Debug)]
pub struct Pinned {
    context: Arc<Context>,
    pointer: *mut u8,
    bytes: usize,
}

// SAFETY: it owns its memory.
unsafe impl Send for Pinned {}

impl Pinned {
    /// `bytes` zeros.
    ///
    /// # Errors
    /// Out of memory, or the driver failed.
    pub fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, CudaError> {
        context.bind()?;
        let mut pointer: *mut c_void = std::ptr::null_mut();
        let bytes = bytes.max(16);
        // SAFETY: plain call with a valid pointer under a bound context. No flags: write-combined memory reads slowly.
        check("cuMemHostAlloc", unsafe { sys::cuMemHostAlloc(&raw mut pointer, bytes, 0) })?;
        let pointer = pointer.cast::<u8>();
        // SAFETY: `bytes` bytes were allocated.
        unsafe { pointer.write_bytes(0, bytes) };
        Ok(Self { context: context.clone(), pointer, bytes })
    }

    /// Its length.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The content. The caller has waited for copies into it.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: initialised in `new`; a copy still under way could only change bytes, of which all patterns are valid.
        unsafe { std::slice::from_raw_parts(self.pointer, self.bytes) }
    }

    /// The content, to write. The caller has waited for copies out of it.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as for `as_slice`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.bytes) }
    }

    /// Enqueues a copy of the first `bytes` bytes to the device. The content must stay until the stream got there.
    ///
    /// # Errors
    /// The driver failed.
    ///
    /// # Panics
    /// It does not fit.
    pub fn upload(&self, bytes: usize, to: DeviceSlice, stream: &Stream) -> Result<(), CudaError> {
        self.upload_part(0, bytes, to, stream)
    }

    /// [`Pinned::upload`] of `bytes` bytes from byte `start` on.
    ///
    /// # Errors
    /// The driver failed.
    ///
    /// # Panics
    /// It does not fit.
    pub fn upload_part(
        &self,
        start: usize,
        bytes: usize,
        to: DeviceSlice,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        let fits = start + bytes <= self.bytes && bytes <= to.bytes;
        assert!(fits, "{bytes} bytes from {start} on of {} to {}", self.bytes, to.bytes);
        if bytes == 0 {
            return Ok(());
        }
        stream.bind()?;
        // SAFETY: both sides hold the bytes; the caller keeps them until the copy is done.
        let status = unsafe {
            sys::cuMemcpyHtoDAsync_v2(to.address, self.pointer.add(start).cast(), bytes, stream.raw())
        };
        check("cuMemcpyHtoDAsync", status)
    }

    /// Enqueues a copy from the device to the first bytes.
    ///
    /// # Errors
    /// The driver failed.
    ///
    /// # Panics
    /// It does not fit.
    pub fn download(&mut self, from: DeviceSlice, stream: &Stream) -> Result<(), CudaError> {
        assert!(from.bytes <= self.bytes, "{} bytes into {}", from.bytes, self.bytes);
        stream.bind()?;
        // SAFETY: both sides hold the bytes; the caller reads them after it has waited.
        let status =
            unsafe { sys::cuMemcpyDtoHAsync_v2(self.pointer.cast(), from.address, from.bytes, stream.raw()) };
        check("cuMemcpyDtoHAsync", status)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: allocated in `new`, freed once.
        let _ = unsafe { sys::cuMemFreeHost(self.pointer.cast()) };
    }
}
