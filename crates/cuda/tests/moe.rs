//! The kernels of mixtures of experts, built for the host: routing against its definition, sorting by what it must keep,
//! products and sums against f64.

mod common;
mod data;

use common::{HostKernels, under_sanitizers};
use data::{ACTS, Act, POISON, Rng, address, address_mut, count};
use quire_backend::{Activation, fp8, quant};
use quire_cuda::int_weights::{Bits, IntWeights};
use quire_cuda::params::{
    MoeCombineParams, MoeGemmParams, MoeIntParams, MoeRouteParams, MoeSortParams, MoeTile, QuantizeParams,
};

const TILE_ROWS: usize = 64;

/// Experts and weights of every slot.
fn route(
    kernels: &HostKernels,
    logits: &[f32],
    num_experts: usize,
    top_k: usize,
    renormalise: bool,
) -> (Vec<i32>, Vec<f32>) {
    let rows = logits.len() / num_experts;
    let (mut experts, mut weights) = (vec![-1; rows * top_k], vec![f32::NAN; rows * top_k]);
    let num_rows = count(rows);
    let params = MoeRouteParams {
        logits: address(logits),
        experts: address_mut(&mut experts),
        weights: address_mut(&mut weights),
        num_rows: address(&num_rows),
        num_experts: num_experts as i32,
        stride: num_experts as i32,
        top_k: top_k as i32,
        renormalise: i32::from(renormalise),
    };
    // The grid of a bucket: more rows than there are.
    let grid = [rows.div_ceil(8) as u32 + 1, 1, 1];
    kernels.launch("quire_moe_route", grid, [256, 1, 1], 0, &params, 7);
    (experts, weights)
}

#[test]
fn tokens_go_to_the_experts_with_the_largest_logits() {
    let Some(kernels) = HostKernels::load() else { return };
    let mut rng = Rng::new(3);
    for (num_experts, top_k) in [(1, 1), (4, 4), (8, 2), (33, 5), (128, 8), (512, 32)] {
        for renormalise in [false, true] {
            let rows = 11;
            let mut logits = rng.vector(rows * num_experts, 4.0);
            // Coarse, so that there are ties, and a row of equals.
            logits.iter_mut().for_each(|x| *x = (*x * 2.0).round() / 2.0 + 0.0);
            logits[num_experts..2 * num_experts].fill(1.5);
            let (experts, weights) = route(kernels, &logits, num_experts, top_k, renormalise);
            for (row, logits) in logits.chunks(num_experts).enumerate() {
                let mut order: Vec<usize> = (0..num_experts).collect();
                order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
                let exp = |expert: usize| f64::from(logits[expert] - logits[order[0]]).exp();
                let all = 0..num_experts;
                let sum: f64 = if renormalise {
                    order[..top_k].iter().map(|&e| exp(e)).sum()
                } else {
                    all.map(exp).sum()
                };
                for (rank, &expected) in order[..top_k].iter().enumerate() {
                    let (expert, weight) = (experts[row * top_k + rank], weights[row * top_k + rank]);
                    assert_eq!(expert as usize, expected, "{num_experts}, row {row}, rank {rank}");
                    let exact = exp(expected) / sum;
                    assert!(
                        (f64::from(weight) - exact).abs() < 1e-6,
                        "{num_experts} {row} {rank}: {weight} {exact}"
                    );
                }
            }
        }
    }
    let (experts, weights) = route(kernels, &[f32::NAN, -3.0, f32::NAN, 2.0], 4, 3, true);
    assert_eq!(experts, [3, 1, 0], "NaN comes last");
    assert!(weights.iter().all(|weight| weight.is_nan()));
}

/// Slots by expert, and tiles of them.
fn sort(
    kernels: &HostKernels,
    experts: &[i32],
    num_experts: usize,
    top_k: usize,
    seed: u64,
) -> (Vec<i32>, Vec<MoeTile>) {
    let mut slots = vec![-1; experts.len()];
    let mut tiles = vec![MoeTile::default(); num_experts + experts.len() / TILE_ROWS];
    let (mut num_tiles, num_rows) = ([-1], count(experts.len() / top_k));
    let params = MoeSortParams {
        experts: address(experts),
        num_rows: address(&num_rows),
        slots: address_mut(&mut slots),
        tiles: address_mut(&mut tiles),
        num_tiles: address_mut(&mut num_tiles),
        num_experts: num_experts as i32,
        top_k: top_k as i32,
    };
    kernels.launch("quire_moe_sort", [1, 1, 1], [1024, 1, 1], 0, &params, seed);
    tiles.truncate(num_tiles[0] as usize);
    (slots, tiles)
}

