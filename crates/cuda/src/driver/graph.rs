//! Launches recorded once and replayed: one call for a whole step.

use std::sync::Arc;

use cudarc::driver::sys;

use super::{Context, CudaError, Stream, check};

/// An executable graph. It holds addresses: what they point to must outlive it.
#[derive(Debug)]
pub struct Graph {
    context: Arc<Context>,
    raw: sys::CUgraphExec,
}

// SAFETY: it is launched by its owner only, on a stream whose context is bound first.
unsafe impl Send for Graph {}

/// A stream that records. Ends by [`Capture::end`], which must be called whatever happens between: a stream that
/// records is of no other use.
#[derive(Debug)]
#[must_use = "the stream records until `end`"]
pub struct Capture(());

impl Stream {
    /// What is enqueued from now on is recorded instead of run.
    ///
    /// # Errors
    /// The driver failed.
    pub fn begin_capture(&self) -> Result<Capture, CudaError> {
        self.bind()?;
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(self.raw(), mode) })?;
        Ok(Capture(()))
    }
}

impl Capture {
    /// Ends the recording of `stream`, which began it.
    ///
    /// # Errors
    /// Something was done that cannot be recorded (waiting, allocating), or the driver failed.
    pub fn end(self, stream: &Stream) -> Result<Graph, CudaError> {
        stream.bind()?;
        let (mut graph, mut raw) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: begun before.
        check("cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(stream.raw(), &raw mut graph) })?;
        // SAFETY: the graph was captured just now; the executable one is a copy.
        let status = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut raw, graph, 0) };
        // SAFETY: as above.
        let _ = unsafe { sys::cuGraphDestroy(graph) };
        check("cuGraphInstantiate", status)?;
        Ok(Graph { context: stream.context().clone(), raw })
    }
}

impl Graph {
    /// Enqueues everything that was recorded.
    ///
    /// # Errors
    /// The driver failed.
    pub fn launch(&self, stream: &Stream) -> Result<(), CudaError> {
        stream.bind()?;
        // SAFETY: both live; the owner keeps what the graph points to.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.raw, stream.raw()) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: instantiated once; the driver defers this until a launch under way is done.
        let _ = unsafe { sys::cuGraphExecDestroy(self.raw) };
    }
}
