//! The doubles of the driver, of cuBLASLt and of NCCL: built, loaded where the backend will look for them, and controlled from here.
//!
//! Each [`MockGpu`] is a device of its own, so tests run side by side.
//!
//! Where `QUIRE_TEST_IMAGES` names a folder of fatbins, the real GPU 0 and the real libraries take the place of the
//! double: see `tests/gpu/run`. Nothing is counted then, and faults cannot be injected.

use std::ffi::{CString, c_char, c_int, c_long, c_void};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use super::build::{compiler, files};
use super::double;
use super::kernels::HostKernels;

/// An image that the double accepts, and finds every kernel of the host library in; or the real ones.
pub fn images() -> &'static [(&'static str, &'static [u8])] {
    static REAL: OnceLock<Vec<(&str, &[u8])>> = OnceLock::new();
    let Some(folder) = real_images() else { return &[("host", b"mock")] };
    REAL.get_or_init(|| {
        let read = |path: PathBuf| {
            let name = path.file_stem().expect("it has an extension").to_string_lossy().into_owned();
            let image = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            // Kept to the end of the process.
            (&*name.leak(), &*image.leak())
        };
        files(&folder, &["fatbin"]).into_iter().map(read).collect()
    })
}

/// The folder of images for a real GPU.
fn real_images() -> Option<PathBuf> {
    std::env::var_os("QUIRE_TEST_IMAGES").map(PathBuf::from)
}

/// `CUDA_ERROR_ILLEGAL_ADDRESS`.
pub const ILLEGAL_ADDRESS: i32 = 700;

/// As in `mock.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MockCounters {
    pub launches: u64,
    pub direct_launches: u64,
    pub pdl_launches: u64,
    pub matmuls: u64,
    pub collectives: u64,
    pub graph_launches: u64,
    pub graph_nodes: u64,
    pub host_to_device: u64,
    pub device_to_host: u64,
    pub device_to_device: u64,
    pub memsets: u64,
    pub host_to_device_bytes: u64,
    pub synchronizations: u64,
    pub work: u64,
    pub allocations: u64,
    pub live_allocations: u64,
    pub live_bytes: u64,
    pub live_pinned: u64,
    pub live_streams: u64,
    pub live_events: u64,
    pub live_modules: u64,
    pub live_graphs: u64,
}

struct Mock {
    driver: Library,
    _cublaslt: Library,
    _nccl: Library,
}

/// One device of the double, for one test.
pub struct MockGpu {
    ordinal: u32,
    /// `None`: a real GPU.
    mock: Option<&'static Mock>,
}

impl MockGpu {
    /// A device that nobody else uses. `None`, with a line that says why, if there is no `g++`.
    ///
    /// # Panics
    /// The sources do not compile.
    pub fn new() -> Option<Self> {
        if real_images().is_some() {
            return Some(Self { ordinal: 0, mock: None });
        }
        static MOCK: OnceLock<Option<Mock>> = OnceLock::new();
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mock = MOCK.get_or_init(load).as_ref()?;
        Some(Self { ordinal: NEXT.fetch_add(1, Ordering::Relaxed), mock: Some(mock) })
    }

    /// Whether it is the double.
    pub fn is_mock(&self) -> bool {
        self.mock.is_some()
    }

    pub fn ordinal(&self) -> u32 {
        self.ordinal
    }

    pub fn counters(&self) -> MockCounters {
        let mut counters = MockCounters::default();
        // SAFETY: the function and the struct are those of mock.h.
        unsafe {
            if let Some(read) =
                self.control::<unsafe extern "C" fn(c_int, *mut MockCounters)>("mock_counters")
            {
                read(self.ordinal as c_int, &raw mut counters);
            }
        }
        counters
    }

    /// Launches of one kernel, replayed ones included.
    pub fn launches_of(&self, kernel: &str) -> u64 {
        let name = CString::new(kernel).expect("a kernel's name has no zero");
        // SAFETY: the function is that of cuda.cpp, the name ends in a zero.
        unsafe {
            let read = self.control::<unsafe extern "C" fn(c_int, *const c_char) -> u64>("mock_launches_of");
            read.map_or(0, |read| read(self.ordinal as c_int, name.as_ptr()))
        }
    }

    /// From now on work waits on its stream until something waits for it.
    pub fn delay(&self, on: bool) {
        self.switch("mock_delay", on);
    }

    /// From now on kernels and products do nothing.
    pub fn idle(&self, on: bool) {
        self.switch("mock_idle", on);
    }

    /// After `after` more calls, every call returns `error`.
    pub fn fail_after(&self, after: u32, error: i32) {
        // SAFETY: the function is that of cuda.cpp; plain numbers.
        unsafe {
            let set = self.control::<unsafe extern "C" fn(c_int, c_long, c_int)>("mock_fail");
            set.expect("errors are injected into the double")(
                self.ordinal as c_int,
                c_long::from(after),
                error,
            );
        }
    }

    /// After `after` more pieces of work on its streams, the device fails in the next; calls tell of it from then on.
    pub fn fail_in_work(&self, after: u64, error: i32) {
        // SAFETY: the function is that of cuda.cpp; plain numbers.
        unsafe {
            let set = self.control::<unsafe extern "C" fn(c_int, c_long, c_int)>("mock_fail_in_work");
            set.expect("errors are injected into the double")(self.ordinal as c_int, after as c_long, error);
        }
    }

    /// Everything the backend made is gone again.
    pub fn assert_nothing_left(&self) {
        let c = self.counters();
        let live =
            [c.live_allocations, c.live_bytes, c.live_pinned, c.live_streams, c.live_events, c.live_modules];
        assert_eq!(live, [0; 6], "allocations, bytes, pinned, streams, events, modules");
        assert_eq!(c.live_graphs, 0, "graphs");
    }

    fn switch(&self, name: &str, on: bool) {
        // SAFETY: the switches of cuda.cpp have one type; plain numbers.
        unsafe {
            if let Some(set) = self.control::<unsafe extern "C" fn(c_int, c_int)>(name) {
                set(self.ordinal as c_int, c_int::from(on));
            }
        }
    }

    /// A function of the double; `None` on a real GPU.
    ///
    /// # Safety
    /// `F` is its type.
    unsafe fn control<F: Copy>(&self, name: &str) -> Option<F> {
        // SAFETY: the caller names the type.
        let function = unsafe { self.mock?.driver.get::<F>(name.as_bytes()) };
        Some(*function.unwrap_or_else(|error| panic!("{name}: {error}")))
    }
}

fn load() -> Option<Mock> {
    let kernels = HostKernels::load()?;
    let [driver, cublaslt, nccl] = double::libraries(&compiler()?);
    // The backend opens libraries by these names; what has one of them as its soname and is open already is what it gets.
    let (driver, cublaslt) = (open(&driver), open(&cublaslt));
    // SAFETY: cuda.cpp has this function, and expects these two with these types.
    unsafe {
        let set = driver.get::<unsafe extern "C" fn(*const c_void, *const c_void)>(b"mock_kernels");
        let set = set.expect("cuda.cpp has it");
        set(kernels.symbol("quire_kernels"), kernels.symbol("quire_emulate"));
    }
    Some(Mock { driver, _cublaslt: cublaslt, _nccl: open(&nccl) })
}

fn open(path: &std::path::Path) -> Library {
    // SAFETY: our own library without initialisers. Its symbols are made global: the second uses those of the first.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) };
    library.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
