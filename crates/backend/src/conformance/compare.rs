//! How results are compared.

use std::fmt::Display;

/// The largest magnitude.
pub(super) fn largest<'a>(values: impl IntoIterator<Item = &'a f32>) -> f32 {
    values.into_iter().fold(0.0, |largest, value| value.abs().max(largest))
}

/// What tolerances are relative to: the largest magnitude, or 1.
pub(super) fn scale<'a>(values: impl IntoIterator<Item = &'a f32>) -> f32 {
    largest(values).max(1.0)
}

/// The same number of columns, each within `bound`; a NaN never is. `what` names the row.
///
/// # Panics
/// They are not.
pub(super) fn assert_close(what: impl Display, want: &[f32], have: &[f32], bound: f32) {
    assert_eq!(want.len(), have.len(), "{what}: width");
    for (i, (want, have)) in want.iter().zip(have).enumerate() {
        assert!(
            (want - have).abs() <= bound,
            "{what}, column {i}: expected {want:e}, got {have:e}, which is not within {bound:e}"
        );
    }
}

pub(super) fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_close_within_the_bound_and_never_if_not_a_number() {
        assert_close("equal", &[1.0, -2.0], &[1.0, -2.0], 0.0);
        assert_close("within", &[1.0], &[1.25], 0.25);
        for (have, bound) in
            [(&[1.5][..], 0.25), (&[f32::NAN], f32::INFINITY), (&[], 1.0), (&[1.0, 1.0], 1.0)]
        {
            let outcome = std::panic::catch_unwind(|| assert_close("row", &[1.0], have, bound));
            assert!(outcome.is_err(), "{have:?} within {bound}");
        }
        assert_eq!((scale(&[0.5, -0.25]), scale(&[2.0, -3.0]), largest(&[0.5, -0.75])), (1.0, 3.0, 0.75));
    }
}
