//! The kernels around attention and GEMM, compiled for the host, against the reference backend: over small and odd
//! shapes, with poisoned outputs, surplus blocks, and several orders of threads.

mod common;
mod data;

use common::{HostKernels, under_sanitizers};
use data::{ACTS, Act, POISON, Rng, address, address_mut, assert_close, count};
use quire_backend::reference::RefBackend;
use quire_backend::{
    Activation, AddNorm, Backend, BufRole, KvLayerShape, KvLayout, RopeAndCache, RopeTable, StepInput,
};
use quire_core::{DType, Slot, StepId, TensorView};
use quire_cuda::params::{
    ActParams, AddNormParams, CopyPagesParams, EmbedParams, GatherRowsParams, RopeCacheParams, SoftCapParams,
    StepPlanParams, UpdateTablesParams,
};

const SEEDS: [u64; 3] = [0, 1, 0xFEED];
/// Rows that the grid has beyond the step's: a captured graph serves every step of its bucket.
const SURPLUS: usize = 2;

#[test]
fn no_kernel_reads_or_writes_out_of_bounds() {
    under_sanitizers("");
}

#[test]
fn embed_reads_the_list_or_what_a_slot_sampled() {
    let Some(kernels) = HostKernels::load() else { return };
    let mut rng = Rng::new(1);
    for (hidden, seed) in [8, 40, 13, 2056].into_iter().zip([0, 1, 2, 3]) {
        for act in ACTS {
            let (vocab, rows) = (11, 5);
            let table = act.pack(&rng.vector(vocab * hidden, 3.0));
            let ids = [3, -2, 10, 0, 11];
            let last_tokens = [7, 9];
            let mut out = vec![f32::from_bits(!0); (rows + SURPLUS) * hidden];
            let num_rows = count(rows);
            let params = EmbedParams {
                table: address(&table),
                token_ids: address(&ids),
                last_tokens: address(&last_tokens),
                out: address_mut(&mut out),
                num_rows: address(&num_rows),
                hidden: hidden as i32,
                vocab: vocab as i32,
                scale: 0.7,
                reserved: 0,
            };
            let name = format!("quire_embed_{}", act.name());
            kernels.launch(&name, [(rows + SURPLUS) as u32, 1, 1], [256, 1, 1], 0, &params, seed);
            for (row, id) in [3usize, 9, 10, 0].into_iter().enumerate() {
                let want: Vec<_> =
                    act.unpack(&table[id * hidden..][..hidden]).iter().map(|x| 0.7 * x).collect();
                assert_eq!(out[row * hidden..][..hidden], want, "{name} hidden {hidden} row {row}");
            }
            let rest = &out[4 * hidden..];
            assert!(rest.iter().all(|x| x.is_nan()), "an unknown id gives NaN, surplus rows stay");
            let untouched = &out[rows * hidden..];
            assert!(untouched.iter().all(|x| x.to_bits() == !0), "{name} hidden {hidden}: surplus rows");
        }
    }
}

/// What is added to the residual, with the weight of its norm.
type Delta<'a> = Option<(&'a [u16], Option<&'a [f32]>)>;

