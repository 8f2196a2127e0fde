//! The operations between the GPUs of a tensor-parallel group.

use quire_backend::{AllGather, AllReduce, BackendError};
use quire_core::Shard;

use crate::Cuda;
use crate::blaslt::Element;

impl Cuda {
    /// Nothing on the only GPU.
    pub(crate) fn sum_rows(&mut self, op: &AllReduce<'_, Self>) -> Result<(), BackendError> {
        let Some(communicator) = &self.communicator else { return Ok(()) };
        let buf = &*op.buf;
        if buf.rows < self.rows {
            return Err(self.refused(format!("all_reduce: {} rows of a buffer of {}", self.rows, buf.rows)));
        }
        let used = buf.slice.part(0, self.rows * buf.stride * buf.element.size());
        let enqueued = communicator.all_reduce(used, buf.element, &self.stream);
        self.check(enqueued)
    }

    /// NCCL gathers equal pieces one after the other, so rows are copied to this rank's piece before, and out of all pieces
    /// behind.
    pub(crate) fn gather_logits(&mut self, op: &AllGather<'_, Self>) -> Result<(), BackendError> {
        let Some((rank, world)) = self.communicator.as_ref().map(|own| (own.rank(), own.world())) else {
            return Err(self.refused("all_gather: there is one GPU".into()));
        };
        let (part, out, rows) = (op.part, &*op.out, self.logit_launch_rows);
        let columns = |rank: usize| Shard { rank: rank as u32, world: world as u32 }.range(out.cols);
        if rows > part.rows || rows > out.rows || part.cols != columns(rank).len() {
            let (part, out) = ((part.rows, part.cols), (out.rows, out.cols));
            return Err(
                self.refused(format!("all_gather: {rows} rows of {part:?} into {out:?} on {world} GPUs"))
            );
        }
        let size = Element::F32.size();
        let pitch = columns(0).len() * size;
        if self.logit_parts.bytes() < world * part.rows * pitch {
            self.logit_parts = self.take("logits of all GPUs", world * part.rows * pitch)?;
        }
        let all = self.logit_parts.part(0, world * rows * pitch);
        let piece = |rank: usize| (all.part(rank * rows * pitch, rows * pitch), pitch);
        let (own, stream) = ((part.slice, part.stride * size), &self.stream);
        let mut enqueued = stream.copy_rows(own, piece(rank), part.cols * size, rows);
        if let (Ok(()), Some(communicator)) = (&enqueued, &self.communicator) {
            enqueued = communicator.all_gather(all, Element::F32, stream);
        }
        for rank in 0..world {
            let columns = columns(rank);
            let skipped = columns.start * size;
            let to = (out.slice.part(skipped, out.slice.bytes() - skipped), out.stride * size);
            enqueued = enqueued.and_then(|()| stream.copy_rows(piece(rank), to, columns.len() * size, rows));
        }
        self.check(enqueued)
    }
}
