//! Memory that kernels read and write: cache-line aligned, and shared between threads in disjoint pieces.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::any::Any;
use std::marker::PhantomData;
use std::sync::Arc;

use quire_backend::BackendError;

use crate::element::Plain;

/// Alignment of every array: a cache line.
const ALIGN: usize = 64;

/// A zeroed, 64-byte aligned array of fixed length. Pages that are never touched cost nothing.
pub struct Aligned<T> {
    /// What the allocator gave: `layout(len)` bytes.
    memory: *mut u8,
    /// First element, inside `memory`.
    start: *mut T,
    len: usize,
}

// SAFETY: it owns its memory like a `Vec<T>`.
unsafe impl<T: Send> Send for Aligned<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Aligned<T> {}

/// Room for `len` elements and for moving the start to a multiple of [`ALIGN`]. The system's allocator hands out fresh
/// zero pages for small alignments only, so the alignment is made by hand.
fn layout<T>(len: usize) -> Option<Layout> {
    let bytes = len.checked_mul(size_of::<T>())?.checked_add(ALIGN)?;
    Layout::from_size_align(bytes, 16).ok()
}

impl<T: Plain> Aligned<T> {
    /// `len` zeros.
    ///
    /// # Errors
    /// Out of memory; `what` names the purpose.
    pub fn zeroed(len: usize, what: &str) -> Result<Self, BackendError> {
        let out_of_memory = |bytes| BackendError::OutOfMemory { what: what.to_owned(), bytes };
        let layout = layout::<T>(len).ok_or_else(|| out_of_memory(usize::MAX))?;
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc_zeroed(layout) };
        if memory.is_null() {
            return Err(out_of_memory(layout.size()));
        }
        ask_for_huge_pages(memory, layout.size());
        // SAFETY: moves by less than ALIGN, and the layout has ALIGN bytes to spare.
        let start = unsafe { memory.add(memory.align_offset(ALIGN)) };
        Ok(Self { memory, start: start.cast(), len })
    }
}

/// Asks the system to back large arrays with large pages: page tables of small ones do not fit the processor's caches. A
/// system that knows no better ignores it.
fn ask_for_huge_pages(memory: *mut u8, len: usize) {
    const HUGE: usize = 2 << 20;
    #[cfg(target_os = "linux")]
    if len >= 2 * HUGE {
        let before = memory.align_offset(HUGE);
        // SAFETY: whole pages within the allocation; the advice changes no content.
        unsafe {
            let start = memory.add(before).cast();
            libc::madvise(start, (len - before) / HUGE * HUGE, libc::MADV_HUGEPAGE);
        }
    }
}

impl<T> Drop for Aligned<T> {
    fn drop(&mut self) {
        let layout = layout::<T>(self.len).expect("it was allocated with this layout");
        // SAFETY: allocated by `zeroed` with this layout; elements need no drop.
        unsafe { dealloc(self.memory, layout) };
    }
}

impl<T: Plain> std::ops::Deref for Aligned<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: `start` begins `len` initialised elements (any bits are a `T`), aligned to 64.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl<T: Plain> std::ops::DerefMut for Aligned<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

/// An array that is never written again: in memory of its own, or part of a mapped file. Clones share it.
pub(crate) struct Frozen<T> {
    start: *const T,
    len: usize,
    /// Keeps the elements where they are.
    owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: it is read alone, and its owner may be dropped on any thread.
unsafe impl<T: Sync> Send for Frozen<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Frozen<T> {}

impl<T: Plain> From<Aligned<T>> for Frozen<T> {
    fn from(array: Aligned<T>) -> Self {
        Self { start: array.start, len: array.len, owner: Arc::new(array) }
    }
}

impl<T: Plain> Frozen<T> {
    /// No elements.
    pub(crate) fn empty() -> Self {
        Self { start: std::ptr::dangling(), len: 0, owner: Arc::new(()) }
    }

    /// The elements that `owner` keeps alive.
    ///
    /// # Safety
    /// `elements` stays valid and unchanged while `owner` lives, wherever `owner` moves.
    pub(crate) unsafe fn borrowed(elements: &[T], owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self { start: elements.as_ptr(), len: elements.len(), owner }
    }

    /// The same memory as bytes.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        // SAFETY: `Plain` types have no padding, and any byte is a `u8`.
        unsafe { std::slice::from_raw_parts(self.start.cast(), self.len * size_of::<T>()) }
    }
}