#[test]
fn every_slot_is_in_one_tile_of_its_expert() {
    let Some(kernels) = HostKernels::load() else { return };
    let mut rng = Rng::new(5);
    for (num_experts, slots, top_k) in
        [(1, 1, 1), (8, 6, 2), (8, 2, 2), (3, 300, 3), (512, 1000, 8), (512, 8, 8)]
    {
        let experts: Vec<i32> =
            rng.vector(slots, 1.0).iter().map(|x| (x.abs().powi(2) * num_experts as f32) as i32).collect();
        let experts: Vec<i32> = experts.iter().map(|&e| e.min(num_experts as i32 - 1)).collect();
        let (sorted, tiles) = sort(kernels, &experts, num_experts, top_k, 11);
        let mut seen = vec![0; slots];
        let mut before = -1;
        for tile in &tiles {
            assert!((1..=TILE_ROWS as i32).contains(&tile.count) && tile.expert >= before, "{tile:?}");
            before = tile.expert;
            for &slot in &sorted[tile.first as usize..][..tile.count as usize] {
                assert_eq!(experts[slot as usize], tile.expert);
                seen[slot as usize] += 1;
            }
        }
        assert!(seen.iter().all(|&times| times == 1), "{num_experts} experts, {slots} slots");
    }
}

/// How weights of floats are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stored {
    AsActivations,
    Fp8,
}

/// A matrix as a kernel reads it, and its numbers.
struct Matrix {
    bytes: Vec<u8>,
    scales: Vec<f32>,
    values: Vec<f64>,
}

impl Matrix {
    fn random(rng: &mut Rng, act: Act, stored: Stored, rows: usize, cols: usize) -> Self {
        let weights = rng.vector(rows * cols, 1.7 / (cols as f32).sqrt());
        if stored == Stored::AsActivations {
            let packed = act.pack(&weights);
            let values = act.unpack(&packed).into_iter().map(f64::from).collect();
            let bytes = packed.into_iter().flat_map(u16::to_le_bytes).collect();
            return Self { bytes, scales: Vec::new(), values };
        }
        let (mut bytes, mut scales, mut values) = (vec![0; rows * cols], Vec::new(), Vec::new());
        for (row, codes) in weights.chunks(cols).zip(bytes.chunks_mut(cols)) {
            let scale = quant::quantize_fp8(row, codes);
            values.extend(codes.iter().map(|&code| f64::from(scale) * f64::from(fp8::to_f32(code))));
            scales.push(scale);
        }
        Self { bytes, scales, values }
    }
}

/// The two products and the sum of a layer.
struct Layer {
    act: Act,
    stored: Stored,
    num_experts: usize,
    top_k: usize,
    hidden: usize,
    width: usize,
    up: Matrix,
    down: Matrix,
}

impl Layer {
    fn random(
        rng: &mut Rng,
        (act, stored): (Act, Stored),
        num_experts: usize,
        top_k: usize,
        hidden: usize,
        width: usize,
    ) -> Self {
        let up = Matrix::random(rng, act, stored, num_experts * 2 * width, hidden);
        let down = Matrix::random(rng, act, stored, num_experts * hidden, width);
        Self { act, stored, num_experts, top_k, hidden, width, up, down }
    }

