//! Dot products of `R` stored rows with `M` f32 vectors: the one inner loop of linear layers and of attention scores.
//!
//! Lane `l` adds the products `i = l, l + LANES, …` in order; the lanes are then added by a fixed tree. `R` and `M` only say
//! how many such sums run side by side, so they never change a bit.

use crate::element::Element;
use crate::simd::{LANES, Simd, load_partial};

/// `out[r][m] = rows[r] · xs[m]`, both of length `k`.
///
/// # Safety
/// As for [`Simd`]; every pointer is valid for `k` elements.
#[inline(always)]
pub(crate) unsafe fn dot_tile<S: Simd, E: Element, const R: usize, const M: usize>(
    rows: [*const E; R],
    xs: [*const f32; M],
    k: usize,
) -> [[f32; M]; R] {
    // SAFETY: offsets stay below `k`; the rest is the caller's.
    unsafe {
        let mut acc = [[S::splat(0.0); M]; R];
        let full = k - k % LANES;
        let mut i = 0;
        while i < full {
            let mut x = [S::splat(0.0); M];
            for m in 0..M {
                x[m] = S::load(xs[m].add(i));
            }
            for r in 0..R {
                let w = E::load::<S>(rows[r].add(i));
                for m in 0..M {
                    acc[r][m] = S::fma(w, x[m], acc[r][m]);
                }
            }
            i += LANES;
        }
        if full < k {
            let rest = k - full;
            let mut x = [S::splat(0.0); M];
            for m in 0..M {
                x[m] = load_partial::<S>(xs[m].add(full), rest);
            }
            for r in 0..R {
                let w = E::load_partial::<S>(rows[r].add(full), rest);
                for m in 0..M {
                    acc[r][m] = S::fma(w, x[m], acc[r][m]);
                }
            }
        }
        let mut out = [[0.0; M]; R];
        for r in 0..R {
            for m in 0..M {
                out[r][m] = S::sum(acc[r][m]);
            }
        }
        out
    }
}
