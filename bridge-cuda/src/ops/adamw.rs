//! AdamW and the norm of gradients. Kernels: `kernels/adamw.cu`.

use bridge_ops::AdamWStep;
use burn_backend::{DType, TensorMetadata};

use crate::device::{Argument, Launch, launch};
use crate::elementwise::{blocks, cast, type_name};
use crate::error::OrPanic;
use crate::tensor::CudaTensor;

/// Elements of a tensor that one block updates; `CHUNK` of the kernel file.
const CHUNK: usize = 1 << 16;

/// The numbers of an update as the kernels take them. Mirrors `Numbers` in `kernels/adamw.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Numbers {
    decay: f32,
    beta1_rest: f32,
    beta2: f32,
    beta2_rest: f32,
    step_size: f32,
    root_bc2: f32,
    eps: f32,
    grad_scale: f32,
}

// SAFETY: the same fields in the same order as the kernels' structure.
unsafe impl Argument for Numbers {}

impl Numbers {
    fn new(step: &AdamWStep) -> Self {
        Self {
            decay: (1.0 - step.lr * step.weight_decay) as f32,
            beta1_rest: (1.0 - step.beta1) as f32,
            beta2: step.beta2 as f32,
            beta2_rest: (1.0 - step.beta2) as f32,
            step_size: (step.lr / step.bias_correction1) as f32,
            root_bc2: step.bias_correction2.sqrt() as f32,
            eps: step.eps as f32,
            grad_scale: step.grad_scale as f32,
        }
    }
}

pub(super) fn step(
    param: CudaTensor,
    grad: CudaTensor,
    m: CudaTensor,
    v: CudaTensor,
    step: &AdamWStep,
) -> (CudaTensor, CudaTensor, CudaTensor) {
    let (param, m, v) = (
        param.into_writable(),
        cast(m, DType::F32).into_writable(),
        cast(v, DType::F32).into_writable(),
    );
    let grad = grad.packed();
    let grad = if grad.address().is_multiple_of(16) {
        grad
    } else {
        grad.copied()
    };
    let count = param.count();
    assert!(
        [&grad, &m, &v].iter().all(|x| x.count() == count),
        "adamw: operands have the parameter's shape"
    );
    if count > 0 {
        let gpu = param.gpu();
        let defines = [
            ("PARAM", type_name(param.dtype())),
            ("GRAD", type_name(grad.dtype())),
        ];
        let kernel = gpu.kernel("adamw", &defines, "step").or_panic();
        let shape = Launch::linear(blocks(gpu, count, 4), 256);
        // SAFETY: packed operands of `count` elements; those written are owned by nobody else.
        unsafe {
            launch!(gpu, kernel, shape; param.address(), grad.address(), m.address(), v.address(), Numbers::new(step),
                count as i64)
            .or_panic();
        }
    }
    (param, m, v)
}

/// A parameter and its state, for [`adamw_step_many`].
#[derive(Debug)]
pub struct AdamWTensor<'a> {
    /// fp32 master weight, updated in place.
    pub master: &'a CudaTensor,
    /// fp32 gradient.
    pub grad: &'a CudaTensor,
    /// fp32 mean of gradients, updated in place.
    pub m: &'a CudaTensor,
    /// fp32 mean of squared gradients, updated in place.
    pub v: &'a CudaTensor,
    /// bf16 copy of the weight that the model computes with, overwritten.
    pub copy: Option<&'a CudaTensor>,
}