    /// Results of rows whose slots go to these experts.
    fn run(&self, kernels: &HostKernels, x: &[u16], experts: &[i32], weights: &[f32], seed: u64) -> Vec<u16> {
        let (slots, rows) = (experts.len(), experts.len() / self.top_k);
        let (sorted, tiles) = sort(kernels, experts, self.num_experts, self.top_k, seed);
        let num_tiles = count(tiles.len());
        let mut hidden = vec![POISON; slots * self.width];
        let mut results = vec![POISON; slots * self.hidden];
        let gate_up = MoeGemmParams {
            x: address(x),
            weight: address(&self.up.bytes),
            w_scales: address(&self.up.scales),
            out: address_mut(&mut hidden),
            slots: address(&sorted),
            tiles: address(&tiles),
            num_tiles: address(&num_tiles),
            in_features: self.hidden as i32,
            out_features: self.width as i32,
            top_k: self.top_k as i32,
            kind: 0,
        };
        let down = MoeGemmParams {
            x: address(&hidden),
            weight: address(&self.down.bytes),
            w_scales: address(&self.down.scales),
            out: address_mut(&mut results),
            in_features: self.width as i32,
            out_features: self.hidden as i32,
            ..gate_up
        };
        let format = if self.stored == Stored::Fp8 { "fp8_" } else { "" };
        let name = |what: &str| format!("quire_moe_{what}_{format}{}", self.act.name());
        kernels.launch(&name("gate_up"), [3, 1, 1], [128, 1, 1], 0, &gate_up, seed);
        kernels.launch(&name("down"), [2, 1, 1], [128, 1, 1], 0, &down, seed);
        let (num_rows, mut out) = (count(rows), vec![POISON; (rows + 1) * self.hidden]);
        let combine = MoeCombineParams {
            y: address(&results),
            weights: address(weights),
            out: address_mut(&mut out),
            num_rows: address(&num_rows),
            hidden: self.hidden as i32,
            top_k: self.top_k as i32,
        };
        let grid = [rows as u32 + 1, self.hidden.div_ceil(2048) as u32, 1];
        let combine_kernel = format!("quire_moe_combine_{}", self.act.name());
        kernels.launch(&combine_kernel, grid, [256, 1, 1], 0, &combine, seed);
        assert!(out[rows * self.hidden..].iter().all(|&x| x == POISON), "surplus rows");
        out.truncate(rows * self.hidden);
        out
    }

    /// One row in f64, rounded where the kernels round.
    fn exact(&self, x: &[u16], experts: &[i32], weights: &[f32]) -> Vec<f64> {
        let value = |bits: u16| f64::from(self.act.unpack(&[bits])[0]);
        let dot = |row: &[f64], x: &[u16]| row.iter().zip(x).map(|(&w, &x)| w * value(x)).sum::<f64>();
        let mut out = vec![0.0; self.hidden];
        for (&expert, &weight) in experts.iter().zip(weights) {
            let rows = &self.up.values[expert as usize * 2 * self.width * self.hidden..]
                [..2 * self.width * self.hidden];
            let (gate, up) = rows.split_at(self.width * self.hidden);
            let pairs = gate.chunks(self.hidden).zip(up.chunks(self.hidden));
            let hidden: Vec<f32> = pairs
                .map(|(gate, up)| Activation::Silu.apply(dot(gate, x) as f32) * dot(up, x) as f32)
                .collect();
            let hidden = self.act.pack(&hidden);
            let rows = &self.down.values[expert as usize * self.hidden * self.width..];
            for (out, row) in out.iter_mut().zip(rows.chunks(self.width)) {
                *out += f64::from(weight) * dot(row, &hidden);
            }
        }
        out
    }
}

