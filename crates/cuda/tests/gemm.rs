//! The matrix kernels, built for the host: small batches against a sum in f64, quantized weights against the reference
//! backend, to the bit.

mod common;

use half::{bf16, f16};
use quire_backend::quant;
use quire_backend::reference::RefBackend;
use quire_backend::{Backend, BufRole, Linear, LinearPart, LinearSource, StepInput};
use quire_core::{DType, QuantFormat, Slot, StepId, TensorView};
use quire_cuda::int_weights::{Bits, IntWeights};
use quire_cuda::params::{GemvParams, IntEmbedParams, IntGemmParams, QuantizeParams};

use common::{HostKernels, under_sanitizers};

/// xorshift32 of Marsaglia.
struct Rng(u32);

impl Rng {
    fn signed(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        (self.0 >> 8) as f32 / (1 << 23) as f32 - 1.0
    }
}

fn to_bf16(x: &[f32]) -> Vec<u16> {
    x.iter().map(|&x| bf16::from_f32(x).to_bits()).collect()
}

/// `[rows, n]`; `rows` of `x` exist beyond those asked for, and must not matter.
fn gemv(
    kernels: &HostKernels,
    name: &str,
    x: &[u16],
    weight: &[u16],
    bias: &[f32],
    rows: usize,
    k: usize,
) -> Vec<u8> {
    let (n, num_rows) = (bias.len(), rows as i32);
    let size = if name.ends_with("f32") { 4 } else { 2 };
    let mut out = vec![0xff; rows * n * size];
    let params = GemvParams {
        x: x.as_ptr() as u64,
        weight: weight.as_ptr() as u64,
        bias: bias.as_ptr() as u64,
        out: out.as_mut_ptr() as u64,
        num_rows: &raw const num_rows as u64,
        in_features: k as i32,
        out_features: n as i32,
        x_stride: (x.len() / 8) as i32,
        out_stride: n as i32,
    };
    kernels.launch(name, [n.div_ceil(32) as u32, 1, 1], [256, 1, 1], 0, &params, (k + n) as u64);
    out
}

#[test]
fn few_rows_give_right_values_whatever_their_number() {
    let Some(kernels) = HostKernels::load() else { return };
    for (n, k) in [(1, 8), (32, 64), (33, 72), (70, 520), (100, 1096)] {
        let mut rng = Rng((n * 1000 + k) as u32);
        let mut random = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.signed()).collect() };
        // Rows of x have a longer stride, and what lies between is poison.
        let stride = k + 8;
        let (mut x, weight, bias) = (random(8 * stride), random(n * k), random(n));
        x.chunks_mut(stride).for_each(|row| row[k..].fill(f32::NAN));
        let (bits_x, bits_w) = (to_bf16(&x), to_bf16(&weight));
        let all = gemv(kernels, "quire_gemv_bf16_f32", &bits_x, &bits_w, &bias, 8, k);
        for rows in [1, 2, 7] {
            let out = gemv(kernels, "quire_gemv_bf16_f32", &bits_x, &bits_w, &bias, rows, k);
            assert!(out == all[..rows * n * 4], "[{n}, {k}]: {rows} rows have other bits than 8");
        }
        let rounded = gemv(kernels, "quire_gemv_bf16", &bits_x, &bits_w, &bias, 8, k);
        for (i, out) in all.as_chunks::<4>().0.iter().enumerate() {
            let out = f32::from_le_bytes(*out);
            let value = |bits: u16| bf16::from_bits(bits).to_f64();
            let (row, column) = (i / n, i % n);
            let products = (0..k).map(|j| value(bits_x[row * stride + j]) * value(bits_w[column * k + j]));
            let expected = products.sum::<f64>() + f64::from(bias[column]);
            assert!(
                (f64::from(out) - expected).abs() < 1e-5 * (k as f64).sqrt(),
                "[{n}, {k}] {i}: {out} {expected}"
            );
            assert_eq!(rounded[2 * i..2 * i + 2], bf16::from_f32(out).to_le_bytes(), "[{n}, {k}] {i}");
        }
        let half = |x: &[f32]| -> Vec<u16> { x.iter().map(|&x| f16::from_f32(x).to_bits()).collect() };
        let out = gemv(kernels, "quire_gemv_f16_f32", &half(&x), &half(&weight), &bias, 3, k);
        for (a, b) in out.as_chunks::<4>().0.iter().zip(all.as_chunks::<4>().0) {
            let difference = f32::from_le_bytes(*a) - f32::from_le_bytes(*b);
            assert!(difference.abs() < 0.02 * (k as f32).sqrt(), "[{n}, {k}]: f16 is off by {difference}");
        }
    }
}

