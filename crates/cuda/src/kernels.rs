//! The kernels by what they do, found in the images once, and the launch shapes that `kernels/include` prescribes.

use crate::blaslt::Element;
use crate::buffers::KvElement;
use crate::driver::{CudaError, Function, LaunchShape, Modules};
use crate::int_weights::{Bits, PANEL};
use crate::params::{
    ActParams, AddNormParams, AttentionParams, AttentionPlanParams, AttentionSm90aParams, CopyPagesParams,
    CountTokensParams, EmbedParams, Fp8EmbedParams, Fp8QuantizeParams, GatherRowsParams, GemvParams,
    IntEmbedParams, IntGemmParams, LogitsParams, LogprobsParams, LoraExpandParams, LoraShrinkParams,
    MoeCombineParams, MoeGemmParams, MoeIntParams, MoeRouteParams, MoeSortParams, QuantizeParams,
    RopeCacheParams, SampleParams, SoftCapParams, StepPlanParams, UpdateTablesParams,
};

const ROW_THREADS: u32 = 256;
/// Rows of a tile of prefill attention.
pub const PREFILL_ROWS: usize = 128;
/// Query rows (tokens times query heads per KV head) that decode attention takes.
pub const DECODE_ROWS: usize = 16;
/// Ids in a part of a row of logits.
const LOGITS_PART: usize = 8192;
const NORM_MAX_HIDDEN: usize = 32_768;
/// Threads of a block of the kernels in `int_gemm.cuh`.
const INT_THREADS: u32 = 256;
/// Two rounds of the sums of eight warps for 8 rows of one panel, and for 32 of two, padded: see `IntStream`.
const M8_SMEM: u32 = 2 * 8 * 8 * 20 * 4;
const M32_SMEM: u32 = 2 * 8 * 32 * 36 * 4;

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
    /// In place of `prefill`, where it may be used.
    pub prefill_sm90a: Option<Function<AttentionSm90aParams>>,
}

/// What works on weights of one number of bits.
#[derive(Debug)]
pub struct IntKernels {
    /// Rows of a table.
    pub embed: Function<IntEmbedParams>,
    /// Products into activations.
    pub into_activations: IntGemms,
    /// Products into f32.
    pub into_f32: IntGemms,
}

/// The same product, bit by bit, for different numbers of rows.
#[derive(Debug)]
pub struct IntGemms {
    m8: Function<IntGemmParams>,
    m32: Function<IntGemmParams>,
    wide: Function<IntGemmParams>,
}

/// Mixtures of experts.
#[derive(Debug)]
pub struct MoeKernels {
    pub route: Function<MoeRouteParams>,
    pub sort: Function<MoeSortParams>,
    pub combine: Function<MoeCombineParams>,
    /// Of weights in 16 bits.
    pub dense: MoeProducts<MoeGemmParams>,
    pub fp8: MoeProducts<MoeGemmParams>,
    int8: MoeProducts<MoeIntParams>,
    int4: MoeProducts<MoeIntParams>,
}

/// Products of experts with weights of one format.
#[derive(Debug)]
pub struct MoeProducts<P> {
    pub gate_up: Function<P>,
    pub down: Function<P>,
}

/// LoRA adapters.
#[derive(Debug)]
pub struct LoraKernels {
    pub shrink: Function<LoraShrinkParams>,
    pub expand: Function<LoraExpandParams>,
}