#[test]
fn experts_give_right_values_in_any_company() {
    let Some(kernels) = HostKernels::load() else { return };
    let mut rng = Rng::new(9);
    // One expert with more rows than a tile, several with few; widths that end inside every kind of chunk.
    let small = [(4, 2, 72, 40, 13), (3, 2, 136, 24, 90), (40, 3, 64, 136, 12)];
    // The same of whole loads of e4m3, of which a chunk has four.
    let small_fp8 = [(4, 2, 80, 48, 13), (3, 2, 144, 16, 90), (40, 3, 64, 144, 12)];
    let cases = small.map(|case| (case, Stored::AsActivations)).into_iter();
    let cases = cases.chain(small_fp8.map(|case| (case, Stored::Fp8)));
    for ((num_experts, top_k, hidden, width, rows), stored) in cases {
        for act in ACTS {
            let layer = Layer::random(&mut rng, (act, stored), num_experts, top_k, hidden, width);
            let x = act.pack(&rng.vector(rows * hidden, 1.5));
            let expert = |slot: usize| ((slot / top_k * 7 % 5 + slot % top_k * 2) % num_experts) as i32;
            let experts: Vec<i32> = (0..rows * top_k).map(expert).collect();
            let weights: Vec<f32> = rng.vector(rows * top_k, 0.5).iter().map(|w| w.abs()).collect();
            let all = layer.run(kernels, &x, &experts, &weights, 1);
            let values = act.unpack(&all);
            for row in [0, rows / 2, rows - 1] {
                let slots = row * top_k..(row + 1) * top_k;
                let (x, experts, weights) =
                    (&x[row * hidden..][..hidden], &experts[slots.clone()], &weights[slots]);
                let exact = layer.exact(x, experts, weights);
                for (i, (got, want)) in values[row * hidden..].iter().zip(&exact).enumerate() {
                    let bound = 0.02 * (1.0 + want.abs());
                    assert!(
                        (f64::from(*got) - want).abs() < bound,
                        "{act:?}, {stored:?}, row {row}, {i}: {got}, not {want}"
                    );
                }
                let alone = layer.run(kernels, x, experts, weights, 2);
                let company = &all[row * hidden..][..hidden];
                assert!(alone == company, "{act:?}, {stored:?}: row {row} has other bits alone");
            }
        }
    }
}

/// A product with quantized weights as the codec defines it, for one row.
fn integer_product(bits: Bits, weights: &[f32], x: &[f32]) -> Vec<f32> {
    let (mut q, mut x_scales) = (vec![0; x.len()], vec![0.0; x.len().div_ceil(quant::ACT_GROUP)]);
    quant::quantize_activations(x, &mut q, &mut x_scales);
    let output = |row: &[f32]| {
        let (values, scale) = values_of(bits, row);
        let groups = values.chunks(quant::ACT_GROUP).zip(q.chunks(quant::ACT_GROUP)).zip(&x_scales);
        let sum = groups.fold(0.0f32, |sum, ((values, q), scale)| {
            let exact: i32 = values.iter().zip(q).map(|(&w, &x)| w * i32::from(x)).sum();
            scale.mul_add(exact as f32, sum)
        });
        sum * scale
    };
    weights.chunks(x.len()).map(output).collect()
}

/// A row of weights as integers, and their scale.
fn values_of(bits: Bits, row: &[f32]) -> (Vec<i32>, f32) {
    match bits {
        Bits::Eight => {
            let mut codes = vec![0; row.len()];
            let scale = quant::quantize_int8(row, &mut codes);
            (codes.into_iter().map(i32::from).collect(), scale)
        }
        Bits::Four => {
            let (mut codes, mut steps) = (vec![0; row.len()], vec![0; row.len().div_ceil(quant::INT4_GROUP)]);
            let scale = quant::quantize_int4(row, &mut codes, &mut steps);
            let value = |(i, &code): (usize, &u8)| quant::int4_value(steps[i / quant::INT4_GROUP], code);
            (codes.iter().enumerate().map(value).collect(), scale)
        }
    }
}

fn packed(bits: Bits, weights: &[f32], cols: usize) -> IntWeights {
    let mut packed = IntWeights::new(bits, weights.len() / cols, cols);
    weights.chunks(cols).enumerate().for_each(|(n, row)| packed.set_row(n, row));
    packed
}

/// Rows of activations by `quire_quantize`, `times` the count that it reads.
fn quantized(kernels: &HostKernels, act: Act, x: &[u16], cols: usize, times: usize) -> (Vec<i8>, Vec<f32>) {
    let (rows, groups) = (x.len() / cols, cols.div_ceil(quant::ACT_GROUP));
    let (mut q, mut scales) = (vec![99; rows * groups * quant::ACT_GROUP], vec![f32::NAN; rows * groups]);
    let num_rows = count(rows / times);
    let params = QuantizeParams {
        x: address(x),
        q: address_mut(&mut q),
        scales: address_mut(&mut scales),
        num_rows: address(&num_rows),
        in_features: cols as i32,
        groups: groups as i32,
        x_stride: cols as i32,
        rows_per_count: times as i32,
    };
    let grid = [rows as u32 + 2, groups.div_ceil(8) as u32, 1];
    kernels.launch(&format!("quire_quantize_{}", act.name()), grid, [256, 1, 1], 0, &params, 4);
    (q, scales)
}

