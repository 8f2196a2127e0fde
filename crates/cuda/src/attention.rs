//! Attention: the work lists of a step, made once per kind of layer, and the launches that read them.

use quire_backend::{Attention, BackendError};

use crate::Cuda;
use crate::blaslt::Element;
use crate::buffers::{CudaKv, KvElement};
use crate::driver::{BoxedMatrix, CudaError, DeviceSlice, LaunchShape};
use crate::kernels::{DECODE_ROWS, PREFILL_ROWS, SM90A_BOX_ROWS, SM90A_HEAD_DIM};
use crate::params::{AttentionItem, AttentionParams, AttentionPlanParams, AttentionSm90aParams};
use crate::step::Layout;

/// Rows of partial results that both lists may use together.
const MAX_PARTIALS: usize = 8192;
const MAX_COUNTERS: usize = 4096;

/// What decides how attention is cut into items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind {
    num_kv_heads: u32,
    group: u32,
    window: u32,
    tile_dim: usize,
}

/// The lists of one kind of layer.
#[derive(Debug)]
struct Lists {
    kind: Kind,
    max_items: usize,
    decode_items: DeviceSlice,
    prefill_items: DeviceSlice,
    /// Two numbers: items for decode, and for prefill.
    counts: DeviceSlice,
    /// Whether the step under way has them already.
    is_planned: bool,
}

/// Everything attention needs beside the cache.
#[derive(Debug)]
pub(crate) struct AttentionState {
    lists: Vec<Lists>,
    partial_out: DeviceSlice,
    partial_max_sum: DeviceSlice,
    counters: DeviceSlice,
    carry: DeviceSlice,
}

impl Default for AttentionState {
    fn default() -> Self {
        let null = DeviceSlice::NULL;
        Self { lists: Vec::new(), partial_out: null, partial_max_sum: null, counters: null, carry: null }
    }
}

impl AttentionState {
    /// A new step: nothing is planned.
    pub fn begin(&mut self) {
        self.lists.iter_mut().for_each(|lists| lists.is_planned = false);
    }

    /// Forgets lists that were sized for fewer rows.
    pub fn forget(&mut self) {
        self.lists.clear();
    }
}

impl Cuda {
    pub(crate) fn attend(&mut self, op: &Attention<'_, Self>) -> Result<(), BackendError> {
        let (shape, kv, act) = (op.shape, op.kv, self.options.activations);
        self.expect_cache(kv, shape.num_kv_heads, shape.head_dim, op.layer)?;
        if op.qkv.rows < self.rows || op.qkv.cols != shape.qkv_size() || op.qkv.element != act {
            return Err(self.refused(format!("attention: {:?} does not fit {shape:?}", op.qkv)));
        }
        if op.out.rows < self.rows || op.out.cols != shape.q_size() || op.out.element != act {
            return Err(self.refused(format!("attention output: {:?} does not fit {shape:?}", op.out)));
        }
        if let Some(sinks) = op.sinks.filter(|sinks| sinks.len != shape.num_heads as usize) {
            let (have, heads) = (sinks.len, shape.num_heads);
            return Err(self.refused(format!("attention: {have} sinks for {heads} query heads")));
        }
        let head_dim = shape.head_dim as usize;
        let kernels = self.kernels.attention(kv.element, head_dim);
        let Some(tile_dim) = kernels.map(|kernels| kernels.tile_dim()) else {
            return Err(self.refused(format!(
                "attention: head_dim {head_dim} is not supported, use a multiple of 8 up to 256"
            )));
        };
        let kind = Kind {
            num_kv_heads: shape.num_kv_heads,
            group: shape.num_heads / shape.num_kv_heads,
            window: op.window.unwrap_or(0),
            tile_dim,
        };
        let lists = self.lists_of(kind)?;
        let (lists, state) = (&self.attention.lists[lists], &self.attention);
        let decode = AttentionParams {
            q: op.qkv.slice.address(),
            kv: kv.layer(op.layer),
            kv_scales: kv.layer_scales(op.layer),
            out: op.out.slice.address(),
            block_tables: self.slots.block_tables.address(),
            items: lists.decode_items.address(),
            num_items: lists.counts.address(),
            partial_out: state.partial_out.address(),
            partial_max_sum: state.partial_max_sum.address(),
            counters: state.counters.address(),
            carry: state.carry.address(),
            sinks: op.sinks.map_or(0, |sinks| sinks.slice.address()),
            scale: op.scale,
            soft_cap: op.soft_cap.unwrap_or(0.0),
            window: kind.window as i32,
            num_kv_heads: kind.num_kv_heads as i32,
            group: kind.group as i32,
            head_dim: head_dim as i32,
            page_shift: kv.page_tokens.trailing_zeros() as i32,
            block_table_stride: self.slots.table_stride as i32,
            q_stride: op.qkv.stride as i32,
            out_stride: op.out.stride as i32,
        };
        let prefill = AttentionParams {
            items: lists.prefill_items.address(),
            num_items: lists.counts.part(4, 4).address(),
            ..decode
        };
        let (has_decode, has_prefill) = self.attention_rows(kind.group as usize);
        let kernels = self.kernels.attention(kv.element, head_dim).expect("found above");
        let sm_count = self.context.sm_count();
        let mut launched = Ok(());
        if has_decode {
            launched = self.launch(&kernels.decode, kernels.decode_shape(sm_count), &decode);
        }
        if has_prefill {
            let then = |()| match (&kernels.prefill_sm90a, head_dim) {
                (Some(kernel), SM90A_HEAD_DIM) => {
                    let params = self.sm90a_params(prefill, kv, op.layer)?;
                    self.launch(kernel, kernels.prefill_sm90a_shape(sm_count), &params)
                }
                _ => self.launch(&kernels.prefill, kernels.prefill_shape(sm_count), &prefill),
            };
            launched = launched.and_then(then);
        }
        self.check(launched)
    }

