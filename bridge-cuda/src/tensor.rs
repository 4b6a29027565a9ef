//! The tensor: a strided view into a buffer of device memory.

use std::sync::Arc;

use burn_backend::{BoolStore, DType, Shape, Slice, TensorMetadata};

use crate::device::{CudaDevice, Gpu};
use crate::error::{OrPanic, Result};

/// A block of device memory. It goes back to the pool when the last tensor that views it is dropped.
pub(crate) struct Buffer {
    pub(crate) gpu: &'static Gpu,
    pub(crate) address: u64,
    size: u64,
}

impl Buffer {
    /// A block of at least `bytes`, its content arbitrary. No memory is taken for 0 bytes.
    fn new(gpu: &'static Gpu, bytes: usize) -> Result<Self> {
        let (address, size) = if bytes == 0 {
            (0, 0)
        } else {
            gpu.allocate(bytes)?
        };
        Ok(Self { gpu, address, size })
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.size > 0 {
            self.gpu.pool().release(self.address, self.size);
        }
    }
}

/// A tensor of the CUDA backend: any rank, its dtype known at run time. Cloning shares the buffer; transposing,
/// permuting, slicing, expanding and flipping make another view of it.
#[derive(Clone)]
pub struct CudaTensor {
    buffer: Arc<Buffer>,
    /// First element, counted in elements from the start of the buffer.
    offset: usize,
    shape: Vec<usize>,
    /// Distance between neighbours in each dimension, in elements. 0 where expanded, negative where flipped.
    strides: Vec<i64>,
    dtype: DType,
}

impl std::fmt::Debug for CudaTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CudaTensor")
            .field("device", &self.buffer.gpu.ordinal)
            .field("dtype", &self.dtype)
            .field("shape", &self.shape)
            .field("strides", &self.strides)
            .finish()
    }
}

impl TensorMetadata for CudaTensor {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn shape(&self) -> Shape {
        Shape::from(self.shape.clone())
    }

    fn rank(&self) -> usize {
        self.shape.len()
    }
}

/// Strides of a packed tensor in row-major order.
pub(crate) fn packed_strides(shape: &[usize]) -> Vec<i64> {
    let mut strides = vec![1; shape.len()];
    for d in (1..shape.len()).rev() {
        strides[d - 1] = strides[d] * shape[d].max(1) as i64;
    }
    strides
}

/// The dtype under which values are stored: Burn's "flexible" float is a plain f32 here.
#[track_caller]
pub(crate) fn storage_dtype(dtype: DType) -> DType {
    match dtype {
        DType::Flex32 => DType::F32,
        DType::Bool(BoolStore::U32) | DType::QFloat(_) => {
            panic!("dtype {dtype:?} is not supported on cuda")
        }
        other => other,
    }
}

impl CudaTensor {
    /// A packed tensor whose content is arbitrary.
    #[track_caller]
    pub(crate) fn empty(gpu: &'static Gpu, shape: &[usize], dtype: DType) -> Self {
        let device = CudaDevice {
            ordinal: gpu.ordinal,
        };
        Self::uninitialized(device, shape, dtype).or_panic()
    }

    /// A packed tensor whose content is arbitrary, for a library that fills it.
    ///
    /// # Errors
    /// The device cannot be opened, or has no memory left.
    pub fn uninitialized(device: CudaDevice, shape: &[usize], dtype: DType) -> Result<Self> {
        let gpu = Gpu::get(device.ordinal)?;
        let dtype = storage_dtype(dtype);
        let bytes = shape.iter().product::<usize>() * dtype.size();
        Ok(Self {
            buffer: Arc::new(Buffer::new(gpu, bytes)?),
            offset: 0,
            shape: shape.to_vec(),
            strides: packed_strides(shape),
            dtype,
        })
    }

    /// A packed tensor of zeros.
    #[track_caller]
    pub(crate) fn zeros(gpu: &'static Gpu, shape: &[usize], dtype: DType) -> Self {
        let tensor = Self::empty(gpu, shape, dtype);
        if tensor.count() > 0 {
            // SAFETY: the whole of a buffer that was just allocated.
            unsafe {
                gpu.zero(tensor.address(), tensor.count() * tensor.dtype.size())
                    .or_panic()
            };
        }
        tensor
    }

    /// A packed tensor holding `bytes`.
    #[track_caller]
    pub(crate) fn from_bytes(
        gpu: &'static Gpu,
        bytes: &[u8],
        shape: &[usize],
        dtype: DType,
    ) -> Self {
        let tensor = Self::empty(gpu, shape, dtype);
        let expected = tensor.count() * tensor.dtype.size();
        assert_eq!(
            bytes.len(),
            expected,
            "{dtype:?} data of shape {shape:?} takes {expected} bytes"
        );
        if expected > 0 {
            // SAFETY: the whole of a buffer that was just allocated.
            unsafe { gpu.upload(bytes, tensor.address()).or_panic() };
        }
        tensor
    }

