//! The linear layer: cuBLASLt for every product, bias in its epilogue, weight gradients summed in fp32 by the product.

use bridge_ops::GradSlot;
use burn_backend::{DType, TensorMetadata};

use super::open_slot;
use crate::backend::Cuda;
use crate::elementwise::{binary, cast};
use crate::matmul::matmul_into;
use crate::reduce::{Reduction, reduce};
use crate::tensor::CudaTensor;

/// `[.., last]` as a matrix that cuBLASLt can read, without packing where the strides allow.
pub(super) fn rows(x: CudaTensor) -> CudaTensor {
    let last = *x
        .dims()
        .last()
        .expect("a tensor of rank 0 has no last dimension");
    let count = x.dims()[..x.dims().len() - 1].iter().product();
    x.reshape(&[count, last])
}

fn with_last(shape: &[usize], last: usize) -> Vec<usize> {
    let mut shape = shape.to_vec();
    *shape
        .last_mut()
        .expect("a tensor of rank 0 has no last dimension") = last;
    shape
}

pub(super) fn forward(x: CudaTensor, weight: CudaTensor, bias: Option<CudaTensor>) -> CudaTensor {
    let dtype = x.dtype();
    let weight = cast(weight, dtype);
    let bias = bias.map(|bias| cast(bias, dtype));
    let shape = with_last(x.dims(), weight.dims()[0]);
    let x = rows(x);
    let out = CudaTensor::empty(x.gpu(), &[x.dims()[0], weight.dims()[0]], dtype);
    matmul_into(&out, x, weight.swap_dims(0, 1), None, bias.as_ref());
    out.reshape(&shape)
}

/// Half-precision factors of one type are multiplied as they are: their products are exact in fp32.
pub(super) fn forward_f32(
    x: CudaTensor,
    weight: CudaTensor,
    bias: Option<CudaTensor>,
) -> CudaTensor {
    let exact = x.dtype() == weight.dtype() && matches!(x.dtype(), DType::BF16 | DType::F16);
    if !exact {
        return forward(cast(x, DType::F32), weight, bias);
    }
    let shape = with_last(x.dims(), weight.dims()[0]);
    let x = rows(x);
    let size = [x.dims()[0], weight.dims()[0]];
    let out = CudaTensor::empty(x.gpu(), &size, DType::F32);
    matmul_into(&out, x, weight.swap_dims(0, 1), None, None);
    let out = match bias {
        Some(bias) => binary("AddTensor", out, cast(bias, DType::F32), None),
        None => out,
    };
    out.reshape(&shape)
}

/// `dy W`, added by the product to what the gradient is so far: in place where nobody else has that.
pub(super) fn backward_input(
    dy: CudaTensor,
    weight: CudaTensor,
    so_far: Option<CudaTensor>,
) -> CudaTensor {
    let dtype = dy.dtype();
    let weight = cast(weight, dtype);
    let shape = with_last(dy.dims(), weight.dims()[1]);
    let dy = rows(dy);
    let size = [dy.dims()[0], weight.dims()[1]];
    let so_far = so_far.map(|so_far| rows(cast(so_far, dtype).into_packed()));
    let out = match &so_far {
        Some(so_far) if so_far.is_unique() => so_far.clone(),
        _ => CudaTensor::empty(dy.gpu(), &size, dtype),
    };
    matmul_into(&out, dy, weight, so_far.as_ref(), None);
    out.reshape(&shape)
}

pub(super) fn accumulate_weight_grad(
    x: CudaTensor,
    dy: CudaTensor,
    slot: GradSlot<Cuda>,
) -> CudaTensor {
    let (x, dy) = (rows(x), rows(dy));
    let shape = [dy.dims()[1], x.dims()[1]];
    // Half-precision factors of one type, with a sum of that type or in fp32, are what cuBLASLt offers; anything else
    // meets in fp32.
    let (x, dy) = match (x.dtype(), dy.dtype()) {
        (DType::BF16, DType::BF16) | (DType::F16, DType::F16) => (x, dy),
        _ => (cast(x, DType::F32), cast(dy, DType::F32)),
    };
    if slot.dtype() != DType::F32 && slot.dtype() != x.dtype() {
        return slot.rounded_once(|slot| accumulate_weight_grad(x, dy, slot));
    }
    let (sum, accumulate) = open_slot(slot, &x, &shape);
    matmul_into(
        &sum,
        dy.swap_dims(0, 1),
        x,
        accumulate.then_some(&sum),
        None,
    );
    sum
}

pub(super) fn accumulate_bias_grad(dy: CudaTensor, slot: GradSlot<Cuda>) -> CudaTensor {
    let dy = rows(dy);
    let count = dy.dims()[1];
    let sum = reduce(Reduction::Sum, &dy, 0, DType::F32).reshape(&[count]);
    match slot {
        GradSlot::Sum(so_far) => binary("AddTensor", so_far, sum, None),
        GradSlot::Stale(_) | GradSlot::Empty => sum,
    }
}
