use half::f16;

use super::*;
use crate::conformance::Rng;

/// Roughly Gaussian: sums of twelve uniform numbers.
fn gaussian(rng: &mut Rng, len: usize, sigma: f32) -> Vec<f32> {
    let one = |rng: &mut Rng| (0..12).map(|_| 0.5 * rng.signed()).sum::<f32>() * sigma;
    (0..len).map(|_| one(rng)).collect()
}

fn int8(row: &[f32]) -> (Vec<i8>, Vec<f32>) {
    let mut q = vec![99; row.len()];
    let scale = quantize_int8(row, &mut q);
    let back = q.iter().map(|&q| scale * f32::from(q)).collect();
    (q, back)
}

/// Checks what every row must keep, and returns the weights that the codes stand for.
fn int4(row: &[f32]) -> Vec<f32> {
    let (mut q, mut groups) = (vec![99; row.len()], vec![99; row.len().div_ceil(INT4_GROUP)]);
    let scale = quantize_int4(row, &mut q, &mut groups);
    assert!(scale.is_finite() && scale >= 0.0, "{scale}");
    let value = |i: usize| {
        assert!(q[i] <= 15);
        let value = int4_value(groups[i / INT4_GROUP], q[i]);
        assert!(value.abs() <= 127, "{value} of group {:#x}, code {}", groups[i / INT4_GROUP], q[i]);
        scale * value as f32
    };
    (0..row.len()).map(value).collect()
}

/// Blocks of 32 with one f16 scale, `max / -8`, where `max` is the weight of the largest magnitude: ggml's Q4_0.
fn q4_0(row: &[f32]) -> Vec<f32> {
    let block = |block: &[f32]| {
        let max = block.iter().fold(0.0f32, |max, &w| if w.abs() > max.abs() { w } else { max });
        let step = max / -8.0;
        let stored = f16::from_f32(step).to_f32();
        block.iter().map(move |w| stored * ((w / step + 8.5).floor().min(15.0) - 8.0)).collect::<Vec<_>>()
    };
    row.chunks(32).flat_map(block).collect()
}

fn squared_error(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

#[test]
fn int8_is_within_half_a_step() {
    let mut rng = Rng::new(1);
    for len in [1, 7, 32, 100, 1000] {
        let row = gaussian(&mut rng, len, 0.3);
        let (q, back) = int8(&row);
        let max = row.iter().fold(0.0f32, |max, w| max.max(w.abs()));
        assert!(q.iter().any(|q| q.abs() == 127) && q.iter().all(|&q| q >= -127));
        for (w, b) in row.iter().zip(&back) {
            assert!((w - b).abs() <= max / 127.0 * 0.501, "{w} became {b}");
        }
    }
}

#[test]
fn ties_go_to_the_even_code() {
    // 127 makes the step 1.
    let row = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5];
    assert_eq!(int8(&row).0, [127, 0, 2, 2, 0, -2, -2, 126]);
}

#[test]
fn activations_have_a_scale_per_group() {
    let mut x = vec![0.5; ACT_GROUP];
    x.extend([-127.0, 63.4, 1.0]);
    let (mut q, mut scales) = (vec![0; x.len()], vec![0.0; 2]);
    quantize_activations(&x, &mut q, &mut scales);
    assert!(q[..ACT_GROUP].iter().all(|&q| q == 127));
    assert_eq!(q[ACT_GROUP..], [-127, 63, 1]);
    assert_eq!(scales, [0.5 / 127.0, 1.0]);
}

#[test]
fn activations_that_are_not_finite_stay_visible() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let (mut q, mut scales) = (vec![0; 3], vec![0.0]);
        quantize_activations(&[1.0, bad, 2.0], &mut q, &mut scales);
        assert!(!scales[0].is_finite(), "{bad} became scale {}", scales[0]);
    }
}

#[test]
fn zeros_and_empty_rows_stay() {
    for len in [0, 1, 33, 64] {
        assert_eq!(int8(&vec![0.0; len]).1, vec![0.0; len]);
        assert_eq!(int4(&vec![-0.0; len]), vec![0.0; len]);
    }
    // One group of zeros, one of weights.
    let mut row = vec![0.0; 64];
    row[40] = 1.0;
    assert_eq!(int4(&row)[..32], row[..32]);
}

#[test]
fn int4_keeps_weights_that_lie_on_its_grid() {
    let row: Vec<f32> =
        (0..96u8).map(|i| (f32::from(i % 16) - 8.0) * [0.1, 0.2, 0.3][usize::from(i / 32)]).collect();
    let error = squared_error(&row, &int4(&row)).sqrt();
    assert!(error < 1e-5, "{error}");
}