/// One launch of add_norm or post_norm: `(residual, out)`, surplus rows included.
fn add_norm(
    kernels: &HostKernels,
    act: Act,
    (residual, delta, weight): (&[f32], Delta<'_>, &[f32]),
    seed: u64,
) -> (Vec<f32>, Vec<u16>) {
    let hidden = weight.len();
    let rows = residual.len() / hidden;
    let mut residual = residual.to_vec();
    residual.resize((rows + SURPLUS) * hidden, f32::NAN);
    let mut out = vec![POISON; (rows + SURPLUS) * hidden];
    let num_rows = count(rows);
    let params = AddNormParams {
        residual: address_mut(&mut residual),
        delta: delta.map_or(0, |(delta, _)| address(delta)),
        delta_weight: delta.and_then(|(_, weight)| weight).map_or(0, address),
        weight: address(weight),
        out: address_mut(&mut out),
        num_rows: address(&num_rows),
        hidden: hidden as i32,
        eps: 1e-5,
    };
    let (suffix, threads) = match hidden {
        _ if !hidden.is_multiple_of(8) => ("_any", 256),
        0..=8192 => ("", (hidden / 8).next_multiple_of(32)),
        _ => ("_wide", (hidden / 8).div_ceil(4).next_multiple_of(32)),
    };
    let op = if params.delta_weight == 0 { "add_norm" } else { "post_norm" };
    let name = format!("quire_{op}_{}{suffix}", act.name());
    kernels.launch(&name, [(rows + SURPLUS) as u32, 1, 1], [threads as u32, 1, 1], 0, &params, seed);
    assert!(out[rows * hidden..].iter().all(|&x| x == POISON), "{name} hidden {hidden}: surplus rows");
    residual.truncate(rows * hidden);
    out.truncate(rows * hidden);
    (residual, out)
}

fn as_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn step<'a>(token_ids: &'a [u32], positions: &'a [u32], slot_mapping: &'a [u32]) -> StepInput<'a> {
    StepInput {
        step: StepId(1),
        token_ids,
        positions,
        slot_mapping,
        cu_seqlens_q: &[0],
        seq_lens: &[],
        seq_slots: &[] as &[Slot],
        seq_adapters: &[],
        block_tables: &[],
        max_blocks_per_seq: 0,
        logit_rows: &[],
        block_copies: &[],
        seqs: &[],
    }
}

#[test]
fn add_norm_equals_the_reference() {
    let Some(kernels) = HostKernels::load() else { return };
    let mut rng = Rng::new(2);
    for hidden in [8, 24, 64, 13, 172, 1000, 2304, 8200] {
        for act in ACTS {
            let rows = if hidden > 1000 { 2 } else { 5 };
            let residual = rng.vector(rows * hidden, 2.0);
            let delta = act.pack(&rng.vector(rows * hidden, 1.0));
            let weight = rng.vector(hidden, 1.5);

            let mut reference = RefBackend::new();
            let bytes = as_bytes(&weight);
            let norm = TensorView { dtype: DType::F32, shape: &[hidden], data: &bytes };
            let norm = reference.load_norm("norm", norm).unwrap();
            let delta_weight = rng.vector(hidden, 1.5);
            let mut alloc = || reference.alloc(BufRole::Hidden, rows, hidden).unwrap();
            let (mut r, mut d, mut o) = (alloc(), alloc(), alloc());
            reference.prepare(&step(&vec![0; rows], &vec![0; rows], &vec![0; rows])).unwrap();
            for (has_delta, has_norm) in [(false, false), (true, false), (true, true)] {
                reference.write(&mut r, &residual).unwrap();
                reference.write(&mut d, &act.unpack(&delta)).unwrap();
                let delta_norm = has_norm.then_some(&delta_weight);
                let delta = has_delta.then_some((&delta[..], delta_norm.map(|weight| &weight[..])));
                let op = AddNorm {
                    residual: &mut r,
                    delta: has_delta.then_some(&d),
                    delta_norm,
                    weight: &norm,
                    eps: 1e-5,
                    out: &mut o,
                };
                reference.add_norm(op).unwrap();
                let want = reference.read(&o, rows).unwrap();
                let what = format!("{act:?} hidden {hidden} delta {has_delta} norm {has_norm}");

                let got = add_norm(kernels, act, (&residual, delta, &weight), 0);
                let sum = reference.read(&r, rows).unwrap();
                assert_close(&what, &got.0, &sum, 1e-6, 1.0);
                assert!(has_norm || got.0 == sum, "{what}: residual");
                assert_close(&what, &act.unpack(&got.1), &want, 1.01 * act.epsilon() + 1e-5, 1e-4);
                for seed in SEEDS {
                    let again = add_norm(kernels, act, (&residual, delta, &weight), seed);
                    assert!(again == got, "{what} {seed}");
                }
                let last = (rows - 1) * hidden..;
                let alone =
                    (&residual[last.clone()], delta.map(|(d, norm)| (&d[last.clone()], norm)), &weight[..]);
                let alone = add_norm(kernels, act, alone, 5);
                assert!(alone.1 == got.1[last.clone()] && alone.0 == got.0[last], "{what}: alone");
            }
        }
    }
}

