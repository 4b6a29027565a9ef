//! A model's weights as bytes, for checkpoints and exports.

use bridge_core::dtype::{DType, encode_f32};
use bridge_ops::{Float, Ops, Param, to_f32_vec};

use crate::segmented::SegmentedModel;

/// One weight, as it would be stored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WeightBytes<'a> {
    /// Canonical name.
    pub name: &'a str,
    /// Shape.
    pub shape: &'a [usize],
    /// Element type of `bytes`.
    pub dtype: DType,
    /// The elements in row-major order, little-endian.
    pub bytes: &'a [u8],
}

/// Hands every weight of `model` to `write`, one at a time, in the order of [`SegmentedModel::params`].
///
/// Elements are written as they are held, or cast to `dtype`, which must be a float of 16 bits or more.
///
/// # Errors
/// The first error of `write`.
///
/// # Panics
/// If `dtype` is no such float.
pub fn export_weights<B: Ops, E>(
    model: &dyn SegmentedModel<B>,
    dtype: Option<DType>,
    mut write: impl FnMut(WeightBytes<'_>) -> Result<(), E>,
) -> Result<(), E> {
    for param in model.params() {
        let dtype = dtype.unwrap_or_else(|| stored_dtype(&param));
        let (shape, bytes) = (param.shape(), param_bytes(&param, dtype));
        write(WeightBytes {
            name: param.name(),
            shape: &shape,
            dtype,
            bytes: &bytes,
        })?;
    }
    Ok(())
}

/// The dtype that a weight is held in, in the words of checkpoints.
pub fn stored_dtype<B: Ops>(param: &Param<B>) -> DType {
    match param.dtype() {
        bridge_ops::DType::BF16 => DType::BF16,
        bridge_ops::DType::F16 => DType::F16,
        bridge_ops::DType::F64 => DType::F64,
        // Any other float is a compute format of a backend; f32 holds all of them exactly.
        _ => DType::F32,
    }
}

/// The elements of a weight as `dtype`, in row-major order, little-endian.
///
/// # Panics
/// If `dtype` is not a float of 16 bits or more.
pub fn param_bytes<B: Ops>(param: &Param<B>, dtype: DType) -> Vec<u8> {
    value_bytes::<B>(param.value(), dtype)
}

/// The elements of a weight, or of a part of one, as bytes of `dtype`.
///
/// # Panics
/// As [`param_bytes`].
pub fn value_bytes<B: Ops>(value: Float<B>, dtype: DType) -> Vec<u8> {
    let values = to_f32_vec::<B>(value);
    let size = dtype
        .byte_len(&[values.len()])
        .and_then(|size| usize::try_from(size).ok());
    let mut bytes =
        vec![0; size.unwrap_or_else(|| panic!("weights cannot be written as {}", dtype.as_str()))];
    encode_f32(&values, dtype, &mut bytes)
        .unwrap_or_else(|error| panic!("weights cannot be written: {error}"));
    bytes
}
