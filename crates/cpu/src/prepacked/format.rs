//! The bytes of a file of packed weights, all integers little-endian:
//!
//! ```text
//! 0   magic            8 bytes
//! 8   format version   u32
//! 12  entries          u32
//! 16  file length      u64
//! 24  table length     u64
//! 32  key              32 bytes, see [`PackKey`]
//! 64  checksum         32 bytes, SHA-256 of bytes 0..64 and the table
//! 96  table            an entry: name length u32, name, layout u32, n, k, words at, words length, scales at,
//!                      scales length u64 each; places from the start of the file, lengths in bytes
//! ..  arrays           each at a multiple of 4096
//! ```
//!
//! The arrays have no checksum: to read 2.5 GB once takes longer than the file may cost. The file's length shows that it
//! was written to its end, which comes before it gets its name.

use std::ops::Range;

use quire_backend::quant::{ACT_GROUP, INT4_GROUP};
use quire_core::QuantFormat;
use sha2::{Digest, Sha256};

use super::PackError;
use crate::backend::Precision;
use crate::packed::Packed;
use crate::quantized::Codes;
use crate::simd::pairs::PANEL;

/// To be raised with any change to how panels lie, to what their numbers mean, or to which tensors a layer is made of.
const LAYOUT_VERSION: u32 = 1;
/// Of the file around them.
const FORMAT_VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"QUIREPAK";
const HEADER: usize = 64;
const CHECKSUM: usize = 32;
/// Arrays begin at multiples of a page, which kernels need less of, and mappings and disks like.
const ALIGN: usize = 4096;
/// A table larger than this is not one of ours.
const MAX_TABLE: usize = 16 << 20;

/// What a file of packed weights is for: its content is right for a load with the same key, and for no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackKey {
    role: &'static str,
    hash: [u8; 32],
}

impl PackKey {
    /// The key for weights of `source`, which stands for all that decides them (see `Checkpoint::fingerprint` of the
    /// model crate). `None` where nothing is packed, so that a file would hold nothing.
    ///
    /// Panels are the same on every instruction set; only the order of bytes in a word is the machine's.
    pub fn new(source: &[u8], precision: Precision, quant: QuantFormat) -> Option<Self> {
        let role = match (quant, precision) {
            (QuantFormat::None, Precision::Bf16) => "bf16",
            (QuantFormat::Int8, Precision::F32) => "int8",
            (QuantFormat::Int8, Precision::Bf16) => "int8-bf16",
            (QuantFormat::Int4, Precision::F32) => "int4",
            (QuantFormat::Int4, Precision::Bf16) => "int4-bf16",
            (QuantFormat::None, Precision::F32) | (QuantFormat::Fp8, _) => return None,
        };
        let layout = format!(
            "quire-cpu {} layout {LAYOUT_VERSION} panel {PANEL} groups {INT4_GROUP} {ACT_GROUP} {} {role}\n",
            env!("CARGO_PKG_VERSION"),
            if cfg!(target_endian = "little") { "le" } else { "be" },
        );
        let hash = Sha256::new().chain_update(layout).chain_update(source).finalize();
        Some(Self { role, hash: hash.into() })
    }

    /// What tells files of one model apart: the format of the layers, and that of what is not quantized if it is packed
    /// too.
    pub const fn role(&self) -> &'static str {
        self.role
    }
}

/// How a layer lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    Bf16,
    Quantized(Codes),
}

impl Layout {
    const fn code(self) -> u32 {
        match self {
            Self::Bf16 => 1,
            Self::Quantized(Codes::Int8) => 2,
            Self::Quantized(Codes::Int4) => 3,
        }
    }

    const fn from_code(code: u32) -> Option<Self> {
        match code {
            1 => Some(Self::Bf16),
            2 => Some(Self::Quantized(Codes::Int8)),
            3 => Some(Self::Quantized(Codes::Int4)),
            _ => None,
        }
    }

    /// Words and scales of `[n, k]`.
    pub(crate) const fn lens(self, n: usize, k: usize) -> (usize, usize) {
        match self {
            Self::Bf16 => (Packed::num_pairs(n, k), 0),
            Self::Quantized(codes) => {
                let panels = n.div_ceil(PANEL);
                (panels * codes.panel_words(k), panels * PANEL)
            }
        }
    }
}

/// A layer in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub name: String,
    pub layout: Layout,
    pub n: usize,
    pub k: usize,
    /// Where its words and scales are, in bytes.
    pub words: Range<usize>,
    pub scales: Range<usize>,
}

