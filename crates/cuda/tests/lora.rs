//! The kernels of LoRA adapters, built for the host: against f64, with poisoned memory around what they may touch, and the
//! same bits from the kernels for prompts and for decoding.

mod common;
mod data;

use common::{HostKernels, under_sanitizers};
use data::{ACTS, Act, POISON, Rng, address, address_mut, assert_close, count};
use quire_cuda::params::{LoraAdapterEntry, LoraExpandParams, LoraPartEntry, LoraShrinkParams};

/// `(first, count, rank)` of each part.
type Parts = &'static [(usize, usize, usize)];

/// Rows that the grid has beyond the step's.
const SURPLUS: usize = 3;

/// An adapter with its factors.
struct Adapter {
    parts: Parts,
    /// `[rank of all parts, in_features]`.
    a: Vec<u16>,
    /// `[count, rank]` of each part.
    b: Vec<Vec<u16>>,
}

impl Adapter {
    fn new(act: Act, rng: &mut Rng, parts: Parts, in_features: usize) -> Self {
        let rank: usize = parts.iter().map(|part| part.2).sum();
        let b = parts.iter().map(|&(_, count, rank)| act.pack(&rng.vector(count * rank, 1.0))).collect();
        Self { parts, a: act.pack(&rng.vector(rank * in_features, 0.2)), b }
    }

    fn scaling(part: usize) -> f32 {
        0.5 + part as f32
    }

    fn entry(&self) -> LoraAdapterEntry {
        let mut entry = LoraAdapterEntry {
            a: address(&self.a),
            num_parts: self.parts.len() as i32,
            ..LoraAdapterEntry::default()
        };
        for (i, &(first, count, rank)) in self.parts.iter().enumerate() {
            entry.parts[i] = LoraPartEntry {
                b: address(&self.b[i]),
                first: first as i32,
                count: count as i32,
                rank_begin: entry.rank,
                rank: rank as i32,
                scaling: Self::scaling(i),
                reserved: 0,
            };
            entry.rank += rank as i32;
        }
        entry
    }

    /// What it adds to a row, in f64.
    fn expected(&self, act: Act, x: &[f32], out: &mut [f32]) {
        let mut a = self.a.chunks_exact(x.len());
        for (i, &(first, _, rank)) in self.parts.iter().enumerate() {
            let dot = |a: &[f32], x: &[f32]| -> f64 {
                a.iter().zip(x).map(|(&a, &x)| f64::from(a) * f64::from(x)).sum()
            };
            let row = |a: &[u16]| dot(&act.unpack(a), x) as f32 * Self::scaling(i);
            let shrunk: Vec<f32> = a.by_ref().take(rank).map(row).collect();
            for (out, b) in out[first..].iter_mut().zip(self.b[i].chunks_exact(rank)) {
                *out += dot(&act.unpack(b), &shrunk) as f32;
            }
        }
    }
}

#[test]
fn no_kernel_reads_or_writes_out_of_bounds() {
    under_sanitizers("");
}

#[test]
fn rows_get_what_their_adapters_add() {
    let Some(kernels) = HostKernels::load() else { return };
    let mut rng = Rng::new(5);
    let shapes: [(usize, usize, [Parts; 3]); 3] = [
        (64, 80, [&[(0, 48, 8), (48, 16, 8), (64, 16, 8)], &[(48, 16, 16)], &[]]),
        (520, 300, [&[(0, 300, 24)], &[(10, 200, 8)], &[(0, 100, 8), (100, 200, 64)]]),
        (43, 20, [&[(0, 20, 8)], &[(3, 7, 8)], &[(0, 20, 40)]]),
    ];
    for (in_features, out_features, parts) in shapes {
        for act in ACTS {
            let adapters = parts.map(|parts| Adapter::new(act, &mut rng, parts, in_features));
            let ids = [0, 0, -1, 1, 2, 2, 0, -1, 1, 1, 1, -1, 2, 0, 1, 0, 2, -1, -1];
            let (rows, stride) = (ids.len(), 80);
            let x = act.pack(&rng.vector(rows * in_features, 1.0));
            let before = act.pack(&rng.vector(rows * out_features, 1.0));
            let run = |block: usize, seed: u64| {
                let suffix = if block == 1 { String::new() } else { format!("_{block}") };
                let blocks = (rows + SURPLUS).div_ceil(block) as u32;
                let table = adapters.each_ref().map(Adapter::entry);
                let mut shrunk = vec![f32::NAN; (rows + SURPLUS) * stride];
                let mut out = before.clone();
                out.resize((rows + SURPLUS) * out_features, POISON);
                let num_rows = count(rows);
                let shrink = LoraShrinkParams {
                    x: address(&x),
                    adapters: address(&table),
                    row_adapters: address(&ids),
                    out: address_mut(&mut shrunk),
                    num_rows: address(&num_rows),
                    in_features: in_features as i32,
                    stride: stride as i32,
                };
                let name = format!("quire_lora_shrink_{}{suffix}", act.name());
                kernels.launch(&name, [blocks, (stride / 8) as u32, 1], [256, 1, 1], 0, &shrink, seed);
                let expand = LoraExpandParams {
                    x: address(&shrunk),
                    adapters: address(&table),
                    row_adapters: address(&ids),
                    out: address_mut(&mut out),
                    num_rows: address(&num_rows),
                    out_features: out_features as i32,
                    stride: stride as i32,
                };
                let name = format!("quire_lora_expand_{}{suffix}", act.name());
                let columns = out_features.div_ceil(256) as u32;
                kernels.launch(&name, [blocks, columns, 1], [256, 1, 1], 0, &expand, seed);
                out
            };
            let out = run(1, 3);
            assert_eq!(out, run(8, 11), "{act:?}, {in_features} inputs: prompts and decoding");
            for (row, id) in ids.into_iter().enumerate() {
                let (at, what) = (row * out_features, format!("{act:?}, {in_features} inputs, row {row}"));
                let (have, was) = (&out[at..][..out_features], &before[at..][..out_features]);
                let Ok(id) = usize::try_from(id) else {
                    assert_eq!(have, was, "{what}");
                    continue;
                };
                let mut want = act.unpack(was);
                let x = act.unpack(&x[row * in_features..][..in_features]);
                adapters[id].expected(act, &x, &mut want);
                assert_close(&what, &act.unpack(have), &want, act.epsilon(), 1.0);
            }
            assert!(out[rows * out_features..].iter().all(|&bits| bits == POISON), "surplus rows");
        }
    }
}
