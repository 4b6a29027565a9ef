//! Random sequences that depend on a key and the index. Kernel: `kernels/normal_region.cu`.

use std::ops::Range;

use burn_backend::DType;

use crate::device::{Argument, Gpu, Launch, launch};
use crate::elementwise::blocks;
use crate::error::OrPanic;
use crate::tensor::CudaTensor;
use crate::view::MAX_RANK;

/// Mirrors `Region` in `kernels/normal_region.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Region {
    start: [i64; MAX_RANK],
    len: [i64; MAX_RANK],
    shape: [i64; MAX_RANK],
    rank: i64,
}

// SAFETY: the same fields in the same order as the kernel's structure.
unsafe impl Argument for Region {}

pub(super) fn normal_region(
    gpu: &'static Gpu,
    key: u64,
    std: f64,
    shape: &[usize],
    ranges: &[Range<usize>],
) -> CudaTensor {
    let held: Vec<usize> = ranges.iter().map(Range::len).collect();
    let out = CudaTensor::empty(gpu, &held, DType::F32);
    let count = out.count();
    if count == 0 {
        return out;
    }
    let by_dim = |of: &dyn Fn(usize) -> usize| {
        std::array::from_fn(|dim| if dim < shape.len() { of(dim) as i64 } else { 1 })
    };
    let region = Region {
        start: by_dim(&|dim| ranges[dim].start),
        len: by_dim(&|dim| ranges[dim].len()),
        shape: by_dim(&|dim| shape[dim]),
        rank: shape.len() as i64,
    };
    let kernel = gpu.kernel("normal_region", &[], "normal_region").or_panic();
    // SAFETY: the kernel writes the `count` elements of a packed tensor.
    unsafe {
        launch!(gpu, kernel, Launch::linear(blocks(gpu, count, 1), 256); out.address(), key, std, region, count as i64)
            .or_panic();
    }
    out
}