#[test]
fn activations_equal_their_definition() {
    let Some(kernels) = HostKernels::load() else { return };
    let kinds = [Activation::Silu, Activation::GeluTanh, Activation::Gelu, Activation::Relu];
    let mut rng = Rng::new(3);
    for (width, rows) in [(8, 3), (172, 3), (4104, 2), (4099, 1)] {
        for (act, gated) in ACTS.into_iter().flat_map(|act| [(act, false), (act, true)]) {
            let columns = if gated { 2 * width } else { width };
            let mut input = rng.vector(rows * columns, 6.0);
            input[0] = -60.0;
            input[1] = 60.0;
            let input = act.pack(&input);
            for (kind, activation) in kinds.into_iter().enumerate() {
                let mut out = vec![POISON; (rows + SURPLUS) * width];
                let num_rows = count(rows);
                let params = ActParams {
                    r#in: address(&input),
                    out: address_mut(&mut out),
                    num_rows: address(&num_rows),
                    width: width as i32,
                    kind: kind as i32,
                    gated: i32::from(gated),
                    reserved: 0,
                };
                let suffix = if width % 8 == 0 { "" } else { "_any" };
                let name = format!("quire_act_{}{suffix}", act.name());
                let grid = [(rows + SURPLUS) as u32, width.div_ceil(4096) as u32, 1];
                kernels.launch(&name, grid, [256, 1, 1], 0, &params, kind as u64);

                let want: Vec<f32> = (0..rows * width)
                    .map(|i| {
                        let row = &input[i / width * columns..][..columns];
                        let y = activation.apply(act.value(row[i % width]));
                        if gated { y * act.value(row[width + i % width]) } else { y }
                    })
                    .collect();
                let what = format!("{name} {activation:?} width {width} gated {gated}");
                let have = act.unpack(&out[..rows * width]);
                assert_close(&what, &have, &want, 1.01 * act.epsilon() + 1e-5, 1e-2);
                assert!(out[rows * width..].iter().all(|&x| x == POISON), "{what}: surplus rows");
            }
        }
    }
}

#[test]
fn logits_are_capped_in_place() {
    let Some(kernels) = HostKernels::load() else { return };
    let (cols, stride, rows, cap) = (2300, 2304, 3, 1.7);
    let mut x = Rng::new(12).vector((rows + SURPLUS) * stride, 6.0);
    let before = x.clone();
    let num_rows = count(rows);
    let params = SoftCapParams {
        x: address_mut(&mut x),
        num_rows: address(&num_rows),
        cols: cols as i32,
        stride: stride as i32,
        cap,
        reserved: 0,
    };
    kernels.launch("quire_soft_cap", [(rows + SURPLUS) as u32, 2, 1], [256, 1, 1], 0, &params, 3);
    for (i, (got, before)) in x.iter().zip(&before).enumerate() {
        match i / stride < rows && i % stride < cols {
            true => assert!((got - cap * (before / cap).tanh()).abs() < 1e-6, "{i}: {before} gave {got}"),
            false => assert_eq!(got, before, "{i}"),
        }
    }
}

#[test]
fn gather_takes_the_rows_named() {
    let Some(kernels) = HostKernels::load() else { return };
    let mut rng = Rng::new(4);
    for hidden in [8, 13, 2064] {
        for act in ACTS {
            let input = act.pack(&rng.vector(6 * hidden, 1.0));
            // Rows lie in structs of three ints.
            let rows = [5, -1, -1, 0, -1, -1, 2, -1, -1];
            let mut out = vec![POISON; (3 + SURPLUS) * hidden];
            let num_rows = count(3);
            let params = GatherRowsParams {
                r#in: address(&input),
                rows: address(&rows),
                out: address_mut(&mut out),
                num_rows: address(&num_rows),
                row_stride: 3,
                hidden: hidden as i32,
            };
            let name = format!("quire_gather_rows_{}", act.name());
            kernels.launch(&name, [(3 + SURPLUS) as u32, 1, 1], [256, 1, 1], 0, &params, 9);
            let want = [5, 0, 2].map(|row| &input[row * hidden..][..hidden]).concat();
            assert_eq!(out[..3 * hidden], want, "{name} hidden {hidden}");
            assert!(out[3 * hidden..].iter().all(|&x| x == POISON));
        }
    }
}

