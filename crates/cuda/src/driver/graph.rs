//! Launches recorded once and replayed: one call for a whole step.

use cudarc::driver::sys;

use super::{CudaError, Stream, check};

/// An executable graph. It holds addresses: what they point to must outlive it.
#[derive(Debug)]
pub struct Graph {
    raw: sys::CUgraphExec,
}

// SAFETY: it is launched by its owner only, on a stream whose context is bound first.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `body` enqueues on `stream` instead of running it.
    ///
    /// # Errors
    /// Those of `body`; or it did what cannot be recorded (waiting, allocating), or the driver failed.
    pub fn capture<E: From<CudaError>>(
        stream: &Stream,
        body: impl FnOnce() -> Result<(), E>,
    ) -> Result<Self, E> {
        stream.bind()?;
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(stream.raw(), mode) })?;
        let outcome = body();
        let mut graph = std::ptr::null_mut();
        // SAFETY: begun above; ended also if the body failed, since the stream would be of no use otherwise.
        let ended = unsafe { sys::cuStreamEndCapture(stream.raw(), &raw mut graph) };
        let instantiated = outcome.and_then(|()| {
            check("cuStreamEndCapture", ended)?;
            let mut raw = std::ptr::null_mut();
            // SAFETY: the graph was captured just now.
            let status = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut raw, graph, 0) };
            check("cuGraphInstantiate", status)?;
            Ok(Self { raw })
        });
        if !graph.is_null() {
            // SAFETY: the executable graph is a copy.
            let _ = unsafe { sys::cuGraphDestroy(graph) };
        }
        instantiated
    }

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
        // SAFETY: instantiated once; the driver defers this until a launch under way is done.
        let _ = unsafe { sys::cuGraphExecDestroy(self.raw) };
    }
}
