//! Token embedding. Kernels: `kernels/embedding.cu`.

use bridge_ops::GradSlot;
use burn_backend::{DType, TensorMetadata};

use super::{matrix, open_slot, vector};
use crate::backend::Cuda;
use crate::device::{Launch, launch};
use crate::elementwise::type_name;
use crate::error::OrPanic;
use crate::tensor::CudaTensor;

pub(super) fn lookup(ids: CudaTensor, weight: CudaTensor, dtype: DType) -> CudaTensor {
    let (ids, weight) = (ids.packed(), weight.packed());
    let n = weight.dims()[1];
    let gpu = weight.gpu();
    let y = CudaTensor::empty(gpu, &[ids.dims(), &[n]].concat(), dtype);
    if y.count() == 0 {
        return y;
    }
    let vector = vector(n, &[&weight, &y]);
    let threads = n.div_ceil(vector).next_multiple_of(32).clamp(32, 512) as u32;
    let vector = vector.to_string();
    let defines = [
        ("TYPE", type_name(y.dtype())),
        ("WEIGHT", type_name(weight.dtype())),
        ("INDEX", type_name(ids.dtype())),
        ("VECTOR", vector.as_str()),
    ];
    let kernel = gpu.kernel("embedding", &defines, "lookup").or_panic();
    // SAFETY: packed operands, one block per id; ids lie in the vocabulary, which is the caller's contract.
    unsafe {
        launch!(gpu, kernel, Launch::linear(ids.count(), threads); y.address(), ids.address(), weight.address(), n as i64)
            .or_panic();
    }
    y
}

pub(super) fn accumulate_grad(
    ids: CudaTensor,
    dy: CudaTensor,
    vocab_size: usize,
    slot: GradSlot<Cuda>,
) -> CudaTensor {
    let (ids, dy) = (ids.packed(), matrix(dy));
    let n = dy.dims()[1];
    let gpu = dy.gpu();
    let (sum, accumulate) = open_slot(slot, &dy, &[vocab_size, n]);
    if !accumulate && sum.count() > 0 {
        // SAFETY: the whole of a packed tensor that nobody else sees.
        unsafe {
            gpu.zero(sum.address(), sum.count() * sum.dtype().size())
                .or_panic()
        };
    }
    if dy.count() == 0 {
        return sum;
    }
    let vector = vector(n, &[&dy]).min(4).to_string();
    let defines = [
        ("TYPE", type_name(dy.dtype())),
        ("WEIGHT", type_name(sum.dtype())),
        ("INDEX", type_name(ids.dtype())),
        ("VECTOR", vector.as_str()),
    ];
    let kernel = gpu.kernel("embedding", &defines, "gradient").or_panic();
    let tokens = ids.count();
    // SAFETY: packed operands, one block per id; ids lie in the vocabulary, which is the caller's contract.
    unsafe {
        launch!(gpu, kernel, Launch::linear(tokens, 256); sum.address(), ids.address(), dy.address(), tokens as i64, n as i64)
            .or_panic();
    }
    sum
}
