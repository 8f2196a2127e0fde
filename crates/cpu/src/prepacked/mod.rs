//! Packed weights that outlive the process: a file that the next start maps in place of packing again.
//!
//! [`Prepacked`] stands between a loader and the packers. A layer that its file has is used from there, and the
//! checkpoint's bytes are never looked at; any other is packed, and kept in mind for a file to be written. `format.rs`
//! has the bytes, `file.rs` the disk.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quire_backend::{BackendError, LinearSource};

mod file;
mod format;
#[cfg(test)]
mod tests;

pub use file::PackFile;
pub use format::PackKey;

pub(crate) use format::Layout;

use crate::buffer::Frozen;
use crate::packed::Packed;
use crate::pool::Pool;
use crate::quantized::Quantized;
use crate::weights::Matrix;

/// Why there is no file to use, or none could be written.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The system refuses; also where there is no such file.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A file, but not for this model, version or setting.
    #[error("it {0}")]
    Foreign(&'static str),
    /// It was not written like this.
    #[error("it {0}, so it is damaged")]
    Damaged(String),
    /// Another process does the same right now, or just did.
    #[error("another process is writing it")]
    Busy,
}

/// What a loader and a backend share while weights are loaded. Clones are one.
#[derive(Clone, Default)]
pub struct Prepacked {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    file: Option<PackFile>,
    layers: Vec<Layer>,
    num_packed: usize,
    packing: Duration,
}

/// A layer's arrays: words of its panels, and scales if it has any.
pub(crate) struct Panels {
    words: Frozen<u32>,
    scales: Frozen<f32>,
}

/// A loaded layer.
struct Layer {
    name: String,
    layout: Layout,
    n: usize,
    k: usize,
    panels: Panels,
}

/// A layer to load.
struct LayerId<'a> {
    name: &'a str,
    layout: Layout,
    n: usize,
    k: usize,
}

/// All layers of a load of which at least one had to be packed.
pub struct Packing {
    layers: Vec<Layer>,
    /// How long packing took.
    pub time: Duration,
}

impl Prepacked {
    /// With a file to take layers from, if there is one.
    pub fn new(file: Option<PackFile>) -> Self {
        Self { state: Arc::new(Mutex::new(State { file, ..State::default() })) }
    }

    /// To be called when all is loaded. What should be written now, unless every layer came from the file.
    pub fn finish(&self) -> Option<Packing> {
        let State { layers, num_packed, packing, .. } = std::mem::take(&mut *self.state.lock());
        (num_packed > 0).then_some(Packing { layers, time: packing })
    }

    /// Has the file's pages read and mapped by a thread of its own, so that the first steps meet no page faults. A hint:
    /// where it fails, pages come when they are touched.
    pub fn prefault(&self) {
        let Some(map) = self.state.lock().file.as_ref().map(PackFile::map) else { return };
        let work = move || {
            #[cfg(target_os = "linux")]
            let _ = map.advise(memmap2::Advice::PopulateRead);
            drop(map);
        };
        let _ = std::thread::Builder::new().name("quire-prefault".into()).spawn(work);
    }

    /// `[n, k]` of `source` from the file, or else packed.
    pub(crate) fn load(
        &self,
        pool: &mut Pool,
        source: &LinearSource<'_>,
        layout: Layout,
        [n, k]: [usize; 2],
    ) -> Result<Matrix, BackendError> {
        let id = LayerId { name: source.name, layout, n, k };
        let mut state = self.state.lock();
        let matrix = match state.file.as_ref().and_then(|file| file.find(&id)) {
            Some(panels) => panels.into_matrix(layout, k),
            None => {
                let start = Instant::now();
                let matrix = pack(pool, source, layout, [n, k])?;
                state.packing += start.elapsed();
                state.num_packed += 1;
                matrix
            }
        };
        if let Some(panels) = Panels::of(&matrix) {
            state.layers.push(Layer { name: id.name.to_owned(), layout, n, k, panels });
        }
        Ok(matrix)
    }
}

impl Packing {
    /// Bytes of all arrays.
    pub fn num_bytes(&self) -> u64 {
        let bytes = |Panels { words, scales }: &Panels| words.as_bytes().len() + scales.as_bytes().len();
        self.layers.iter().map(|layer| bytes(&layer.panels) as u64).sum()
    }

    /// Writes them to a file at `path`, for the next load with `key`. Returns the file's size. Any other file there is
    /// replaced, once this one is complete.
    ///
    /// # Errors
    /// The disk is full or may not be written to, or another process is at it.
    pub fn write(&self, path: &Path, key: &PackKey) -> Result<u64, PackError> {
        file::write(path, key, &self.layers)
    }
}

impl Panels {
    fn of(matrix: &Matrix) -> Option<Self> {
        match matrix {
            Matrix::Packed(packed) => Some(Self { words: packed.panels().clone(), scales: Frozen::empty() }),
            Matrix::Quantized(quantized) => {
                let (words, scales) = quantized.panels();
                Some(Self { words: words.clone(), scales: scales.clone() })
            }
            Matrix::F32(_) | Matrix::F16(_) | Matrix::Bf16(_) => None,
        }
    }

    fn into_matrix(self, layout: Layout, k: usize) -> Matrix {
        match layout {
            Layout::Bf16 => Matrix::Packed(Packed::from_panels(self.words, k)),
            Layout::Quantized(codes) => {
                Matrix::Quantized(Quantized::from_panels(codes, self.words, self.scales, k))
            }
        }
    }
}

/// `[n, k]` of `source` in panels.
pub(crate) fn pack(
    pool: &mut Pool,
    source: &LinearSource<'_>,
    layout: Layout,
    [n, k]: [usize; 2],
) -> Result<Matrix, BackendError> {
    Ok(match layout {
        Layout::Bf16 => Matrix::Packed(Packed::pack(pool, source, n, k)?),
        Layout::Quantized(codes) => Matrix::Quantized(Quantized::pack(pool, source, codes, n, k)?),
    })
}