/// One of the two products of a layer in integers, for all slots; `width` outputs of each.
fn int_products(
    kernels: &HostKernels,
    name: &str,
    weights: &IntWeights,
    (q, x_scales): &(Vec<i8>, Vec<f32>),
    (experts, num_experts, top_k, width): (&[i32], usize, usize, usize),
) -> Vec<u16> {
    let (sorted, tiles) = sort(kernels, experts, num_experts, top_k, 6);
    let num_tiles = count(tiles.len());
    let mut out = vec![POISON; experts.len() * width];
    let params = MoeIntParams {
        q: address(q),
        x_scales: address(x_scales),
        weight: address(&weights.weights),
        steps: address(&weights.steps),
        w_scales: address(&weights.scales),
        out: address_mut(&mut out),
        slots: address(&sorted),
        tiles: address(&tiles),
        num_tiles: address(&num_tiles),
        groups: weights.groups() as i32,
        out_features: width as i32,
        top_k: top_k as i32,
        kind: 3,
    };
    kernels.launch(name, [3, 1, 1], [128, 1, 1], 0, &params, 5);
    out
}

#[test]
fn experts_in_integers_equal_their_definition() {
    let Some(kernels) = HostKernels::load() else { return };
    let mut rng = Rng::new(15);
    // More rows of an expert than a tile takes; an odd number of panels; one group of inputs, and two.
    let (num_experts, top_k, hidden, width, rows) = (3, 2, 272, 48, 70);
    let experts: Vec<i32> = (0..rows * top_k).map(|slot| [0, 1, 0, 2][slot % 4]).collect();
    for (bits, act) in
        [(Bits::Eight, ACTS[0]), (Bits::Four, ACTS[0]), (Bits::Eight, ACTS[1]), (Bits::Four, ACTS[1])]
    {
        let up = rng.vector(num_experts * 2 * width * hidden, 0.2);
        let down = rng.vector(num_experts * hidden * width, 0.2);
        let x = act.pack(&rng.vector(rows * hidden, 1.5));
        let name = |what: &str| {
            let bits = if bits == Bits::Eight { 8 } else { 4 };
            format!("quire_moe_{what}_int{bits}_{}", act.name())
        };
        let routing = |width| (&experts[..], num_experts, top_k, width);
        let q = quantized(kernels, act, &x, hidden, 1);
        let inner = int_products(kernels, &name("gate_up"), &packed(bits, &up, hidden), &q, routing(width));
        let q = quantized(kernels, act, &inner, width, top_k);
        let out = int_products(kernels, &name("down"), &packed(bits, &down, width), &q, routing(hidden));
        for (slot, &expert) in experts.iter().enumerate() {
            let token = slot / top_k;
            let up = &up[expert as usize * 2 * width * hidden..][..2 * width * hidden];
            let both = integer_product(bits, up, &act.unpack(&x[token * hidden..][..hidden]));
            let gated: Vec<f32> = (0..width).map(|i| both[i].max(0.0) * both[width + i]).collect();
            let got = &inner[slot * width..][..width];
            assert_eq!(
                act.unpack(got),
                act.unpack(&act.pack(&gated)),
                "{bits:?} {act:?}: slot {slot}, hidden"
            );
            let down = &down[expert as usize * hidden * width..][..hidden * width];
            let want = integer_product(bits, down, &act.unpack(got));
            let got = &out[slot * hidden..][..hidden];
            assert_eq!(act.unpack(got), act.unpack(&act.pack(&want)), "{bits:?} {act:?}: slot {slot}");
        }
    }
}

#[test]
fn sanitizers_find_nothing() {
    under_sanitizers("every_slot_is_in_one_tile_of_its_expert");
    under_sanitizers("experts_give_right_values");
    under_sanitizers("experts_in_integers");
}
