//! Numbers at rest: element types, borrowed tensor views, and how a tensor is split over ranks.

/// Element type of weights, activations or KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of an `F32`.
    BF16,
    /// Signed 8-bit integer with a scale stored beside it.
    I8,
    /// 8-bit float, 4 exponent and 3 mantissa bits (OCP FP8 E4M3).
    F8E4M3,
}

impl DType {
    /// Size of one element in bytes.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::I8 | Self::F8E4M3 => 1,
        }
    }

    /// The name used in configuration files and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::I8 => "int8",
            Self::F8E4M3 => "fp8",
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// How linear weights are stored by a backend, chosen at load (`--quantize`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum QuantFormat {
    /// As in the checkpoint.
    #[default]
    None,
    /// 8-bit integers, one scale per output channel.
    Int8,
    /// 4-bit integers in groups along K, one scale per output channel.
    Int4,
    /// FP8 E4M3, one scale per output channel.
    Fp8,
}

impl QuantFormat {
    /// The name used in configuration files and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Fp8 => "fp8",
        }
    }
}

/// A tensor that lives in a checkpoint: row-major, contiguous, borrowed from an mmap or from static bytes.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Element type of `data`.
    pub dtype: DType,
    /// Dimensions, outermost first; a linear weight is `[out_features, in_features]`.
    pub shape: &'a [usize],
    /// `shape.product() * dtype.size()` little-endian bytes. Not necessarily aligned to the element size.
    pub data: &'a [u8],
}

impl TensorView<'_> {
    /// Number of elements.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Which part of a tensor one tensor-parallel rank holds. `Shard::WHOLE` is everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// This rank, `0..world`.
    pub rank: u32,
    /// Number of ranks.
    pub world: u32,
}

impl Shard {
    /// The only rank of a world of one.
    pub const WHOLE: Self = Self { rank: 0, world: 1 };

    /// This rank's piece of `total` items: pieces follow one another, and the last ones are smaller, or empty, where they do
    /// not come out even.
    pub const fn range(self, total: usize) -> std::ops::Range<usize> {
        let piece = total.div_ceil(self.world as usize);
        let begin = self.rank as usize * piece;
        let end = begin + piece;
        if end <= total {
            begin..end
        } else if begin <= total {
            begin..total
        } else {
            total..total
        }
    }
}