/// Every kernel of one activation type.
#[derive(Debug)]
pub struct Kernels {
    pub embed: Function<EmbedParams>,
    add_norm: Pair<AddNormParams>,
    post_norm: Pair<AddNormParams>,
    pub soft_cap: Function<SoftCapParams>,
    rope_cache: Pair<RopeCacheParams>,
    rope_cache_fp8: Pair<RopeCacheParams>,
    pub act: Pair<ActParams>,
    gemv: Function<GemvParams>,
    gemv_into_f32: Function<GemvParams>,
    pub moe: MoeKernels,
    /// A row a block.
    lora: LoraKernels,
    /// [`LORA_ROWS`] rows a block.
    lora_tiles: LoraKernels,
    pub gather_rows: Function<GatherRowsParams>,
    pub quantize: Function<QuantizeParams>,
    pub quantize_fp8: Function<Fp8QuantizeParams>,
    pub embed_fp8: Function<Fp8EmbedParams>,
    int8: IntKernels,
    int4: IntKernels,
    pub copy_pages: Function<CopyPagesParams>,
    pub step_plan: Function<StepPlanParams>,
    pub update_tables: Function<UpdateTablesParams>,
    pub attention_plan: Function<AttentionPlanParams>,
    attention: Vec<AttentionKernels>,
    attention_fp8: Vec<AttentionKernels>,
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
    /// Finds all of them; `use_sm90a`: also those for Hopper alone.
    ///
    /// # Errors
    /// One is missing: the images are of another version.
    pub fn find(modules: &Modules, activations: Element, use_sm90a: bool) -> Result<Self, CudaError> {
        let act = match activations {
            Element::F16 => "f16",
            _ => "bf16",
        };
        let attention = |kv: KvElement| -> Result<Vec<AttentionKernels>, CudaError> {
            let find = |head_dim| AttentionKernels::find(modules, act, kv, head_dim, use_sm90a);
            [64, 128, 256].into_iter().map(find).collect()
        };
        Ok(Self {
            embed: modules.function(&format!("quire_embed_{act}"), 0)?,
            add_norm: pair(modules, "quire_add_norm", act)?,
            post_norm: pair(modules, "quire_post_norm", act)?,
            soft_cap: modules.function("quire_soft_cap", 0)?,
            rope_cache: pair(modules, "quire_rope_cache", act)?,
            rope_cache_fp8: Pair {
                fast: modules.function(&format!("quire_rope_cache_{act}_kv8"), 0)?,
                any: modules.function(&format!("quire_rope_cache_{act}_any_kv8"), 0)?,
            },
            act: pair(modules, "quire_act", act)?,
            gemv: modules.function(&format!("quire_gemv_{act}"), 0)?,
            gemv_into_f32: modules.function(&format!("quire_gemv_{act}_f32"), 0)?,
            moe: MoeKernels::find(modules, act)?,
            lora: LoraKernels::find(modules, act)?,
            lora_tiles: LoraKernels::find(modules, &format!("{act}_8"))?,
            gather_rows: modules.function(&format!("quire_gather_rows_{act}"), 0)?,
            quantize: modules.function(&format!("quire_quantize_{act}"), 0)?,
            quantize_fp8: modules.function(&format!("quire_quantize_fp8_{act}"), 0)?,
            embed_fp8: modules.function("quire_embed_fp8", 0)?,
            int8: IntKernels::find(modules, 8, act)?,
            int4: IntKernels::find(modules, 4, act)?,
            copy_pages: modules.function("quire_copy_pages", 0)?,
            step_plan: modules.function("quire_step_plan", 0)?,
            update_tables: modules.function("quire_update_tables", 0)?,
            attention_plan: modules.function("quire_attention_plan", 0)?,
            attention: attention(KvElement::Activation)?,
            attention_fp8: attention(KvElement::Fp8)?,
            logits_process: modules.function("quire_logits_process", 0)?,
            sample: modules.function("quire_sample", sample_smem(MAX_VOCAB))?,
            logprobs: modules.function("quire_logprobs", 0)?,
            count_tokens: modules.function("quire_count_tokens", 0)?,
        })
    }

    /// `is_post`: with a norm of what is added.
    pub fn add_norm(
        &self,
        is_post: bool,
        rows: usize,
        hidden: usize,
    ) -> (&Function<AddNormParams>, LaunchShape) {
        let is_fast = hidden.is_multiple_of(8) && hidden <= NORM_MAX_HIDDEN;
        let vectors = match hidden {
            0..=8192 => 1,
            8193..=16384 => 2,
            _ => 4,
        };
        let threads =
            if is_fast { (hidden / 8).div_ceil(vectors).next_multiple_of(32) as u32 } else { ROW_THREADS };
        let kernels = if is_post { &self.post_norm } else { &self.add_norm };
        (kernels.choose(is_fast), LaunchShape::linear(rows as u32, threads))
    }

    pub fn rope_cache(
        &self,
        kv: KvElement,
        rows: usize,
        heads: usize,
        head_dim: usize,
        rotary_dim: usize,
    ) -> (&Function<RopeCacheParams>, LaunchShape) {
        let is_fast = head_dim.is_multiple_of(16) && rotary_dim.is_multiple_of(16) && head_dim <= 512;
        let lanes = if is_fast { (head_dim / 16).next_power_of_two() } else { 32 };
        let kernels = match kv {
            KvElement::Activation => &self.rope_cache,
            KvElement::Fp8 => &self.rope_cache_fp8,
        };
        (kernels.choose(is_fast), by_rows(rows, (heads * lanes).div_ceil(256), 256))
    }

    pub fn act(&self, rows: usize, width: usize) -> (&Function<ActParams>, LaunchShape) {
        (self.act.choose(width.is_multiple_of(8)), by_rows(rows, width.div_ceil(16 * 256), 256))
    }

    /// Products of at most [`SMALL_ROWS`] rows.
    pub fn gemv(&self, output: Element, out_features: usize) -> (&Function<GemvParams>, LaunchShape) {
        let kernel = if output == Element::F32 { &self.gemv_into_f32 } else { &self.gemv };
        (kernel, LaunchShape::linear(out_features.div_ceil(GEMV_OUTPUTS) as u32, 256))
    }