#[test]
fn pages_are_copied_in_every_layer() {
    let Some(kernels) = HostKernels::load() else { return };
    let (layers, pages) = (3, 7);
    let pairs = [0, 5, 2, 1, 3, 6];
    for page_bytes in [32, 20, 16384, 40_016] {
        let mut rng = Rng::new(5);
        let from: Vec<u32> = (0..layers * pages * page_bytes / 4).map(|_| rng.next_u32()).collect();
        let mut in_place = from.clone();
        let num_pairs = count(3);
        let params = CopyPagesParams {
            pairs: address(&pairs),
            num_pairs: address(&num_pairs),
            src: address(&in_place),
            dst: address_mut(&mut in_place),
            page_bytes: page_bytes as u64,
            src_layer_stride: (pages * page_bytes) as u64,
            dst_layer_stride: (pages * page_bytes) as u64,
            num_layers: layers as i32,
            reserved: 0,
        };
        for grid in [1, 5, 64] {
            kernels.launch("quire_copy_pages", [grid, 1, 1], [256, 1, 1], 0, &params, u64::from(grid));
            let words = page_bytes / 4;
            for (layer, page) in (0..layers).flat_map(|l| (0..pages).map(move |p| (l, p))) {
                let source = [0, 2, 2, 3, 4, 0, 3][page];
                let at = |page: usize| (layer * pages + page) * words;
                assert!(
                    in_place[at(page)..][..words] == from[at(source)..][..words],
                    "{page_bytes} bytes, layer {layer}, page {page}"
                );
            }
        }
    }
}

#[test]
fn the_plan_places_every_row() {
    let Some(kernels) = HostKernels::load() else { return };
    let mut rng = Rng::new(6);
    for page_tokens in [16, 32] {
        let (stride, slots, bucket) = (20, 9, 320);
        let mut tables = vec![-7; slots * stride];
        let mut entries: Vec<[i32; 3]> = Vec::new();
        for slot in 0..slots {
            for column in 0..stride {
                entries.push([slot as i32, column as i32, rng.below(1000) as i32]);
            }
        }
        let num_entries = count(entries.len());
        let update = UpdateTablesParams {
            entries: address(&entries),
            num_entries: address(&num_entries),
            block_tables: address_mut(&mut tables),
            table_stride: stride as i32,
            reserved: 0,
        };
        kernels.launch("quire_update_tables", [2, 1, 1], [256, 1, 1], 0, &update, 1);
        let pages: Vec<i32> = entries.iter().map(|e| e[2]).collect();
        assert_eq!(tables, pages);

        // (slot, rows, length after the step): decodes, a whole prompt, a chunk.
        let seqs = [(4, 1, 1), (8, 200, 200), (0, 1, 97), (3, 33, 300), (1, 1, 16)];
        let mut cu_seqlens = vec![0];
        let (mut positions_wanted, mut slots_wanted) = (Vec::new(), Vec::new());
        for (slot, rows, len) in seqs {
            for position in len - rows..len {
                let page = tables[slot as usize * stride + (position / page_tokens) as usize];
                positions_wanted.push(position);
                slots_wanted.push(page * page_tokens + position % page_tokens);
            }
            cu_seqlens.push(cu_seqlens.last().unwrap() + rows);
        }
        let rows = positions_wanted.len();
        positions_wanted.resize(bucket, 0);
        slots_wanted.resize(bucket, -1);
        let seq_lens = seqs.map(|s| s.2);
        let seq_slots: [i32; 5] = seqs.map(|s| s.0);
        let num_seqs = count(seqs.len());
        let (mut positions, mut slot_mapping, mut num_rows) = (vec![-9; bucket], vec![-9; bucket], [-9]);
        let params = StepPlanParams {
            cu_seqlens_q: address(&cu_seqlens),
            seq_lens: address(&seq_lens),
            seq_slots: address(&seq_slots),
            num_seqs: address(&num_seqs),
            block_tables: address(&tables),
            positions: address_mut(&mut positions),
            slot_mapping: address_mut(&mut slot_mapping),
            num_rows: address_mut(&mut num_rows),
            table_stride: stride as i32,
            page_tokens,
            bucket: bucket as i32,
            reserved: 0,
        };
        kernels.launch("quire_step_plan", [2, 1, 1], [256, 1, 1], 0, &params, 2);
        assert_eq!(num_rows[0] as usize, rows);
        assert_eq!(positions, positions_wanted);
        assert_eq!(slot_mapping, slots_wanted);

        let none = count(0);
        let empty = StepPlanParams { num_seqs: address(&none), ..params };
        kernels.launch("quire_step_plan", [2, 1, 1], [256, 1, 1], 0, &empty, 2);
        assert_eq!((num_rows[0], slot_mapping.iter().all(|&s| s == -1)), (0, true));
    }
}

