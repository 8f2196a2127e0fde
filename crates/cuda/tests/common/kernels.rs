//! The kernels, compiled for the host from the same sources, one launch at a time.
//!
//! A test that wants AddressSanitizer and UBSan too calls [`under_sanitizers`] from a test of its own.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::process::Command;
use std::sync::OnceLock;

use libloading::Library;

use super::build::compiler;
use super::double::{SANITIZE, host_library_path};

/// CUDA's `uint3`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Uint3 {
    x: c_uint,
    y: c_uint,
    z: c_uint,
}

impl From<[u32; 3]> for Uint3 {
    fn from([x, y, z]: [u32; 3]) -> Self {
        Self { x, y, z }
    }
}

/// A row of the host library's table.
#[repr(C)]
struct QuireKernel {
    name: *const c_char,
    params_size: u32,
    max_threads: u32,
    function: *const c_void,
}

type EmulateFn =
    unsafe extern "C" fn(*const c_char, Uint3, Uint3, c_uint, *const c_void, c_ulonglong) -> c_int;
type TableFn = unsafe extern "C" fn(*mut c_int) -> *const QuireKernel;

/// The host build of `kernels/*.cu`.
pub struct HostKernels {
    emulate: EmulateFn,
    params_sizes: BTreeMap<String, usize>,
    /// Keeps the code mapped.
    loaded: Library,
}

impl HostKernels {
    /// Builds (once per content) and loads the library. `None`, with a line that says why, if there is no `g++`.
    ///
    /// # Panics
    /// The sources do not compile.
    pub fn load() -> Option<&'static Self> {
        static LOADED: OnceLock<Option<HostKernels>> = OnceLock::new();
        LOADED.get_or_init(|| host_library_path().map(|path| Self::open(&path))).as_ref()
    }

    fn open(path: &std::path::Path) -> Self {
        // SAFETY: the library is our own; its initialisers register kernels and do nothing else.
        let library =
            unsafe { Library::new(path) }.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        // SAFETY: `kernels/emulate` defines both symbols with these types.
        let (emulate, table) = unsafe {
            let emulate = *library.get::<EmulateFn>(b"quire_emulate\0").expect("the library runs kernels");
            (emulate, *library.get::<TableFn>(b"quire_kernels\0").expect("the library has a table"))
        };
        let mut count = 0;
        // SAFETY: `table` returns `count` rows that live as long as the library, with names that end in a zero.
        let rows = unsafe {
            let first = table(&raw mut count);
            if count == 0 { &[] } else { std::slice::from_raw_parts(first, count as usize) }
        };
        let name = |row: &QuireKernel| {
            // SAFETY: as above.
            let name = unsafe { CStr::from_ptr(row.name) };
            name.to_str().expect("names are C identifiers").to_owned()
        };
        let params_sizes = rows.iter().map(|row| (name(row), row.params_size as usize)).collect();
        Self { emulate, params_sizes, loaded: library }
    }

    /// Every kernel, with the size of its parameter struct in bytes.
    pub fn params_sizes(&self) -> &BTreeMap<String, usize> {
        &self.params_sizes
    }

    /// Another symbol of the library, as the address of a function or an object.
    ///
    /// # Panics
    /// There is none of this name.
    pub fn symbol(&self, name: &str) -> *const c_void {
        // SAFETY: only the address is taken.
        let symbol = unsafe { self.loaded.get::<*const c_void>(name.as_bytes()) };
        *symbol.unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// Why the last launch of this thread failed.
    fn error(&self) -> String {
        // SAFETY: `kernels/emulate` defines it so; the text ends in a zero.
        unsafe {
            let symbol = self.loaded.get::<unsafe extern "C" fn() -> *const c_char>(b"quire_emulate_error\0");
            symbol.map_or_else(|_| "?".into(), |text| CStr::from_ptr(text()).to_string_lossy().into_owned())
        }
    }

    /// Runs one launch to its end. `params` is the kernel's parameter struct, `seed` decides in which order the threads
    /// of a block take turns: results must not depend on it.
    ///
    /// # Panics
    /// There is no such kernel, `P` has another size than the kernel's struct, or the emulation found a fault.
    pub fn launch<P: Copy>(
        &self,
        name: &str,
        grid: [u32; 3],
        block: [u32; 3],
        dynamic_smem: u32,
        params: &P,
        seed: u64,
    ) {
        let Some(&size) = self.params_sizes.get(name) else {
            panic!("no kernel {name} among {:?}", self.params_sizes.keys().collect::<Vec<_>>());
        };
        assert_eq!(size, size_of::<P>(), "{name}: the size of {} differs", std::any::type_name::<P>());
        let c_name = CString::new(name).expect("names are C identifiers");
        // SAFETY: the struct has the kernel's size; that its pointers hold what the kernel reads and writes is the
        // calling test's claim, which the sanitizers check.
        let status = unsafe {
            let params = std::ptr::from_ref(params).cast();
            (self.emulate)(c_name.as_ptr(), grid.into(), block.into(), dynamic_smem, params, seed)
        };
        assert_eq!(status, 0, "{name} on grid {grid:?}, block {block:?}, seed {seed}: {}", self.error());
    }
}

/// Runs the tests of this binary whose names contain `filter` again, in a child process where the kernels are built
/// with AddressSanitizer and UBSan. Leaves at once in that child, so the calling test may itself match.
///
/// # Panics
/// A test failed in the child, or a sanitizer spoke.
pub fn under_sanitizers(filter: &str) {
    if std::env::var_os(SANITIZE).is_some() {
        return;
    }
    let Some(compiler) = compiler() else {
        eprintln!("skipped: no g++ (nor CXX), so the kernels cannot be built for the host");
        return;
    };
    let runtime = |name: &str| {
        let output = Command::new(&compiler).arg(format!("-print-file-name={name}")).output();
        let path = String::from_utf8(output.expect("the compiler ran before").stdout).expect("a path");
        path.trim().to_owned()
    };
    let preload = format!("{} {}", runtime("libasan.so"), runtime("libubsan.so"));
    let status = Command::new(std::env::current_exe().expect("a test knows its binary"))
        .args([filter, "--test-threads=1"])
        .env(SANITIZE, "1")
        .env("LD_PRELOAD", preload)
        .env("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=1")
        .env("UBSAN_OPTIONS", "print_stacktrace=1")
        .status()
        .expect("the test binary runs");
    assert!(
        status.success(),
        "tests matching {filter:?} fail under the sanitizers; their messages are above"
    );
}
