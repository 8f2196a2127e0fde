//! FP8 E4M3 (OCP 8-bit Floating Point Specification, revision 1.0): its numbers, and vectors of them with one scale.
//!
//! Four exponent bits with bias 7 and three mantissa bits; no infinities; the largest number is 448, and all ones is NaN.

/// The largest number.
pub const MAX: f32 = 448.0;
/// The code of [`MAX`].
const MAX_CODE: u8 = 0x7E;
const NAN_CODE: u8 = 0x7F;
/// The exponent of the smallest normal number; subnormal ones are multiples of 2^-9.
const MIN_EXPONENT: i32 = -6;

/// The nearest number's code, ties to even; what is larger than [`MAX`] becomes it.
pub fn from_f32(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    let magnitude = x.abs();
    if magnitude.is_nan() {
        return sign | NAN_CODE;
    }
    if magnitude >= MAX {
        return sign | MAX_CODE;
    }
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(MIN_EXPONENT);
    let ulp = f32::from_bits(((exponent - 3 + 127) as u32) << 23);
    let ulps = (magnitude / ulp).round_ties_even() as i32;
    // Codes count the numbers from zero on: eight to a power of two, which a number of eight units begins.
    sign | ((exponent - MIN_EXPONENT) * 8 + ulps) as u8
}

/// The number of a code.
pub fn to_f32(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (code & 0x7F, exponent) {
        (NAN_CODE, _) => f32::NAN,
        (_, 0) => mantissa * 2f32.powi(MIN_EXPONENT - 3),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The power of two that brings `largest` to at most [`MAX`]: the scale of a cached key or value. A power, so that dividing
/// by it and multiplying with it are exact. Kept far from the ends of the range, where it or its inverse is denormal.
pub fn power_of_two_scale(largest: f32) -> f32 {
    let bits = (largest * (1.0 / MAX)).to_bits();
    let exponent = (bits >> 23) + u32::from(bits & 0x7F_FFFF != 0);
    let exponent = match exponent {
        0..27 => 127,
        27..=227 => exponent,
        _ => 227,
    };
    f32::from_bits(exponent << 23)
}

/// Replaces a vector by what is left of it in the cache: codes with one [`power_of_two_scale`].
pub fn round_vector(x: &mut [f32]) {
    let scale = power_of_two_scale(x.iter().fold(0.0, |largest, x| x.abs().max(largest)));
    x.iter_mut().for_each(|x| *x = to_f32(from_f32(*x / scale)) * scale);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of all codes; between two equally near ones, the even one.
    fn nearest(x: f32) -> u8 {
        let distance = |code: u8| (f64::from(to_f32(code)) - f64::from(x.abs())).abs();
        let best =
            (0..=MAX_CODE).min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1))));
        best.unwrap() | if x.is_sign_negative() { 0x80 } else { 0 }
    }

    #[test]
    fn numbers_are_those_of_the_specification() {
        // Table 2 of the specification, and ordinary numbers.
        let known = [
            (0x7E, 448.0),
            (0x08, 2f32.powi(-6)),
            (0x07, 0.875 * 2f32.powi(-6)),
            (0x01, 2f32.powi(-9)),
            (0x38, 1.0),
            (0x39, 1.125),
            (0xC0, -2.0),
        ];
        for (code, value) in known {
            assert_eq!(to_f32(code), value, "{code:x}");
        }
        assert!(to_f32(0x7F).is_nan() && to_f32(0xFF).is_nan());
    }

    #[test]
    fn rounds_to_the_nearest_number() {
        for code in 0..MAX_CODE {
            let (low, high) = (to_f32(code), to_f32(code + 1));
            for x in [low, high, (low + high) / 2.0, low * 0.7 + high * 0.3, low * 0.3 + high * 0.7] {
                assert_eq!(from_f32(x), nearest(x), "{x}");
                assert_eq!(from_f32(-x), nearest(-x), "{x}");
            }
        }
        for x in [449.0, 1e30, f32::INFINITY] {
            assert_eq!((from_f32(x), from_f32(-x)), (MAX_CODE, 0x80 | MAX_CODE));
        }
        assert_eq!(from_f32(f32::NAN) & 0x7F, NAN_CODE);
    }

    #[test]
    fn scales_fit_the_largest_and_not_more() {
        for largest in [1e-20, 0.1, 1.0, 447.9, 448.0, 448.1, 3e10] {
            let scale = power_of_two_scale(largest);
            assert!(largest / scale <= MAX && largest / scale > MAX / 2.0 - 1.0, "{largest}: {scale}");
        }
        assert_eq!(power_of_two_scale(0.0), 1.0);
        let mut x = [1.0, -3.0, 0.01, 0.0];
        round_vector(&mut x);
        for (got, want) in x.iter().zip([1.0, -3.0, 0.01, 0.0]) {
            assert!((got - want).abs() <= want.abs() / 16.0);
        }
    }
}
