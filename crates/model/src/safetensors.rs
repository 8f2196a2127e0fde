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

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with this header and as many bytes of data.
    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn error(bytes: &[u8]) -> String {
        read_header("f", bytes).unwrap_err().to_string()
    }

    #[test]
    fn tensors_come_in_order_with_their_place_in_the_file() {
        let header = r#"{"__metadata__":{"format":"pt"},
            "b":{"dtype":"BF16","shape":[2,3],"data_offsets":[8,20]},
            "empty":{"dtype":"F32","shape":[0,7],"data_offsets":[8,8]},
            "a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        let entries = read_header("f", &file(header, 20)).unwrap();
        let start = 8 + header.len();
        let found: Vec<_> = entries.iter().map(|entry| (entry.name.as_str(), entry.range.clone())).collect();
        let expected =
            [("a", start..start + 8), ("empty", start + 8..start + 8), ("b", start + 8..start + 20)];
        assert_eq!(found, expected);
        assert_eq!((entries[2].dtype, entries[2].shape.as_slice()), (Dtype::BF16, &[2, 3][..]));
        assert!(read_header("f", &file("{}", 0)).unwrap().is_empty());
    }

    #[test]
    fn hostile_lengths_are_refused() {
        let with_length = |length: u64| [&length.to_le_bytes()[..], b"{}"].concat();
        assert!(error(b"").contains("0 bytes are too few"));
        assert!(error(b"1234567").contains("7 bytes are too few"));
        for length in [u64::MAX, 1 << 63, 100_000_001] {
            assert!(error(&with_length(length)).contains("over the limit of 100000000 bytes"), "{length}");
        }
        for length in [3, 100_000_000] {
            let message = error(&with_length(length));
            assert!(message.contains("reaches past the end of the file (10 bytes)"), "{message}");
        }
        assert!(error(&with_length(1)).contains("not valid JSON"));
        assert!(error(&with_length(0)).contains("not valid JSON"));
        assert!(error(&file("[]", 0)).contains("not valid JSON"));
        assert!(error(&file("{\"a\":\u{7f}}", 0)).contains("not valid JSON"));
        let deep = format!("{{\"a\":{}", "[".repeat(1 << 20));
        assert!(error(&file(&deep, 0)).contains("not valid JSON"));
    }

    #[test]
    fn hostile_entries_are_refused_by_name() {
        let one = |dtype: &str, shape: &str, offsets: &str| {
            format!(r#"{{"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        for (header, expected) in [
            (one("F32", "[2]", "[8,0]"), "tensor `t`: data_offsets [8, 0] end before they begin"),
            (
                one("F32", "[4]", "[0,16]"),
                "tensor `t`: data_offsets [0, 16] reach past the file's 8 bytes of data",
            ),
            (one("F32", "[2]", "[0,18446744073709551615]"), "reach past the file's 8 bytes"),
            (one("F32", "[3]", "[0,8]"), "[0, 8] hold 8 bytes, which does not fit dtype F32 and shape [3]"),
            (one("F32", "[9223372036854775808,4]", "[0,8]"), "does not fit dtype F32"),
            (one("F32", "[9223372036854775808,0,2]", "[0,8]"), "does not fit dtype F32"),
            (one("F33", "[2]", "[0,8]"), "tensor `t`: bad header entry: unknown variant `F33`"),
            (one("F32", "[-2]", "[0,8]"), "tensor `t`: bad header entry"),
            (one("F32", "[2.5]", "[0,8]"), "tensor `t`: bad header entry"),
            (one("F32", "[2]", "[0]"), "tensor `t`: bad header entry"),
            (
                one("F32", "[1]", "[4,8]"),
                "tensor `t` at data offset 4 leaves a gap after the header, which ends at 0",
            ),
            (one("F32", "[1]", "[0,4]"), "4 bytes follow the last tensor"),
            (r#"{"t":7}"#.to_owned(), "tensor `t`: bad header entry"),
            ("{}".to_owned(), "8 bytes follow the last tensor"),
        ] {
            let message = error(&file(&header, 8));
            assert!(message.contains(expected), "{header}: {message}");
        }
        let overlap = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
            "b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
        let message = error(&file(overlap, 8));
        assert!(message.contains("tensor `b` at data offset 4 overlaps a, which ends at 8"), "{message}");
    }

    /// Every single-byte change and every truncation of a small file: an error or a consistent result, no panic;
    /// and the reference reader agrees about which files are good.
    #[test]
    fn no_mutation_panics_or_fools_the_reader() {
        let header = r#"{"a":{"dtype":"F16","shape":[2,1],"data_offsets":[0,4]},"b":{"dtype":"I8","shape":[3],"data_offsets":[4,7]}}"#;
        let good = file(header, 7);
        for cut in 0..good.len() {
            assert!(read_header("f", &good[..cut]).is_err(), "cut at {cut}");
        }
        let mut accepted = 0;
        for position in 0..8 + header.len() {
            for value in 0..=255 {
                let mut bytes = good.clone();
                bytes[position] = value;
                let ours = read_header("f", &bytes);
                let theirs = ::safetensors::SafeTensors::deserialize(&bytes);
                assert_eq!(
                    ours.is_ok(),
                    theirs.is_ok(),
                    "byte {position} = {value}: {ours:?} but {theirs:?}"
                );
                for entry in ours.iter().flatten() {
                    assert!(entry.range.end <= bytes.len());
                    accepted += 1;
                }
            }
        }
        assert!(accepted > 0);
    }
}
