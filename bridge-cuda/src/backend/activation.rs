//! Activations that have a kernel of their own; the others are Burn's compositions.

use burn_backend::TensorMetadata;
use burn_backend::ops::ActivationOps;

use super::Cuda;
use crate::device::{Launch, launch};
use crate::elementwise::{type_name, unary};
use crate::error::OrPanic;
use crate::tensor::CudaTensor;

impl ActivationOps<Cuda> for Cuda {
    fn relu(tensor: CudaTensor) -> CudaTensor {
        unary("Relu", tensor)
    }

    fn gelu(tensor: CudaTensor) -> CudaTensor {
        unary("Gelu", tensor)
    }

    fn sigmoid(tensor: CudaTensor) -> CudaTensor {
        unary("Sigmoid", tensor)
    }

    fn log_sigmoid(tensor: CudaTensor) -> CudaTensor {
        unary("LogSigmoid", tensor)
    }

    fn softmax(tensor: CudaTensor, dim: usize) -> CudaTensor {
        softmax(tensor, dim, "0")
    }

    fn log_softmax(tensor: CudaTensor, dim: usize) -> CudaTensor {
        softmax(tensor, dim, "1")
    }
}

/// Softmax (`log` "0") or its logarithm ("1") along dimension `d`. Kernel: `kernels/softmax.cu`.
fn softmax(x: CudaTensor, d: usize, log: &'static str) -> CudaTensor {
    let last = x.dims().len() - 1;
    let x = x.swap_dims(d, last).packed();
    let out = CudaTensor::empty(x.gpu(), x.dims(), x.dtype());
    if out.count() > 0 {
        let n = x.dims()[last];
        let gpu = x.gpu();
        let kernel = gpu
            .kernel(
                "softmax",
                &[("TYPE", type_name(x.dtype())), ("LOG", log)],
                "softmax",
            )
            .or_panic();
        let threads = n.next_multiple_of(32).min(512) as u32;
        // SAFETY: packed operands, one block per row.
        unsafe {
            launch!(gpu, kernel, Launch::linear(x.count() / n, threads); out.address(), x.address(), n as i64).or_panic();
        }
    }
    out.swap_dims(d, last)
}
