//! Integer tensors.

use std::ops::Range;

use burn_backend::ops::IntTensorOps;
use burn_backend::{
    BoolDType, DType, Distribution, ExecutionError, FloatDType, IntDType, Scalar, Shape, Slice,
    TensorData, TensorMetadata,
};

use super::float::{binary_ops, comparisons};
use super::{Cuda, dims, from_data, into_data, slice_assign};
use crate::device::{CudaDevice, Gpu, Launch, launch};
use crate::elementwise::{
    binary, blocks, cast, concatenate, full, mask_fill, mask_where, scalar, type_name, unary,
    unary_to,
};
use crate::error::OrPanic;
use crate::index::{Scatter, gather, scatter, select, select_add};
use crate::reduce::{Reduction, arg_reduce, reduce, reduce_all};
use crate::tensor::CudaTensor;
use crate::{matmul, random, scan, sort};

impl IntTensorOps<Cuda> for Cuda {
    fn int_empty(shape: Shape, device: &CudaDevice, dtype: IntDType) -> CudaTensor {
        CudaTensor::empty(
            Gpu::get(device.ordinal).or_panic(),
            dims(&shape),
            dtype.into(),
        )
    }

    fn int_zeros(shape: Shape, device: &CudaDevice, dtype: IntDType) -> CudaTensor {
        CudaTensor::zeros(
            Gpu::get(device.ordinal).or_panic(),
            dims(&shape),
            dtype.into(),
        )
    }

    fn int_ones(shape: Shape, device: &CudaDevice, dtype: IntDType) -> CudaTensor {
        Self::int_full(shape, 1.into(), device, dtype)
    }

    fn int_full(
        shape: Shape,
        fill_value: Scalar,
        device: &CudaDevice,
        dtype: IntDType,
    ) -> CudaTensor {
        full(
            Gpu::get(device.ordinal).or_panic(),
            dims(&shape),
            fill_value,
            dtype.into(),
        )
    }

    fn int_arange_step(
        range: Range<i64>,
        step: usize,
        device: &CudaDevice,
        dtype: IntDType,
    ) -> CudaTensor {
        let gpu = Gpu::get(device.ordinal).or_panic();
        let count = usize::try_from(range.end - range.start)
            .unwrap_or(0)
            .div_ceil(step);
        let out = CudaTensor::empty(gpu, &[count], dtype.into());
        if count > 0 {
            let kernel = gpu
                .kernel("arange", &[("TYPE", type_name(out.dtype()))], "arange")
                .or_panic();
            let shape = Launch::linear(blocks(gpu, count, 4), 256);
            // SAFETY: the kernel writes `count` elements.
            unsafe {
                launch!(gpu, kernel, shape; out.address(), range.start, step as i64, count as i64)
                    .or_panic()
            };
        }
        out
    }

    async fn int_into_data(tensor: CudaTensor) -> Result<TensorData, ExecutionError> {
        into_data(tensor)
    }

    fn int_from_data(data: TensorData, device: &CudaDevice) -> CudaTensor {
        from_data(data, device)
    }

    fn int_device(tensor: &CudaTensor) -> CudaDevice {
        tensor.device()
    }

    fn int_to_device(tensor: CudaTensor, device: &CudaDevice) -> CudaTensor {
        tensor.on_device(*device)
    }

    fn int_reshape(tensor: CudaTensor, shape: Shape) -> CudaTensor {
        tensor.reshape(dims(&shape))
    }

    fn int_slice(tensor: CudaTensor, slices: &[Slice]) -> CudaTensor {
        tensor.slice(slices)
    }

    fn int_slice_assign(tensor: CudaTensor, slices: &[Slice], value: CudaTensor) -> CudaTensor {
        slice_assign(tensor, slices, value)
    }

    fn int_into_float(tensor: CudaTensor, out_dtype: FloatDType) -> CudaTensor {
        cast(tensor, out_dtype.into())
    }

    fn int_mask_where(tensor: CudaTensor, mask: CudaTensor, value: CudaTensor) -> CudaTensor {
        mask_where(tensor, mask, value)
    }

    fn int_mask_fill(tensor: CudaTensor, mask: CudaTensor, value: Scalar) -> CudaTensor {
        mask_fill(tensor, mask, value)
    }

    fn int_gather(dim: usize, tensor: CudaTensor, indices: CudaTensor) -> CudaTensor {
        gather(dim, tensor, indices)
    }

