//! The libraries that take the place of a GPU: the kernels compiled for the host, the doubles of the driver, of
//! cuBLASLt and of NCCL. Loaded by tests, or found by a whole process in [`folder`].

use std::path::{Path, PathBuf};
#[cfg(unix)]
use std::sync::OnceLock;

use super::build::{CppLibrary, compiler, files, repository};

/// Set in the child process of `under_sanitizers`.
pub const SANITIZE: &str = "QUIRE_TEST_SANITIZE";

/// Builds the kernels for the host. `None`, with a line that says why, if there is no `g++`.
pub fn host_library_path() -> Option<PathBuf> {
    let Some(compiler) = compiler() else {
        eprintln!("skipped: no g++ (nor CXX), so the kernels cannot be built for the host");
        return None;
    };
    let kernels = repository().join("kernels");
    let (include, emulate) = (kernels.join("include"), kernels.join("emulate"));
    let mut sources = files(&kernels, &["cu"]);
    sources.extend(files(&emulate, &["cpp"]));
    let mut headers = files(&include, &["h", "cuh"]);
    headers.extend(files(&emulate, &["h", "cuh", "inc"]));
    let mut flags: Vec<String> = [
        "-std=c++17",
        "-O1",
        "-g1",
        "-fno-strict-aliasing",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
    ]
    .map(String::from)
    .to_vec();
    flags.extend([&include, &emulate].map(|folder| format!("-I{}", folder.display())));
    let is_sanitized = std::env::var_os(SANITIZE).is_some();
    if is_sanitized {
        let sanitizers =
            ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"];
        flags.extend(sanitizers.map(String::from));
    }
    let file_name = if is_sanitized { "libquire_kernels_asan.so" } else { "libquire_kernels_host.so" };
    Some(CppLibrary { file_name, sources, headers, flags }.build(&compiler))
}

/// Builds the double of the driver, that of cuBLASLt, and that of NCCL.
pub fn libraries(compiler: &str) -> [PathBuf; 3] {
    let names = [("cuda", "libcuda.so"), ("cublaslt", "libcublasLt.so"), ("nccl", "libnccl.so.2")];
    names.map(|(source, soname)| {
        let folder = repository().join("crates/cuda/tests/mock");
        let flags =
            ["-std=c++17", "-O2", "-Wall", "-Wextra", &format!("-Wl,-soname,{soname}")].map(String::from);
        let sources = vec![folder.join(format!("{source}.cpp"))];
        CppLibrary { file_name: soname, sources, headers: files(&folder, &["h"]), flags: flags.to_vec() }
            .build(compiler)
    })
}

/// A folder with all of them, under the names that a process looks for: for `LD_LIBRARY_PATH`, with
/// `QUIRE_MOCK_KERNELS` naming the kernels in it.
/// Made once, whichever tests of this process ask for it at the same time.
#[cfg(unix)]
pub fn folder() -> Option<PathBuf> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    FOLDER.get_or_init(make_folder).clone()
}

#[cfg(unix)]
fn make_folder() -> Option<PathBuf> {
    let kernels = host_library_path()?;
    let [driver, cublaslt, nccl] = libraries(&compiler()?);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("double");
    std::fs::create_dir_all(&folder).expect("the target folder is writable");
    let links = [
        (kernels, "libquire_kernels_host.so"),
        (driver, "libcuda.so.1"),
        (cublaslt, "libcublasLt.so.13"),
        (nccl, "libnccl.so.2"),
    ];
    for (library, name) in links {
        let link = folder.join(name);
        let part = folder.join(format!("{name}.{}", std::process::id()));
        std::os::unix::fs::symlink(library, &part).expect("the target folder is writable");
        std::fs::rename(&part, &link).expect("the target folder is writable");
    }
    Some(folder)
}