    /// The same for the kernel that copies pages by boxes.
    fn sm90a_params(
        &self,
        attention: AttentionParams,
        kv: &CudaKv,
        layer: usize,
    ) -> Result<AttentionSm90aParams, CudaError> {
        let rows = kv.layer_bytes() / (2 * SM90A_HEAD_DIM);
        let num_rows = i32::try_from(rows).map_err(|_| {
            CudaError::new("attention", format!("{rows} keys and values of a layer are more than 2^31"))
        })?;
        let pages = BoxedMatrix {
            address: kv.layer(layer),
            rows: rows as u64,
            cols: SM90A_HEAD_DIM as u64,
            box_rows: SM90A_BOX_ROWS,
            box_cols: 64,
            is_bf16: self.options.activations == Element::Bf16,
        };
        Ok(AttentionSm90aParams { pages: pages.encode()?, attention, num_rows, reserved: [0; 13] })
    }

    /// Whether some sequence of the step goes to decode attention, and some to prefill attention.
    fn attention_rows(&self, group: usize) -> (bool, bool) {
        let (shortest, longest) = self.query_lengths;
        (shortest * group <= DECODE_ROWS, longest * group > DECODE_ROWS)
    }

    /// Index of the lists of `kind`, planned for this step.
    fn lists_of(&mut self, kind: Kind) -> Result<usize, BackendError> {
        let known = self.attention.lists.iter().position(|lists| lists.kind == kind);
        let index = match known {
            Some(index) => index,
            None => self.new_lists(kind)?,
        };
        if !self.attention.lists[index].is_planned {
            self.plan_lists(index)?;
            self.attention.lists[index].is_planned = true;
        }
        Ok(index)
    }

    fn plan_lists(&mut self, index: usize) -> Result<(), BackendError> {
        let lists = &self.attention.lists[index];
        let kind = lists.kind;
        // Those for an fp8 cache run as many blocks.
        let kernels = self.kernels.attention(KvElement::Activation, kind.tile_dim);
        let kernels = kernels.expect("the lists were made for them");
        let sm_count = self.context.sm_count();
        let params = AttentionPlanParams {
            cu_seqlens_q: self.step_address(self.layout.cu_seqlens_q),
            seq_lens: self.step_address(self.layout.seq_lens),
            seq_slots: self.step_address(self.layout.seq_slots),
            num_seqs: self.step_address(Layout::NUM_SEQS),
            decode_items: lists.decode_items.address(),
            num_decode_items: lists.counts.address(),
            prefill_items: lists.prefill_items.address(),
            num_prefill_items: lists.counts.part(4, 4).address(),
            num_kv_heads: kind.num_kv_heads as i32,
            group: kind.group as i32,
            window: kind.window as i32,
            prefill_rows: PREFILL_ROWS as i32,
            decode_blocks: kernels.decode_blocks(sm_count) as i32,
            prefill_blocks: kernels.prefill_blocks(sm_count) as i32,
            max_items: lists.max_items as i32,
            max_partials: MAX_PARTIALS as i32,
            max_counters: MAX_COUNTERS as i32,
            reserved: 0,
        };
        let launched = self.launch(&self.kernels.attention_plan, LaunchShape::linear(1, 256), &params);
        self.check(launched)
    }

    /// Room for the lists of a new kind, made at the first step that has it.
    fn new_lists(&mut self, kind: Kind) -> Result<usize, BackendError> {
        let heads = kind.num_kv_heads as usize;
        let sm_count = self.context.sm_count() as usize;
        // A tile that is not cut is one item; what is cut beyond fills the device some times over.
        let tiles = (self.max_rows * kind.group as usize).div_ceil(PREFILL_ROWS) + 2 * self.slots.num_slots();
        let max_items = tiles + 32 * sm_count;
        let items = max_items * size_of::<AttentionItem>();
        let (decode_items, prefill_items) = (self.take("attention", items)?, self.take("attention", items)?);
        let counts = self.take("attention", 8)?;
        let carry = sm_count * PREFILL_ROWS * kind.tile_dim * 4;
        let partial_out = MAX_PARTIALS * heads * kind.tile_dim * 4;
        let wanted = [partial_out, MAX_PARTIALS * heads * 8, MAX_COUNTERS * heads * 4, carry];
        let state = &self.attention;
        let have = [state.partial_out, state.partial_max_sum, state.counters, state.carry];
        let mut grown = have;
        for (slice, bytes) in grown.iter_mut().zip(wanted) {
            if slice.bytes() < bytes {
                *slice = self.take("attention", bytes)?;
            }
        }
        let state = &mut self.attention;
        [state.partial_out, state.partial_max_sum, state.counters, state.carry] = grown;
        let zeroed = self.stream.fill(self.attention.counters, 0);
        self.check(zeroed)?;
        let lists = Lists { kind, max_items, decode_items, prefill_items, counts, is_planned: false };
        self.attention.lists.push(lists);
        Ok(self.attention.lists.len() - 1)
    }
}