/// A quantized layer, and what the reference makes of `x`.
struct Layer {
    k: usize,
    packed: IntWeights,
    bits: Bits,
    bias: Vec<f32>,
    x: Vec<u16>,
    rows: usize,
    expected: Vec<f32>,
}

impl Layer {
    fn random(bits: Bits, n: usize, k: usize, rows: usize) -> Self {
        let mut rng = Rng((n * 1000 + k) as u32);
        let weight: Vec<f32> = (0..n * k).map(|_| rng.signed()).collect();
        let bias: Vec<f32> = (0..n).map(|_| rng.signed()).collect();
        let magnitudes = [1.0, 1e-3, 0.0, 300.0, 1e-31, 1e10];
        let x: Vec<f32> =
            (0..rows * k).map(|i| bf16::from_f32(magnitudes[i / k % 6] * rng.signed()).to_f32()).collect();
        let mut packed = IntWeights::new(bits, n, k);
        weight.chunks(k).enumerate().for_each(|(i, row)| packed.set_row(i, row));
        let expected = reference(bits, &weight, &bias, &x, [n, k, rows]);
        Self { k, packed, bits, bias, x: to_bf16(&x), rows, expected }
    }

    /// By the kernels of one row count.
    fn run(&self, kernels: &HostKernels, variant: &str) -> Vec<f32> {
        let (n, groups, num_rows) = (self.bias.len(), self.packed.groups(), self.rows as i32);
        let mut q = vec![-1i8; self.rows * groups * 256];
        let mut scales = vec![f32::NAN; self.rows * groups];
        let quantize = QuantizeParams {
            x: self.x.as_ptr() as u64,
            q: q.as_mut_ptr() as u64,
            scales: scales.as_mut_ptr() as u64,
            num_rows: &raw const num_rows as u64,
            in_features: self.k as i32,
            groups: groups as i32,
            x_stride: self.k as i32,
            rows_per_count: 1,
        };
        // The grid of a bucket: more rows than there are.
        let grid = [self.rows as u32 + 3, groups.div_ceil(8) as u32, 1];
        kernels.launch("quire_quantize_bf16", grid, [256, 1, 1], 0, &quantize, 3);

        let mut out = vec![f32::NAN; self.rows * n];
        let params = IntGemmParams {
            q: q.as_ptr() as u64,
            x_scales: scales.as_ptr() as u64,
            weight: self.packed.weights.as_ptr() as u64,
            steps: self.packed.steps.as_ptr() as u64,
            w_scales: self.packed.scales.as_ptr() as u64,
            bias: self.bias.as_ptr() as u64,
            out: out.as_mut_ptr() as u64,
            num_rows: &raw const num_rows as u64,
            groups: groups as i32,
            out_features: n as i32,
            out_stride: n as i32,
            reserved: 0,
        };
        let (panels, rows, smem) = match variant {
            "m8" => (1, 8, 2 * 8 * 8 * 20 * 4),
            "m32" => (2, 32, 2 * 8 * 32 * 36 * 4),
            _ => (8, 64, 0),
        };
        let grid = [n.div_ceil(16).div_ceil(panels) as u32, self.rows.div_ceil(rows) as u32 + 1, 1];
        let bits = if self.bits == Bits::Eight { 8 } else { 4 };
        kernels.launch(&format!("quire_int{bits}_gemm_{variant}_f32"), grid, [256, 1, 1], smem, &params, 5);
        out
    }
}

