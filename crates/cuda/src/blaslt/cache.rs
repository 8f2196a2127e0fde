//! Timed choices on disk, so that a restart need not time again: a text file per GPU and library version, a line per
//! choice. A line that does not parse is skipped: the choice is then made anew.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use cudarc::cublaslt::sys::cublasLtMatmulAlgo_t as Algorithm;

use super::{Element, GemmShape};

/// A shape and the bucket of rows.
pub(super) type Key = (GemmShape, u32);

/// The file.
#[derive(Debug)]
pub(super) struct AlgorithmCache {
    path: PathBuf,
}

impl AlgorithmCache {
    /// In `folder`; nothing is created before the first choice.
    pub fn open(folder: &Path, gpu: &str, version: usize) -> Self {
        let gpu: String = gpu.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        Self { path: folder.join(format!("cublaslt-{gpu}-{version}.txt")) }
    }

    pub fn load(&self) -> HashMap<Key, Algorithm> {
        let text = fs::read_to_string(&self.path).unwrap_or_default();
        text.lines().filter_map(parse).collect()
    }

    /// Adds a choice. A disk that cannot be written only costs the next start its time.
    pub fn append(&self, key: &Key, algorithm: &Algorithm) {
        let append = || {
            fs::create_dir_all(self.path.parent().unwrap_or(Path::new(".")))?;
            // One write of a whole line: processes that append at once do not mix their lines.
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(&self.path)?
                .write_all(line(key, algorithm).as_bytes())
        };
        if let Err(error) = append() {
            tracing::warn!(path = %self.path.display(), %error, "cannot keep the choice of a GEMM algorithm");
        }
    }
}

/// `n k x_stride out_stride input output bias bucket` (bias: 0, or its element's number and one) and the algorithm's eight words in hexadecimal.
fn line((shape, bucket): &Key, algorithm: &Algorithm) -> String {
    let GemmShape { n, k, x_stride, out_stride, input, output, bias } = *shape;
    let (input, output, bias) = (input as u8, output as u8, bias.map_or(0, |bias| bias as u8 + 1));
    let mut line = format!("{n} {k} {x_stride} {out_stride} {input} {output} {bias} {bucket}");
    for word in algorithm.data {
        let _ = write!(line, " {word:x}");
    }
    line.push('\n');
    line
}

fn parse(line: &str) -> Option<(Key, Algorithm)> {
    let mut fields = line.split(' ');
    let mut number = || fields.next()?.parse::<usize>().ok();
    let shape = GemmShape {
        n: number()?,
        k: number()?,
        x_stride: number()?,
        out_stride: number()?,
        input: element(number()?)?,
        output: element(number()?)?,
        bias: match number()? {
            0 => None,
            bias => Some(element(bias - 1)?),
        },
    };
    let bucket = u32::try_from(number()?).ok()?;
    let mut data = [0; 8];
    for word in &mut data {
        *word = u64::from_str_radix(fields.next()?, 16).ok()?;
    }
    fields.next().is_none().then_some(((shape, bucket), Algorithm { data }))
}

fn element(index: usize) -> Option<Element> {
    [Element::Bf16, Element::F16, Element::F32, Element::E4m3]
        .into_iter()
        .find(|&element| element as usize == index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_survive_and_torn_lines_do_not() {
        let folder = std::env::temp_dir().join(format!("quire-cublaslt-{}", std::process::id()));
        let shape = |n| GemmShape {
            n,
            k: 7,
            x_stride: 9,
            out_stride: n,
            input: Element::F16,
            output: Element::F32,
            bias: (n == 1).then_some(Element::F16),
        };
        let algorithm = |word| Algorithm { data: [word, 0, u64::MAX, 3, 4, 5, 6, 7] };
        let cache = AlgorithmCache::open(&folder, "NVIDIA H200/x", 130_100);
        assert!(cache.load().is_empty());
        cache.append(&(shape(1), 16), &algorithm(1));
        cache.append(&(shape(2), 0), &algorithm(2));
        let mut text = fs::read_to_string(&cache.path).unwrap();
        text.push_str("3 7 9 3 1 2 0 16 1 2 3\nnonsense\n");
        fs::write(&cache.path, text).unwrap();
        let loaded = cache.load();
        assert_eq!(loaded.len(), 2);
        assert_eq!(loaded[&(shape(1), 16)].data, algorithm(1).data);
        assert_eq!(loaded[&(shape(2), 0)].data, algorithm(2).data);
        assert!(AlgorithmCache::open(&folder, "NVIDIA H200/x", 130_200).load().is_empty());
        fs::remove_dir_all(folder).unwrap();
    }
}
