//! Reductions over a dimension. Kernels: `kernels/reduce.cu`.

use burn_backend::{DType, TensorMetadata};

use crate::device::{Launch, launch};
use crate::elementwise::type_name;
use crate::error::OrPanic;
use crate::tensor::CudaTensor;
use crate::view::Views;

const THREADS: u32 = 256;

/// A reduction, named as in the kernel file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reduction {
    Sum,
    Mean,
    Product,
    Maximum,
    Minimum,
    MaxAbs,
}

impl Reduction {
    fn name(self) -> &'static str {
        match self {
            Reduction::Sum | Reduction::Mean => "Sum",
            Reduction::Product => "Product",
            Reduction::Maximum => "Maximum",
            Reduction::Minimum => "Minimum",
            Reduction::MaxAbs => "MaxAbs",
        }
    }
}

/// The type in which the kernels accumulate.
fn accumulator(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        DType::F32 | DType::F16 | DType::BF16 => DType::F32,
        DType::U64 => DType::U64,
        _ => DType::I64,
    }
}

/// Shape and strides without dimension `d`.
fn outputs(x: &CudaTensor, d: usize) -> (usize, Views) {
    let keep = |position: &usize| *position != d;
    let shape: Vec<usize> = (0..x.dims().len())
        .filter(keep)
        .map(|i| x.dims()[i])
        .collect();
    let strides: Vec<i64> = (0..x.dims().len())
        .filter(keep)
        .map(|i| x.strides()[i])
        .collect();
    (shape.iter().product(), Views::new(&shape, &[&strides]))
}

/// Reduces dimension `d` to size 1. The result has type `dtype`.
#[track_caller]
pub(crate) fn reduce(op: Reduction, x: &CudaTensor, d: usize, dtype: DType) -> CudaTensor {
    let n = x.dims()[d];
    let mut shape = x.dims().to_vec();
    shape[d] = 1;
    let (count, views) = outputs(x, d);
    let gpu = x.gpu();
    let scale = if op == Reduction::Mean {
        1.0 / n as f64
    } else {
        1.0
    };
    let (entry, blocks) = if x.strides()[d].abs() == 1 || count < 256 {
        if n <= 1024 && count >= 64 {
            ("warps", count.div_ceil(THREADS as usize / 32))
        } else {
            ("rows", count)
        }
    } else {
        ("columns", count.div_ceil(THREADS as usize))
    };
    // Too few blocks to fill the GPU: split the reduced dimension and finish in a second launch.
    let splits = (gpu.multiprocessors * 2 / blocks.max(1))
        .min(n / 512)
        .max(1);
    if splits > 1 {
        let partial_type = accumulator(x.dtype());
        let partial = CudaTensor::empty(gpu, &[splits, count], partial_type);
        queue(
            op,
            entry,
            &partial,
            x,
            &views,
            (count, n, x.strides()[d], splits, blocks),
            1.0,
        );
        let out = CudaTensor::empty(gpu, &[1, count], dtype);
        let (_, views) = outputs(&partial, 0);
        let blocks = count.div_ceil(THREADS as usize);
        // The partial results of |x| are not negative, so that their maximum is that of their absolute values.
        queue(
            op,
            "columns",
            &out,
            &partial,
            &views,
            (count, splits, count as i64, 1, blocks),
            scale,
        );
        return out.reshape(&shape);
    }
    let out = CudaTensor::empty(gpu, &shape, dtype);
    queue(
        op,
        entry,
        &out,
        x,
        &views,
        (count, n, x.strides()[d], 1, blocks),
        scale,
    );
    out
}

fn queue(
    op: Reduction,
    entry: &'static str,
    out: &CudaTensor,
    x: &CudaTensor,
    views: &Views,
    (count, n, stride, splits, blocks): (usize, usize, i64, usize, usize),
    scale: f64,
) {
    if count == 0 {
        return;
    }
    let gpu = x.gpu();
    let defines = [
        ("TYPE", type_name(x.dtype())),
        ("TYPE_O", type_name(out.dtype())),
        ("OP", op.name()),
    ];
    let kernel = gpu.kernel("reduce", &defines, entry).or_panic();
    let shape = Launch::grid([blocks, splits, 1], THREADS);
    // SAFETY: the kernel reads inside the view and writes `splits * count` elements, which `out` holds.
    unsafe {
        launch!(gpu, kernel, shape; out.address(), x.address(), *views, count as i64, n as i64, stride, scale).or_panic();
    }
}

/// Reduces all elements to a tensor of shape `[1]`.
#[track_caller]
pub(crate) fn reduce_all(op: Reduction, x: CudaTensor, dtype: DType) -> CudaTensor {
    let count = x.count();
    reduce(op, &x.reshape(&[count]), 0, dtype)
}

/// Position of the largest or smallest element along dimension `d`, the first of equals.
#[track_caller]
pub(crate) fn arg_reduce(op: Reduction, x: &CudaTensor, d: usize, dtype: DType) -> CudaTensor {
    let n = x.dims()[d];
    let mut shape = x.dims().to_vec();
    shape[d] = 1;
    let (count, views) = outputs(x, d);
    let out = CudaTensor::empty(x.gpu(), &shape, dtype);
    if count == 0 {
        return out;
    }
    assert!(n > 0, "an arg-reduction needs at least one element");
    let gpu = x.gpu();
    let defines = [
        ("TYPE", type_name(x.dtype())),
        ("TYPE_O", type_name(dtype)),
        ("OP", op.name()),
        ("ARG", "1"),
    ];
    let kernel = gpu.kernel("reduce", &defines, "arg_warps").or_panic();
    let launch = Launch::linear(count.div_ceil(THREADS as usize / 32), THREADS);
    // SAFETY: the kernel reads inside the view and writes `count` elements.
    unsafe {
        launch!(gpu, kernel, launch; out.address(), x.address(), views, count as i64, n as i64, x.strides()[d]).or_panic();
    }
    out
}
