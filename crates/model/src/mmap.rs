//! A file mapped read-only into memory: the one place of this crate that needs `unsafe`.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Deref;
use std::path::Path;

use crate::error::{ModelError, Result};

/// The bytes of a file, paged in as they are read.
#[derive(Debug)]
pub(crate) struct Mmap(memmap2::Mmap);

impl Mmap {
    /// Maps the whole file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| ModelError::io(path, error))?;
        // SAFETY: the mapping is private to this process, read-only, and lives as long as the slices borrowed from
        // it. What the type system cannot promise is that nobody else writes to or truncates the file meanwhile;
        // that is the operator's contract with any server that maps its weights, and such a write can change
        // numbers (or raise SIGBUS), but these bytes are never interpreted as anything but numbers after the header.
        let map = unsafe { memmap2::Mmap::map(&file) };
        map.map(Self).map_err(|error| ModelError::io(path, error))
    }
}

impl Deref for Mmap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