    pub fn soft_cap_shape(rows: usize, cols: usize) -> LaunchShape {
        by_rows(rows, cols.div_ceil(8 * ROW_THREADS as usize), ROW_THREADS)
    }

    pub fn int(&self, bits: Bits) -> &IntKernels {
        match bits {
            Bits::Eight => &self.int8,
            Bits::Four => &self.int4,
        }
    }

    /// Those of adapters, and their blocks of rows. Rows of different sequences rarely have much to share.
    pub fn lora(&self, is_decode: bool, rows: usize) -> (&LoraKernels, usize) {
        if is_decode { (&self.lora, rows) } else { (&self.lora_tiles, rows.div_ceil(LORA_ROWS)) }
    }

    /// One warp a group of inputs.
    pub fn quantize_shape(rows: usize, groups: usize) -> LaunchShape {
        by_rows(rows, groups.div_ceil(INT_THREADS as usize / 32), INT_THREADS)
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
    pub fn attention(&self, kv: KvElement, head_dim: usize) -> Option<&AttentionKernels> {
        let kernels = match kv {
            KvElement::Activation => &self.attention,
            KvElement::Fp8 => &self.attention_fp8,
        };
        kernels.iter().find(|kernels| head_dim <= kernels.head_dim && head_dim.is_multiple_of(8))
    }

    pub fn logits_process(rows: usize, vocab: usize) -> LaunchShape {
        by_rows(rows, logits_splits(vocab), 256)
    }

    pub fn sample(rows: usize, vocab: usize) -> LaunchShape {
        LaunchShape { dynamic_smem: sample_smem(vocab), ..LaunchShape::linear(rows as u32, 1024) }
    }
}

/// Rows that `quire_gemv_*` takes at most, and outputs of one of its blocks.
pub const SMALL_ROWS: usize = 8;
const GEMV_OUTPUTS: usize = 32;

/// Rows of a block of the kernels for adapters, those for prompts.
const LORA_ROWS: usize = 8;
/// Rows of A, and columns, of a block.
const LORA_RANKS: usize = 8;
const LORA_COLUMNS: usize = 256;

impl LoraKernels {
    fn find(modules: &Modules, suffix: &str) -> Result<Self, CudaError> {
        Ok(Self {
            shrink: modules.function(&format!("quire_lora_shrink_{suffix}"), 0)?,
            expand: modules.function(&format!("quire_lora_expand_{suffix}"), 0)?,
        })
    }

    pub fn shrink_shape(blocks: usize, max_rank: usize) -> LaunchShape {
        by_rows(blocks, max_rank.div_ceil(LORA_RANKS), ROW_THREADS)
    }

