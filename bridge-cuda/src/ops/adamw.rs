//! AdamW and the norm of gradients. Kernels: `kernels/adamw.cu`.

use bridge_ops::{AdamWStep, AdamWTensors};
use burn_backend::{DType, TensorMetadata};

use crate::backend::Cuda;
use crate::device::{Argument, Gpu, Launch, launch};
use crate::elementwise::{blocks, cast, concatenate, type_name};
use crate::error::OrPanic;
use crate::reduce::{Reduction, reduce_all};
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
        m.into_writable(),
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
        let defines = defines(param.dtype(), grad.dtype(), m.dtype());
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

fn defines(param: DType, grad: DType, mean: DType) -> [(&'static str, &'static str); 3] {
    [
        ("PARAM", type_name(param)),
        ("GRAD", type_name(grad)),
        ("MEAN", type_name(mean)),
    ]
}

/// Where the parts of a weight lie, as the kernels take it. Mirrors `Tensor` in `kernels/adamw.cu`.
#[derive(Clone, Copy, Default)]
struct Entry {
    param: u64,
    grad: u64,
    m: u64,
    v: u64,
    /// 0 where there is none.
    copy: u64,
    /// The lower half of the weight, where `param` is 0 and `copy` the upper one.
    lower: u64,
    count: u64,
}

impl Entry {
    fn words(&self) -> [u64; 7] {
        let Self {
            param,
            grad,
            m,
            v,
            copy,
            lower,
            count,
        } = *self;
        [param, grad, m, v, copy, lower, count]
    }
}

/// A list of tensors cut into chunks of [`CHUNK`] elements, one for each block of a launch.
struct Chunks {
    table: CudaTensor,
    chunks: CudaTensor,
    blocks: usize,
}

impl Chunks {
    /// `None` where there is nothing to do.
    fn new(gpu: &'static Gpu, entries: &[Entry]) -> Option<Self> {
        let chunks: Vec<[i32; 2]> = (entries.iter().enumerate())
            .flat_map(|(index, entry)| {
                (0..entry.count.div_ceil(CHUNK as u64))
                    .map(move |chunk| [index as i32, chunk as i32])
            })
            .collect();
        if chunks.is_empty() {
            return None;
        }
        let words: Vec<u64> = entries.iter().flat_map(Entry::words).collect();
        Some(Self {
            table: CudaTensor::from_bytes(
                gpu,
                bytemuck::cast_slice(&words),
                &[words.len()],
                DType::U64,
            ),
            chunks: CudaTensor::from_bytes(
                gpu,
                bytemuck::cast_slice(&chunks),
                &[chunks.len(), 2],
                DType::I32,
            ),
            blocks: chunks.len(),
        })
    }
}

/// The dtypes of gradients and their means that the list kernels take.
const LISTED: [DType; 2] = [DType::F32, DType::BF16];

/// Whether the list kernels can work on a tensor where it lies.
fn fits(x: &CudaTensor, dtype: DType, count: usize) -> bool {
    x.dtype() == dtype && x.count() == count && x.is_packed() && x.address().is_multiple_of(16)
}

/// One update of all tensors, in one launch for all those of like dtypes. Tensors whose layout the list kernel does not
/// take go one by one.
pub(super) fn step_many(
    tensors: Vec<AdamWTensors<Cuda>>,
    step: &AdamWStep,
) -> Vec<AdamWTensors<Cuda>> {
    let mut grads = Vec::new();
    // By dtype of gradient and mean.
    let mut lists: Vec<((DType, DType), Vec<Entry>)> = Vec::new();
    let tensors: Vec<AdamWTensors<Cuda>> = tensors
        .into_iter()
        .map(|mut t| {
            let Some(grad) = t.grad.take() else { return t };
            let count = t.master.count();
            let is_lower = t.master.dtype() != DType::F32;
            let master_fits = if is_lower {
                fits(&t.master, DType::BF16, count) && t.copy.is_some()
            } else {
                fits(&t.master, DType::F32, count)
            };
            let copy_fits = t
                .copy
                .as_ref()
                .is_none_or(|copy| fits(copy, DType::BF16, count) && copy.is_unique());
            let dtypes = (grad.dtype(), t.m.dtype());
            let listed = master_fits
                && copy_fits
                && LISTED.contains(&dtypes.0)
                && LISTED.contains(&dtypes.1)
                && fits(&grad, dtypes.0, count)
                && fits(&t.m, dtypes.1, count)
                && fits(&t.v, DType::F32, count)
                && [&t.master, &t.m, &t.v].iter().all(|x| x.is_unique());
            if !listed {
                t.grad = Some(grad);
                return AdamWTensors::step_by_parts(t, step);
            }
            let master = t.master.address();
            let entry = Entry {
                param: if is_lower { 0 } else { master },
                lower: if is_lower { master } else { 0 },
                grad: grad.address(),
                m: t.m.address(),
                v: t.v.address(),
                copy: t.copy.as_ref().map_or(0, CudaTensor::address),
                count: count as u64,
            };
            match lists.iter_mut().find(|(of, _)| *of == dtypes) {
                Some((_, list)) => list.push(entry),
                None => lists.push((dtypes, vec![entry])),
            }
            grads.push(grad);
            t
        })
        .collect();
    let Some(gpu) = grads.first().map(CudaTensor::gpu) else {
        return tensors;
    };
    for ((grad, mean), entries) in &lists {
        let Some(list) = Chunks::new(gpu, entries) else {
            continue;
        };
        let defines = defines(DType::F32, *grad, *mean);
        let kernel = gpu.kernel("adamw", &defines, "step_many").or_panic();
        let shape = Launch::linear(list.blocks, 256);
        // SAFETY: the table describes packed tensors of the sizes checked above, of which those that are written are
        // owned by nobody else; the chunks cover each exactly once.
        unsafe {
            launch!(gpu, kernel, shape; list.table.address(), list.chunks.address(), Numbers::new(step)).or_panic();
        }
    }
    tensors
}

