//! The largest of a row of logits and where it is, in one pass over memory.

use quire_core::TokenId;

use crate::simd::{Isa, Kernel, LANES, Simd, dispatch};

/// Logits of a piece. Its largest is known apart, so the token is found by looking at one piece again.
const PIECE: usize = 2048;
/// Vectors at once: each maximum waits for the one before.
const WIDE: usize = 4;

/// The largest logit.
#[derive(Clone, Copy)]
pub(crate) struct Highest {
    pub logit: f32,
    /// Where the first piece with it begins.
    piece: usize,
}

impl Highest {
    /// Of logits that are not NaN.
    pub(crate) fn of(isa: Isa, logits: &[f32]) -> Self {
        // SAFETY: `isa` was detected.
        unsafe { dispatch(isa, Scan(logits)) }.0
    }

    /// The lowest id that has it.
    pub(crate) fn id(self, logits: &[f32]) -> TokenId {
        let found = logits[self.piece..].iter().position(|&l| l == self.logit);
        found.map_or(0, |i| (self.piece + i) as TokenId)
    }
}

/// NaN to -∞, +∞ to the largest finite number; writes only if there are any.
pub(crate) fn sanitize(isa: Isa, logits: &mut [f32]) -> Highest {
    // SAFETY: `isa` was detected.
    let (highest, all_finite) = unsafe { dispatch(isa, Scan(logits)) };
    if all_finite {
        return highest;
    }
    logits.iter_mut().for_each(|l| *l = sanitized(*l));
    Highest::of(isa, logits)
}

pub(crate) fn sanitized(l: f32) -> f32 {
    // `min` would turn NaN into MAX, so look at it first.
    if l.is_nan() { f32::NEG_INFINITY } else { l.min(f32::MAX) }
}

/// The largest, if no number is NaN, and whether all are finite.
struct Scan<'a>(&'a [f32]);

impl Kernel for Scan<'_> {
    type Output = (Highest, bool);

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> (Highest, bool) {
        let mut highest = Highest { logit: f32::NEG_INFINITY, piece: 0 };
        let mut all_finite = true;
        for (i, piece) in self.0.chunks(PIECE).enumerate() {
            let (vectors, rest) = piece.as_chunks::<{ WIDE * LANES }>();
            // Zero times a number is zero, unless it is not finite.
            let (mut largest, mut zeros) = ([f32::NEG_INFINITY; LANES], [0.0; LANES]);
            // SAFETY: every chunk holds WIDE vectors, arrays one; the rest is the caller's.
            unsafe {
                let mut most = [S::splat(f32::NEG_INFINITY); WIDE];
                let mut products = [S::splat(0.0); WIDE];
                for v in vectors {
                    for j in 0..WIDE {
                        let x = S::load(v.as_ptr().add(j * LANES));
                        most[j] = S::max(x, most[j]);
                        products[j] = S::fma(x, S::splat(0.0), products[j]);
                    }
                }
                S::store(largest.as_mut_ptr(), S::max(S::max(most[0], most[1]), S::max(most[2], most[3])));
                let [a, b, c, d] = products;
                S::store(zeros.as_mut_ptr(), S::add(S::add(a, b), S::add(c, d)));
            }
            let logit = largest.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
            all_finite &= zeros.iter().all(|zero| *zero == 0.0) && rest.iter().all(|l| l.is_finite());
            if logit > highest.logit {
                highest = Highest { logit, piece: i * PIECE };
            }
        }
        (highest, all_finite)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(len: usize) -> Vec<f32> {
        (0..len).map(|i| (i * 7919 % 10_007) as f32 / -100.0).collect()
    }

    #[test]
    fn the_lowest_of_equal_tokens_is_found_wherever_it_is() {
        let len = 2 * PIECE + WIDE * LANES + 3;
        for at in [0, 1, PIECE - 1, PIECE, 2 * PIECE + 5, len - 2] {
            let mut logits = row(len);
            (logits[at], logits[len - 1]) = (7.5, 7.5);
            for isa in Isa::available() {
                let highest = sanitize(isa, &mut logits);
                assert_eq!(
                    (highest.logit, highest.id(&logits)),
                    (7.5, at as TokenId),
                    "{isa:?}, {at} of {len}"
                );
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_replaced_wherever_it_is() {
        for at in [0, 33, PIECE + 1, 2 * PIECE] {
            for isa in Isa::available() {
                for (bad, good) in [(f32::NAN, f32::NEG_INFINITY), (f32::INFINITY, f32::MAX)] {
                    let mut logits = row(2 * PIECE + 1);
                    let mut expected = logits.clone();
                    (logits[at], expected[at]) = (bad, good);
                    let highest = sanitize(isa, &mut logits);
                    assert_eq!(logits, expected, "{isa:?}, {bad} at {at}");
                    let best = expected.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    assert_eq!(highest.logit, best, "{isa:?}, {bad} at {at}");
                }
                let mut nothing = vec![f32::NAN; PIECE + 9];
                let highest = sanitize(isa, &mut nothing);
                assert_eq!((highest.logit, highest.id(&nothing)), (f32::NEG_INFINITY, 0));
            }
        }
    }
}
