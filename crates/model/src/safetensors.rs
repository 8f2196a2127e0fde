//! The header of a safetensors file, checked before a single weight is read.
//!
//! Format (github.com/huggingface/safetensors): a little-endian u64 with the header's length, the header as JSON
//! (name -> dtype, shape, data_offsets relative to the end of the header), then the tensors' bytes without gaps.
//! The reference reader refuses the same files; this one says which tensor and which offset is at fault.

use std::ops::Range;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde_json::{Map, Value};

use crate::error::{ModelError, Result};

/// The reference implementation's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// One tensor of a file.
#[derive(Debug)]
pub(crate) struct Entry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Where its bytes are, from the start of the file.
    pub range: Range<usize>,
}

/// Parses and checks the header of `bytes`, the whole of `file`. Tensors come ordered by offset.
pub(crate) fn read_header(file: &str, bytes: &[u8]) -> Result<Vec<Entry>> {
    let (json, data_start) = split_header(file, bytes)?;
    let map: Map<String, Value> = serde_json::from_slice(json).map_err(|error| {
        ModelError::format(
            file,
            format!("the header ({} bytes at offset 8) is not valid JSON: {error}", json.len()),
        )
    })?;
    let mut entries = Vec::with_capacity(map.len());
    for (name, value) in map {
        if name != "__metadata__" {
            entries.push(read_entry(file, name, value, data_start, bytes.len())?);
        }
    }
    entries.sort_by(|a, b| (a.range.start, a.range.end, &a.name).cmp(&(b.range.start, b.range.end, &b.name)));
    check_contiguous(file, &entries, data_start, bytes.len())?;
    Ok(entries)
}

/// The JSON text, and the offset at which the tensors begin.
fn split_header<'a>(file: &str, bytes: &'a [u8]) -> Result<(&'a [u8], usize)> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        let detail = format!("{} bytes are too few for a safetensors file, which begins with 8", bytes.len());
        return Err(ModelError::format(file, detail));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        let detail = format!(
            "header length {length} (at offset 0) is over the limit of {MAX_HEADER_BYTES} bytes; \
             this is not a safetensors file, or it is damaged"
        );
        return Err(ModelError::format(file, detail));
    }
    match rest.split_at_checked(length as usize) {
        Some((json, _)) => Ok((json, 8 + json.len())),
        None => {
            let detail = format!(
                "header length {length} (at offset 0) reaches past the end of the file ({} bytes); the file is \
                 truncated or damaged",
                bytes.len()
            );
            Err(ModelError::format(file, detail))
        }
    }
}

fn read_entry(file: &str, name: String, value: Value, data_start: usize, file_len: usize) -> Result<Entry> {
    let bad = |detail: String| ModelError::format(file, format!("tensor `{name}`: {detail}"));
    let info: TensorInfo =
        serde_json::from_value(value).map_err(|error| bad(format!("bad header entry: {error}")))?;
    let (start, end) = info.data_offsets;
    if start > end {
        return Err(bad(format!("data_offsets [{start}, {end}] end before they begin")));
    }
    let data_len = file_len - data_start;
    if end > data_len {
        return Err(bad(format!(
            "data_offsets [{start}, {end}] reach past the file's {data_len} bytes of data; the file is truncated or damaged"
        )));
    }
    let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |bits, &dim| bits.checked_mul(dim));
    if bits != (end - start).checked_mul(8) {
        return Err(bad(format!(
            "data_offsets [{start}, {end}] hold {} bytes, which does not fit dtype {:?} and shape {:?}",
            end - start,
            info.dtype,
            info.shape
        )));
    }
    Ok(Entry { range: data_start + start..data_start + end, dtype: info.dtype, shape: info.shape, name })
}

/// Tensors must follow one another and fill the file: overlaps and gaps are how files are forged or cut.
fn check_contiguous(file: &str, entries: &[Entry], data_start: usize, file_len: usize) -> Result<()> {
    let mut expected = data_start;
    let mut previous = "the header";
    for entry in entries {
        let (found, wanted) = (entry.range.start - data_start, expected - data_start);
        if found != wanted {
            let problem = if found < wanted { "overlaps" } else { "leaves a gap after" };
            let detail = format!(
                "tensor `{}` at data offset {found} {problem} {previous}, which ends at {wanted}",
                entry.name
            );
            return Err(ModelError::format(file, detail));
        }
        expected = entry.range.end;
        previous = &entry.name;
    }
    if expected != file_len {
        let detail = format!(
            "{} bytes follow the last tensor; the header does not account for them",
            file_len - expected
        );
        return Err(ModelError::format(file, detail));
    }
    Ok(())
}
