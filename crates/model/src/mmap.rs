//! A file mapped read-only into memory: the one place of this crate that needs `unsafe`.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Deref;
use std::path::Path;
use std::time::SystemTime;

use crate::error::{ModelError, Result};

/// The bytes of a file, paged in as they are read.
#[derive(Debug)]
pub(crate) struct Mmap {
    map: memmap2::Mmap,
    /// When the file was written last, if the system says so.
    pub modified: Option<SystemTime>,
}

impl Mmap {
    /// Maps the whole file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| ModelError::io(path, error))?;
        // SAFETY: the mapping is private to this process, read-only, and lives as long as the slices borrowed from
        // it. What the type system cannot promise is that nobody else writes to or truncates the file meanwhile;
        // that is the operator's contract with any server that maps its weights, and such a write can change
        // numbers (or raise SIGBUS), but these bytes are never interpreted as anything but numbers after the header.
        let map = unsafe { memmap2::Mmap::map(&file) };
        let map = map.map_err(|error| ModelError::io(path, error))?;
        let modified = file.metadata().and_then(|metadata| metadata.modified()).ok();
        Ok(Self { map, modified })
    }

    /// Gives back the memory of the pages that lie wholly within `bytes`, a part of this map. They can still be read:
    /// from the system's cache, or from disk.
    #[cfg(unix)]
    pub fn release(&self, bytes: &[u8]) {
        const PAGE: usize = 1 << 16; // a multiple of every page size in use
        let Some(start) = (bytes.as_ptr() as usize).checked_sub(self.map.as_ptr() as usize) else { return };
        let (first, end) = (start.next_multiple_of(PAGE), (start + bytes.len()) / PAGE * PAGE);
        if end <= first || end > self.map.len() {
            return;
        }
        // SAFETY: pages of a read-only mapping of a file hold the file's bytes whether they were dropped or not.
        // A hint; where it is refused, the pages just stay.
        let _ = unsafe {
            self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, first, end - first)
        };
    }

    /// Elsewhere the system decides alone.
    #[cfg(not(unix))]
    pub fn release(&self, _: &[u8]) {}
}

impl Deref for Mmap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_pages_can_be_read_again() {
        let path = std::env::temp_dir().join(format!("quire-mmap-{}", std::process::id()));
        let bytes: Vec<u8> = (0..1_000_003u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let map = Mmap::open(&path).unwrap();
        assert!(map[..] == bytes);
        for range in [0..bytes.len(), 1..900_000, 70_000..70_001, 5..5, 999_999..bytes.len()] {
            map.release(&map[range]);
            assert!(map[..] == bytes);
        }
        // Of another map: nothing happens.
        map.release(&bytes);
        std::fs::remove_file(path).unwrap();
    }
}
