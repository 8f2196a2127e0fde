//! The kernels by what they do, found in the images once, and the launch shapes that `kernels/include` prescribes.

use crate::blaslt::Element;
use crate::driver::{CudaError, Function, LaunchShape, Modules};
use crate::params::{
    ActParams, AddNormParams, AttentionParams, AttentionPlanParams, CopyPagesParams, CountTokensParams,
    EmbedParams, GatherRowsParams, LogitsParams, LogprobsParams, MoeCombineParams, MoeGemmParams,
    MoeRouteParams, MoeSortParams, RopeCacheParams, SampleParams, StepPlanParams, UpdateTablesParams,
};

const ROW_THREADS: u32 = 256;
/// Rows of a tile of prefill attention.
pub const PREFILL_ROWS: usize = 128;
/// Query rows (tokens times query heads per KV head) that decode attention takes.
pub const DECODE_ROWS: usize = 16;
/// Ids in a part of a row of logits.
const LOGITS_PART: usize = 8192;
const NORM_MAX_HIDDEN: usize = 32_768;

/// A kernel, and a slower one for sizes that the first does not take.
#[derive(Debug)]
pub struct Pair<P> {
    fast: Function<P>,
    any: Function<P>,
}

impl<P> Pair<P> {
    fn choose(&self, is_fast: bool) -> &Function<P> {
        if is_fast { &self.fast } else { &self.any }
    }
}

/// Attention for head sizes up to `head_dim`.
#[derive(Debug)]
pub struct AttentionKernels {
    head_dim: usize,
    /// Few query rows.
    pub decode: Function<AttentionParams>,
    decode_smem: u32,
    /// Many.
    pub prefill: Function<AttentionParams>,
    prefill_smem: u32,
}

/// Mixtures of experts.
#[derive(Debug)]
pub struct MoeKernels {
    pub route: Function<MoeRouteParams>,
    pub sort: Function<MoeSortParams>,
    pub gate_up: Function<MoeGemmParams>,
    pub down: Function<MoeGemmParams>,
    pub combine: Function<MoeCombineParams>,
}

/// Every kernel of one activation type.
#[derive(Debug)]
pub struct Kernels {
    pub embed: Function<EmbedParams>,
    pub add_norm: Pair<AddNormParams>,
    pub rope_cache: Pair<RopeCacheParams>,
    pub act: Pair<ActParams>,
    pub moe: MoeKernels,
    pub gather_rows: Function<GatherRowsParams>,
    pub copy_pages: Function<CopyPagesParams>,
    pub step_plan: Function<StepPlanParams>,
    pub update_tables: Function<UpdateTablesParams>,
    pub attention_plan: Function<AttentionPlanParams>,
    pub attention: Vec<AttentionKernels>,
    pub logits_process: Function<LogitsParams>,
    pub sample: Function<SampleParams>,
    pub logprobs: Function<LogprobsParams>,
    pub count_tokens: Function<CountTokensParams>,
}

/// Dynamic shared memory of `quire_sample`: a sum for every 128 ids.
fn sample_smem(vocab: usize) -> u32 {
    (vocab.div_ceil(4096) * 32 * 8) as u32
}

/// The largest vocabulary that `quire_sample` can be given.
const MAX_VOCAB: usize = 1 << 20;

impl Kernels {
    /// Finds all of them.
    ///
    /// # Errors
    /// One is missing: the images are of another version.
    pub fn find(modules: &Modules, activations: Element) -> Result<Self, CudaError> {
        let act = match activations {
            Element::F16 => "f16",
            _ => "bf16",
        };
        let attention = |head_dim: usize| -> Result<AttentionKernels, CudaError> {
            let (decode_smem, prefill_smem) = (decode_smem(head_dim), prefill_smem(head_dim));
            let decode = format!("quire_attention_decode_{act}_{head_dim}");
            let prefill = format!("quire_attention_prefill_{act}_{head_dim}");
            Ok(AttentionKernels {
                head_dim,
                decode: modules.function(&decode, decode_smem)?,
                decode_smem,
                prefill: modules.function(&prefill, prefill_smem)?,
                prefill_smem,
            })
        };
        Ok(Self {
            embed: modules.function(&format!("quire_embed_{act}"), 0)?,
            add_norm: pair(modules, "quire_add_norm", act)?,
            rope_cache: pair(modules, "quire_rope_cache", act)?,
            act: pair(modules, "quire_act", act)?,
            moe: MoeKernels {
                route: modules.function("quire_moe_route", 0)?,
                sort: modules.function("quire_moe_sort", 0)?,
                gate_up: modules.function(&format!("quire_moe_gate_up_{act}"), 0)?,
                down: modules.function(&format!("quire_moe_down_{act}"), 0)?,
                combine: modules.function(&format!("quire_moe_combine_{act}"), 0)?,
            },
            gather_rows: modules.function(&format!("quire_gather_rows_{act}"), 0)?,
            copy_pages: modules.function("quire_copy_pages", 0)?,
            step_plan: modules.function("quire_step_plan", 0)?,
            update_tables: modules.function("quire_update_tables", 0)?,
            attention_plan: modules.function("quire_attention_plan", 0)?,
            attention: [64, 128, 256].into_iter().map(attention).collect::<Result<_, _>>()?,
            logits_process: modules.function("quire_logits_process", 0)?,
            sample: modules.function("quire_sample", sample_smem(MAX_VOCAB))?,
            logprobs: modules.function("quire_logprobs", 0)?,
            count_tokens: modules.function("quire_count_tokens", 0)?,
        })
    }

