//! Files on disk: round trips, damage, and writers at the same time. What comes out is compared with what the packers make.

use std::fs;
use std::path::PathBuf;

use half::bf16;
use quire_backend::LinearPart;
use quire_core::{DType, QuantFormat, TensorView};

use super::*;
use crate::backend::Precision;
use crate::buffer::Aligned;
use crate::weights::CpuWeight;

const K: usize = 100;
const SHAPES: [(&str, [usize; 2]); 3] = [("qkv", [40, K]), ("up", [16, K]), ("head", [33, K])];
const FORMATS: [QuantFormat; 3] = [QuantFormat::None, QuantFormat::Int8, QuantFormat::Int4];

/// A folder of this test's own, empty.
fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("quire-prepacked-{}-{name}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn key(source: &str, quant: QuantFormat) -> PackKey {
    PackKey::new(source.as_bytes(), Precision::Bf16, quant).unwrap()
}

/// Matrices of [`SHAPES`], in bf16; another `seed` makes other ones.
fn matrix(seed: usize, [n, k]: [usize; 2]) -> Vec<u8> {
    let value = |i: usize| ((i * 2_654_435_761 + seed * 977) % 2001) as f32 / 1000.0 - 1.0;
    (0..n * k).flat_map(|i| bf16::from_f32(value(i)).to_le_bytes()).collect()
}

/// Loads all layers; returns their rows as bits.
fn load(prepacked: &Prepacked, seed: usize, quant: QuantFormat) -> Vec<Vec<u32>> {
    let mut pool = Pool::new(1).unwrap();
    let rows = SHAPES.map(|(name, shape)| {
        let data = matrix(seed, shape);
        let weight = TensorView { dtype: DType::BF16, shape: &shape, data: &data };
        let parts = [LinearPart { weight, bias: None }];
        let source = LinearSource { name, parts: &parts, quant };
        let weight = CpuWeight::load(&mut pool, Precision::Bf16, Some(prepacked), &source).unwrap();
        let mut bits = Vec::new();
        for row in 0..shape[0] {
            let mut values = vec![0.0; K];
            match &weight.matrix {
                Matrix::Packed(packed) => packed.row(row, &mut values),
                Matrix::Quantized(quantized) => quantized.row(row, &mut values),
                _ => panic!("{name} is not packed"),
            }
            bits.extend(values.into_iter().map(f32::to_bits));
        }
        bits
    });
    rows.into()
}

fn packing(seed: usize, quant: QuantFormat) -> Packing {
    let prepacked = Prepacked::default();
    load(&prepacked, seed, quant);
    prepacked.finish().unwrap()
}

#[test]
fn a_file_replaces_packing_and_its_source() {
    let folder = folder("round-trip");
    for quant in FORMATS {
        let (path, key) = (folder.join(format!("{quant:?}")), key("a", quant));
        let first = Prepacked::default();
        let packed = load(&first, 1, quant);
        let packing = first.finish().expect("all was packed");
        let size = packing.write(&path, &key).unwrap();
        assert_eq!(size, fs::metadata(&path).unwrap().len());

        let second = Prepacked::new(Some(PackFile::open(&path, &key).unwrap()));
        second.prefault();
        // Other data: what is in the file counts.
        assert_eq!(load(&second, 2, quant), packed, "{quant:?}");
        assert!(second.finish().is_none(), "nothing was packed");
        assert_ne!(load(&Prepacked::default(), 2, quant), packed);
    }
    assert_eq!(fs::read_dir(&folder).unwrap().count(), FORMATS.len(), "no temporary is left");
    fs::remove_dir_all(folder).unwrap();
}

