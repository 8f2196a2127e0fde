//! The operations, one family a file. Each splits its work over the pool and runs a [`crate::simd::Kernel`] per piece.

pub mod attention;
pub mod dot;
pub mod embed;
pub mod gemm;
pub(crate) mod highest;
pub(crate) mod int_gemm;
pub mod linear;
pub(crate) mod lora;
pub mod mlp;
pub(crate) mod moe;
pub mod norm;
pub(crate) mod paged;
pub mod rope;
pub mod sample;
mod sink;
pub(crate) mod soft_cap;
pub(crate) mod tiles;
mod topk;

/// Least work of one piece, in multiply-adds: about as long as waking a thread takes.
pub(crate) const MIN_WORK: usize = 16 * 1024;

/// How many items make a piece, if one item costs `work_per_item` multiply-adds: enough to pay for the hand-over, and
/// about eight pieces a thread, so that a thread that is interrupted does not hold up the others.
pub(crate) fn grain(items: usize, work_per_item: usize, threads: usize) -> usize {
    let worthwhile = MIN_WORK.div_ceil(work_per_item.max(1));
    let balanced = items / (threads * 8);
    worthwhile.max(balanced).max(1)
}
