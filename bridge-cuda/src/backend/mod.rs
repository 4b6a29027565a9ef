//! Burn's `Backend` for [`Cuda`].

mod activation;
mod bool;
mod float;
mod int;
mod module;
mod quantized;

use burn_backend::ops::TransactionOps;
use burn_backend::{
    Backend, BackendTypes, DType, DTypeUsage, DTypeUsageSet, ExecutionError, Shape, TensorData,
    TensorMetadata,
};

use crate::device::{CudaDevice, Gpu};
use crate::error::OrPanic;
use crate::tensor::CudaTensor;

pub use quantized::CudaQTensor;

/// The CUDA backend. Element types are chosen at run time; these are the defaults for data without a dtype.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cuda;

impl BackendTypes for Cuda {
    type Device = CudaDevice;
    type FloatTensorPrimitive = CudaTensor;
    type FloatElem = f32;
    type IntTensorPrimitive = CudaTensor;
    type IntElem = i32;
    type BoolTensorPrimitive = CudaTensor;
    type BoolElem = bool;
    type QuantizedTensorPrimitive = CudaQTensor;
}

impl Backend for Cuda {
    fn name(_device: &CudaDevice) -> String {
        "cuda".into()
    }

    fn seed(device: &CudaDevice, seed: u64) {
        let gpu = Gpu::get(device.ordinal).or_panic();
        *gpu.random
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner()) = (seed, 0);
    }

    fn sync(device: &CudaDevice) -> Result<(), ExecutionError> {
        device.synchronize().map_err(execution_error)
    }

    fn memory_cleanup(device: &CudaDevice) {
        Gpu::get(device.ordinal).and_then(Gpu::trim).or_panic();
    }

    fn dtype_usage(_device: &CudaDevice, dtype: DType) -> DTypeUsageSet {
        use burn_backend::BoolStore;
        match dtype {
            DType::F16 | DType::BF16 | DType::F32 | DType::Flex32 => {
                DTypeUsage::general() | DTypeUsage::Accelerated
            }
            DType::F64
            | DType::I64
            | DType::I32
            | DType::I16
            | DType::I8
            | DType::U64
            | DType::U32
            | DType::U16
            | DType::U8
            | DType::Bool(BoolStore::Native | BoolStore::U8) => DTypeUsage::general(),
            DType::Bool(BoolStore::U32) | DType::QFloat(_) => DTypeUsageSet::empty(),
        }
    }

    fn device_count(_type_id: u16) -> usize {
        CudaDevice::count()
    }
}

impl TransactionOps<Cuda> for Cuda {}

fn execution_error(error: crate::Error) -> ExecutionError {
    ExecutionError::WithContext {
        reason: error.to_string(),
    }
}

/// A tensor holding host data.
#[track_caller]
fn from_data(data: TensorData, device: &CudaDevice) -> CudaTensor {
    let gpu = Gpu::get(device.ordinal).or_panic();
    CudaTensor::from_bytes(gpu, data.as_bytes(), data.shape.as_slice(), data.dtype)
}

/// The values on the host.
fn into_data(tensor: CudaTensor) -> Result<TensorData, ExecutionError> {
    let bytes = tensor.to_bytes().map_err(execution_error)?;
    Ok(TensorData::from_bytes_vec(
        bytes,
        tensor.shape(),
        tensor.dtype(),
    ))
}

/// Copies `value` into the part of `tensor` that `slices` select.
#[track_caller]
fn slice_assign(
    tensor: CudaTensor,
    slices: &[burn_backend::Slice],
    value: CudaTensor,
) -> CudaTensor {
    let out = tensor.into_writable();
    let target = out.clone().slice(slices);
    let value = if value.dims() == target.dims() {
        value
    } else {
        value.expand(target.dims())
    };
    crate::elementwise::copy_into(&target, &value);
    out
}

/// The dimensions of a Burn shape as a slice.
fn dims(shape: &Shape) -> &[usize] {
    shape.as_slice()
}
