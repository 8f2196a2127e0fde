//! Compiles C++ for tests: one shared library per use, built once per content, also when test binaries run side by side.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A shared library to build with `g++`.
pub struct CppLibrary<'a> {
    /// File name: `libquire_kernels_host.so`.
    pub file_name: &'a str,
    /// Translation units, whatever their extension.
    pub sources: Vec<PathBuf>,
    /// Everything the sources may include: a change of any of these files builds anew.
    pub headers: Vec<PathBuf>,
    /// Compiler flags; those of the linker too.
    pub flags: Vec<String>,
}

/// The compiler: `CXX`, or `g++`. `None` if it does not run; the caller then skips its test and says so.
pub fn compiler() -> Option<String> {
    let name = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
    let runs = Command::new(&name).arg("--version").output().is_ok_and(|output| output.status.success());
    runs.then_some(name)
}

/// Where the repository begins, or `QUIRE_TEST_ROOT` where the tests were carried elsewhere.
pub fn repository() -> PathBuf {
    if let Some(root) = std::env::var_os("QUIRE_TEST_ROOT") {
        return root.into();
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().find(|path| path.join("kernels").is_dir());
    root.expect("the crate lies in the repository").to_path_buf()
}

/// The files of a folder with one of these extensions, sorted.
pub fn files(folder: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut files: Vec<_> = entries
        .map(|entry| entry.expect("the folder is readable").path())
        .filter(|path| path.extension().and_then(OsStr::to_str).is_some_and(|e| extensions.contains(&e)))
        .collect();
    files.sort();
    files
}

impl CppLibrary<'_> {
    /// The path of the built library. Objects are kept per content, so a change of one source compiles one source.
    ///
    /// # Panics
    /// With the compiler's messages, if it fails.
    pub fn build(&self, compiler: &str) -> PathBuf {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cpp");
        fs::create_dir_all(&folder).expect("the target folder is writable");
        let lock = File::create(folder.join("lock")).expect("the target folder is writable");
        lock.lock().expect("the file can be locked");

        let common = digest(self.headers.iter(), &(compiler, &self.flags));
        let objects: Vec<_> = self
            .sources
            .iter()
            .map(|source| {
                let stem = source.file_stem().expect("a source has a name").to_string_lossy();
                (source, folder.join(format!("{stem}-{:016x}.o", digest([source].into_iter(), &common))))
            })
            .collect();
        let library =
            folder.join(format!("{:016x}-{}", digest(self.sources.iter(), &common), self.file_name));
        if !library.exists() {
            self.compile(compiler, &objects);
            self.link(compiler, &objects, &library);
        }
        library
    }

    /// Compiles what is not there yet, as many at once as there are processors.
    fn compile(&self, compiler: &str, objects: &[(&PathBuf, PathBuf)]) {
        let missing: Vec<_> = objects.iter().filter(|(_, object)| !object.exists()).collect();
        let width = std::thread::available_parallelism().map_or(1, usize::from);
        for group in missing.chunks(width) {
            let children: Vec<_> = group
                .iter()
                .map(|(source, object)| {
                    let part = object.with_extension("part");
                    let child = Command::new(compiler)
                        .args(&self.flags)
                        .args(["-fPIC", "-x", "c++", "-c"])
                        .arg(source)
                        .arg("-o")
                        .arg(&part)
                        .spawn()
                        .expect("the compiler ran before");
                    (child, source, part, object)
                })
                .collect();
            for (mut child, source, part, object) in children {
                let status = child.wait().expect("it was started above");
                assert!(
                    status.success(),
                    "{compiler} failed on {}; its messages are above",
                    source.display()
                );
                fs::rename(part, object).expect("the target folder is writable");
            }
        }
    }

    fn link(&self, compiler: &str, objects: &[(&PathBuf, PathBuf)], library: &Path) {
        let part = library.with_extension("part");
        let status = Command::new(compiler)
            .args(objects.iter().map(|(_, object)| object))
            .args(&self.flags)
            .arg("-shared")
            .arg("-o")
            .arg(&part)
            .status()
            .expect("the compiler ran before");
        assert!(status.success(), "{compiler} cannot link {}; its messages are above", self.file_name);
        fs::rename(part, library).expect("the target folder is writable");
    }
}

/// Of names and contents, and of what else decides.
fn digest<'a>(files: impl Iterator<Item = &'a PathBuf>, more: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    more.hash(&mut hasher);
    for file in files {
        file.file_name().hash(&mut hasher);
        fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display())).hash(&mut hasher);
    }
    hasher.finish()
}