impl<T> Clone for Frozen<T> {
    fn clone(&self) -> Self {
        Self { start: self.start, len: self.len, owner: Arc::clone(&self.owner) }
    }
}

impl<T: Plain> std::ops::Deref for Frozen<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: `start` begins `len` initialised elements, which `owner` keeps.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

/// Activations `[rows, cols]`.
pub struct CpuBuf {
    pub(crate) values: Aligned<f32>,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl CpuBuf {
    /// Row `t`.
    pub fn row(&self, t: usize) -> &[f32] {
        &self.values[t * self.cols..(t + 1) * self.cols]
    }

    pub(crate) fn shared(&mut self) -> SharedRows<'_> {
        SharedRows::new(&mut self.values, self.cols)
    }
}

/// A slice whose disjoint parts are written by several threads.
#[derive(Clone, Copy)]
pub struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: all access goes through `slice`, whose contract forbids overlap; `T: Send` allows writing from other threads.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Borrows all of `values`.
    pub fn new(values: &'a mut [T]) -> Self {
        Self { start: values.as_mut_ptr(), len: values.len(), borrow: PhantomData }
    }

    /// Elements `start..start + len`; panics if they are not all inside.
    ///
    /// # Safety
    /// While the result lives, no other call of any copy may return an overlapping part.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, start: usize, len: usize) -> &'a mut [T] {
        let end = start.checked_add(len).expect("an index that fits");
        assert!(end <= self.len, "elements {start}..{end} of {}", self.len);
        // SAFETY: in bounds of the borrowed slice; exclusive by contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

impl<T> Shared<'_, T> {
    /// What begins at `start`; panics if that is past the end.
    pub fn after(&self, start: usize) -> Self {
        assert!(start <= self.len, "elements from {start} of {}", self.len);
        // SAFETY: within the borrowed slice, or one past it.
        let begin = unsafe { self.start.add(start) };
        Self { start: begin, len: self.len - start, borrow: PhantomData }
    }

    /// The first of `count` elements that lie `stride` apart; panics if they are not all inside. Only these may be
    /// touched through it, and by one thread at a time.
    #[inline(always)]
    pub fn strided(&self, start: usize, stride: usize, count: usize) -> *mut T {
        let end = count.checked_sub(1).and_then(|n| n.checked_mul(stride)).and_then(|n| n.checked_add(start));
        assert!(
            end.is_some_and(|end| end < self.len),
            "{count} elements from {start} by {stride} of {}",
            self.len
        );
        // SAFETY: `start <= end < len`.
        unsafe { self.start.add(start) }
    }
}

impl<'a> Shared<'a, u32> {
    /// The same memory as halves, the low one first.
    pub const fn halves(&self) -> Shared<'a, u16> {
        Shared { start: self.start.cast(), len: 2 * self.len, borrow: PhantomData }
    }
}

impl<'a> Shared<'a, u16> {
    /// The same memory as signed bytes, the low one first.
    pub const fn bytes(&self) -> Shared<'a, i8> {
        Shared { start: self.start.cast(), len: 2 * self.len, borrow: PhantomData }
    }
}

/// Rows of a buffer, written by several threads.
#[derive(Clone, Copy)]
pub struct SharedRows<'a> {
    pub(crate) cols: usize,
    pub(crate) values: Shared<'a, f32>,
}

impl<'a> SharedRows<'a> {
    /// Consecutive values as rows of `cols`.
    pub(crate) fn new(values: &'a mut [f32], cols: usize) -> Self {
        Self { cols, values: Shared::new(values) }
    }

    /// The rows from `first` on.
    pub(crate) fn after(&self, first: usize) -> Self {
        Self { cols: self.cols, values: self.values.after(first * self.cols) }
    }

    /// Columns `from..from + len` of row `t`.
    ///
    /// # Safety
    /// As [`Shared::slice`].
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, t: usize, from: usize, len: usize) -> &'a mut [f32] {
        assert!(from + len <= self.cols, "columns {from}..{} of {}", from + len, self.cols);
        // SAFETY: the caller's.
        unsafe { self.values.slice(t * self.cols + from, len) }
    }

    /// Row `t`.
    ///
    /// # Safety
    /// As [`Shared::slice`].
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn row(&self, t: usize) -> &'a mut [f32] {
        // SAFETY: the caller's.
        unsafe { self.part(t, 0, self.cols) }
    }
}