/// Places entries of these names, layouts, `n` and `k`; returns them with the bytes before the first array, and the
/// length of the file.
pub(crate) fn encode<'a>(
    key: &PackKey,
    layers: impl Iterator<Item = (&'a str, Layout, usize, usize)> + Clone,
) -> (Vec<u8>, Vec<Entry>, usize) {
    let table_len: usize = layers.clone().map(|(name, ..)| 4 + name.len() + 4 + 6 * 8).sum();
    let mut end = HEADER + CHECKSUM + table_len;
    let mut place = |len: usize| {
        let start = end.next_multiple_of(ALIGN);
        end = start + 4 * len;
        start..end
    };
    let entries = layers.map(|(name, layout, n, k)| {
        let (words, scales) = layout.lens(n, k);
        Entry { name: name.to_owned(), layout, n, k, words: place(words), scales: place(scales) }
    });
    let entries: Vec<_> = entries.collect();
    let mut table = Vec::with_capacity(table_len);
    for Entry { name, layout, n, k, words, scales } in &entries {
        table.extend((name.len() as u32).to_le_bytes());
        table.extend(name.as_bytes());
        table.extend(layout.code().to_le_bytes());
        for number in [*n, *k, words.start, words.len(), scales.start, scales.len()] {
            table.extend((number as u64).to_le_bytes());
        }
    }
    let mut bytes = Vec::with_capacity(HEADER + CHECKSUM + table_len);
    bytes.extend(MAGIC);
    bytes.extend(FORMAT_VERSION.to_le_bytes());
    bytes.extend((entries.len() as u32).to_le_bytes());
    bytes.extend((end as u64).to_le_bytes());
    bytes.extend((table_len as u64).to_le_bytes());
    bytes.extend(key.hash);
    bytes.extend(checksum(&bytes, &table));
    bytes.extend(table);
    (bytes, entries, end)
}

/// The entries of a file, all of whose arrays are inside and aligned.
///
/// # Errors
/// Why it is not one for `key`.
pub(crate) fn decode(file: &[u8], key: &PackKey) -> Result<Vec<Entry>, PackError> {
    let mut header = Reader(file);
    if header.take(MAGIC.len())? != MAGIC {
        return Err(PackError::Foreign("is not a file of packed weights"));
    }
    if header.u32()? != FORMAT_VERSION {
        return Err(PackError::Foreign("has the format of another version"));
    }
    let (num_entries, file_len, table_len) = (header.u32()?, header.u64()?, header.u64()?);
    if header.take(key.hash.len())? != key.hash {
        return Err(PackError::Foreign("was made of other files, by another version or with other settings"));
    }
    if file_len != file.len() {
        return Err(PackError::Damaged(format!("has {} bytes of {file_len}", file.len())));
    }
    if table_len > MAX_TABLE {
        return Err(PackError::Damaged(format!("has a table of {table_len} bytes")));
    }
    let sum = header.take(CHECKSUM)?;
    let table = header.take(table_len)?;
    if checksum(&file[..HEADER], table)[..] != *sum {
        return Err(PackError::Damaged("has a table with a wrong checksum".into()));
    }
    let mut table = Reader(table);
    let mut entries = Vec::new();
    for _ in 0..num_entries {
        entries.push(read_entry(&mut table, file.len())?);
    }
    Ok(entries)
}

fn read_entry(table: &mut Reader<'_>, file_len: usize) -> Result<Entry, PackError> {
    let name_len = table.u32()? as usize;
    let name = str::from_utf8(table.take(name_len)?).map_err(|_| damaged("an entry's name"))?.to_owned();
    let layout = Layout::from_code(table.u32()?).ok_or_else(|| damaged(&name))?;
    let (n, k) = (table.u64()?, table.u64()?);
    let mut array = || -> Result<_, PackError> {
        let (start, len) = (table.u64()?, table.u64()?);
        let end = start.checked_add(len).filter(|&end| end <= file_len);
        let is_aligned = start.is_multiple_of(ALIGN) && len.is_multiple_of(4);
        end.filter(|_| is_aligned).map(|end| start..end).ok_or_else(|| damaged(&name))
    };
    let (words, scales) = (array()?, array()?);
    Ok(Entry { name, layout, n, k, words, scales })
}

fn damaged(what: &str) -> PackError {
    PackError::Damaged(format!("has a wrong entry for {what}"))
}

fn checksum(header: &[u8], table: &[u8]) -> [u8; CHECKSUM] {
    Sha256::new().chain_update(header).chain_update(table).finalize().into()
}