fn reference(bits: Bits, weight: &[f32], bias: &[f32], x: &[f32], [n, k, rows]: [usize; 3]) -> Vec<f32> {
    let bytes = |x: &[f32]| -> Vec<u8> { x.iter().flat_map(|x| x.to_le_bytes()).collect() };
    let (weight, bias) = (bytes(weight), bytes(bias));
    let part = LinearPart {
        weight: TensorView { dtype: DType::F32, shape: &[n, k], data: &weight },
        bias: Some(TensorView { dtype: DType::F32, shape: &[n], data: &bias }),
    };
    let quant = if bits == Bits::Eight { QuantFormat::Int8 } else { QuantFormat::Int4 };
    let mut backend = RefBackend::new();
    let source = LinearSource { name: "test", parts: &[part], quant };
    let weight = backend.load_linear(&source).expect("the reference quantizes");
    let mut input = backend.alloc(BufRole::Residual, rows, k).expect("memory");
    let mut out = backend.alloc(BufRole::Residual, rows, n).expect("memory");
    backend.write(&mut input, x).expect("a buffer");
    let numbers: Vec<u32> = (0..=rows as u32).collect();
    let slots: Vec<_> = numbers[..rows].iter().map(|&slot| Slot(slot)).collect();
    let step = StepInput {
        step: StepId(0),
        token_ids: &vec![0; rows],
        positions: &vec![0; rows],
        slot_mapping: &numbers[..rows],
        cu_seqlens_q: &numbers,
        seq_lens: &vec![1; rows],
        seq_slots: &slots,
        seq_adapters: &[],
        block_tables: &numbers[..rows],
        max_blocks_per_seq: 1,
        logit_rows: &[],
        block_copies: &[],
        seqs: &vec![None; rows],
    };
    backend.prepare(&step).expect("a step");
    backend.linear(Linear { x: &input, weight: &weight, out: &mut out }).expect("a product");
    backend.read(&out, rows).expect("a buffer")
}

#[test]
fn quantized_products_equal_the_reference() {
    let Some(kernels) = HostKernels::load() else { return };
    // The sanitizers look at addresses, which two shapes vary enough; they make everything slow.
    let shapes: &[_] = match std::env::var_os("QUIRE_TEST_SANITIZE") {
        Some(_) => &[(33, 300, 9), (1, 31, 1)],
        None => {
            &[(1, 1, 1), (15, 31, 2), (17, 256, 7), (48, 257, 9), (33, 300, 33), (130, 544, 5), (20, 2310, 3)]
        }
    };
    for bits in [Bits::Eight, Bits::Four] {
        for &(n, k, rows) in shapes {
            let layer = Layer::random(bits, n, k, rows);
            for variant in ["m8", "m32", "wide"] {
                let out = layer.run(kernels, variant);
                for (i, (out, expected)) in out.iter().zip(&layer.expected).enumerate() {
                    assert!(
                        out == expected,
                        "{bits:?} [{n}, {k}] x {rows}, {variant}, {i}: {out:e}, not {expected:e}"
                    );
                }
            }
        }
    }
}

#[test]
fn quantized_products_and_rows_agree_on_the_values() {
    let Some(kernels) = HostKernels::load() else { return };
    for bits in [Bits::Eight, Bits::Four] {
        for (vocab, hidden) in [(19, 300), (33, 64), (16, 257)] {
            let mut rng = Rng(hidden as u32);
            let table: Vec<f32> = (0..vocab * hidden).map(|_| rng.signed()).collect();
            let mut packed = IntWeights::new(bits, vocab, hidden);
            table.chunks(hidden).enumerate().for_each(|(i, row)| packed.set_row(i, row));
            // By number, by slot, and one that does not exist; a row more than there are.
            let (last_tokens, token_ids) =
                ([7, 18 % vocab as i32], [0, -2, vocab as i32 - 1, -1, vocab as i32, 3]);
            let (ids, num_rows) = ([0, last_tokens[1], vocab as i32 - 1, 7, vocab as i32], 5i32);
            let mut out = vec![f32::INFINITY; 6 * hidden];
            let params = IntEmbedParams {
                weight: packed.weights.as_ptr() as u64,
                steps: packed.steps.as_ptr() as u64,
                w_scales: packed.scales.as_ptr() as u64,
                token_ids: token_ids.as_ptr() as u64,
                last_tokens: last_tokens.as_ptr() as u64,
                out: out.as_mut_ptr() as u64,
                num_rows: &raw const num_rows as u64,
                hidden: hidden as i32,
                groups: packed.groups() as i32,
                vocab: vocab as i32,
                scale: 0.7,
            };
            let name = if bits == Bits::Eight { "quire_embed_int8" } else { "quire_embed_int4" };
            kernels.launch(name, [6, 1, 1], [256, 1, 1], 0, &params, 1);
            for (id, out) in ids.iter().zip(out.chunks(hidden)) {
                let Some(row) = table.chunks(hidden).nth(*id as usize) else {
                    assert!(out.iter().all(|x| x.is_nan()), "{bits:?}: id {id}");
                    continue;
                };
                let want: Vec<_> = dequantized(bits, row).iter().map(|x| 0.7 * x).collect();
                assert_eq!(out, want, "{bits:?} [{vocab}, {hidden}], row {id}");
            }
            assert!(out[5 * hidden..].iter().all(|&x| x == f32::INFINITY), "{bits:?}: rows beyond the last");
        }
    }
}

