//! Cumulative operations. Kernels: `kernels/scan.cu`.

use burn_backend::TensorMetadata;

use crate::device::{Launch, launch};
use crate::elementwise::type_name;
use crate::error::OrPanic;
use crate::tensor::CudaTensor;

const THREADS: u32 = 128;

/// Cumulative `op` (a structure of the kernel file) along dimension `d`.
#[track_caller]
pub(crate) fn scan(op: &'static str, x: CudaTensor, d: usize) -> CudaTensor {
    let x = x.packed();
    let out = CudaTensor::empty(x.gpu(), x.dims(), x.dtype());
    if out.count() == 0 {
        return out;
    }
    let n = x.dims()[d];
    let inner: usize = x.dims()[d + 1..].iter().product();
    let lines = x.count() / n;
    let (entry, per_block) = if inner == 1 {
        ("rows", THREADS as usize / 32)
    } else {
        ("lines", THREADS as usize)
    };
    let gpu = x.gpu();
    let kernel = gpu
        .kernel("scan", &[("TYPE", type_name(x.dtype())), ("OP", op)], entry)
        .or_panic();
    let shape = Launch::linear(lines.div_ceil(per_block), THREADS);
    // SAFETY: packed operands of the sizes given.
    unsafe {
        launch!(gpu, kernel, shape; out.address(), x.address(), lines as i64, n as i64, inner as i64).or_panic();
    }
    out
}
