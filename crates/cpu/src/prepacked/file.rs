//! A file of packed weights on disk: mapped to read, and replaced as a whole.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use super::format::{Entry, PackKey, decode, encode};
use super::{Layer, LayerId, PackError, Panels};
use crate::buffer::Frozen;
use crate::element::Plain;

/// A mapped file that is right for its key.
pub struct PackFile {
    map: Arc<Mmap>,
    entries: BTreeMap<String, Entry>,
}

impl PackFile {
    /// Maps the file at `path`; its arrays are not read.
    ///
    /// # Errors
    /// There is none, it cannot be read, or it is not one for `key`.
    pub fn open(path: &Path, key: &PackKey) -> Result<Self, PackError> {
        let file = File::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(PackError::Foreign("is not a file"));
        }
        // SAFETY: the mapping is read-only and outlives what is borrowed from it (each borrow holds the `Arc`). That
        // nobody writes to the file cannot be promised: Quire itself only ever replaces it by another, and whoever
        // may write beside a model can change the model. Such a write changes numbers, or raises SIGBUS if it makes
        // the file shorter; all that is ever read of the bytes behind the table, which is copied, are numbers.
        let map = unsafe { Mmap::map(&file)? };
        let mut entries = BTreeMap::new();
        for entry in decode(&map, key)? {
            entries.insert(entry.name.clone(), entry);
        }
        Ok(Self { map: Arc::new(map), entries })
    }

    /// Bytes of the file.
    pub fn num_bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// The layer, if the file has it in this shape.
    pub(super) fn find(&self, id: &LayerId<'_>) -> Option<Panels> {
        let Entry { layout, n, k, words, scales, .. } = self.entries.get(id.name)?;
        let lens = (words.len() / 4, scales.len() / 4);
        let is_right = (*layout, *n, *k) == (id.layout, id.n, id.k) && lens == id.layout.lens(id.n, id.k);
        is_right.then(|| Panels {
            words: self.array(&self.map[words.clone()]),
            scales: self.array(&self.map[scales.clone()]),
        })
    }

    /// `bytes` of the map as elements.
    fn array<T: Plain>(&self, bytes: &[u8]) -> Frozen<T> {
        // SAFETY: any bits are a `T`.
        let (before, elements, after) = unsafe { bytes.align_to() };
        assert!(before.is_empty() && after.is_empty(), "arrays begin at pages and have whole elements");
        // SAFETY: the map stays where it is while it lives; for its content see `open`.
        unsafe { Frozen::borrowed(elements, Arc::clone(&self.map) as _) }
    }

    /// For advice about all of it.
    pub(super) fn map(&self) -> Arc<Mmap> {
        Arc::clone(&self.map)
    }
}

/// Writes a file for `key` and puts it at `path` when it is complete, in the place of any other. Returns its size.
///
/// Processes that do so at once write to one temporary file, whose lock one of them gets. A process that is killed leaves
/// it behind for the next one to overwrite.
pub(super) fn write(path: &Path, key: &PackKey, layers: &[Layer]) -> Result<u64, PackError> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let temporary = temporary(path);
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&temporary)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(PackError::Busy),
        Err(TryLockError::Error(error)) => return Err(error.into()),
    }
    // Whoever held the lock may have given the file its final name meanwhile; and a link must not lead us elsewhere.
    if !is_at(&file, &temporary) {
        return Err(PackError::Busy);
    }
    let written = fill(&file, key, layers).and_then(|len| {
        std::fs::rename(&temporary, path)?;
        Ok(len)
    });
    if written.is_err() {
        // It holds nothing of use; that it cannot be removed either is no news then.
        let _ = std::fs::remove_file(&temporary);
    }
    Ok(written?)
}

/// Beside the file, so that a rename does not cross file systems.
fn temporary(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    path.with_file_name(name)
}

fn fill(mut file: &File, key: &PackKey, layers: &[Layer]) -> io::Result<u64> {
    let ids = layers.iter().map(|Layer { name, layout, n, k, .. }| (&name[..], *layout, *n, *k));
    let (head, entries, len) = encode(key, ids);
    file.set_len(0)?;
    file.write_all(&head)?;
    for (entry, layer) in entries.iter().zip(layers) {
        for (place, bytes) in
            [(&entry.words, layer.panels.words.as_bytes()), (&entry.scales, layer.panels.scales.as_bytes())]
        {
            file.seek(SeekFrom::Start(place.start as u64))?;
            file.write_all(bytes)?;
        }
    }
    file.set_len(len as u64)?;
    file.sync_all()?;
    Ok(len as u64)
}

/// Whether `file` is what `path` names itself, not through a link.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), path.symlink_metadata()) {
        (Ok(file), Ok(there)) => there.is_file() && (file.dev(), file.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

/// Where an open file keeps its name, there is nothing to ask.
#[cfg(not(unix))]
fn is_at(_: &File, path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|there| there.is_file())
}
