//! The files of a checkpoint: which there are, and where each tensor lies in them.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::UNIX_EPOCH;

use safetensors::Dtype;

use crate::config::Config;
use crate::error::{ModelError, Result};
use crate::mmap::Mmap;
use crate::safetensors::{Entry, read_header};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// A JSON file larger than this is not one of a checkpoint's.
const MAX_JSON_BYTES: u64 = 128 << 20;

/// All tensors of a checkpoint by name.
#[derive(Debug)]
pub(crate) struct Store {
    files: Vec<(String, Bytes)>,
    /// Name -> file and entry.
    tensors: BTreeMap<String, (usize, Entry)>,
}

#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    Static(&'static [u8]),
}

/// A tensor as stored, of any dtype.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stored<'a> {
    pub name: &'a str,
    pub file: &'a str,
    pub dtype: Dtype,
    pub shape: &'a [usize],
    pub data: &'a [u8],
}

impl Store {
    /// Maps the safetensors files of a directory.
    pub fn open(dir: &Path) -> Result<Self> {
        if dir.join(INDEX).is_file() {
            return Self::open_sharded(dir);
        }
        if !dir.join(SINGLE).is_file() {
            return Err(no_weights(dir));
        }
        Self::open_file(dir, SINGLE)
    }

    /// Maps one safetensors file of a directory.
    pub fn open_file(dir: &Path, file: &str) -> Result<Self> {
        let mut store = Self { files: Vec::new(), tensors: BTreeMap::new() };
        store.add(file.to_owned(), Bytes::Mapped(Mmap::open(&dir.join(file))?))?;
        Ok(store)
    }

    /// The tensors of one file that is part of the program.
    pub fn from_static(bytes: &'static [u8]) -> Result<Self> {
        let mut store = Self { files: Vec::new(), tensors: BTreeMap::new() };
        store.add(SINGLE.to_owned(), Bytes::Static(bytes))?;
        Ok(store)
    }

    fn open_sharded(dir: &Path) -> Result<Self> {
        let index = Config::parse(INDEX, &read_json(&dir.join(INDEX))?)?;
        let Some(weight_map) = index.opt_object("weight_map")? else {
            return Err(index.error("weight_map", "must be an object: tensor name -> file name"));
        };
        let mut by_file: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for tensor in weight_map.fields() {
            let file = weight_map.opt_str(tensor)?.unwrap_or_default();
            // A plain name: an index must not reach files outside its directory.
            if file.is_empty() || file.contains(['/', '\\', '\0']) || file == ".." {
                return Err(weight_map.error(tensor, "must be the name of a file in the same directory"));
            }
            by_file.entry(file).or_default().push(tensor);
        }
        let mut store = Self { files: Vec::new(), tensors: BTreeMap::new() };
        for (file, tensors) in by_file {
            store.add(file.to_owned(), Bytes::Mapped(Mmap::open(&dir.join(file))?))?;
            let this_file = store.files.len() - 1;
            for tensor in tensors {
                if store.tensors.get(tensor).is_none_or(|&(holder, _)| holder != this_file) {
                    return Err(weight_map.error(tensor, "but that file holds no such tensor"));
                }
            }
        }
        Ok(store)
    }

    fn add(&mut self, file: String, bytes: Bytes) -> Result<()> {
        let entries = read_header(&file, &bytes)?;
        for entry in entries {
            let name = entry.name.clone();
            if let Some((other, _)) = self.tensors.insert(name.clone(), (self.files.len(), entry)) {
                let other = self.files.get(other).map_or(file.as_str(), |(name, _)| name);
                return Err(ModelError::format(&file, format!("tensor `{name}` is also in {other}")));
            }
        }
        self.files.push((file, bytes));
        Ok(())
    }

