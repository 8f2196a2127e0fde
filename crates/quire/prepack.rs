//! Packed weights between starts: where the file is, when it is worth one, and what the log says.

use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use quire_core::QuantFormat;
use quire_cpu::{PackError, PackFile, PackKey, Packing, Prepacked};
use quire_model::Checkpoint;

use crate::args::{EngineArgs, ExecutorArg, Switch};
use crate::model::LocalModel;
use crate::ranks::cpu_precision;
use crate::units::Bytes;

/// What `--prepack auto` finds worth a file: this much memory, or this long to pack it.
const MIN_BYTES: u64 = 256 << 20;
const MIN_TIME: Duration = Duration::from_millis(500);

/// The file of one model in one format.
pub(crate) struct PackCache {
    mode: Switch,
    key: PackKey,
    /// Where it may be, the best place first.
    places: Vec<PathBuf>,
    prepacked: Prepacked,
}

impl PackCache {
    /// Finds the file and begins to map it. `None` where there is nothing to cache: nothing is packed, the model has no
    /// files, or the user does not want it.
    pub(crate) fn open(
        args: &EngineArgs,
        model: &LocalModel,
        checkpoint: &Checkpoint,
        quant: QuantFormat,
    ) -> Option<Self> {
        let LocalModel::Directory(directory) = model else { return None };
        let mode = args.prepack;
        if mode == Switch::Off || args.executor == ExecutorArg::Mock {
            return None;
        }
        let precision = cpu_precision(checkpoint.spec().dtype);
        let key = PackKey::new(&checkpoint.fingerprint()?, precision, quant)?;
        let places = places(directory, cache_folder().as_deref(), key.role());
        let prepacked = Prepacked::new(places.iter().find_map(|place| open(place, &key)));
        prepacked.prefault();
        Some(Self { mode, key, places, prepacked })
    }

    /// What the backend needs.
    pub(crate) fn prepacked(&self) -> Prepacked {
        self.prepacked.clone()
    }

    /// To be called when the weights are loaded. If there should be a file, a thread writes it from here on; to wait for it
    /// is the caller's choice.
    pub(crate) fn finish(self) -> Option<JoinHandle<()>> {
        let packing = self.prepacked.finish()?;
        let is_worth_it = packing.num_bytes() >= MIN_BYTES || packing.time >= MIN_TIME;
        if self.mode != Switch::On && !is_worth_it {
            return None;
        }
        let Self { key, places, .. } = self;
        let writer = std::thread::Builder::new().name("quire-prepack".into());
        match writer.spawn(move || write(&packing, &places, &key)) {
            Ok(thread) => Some(thread),
            Err(error) => {
                tracing::warn!(%error, "no thread to keep packed weights; the next start packs them again");
                None
            }
        }
    }
}

fn open(place: &Path, key: &PackKey) -> Option<PackFile> {
    let file = place.display();
    match PackFile::open(place, key) {
        Ok(opened) => {
            tracing::info!(%file, size = %Bytes(opened.num_bytes()), "using prepacked weights");
            Some(opened)
        }
        Err(PackError::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(reason) => {
            tracing::info!(%file, %reason, "not using prepacked weights");
            None
        }
    }
}

/// Writes to the first place that can be written to, and leaves no file in the others.
fn write(packing: &Packing, places: &[PathBuf], key: &PackKey) {
    for place in places {
        let file = place.display();
        match packing.write(place, key) {
            Ok(bytes) => {
                tracing::info!(%file, size = %Bytes(bytes), "kept packed weights for the next start");
                for other in places.iter().filter(|other| *other != place) {
                    // An outdated one, mostly none.
                    let _ = std::fs::remove_file(other);
                }
                return;
            }
            Err(PackError::Busy) => {
                return tracing::info!(%file, "another process keeps packed weights for the next start");
            }
            Err(error) => tracing::debug!(%file, %error, "cannot keep packed weights here"),
        }
    }
    tracing::warn!(
        places = ?places,
        "packed weights cannot be kept, so the next start packs them again; --prepack off if that is fine"
    );
}

/// Beside the model, or else in the user's cache under a name that says whose it is.
fn places(directory: &Path, cache: Option<&Path>, role: &str) -> Vec<PathBuf> {
    let absolute = directory.canonicalize().unwrap_or_else(|_| directory.to_owned());
    let name = absolute.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy());
    // FNV-1a. Should two models share a name, they replace each other's files: a key inside tells them apart.
    let hash =
        absolute.as_os_str().as_encoded_bytes().iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
    let beside = absolute.join(format!(".quire-cpu-{role}.pack"));
    let in_cache = cache.map(|cache| cache.join(format!("quire/{name}-{hash:016x}-cpu-{role}.pack")));
    std::iter::once(beside).chain(in_cache).collect()
}

/// `$XDG_CACHE_HOME`, or `~/.cache` (XDG Base Directory Specification: a relative path is to be ignored).
fn cache_folder() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_of_one_name_have_files_of_their_own() {
        let cache = Some(Path::new("/cache"));
        let [beside, in_cache] = &places(Path::new("/a/model"), cache, "int8")[..] else {
            panic!("two places")
        };
        assert_eq!(beside, Path::new("/a/model/.quire-cpu-int8.pack"));
        let name = in_cache.file_name().unwrap().to_str().unwrap();
        assert!(name.starts_with("model-") && name.ends_with("-cpu-int8.pack"), "{name}");
        assert_eq!(in_cache.parent(), Some(Path::new("/cache/quire")));
        assert_ne!(places(Path::new("/b/model"), cache, "int8")[1], *in_cache);
        assert_ne!(places(Path::new("/a/model"), cache, "int4")[1], *in_cache);
        assert_eq!(places(Path::new("/a/model"), None, "int8").len(), 1);
    }
}
