//! NCCL: sums and gathers between the GPUs of a tensor-parallel group, enqueued on a stream like everything else and
//! recorded in graphs.
//!
//! The library is opened when a model is split over GPUs, by the name under which it is installed: `libnccl.so.2`, which
//! cudarc does not look for. Five functions are all that is used of it, the same since NCCL 2.10.
//!
//! A member that is dropped, whether its step failed or the program ends, aborts the whole group: kernels that wait for
//! it end, and every later call of the others is an error. Graphs that hold collectives must be dropped before the member,
//! as NCCL demands.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use cudarc::driver::sys::CUstream;
use libloading::Library;

use crate::blaslt::Element;
use crate::driver::{Context, CudaError, DeviceSlice, Stream, Unavailable};

/// What packages install; the second name comes with headers only.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// How long an enqueueing may take. Longest is the first of a kind, in which GPUs connect.
const PATIENCE: Duration = Duration::from_secs(1);

/// `ncclSum`.
const SUM: c_int = 0;

/// `ncclComm_t`.
type Comm = *mut c_void;

type InitAll = unsafe extern "C" fn(*mut Comm, c_int, *const c_int) -> c_int;
type AllReduce =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, CUstream) -> c_int;
type AllGather = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Comm, CUstream) -> c_int;
type Abort = unsafe extern "C" fn(Comm) -> c_int;
type ErrorString = unsafe extern "C" fn(c_int) -> *const c_char;

/// The functions, in a library that stays open.
struct Nccl {
    init_all: InitAll,
    all_reduce: AllReduce,
    all_gather: AllGather,
    abort: Abort,
    error_string: ErrorString,
    _library: Library,
}

/// `ncclDataType_t`.
const fn raw(element: Element) -> c_int {
    match element {
        Element::F16 => 6,
        Element::F32 => 7,
        Element::Bf16 => 9,
        Element::E4m3 => 10,
    }
}

impl Nccl {
    fn get() -> Result<&'static Self, Unavailable> {
        static NCCL: OnceLock<Result<Nccl, Unavailable>> = OnceLock::new();
        NCCL.get_or_init(Self::load).as_ref().map_err(Clone::clone)
    }

    fn load() -> Result<Self, Unavailable> {
        // SAFETY: NCCL's initialisers do nothing that its callers must see to.
        let mut opened = NAMES.iter().filter_map(|name| unsafe { Library::new(*name) }.ok());
        let library = opened.next().ok_or(Unavailable::NoNccl)?;
        // SAFETY: the types are those of nccl.h.
        let found = unsafe {
            (|| {
                Ok((
                    *library.get::<InitAll>(b"ncclCommInitAll")?,
                    *library.get::<AllReduce>(b"ncclAllReduce")?,
                    *library.get::<AllGather>(b"ncclAllGather")?,
                    *library.get::<Abort>(b"ncclCommAbort")?,
                    *library.get::<ErrorString>(b"ncclGetErrorString")?,
                ))
            })()
        };
        let found = found.map_err(|error: libloading::Error| Unavailable::Failed(format!("NCCL: {error}")));
        let (init_all, all_reduce, all_gather, abort, error_string) = found?;
        Ok(Self { init_all, all_reduce, all_gather, abort, error_string, _library: library })
    }

    fn check(&self, call: &'static str, status: c_int) -> Result<(), CudaError> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: it takes any number, and returns a static string.
        let text = unsafe { CStr::from_ptr((self.error_string)(status)) };
        Err(CudaError::new(call, text.to_string_lossy()))
    }
}

/// One GPU's membership of a group.
pub(crate) struct Communicator {
    rank: usize,
    group: Arc<Group>,
    context: Arc<Context>,
}

struct Group {
    nccl: &'static Nccl,
    /// By rank; `None` once it was aborted.
    comms: Vec<Mutex<Option<Member>>>,
    is_broken: AtomicBool,
}

struct Member(Comm);

// SAFETY: NCCL's objects may be used from any thread, one at a time; a mutex sees to that.
unsafe impl Send for Member {}

