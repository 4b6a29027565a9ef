//! Gathering and scattering along a dimension. Kernels: `kernels/index.cu`.

use burn_backend::TensorMetadata;

use crate::device::{Launch, launch};
use crate::elementwise::{blocks, type_name};
use crate::error::OrPanic;
use crate::tensor::CudaTensor;

const THREADS: u32 = 256;

/// Sizes around dimension `d`: product before, the dimension, product after.
fn around(shape: &[usize], d: usize) -> (usize, usize, usize) {
    (
        shape[..d].iter().product(),
        shape[d],
        shape[d + 1..].iter().product(),
    )
}

/// `out[o, k, i] = x[o, indices[o, k, i], i]`.
#[track_caller]
pub(crate) fn gather(d: usize, x: CudaTensor, indices: CudaTensor) -> CudaTensor {
    let (outer, size, inner) = around(x.dims(), d);
    let (index_outer, count, index_inner) = around(indices.dims(), d);
    assert_eq!(
        (outer, inner),
        (index_outer, index_inner),
        "gather: indices match the tensor outside dimension {d}"
    );
    lookup(
        "gather",
        x,
        indices.dims().to_vec(),
        &indices,
        (size, count, inner),
    )
}

/// `out[o, k, i] = x[o, indices[k], i]`.
#[track_caller]
pub(crate) fn select(x: CudaTensor, d: usize, indices: CudaTensor) -> CudaTensor {
    let (_, size, inner) = around(x.dims(), d);
    let mut shape = x.dims().to_vec();
    shape[d] = indices.count();
    lookup("select", x, shape, &indices, (size, indices.count(), inner))
}

fn lookup(
    entry: &'static str,
    x: CudaTensor,
    shape: Vec<usize>,
    indices: &CudaTensor,
    (size, count, inner): (usize, usize, usize),
) -> CudaTensor {
    let (x, indices) = (x.packed(), indices.packed());
    let gpu = x.gpu();
    let out = CudaTensor::empty(gpu, &shape, x.dtype());
    let total = out.count();
    if total == 0 {
        return out;
    }
    let defines = [
        ("TYPE", type_name(x.dtype())),
        ("INDEX", type_name(indices.dtype())),
    ];
    let kernel = gpu.kernel("index", &defines, entry).or_panic();
    let shape = Launch::linear(blocks(gpu, total, 4), THREADS);
    // SAFETY: packed operands of the sizes given. That the indices lie inside is the caller's contract, as for every
    // Burn backend.
    unsafe {
        launch!(gpu, kernel, shape; out.address(), x.address(), indices.address(), total as i64, size as i64, count as i64, inner as i64)
            .or_panic();
    }
    out
}

/// What a scatter does with a value and what is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scatter {
    Add,
    Or,
}

/// `x[o, indices[o, k, i], i] += values[o, k, i]`.
#[track_caller]
pub(crate) fn scatter(
    op: Scatter,
    d: usize,
    x: CudaTensor,
    indices: CudaTensor,
    values: CudaTensor,
) -> CudaTensor {
    assert_eq!(
        indices.dims(),
        values.dims(),
        "scatter: one index for each value"
    );
    let (outer, _, inner) = around(x.dims(), d);
    let (index_outer, _, index_inner) = around(indices.dims(), d);
    assert_eq!(
        (outer, inner),
        (index_outer, index_inner),
        "scatter: indices match the tensor outside dimension {d}"
    );
    accumulate("scatter", op, d, x, indices, values)
}

/// `x[o, indices[k], i] += values[o, k, i]`.
#[track_caller]
pub(crate) fn select_add(
    op: Scatter,
    d: usize,
    x: CudaTensor,
    indices: CudaTensor,
    values: CudaTensor,
) -> CudaTensor {
    assert_eq!(
        indices.count(),
        values.dims()[d],
        "select_assign: one index for each slice of the values"
    );
    accumulate("select_add", op, d, x, indices, values)
}

fn accumulate(
    entry: &'static str,
    op: Scatter,
    d: usize,
    x: CudaTensor,
    indices: CudaTensor,
    values: CudaTensor,
) -> CudaTensor {
    let out = x.into_writable();
    let (indices, values) = (indices.packed(), values.packed());
    let (outer, size, inner) = around(out.dims(), d);
    let count = values.dims()[d];
    let lines = outer * inner;
    if lines == 0 || count == 0 {
        return out;
    }
    let gpu = out.gpu();
    let op = if op == Scatter::Add { "Plus" } else { "Or" };
    let defines = [
        ("TYPE", type_name(out.dtype())),
        ("INDEX", type_name(indices.dtype())),
        ("OP", op),
    ];
    let kernel = gpu.kernel("index", &defines, entry).or_panic();
    let shape = Launch::linear(lines.div_ceil(THREADS as usize), THREADS);
    // SAFETY: packed operands of the sizes given, `out` owned by nobody else; indices lie inside, as for `lookup`.
    unsafe {
        launch!(gpu, kernel, shape; out.address(), indices.address(), values.address(), lines as i64, size as i64, count as i64, inner as i64)
            .or_panic();
    }
    out
}