    pub fn expand_shape(blocks: usize, out_features: usize) -> LaunchShape {
        by_rows(blocks, out_features.div_ceil(LORA_COLUMNS), ROW_THREADS)
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

impl MoeKernels {
    fn find(modules: &Modules, act: &str) -> Result<Self, CudaError> {
        Ok(Self {
            route: modules.function("quire_moe_route", 0)?,
            sort: modules.function("quire_moe_sort", 0)?,
            combine: modules.function(&format!("quire_moe_combine_{act}"), 0)?,
            dense: MoeProducts::find(modules, act)?,
            fp8: MoeProducts::find(modules, &format!("fp8_{act}"))?,
            int8: MoeProducts::find(modules, &format!("int8_{act}"))?,
            int4: MoeProducts::find(modules, &format!("int4_{act}"))?,
        })
    }

    pub fn int(&self, bits: Bits) -> &MoeProducts<MoeIntParams> {
        match bits {
            Bits::Eight => &self.int8,
            Bits::Four => &self.int4,
        }
    }
}

impl<P: Copy> MoeProducts<P> {
    fn find(modules: &Modules, suffix: &str) -> Result<Self, CudaError> {
        Ok(Self {
            gate_up: modules.function(&format!("quire_moe_gate_up_{suffix}"), 0)?,
            down: modules.function(&format!("quire_moe_down_{suffix}"), 0)?,
        })
    }
}

impl IntKernels {
    fn find(modules: &Modules, bits: u32, act: &str) -> Result<Self, CudaError> {
        let gemms = |output: &str| -> Result<IntGemms, CudaError> {
            let name = |rows: &str| format!("quire_int{bits}_gemm_{rows}_{output}");
            Ok(IntGemms {
                m8: modules.function(&name("m8"), M8_SMEM)?,
                m32: modules.function(&name("m32"), M32_SMEM)?,
                wide: modules.function(&name("wide"), 0)?,
            })
        };
        Ok(Self {
            embed: modules.function(&format!("quire_embed_int{bits}"), 0)?,
            into_activations: gemms(act)?,
            into_f32: gemms("f32")?,
        })
    }
}

impl IntGemms {
    /// The kernel for this many rows. `wide` does the least work a row, if there are blocks of it for all
    /// multiprocessors; it computes 64 rows, however few there are.
    pub fn choose(
        &self,
        rows: usize,
        out_features: usize,
        sm_count: u32,
    ) -> (&Function<IntGemmParams>, LaunchShape) {
        let panels = out_features.div_ceil(PANEL);
        let shape = |panels_of_block: usize, rows_of_block: usize, dynamic_smem| LaunchShape {
            grid: [panels.div_ceil(panels_of_block) as u32, rows.div_ceil(rows_of_block) as u32, 1],
            dynamic_smem,
            ..LaunchShape::linear(1, INT_THREADS)
        };
        let wide = shape(8, 64, 0);
        match rows {
            0..=8 => (&self.m8, shape(1, 8, M8_SMEM)),
            33.. if wide.grid[0] * wide.grid[1] >= sm_count => (&self.wide, wide),
            _ => (&self.m32, shape(2, 32, M32_SMEM)),
        }
    }
}

impl AttentionKernels {
    fn find(
        modules: &Modules,
        act: &str,
        kv: KvElement,
        head_dim: usize,
        use_sm90a: bool,
    ) -> Result<Self, CudaError> {
        let (decode_smem, prefill_smem) = (decode_smem(kv, head_dim), prefill_smem(kv, head_dim));
        let cache = if kv == KvElement::Fp8 { "_fp8" } else { "" };
        let name = |rows: &str| format!("quire_attention_{rows}_{act}{cache}_{head_dim}");
        let sm90a = format!("quire_attention_prefill_sm90a_{act}_{head_dim}");
        let has_sm90a = use_sm90a && kv == KvElement::Activation && head_dim == SM90A_HEAD_DIM;
        Ok(Self {
            head_dim,
            decode: modules.function(&name("decode"), decode_smem)?,
            decode_smem,
            prefill: modules.function(&name("prefill"), prefill_smem)?,
            prefill_smem,
            prefill_sm90a: has_sm90a.then(|| modules.function(&sm90a, SM90A_SMEM)).transpose()?,
        })
    }

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

    pub fn prefill_sm90a_shape(&self, sm_count: u32) -> LaunchShape {
        let blocks = self.prefill_blocks(sm_count);
        LaunchShape { dynamic_smem: SM90A_SMEM, ..LaunchShape::linear(blocks, SM90A_THREADS) }
    }
}

/// `quire_attention_prefill_sm90a`: its head size, its threads, and the rows of its boxes, see `attention_params.h`.
pub const SM90A_HEAD_DIM: usize = 128;
const SM90A_THREADS: u32 = 384;
pub const SM90A_BOX_ROWS: u32 = 16;
/// Four stages of keys and values with two barriers each, from a multiple of 1024 bytes on.
const SM90A_SMEM: u32 = 4 * (2 * 64 * 128 * 2 + 16) + 1024;

/// Tokens of a tile of keys.
const fn tile_tokens(head_dim: usize) -> usize {
    if head_dim > 128 { 32 } else { 64 }
}

/// Tiles of keys and of values, weights, maxima; with fp8 the weights twice, and factors: see `attention_decode.cuh`.
const fn decode_smem(kv: KvElement, head_dim: usize) -> u32 {
    let (tokens, weights) = (tile_tokens(head_dim), 16 * tile_tokens(head_dim) * 2);
    let tile = tokens * head_dim * kv_bytes(kv);
    let stages = 32_768 / tile;
    let fp8 = match kv {
        KvElement::Activation => 0,
        KvElement::Fp8 => weights + 2 * stages * tokens * 4,
    };
    (2 * stages * tile + weights + 4 * 16 * 4 + fp8) as u32
}

/// Queries, two tiles of keys and two of values; with fp8 their factors: see `attention_prefill.cuh`.
const fn prefill_smem(kv: KvElement, head_dim: usize) -> u32 {
    let tokens = tile_tokens(head_dim);
    let fp8 = match kv {
        KvElement::Activation => 0,
        KvElement::Fp8 => 4 * tokens * 4,
    };
    (PREFILL_ROWS * head_dim * 2 + 4 * tokens * head_dim * kv_bytes(kv) + fp8) as u32
}

/// Bytes of an element of the cache.
const fn kv_bytes(kv: KvElement) -> usize {
    match kv {
        KvElement::Activation => 2,
        KvElement::Fp8 => 1,
    }
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
