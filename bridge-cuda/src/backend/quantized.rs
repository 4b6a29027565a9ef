//! Burn's quantized tensors, which this backend does not have: models here train and run in 16- and 32-bit floats.

use burn_backend::ops::QTensorOps;
use burn_backend::quantization::{QuantScheme, QuantizationParametersPrimitive};
use burn_backend::{
    DType, ExecutionError, FloatDType, QTensorPrimitive, Shape, Slice, TensorData, TensorMetadata,
};

use super::Cuda;
use super::module::unsupported;
use crate::device::CudaDevice;
use crate::tensor::CudaTensor;

/// A quantized tensor. It has no values: none can be made.
#[derive(Debug, Clone)]
pub enum CudaQTensor {}

impl TensorMetadata for CudaQTensor {
    fn dtype(&self) -> DType {
        match *self {}
    }

    fn shape(&self) -> Shape {
        match *self {}
    }
}

impl QTensorPrimitive for CudaQTensor {
    fn scheme(&self) -> &QuantScheme {
        match *self {}
    }
}

impl QTensorOps<Cuda> for Cuda {
    fn q_from_data(_data: TensorData, _device: &CudaDevice) -> CudaQTensor {
        unsupported("quantized tensors")
    }

    fn quantize(
        _tensor: CudaTensor,
        _scheme: &QuantScheme,
        _qparams: QuantizationParametersPrimitive<Cuda>,
    ) -> CudaQTensor {
        unsupported("quantize")
    }

    fn dequantize(tensor: CudaQTensor, _dtype: FloatDType) -> CudaTensor {
        match tensor {}
    }

    fn q_device(tensor: &CudaQTensor) -> CudaDevice {
        match *tensor {}
    }

    fn q_to_device(tensor: CudaQTensor, _device: &CudaDevice) -> CudaQTensor {
        match tensor {}
    }

    fn q_reshape(tensor: CudaQTensor, _shape: Shape) -> CudaQTensor {
        match tensor {}
    }

    async fn q_into_data(tensor: CudaQTensor) -> Result<TensorData, ExecutionError> {
        match tensor {}
    }

    fn q_expand(tensor: CudaQTensor, _shape: Shape) -> CudaQTensor {
        match tensor {}
    }

    fn q_swap_dims(tensor: CudaQTensor, _dim1: usize, _dim2: usize) -> CudaQTensor {
        match tensor {}
    }

    fn q_permute(tensor: CudaQTensor, _axes: &[usize]) -> CudaQTensor {
        match tensor {}
    }

    fn q_flip(tensor: CudaQTensor, _axes: &[usize]) -> CudaQTensor {
        match tensor {}
    }

    fn q_select(tensor: CudaQTensor, _dim: usize, _indices: CudaTensor) -> CudaQTensor {
        match tensor {}
    }

    fn q_slice(tensor: CudaQTensor, _slices: &[Slice]) -> CudaQTensor {
        match tensor {}
    }
}
