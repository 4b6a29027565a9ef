//! Float tensors.

use burn_backend::ops::FloatTensorOps;
use burn_backend::{
    BoolDType, Distribution, ExecutionError, FloatDType, IntDType, Scalar, Shape, Slice,
    TensorData, TensorMetadata,
};

use super::{Cuda, dims, from_data, into_data, slice_assign};
use crate::device::{CudaDevice, Gpu};
use crate::elementwise::{
    binary, cast, concatenate, full, mask_fill, mask_where, scalar, unary, unary_to,
};
use crate::error::OrPanic;
use crate::index::{Scatter, gather, scatter, select, select_add};
use crate::reduce::{Reduction, arg_reduce, reduce, reduce_all};
use crate::tensor::CudaTensor;
use crate::{matmul, random, scan, sort};

/// Functions that map one tensor with an operation of the kernel file.
macro_rules! unary_ops {
    ($($name:ident => $op:literal),* $(,)?) => { $(
        fn $name(tensor: CudaTensor) -> CudaTensor {
            unary($op, tensor)
        }
    )* };
}

/// Functions of two tensors, or of a tensor and a scalar.
macro_rules! binary_ops {
    ($($name:ident, $with_scalar:ident => $op:literal, $scalar_op:literal);* $(;)?) => { $(
        fn $name(lhs: CudaTensor, rhs: CudaTensor) -> CudaTensor {
            binary($op, lhs, rhs, None)
        }

        fn $with_scalar(lhs: CudaTensor, rhs: Scalar) -> CudaTensor {
            scalar($scalar_op, lhs, rhs)
        }
    )* };
}

/// Comparisons of two tensors, or of a tensor and a scalar.
macro_rules! comparisons {
    ($($name:ident, $with_scalar:ident => $op:literal, $scalar_op:literal);* $(;)?) => { $(
        fn $name(lhs: CudaTensor, rhs: CudaTensor, out_dtype: BoolDType) -> CudaTensor {
            binary($op, lhs, rhs, Some(out_dtype.into()))
        }

        fn $with_scalar(lhs: CudaTensor, rhs: Scalar, out_dtype: BoolDType) -> CudaTensor {
            unary_to($scalar_op, lhs, [rhs, rhs], Some(out_dtype.into()))
        }
    )* };
}
pub(super) use {binary_ops, comparisons};

impl FloatTensorOps<Cuda> for Cuda {
    fn float_from_data(data: TensorData, device: &CudaDevice) -> CudaTensor {
        from_data(data, device)
    }

    fn float_random(
        shape: Shape,
        distribution: Distribution,
        device: &CudaDevice,
        dtype: FloatDType,
    ) -> CudaTensor {
        random::random(
            Gpu::get(device.ordinal).or_panic(),
            dims(&shape),
            distribution,
            dtype.into(),
        )
    }

    fn float_zeros(shape: Shape, device: &CudaDevice, dtype: FloatDType) -> CudaTensor {
        CudaTensor::zeros(
            Gpu::get(device.ordinal).or_panic(),
            dims(&shape),
            dtype.into(),
        )
    }

    fn float_ones(shape: Shape, device: &CudaDevice, dtype: FloatDType) -> CudaTensor {
        Self::float_full(shape, 1.0.into(), device, dtype)
    }

    fn float_full(
        shape: Shape,
        fill_value: Scalar,
        device: &CudaDevice,
        dtype: FloatDType,
    ) -> CudaTensor {
        full(
            Gpu::get(device.ordinal).or_panic(),
            dims(&shape),
            fill_value,
            dtype.into(),
        )
    }

    async fn float_into_data(tensor: CudaTensor) -> Result<TensorData, ExecutionError> {
        into_data(tensor)
    }

    fn float_device(tensor: &CudaTensor) -> CudaDevice {
        tensor.device()
    }

    fn float_to_device(tensor: CudaTensor, device: &CudaDevice) -> CudaTensor {
        tensor.on_device(*device)
    }

    fn float_into_int(tensor: CudaTensor, out_dtype: IntDType) -> CudaTensor {
        cast(tensor, out_dtype.into())
    }

    fn float_empty(shape: Shape, device: &CudaDevice, dtype: FloatDType) -> CudaTensor {
        CudaTensor::empty(
            Gpu::get(device.ordinal).or_panic(),
            dims(&shape),
            dtype.into(),
        )
    }

    binary_ops! {
        float_add, float_add_scalar => "AddTensor", "AddScalar";
        float_sub, float_sub_scalar => "SubTensor", "SubScalar";
        float_mul, float_mul_scalar => "MulTensor", "MulScalar";
        float_div, float_div_scalar => "DivTensor", "DivScalar";
        float_remainder, float_remainder_scalar => "RemTensor", "RemScalar";
        float_powf, float_powf_scalar_impl => "PowTensor", "PowScalar";
    }

