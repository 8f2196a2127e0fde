//! Descriptions of matrices for the tensor memory accelerator of Hopper and later.

use std::ffi::c_void;

use cudarc::driver::sys;

use super::{CudaError, check};

/// A row-major matrix of 16-bit numbers that is copied to shared memory in boxes, their rows swizzled by 128 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BoxedMatrix {
    /// Device address of the first number: a multiple of 16.
    pub address: u64,
    /// Rows; a box that lies beyond them is filled with zeros.
    pub rows: u64,
    /// Numbers of a row; their bytes are a multiple of 16.
    pub cols: u64,
    /// Rows of a box: 1 to 256.
    pub box_rows: u32,
    /// Numbers of a box's row: at most 64, which are 128 bytes.
    pub box_cols: u32,
    /// bfloat16, or else half precision: decides only what filling means.
    pub is_bf16: bool,
}

/// The 128 bytes that a kernel takes.
pub type TensorMap = [u64; 16];

impl BoxedMatrix {
    /// Has the driver write the description.
    ///
    /// # Errors
    /// A number breaks the rules above, or the driver failed.
    pub fn encode(&self) -> Result<TensorMap, CudaError> {
        self.validate()?;
        use sys::{
            CUtensorMapDataType_enum as Type, CUtensorMapFloatOOBfill_enum as Fill,
            CUtensorMapInterleave_enum as Interleave, CUtensorMapL2promotion_enum as L2,
            CUtensorMapSwizzle_enum as Swizzle,
        };
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let element = if self.is_bf16 {
            Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
        } else {
            Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16
        };
        // Dimensions from the innermost on; of the innermost no stride is given.
        let (dims, strides) = ([self.cols, self.rows], [self.cols * 2]);
        let (boxes, steps) = ([self.box_cols, self.box_rows], [1, 1]);
        // SAFETY: all arrays have the length that two dimensions ask for; the driver keeps none of them.
        let status = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                element,
                2,
                self.address as *mut c_void,
                dims.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                L2::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                Fill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check("cuTensorMapEncodeTiled", status)?;
        Ok(map.opaque)
    }

    /// The rules of the driver's manual, so that an error names what breaks them.
    fn validate(&self) -> Result<(), CudaError> {
        let broken = [
            (!self.address.is_multiple_of(16), "the address is no multiple of 16"),
            (self.rows == 0 || self.rows > 1 << 32, "rows must be 1 to 2^32"),
            (self.cols == 0 || !(self.cols * 2).is_multiple_of(16), "a row's bytes must be a multiple of 16"),
            (self.box_rows == 0 || self.box_rows > 256, "a box has 1 to 256 rows"),
            (!matches!(self.box_cols, 8 | 16 | 32 | 64), "a box has 8, 16, 32 or 64 columns"),
        ];
        match broken.iter().find(|(is_broken, _)| *is_broken) {
            Some((_, rule)) => Err(CudaError::new("cuTensorMapEncodeTiled", format!("{self:?}: {rule}"))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_driver_would_refuse_is_named() {
        let good =
            BoxedMatrix { address: 256, rows: 64, cols: 128, box_rows: 16, box_cols: 64, is_bf16: true };
        assert_eq!(good.validate(), Ok(()));
        for (bad, word) in [
            (BoxedMatrix { address: 8, ..good }, "address"),
            (BoxedMatrix { rows: 0, ..good }, "rows"),
            (BoxedMatrix { cols: 12, ..good }, "bytes"),
            (BoxedMatrix { box_rows: 257, ..good }, "256 rows"),
            (BoxedMatrix { box_cols: 128, ..good }, "columns"),
        ] {
            let error = bad.encode().unwrap_err().to_string();
            assert!(error.contains(word) && error.contains("BoxedMatrix"), "{error}");
        }
    }
}