    /// The values, packed, on the host. Waits for the work that makes them.
    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>> {
        let packed = self.packed();
        let mut bytes = vec![0; packed.count() * packed.dtype.size()];
        if !bytes.is_empty() {
            // SAFETY: a packed tensor's elements lie one after the other from its address.
            unsafe { self.gpu().download(packed.address(), &mut bytes)? };
        }
        Ok(bytes)
    }

    pub(crate) fn gpu(&self) -> &'static Gpu {
        self.buffer.gpu
    }

    /// The device that holds the tensor.
    pub fn device(&self) -> CudaDevice {
        CudaDevice {
            ordinal: self.buffer.gpu.ordinal,
        }
    }

    /// Shape, as a slice.
    pub fn dims(&self) -> &[usize] {
        &self.shape
    }

    pub(crate) fn strides(&self) -> &[i64] {
        &self.strides
    }

    /// Number of elements.
    pub(crate) fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Device address of the first element.
    pub fn address(&self) -> u64 {
        self.buffer.address + (self.offset * self.dtype.size()) as u64
    }

    /// Whether the elements lie one after the other in row-major order.
    pub fn is_packed(&self) -> bool {
        let mut expected = 1;
        for (&size, &stride) in self.shape.iter().zip(&self.strides).rev() {
            if size != 1 && stride != expected {
                return self.count() == 0;
            }
            expected *= size as i64;
        }
        true
    }

    /// Whether no other tensor shares the buffer, so that it may be written in place.
    pub fn is_unique(&self) -> bool {
        Arc::strong_count(&self.buffer) == 1
    }

    /// This tensor if it is packed, else a packed copy.
    #[track_caller]
    pub fn packed(&self) -> Self {
        if self.is_packed() {
            self.with_packed_strides()
        } else {
            self.copied()
        }
    }

    /// [`Self::packed`] for an owner: keeps the only handle to the buffer the only one.
    #[track_caller]
    pub(crate) fn into_packed(self) -> Self {
        if self.is_packed() {
            Self {
                strides: packed_strides(&self.shape),
                ..self
            }
        } else {
            self.copied()
        }
    }

    /// A packed copy with a buffer of its own.
    #[track_caller]
    pub(crate) fn copied(&self) -> Self {
        let out = Self::empty(self.gpu(), &self.shape, self.dtype);
        crate::elementwise::copy_into(&out, self);
        out
    }

    /// This tensor if it is packed and owns its buffer alone, else a copy: in either case safe to write.
    #[track_caller]
    pub(crate) fn into_writable(self) -> Self {
        if self.is_packed() && self.is_unique() {
            self
        } else {
            self.copied()
        }
    }

    /// Strides of size-1 dimensions are arbitrary in a view; this makes them those of a packed tensor.
    fn with_packed_strides(&self) -> Self {
        Self {
            strides: packed_strides(&self.shape),
            ..self.clone()
        }
    }

    /// The same bytes under another dtype of the same size.
    pub(crate) fn reinterpret(mut self, dtype: DType) -> Self {
        let dtype = storage_dtype(dtype);
        assert_eq!(
            dtype.size(),
            self.dtype.size(),
            "reinterpreting keeps the element size"
        );
        self.dtype = dtype;
        self
    }

    #[track_caller]
    pub(crate) fn reshape(self, shape: &[usize]) -> Self {
        assert_eq!(
            self.count(),
            shape.iter().product::<usize>(),
            "cannot reshape {:?} to {shape:?}: the element counts differ",
            self.shape
        );
        match reshaped_strides(&self.shape, &self.strides, shape) {
            Some(strides) => Self {
                shape: shape.to_vec(),
                strides,
                ..self
            },
            None => {
                let copy = self.copied();
                Self {
                    shape: shape.to_vec(),
                    strides: packed_strides(shape),
                    ..copy
                }
            }
        }
    }

    pub(crate) fn permute(mut self, axes: &[usize]) -> Self {
        self.shape = axes.iter().map(|&axis| self.shape[axis]).collect();
        self.strides = axes.iter().map(|&axis| self.strides[axis]).collect();
        self
    }

    pub(crate) fn swap_dims(mut self, a: usize, b: usize) -> Self {
        self.shape.swap(a, b);
        self.strides.swap(a, b);
        self
    }

    pub(crate) fn flip(mut self, axes: &[usize]) -> Self {
        for &axis in axes {
            self.offset = shift(
                self.offset,
                self.strides[axis] * self.shape[axis].saturating_sub(1) as i64,
            );
            self.strides[axis] = -self.strides[axis];
        }
        self
    }

    /// A view of `shape`, whose trailing dimensions match or expand this tensor's size-1 dimensions.
    #[track_caller]
    pub(crate) fn expand(self, shape: &[usize]) -> Self {
        assert!(
            shape.len() >= self.shape.len(),
            "cannot expand {:?} to {shape:?}: too few dimensions",
            self.shape
        );
        let added = shape.len() - self.shape.len();
        let strides = (0..shape.len())
            .map(|d| match d.checked_sub(added) {
                None => 0,
                Some(own) if self.shape[own] == shape[d] => self.strides[own],
                Some(own) => {
                    assert_eq!(
                        self.shape[own], 1,
                        "cannot expand {:?} to {shape:?}",
                        self.shape
                    );
                    0
                }
            })
            .collect();
        Self {
            shape: shape.to_vec(),
            strides,
            ..self
        }
    }

    pub(crate) fn slice(mut self, slices: &[Slice]) -> Self {
        for (d, slice) in slices.iter().enumerate() {
            let range = slice.to_range(self.shape[d]);
            let step = slice.step() as i64;
            let size = slice.output_size(self.shape[d]);
            if size > 0 {
                // A negative step walks down from the end of the range.
                let first = if step > 0 { range.start } else { range.end - 1 };
                self.offset = shift(self.offset, first as i64 * self.strides[d]);
            }
            self.shape[d] = size;
            self.strides[d] *= step;
        }
        self
    }

    /// `length` elements of dimension `d` from `start`.
    pub(crate) fn narrow(mut self, d: usize, start: usize, length: usize) -> Self {
        assert!(
            start + length <= self.shape[d],
            "narrowing stays inside the dimension"
        );
        if length > 0 {
            self.offset = shift(self.offset, start as i64 * self.strides[d]);
        }
        self.shape[d] = length;
        self
    }

    /// Sliding windows of `size` elements every `step` along dimension `d`: that dimension becomes the number of windows,
    /// and a last dimension of `size` is added.
    pub(crate) fn unfold(mut self, d: usize, size: usize, step: usize) -> Self {
        let windows = if self.shape[d] >= size {
            (self.shape[d] - size) / step + 1
        } else {
            0
        };
        self.shape[d] = windows;
        self.shape.push(size);
        self.strides.push(self.strides[d]);
        self.strides[d] *= step as i64;
        self
    }

    /// On another device, through the host.
    #[track_caller]
    pub(crate) fn on_device(self, device: CudaDevice) -> Self {
        if device == self.device() {
            return self;
        }
        let gpu = Gpu::get(device.ordinal).or_panic();
        let bytes = self.to_bytes().or_panic();
        Self::from_bytes(gpu, &bytes, &self.shape, self.dtype)
    }
}