    /// Takes a tensor apart: it gives way to equal parts of it, in order, of the shape given.
    pub fn split(&mut self, name: &str, parts: Vec<String>, shape: &[usize]) -> Result<()> {
        let Some((file, whole)) = self.tensors.remove(name) else { return Ok(()) };
        let bytes = whole.range.len() / parts.len().max(1);
        for (index, name) in parts.into_iter().enumerate() {
            let start = whole.range.start + index * bytes;
            let (shape, range) = (shape.to_vec(), start..start + bytes);
            let part = Entry { name: name.clone(), dtype: whole.dtype, shape, range };
            if self.tensors.insert(name.clone(), (file, part)).is_some() {
                let detail = format!("tensor `{name}` is there by itself and in `{}`", whole.name);
                return Err(ModelError::format(&self.files[file].0, detail));
            }
        }
        Ok(())
    }

    /// One tensor.
    pub fn get(&self, name: &str) -> Option<Stored<'_>> {
        self.tensors.get(name).map(|located| self.stored(located))
    }

    /// Says that `data` of a tensor was read for the last time.
    pub fn release(&self, data: &[u8]) {
        let holder = self.files.iter().find_map(|(_, bytes)| match bytes {
            Bytes::Mapped(map) if map.as_ptr_range().contains(&data.as_ptr()) => Some(map),
            _ => None,
        });
        if let Some(map) = holder {
            map.release(data);
        }
    }

    /// Name, size, time of change and header of each file, or `None` for files that are part of the program. Whoever
    /// changes a tensor changes one of these.
    pub fn fingerprint(&self) -> Option<Vec<u8>> {
        let mut all = Vec::new();
        for (index, (name, bytes)) in self.files.iter().enumerate() {
            let Bytes::Mapped(map) = bytes else { return None };
            let entries = self.tensors.values().filter(|(file, _)| *file == index);
            let data_start = entries.map(|(_, entry)| entry.range.start).min().unwrap_or(map.len());
            let modified = map.modified?.duration_since(UNIX_EPOCH).map_or(0, |age| age.as_nanos());
            all.extend(format!("{} {name} {} {modified} {data_start}\n", name.len(), map.len()).bytes());
            all.extend(&map[..data_start]);
        }
        Some(all)
    }

    /// All tensors, ordered by name.
    pub fn iter(&self) -> impl Iterator<Item = Stored<'_>> {
        self.tensors.values().map(|located| self.stored(located))
    }

    fn stored<'a>(&'a self, (file, entry): &'a (usize, Entry)) -> Stored<'a> {
        let (file, bytes) = &self.files[*file];
        Stored {
            name: &entry.name,
            file,
            dtype: entry.dtype,
            shape: &entry.shape,
            data: &bytes[entry.range.clone()],
        }
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Static(bytes) => bytes,
        }
    }
}

/// The text of a JSON file.
pub(crate) fn read_json(path: &Path) -> Result<String> {
    let length = path.metadata().map_err(|error| ModelError::io(path, error))?.len();
    if length > MAX_JSON_BYTES {
        let detail =
            format!("{length} bytes are more than the {MAX_JSON_BYTES} expected of such a file at most");
        return Err(ModelError::NotACheckpoint { path: path.to_owned(), detail });
    }
    std::fs::read_to_string(path).map_err(|error| ModelError::io(path, error))
}

/// Says what a directory without `model.safetensors` holds instead.
fn no_weights(dir: &Path) -> ModelError {
    let names: Vec<String> = match dir.read_dir() {
        Ok(entries) => entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect(),
        Err(error) => return ModelError::io(dir, error),
    };
    let with =
        |suffixes: &[&str]| names.iter().find(|name| suffixes.iter().any(|suffix| name.ends_with(suffix)));
    let detail = if let Some(shard) = with(&[".safetensors"]) {
        format!("holds {shard}, but neither {SINGLE} nor {INDEX}, which says what is in it")
    } else if let Some(gguf) = with(&[".gguf"]) {
        format!("holds {gguf}: GGUF is not supported yet; use the safetensors checkpoint of this model")
    } else if let Some(pickle) = with(&[".bin", ".pt", ".pth"]) {
        format!(
            "holds {pickle}, a PyTorch pickle, which can run code when it is read and is refused; convert it to \
             safetensors: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    } else {
        format!("holds no {SINGLE}")
    };
    ModelError::NotACheckpoint { path: dir.to_owned(), detail }
}
