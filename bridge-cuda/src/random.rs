//! Random numbers. Kernel: `kernels/random.cu`.

use burn_backend::{DType, Distribution};

use crate::device::{Gpu, Launch, launch};
use crate::elementwise::{blocks, type_name};
use crate::error::OrPanic;
use crate::tensor::CudaTensor;

/// A packed tensor drawn from `distribution`. The device's seed and the numbers drawn so far decide the values.
#[track_caller]
pub(crate) fn random(
    gpu: &'static Gpu,
    shape: &[usize],
    distribution: Distribution,
    dtype: DType,
) -> CudaTensor {
    let out = CudaTensor::empty(gpu, shape, dtype);
    let count = out.count();
    if count == 0 {
        return out;
    }
    let (kind, a, b): (i32, f64, f64) = match distribution {
        Distribution::Default if dtype.is_float() => (0, 0.0, 1.0),
        Distribution::Default => (0, 0.0, 255.0),
        Distribution::Uniform(low, high) => (0, low, high),
        Distribution::Normal(mean, deviation) => (1, mean, deviation),
        Distribution::Bernoulli(probability) => (2, probability, 0.0),
    };
    let (seed, offset) = {
        let mut state = gpu
            .random
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let now = *state;
        state.1 += count.div_ceil(4) as u64;
        now
    };
    let kernel = gpu
        .kernel("random", &[("TYPE", type_name(dtype))], "fill")
        .or_panic();
    let shape = Launch::linear(blocks(gpu, count, 4), 256);
    // SAFETY: the kernel writes `count` elements of a packed tensor.
    unsafe {
        launch!(gpu, kernel, shape; out.address(), seed, offset, kind, a, b, count as i64)
            .or_panic()
    };
    out
}