fn shift(offset: usize, by: i64) -> usize {
    usize::try_from(offset as i64 + by).expect("views stay inside their buffer")
}

/// Strides that show the same elements under another shape, or `None` if only a copy can.
fn reshaped_strides(shape: &[usize], strides: &[i64], target: &[usize]) -> Option<Vec<i64>> {
    if shape.contains(&0) {
        return Some(packed_strides(target));
    }
    // Dimensions of size 1 carry no information; the others merge into runs that step evenly.
    let mut runs: Vec<(usize, i64)> = Vec::new();
    for (&size, &stride) in shape.iter().zip(strides).filter(|(size, _)| **size != 1) {
        match runs.last_mut() {
            Some((run, step)) if *step == stride * size as i64 => {
                (*run, *step) = (*run * size, stride)
            }
            _ => runs.push((size, stride)),
        }
    }
    let mut out = vec![0; target.len()];
    let mut run = runs.pop();
    for d in (0..target.len()).rev() {
        if target[d] == 1 {
            out[d] = 1;
            continue;
        }
        let (left, step) = run?;
        if left % target[d] != 0 {
            return None;
        }
        out[d] = step;
        let left = left / target[d];
        run = if left == 1 {
            runs.pop()
        } else {
            Some((left, step * target[d] as i64))
        };
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reshape_of_views() {
        // A packed tensor takes any shape.
        assert_eq!(
            reshaped_strides(&[4, 6], &[6, 1], &[2, 2, 3, 2]),
            Some(vec![12, 6, 2, 1])
        );
        // A transposed one can split its dimensions but not merge them.
        assert_eq!(
            reshaped_strides(&[6, 4], &[1, 6], &[3, 2, 4]),
            Some(vec![2, 1, 6])
        );
        assert_eq!(reshaped_strides(&[6, 4], &[1, 6], &[24]), None);
        // Every second row: rows stay apart.
        assert_eq!(
            reshaped_strides(&[2, 6], &[12, 1], &[2, 3, 2]),
            Some(vec![12, 2, 1])
        );
        assert_eq!(reshaped_strides(&[2, 6], &[12, 1], &[12]), None);
        // Expanded dimensions merge with each other only.
        assert_eq!(
            reshaped_strides(&[2, 3, 5], &[0, 0, 1], &[6, 5]),
            Some(vec![0, 1])
        );
        assert_eq!(
            reshaped_strides(&[2, 1, 5], &[5, 77, 1], &[10, 1]),
            Some(vec![1, 1])
        );
        assert_eq!(
            reshaped_strides(&[0, 3], &[3, 1], &[3, 0]),
            Some(vec![1, 1])
        );
        assert_eq!(reshaped_strides(&[1, 1], &[1, 1], &[]), Some(vec![]));
    }
}
