//! Time on the device: points of its stream, and the rates that operations are held against.

use quire_backend::BackendError;

use crate::Cuda;
use crate::blaslt::{Element, GemmShape};
use crate::driver::{Arena, CudaError, DeviceSlice, Event};

/// Side of the product that is measured, per multiprocessor: 8448 on an H200, whose every tile is then in use.
const GEMM_SIDE_PER_SM: usize = 64;
/// Bytes that are copied, per multiprocessor: more than 1 GiB on an H200, so that no cache helps.
const COPY_BYTES_PER_SM: usize = 8 << 20;
const WARMUPS: usize = 3;
const REPEATS: usize = 10;

/// What the device can do at most.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peaks {
    /// Bytes read and written per second by a copy within the device.
    pub copy_bytes_s: f64,
    /// Floating-point operations per second of a large product of random numbers; a multiply-add counts two.
    pub gemm_flop_s: f64,
}

impl Cuda {
    /// A point of the stream behind everything enqueued so far; [`Event::milliseconds_since`] tells the time between two,
    /// once the device got there.
    ///
    /// # Errors
    /// The driver failed.
    pub fn timestamp(&self) -> Result<Event, BackendError> {
        let event = Event::timed(&self.context).and_then(|event| event.record(&self.stream).map(|()| event));
        event.map_err(|error| self.refused(error.to_string()))
    }

    /// Measures the device; takes some tens of milliseconds and gives back the memory that it needed.
    ///
    /// # Errors
    /// Out of memory, or the device failed.
    pub fn peaks(&mut self) -> Result<Peaks, BackendError> {
        let measured = self.copy_rate().and_then(|copy_bytes_s| {
            let gemm_flop_s = self.gemm_rate()?;
            Ok(Peaks { copy_bytes_s, gemm_flop_s })
        });
        self.check(measured)
    }

    fn copy_rate(&mut self) -> Result<f64, CudaError> {
        let bytes = COPY_BYTES_PER_SM * self.context.sm_count() as usize;
        let mut arena = Arena::new(self.context.clone(), 0);
        let (from, to) = (arena.alloc(bytes)?, arena.alloc(bytes)?);
        self.stream.fill(from, 1)?;
        let seconds = self.seconds_each(|cuda| cuda.stream.copy(from, to))?;
        Ok(2.0 * bytes as f64 / seconds)
    }

    fn gemm_rate(&mut self) -> Result<f64, CudaError> {
        let side = GEMM_SIDE_PER_SM * self.context.sm_count() as usize;
        let element = self.options.activations;
        let bytes = side * side * element.size();
        let mut arena = Arena::new(self.context.clone(), 0);
        let (weight, x, out) = (arena.alloc(bytes)?, arena.alloc(bytes)?, arena.alloc(bytes)?);
        for (seed, slice) in [(1, weight), (2, x)] {
            self.fill_random(slice, element, seed)?;
        }
        let shape = GemmShape {
            n: side,
            k: side,
            x_stride: side,
            out_stride: side,
            input: element,
            output: element,
            bias: None,
        };
        let gemm = self.blas.plan(shape, weight, DeviceSlice::NULL, &self.stream)?;
        let seconds = self.seconds_each(|cuda| cuda.blas.matmul(&gemm, x, out, side, &cuda.stream))?;
        Ok(2.0 * (side as f64).powi(3) / seconds)
    }

    /// Mean time of one of several repeated pieces of work.
    fn seconds_each(
        &mut self,
        mut work: impl FnMut(&mut Self) -> Result<(), CudaError>,
    ) -> Result<f64, CudaError> {
        (0..WARMUPS).try_for_each(|_| work(self))?;
        let (begin, end) = (Event::timed(&self.context)?, Event::timed(&self.context)?);
        begin.record(&self.stream)?;
        (0..REPEATS).try_for_each(|_| work(self))?;
        end.record(&self.stream)?;
        end.synchronize()?;
        Ok(f64::from(end.milliseconds_since(&begin)?) / 1e3 / REPEATS as f64)
    }

    /// Numbers between -1 and 1: zeros would be multiplied with less power, and so faster.
    fn fill_random(&mut self, slice: DeviceSlice, element: Element, seed: u64) -> Result<(), CudaError> {
        let mut state = seed;
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let mut bytes = Vec::new();
        let values = (0..slice.bytes() / element.size()).map(|_| draw());
        crate::buffers::encode(values, element, &mut bytes);
        let Self { staging, stream, .. } = self;
        staging.upload(&bytes, slice, stream)?;
        stream.synchronize()?;
        staging.next(stream)
    }
}