/// A layer's rotary step.
#[derive(Clone, Copy, Debug)]
struct Rope {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    rotary_dim: usize,
    page_tokens: usize,
    norm: bool,
    bias: bool,
    act: Act,
    kv8: bool,
}

const POSITIONS: [u32; 5] = [0, 1, 40, 63, 17];
/// `page * page_tokens + offset` for pages of 16; the third row has no place in the cache.
const SLOTS: [i32; 5] = [0, 35, -1, 31, 47];
const NUM_SLOTS: usize = 64;

/// What one launch leaves: qkv, pages, scales.
#[derive(PartialEq)]
struct RopeOutput {
    qkv: Vec<u16>,
    kv: Vec<u8>,
    scales: Vec<f32>,
}

struct RopeInput {
    qkv: Vec<u16>,
    bias: Vec<f32>,
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
    table: RopeTable,
}

impl Rope {
    fn columns(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    fn input(&self, rng: &mut Rng) -> RopeInput {
        let pairs = self.rotary_dim / 2;
        RopeInput {
            qkv: self.act.pack(&rng.vector(POSITIONS.len() * self.columns(), 2.0)),
            bias: rng.vector(self.columns(), 0.5),
            q_norm: rng.vector(self.head_dim, 1.5),
            k_norm: rng.vector(self.head_dim, 1.5),
            table: RopeTable {
                inv_freq: (0..pairs).map(|i| 10000f32.powf(-(i as f32) / pairs as f32)).collect(),
                attention_factor: 1.1,
                max_positions: 64,
            },
        }
    }

    fn launch(&self, kernels: &HostKernels, input: &RopeInput, write_back: bool, seed: u64) -> RopeOutput {
        let pairs = self.rotary_dim / 2;
        let cos_sin: Vec<f32> = (0..64 * pairs)
            .flat_map(|i| {
                let (sin, cos) = input.table.sin_cos((i / pairs) as u32, i % pairs);
                [cos, sin]
            })
            .collect();
        let rows = POSITIONS.len();
        let mut qkv = input.qkv.clone();
        qkv.resize((rows + SURPLUS) * self.columns(), POISON);
        let element = if self.kv8 { 1 } else { 2 };
        let mut kv = vec![0xFFu8; NUM_SLOTS * 2 * self.kv_heads * self.head_dim * element];
        let mut scales = vec![-1.0f32; NUM_SLOTS * 2 * self.kv_heads];
        let num_rows = count(rows);
        let params = RopeCacheParams {
            qkv: address_mut(&mut qkv),
            bias: if self.bias { address(&input.bias) } else { 0 },
            q_norm: if self.norm { address(&input.q_norm) } else { 0 },
            k_norm: if self.norm { address(&input.k_norm) } else { 0 },
            rope: if pairs > 0 { address(&cos_sin) } else { 0 },
            positions: address(&POSITIONS),
            slot_mapping: address(&SLOTS),
            kv: address_mut(&mut kv),
            kv_scales: address_mut(&mut scales),
            num_rows: address(&num_rows),
            num_heads: self.heads as i32,
            num_kv_heads: self.kv_heads as i32,
            head_dim: self.head_dim as i32,
            rotary_dim: self.rotary_dim as i32,
            page_tokens: self.page_tokens as i32,
            eps: 1e-5,
            write_back: i32::from(write_back),
            reserved: 0,
        };
        let is_any = !(self.head_dim.is_multiple_of(16) && self.rotary_dim.is_multiple_of(16));
        let heads = self.heads + 2 * self.kv_heads;
        let lanes = if is_any { 32 } else { (self.head_dim / 16).next_power_of_two() };
        let (any, kv8) = (if is_any { "_any" } else { "" }, if self.kv8 { "_kv8" } else { "" });
        let name = format!("quire_rope_cache_{}{any}{kv8}", self.act.name());
        let grid = [(rows + SURPLUS) as u32, (heads * lanes).div_ceil(256) as u32, 1];
        kernels.launch(&name, grid, [256, 1, 1], 0, &params, seed);
        assert!(qkv[rows * self.columns()..].iter().all(|&x| x == POISON), "{self:?}: surplus rows");
        qkv.truncate(rows * self.columns());
        RopeOutput { qkv, kv, scales }
    }

    /// qkv after the step, in f32, by the reference.
    fn reference(&self, input: &RopeInput) -> Vec<f32> {
        let rows = POSITIONS.len();
        let mut reference = RefBackend::new();
        let mut norm = |weight: &[f32]| {
            let bytes = as_bytes(weight);
            let view = TensorView { dtype: DType::F32, shape: &[weight.len()], data: &bytes };
            reference.load_norm("norm", view).expect("the reference computes it")
        };
        let norms = (norm(&input.q_norm), norm(&input.k_norm));
        let layer = KvLayerShape { num_kv_heads: self.kv_heads as u32, head_dim: self.head_dim as u32 };
        let layout = KvLayout { num_blocks: 4, block_size: 16, layers: vec![layer], dtype: DType::F32 };
        let mut kv = reference.alloc_kv(&layout).expect("the reference computes it");
        let mut qkv =
            reference.alloc(BufRole::Hidden, rows, self.columns()).expect("the reference computes it");
        let values = self.act.unpack(&input.qkv).into_iter().enumerate();
        let values: Vec<f32> =
            values.map(|(i, x)| if self.bias { x + input.bias[i % self.columns()] } else { x }).collect();
        reference.write(&mut qkv, &values).expect("the reference computes it");
        let slots = SLOTS.map(|slot| slot.max(0) as u32);
        reference.prepare(&step(&[0; 5], &POSITIONS, &slots)).expect("the reference computes it");
        let shape = quire_backend::AttnShape {
            num_heads: self.heads as u32,
            num_kv_heads: self.kv_heads as u32,
            head_dim: self.head_dim as u32,
        };
        let op = RopeAndCache {
            qkv: &mut qkv,
            shape,
            qk_norm: self.norm.then_some((&norms.0, &norms.1)),
            eps: 1e-5,
            rope: (self.rotary_dim > 0).then_some(&input.table),
            kv: &mut kv,
            layer: 0,
        };
        reference.rope_and_cache(op).expect("the reference computes it");
        reference.read(&qkv, rows).expect("the reference computes it")
    }

    /// Where the key (0) or value (1) of a KV head in a slot begins in the pages.
    fn index(&self, slot: i32, which: usize, head: usize) -> usize {
        let (page, offset) = (slot as usize / self.page_tokens, slot as usize % self.page_tokens);
        ((page * 2 + which) * self.kv_heads + head) * self.page_tokens + offset
    }

    /// Keys and values in the pages against what the step computed; everything else is as it was.
    fn check_pages(&self, output: &RopeOutput, want: &[f32]) {
        let mut written = vec![false; NUM_SLOTS * 2 * self.kv_heads];
        for (row, slot) in SLOTS.into_iter().enumerate().filter(|(_, slot)| *slot >= 0) {
            for (which, head) in (0..2).flat_map(|w| (0..self.kv_heads).map(move |h| (w, h))) {
                let column = (self.heads + which * self.kv_heads + head) * self.head_dim;
                let want = &want[row * self.columns() + column..][..self.head_dim];
                let index = self.index(slot, which, head);
                written[index] = true;
                let what = format!("{self:?} row {row} {} head {head}", ["key", "value"][which]);
                if self.kv8 {
                    self.check_bytes(&what, output, index, want);
                } else {
                    let at = index * self.head_dim * 2;
                    let bytes = output.kv[at..at + self.head_dim * 2].chunks_exact(2);
                    let have: Vec<f32> =
                        bytes.map(|b| self.act.value(u16::from_le_bytes([b[0], b[1]]))).collect();
                    assert_close(&what, &have, want, 1.01 * self.act.epsilon() + 1e-5, 1e-2);
                }
            }
        }
        let bytes = output.kv.len() / written.len();
        for (index, written) in written.into_iter().enumerate().filter(|(_, w)| !w) {
            let stays = output.kv[index * bytes..][..bytes].iter().all(|&b| b == 0xFF);
            assert!(!written && stays && output.scales[index] == -1.0, "{self:?}: {index} is not ours");
        }
    }

    fn check_bytes(&self, what: &str, output: &RopeOutput, index: usize, want: &[f32]) {
        let scale = output.scales[index];
        let largest = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        assert_eq!(scale.to_bits() & 0x7F_FFFF, 0, "{what}: {scale} is a power of two");
        assert!(largest <= 448.0 * scale * 1.001 && largest > 223.0 * scale, "{what}: {scale} for {largest}");
        let have: Vec<f32> =
            output.kv[index * self.head_dim..][..self.head_dim].iter().map(|&b| e4m3(b) * scale).collect();
        // Three bits of mantissa; below 2^-6 steps of 2^-9.
        assert_close(what, &have, want, 1.0 / 16.0 + 1e-4, scale / 64.0);
    }
}

/// The value of an e4m3 byte, by its definition.
fn e4m3(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let magnitude = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 8.0 * 2f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if bits & 0x80 != 0 { -magnitude } else { magnitude }
}

fn ropes() -> Vec<Rope> {
    let base = Rope {
        heads: 4,
        kv_heads: 2,
        head_dim: 128,
        rotary_dim: 128,
        page_tokens: 16,
        norm: false,
        bias: false,
        act: Act::Bf16,
        kv8: false,
    };
    let mut ropes = vec![
        base,
        Rope { norm: true, ..base },
        Rope { bias: true, norm: true, act: Act::F16, ..base },
        Rope { page_tokens: 32, head_dim: 64, rotary_dim: 64, heads: 14, ..base },
        Rope { head_dim: 256, rotary_dim: 256, kv_heads: 1, norm: true, ..base },
        Rope { head_dim: 512, rotary_dim: 128, heads: 1, kv_heads: 1, ..base },
        Rope { head_dim: 80, rotary_dim: 32, bias: true, ..base },
        Rope { head_dim: 96, rotary_dim: 96, norm: true, ..base },
        Rope { head_dim: 128, rotary_dim: 64, norm: true, ..base },
        Rope { head_dim: 16, rotary_dim: 16, heads: 3, kv_heads: 3, ..base },
        Rope { rotary_dim: 0, bias: true, ..base },
        Rope { head_dim: 8, rotary_dim: 8, heads: 8, kv_heads: 4, ..base },
        Rope { head_dim: 10, rotary_dim: 6, norm: true, bias: true, ..base },
        Rope { head_dim: 40, rotary_dim: 40, act: Act::F16, norm: true, ..base },
    ];
    ropes.extend(ropes.clone().into_iter().map(|rope| Rope { kv8: true, ..rope }));
    ropes
}

#[test]
fn rope_and_cache_equals_the_reference() {
    let Some(kernels) = HostKernels::load() else { return };
    let mut rng = Rng::new(7);
    for rope in ropes() {
        let input = rope.input(&mut rng);
        let want = rope.reference(&input);
        let got = rope.launch(kernels, &input, true, 0);
        let have = rope.act.unpack(&got.qkv);
        assert_close(&format!("{rope:?}"), &have, &want, 1.01 * rope.act.epsilon() + 1e-5, 1e-2);
        rope.check_pages(&got, &want);
        for seed in SEEDS {
            assert!(rope.launch(kernels, &input, true, seed) == got, "{rope:?}: depends on the order");
        }

        // Without writing back, k and v stay what they were, and the rest is the same.
        let got_q = rope.launch(kernels, &input, false, 3);
        assert!(got_q.kv == got.kv && got_q.scales == got.scales, "{rope:?}");
        let q_size = rope.heads * rope.head_dim;
        for row in 0..POSITIONS.len() {
            let at = row * rope.columns();
            assert_eq!(got_q.qkv[at..at + q_size], got.qkv[at..at + q_size], "{rope:?} row {row}");
            let kv = at + q_size..at + rope.columns();
            assert_eq!(got_q.qkv[kv.clone()], input.qkv[kv], "{rope:?} row {row}");
        }
    }
}

/// Conversions to and from every 16-bit number, and from f32 by nearest even, as the half crate has them. (The GPU has
/// instructions for it: this keeps the emulation honest.)
#[test]
fn roundings_are_those_of_ieee() {
    let Some(kernels) = HostKernels::load() else { return };
    let mut rng = Rng::new(8);
    for act in ACTS {
        // Values through the table of an embedding: to f32.
        let table: Vec<u16> = (0..=u16::MAX).collect();
        let mut out = vec![0.0f32; 1 << 16];
        let (ids, num_rows) = ([0], count(1));
        let params = EmbedParams {
            table: address(&table),
            token_ids: address(&ids),
            last_tokens: 0,
            out: address_mut(&mut out),
            num_rows: address(&num_rows),
            hidden: 1 << 16,
            vocab: 1,
            scale: 1.0,
            reserved: 0,
        };
        kernels.launch(&format!("quire_embed_{}", act.name()), [1, 1, 1], [256, 1, 1], 0, &params, 0);
        for (bits, &x) in out.iter().enumerate() {
            let want = act.value(bits as u16);
            assert!(
                x.to_bits() == want.to_bits() || (x.is_nan() && want.is_nan()),
                "{act:?} {bits:04x}: {x}"
            );
        }
        // And from f32: a bias on zeros, not rotated.
        let rope = Rope { rotary_dim: 0, norm: false, bias: true, act, ..ropes()[0] };
        let mut input = rope.input(&mut rng);
        input.qkv.fill(0);
        for round in 0..40 {
            for bias in &mut input.bias {
                let exponent = 2f32.powi(rng.below(60) as i32 - 30);
                *bias = match rng.below(3) {
                    // Exactly between two numbers, now and then.
                    0 => f32::from_bits(rng.next_u32() & !0xFFF),
                    1 => f32::from_bits(u32::from(act.bits(rng.signed(exponent))) << 16 | 0x8000),
                    _ => rng.signed(exponent),
                };
                if !bias.is_finite() {
                    *bias = 0.0;
                }
            }
            let got = rope.launch(kernels, &input, true, round);
            for (i, &bits) in got.qkv.iter().enumerate() {
                let x = input.bias[i % rope.columns()];
                assert_eq!(bits, act.bits(x + 0.0), "{act:?} of {x:e}");
            }
        }
    }
}

/// The byte nearest to `x`, the even one of two; beyond 448 the largest.
fn nearest_e4m3(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    let distance = |bits: u8| (f64::from(e4m3(bits)) - f64::from(x.abs())).abs();
    let best = (0..0x7F).min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1))));
    best.expect("there are bytes") | sign
}