    fn int_scatter_add(
        dim: usize,
        tensor: CudaTensor,
        indices: CudaTensor,
        value: CudaTensor,
    ) -> CudaTensor {
        scatter(Scatter::Add, dim, tensor, indices, value)
    }

    fn int_select(tensor: CudaTensor, dim: usize, indices: CudaTensor) -> CudaTensor {
        select(tensor, dim, indices)
    }

    fn int_select_add(
        tensor: CudaTensor,
        dim: usize,
        indices: CudaTensor,
        value: CudaTensor,
    ) -> CudaTensor {
        select_add(Scatter::Add, dim, tensor, indices, value)
    }

    fn int_cat(tensors: Vec<CudaTensor>, dim: usize) -> CudaTensor {
        concatenate(&tensors, dim)
    }

    binary_ops! {
        int_add, int_add_scalar => "AddTensor", "AddScalar";
        int_sub, int_sub_scalar => "SubTensor", "SubScalar";
        int_mul, int_mul_scalar => "MulTensor", "MulScalar";
        int_div, int_div_scalar => "DivTensor", "DivScalar";
        int_remainder, int_remainder_scalar => "RemTensor", "RemScalar";
        int_powi, int_powi_scalar_impl => "PowTensor", "PowScalar";
        bitwise_and, bitwise_and_scalar => "AndTensor", "AndScalar";
        bitwise_or, bitwise_or_scalar => "OrTensor", "OrScalar";
        bitwise_xor, bitwise_xor_scalar => "XorTensor", "XorScalar";
        bitwise_left_shift, bitwise_left_shift_scalar => "ShlTensor", "ShlScalar";
        bitwise_right_shift, bitwise_right_shift_scalar => "ShrTensor", "ShrScalar";
    }

    comparisons! {
        int_equal, int_equal_elem => "EqualTensor", "EqualScalar";
        int_not_equal, int_not_equal_elem => "NotEqualTensor", "NotEqualScalar";
        int_greater, int_greater_elem => "GreaterTensor", "GreaterScalar";
        int_greater_equal, int_greater_equal_elem => "GreaterEqualTensor", "GreaterEqualScalar";
        int_lower, int_lower_elem => "LowerTensor", "LowerScalar";
        int_lower_equal, int_lower_equal_elem => "LowerEqualTensor", "LowerEqualScalar";
    }

    fn int_clamp_min(tensor: CudaTensor, min: Scalar) -> CudaTensor {
        scalar("ClampMin", tensor, min)
    }

    fn int_clamp_max(tensor: CudaTensor, max: Scalar) -> CudaTensor {
        scalar("ClampMax", tensor, max)
    }

    fn int_clamp(tensor: CudaTensor, min: Scalar, max: Scalar) -> CudaTensor {
        unary_to("Clamp", tensor, [min, max], None)
    }

    fn int_matmul(lhs: CudaTensor, rhs: CudaTensor) -> CudaTensor {
        matmul::matmul(lhs, rhs)
    }

    fn int_neg(tensor: CudaTensor) -> CudaTensor {
        unary("Negate", tensor)
    }

    fn int_abs(tensor: CudaTensor) -> CudaTensor {
        unary("Abs", tensor)
    }

    fn int_sign(tensor: CudaTensor) -> CudaTensor {
        unary("Sign", tensor)
    }

    fn bitwise_not(tensor: CudaTensor) -> CudaTensor {
        unary("BitNot", tensor)
    }

    fn int_sum(tensor: CudaTensor) -> CudaTensor {
        let dtype = tensor.dtype();
        reduce_all(Reduction::Sum, tensor, dtype)
    }

    fn int_sum_dim(tensor: CudaTensor, dim: usize) -> CudaTensor {
        reduce(Reduction::Sum, &tensor, dim, tensor.dtype())
    }

    fn int_prod(tensor: CudaTensor) -> CudaTensor {
        let dtype = tensor.dtype();
        reduce_all(Reduction::Product, tensor, dtype)
    }

    fn int_prod_dim(tensor: CudaTensor, dim: usize) -> CudaTensor {
        reduce(Reduction::Product, &tensor, dim, tensor.dtype())
    }

    fn int_mean(tensor: CudaTensor) -> CudaTensor {
        let (dtype, count) = (tensor.dtype(), tensor.count() as i64);
        scalar(
            "DivScalar",
            reduce_all(Reduction::Sum, tensor, dtype),
            count.into(),
        )
    }

    fn int_mean_dim(tensor: CudaTensor, dim: usize) -> CudaTensor {
        // The sum may not fit the tensor's type, the mean does.
        let count = tensor.dims()[dim] as i64;
        let sum = reduce(Reduction::Sum, &tensor, dim, DType::I64);
        cast(scalar("DivScalar", sum, count.into()), tensor.dtype())
    }

