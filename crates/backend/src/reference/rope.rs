//! Rotary embedding (RoFormer, arXiv 2104.09864), half-split layout.

use crate::RopeTable;

/// Rotates the first `2 * inv_freq.len()` elements of one head; the rest stays.
pub(super) fn rotate(head: &mut [f32], table: &RopeTable, position: u32) {
    let half = table.inv_freq.len();
    for i in 0..half {
        let (sin, cos) = table.sin_cos(position, i);
        let (a, b) = (head[i], head[i + half]);
        head[i] = a * cos - b * sin;
        head[i + half] = b * cos + a * sin;
    }
}
