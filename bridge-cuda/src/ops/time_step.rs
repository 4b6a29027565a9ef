//! Step sizes and decays of recurrent layers. Kernels: `kernels/time_step.cu`.

use burn_backend::{DType, TensorMetadata};

use super::matrix;
use crate::device::{Gpu, Launch, launch};
use crate::elementwise::{cast, type_name};
use crate::error::OrPanic;
use crate::nvrtc::Kernel;
use crate::reduce::{Reduction, reduce};
use crate::tensor::CudaTensor;

/// Rows of a block in the backward pass, `ROWS` of the kernel file.
const ROWS: usize = 64;
const THREADS: u32 = 256;

fn kernel(gpu: &Gpu, x: DType, weight: &CudaTensor, entry: &'static str) -> Kernel {
    let defines = [
        ("TYPE", type_name(x)),
        ("WEIGHT", type_name(weight.dtype())),
    ];
    gpu.kernel("time_step", &defines, entry).or_panic()
}

fn elementwise(count: usize) -> Launch {
    Launch::linear(count.div_ceil(THREADS as usize), THREADS)
}

/// Launch of a backward pass, and the parts of sums that it leaves: `[blocks, heads]` fp32.
fn by_rows(gpu: &'static Gpu, rows: usize, heads: usize) -> (Launch, CudaTensor) {
    let blocks = rows.div_ceil(ROWS);
    let parts = CudaTensor::empty(gpu, &[blocks, heads], DType::F32);
    (
        Launch::grid([blocks, heads.div_ceil(32), 1], THREADS),
        parts,
    )
}

fn total(parts: &CudaTensor, heads: usize) -> CudaTensor {
    reduce(Reduction::Sum, parts, 0, DType::F32).reshape(&[heads])
}

pub(super) fn step_forward(x: CudaTensor, bias: CudaTensor, min: f64) -> CudaTensor {
    let shape = x.dims().to_vec();
    let (x, bias) = (matrix(x), bias.into_packed());
    let (gpu, heads) = (x.gpu(), x.dims()[1]);
    let steps = CudaTensor::empty(gpu, &shape, DType::F32);
    if steps.count() > 0 {
        let kernel = kernel(gpu, x.dtype(), &bias, "step_forward");
        // SAFETY: packed operands; the bias has one element per column.
        unsafe {
            launch!(gpu, kernel, elementwise(x.count()); steps.address(), x.address(), bias.address(), x.count() as i64,
                heads as i64, min as f32)
            .or_panic();
        }
    }
    steps
}

pub(super) fn step_backward(
    x: CudaTensor,
    bias: CudaTensor,
    dy: CudaTensor,
    min: f64,
) -> (CudaTensor, CudaTensor) {
    let shape = x.dims().to_vec();
    let dy = matrix(cast(dy, DType::F32));
    let (x, bias) = (matrix(x), bias.into_packed());
    let (gpu, rows, heads) = (x.gpu(), x.dims()[0], x.dims()[1]);
    let dx = CudaTensor::empty(gpu, &shape, x.dtype());
    if dx.count() == 0 {
        return (dx, CudaTensor::zeros(gpu, &[heads], DType::F32));
    }
    let kernel = kernel(gpu, x.dtype(), &bias, "step_backward");
    let (launch, parts) = by_rows(gpu, rows, heads);
    // SAFETY: packed operands; each block writes its own row of parts.
    unsafe {
        launch!(gpu, kernel, launch; dx.address(), parts.address(), x.address(), bias.address(), dy.address(), rows as i64,
            heads as i64, min as f32)
        .or_panic();
    }
    (dx, total(&parts, heads))
}

pub(super) fn decay_forward(dt: CudaTensor, a_log: CudaTensor) -> CudaTensor {
    let shape = dt.dims().to_vec();
    let (dt, a_log) = (matrix(cast(dt, DType::F32)), a_log.into_packed());
    let (gpu, heads) = (dt.gpu(), dt.dims()[1]);
    let decays = CudaTensor::empty(gpu, &shape, DType::F32);
    if decays.count() > 0 {
        let kernel = kernel(gpu, DType::F32, &a_log, "decay_forward");
        // SAFETY: packed operands; `a_log` has one element per column.
        unsafe {
            launch!(gpu, kernel, elementwise(dt.count()); decays.address(), dt.address(), a_log.address(),
                dt.count() as i64, heads as i64)
            .or_panic();
        }
    }
    decays
}

pub(super) fn decay_backward(
    dt: CudaTensor,
    a_log: CudaTensor,
    dy: CudaTensor,
) -> (CudaTensor, CudaTensor) {
    let (shape, dtype) = (dt.dims().to_vec(), dt.dtype());
    let dy = matrix(cast(dy, DType::F32));
    let (dt, a_log) = (matrix(cast(dt, DType::F32)), a_log.into_packed());
    let (gpu, rows, heads) = (dt.gpu(), dt.dims()[0], dt.dims()[1]);
    let ddt = CudaTensor::empty(gpu, &shape, DType::F32);
    if ddt.count() == 0 {
        return (
            cast(ddt, dtype),
            CudaTensor::zeros(gpu, &[heads], DType::F32),
        );
    }
    let kernel = kernel(gpu, DType::F32, &a_log, "decay_backward");
    let (launch, parts) = by_rows(gpu, rows, heads);
    // SAFETY: packed operands; each block writes its own row of parts.
    unsafe {
        launch!(gpu, kernel, launch; ddt.address(), parts.address(), dt.address(), a_log.address(), dy.address(),
            rows as i64, heads as i64)
        .or_panic();
    }
    (cast(ddt, dtype), total(&parts, heads))
}
