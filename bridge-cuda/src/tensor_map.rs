//! Tensors as the tensor memory accelerator of Hopper and later knows them.

use std::ffi::c_void;

use burn_backend::DType;
use cudarc::driver::sys;

use crate::device::Argument;
use crate::error::{Result, check};

/// Describes a tensor in device memory and the boxes of it that kernels copy. Mirrors `TensorMap` in `kernels/hopper.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct TensorMap([u64; 16]);

// SAFETY: the driver's 128 opaque bytes, on the boundary that kernels expect.
unsafe impl Argument for TensorMap {}

impl TensorMap {
    /// A tensor of 16-bit floats at `address` (a multiple of 16) of `dims`, innermost first, whose elements are neighbours
    /// along the first of them; `strides` (multiples of 8, in elements) are those of the others. Boxes have `shape`, 64
    /// elements along the first dimension, and arrive in shared memory in swizzled rows of 128 bytes.
    ///
    /// # Errors
    /// The driver refuses the description.
    pub(crate) fn new<const D: usize>(
        dtype: DType,
        address: u64,
        dims: [usize; D],
        strides: &[usize],
        shape: [u32; D],
    ) -> Result<Self> {
        assert_eq!(strides.len() + 1, D, "the first dimension has no stride");
        let element = match dtype {
            DType::BF16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            DType::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            other => panic!("boxes are of 16-bit floats, found {other:?}"),
        };
        let dims = dims.map(|dim| dim as u64);
        let bytes: Vec<u64> = strides
            .iter()
            .map(|stride| (stride * dtype.size()) as u64)
            .collect();
        let steps = [1u32; D];
        let mut map = Self([0; 16]);
        // SAFETY: the driver is loaded, since the tensor is on a device; arrays have `D` elements, the strides one less; the
        // map is 128 bytes on a boundary of 64.
        unsafe {
            check(
                "cuTensorMapEncodeTiled",
                sys::cuTensorMapEncodeTiled(
                    (&raw mut map).cast(),
                    element,
                    D as u32,
                    address as *mut c_void,
                    dims.as_ptr(),
                    bytes.as_ptr(),
                    shape.as_ptr(),
                    steps.as_ptr(),
                    sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                    sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                    sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                    sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
                ),
            )?;
        }
        Ok(map)
    }
}
