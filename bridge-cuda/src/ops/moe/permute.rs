//! The order of rows by expert. Kernels: `kernels/expert_order.cu`, `kernels/permute_rows.cu`.

use bridge_ops::{ExpertOrder, SortedExperts, portable};
use burn_backend::{DType, TensorMetadata};

use super::super::{matrix, vector};
use crate::backend::Cuda;
use crate::device::{Gpu, Launch, launch};
use crate::elementwise::{cast, type_name};
use crate::error::OrPanic;
use crate::nvrtc::Kernel;
use crate::tensor::CudaTensor;

/// Warps of a block, and assignments of a warp; as in the kernel file.
const WARPS: usize = 8;
const WARP_SHARE: usize = 512;
/// Most experts: each warp of a block has a counter for each of them in 128 KiB of shared memory.
const MOST_EXPERTS: usize = 4095;

pub(in super::super) fn sort(experts: CudaTensor, num_experts: usize) -> SortedExperts<Cuda> {
    let shape = experts.dims().to_vec();
    let count = experts.count();
    if num_experts > MOST_EXPERTS || i32::try_from(count).is_err() {
        return portable::sort_by_expert::<Cuda>(experts, num_experts);
    }
    let experts = experts.into_packed();
    let gpu = experts.gpu();
    let buckets = num_experts + 1;
    let sorted = SortedExperts::<Cuda> {
        order: CudaTensor::empty(gpu, &[count], DType::I32),
        inverse: CudaTensor::empty(gpu, &shape, DType::I32),
        offsets: CudaTensor::empty(gpu, &[buckets], DType::I32),
    };
    let warps = count.div_ceil(WARP_SHARE);
    let counts = CudaTensor::empty(gpu, &[warps, buckets], DType::I32);
    let kernel = |entry| {
        let defines = [("INDEX", type_name(experts.dtype()))];
        gpu.kernel("expert_order", &defines, entry).or_panic()
    };
    let parts = Launch::linear(warps.div_ceil(WARPS), WARPS as u32 * 32)
        .shared(WARPS * buckets * size_of::<i32>());
    let buckets = buckets as i32;
    // SAFETY: packed operands of the sizes given; each warp has a row of `counts` and its share of the assignments.
    unsafe {
        launch!(gpu, kernel("count"), parts; counts.address(), experts.address(), count as i64, buckets).or_panic();
        launch!(gpu, kernel("starts"), Launch::linear(1, 1024); counts.address(), sorted.offsets.address(), warps as i64,
            buckets)
        .or_panic();
        launch!(gpu, kernel("place"), parts; sorted.order.address(), sorted.inverse.address(), counts.address(),
            experts.address(), count as i64, buckets)
        .or_panic();
    }
    sorted
}

/// A kernel on rows like those of `operands`, and the threads that take one row at once.
fn rows_kernel(
    gpu: &Gpu,
    h: usize,
    operands: &[&CudaTensor],
    entry: &'static str,
) -> (Kernel, u32) {
    let vector = vector(h, operands);
    let threads = h.div_ceil(vector).next_multiple_of(32).clamp(32, 512) as u32;
    let vector = vector.to_string();
    let defines = [
        ("TYPE", type_name(operands[0].dtype())),
        ("VECTOR", vector.as_str()),
    ];
    let kernel = gpu.kernel("permute_rows", &defines, entry).or_panic();
    (kernel, threads)
}

/// Places of rows as the kernels read them.
fn places(x: CudaTensor) -> CudaTensor {
    cast(x, DType::I32).into_packed()
}

/// Address of weights of assignments, with what keeps it valid.
fn weights_or_null(weights: Option<CudaTensor>) -> (Option<CudaTensor>, u64) {
    let weights = weights.map(|weights| cast(weights, DType::F32).into_packed());
    let address = weights.as_ref().map_or(0, CudaTensor::address);
    (weights, address)
}

/// Address of the last offset: how many rows belong to an expert.
fn used(offsets: &CudaTensor) -> u64 {
    offsets.address() + ((offsets.count() - 1) * size_of::<i32>()) as u64
}

pub(in super::super) fn permute(
    x: CudaTensor,
    order: &ExpertOrder<Cuda>,
    weights: Option<CudaTensor>,
) -> CudaTensor {
    let x = matrix(x);
    let (tokens, h, k) = (x.dims()[0], x.dims()[1], order.top_k());
    let assignments = places(order.order().clone());
    let (_weights, weights) = weights_or_null(weights);
    let gpu = x.gpu();
    let rows = CudaTensor::empty(gpu, &[tokens * k, h], x.dtype());
    if rows.count() == 0 {
        return rows;
    }
    let (kernel, threads) = rows_kernel(gpu, h, &[&x, &rows], "spread");
    // SAFETY: packed operands, one block per row; the assignments are those of the tokens.
    unsafe {
        launch!(gpu, kernel, Launch::linear(tokens * k, threads); rows.address(), x.address(), assignments.address(), weights,
            k as i32, h as i64)
        .or_panic();
    }
    rows
}

pub(in super::super) fn unpermute(
    rows: CudaTensor,
    inverse: CudaTensor,
    weights: Option<CudaTensor>,
    offsets: CudaTensor,
) -> CudaTensor {
    let (rows, inverse, offsets) = (matrix(rows), places(inverse), places(offsets));
    let (tokens, k, h) = (inverse.dims()[0], inverse.dims()[1], rows.dims()[1]);
    let (_weights, weights) = weights_or_null(weights);
    let gpu = rows.gpu();
    let y = CudaTensor::empty(gpu, &[tokens, h], rows.dtype());
    if y.count() == 0 {
        return y;
    }
    let (kernel, threads) = rows_kernel(gpu, h, &[&rows, &y], "gather");
    // SAFETY: packed operands, one block per token; places lie among the rows.
    unsafe {
        launch!(gpu, kernel, Launch::linear(tokens, threads); y.address(), rows.address(), inverse.address(), weights,
            used(&offsets), k as i32, h as i64)
        .or_panic();
    }
    y
}

pub(in super::super) fn weight_grad(
    rows: CudaTensor,
    inverse: CudaTensor,
    dy: CudaTensor,
    offsets: CudaTensor,
) -> CudaTensor {
    let dy = matrix(cast(dy, rows.dtype()));
    let (rows, inverse, offsets) = (matrix(rows), places(inverse), places(offsets));
    let (tokens, k, h) = (inverse.dims()[0], inverse.dims()[1], rows.dims()[1]);
    let gpu = rows.gpu();
    let dweights = CudaTensor::empty(gpu, &[tokens, k], DType::F32);
    let (kernel, _) = rows_kernel(gpu, h, &[&rows, &dy], "dots");
    let count = tokens * k;
    // SAFETY: packed operands, one warp per assignment; places lie among the rows.
    unsafe {
        launch!(gpu, kernel, Launch::linear(count.div_ceil(8), 256); dweights.address(), rows.address(), dy.address(),
            inverse.address(), used(&offsets), count as i64, k as i32, h as i64)
        .or_panic();
    }
    dweights
}