#[test]
fn int4_holds_extremes() {
    let mut rng = Rng::new(2);
    for len in [1, 2, 31, 32, 33, 70, 300] {
        for magnitude in [1e38, 1e30, 1.0, 1e-30, 1e-36, f32::MIN_POSITIVE, 1e-45] {
            let row: Vec<_> = (0..len).map(|_| rng.signed() * magnitude).collect();
            for row in
                [row.clone(), row.iter().map(|w| w.abs()).collect(), row.iter().map(|w| -w.abs()).collect()]
            {
                let back = int4(&row);
                let error = row.iter().zip(&back).fold(0.0f32, |max, (w, b)| max.max((w - b).abs()));
                assert!(
                    error <= 0.15 * magnitude + TINY,
                    "{len} weights up to {magnitude:e}: error {error:e}"
                );
                int8(&row);
            }
        }
    }
}

/// Denormals, infinities, NaN and all between, in rows of any length.
#[test]
fn any_bits_are_survived() {
    let mut rng = Rng::new(5);
    for round in 0..3000 {
        let len = rng.below(100) as usize;
        let mut row: Vec<_> = (0..len).map(|_| f32::from_bits(rng.next_u32())).collect();
        if round % 2 == 0 {
            // All of one magnitude, or a little less.
            let exponent = rng.below(255) << 23;
            row.iter_mut().for_each(|w| *w = f32::from_bits(w.to_bits() & 0x807F_FFFF | exponent));
        }
        let (mut q, mut scales) = (vec![0; len], vec![0.0; len.div_ceil(ACT_GROUP)]);
        quantize_activations(&row, &mut q, &mut scales);
        let (_, back) = int8(&row);
        if row.iter().all(|w| w.is_finite()) {
            assert!(scales.iter().all(|scale| scale.is_finite() && *scale >= 0.0), "{row:?}");
            assert!(back.iter().all(|w| w.is_finite()), "{row:?}");
            assert!(check_finite("w", 0, &row).is_ok());
        } else {
            assert!(check_finite("w", 0, &row).is_err());
        }
        int4(&row);
    }
}

#[test]
fn int4_holds_an_outlier_beside_small_weights() {
    let mut row = gaussian(&mut Rng::new(3), 256, 0.01);
    row[77] = 1.0;
    let back = int4(&row);
    assert!((back[77] - 1.0).abs() < 0.1, "{}", back[77]);
    // Other groups keep their own step.
    let error = squared_error(&row[128..], &back[128..]) / 128.0;
    assert!(error.sqrt() < 0.004, "{}", error.sqrt());
}

#[test]
fn int4_is_better_than_a_scale_per_block() {
    let mut rng = Rng::new(4);
    for len in [64, 172, 1024, 3072] {
        let (mut ours, mut theirs, mut power) = (0.0, 0.0, 0.0);
        for _ in 0..40 {
            let row = gaussian(&mut rng, len, 0.02);
            ours += squared_error(&row, &int4(&row));
            theirs += squared_error(&row, &q4_0(&row));
            power += row.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>();
        }
        println!(
            "{len:5} inputs: relative error {:.5}, of Q4_0 {:.5}, ratio {:.3}",
            (ours / power).sqrt(),
            (theirs / power).sqrt(),
            ours / theirs
        );
        assert!(ours < 0.9 * theirs, "{len} inputs: {ours} is not well below {theirs}");
    }
}

#[test]
fn weights_that_are_not_finite_are_refused_by_place() {
    assert_eq!(check_finite("w", 0, &[0.0, -f32::MAX]), Ok(()));
    let message =
        check_finite("layers.0.qkv", 5, &[1.0, f32::NEG_INFINITY, f32::NAN]).unwrap_err().to_string();
    assert!(message.contains("layers.0.qkv") && message.contains("row 5, column 1 is -inf"), "{message}");
}

#[test]
fn a_row_takes_its_codes_and_a_scale() {
    let bytes = |quant| row_bytes(DType::BF16, quant, 1000);
    assert_eq!(bytes(QuantFormat::None), 2000);
    assert_eq!(bytes(QuantFormat::Int8), 1000 + 4);
    // 4.25 bits a weight, for 1000 weights as for 1024.
    assert_eq!(bytes(QuantFormat::Int4), 1024 * 17 / 32 + 4);
}