/// A row as the codec defines it.
fn dequantized(bits: Bits, row: &[f32]) -> Vec<f32> {
    match bits {
        Bits::Eight => {
            let mut codes = vec![0; row.len()];
            let scale = quant::quantize_int8(row, &mut codes);
            codes.iter().map(|&q| scale * f32::from(q)).collect()
        }
        Bits::Four => {
            let (mut codes, mut groups) =
                (vec![0; row.len()], vec![0; row.len().div_ceil(quant::INT4_GROUP)]);
            let scale = quant::quantize_int4(row, &mut codes, &mut groups);
            let value = |(i, &q): (usize, &u8)| quant::int4_value(groups[i / quant::INT4_GROUP], q) as f32;
            codes.iter().enumerate().map(value).map(|value| scale * value).collect()
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Fp8QuantizeParams {
    x: *const u16,
    q: *mut u8,
    scales: *mut f32,
    num_rows: *const i32,
    in_features: i32,
    x_stride: i32,
    q_stride: i32,
    reserved: i32,
}

#[test]
fn quantized_products_in_fp8_begin_with_the_codes_of_the_reference() {
    let Some(kernels) = HostKernels::load() else { return };
    for (k, rows) in [(1usize, 3usize), (16, 2), (50, 5), (264, 4), (2309, 2)] {
        let (stride, num_rows) = (k.next_multiple_of(16), rows as i32);
        let mut rng = Rng(k as u32);
        let magnitudes = [1.0, 300.0, 0.0, 1e-31, 1e-3];
        let random: Vec<f32> = (0..k * rows).map(|i| magnitudes[i / k % 5] * rng.signed()).collect();
        for is_f16 in [false, true] {
            let bits =
                |x: &f32| if is_f16 { f16::from_f32(*x).to_bits() } else { bf16::from_f32(*x).to_bits() };
            let value =
                |x: &u16| if is_f16 { f16::from_bits(*x).to_f32() } else { bf16::from_bits(*x).to_f32() };
            let x: Vec<u16> = random.iter().map(bits).collect();
            let (mut q, mut scales) = (vec![0xFF; (rows + 1) * stride], vec![f32::NAN; rows + 1]);
            let params = Fp8QuantizeParams {
                x: x.as_ptr(),
                q: q.as_mut_ptr(),
                scales: scales.as_mut_ptr(),
                num_rows: &raw const num_rows,
                in_features: k as i32,
                x_stride: k as i32,
                q_stride: stride as i32,
                reserved: 0,
            };
            let name = if is_f16 { "quire_quantize_fp8_f16" } else { "quire_quantize_fp8_bf16" };
            kernels.launch(name, [rows as u32 + 1, 1, 1], [256, 1, 1], 0, &params, 2);
            for (row, x) in x.chunks(k).enumerate() {
                let x: Vec<f32> = x.iter().map(value).collect();
                let mut codes = vec![0; stride];
                let scale = quant::quantize_fp8(&x, &mut codes[..k]);
                assert_eq!(scales[row], scale, "{name}, {k} inputs, row {row}");
                // A zero may lose its sign.
                let same = |(have, want): (&u8, &u8)| have == want || (have | want) & 0x7F == 0;
                let have = &q[row * stride..][..stride];
                assert!(
                    have.iter().zip(&codes).all(same),
                    "{name}, {k} inputs, row {row}: {have:x?} {codes:x?}"
                );
            }
            assert!(q[rows * stride..].iter().all(|&code| code == 0xFF), "rows beyond the last");
        }
    }
}

#[test]
fn sanitizers_find_nothing() {
    under_sanitizers("quantized_products");
}