impl Communicator {
    /// A group of the GPUs of `contexts`, in this order. Blocks until all have found one another.
    pub(crate) fn group(contexts: &[Arc<Context>]) -> Result<Vec<Self>, Unavailable> {
        let nccl = Nccl::get()?;
        let ordinals: Vec<_> = contexts.iter().map(|context| context.ordinal() as c_int).collect();
        let mut comms = vec![std::ptr::null_mut(); contexts.len()];
        // SAFETY: both arrays have as many elements as the call is told.
        let status =
            unsafe { (nccl.init_all)(comms.as_mut_ptr(), ordinals.len() as c_int, ordinals.as_ptr()) };
        // It may have bound contexts of its own choice.
        Context::forget_bound();
        nccl.check("ncclCommInitAll", status).map_err(|error| Unavailable::Failed(error.to_string()))?;
        let comms = comms.into_iter().map(|comm| Mutex::new(Some(Member(comm)))).collect();
        let group = Arc::new(Group { nccl, comms, is_broken: AtomicBool::new(false) });
        let member = |(rank, context): (usize, &Arc<Context>)| Self {
            rank,
            group: group.clone(),
            context: context.clone(),
        };
        Ok(contexts.iter().enumerate().map(member).collect())
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn world(&self) -> usize {
        self.group.comms.len()
    }

    /// Whether a member is gone.
    pub(crate) fn is_broken(&self) -> bool {
        self.group.is_broken.load(Ordering::Acquire)
    }

    /// Enqueues `buf = sum over the ranks of buf`. Every rank gets the same bits: each sum is made once, and sent on.
    pub(crate) fn all_reduce(
        &self,
        buf: DeviceSlice,
        element: Element,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        let (address, count) = (buf.address() as *mut c_void, buf.bytes() / element.size());
        self.enqueue("ncclAllReduce", stream, |nccl, comm| {
            // SAFETY: the slice holds the elements, in an arena that outlives the work enqueued on it; in place is allowed.
            unsafe { (nccl.all_reduce)(address, address, count, raw(element), SUM, comm, stream.raw()) }
        })
    }

    /// Enqueues `all = all pieces`, of which this rank's lies in its place already.
    pub(crate) fn all_gather(
        &self,
        all: DeviceSlice,
        element: Element,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        let bytes = all.bytes() / self.world();
        let own = all.part(self.rank * bytes, bytes).address() as *const c_void;
        let (all, count) = (all.address() as *mut c_void, bytes / element.size());
        self.enqueue("ncclAllGather", stream, |nccl, comm| {
            // SAFETY: as above; in place means that the piece sent is the one of this rank.
            unsafe { (nccl.all_gather)(own, all, count, raw(element), comm, stream.raw()) }
        })
    }

    fn enqueue(
        &self,
        call: &'static str,
        stream: &Stream,
        enqueue: impl FnOnce(&Nccl, Comm) -> c_int,
    ) -> Result<(), CudaError> {
        stream.bind()?;
        let member = self.group.comms[self.rank].lock().unwrap_or_else(PoisonError::into_inner);
        match &*member {
            Some(Member(comm)) => self.group.nccl.check(call, enqueue(self.group.nccl, *comm)),
            None => Err(CudaError::new(call, "another tensor-parallel rank has stopped")),
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.group.is_broken.store(true, Ordering::Release);
        let _ = self.context.bind();
        for member in &self.group.comms {
            // Not held during the call, which waits until the owner has dropped its graphs.
            if let Some(Member(comm)) = take(member) {
                // SAFETY: made in `group`, and taken out by the only one that aborts it.
                unsafe { (self.group.nccl.abort)(comm) };
            }
        }
        Context::forget_bound();
    }
}

/// Takes a member out, unless its thread is inside NCCL for longer than [`PATIENCE`]: then it is left to the end of the
/// process, which is near.
fn take(member: &Mutex<Option<Member>>) -> Option<Member> {
    let begin = Instant::now();
    loop {
        match member.try_lock() {
            Ok(mut member) => return member.take(),
            Err(TryLockError::Poisoned(member)) => return member.into_inner().take(),
            Err(TryLockError::WouldBlock) if begin.elapsed() > PATIENCE => return None,
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

impl std::fmt::Debug for Communicator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of {}", self.rank, self.world())
    }
}