    pub fn add_norm(&self, rows: usize, hidden: usize) -> (&Function<AddNormParams>, LaunchShape) {
        let is_fast = hidden.is_multiple_of(8) && hidden <= NORM_MAX_HIDDEN;
        let vectors = match hidden {
            0..=8192 => 1,
            8193..=16384 => 2,
            _ => 4,
        };
        let threads =
            if is_fast { (hidden / 8).div_ceil(vectors).next_multiple_of(32) as u32 } else { ROW_THREADS };
        (self.add_norm.choose(is_fast), LaunchShape::linear(rows as u32, threads))
    }

    pub fn rope_cache(
        &self,
        rows: usize,
        heads: usize,
        head_dim: usize,
        rotary_dim: usize,
    ) -> (&Function<RopeCacheParams>, LaunchShape) {
        let is_fast = head_dim.is_multiple_of(16) && rotary_dim.is_multiple_of(16) && head_dim <= 512;
        let lanes = if is_fast { (head_dim / 16).next_power_of_two() } else { 32 };
        (self.rope_cache.choose(is_fast), by_rows(rows, (heads * lanes).div_ceil(256), 256))
    }

    pub fn act(&self, rows: usize, width: usize) -> (&Function<ActParams>, LaunchShape) {
        (self.act.choose(width.is_multiple_of(8)), by_rows(rows, width.div_ceil(16 * 256), 256))
    }

    /// One block, whatever there is to sort.
    pub const MOE_SORT: LaunchShape = LaunchShape::linear(1, 1024);

    /// One block a row.
    pub fn by_row(rows: usize) -> LaunchShape {
        LaunchShape::linear(rows as u32, ROW_THREADS)
    }

    /// The smallest attention kernels that take `head_dim`.
    ///
    /// # Errors
    /// There are none.
    pub fn attention(&self, head_dim: usize) -> Option<&AttentionKernels> {
        self.attention.iter().find(|kernels| head_dim <= kernels.head_dim && head_dim.is_multiple_of(8))
    }

    pub fn logits_process(rows: usize, vocab: usize) -> LaunchShape {
        by_rows(rows, logits_splits(vocab), 256)
    }

    pub fn sample(rows: usize, vocab: usize) -> LaunchShape {
        LaunchShape { dynamic_smem: sample_smem(vocab), ..LaunchShape::linear(rows as u32, 1024) }
    }
}

/// Slots of a tile of the experts' products.
pub const MOE_TILE_ROWS: usize = 64;

/// Eight rows a block.
pub fn moe_route(rows: usize) -> LaunchShape {
    LaunchShape::linear((rows as u32).div_ceil(8), 256)
}

/// As many blocks as run at once on `sm_count` multiprocessors.
pub fn moe_gemm(sm_count: u32) -> LaunchShape {
    LaunchShape::linear(3 * sm_count, 128)
}

pub fn moe_combine(rows: usize, hidden: usize) -> LaunchShape {
    by_rows(rows, hidden.div_ceil(2048), 256)
}

/// Parts of a row of logits.
pub fn logits_splits(vocab: usize) -> usize {
    vocab.div_ceil(LOGITS_PART)
}

impl AttentionKernels {
    /// Columns of a head that the kernel computes with.
    pub fn tile_dim(&self) -> usize {
        self.head_dim
    }

    /// Blocks that run at once on `sm_count` multiprocessors.
    pub fn decode_blocks(&self, sm_count: u32) -> u32 {
        sm_count * if self.head_dim > 128 { 2 } else { 3 }
    }

    /// As `decode_blocks`.
    pub fn prefill_blocks(&self, sm_count: u32) -> u32 {
        sm_count
    }

    pub fn decode_shape(&self, sm_count: u32) -> LaunchShape {
        let blocks = self.decode_blocks(sm_count);
        LaunchShape { dynamic_smem: self.decode_smem, ..LaunchShape::linear(blocks, 128) }
    }

    pub fn prefill_shape(&self, sm_count: u32) -> LaunchShape {
        let blocks = self.prefill_blocks(sm_count);
        LaunchShape { dynamic_smem: self.prefill_smem, ..LaunchShape::linear(blocks, 256) }
    }
}

/// Tokens of a tile of keys.
const fn tile_tokens(head_dim: usize) -> usize {
    if head_dim > 128 { 32 } else { 64 }
}

/// Tiles of keys and of values, weights, maxima: see `attention_decode.cuh`.
const fn decode_smem(head_dim: usize) -> u32 {
    let tokens = tile_tokens(head_dim);
    let tile = tokens * head_dim * 2;
    (2 * (32_768 / tile) * tile + 16 * tokens * 2 + 4 * 16 * 4) as u32
}

/// Queries, two tiles of keys and two of values: see `attention_prefill.cuh`.
const fn prefill_smem(head_dim: usize) -> u32 {
    (PREFILL_ROWS * head_dim * 2 + 4 * tile_tokens(head_dim) * head_dim * 2) as u32
}

fn pair<P: Copy>(modules: &Modules, name: &str, act: &str) -> Result<Pair<P>, CudaError> {
    Ok(Pair {
        fast: modules.function(&format!("{name}_{act}"), 0)?,
        any: modules.function(&format!("{name}_{act}_any"), 0)?,
    })
}

fn by_rows(rows: usize, blocks: usize, threads: u32) -> LaunchShape {
    LaunchShape { grid: [rows as u32, blocks as u32, 1], ..LaunchShape::linear(1, threads) }
}