    comparisons! {
        float_equal, float_equal_elem => "EqualTensor", "EqualScalar";
        float_not_equal, float_not_equal_elem => "NotEqualTensor", "NotEqualScalar";
        float_greater, float_greater_elem => "GreaterTensor", "GreaterScalar";
        float_greater_equal, float_greater_equal_elem => "GreaterEqualTensor", "GreaterEqualScalar";
        float_lower, float_lower_elem => "LowerTensor", "LowerScalar";
        float_lower_equal, float_lower_equal_elem => "LowerEqualTensor", "LowerEqualScalar";
    }

    unary_ops! {
        float_neg => "Negate",
        float_recip => "Recip",
        float_exp => "Exp",
        float_log => "Log",
        float_log1p => "Log1p",
        float_sqrt => "Sqrt",
        float_abs => "FloatAbs",
        float_sin => "Sin",
        float_cos => "Cos",
        float_tan => "Tan",
        float_sinh => "Sinh",
        float_cosh => "Cosh",
        float_tanh => "Tanh",
        float_asin => "Asin",
        float_acos => "Acos",
        float_atan => "Atan",
        float_asinh => "Asinh",
        float_acosh => "Acosh",
        float_atanh => "Atanh",
        float_erf => "Erf",
        float_round => "Round",
        float_floor => "Floor",
        float_ceil => "Ceil",
        float_trunc => "Trunc",
        float_sign => "Sign",
    }

    fn float_atan2(lhs: CudaTensor, rhs: CudaTensor) -> CudaTensor {
        binary("Atan2", lhs, rhs, None)
    }

    fn float_powi(lhs: CudaTensor, rhs: CudaTensor) -> CudaTensor {
        let dtype = lhs.dtype();
        binary("PowTensor", lhs, cast(rhs, dtype), None)
    }

    fn float_clamp_min(tensor: CudaTensor, min: Scalar) -> CudaTensor {
        scalar("ClampMin", tensor, min)
    }

    fn float_clamp_max(tensor: CudaTensor, max: Scalar) -> CudaTensor {
        scalar("ClampMax", tensor, max)
    }

    fn float_clamp(tensor: CudaTensor, min: Scalar, max: Scalar) -> CudaTensor {
        unary_to("Clamp", tensor, [min, max], None)
    }

    fn float_is_nan(tensor: CudaTensor, out_dtype: BoolDType) -> CudaTensor {
        unary_to("IsNan", tensor, [0.0.into(); 2], Some(out_dtype.into()))
    }

    fn float_is_inf(tensor: CudaTensor, out_dtype: BoolDType) -> CudaTensor {
        unary_to("IsInf", tensor, [0.0.into(); 2], Some(out_dtype.into()))
    }

    fn float_matmul(lhs: CudaTensor, rhs: CudaTensor) -> CudaTensor {
        matmul::matmul(lhs, rhs)
    }

    fn float_cross(lhs: CudaTensor, rhs: CudaTensor, dim: usize) -> CudaTensor {
        let part = |x: &CudaTensor, i: usize| x.clone().narrow(dim, i, 1);
        let product = |i: usize, j: usize| binary("MulTensor", part(&lhs, i), part(&rhs, j), None);
        let parts = [(1, 2), (2, 0), (0, 1)]
            .map(|(i, j)| binary("SubTensor", product(i, j), product(j, i), None));
        concatenate(&parts, dim)
    }

    fn float_swap_dims(tensor: CudaTensor, dim1: usize, dim2: usize) -> CudaTensor {
        tensor.swap_dims(dim1, dim2)
    }

    fn float_permute(tensor: CudaTensor, axes: &[usize]) -> CudaTensor {
        tensor.permute(axes)
    }

    fn float_flip(tensor: CudaTensor, axes: &[usize]) -> CudaTensor {
        tensor.flip(axes)
    }

    fn float_reshape(tensor: CudaTensor, shape: Shape) -> CudaTensor {
        tensor.reshape(dims(&shape))
    }

    fn float_gather(dim: usize, tensor: CudaTensor, indices: CudaTensor) -> CudaTensor {
        gather(dim, tensor, indices)
    }

    fn float_scatter_add(
        dim: usize,
        tensor: CudaTensor,
        indices: CudaTensor,
        value: CudaTensor,
    ) -> CudaTensor {
        scatter(Scatter::Add, dim, tensor, indices, value)
    }

    fn float_select(tensor: CudaTensor, dim: usize, indices: CudaTensor) -> CudaTensor {
        select(tensor, dim, indices)
    }

    fn float_select_add(
        tensor: CudaTensor,
        dim: usize,
        indices: CudaTensor,
        value: CudaTensor,
    ) -> CudaTensor {
        select_add(Scatter::Add, dim, tensor, indices, value)
    }

    fn float_slice(tensor: CudaTensor, slices: &[Slice]) -> CudaTensor {
        tensor.slice(slices)
    }

    fn float_slice_assign(tensor: CudaTensor, slices: &[Slice], value: CudaTensor) -> CudaTensor {
        slice_assign(tensor, slices, value)
    }

    fn float_mask_where(tensor: CudaTensor, mask: CudaTensor, value: CudaTensor) -> CudaTensor {
        mask_where(tensor, mask, value)
    }

