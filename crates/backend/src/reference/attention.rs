//! The paged cache, and attention over it.

use quire_core::{BlockCopy, DType, HostCopy};

use crate::convert::{round_to, tensor_error};
use crate::{BackendError, KvLayout, fp8};

/// The paged cache in f32, every value rounded to the cache's type when it is written (fp8: each
/// key and value with a scale of its own). Slots never written hold NaN, so
/// that reading one shows.
#[derive(Clone, Debug)]
pub struct RefKv {
    layout: KvLayout,
    layers: Vec<RefKvLayer>,
    /// The same layers in host memory.
    host: Vec<RefKvLayer>,
}

#[derive(Clone, Debug)]
struct RefKvLayer {
    /// `[num_blocks * block_size, kv_size]`.
    k: Vec<f32>,
    v: Vec<f32>,
    kv_size: usize,
    head_dim: usize,
}

impl RefKv {
    pub(super) fn new(layout: &KvLayout) -> Result<Self, BackendError> {
        if layout.dtype == DType::I8 {
            return Err(tensor_error(
                "kv cache",
                "type int8 is not supported here, use f32, f16, bf16 or fp8",
            ));
        }
        Ok(Self { layout: layout.clone(), layers: poisoned(layout), host: Vec::new() })
    }

    pub(super) fn alloc_host(&mut self, layout: &KvLayout) {
        self.host = poisoned(layout);
    }

    pub(super) fn copy_to_host(&mut self, copy: HostCopy) {
        let block_size = self.layout.block_size as usize;
        for (device, host) in self.layers.iter().zip(&mut self.host) {
            host.copy_block_of(device, block_size, copy.device.0, copy.host.0);
        }
    }

    pub(super) fn copy_to_device(&mut self, copy: HostCopy) {
        let block_size = self.layout.block_size as usize;
        for (device, host) in self.layers.iter_mut().zip(&self.host) {
            device.copy_block_of(host, block_size, copy.host.0, copy.device.0);
        }
    }

    pub(super) fn store(&mut self, layer: usize, slot: u32, k: &[f32], v: &[f32]) {
        let dtype = self.layout.dtype;
        let layer = &mut self.layers[layer];
        let start = slot as usize * layer.kv_size;
        for (to, from) in [(&mut layer.k, k), (&mut layer.v, v)] {
            let to = &mut to[start..start + layer.kv_size];
            to.copy_from_slice(from);
            match dtype {
                DType::F8E4M3 => to.chunks_mut(layer.head_dim).for_each(fp8::round_vector),
                _ => to.iter_mut().for_each(|value| *value = round_to(dtype, *value)),
            }
        }
    }

    pub(super) fn copy_block(&mut self, copy: BlockCopy) {
        let block_size = self.layout.block_size as usize;
        for layer in &mut self.layers {
            let len = block_size * layer.kv_size;
            let (src, dst) = (copy.src.0 as usize * len, copy.dst.0 as usize * len);
            layer.k.copy_within(src..src + len, dst);
            layer.v.copy_within(src..src + len, dst);
        }
    }
}

impl RefKvLayer {
    fn copy_block_of(&mut self, from: &Self, block_size: usize, src: u32, dst: u32) {
        let len = block_size * self.kv_size;
        let (src, dst) = (src as usize * len, dst as usize * len);
        self.k[dst..dst + len].copy_from_slice(&from.k[src..src + len]);
        self.v[dst..dst + len].copy_from_slice(&from.v[src..src + len]);
    }
}

fn poisoned(layout: &KvLayout) -> Vec<RefKvLayer> {
    let slots = layout.num_blocks as usize * layout.block_size as usize;
    let layers = layout.layers.iter().map(|layer| {
        let head_dim = layer.head_dim as usize;
        let kv_size = layer.num_kv_heads as usize * head_dim;
        let poison = vec![f32::NAN; slots * kv_size];
        RefKvLayer { k: poison.clone(), v: poison, kv_size, head_dim }
    });
    layers.collect()
}

/// Which keys one query row sees.
pub(super) struct Context<'a> {
    /// The cache.
    pub kv: &'a RefKv,
    /// Layer within it.
    pub layer: usize,
    /// Block ids of the row's sequence.
    pub block_table: &'a [u32],
    /// First position seen; the last is the row's own.
    pub first: u32,
    /// The row's position.
    pub last: u32,
}

impl Context<'_> {
    /// Offset of the key (and value) of `head` at `position`.
    fn offset(&self, position: u32, head: usize, head_dim: usize) -> usize {
        let block_size = self.kv.layout.block_size;
        let slot = self.block_table[(position / block_size) as usize] * block_size + position % block_size;
        slot as usize * self.kv.layers[self.layer].kv_size + head * head_dim
    }
}

/// How scores become weights, for one query head.
pub(super) struct Scoring {
    pub scale: f32,
    pub soft_cap: Option<f32>,
    pub sink: Option<f32>,
}

impl Scoring {
    fn score(&self, dot: f64) -> f64 {
        let score = dot * f64::from(self.scale);
        self.soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
    }
}

/// `out = softmax(score(q · K)) · V` for one query head, in f64.
pub(super) fn attend(context: &Context<'_>, kv_head: usize, scoring: &Scoring, q: &[f32], out: &mut [f32]) {
    let head_dim = q.len();
    let layer = &context.kv.layers[context.layer];
    let positions = context.first..=context.last;
    let offsets: Vec<usize> = positions.map(|p| context.offset(p, kv_head, head_dim)).collect();

    let scores: Vec<f64> = offsets
        .iter()
        .map(|&at| {
            let k = &layer.k[at..at + head_dim];
            let dot: f64 = q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
            scoring.score(dot)
        })
        .collect();
    let sink = scoring.sink.map_or(f64::NEG_INFINITY, f64::from);
    let max = scores.iter().copied().fold(sink, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = weights.iter().sum::<f64>() + (sink - max).exp();

    for (d, out) in out.iter_mut().enumerate() {
        let value: f64 = offsets.iter().zip(&weights).map(|(&at, w)| w * f64::from(layer.v[at + d])).sum();
        *out = (value / sum) as f32;
    }
}