    fn int_max(tensor: CudaTensor) -> CudaTensor {
        let dtype = tensor.dtype();
        reduce_all(Reduction::Maximum, tensor, dtype)
    }

    fn int_max_dim(tensor: CudaTensor, dim: usize) -> CudaTensor {
        reduce(Reduction::Maximum, &tensor, dim, tensor.dtype())
    }

    fn int_min(tensor: CudaTensor) -> CudaTensor {
        let dtype = tensor.dtype();
        reduce_all(Reduction::Minimum, tensor, dtype)
    }

    fn int_min_dim(tensor: CudaTensor, dim: usize) -> CudaTensor {
        reduce(Reduction::Minimum, &tensor, dim, tensor.dtype())
    }

    fn int_max_abs(tensor: CudaTensor) -> CudaTensor {
        let dtype = tensor.dtype();
        reduce_all(Reduction::MaxAbs, tensor, dtype)
    }

    fn int_max_abs_dim(tensor: CudaTensor, dim: usize) -> CudaTensor {
        reduce(Reduction::MaxAbs, &tensor, dim, tensor.dtype())
    }

    fn int_argmax(tensor: CudaTensor, dim: usize) -> CudaTensor {
        arg_reduce(Reduction::Maximum, &tensor, dim, tensor.dtype())
    }

    fn int_argmin(tensor: CudaTensor, dim: usize) -> CudaTensor {
        arg_reduce(Reduction::Minimum, &tensor, dim, tensor.dtype())
    }

    fn int_argtopk(tensor: CudaTensor, dim: usize, k: usize) -> CudaTensor {
        let dtype = tensor.dtype();
        sort::arg_top(tensor, dim, k, dtype)
    }

    fn int_topk(tensor: CudaTensor, dim: usize, k: usize) -> CudaTensor {
        sort::sort(tensor, dim, true).0.narrow(dim, 0, k)
    }

    fn int_sort(tensor: CudaTensor, dim: usize, descending: bool) -> CudaTensor {
        sort::sort(tensor, dim, descending).0
    }

    fn int_sort_with_indices(
        tensor: CudaTensor,
        dim: usize,
        descending: bool,
    ) -> (CudaTensor, CudaTensor) {
        let dtype = tensor.dtype();
        let (values, places) = sort::sort(tensor, dim, descending);
        (values, cast(places, dtype))
    }

    fn int_argsort(tensor: CudaTensor, dim: usize, descending: bool) -> CudaTensor {
        let dtype = tensor.dtype();
        cast(sort::sort(tensor, dim, descending).1, dtype)
    }

    fn int_cumsum(tensor: CudaTensor, dim: usize) -> CudaTensor {
        scan::scan("Plus", tensor, dim)
    }

    fn int_cumprod(tensor: CudaTensor, dim: usize) -> CudaTensor {
        scan::scan("Times", tensor, dim)
    }

    fn int_cummin(tensor: CudaTensor, dim: usize) -> CudaTensor {
        scan::scan("Smaller", tensor, dim)
    }

    fn int_cummax(tensor: CudaTensor, dim: usize) -> CudaTensor {
        scan::scan("Larger", tensor, dim)
    }

    fn int_swap_dims(tensor: CudaTensor, dim1: usize, dim2: usize) -> CudaTensor {
        tensor.swap_dims(dim1, dim2)
    }

    fn int_permute(tensor: CudaTensor, axes: &[usize]) -> CudaTensor {
        tensor.permute(axes)
    }

    fn int_flip(tensor: CudaTensor, axes: &[usize]) -> CudaTensor {
        tensor.flip(axes)
    }

    fn int_random(
        shape: Shape,
        distribution: Distribution,
        device: &CudaDevice,
        dtype: IntDType,
    ) -> CudaTensor {
        random::random(
            Gpu::get(device.ordinal).or_panic(),
            dims(&shape),
            distribution,
            dtype.into(),
        )
    }

    fn int_expand(tensor: CudaTensor, shape: Shape) -> CudaTensor {
        tensor.expand(dims(&shape))
    }

    fn int_cast(tensor: CudaTensor, dtype: IntDType) -> CudaTensor {
        cast(tensor, dtype.into())
    }

    fn int_unfold(tensor: CudaTensor, dim: usize, size: usize, step: usize) -> CudaTensor {
        tensor.unfold(dim, size, step)
    }
}