#[test]
fn bytes_of_the_cache_are_rounded_to_nearest_even() {
    let Some(kernels) = HostKernels::load() else { return };
    let mut rng = Rng::new(9);
    let rope = Rope { rotary_dim: 0, bias: true, kv8: true, ..ropes()[0] };
    let mut input = rope.input(&mut rng);
    input.qkv.fill(0);
    for round in 0..10 {
        for (i, bias) in input.bias.iter_mut().enumerate() {
            let code = rng.below(0x7E) as u8;
            *bias = match (i % rope.head_dim, rng.below(3)) {
                // The largest number of each head makes its scale 1.
                (5, _) => 448.0,
                // Exactly between two bytes.
                (_, 0) => (e4m3(code) + e4m3(code + 1)) / 2.0,
                (_, 1) => e4m3(code),
                _ => rng.signed(448.0) * 2f32.powi(-(rng.below(18) as i32)),
            };
            if rng.below(2) == 0 {
                *bias = -*bias;
            }
        }
        let got = rope.launch(kernels, &input, false, round);
        for (row, slot) in SLOTS.into_iter().enumerate().filter(|(_, slot)| *slot >= 0) {
            for (which, head) in (0..2).flat_map(|w| (0..rope.kv_heads).map(move |h| (w, h))) {
                let index = rope.index(slot, which, head);
                assert_eq!(got.scales[index], 1.0);
                let column = (rope.heads + which * rope.kv_heads + head) * rope.head_dim;
                for i in 0..rope.head_dim {
                    let (x, have) = (input.bias[column + i], got.kv[index * rope.head_dim + i]);
                    // Zero may lose its sign.
                    let want = nearest_e4m3(x);
                    assert!(
                        have == want || (have | want) & 0x7F == 0,
                        "row {row}: {x:e} is {have:02x}, not {want:02x}"
                    );
                }
            }
        }
    }
}
