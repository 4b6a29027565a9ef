//! Boolean tensors: one byte an element, 0 or 1.

use burn_backend::ops::BoolTensorOps;
use burn_backend::{
    BoolDType, DType, ExecutionError, FloatDType, IntDType, Scalar, Shape, Slice, TensorData,
    TensorMetadata,
};

use super::{Cuda, dims, from_data, into_data, slice_assign};
use crate::device::{CudaDevice, Gpu};
use crate::elementwise::{binary, cast, concatenate, full, mask_fill, mask_where, unary, unary_to};
use crate::error::OrPanic;
use crate::index::{Scatter, gather, scatter, select, select_add};
use crate::reduce::{Reduction, reduce, reduce_all};
use crate::tensor::CudaTensor;

/// A boolean scalar as the number the kernels store.
fn flag(value: Scalar) -> Scalar {
    Scalar::Int(value.elem::<bool>().into())
}

/// Minima of bytes as booleans. The minimum of no elements is the largest number, which is as true as 1 but not stored so.
fn all_true(minima: CudaTensor, dtype: DType) -> CudaTensor {
    cast(minima, dtype)
}

impl BoolTensorOps<Cuda> for Cuda {
    fn bool_empty(shape: Shape, device: &CudaDevice, dtype: BoolDType) -> CudaTensor {
        CudaTensor::empty(
            Gpu::get(device.ordinal).or_panic(),
            dims(&shape),
            dtype.into(),
        )
    }

    fn bool_zeros(shape: Shape, device: &CudaDevice, dtype: BoolDType) -> CudaTensor {
        CudaTensor::zeros(
            Gpu::get(device.ordinal).or_panic(),
            dims(&shape),
            dtype.into(),
        )
    }

    fn bool_ones(shape: Shape, device: &CudaDevice, dtype: BoolDType) -> CudaTensor {
        full(
            Gpu::get(device.ordinal).or_panic(),
            dims(&shape),
            1.into(),
            dtype.into(),
        )
    }

    async fn bool_into_data(tensor: CudaTensor) -> Result<TensorData, ExecutionError> {
        into_data(tensor)
    }

    fn bool_from_data(data: TensorData, device: &CudaDevice) -> CudaTensor {
        from_data(data, device)
    }

    fn bool_into_int(tensor: CudaTensor, out_dtype: IntDType) -> CudaTensor {
        cast(tensor, out_dtype.into())
    }

    fn bool_into_float(tensor: CudaTensor, out_dtype: FloatDType) -> CudaTensor {
        cast(tensor, out_dtype.into())
    }

    fn bool_device(tensor: &CudaTensor) -> CudaDevice {
        tensor.device()
    }

    fn bool_to_device(tensor: CudaTensor, device: &CudaDevice) -> CudaTensor {
        tensor.on_device(*device)
    }

    fn bool_reshape(tensor: CudaTensor, shape: Shape) -> CudaTensor {
        tensor.reshape(dims(&shape))
    }

    fn bool_slice(tensor: CudaTensor, slices: &[Slice]) -> CudaTensor {
        tensor.slice(slices)
    }

    fn bool_slice_assign(tensor: CudaTensor, slices: &[Slice], value: CudaTensor) -> CudaTensor {
        slice_assign(tensor, slices, value)
    }

    fn bool_mask_where(tensor: CudaTensor, mask: CudaTensor, value: CudaTensor) -> CudaTensor {
        mask_where(tensor, mask, value)
    }

    fn bool_mask_fill(tensor: CudaTensor, mask: CudaTensor, value: Scalar) -> CudaTensor {
        mask_fill(tensor, mask, flag(value))
    }

    fn bool_gather(dim: usize, tensor: CudaTensor, indices: CudaTensor) -> CudaTensor {
        gather(dim, tensor, indices)
    }

    fn bool_scatter_or(
        dim: usize,
        tensor: CudaTensor,
        indices: CudaTensor,
        value: CudaTensor,
    ) -> CudaTensor {
        scatter(Scatter::Or, dim, tensor, indices, value)
    }

    fn bool_select(tensor: CudaTensor, dim: usize, indices: CudaTensor) -> CudaTensor {
        select(tensor, dim, indices)
    }

    fn bool_select_or(
        tensor: CudaTensor,
        dim: usize,
        indices: CudaTensor,
        value: CudaTensor,
    ) -> CudaTensor {
        select_add(Scatter::Or, dim, tensor, indices, value)
    }

    fn bool_cat(tensors: Vec<CudaTensor>, dim: usize) -> CudaTensor {
        concatenate(&tensors, dim)
    }

    fn bool_equal(lhs: CudaTensor, rhs: CudaTensor) -> CudaTensor {
        binary("EqualTensor", lhs, rhs, None)
    }

    fn bool_not_equal(lhs: CudaTensor, rhs: CudaTensor) -> CudaTensor {
        binary("NotEqualTensor", lhs, rhs, None)
    }

    fn bool_equal_elem(lhs: CudaTensor, rhs: Scalar) -> CudaTensor {
        unary_to("EqualScalar", lhs, [flag(rhs); 2], None)
    }

    fn bool_not_equal_elem(lhs: CudaTensor, rhs: Scalar) -> CudaTensor {
        unary_to("NotEqualScalar", lhs, [flag(rhs); 2], None)
    }

    fn bool_not(tensor: CudaTensor) -> CudaTensor {
        unary("BoolNot", tensor)
    }

    fn bool_and(lhs: CudaTensor, rhs: CudaTensor) -> CudaTensor {
        binary("AndTensor", lhs, rhs, None)
    }

    fn bool_or(lhs: CudaTensor, rhs: CudaTensor) -> CudaTensor {
        binary("OrTensor", lhs, rhs, None)
    }

    fn bool_xor(lhs: CudaTensor, rhs: CudaTensor) -> CudaTensor {
        binary("XorTensor", lhs, rhs, None)
    }

    fn bool_swap_dims(tensor: CudaTensor, dim1: usize, dim2: usize) -> CudaTensor {
        tensor.swap_dims(dim1, dim2)
    }

    fn bool_permute(tensor: CudaTensor, axes: &[usize]) -> CudaTensor {
        tensor.permute(axes)
    }

    fn bool_flip(tensor: CudaTensor, axes: &[usize]) -> CudaTensor {
        tensor.flip(axes)
    }

    fn bool_any(tensor: CudaTensor) -> CudaTensor {
        let dtype = tensor.dtype();
        reduce_all(Reduction::Maximum, tensor, dtype)
    }

    fn bool_any_dim(tensor: CudaTensor, dim: usize) -> CudaTensor {
        reduce(Reduction::Maximum, &tensor, dim, tensor.dtype())
    }

    fn bool_all(tensor: CudaTensor) -> CudaTensor {
        let dtype = tensor.dtype();
        all_true(reduce_all(Reduction::Minimum, tensor, DType::U8), dtype)
    }

    fn bool_all_dim(tensor: CudaTensor, dim: usize) -> CudaTensor {
        all_true(
            reduce(Reduction::Minimum, &tensor, dim, DType::U8),
            tensor.dtype(),
        )
    }

    fn bool_expand(tensor: CudaTensor, shape: Shape) -> CudaTensor {
        tensor.expand(dims(&shape))
    }

    fn bool_unfold(tensor: CudaTensor, dim: usize, size: usize, step: usize) -> CudaTensor {
        tensor.unfold(dim, size, step)
    }
}
