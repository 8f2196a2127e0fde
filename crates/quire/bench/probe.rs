//! What the machine can do at most: bandwidth of memory, and rates of arithmetic.

use quire_core::QuantFormat;
use quire_cpu::{Peaks, Precision};

use super::timed::Op;
use crate::{Failure, Result, doctor};

/// The best of several measurements counts: whoever shares the machine can only slow it.
const READ_TRIES: usize = 2;

/// The limits that operations are held against.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Bytes per second, read by all threads together.
    pub(crate) read_bytes_s: f64,
    /// Operations per second of all threads together.
    pub(crate) peaks: Peaks,
}

impl Limits {
    /// Measures this machine with as many threads as the engine has. Takes about two seconds.
    pub(crate) fn measure(threads: u32) -> Result<Self> {
        let read_bytes_s = (0..READ_TRIES).map(|_| doctor::read_bandwidth(threads)).fold(0.0, f64::max);
        let peaks = Peaks::measure(threads as usize)
            .map_err(|error| Failure(format!("cannot measure the processor: {error}")))?;
        Ok(Self { read_bytes_s, peaks })
    }

    /// Operations per second of the arithmetic that an operation uses.
    pub(crate) fn peak(&self, op: Op, form: Form) -> f64 {
        let products = if form.precision == Precision::Bf16 { self.peaks.bf16 } else { self.peaks.f32 };
        let is_layer = matches!(op, Op::Qkv | Op::O | Op::Mlp | Op::LmHead);
        if is_layer && form.quant != QuantFormat::None { self.peaks.int8 } else { products }
    }
}

/// How a model is computed with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Form {
    pub(crate) precision: Precision,
    pub(crate) quant: QuantFormat,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_operation_has_the_limit_of_its_arithmetic() {
        let peaks = Peaks { f32: 1.0, bf16: 2.0, int8: 4.0 };
        let limits = Limits { read_bytes_s: 1.0, peaks };
        let form = |precision, quant| Form { precision, quant };
        let plain = form(Precision::F32, QuantFormat::None);
        assert_eq!([Op::Mlp, Op::Attention].map(|op| limits.peak(op, plain)), [1.0, 1.0]);
        let bf16 = form(Precision::Bf16, QuantFormat::None);
        assert_eq!([Op::Mlp, Op::Attention].map(|op| limits.peak(op, bf16)), [2.0, 2.0]);
        let int4 = form(Precision::Bf16, QuantFormat::Int4);
        assert_eq!([Op::LmHead, Op::Attention].map(|op| limits.peak(op, int4)), [4.0, 2.0]);
    }
}