/// Takes numbers off the front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], PackError> {
        let cut = || PackError::Damaged("ends before its arrays begin".into());
        let (taken, rest) = self.0.split_at_checked(len).ok_or_else(cut)?;
        self.0 = rest;
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32, PackError> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().expect("four bytes were taken")))
    }

    fn u64(&mut self) -> Result<usize, PackError> {
        let number = u64::from_le_bytes(self.take(8)?.try_into().expect("eight bytes were taken"));
        usize::try_from(number).map_err(|_| PackError::Damaged(format!("has a length of {number}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYERS: [(&str, Layout, usize, usize); 3] = [
        ("layers.0.qkv", Layout::Bf16, 33, 7),
        ("layers.0.up", Layout::Quantized(Codes::Int8), 16, 100),
        ("embed", Layout::Quantized(Codes::Int4), 1, 33),
    ];

    fn key(source: &str) -> PackKey {
        PackKey::new(source.as_bytes(), Precision::Bf16, QuantFormat::Int4).unwrap()
    }

    fn file() -> (Vec<u8>, Vec<Entry>) {
        let (mut bytes, entries, len) = encode(&key("a"), LAYERS.into_iter());
        bytes.resize(len, 0);
        (bytes, entries)
    }

    #[test]
    fn entries_survive_and_their_arrays_are_aligned_and_apart() {
        let (bytes, entries) = file();
        assert_eq!(decode(&bytes, &key("a")).unwrap(), entries);
        let mut end = HEADER + CHECKSUM;
        for (entry, (name, layout, n, k)) in entries.iter().zip(LAYERS) {
            assert_eq!((&entry.name[..], entry.layout, entry.n, entry.k), (name, layout, n, k));
            for (array, len) in [(&entry.words, layout.lens(n, k).0), (&entry.scales, layout.lens(n, k).1)] {
                assert!(array.start >= end && array.start.is_multiple_of(ALIGN), "{entry:?}");
                assert_eq!(array.len(), 4 * len);
                end = array.end;
            }
        }
        assert_eq!(end, bytes.len());
        // 33 channels are 3 panels, 7 inputs are 4 pairs.
        assert_eq!(entries[0].words.len(), 3 * 16 * 4 * 4);
    }

    #[test]
    fn every_wrong_byte_before_the_arrays_is_noticed() {
        let (good, entries) = file();
        let table_end = HEADER + CHECKSUM + LAYERS.map(|(name, ..)| name.len() + 56).iter().sum::<usize>();
        assert!(table_end < entries[0].words.start);
        for at in 0..table_end {
            for bit in [0, 7] {
                let mut bytes = good.clone();
                bytes[at] ^= 1 << bit;
                assert!(decode(&bytes, &key("a")).is_err(), "bit {bit} of byte {at}");
            }
        }
        for len in (0..table_end).chain([good.len() - 1]) {
            assert!(decode(&good[..len], &key("a")).is_err(), "{len} bytes");
        }
    }

    /// As a bad or hostile writer would, with a checksum that is right.
    #[test]
    fn arrays_outside_the_file_or_askew_are_refused() {
        let numbers = HEADER + CHECKSUM + 4 + LAYERS[0].0.len() + 4;
        let refused = |at: usize, value: u64| {
            let (mut bytes, entries) = file();
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            let table_end = HEADER + CHECKSUM + usize::from_le_bytes(bytes[24..32].try_into().unwrap());
            let sum = checksum(&bytes[..HEADER], &bytes[HEADER + CHECKSUM..table_end.min(bytes.len())]);
            bytes[HEADER..HEADER + CHECKSUM].copy_from_slice(&sum);
            assert!(table_end <= entries[0].words.start);
            decode(&bytes, &key("a")).is_err()
        };
        let (words_at, words_len) = (numbers + 16, numbers + 24);
        assert!(!refused(words_at, ALIGN as u64), "where it is anyway");
        for (at, value) in [
            (words_at, ALIGN as u64 + 4),
            (words_at, 1 << 20),
            (words_at, u64::MAX - 4095),
            (words_len, 1 << 20),
            (words_len, u64::MAX),
            (words_len, 7),
        ] {
            assert!(refused(at, value), "{value} at {at}");
        }
    }

    #[test]
    fn the_key_is_source_and_settings() {
        let base = key("a");
        let keys = [
            key("b"),
            PackKey::new(b"a", Precision::F32, QuantFormat::Int4).unwrap(),
            PackKey::new(b"a", Precision::Bf16, QuantFormat::Int8).unwrap(),
            PackKey::new(b"a", Precision::Bf16, QuantFormat::None).unwrap(),
        ];
        assert_eq!(base, key("a"));
        let (bytes, _) = file();
        for other in keys {
            assert_ne!(base, other);
            assert!(matches!(decode(&bytes, &other), Err(PackError::Foreign(_))));
        }
        assert_eq!(PackKey::new(b"a", Precision::F32, QuantFormat::None), None, "nothing is packed");
    }
}
