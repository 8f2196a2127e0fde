//! Checkpoint bytes to numbers: what every backend does when it loads a tensor.

use half::{bf16, f16};
use quire_core::{DType, TensorView};

use crate::BackendError;

/// Checks that `view` has exactly the bytes its shape and type promise, and a type that holds plain numbers.
///
/// # Errors
/// [`BackendError::Tensor`] naming `name`.
pub fn check_tensor(name: &str, view: &TensorView<'_>) -> Result<(), BackendError> {
    if !matches!(view.dtype, DType::F32 | DType::F16 | DType::BF16) {
        return Err(tensor_error(
            name,
            format!("type {} is not supported, use f32, f16 or bf16", view.dtype),
        ));
    }
    let expected = view.num_elements() * view.dtype.size();
    if view.data.len() != expected {
        let got = view.data.len();
        return Err(tensor_error(
            name,
            format!("shape {:?} of {} needs {expected} bytes, got {got}", view.shape, view.dtype),
        ));
    }
    Ok(())
}

/// The elements of `view`, widened to f32 (exactly: f16 and bf16 are subsets of f32).
///
/// # Errors
/// [`BackendError::Tensor`] for other types or a wrong number of bytes.
pub fn to_f32(name: &str, view: &TensorView<'_>) -> Result<Vec<f32>, BackendError> {
    check_tensor(name, view)?;
    let halves = || view.data.as_chunks::<2>().0.iter().copied();
    Ok(match view.dtype {
        DType::F16 => halves().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
        DType::BF16 => halves().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
        _ => view.data.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
    })
}

/// Rows and columns of a linear weight.
///
/// # Errors
/// [`BackendError::Tensor`] unless the shape has two dimensions.
pub fn matrix_shape(name: &str, view: &TensorView<'_>) -> Result<(usize, usize), BackendError> {
    match view.shape {
        &[rows, cols] => Ok((rows, cols)),
        other => Err(tensor_error(name, format!("a linear weight is [out, in], got shape {other:?}"))),
    }
}

/// The nearest number of a type that holds plain numbers, ties to even.
pub fn round_to(dtype: DType, value: f32) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(value).to_f32(),
        DType::BF16 => bf16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// [`BackendError::Tensor`] with less typing.
pub fn tensor_error(name: &str, message: impl Into<String>) -> BackendError {
    BackendError::Tensor { name: name.to_owned(), message: message.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widens_every_type_from_unaligned_bytes() {
        let values = [1.0f32, -2.5, 0.0, 65504.0];
        let mut bytes = vec![0u8];
        bytes.extend(values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()));
        let view = TensorView { dtype: DType::F16, shape: &[4], data: &bytes[1..] };
        assert_eq!(to_f32("w", &view).unwrap(), values);

        let mut bytes = vec![0u8];
        bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        let view = TensorView { dtype: DType::F32, shape: &[2, 2], data: &bytes[1..] };
        assert_eq!(to_f32("w", &view).unwrap(), values);
    }

    #[test]
    fn refuses_wrong_sizes_and_types() {
        let view = TensorView { dtype: DType::BF16, shape: &[3], data: &[0; 4] };
        let message = to_f32("layer.w", &view).unwrap_err().to_string();
        assert!(message.contains("layer.w") && message.contains("needs 6 bytes, got 4"), "{message}");
        let view = TensorView { dtype: DType::I8, shape: &[4], data: &[0; 4] };
        assert!(to_f32("w", &view).unwrap_err().to_string().contains("int8"));
    }
}