    fn float_mask_fill(tensor: CudaTensor, mask: CudaTensor, value: Scalar) -> CudaTensor {
        mask_fill(tensor, mask, value)
    }

    fn float_sum(tensor: CudaTensor) -> CudaTensor {
        let dtype = tensor.dtype();
        reduce_all(Reduction::Sum, tensor, dtype)
    }

    fn float_sum_dim(tensor: CudaTensor, dim: usize) -> CudaTensor {
        reduce(Reduction::Sum, &tensor, dim, tensor.dtype())
    }

    fn float_prod(tensor: CudaTensor) -> CudaTensor {
        let dtype = tensor.dtype();
        reduce_all(Reduction::Product, tensor, dtype)
    }

    fn float_prod_dim(tensor: CudaTensor, dim: usize) -> CudaTensor {
        reduce(Reduction::Product, &tensor, dim, tensor.dtype())
    }

    fn float_mean(tensor: CudaTensor) -> CudaTensor {
        let dtype = tensor.dtype();
        reduce_all(Reduction::Mean, tensor, dtype)
    }

    fn float_mean_dim(tensor: CudaTensor, dim: usize) -> CudaTensor {
        reduce(Reduction::Mean, &tensor, dim, tensor.dtype())
    }

    fn float_max(tensor: CudaTensor) -> CudaTensor {
        let dtype = tensor.dtype();
        reduce_all(Reduction::Maximum, tensor, dtype)
    }

    fn float_max_dim(tensor: CudaTensor, dim: usize) -> CudaTensor {
        reduce(Reduction::Maximum, &tensor, dim, tensor.dtype())
    }

    fn float_min(tensor: CudaTensor) -> CudaTensor {
        let dtype = tensor.dtype();
        reduce_all(Reduction::Minimum, tensor, dtype)
    }

    fn float_min_dim(tensor: CudaTensor, dim: usize) -> CudaTensor {
        reduce(Reduction::Minimum, &tensor, dim, tensor.dtype())
    }

    fn float_max_abs(tensor: CudaTensor) -> CudaTensor {
        let dtype = tensor.dtype();
        reduce_all(Reduction::MaxAbs, tensor, dtype)
    }

    fn float_max_abs_dim(tensor: CudaTensor, dim: usize) -> CudaTensor {
        reduce(Reduction::MaxAbs, &tensor, dim, tensor.dtype())
    }

    fn float_argmax(tensor: CudaTensor, dim: usize, out_dtype: IntDType) -> CudaTensor {
        arg_reduce(Reduction::Maximum, &tensor, dim, out_dtype.into())
    }

    fn float_argmin(tensor: CudaTensor, dim: usize, out_dtype: IntDType) -> CudaTensor {
        arg_reduce(Reduction::Minimum, &tensor, dim, out_dtype.into())
    }

    fn float_argtopk(tensor: CudaTensor, dim: usize, k: usize, out_dtype: IntDType) -> CudaTensor {
        sort::arg_top(tensor, dim, k, out_dtype.into())
    }

    fn float_topk(tensor: CudaTensor, dim: usize, k: usize) -> CudaTensor {
        sort::sort(tensor, dim, true).0.narrow(dim, 0, k)
    }

    fn float_sort(tensor: CudaTensor, dim: usize, descending: bool) -> CudaTensor {
        sort::sort(tensor, dim, descending).0
    }

    fn float_sort_with_indices(
        tensor: CudaTensor,
        dim: usize,
        descending: bool,
        indices_dtype: IntDType,
    ) -> (CudaTensor, CudaTensor) {
        let (values, places) = sort::sort(tensor, dim, descending);
        (values, cast(places, indices_dtype.into()))
    }

    fn float_argsort(
        tensor: CudaTensor,
        dim: usize,
        descending: bool,
        out_dtype: IntDType,
    ) -> CudaTensor {
        cast(sort::sort(tensor, dim, descending).1, out_dtype.into())
    }

    fn float_cumsum(tensor: CudaTensor, dim: usize) -> CudaTensor {
        scan::scan("Plus", tensor, dim)
    }

    fn float_cumprod(tensor: CudaTensor, dim: usize) -> CudaTensor {
        scan::scan("Times", tensor, dim)
    }

    fn float_cummin(tensor: CudaTensor, dim: usize) -> CudaTensor {
        scan::scan("Smaller", tensor, dim)
    }

    fn float_cummax(tensor: CudaTensor, dim: usize) -> CudaTensor {
        scan::scan("Larger", tensor, dim)
    }

    fn float_cast(tensor: CudaTensor, dtype: FloatDType) -> CudaTensor {
        cast(tensor, dtype.into())
    }

    fn float_cat(tensors: Vec<CudaTensor>, dim: usize) -> CudaTensor {
        concatenate(&tensors, dim)
    }

    fn float_expand(tensor: CudaTensor, shape: Shape) -> CudaTensor {
        tensor.expand(dims(&shape))
    }

    fn float_unfold(tensor: CudaTensor, dim: usize, size: usize, step: usize) -> CudaTensor {
        tensor.unfold(dim, size, step)
    }
}
