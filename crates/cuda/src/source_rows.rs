//! The rows of a layer's parts, one part after the other, converted on all cores.

use std::ops::Range;
use std::thread;

use quire_backend::convert::{matrix_shape, to_f32};
use quire_backend::quant::check_finite;
use quire_backend::{BackendError, LinearSource};
use quire_core::TensorView;

use crate::load::PIECE;

/// Rows in pieces of about [`PIECE`] elements that begin at multiples of `multiple`, as many at a time as there are
/// cores.
pub(crate) fn pieces(out_features: usize, in_features: usize, multiple: usize) -> Vec<Vec<Range<usize>>> {
    let rows = (PIECE / in_features.max(1)).max(1).next_multiple_of(multiple);
    let piece = |first: usize| first..(first + rows).min(out_features);
    let all: Vec<_> = (0..out_features).step_by(rows).map(piece).collect();
    all.chunks(thread::available_parallelism().map_or(1, usize::from)).map(<[_]>::to_vec).collect()
}

/// `work` on each piece, a thread each; what they give, in order.
pub(crate) fn on_all_cores<T: Send>(
    pieces: &[Range<usize>],
    work: impl Fn(Range<usize>) -> Result<T, BackendError> + Sync,
) -> Vec<Result<T, BackendError>> {
    thread::scope(|scope| {
        let work = &work;
        let workers: Vec<_> = pieces.iter().cloned().map(|piece| scope.spawn(move || work(piece))).collect();
        let join = |worker: thread::ScopedJoinHandle<'_, _>| {
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        workers.into_iter().map(join).collect()
    })
}

/// Some rows with their numbers.
///
/// # Errors
/// One is not finite.
pub(crate) fn for_each_row(
    source: &LinearSource<'_>,
    rows: Range<usize>,
    mut take: impl FnMut(usize, &[f32]),
) -> Result<(), BackendError> {
    let name = source.name;
    let mut part_begin = 0;
    for part in source.parts {
        let (part_rows, in_features) = matrix_shape(name, &part.weight)?;
        let part_end = part_begin + part_rows;
        let row_bytes = in_features * part.weight.dtype.size();
        for n in rows.start.max(part_begin)..rows.end.min(part_end) {
            let data = &part.weight.data[(n - part_begin) * row_bytes..][..row_bytes];
            let row = to_f32(name, &TensorView { dtype: part.weight.dtype, shape: &[in_features], data })?;
            check_finite(name, n, &row)?;
            take(n, &row);
        }
        part_begin = part_end;
    }
    Ok(())
}
