//! Panels that are not whole: the last few elements of a row.

use super::pairs::{PANEL, PairDot};

/// The first `len` of a panel, zeros after them.
///
/// # Safety
/// As for [`PairDot`]; `from` must be valid for `len` elements, at most [`PANEL`].
#[inline(always)]
pub(crate) unsafe fn load_some<D: PairDot>(from: *const f32, len: usize) -> D::V {
    // SAFETY: the caller's; the array is a panel.
    unsafe {
        if len == PANEL {
            return D::load_sums(from);
        }
        let mut padded = [0.0; PANEL];
        std::ptr::copy_nonoverlapping(from, padded.as_mut_ptr(), len);
        D::load_sums(padded.as_ptr())
    }
}

/// Stores the first `len` of a panel.
///
/// # Safety
/// As for [`load_some`].
#[inline(always)]
pub(crate) unsafe fn store_some<D: PairDot>(to: *mut f32, len: usize, x: D::V) {
    // SAFETY: as above.
    unsafe {
        if len == PANEL {
            return D::store(to, x);
        }
        let mut padded = [0.0; PANEL];
        D::store(padded.as_mut_ptr(), x);
        std::ptr::copy_nonoverlapping(padded.as_ptr(), to, len);
    }
}
