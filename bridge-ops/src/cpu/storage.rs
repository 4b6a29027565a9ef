//! Slices of Flex tensors.

use burn_backend::{DType, bf16, f16};
use burn_flex::FlexTensor;

/// The values of a weight, in the format it is stored in.
#[derive(Clone, Copy)]
pub(crate) enum Weight<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

impl<'a> Weight<'a> {
    /// `None` if the tensor is not contiguous or of another dtype.
    pub(crate) fn of(tensor: &'a FlexTensor) -> Option<Self> {
        match tensor.dtype() {
            DType::F32 => tensor.as_slice().map(Self::F32),
            DType::BF16 => tensor.as_slice().map(Self::Bf16),
            DType::F16 => tensor.as_slice().map(Self::F16),
            _ => None,
        }
    }
}

/// Evaluates an expression with `$slice` bound to the typed slice of a [`Weight`].
macro_rules! with_weight {
    ($weight:expr, $slice:ident => $body:expr) => {
        match $weight {
            crate::cpu::storage::Weight::F32($slice) => $body,
            crate::cpu::storage::Weight::Bf16($slice) => $body,
            crate::cpu::storage::Weight::F16($slice) => $body,
        }
    };
}
pub(crate) use with_weight;

/// An fp32 tensor with contiguous elements, copied if they are not. `None` for other dtypes.
pub(crate) fn contiguous_f32(tensor: &FlexTensor) -> Option<FlexTensor> {
    match tensor.dtype() {
        DType::F32 if tensor.is_contiguous() => Some(tensor.clone()),
        DType::F32 => Some(tensor.to_contiguous()),
        _ => None,
    }
}

/// [`contiguous_f32`] of a tensor that is given up, so that its buffer can be reused if nobody else has it. `Err` gives
/// tensors of other dtypes back.
pub(crate) fn owned_f32(tensor: FlexTensor) -> Result<FlexTensor, FlexTensor> {
    match tensor.dtype() {
        DType::F32 if tensor.is_contiguous() => Ok(tensor),
        DType::F32 => Ok(tensor.to_contiguous()),
        _ => Err(tensor),
    }
}

/// The elements of a tensor that [`contiguous_f32`] returned.
pub(crate) fn values(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice().expect("a contiguous fp32 tensor")
}

/// The elements, writable, if the tensor is fp32, contiguous, and holds the only handle to its buffer.
pub(crate) fn unique_values(tensor: &mut FlexTensor) -> Option<&mut [f32]> {
    if tensor.dtype() != DType::F32 {
        return None;
    }
    let (start, end) = tensor.layout().contiguous_offsets()?;
    tensor
        .try_storage_mut::<f32>()
        .map(|storage| &mut storage[start..end])
}
