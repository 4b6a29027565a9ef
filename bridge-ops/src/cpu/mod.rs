//! The CPU: [`Ops`] for Burn's `Flex` backend.

mod gemm;
mod simd;
mod threads;

use burn_backend::DType;
use burn_flex::Flex;

use crate::ops::Ops;

impl Ops for Flex {
    /// Half precision is a storage format here: weights are widened on the fly and all arithmetic is fp32.
    fn activation_dtype(weight_dtype: DType) -> DType {
        match weight_dtype {
            DType::F16 | DType::BF16 => DType::F32,
            dtype => dtype,
        }
    }
}