/// One AdamW update of many tensors in one launch, in place: the caller vouches that nobody else reads them meanwhile.
/// All on one device and packed.
///
/// # Panics
/// When a tensor is not packed, not aligned, or of the wrong dtype or size.
#[track_caller]
pub fn adamw_step_many(tensors: &[AdamWTensor], step: &AdamWStep) {
    let Some(first) = tensors.first() else { return };
    let gpu = first.master.gpu();
    let (mut table, mut chunks) = (Vec::new(), Vec::new());
    for (index, tensor) in tensors.iter().enumerate() {
        let count = tensor.master.count();
        for x in [tensor.master, tensor.grad, tensor.m, tensor.v] {
            let fits = x.count() == count
                && x.dtype() == DType::F32
                && x.is_packed()
                && x.address().is_multiple_of(16);
            assert!(
                fits,
                "adamw: expected {count} packed f32 elements, found {x:?}"
            );
        }
        if let Some(copy) = tensor.copy {
            let fits = copy.count() == count && copy.dtype() == DType::BF16 && copy.is_packed();
            assert!(
                fits && copy.address().is_multiple_of(8),
                "adamw: expected {count} packed bf16 elements, found {copy:?}"
            );
        }
        let copy = tensor.copy.map_or(0, CudaTensor::address);
        let addresses = [tensor.master, tensor.grad, tensor.m, tensor.v].map(CudaTensor::address);
        table.extend(addresses.into_iter().chain([copy, count as u64]));
        chunks.extend((0..count.div_ceil(CHUNK)).flat_map(|chunk| [index as i32, chunk as i32]));
    }
    if chunks.is_empty() {
        return;
    }
    let table = CudaTensor::from_bytes(
        gpu,
        bytemuck::cast_slice(&table),
        &[table.len()],
        DType::U64,
    );
    let count = chunks.len() / 2;
    let chunks = CudaTensor::from_bytes(
        gpu,
        bytemuck::cast_slice(&chunks),
        &[chunks.len()],
        DType::I32,
    );
    let kernel = gpu
        .kernel(
            "adamw",
            &[("PARAM", "float"), ("GRAD", "float")],
            "step_many",
        )
        .or_panic();
    // SAFETY: the table describes packed tensors of the sizes checked above; the chunks cover each exactly once.
    unsafe {
        launch!(gpu, kernel, Launch::linear(count, 256); table.address(), chunks.address(), Numbers::new(step)).or_panic();
    }
}

/// Writes partial sums of squares (`square`) or sums of `x` to `partial`, one per block.
fn queue_sum(x: &CudaTensor, partial: &CudaTensor, blocks: usize, square: bool) {
    let gpu = x.gpu();
    let kernel = gpu
        .kernel(
            "adamw",
            &[("PARAM", "float"), ("GRAD", type_name(x.dtype()))],
            "sum_squares",
        )
        .or_panic();
    // SAFETY: x is packed; `partial` holds one element per block.
    unsafe {
        launch!(gpu, kernel, Launch::linear(blocks, 512); partial.address(), x.address(), x.count() as i64, i32::from(square))
            .or_panic();
    }
}

pub(super) fn sum_squares(x: CudaTensor) -> CudaTensor {
    sum_squares_many(&[&x])
}

/// The sum of the squares of all elements of all tensors, `[1]` fp32. The order of additions is fixed.
///
/// # Panics
/// When there is no tensor.
#[track_caller]
pub fn sum_squares_many(tensors: &[&CudaTensor]) -> CudaTensor {
    let gpu = tensors
        .first()
        .expect("a sum over at least one tensor")
        .gpu();
    let tensors: Vec<CudaTensor> = tensors.iter().map(|x| x.packed()).collect();
    let per_tensor: Vec<usize> = tensors
        .iter()
        .map(|x| {
            x.count()
                .div_ceil(512 * 8)
                .clamp(1, gpu.multiprocessors * 4)
        })
        .collect();
    let partial = CudaTensor::empty(gpu, &[per_tensor.iter().sum()], DType::F32);
    let mut start = 0;
    for (x, &blocks) in tensors.iter().zip(&per_tensor) {
        queue_sum(x, &partial.clone().narrow(0, start, blocks), blocks, true);
        start += blocks;
    }
    let out = CudaTensor::empty(gpu, &[1], DType::F32);
    queue_sum(&partial, &out, 1, false);
    out
}