/// Cuts f32 weights into bf16 numbers and what they lack.
pub(super) fn split_halves(weight: CudaTensor) -> (CudaTensor, CudaTensor) {
    let weight = cast(weight, DType::F32).packed();
    let gpu = weight.gpu();
    let half = || CudaTensor::empty(gpu, weight.dims(), DType::BF16);
    let (upper, lower) = (half(), half());
    queue_halves("split_halves", &weight, &upper, &lower);
    (upper, lower)
}

/// Puts them together again.
pub(super) fn join_halves(upper: CudaTensor, lower: CudaTensor) -> CudaTensor {
    let (upper, lower) = (upper.packed(), lower.packed());
    let weight = CudaTensor::empty(upper.gpu(), upper.dims(), DType::F32);
    queue_halves("join_halves", &weight, &upper, &lower);
    weight
}

fn queue_halves(entry: &'static str, weight: &CudaTensor, upper: &CudaTensor, lower: &CudaTensor) {
    let (gpu, count) = (weight.gpu(), weight.count());
    assert!(
        [upper, lower]
            .iter()
            .all(|x| x.count() == count && x.dtype() == DType::BF16),
        "halves: two bf16 tensors of the weight's shape"
    );
    if count == 0 {
        return;
    }
    let defines = defines(DType::F32, DType::F32, DType::F32);
    let kernel = gpu.kernel("adamw", &defines, entry).or_panic();
    let shape = Launch::linear(blocks(gpu, count, 1), 256);
    // SAFETY: packed operands of `count` elements; what is written was just allocated.
    unsafe {
        launch!(gpu, kernel, shape; weight.address(), upper.address(), lower.address(), count as i64).or_panic();
    }
}

/// Writes partial sums of squares (`square`) or sums of `x` to `partial`, one per block.
fn queue_sum(x: &CudaTensor, partial: &CudaTensor, blocks: usize, square: bool) {
    let gpu = x.gpu();
    let defines = defines(DType::F32, x.dtype(), DType::F32);
    let kernel = gpu.kernel("adamw", &defines, "sum_squares").or_panic();
    // SAFETY: x is packed; `partial` holds one element per block.
    unsafe {
        launch!(gpu, kernel, Launch::linear(blocks, 512); partial.address(), x.address(), x.count() as i64, i32::from(square))
            .or_panic();
    }
}

pub(super) fn sum_squares(x: CudaTensor) -> CudaTensor {
    let x = x.packed();
    let blocks = x
        .count()
        .div_ceil(512 * 8)
        .clamp(1, x.gpu().multiprocessors * 4);
    let partial = CudaTensor::empty(x.gpu(), &[blocks], DType::F32);
    queue_sum(&x, &partial, blocks, true);
    let out = CudaTensor::empty(x.gpu(), &[1], DType::F32);
    queue_sum(&partial, &out, 1, false);
    out
}

/// The sum of the squares of all elements of all tensors, `[1]` fp32. The order of additions is fixed.
#[track_caller]
pub(super) fn sum_squares_many(tensors: &[CudaTensor]) -> CudaTensor {
    let first = tensors.first().expect("a sum over at least one tensor");
    let gpu = first.gpu();
    let dtype = first.dtype();
    let listed = |x: &CudaTensor| fits(x, dtype, x.count());
    if !LISTED.contains(&dtype) || !tensors.iter().all(listed) {
        let sums: Vec<CudaTensor> = tensors.iter().cloned().map(sum_squares).collect();
        return reduce_all(Reduction::Sum, concatenate(&sums, 0), DType::F32);
    }
    let entries: Vec<Entry> = tensors
        .iter()
        .map(|x| Entry {
            grad: x.address(),
            count: x.count() as u64,
            ..Entry::default()
        })
        .collect();
    let Some(list) = Chunks::new(gpu, &entries) else {
        return CudaTensor::zeros(gpu, &[1], DType::F32);
    };
    let partial = CudaTensor::empty(gpu, &[list.blocks], DType::F32);
    let defines = defines(DType::F32, dtype, DType::F32);
    let kernel = gpu.kernel("adamw", &defines, "sum_squares_many").or_panic();
    // SAFETY: the table describes packed tensors, the chunks cover each exactly once, `partial` has one element a block.
    unsafe {
        launch!(gpu, kernel, Launch::linear(list.blocks, 256); partial.address(), list.table.address(), list.chunks.address())
            .or_panic();
    }
    let out = CudaTensor::empty(gpu, &[1], DType::F32);
    queue_sum(&partial, &out, 1, false);
    out
}