/// As when a later version merges tensors differently, and forgets to say so.
#[test]
fn layers_of_another_shape_are_packed() {
    let folder = folder("shapes");
    let (path, key) = (folder.join("pack"), key("a", QuantFormat::None));
    let mut odd = packing(1, QuantFormat::None);
    odd.layers[1].n = 17;
    odd.layers[1].panels.words = Aligned::zeroed(Packed::num_pairs(17, K), "test").unwrap().into();
    odd.layers[2].name = "lm_head".into();
    odd.write(&path, &key).unwrap();

    let prepacked = Prepacked::new(Some(PackFile::open(&path, &key).unwrap()));
    let (first, second) =
        (load(&Prepacked::default(), 1, QuantFormat::None), load(&prepacked, 1, QuantFormat::None));
    assert_eq!(first, second);
    let whole = prepacked.finish().expect("two were packed");
    assert_eq!(whole.layers.len(), SHAPES.len(), "the file to write has all");
    // While the old one is mapped.
    whole.write(&path, &key).unwrap();
    let prepacked = Prepacked::new(Some(PackFile::open(&path, &key).unwrap()));
    assert_eq!(load(&prepacked, 2, QuantFormat::None), first);
    assert!(prepacked.finish().is_none());
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn what_is_no_such_file_is_told_apart_and_replaced() {
    let folder = folder("damage");
    let (path, key) = (folder.join("pack"), key("a", QuantFormat::Int8));
    assert!(
        matches!(PackFile::open(&path, &key), Err(PackError::Io(error)) if error.kind() == io::ErrorKind::NotFound)
    );
    let packing = packing(1, QuantFormat::Int8);
    packing.write(&path, &key).unwrap();
    let good = fs::read(&path).unwrap();
    let cut = |len: usize| good[..len].to_vec();
    let flip = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    let other_key = self::key("b", QuantFormat::Int8);
    packing.write(&path, &other_key).unwrap();
    let foreign = fs::read(&path).unwrap();
    for (what, bytes, reason) in [
        ("empty", Vec::new(), "ends before"),
        ("a text", b"version https://git-lfs.github.com/spec/v1".to_vec(), "not a file of packed weights"),
        ("cut in its header", cut(20), "ends before"),
        ("cut in its table", cut(120), "bytes of"),
        ("cut in its arrays", cut(good.len() / 2), "bytes of"),
        ("a byte short", cut(good.len() - 1), "bytes of"),
        ("a byte long", [&good[..], &[0]].concat(), "bytes of"),
        ("of another program", flip(0), "not a file of packed weights"),
        ("of another version", flip(8), "another version"),
        ("with more entries", flip(12), "checksum"),
        ("with another length", flip(16), "bytes of"),
        ("with a large table", flip(28), "table of"),
        ("with another key", flip(40), "other files"),
        ("of other files", foreign, "other files"),
        ("with another checksum", flip(70), "checksum"),
        ("with another table", flip(110), "checksum"),
    ] {
        fs::write(&path, bytes).unwrap();
        let error =
            PackFile::open(&path, &key).err().unwrap_or_else(|| panic!("{what} was opened")).to_string();
        assert!(error.contains(reason), "{what}: {error}");
        packing.write(&path, &key).unwrap();
        assert_eq!(fs::read(&path).unwrap(), good, "{what}");
    }
    fs::remove_dir_all(folder).unwrap();
}

/// Wrong numbers, but numbers: whatever the arrays hold, they can be computed with.
#[test]
fn damaged_arrays_change_numbers_alone() {
    let folder = folder("arrays");
    for quant in FORMATS {
        let (path, key) = (folder.join(format!("{quant:?}")), key("a", quant));
        packing(1, quant).write(&path, &key).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        bytes[4096..].fill(0xFF);
        fs::write(&path, bytes).unwrap();
        let prepacked = Prepacked::new(Some(PackFile::open(&path, &key).unwrap()));
        assert_ne!(load(&prepacked, 1, quant), load(&Prepacked::default(), 1, quant));
    }
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn places_that_cannot_be_written_to_stay_as_they_are() {
    let folder = folder("refused");
    let (packing, key) = (packing(1, QuantFormat::Int4), key("a", QuantFormat::Int4));
    fs::write(folder.join("file"), "mine").unwrap();
    let below_a_file = packing.write(&folder.join("file/pack"), &key).unwrap_err();
    assert!(matches!(below_a_file, PackError::Io(_)), "{below_a_file}");
    fs::create_dir(folder.join("folder")).unwrap();
    let on_a_folder = packing.write(&folder.join("folder"), &key).unwrap_err();
    assert!(matches!(on_a_folder, PackError::Io(_)), "{on_a_folder}");
    // A link where the temporary goes must not lead to a file elsewhere.
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(folder.join("file"), folder.join("pack.tmp")).unwrap();
        let through_a_link = packing.write(&folder.join("pack"), &key).unwrap_err();
        assert!(matches!(through_a_link, PackError::Busy), "{through_a_link}");
    }
    assert_eq!(fs::read(folder.join("file")).unwrap(), b"mine");
    assert!(!folder.join("pack").exists() && !folder.join("folder.tmp").exists());
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_temporary_left_behind_is_used_again() {
    let folder = folder("leftover");
    let (packing, key) = (packing(1, QuantFormat::Int8), key("a", QuantFormat::Int8));
    let path = folder.join("pack");
    // Longer than the file will be.
    fs::write(folder.join("pack.tmp"), vec![7; 1 << 20]).unwrap();
    packing.write(&path, &key).unwrap();
    assert!(PackFile::open(&path, &key).is_ok());
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn writers_and_readers_at_once_see_whole_files() {
    let folder = folder("at-once");
    let (path, key) = (folder.join("pack"), key("a", QuantFormat::Int8));
    let packed = load(&Prepacked::default(), 1, QuantFormat::Int8);
    let packings: Vec<_> = (0..4).map(|_| packing(1, QuantFormat::Int8)).collect();
    packings[0].write(&path, &key).unwrap();
    let written: usize = std::thread::scope(|scope| {
        let write = |packing: &Packing| {
            let done = (0..25).filter(|_| match packing.write(&path, &key) {
                Ok(_) => true,
                Err(PackError::Busy) => false,
                Err(error) => panic!("{error}"),
            });
            done.count()
        };
        let writers: Vec<_> = packings.iter().map(|packing| scope.spawn(move || write(packing))).collect();
        for _ in 0..50 {
            let prepacked = Prepacked::new(Some(PackFile::open(&path, &key).unwrap()));
            assert_eq!(load(&prepacked, 2, QuantFormat::Int8), packed);
        }
        writers.into_iter().map(|writer| writer.join().unwrap()).sum()
    });
    assert!(written > 0);
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "no temporary is left");
    fs::remove_dir_all(folder).unwrap();
}
