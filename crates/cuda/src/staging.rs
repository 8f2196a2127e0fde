//! Host to device without waiting: bytes are copied into pinned memory, and from there by the stream.

use std::sync::Arc;

use crate::driver::{Context, CudaError, DeviceSlice, Event, Pinned, Stream};

/// Steps that may be in flight, and one more so that the host need not wait for the oldest's copies.
pub const RING: usize = 4;

/// Where copies begin within pinned memory.
const ALIGNMENT: usize = 64;

/// A ring of pinned buffers, one a step: what a step's copies read is not written again before they are done.
#[derive(Debug)]
pub struct Staging {
    buffers: Vec<(Pinned, Event)>,
    current: usize,
    used: usize,
}

impl Staging {
    /// `RING` buffers of `bytes` bytes.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, CudaError> {
        let buffer = |_| Ok((Pinned::new(context, bytes)?, Event::new(context)?));
        Ok(Self { buffers: (0..RING).map(buffer).collect::<Result<_, CudaError>>()?, current: 0, used: 0 })
    }

    /// Turns to the next buffer; what was copied out of the present one is marked in `stream`. Waits only if the next one
    /// is still being read, which a bounded number of steps in flight rules out.
    ///
    /// # Errors
    /// The driver failed.
    pub fn next(&mut self, stream: &Stream) -> Result<(), CudaError> {
        self.buffers[self.current].1.record(stream)?;
        self.current = (self.current + 1) % RING;
        self.used = 0;
        self.buffers[self.current].1.synchronize()
    }

    /// Enqueues a copy of `bytes` to the front of `to`. If they are more than what is left of the buffer, it waits for
    /// the stream: that is for sequences that enter the batch with a long history, not for steady steps.
    ///
    /// # Errors
    /// The driver failed.
    pub fn upload(&mut self, bytes: &[u8], to: DeviceSlice, stream: &Stream) -> Result<(), CudaError> {
        let capacity = self.buffers[self.current].0.bytes();
        let mut done = 0;
        while done < bytes.len() {
            if self.used + ALIGNMENT > capacity {
                stream.synchronize()?;
                self.used = 0;
            }
            let start = self.used;
            let piece = (bytes.len() - done).min(capacity - start);
            let pinned = &mut self.buffers[self.current].0;
            pinned.as_mut_slice()[start..start + piece].copy_from_slice(&bytes[done..done + piece]);
            pinned.upload_part(start, piece, to.part(done, piece), stream)?;
            self.used = (start + piece).next_multiple_of(ALIGNMENT);
            done += piece;
        }
        Ok(())
    }
}

/// The bytes of plain 32-bit numbers.
pub fn bytes_of_i32(values: &[i32]) -> &[u8] {
    // SAFETY: every i32 is four initialised bytes.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// As [`bytes_of_i32`].
pub fn bytes_of_u32(values: &[u32]) -> &[u8] {
    // SAFETY: every u32 is four initialised bytes.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}
