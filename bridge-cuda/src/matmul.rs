//! Matrix products of strided tensors: transposes become flags, batches become strides, nothing is copied unless a view
//! has no layout that cuBLASLt understands.

use burn_backend::{DType, TensorMetadata};

use crate::cublaslt::{Layout, Operands, Product};
use crate::device::{Launch, launch};
use crate::elementwise::{blocks, broadcast, cast, type_name};
use crate::error::OrPanic;
use crate::tensor::CudaTensor;

/// A matrix operand in memory order: `transposed` means that its rows, not its columns, step by `ld`... seen row-major,
/// a plain matrix has neighbouring columns next to each other, a transposed one neighbouring rows.
#[derive(Debug, Clone, Copy)]
struct Matrix {
    transposed: bool,
    ld: usize,
}

/// How cuBLASLt can read a `[rows, columns]` view, if it can.
fn matrix(rows: usize, columns: usize, row_stride: i64, column_stride: i64) -> Option<Matrix> {
    let fits = |step: i64, length: usize, other: usize| {
        // A dimension of size 1 has no stride worth the name.
        if other <= 1 {
            Some(length.max(1))
        } else {
            usize::try_from(step)
                .ok()
                .filter(|step| *step >= length.max(1))
        }
    };
    if (column_stride == 1 || columns <= 1)
        && let Some(ld) = fits(row_stride, columns, rows)
    {
        return Some(Matrix {
            transposed: false,
            ld,
        });
    }
    if (row_stride == 1 || rows <= 1)
        && let Some(ld) = fits(column_stride, rows, columns)
    {
        return Some(Matrix {
            transposed: true,
            ld,
        });
    }
    None
}

/// The last two dimensions as a matrix, copying the tensor if they have no usable layout.
fn operand(x: CudaTensor) -> (CudaTensor, Matrix) {
    let rank = x.dims().len();
    let view = |x: &CudaTensor| {
        matrix(
            x.dims()[rank - 2],
            x.dims()[rank - 1],
            x.strides()[rank - 2],
            x.strides()[rank - 1],
        )
    };
    match view(&x) {
        Some(layout) => (x, layout),
        None => {
            let copy = x.copied();
            let layout = view(&copy).expect("a packed matrix has a layout");
            (copy, layout)
        }
    }
}

/// One stride that walks all batch dimensions, if there is one.
fn batch_stride(shape: &[usize], strides: &[i64]) -> Option<i64> {
    let mut run: Option<(usize, i64)> = None;
    for (&size, &stride) in shape
        .iter()
        .zip(strides)
        .rev()
        .filter(|(size, _)| **size != 1)
    {
        run = match run {
            None => Some((size, stride)),
            Some((count, step)) if stride == step * count as i64 => Some((count * size, step)),
            Some(_) => return None,
        };
    }
    Some(run.map_or(0, |(_, step)| step))
}

/// `a @ b` over the last two dimensions, the others broadcast. The result has the operands' type.
#[track_caller]
pub(crate) fn matmul(a: CudaTensor, b: CudaTensor) -> CudaTensor {
    let rank = a.dims().len().max(b.dims().len());
    let (m, k) = (a.dims()[a.dims().len() - 2], a.dims()[a.dims().len() - 1]);
    let (k_b, n) = (b.dims()[b.dims().len() - 2], b.dims()[b.dims().len() - 1]);
    assert_eq!(
        k,
        k_b,
        "matmul: {:?} and {:?} disagree on the inner dimension",
        a.dims(),
        b.dims()
    );
    let batch = broadcast(
        &a.dims()[..a.dims().len() - 2],
        &b.dims()[..b.dims().len() - 2],
    );
    let full = |rows, columns| [batch.as_slice(), &[rows, columns]].concat();
    let (a, b) = (a.expand(&full(m, k)), b.expand(&full(k, n)));
    let out = CudaTensor::empty(a.gpu(), &full(m, n), a.dtype());
    if out.count() == 0 {
        return out;
    }
    if k == 0 {
        return CudaTensor::zeros(a.gpu(), out.dims(), out.dtype());
    }
    if !a.dtype().is_float() {
        return integer(a, b, out);
    }
    assert_eq!(a.dtype(), b.dtype(), "matmul: operands have one type");
    let ((a, a_matrix), (b, b_matrix)) = (operand(a), operand(b));
    // Leading batch dimensions that do not step evenly with the rest are looped over.
    let batch_rank = rank - 2;
    let from = (0..=batch_rank)
        .find(|&d| {
            [&a, &b].iter().all(|x| {
                batch_stride(&x.dims()[d..batch_rank], &x.strides()[d..batch_rank]).is_some()
            })
        })
        .expect("an empty batch steps evenly");
    let loops: usize = batch[..from].iter().product();
    if loops > 64 {
        return multiply(a.packed(), b.packed(), out);
    }
    let count = batch[from..].iter().product();
    let strides = |x: &CudaTensor| {
        batch_stride(&x.dims()[from..batch_rank], &x.strides()[from..batch_rank]).unwrap_or(0)
    };
    let product = Shape {
        m,
        n,
        k,
        batch: count,
    };
    for step in 0..loops {
        let at = |x: &CudaTensor| {
            x.address()
                + (offset(step, &batch[..from], x.strides()) * x.dtype().size() as i64) as u64
        };
        let (a_at, b_at, d_at) = (at(&a), at(&b), at(&out));
        let inputs = [
            (a_at, a.dtype(), a_matrix, strides(&a)),
            (b_at, b.dtype(), b_matrix, strides(&b)),
        ];
        // SAFETY: the layouts come from the views themselves; `out` is new memory.
        unsafe {
            gemm(
                out.gpu(),
                &product,
                inputs,
                (d_at, out.dtype(), (m * n) as i64),
                None,
                None,
            )
            .or_panic()
        };
    }
    out
}

fn multiply(a: CudaTensor, b: CudaTensor, out: CudaTensor) -> CudaTensor {
    let shape = out.dims().to_vec();
    let flat = |x: &CudaTensor| {
        let rank = x.dims().len();
        let batch = x.dims()[..rank - 2].iter().product();
        x.clone()
            .reshape(&[batch, x.dims()[rank - 2], x.dims()[rank - 1]])
    };
    matmul(flat(&a), flat(&b)).reshape(&shape)
}

/// Offset, in elements, of position `index` of the given leading dimensions.
fn offset(mut index: usize, shape: &[usize], strides: &[i64]) -> i64 {
    let mut offset = 0;
    for (&size, &stride) in shape.iter().zip(strides).rev() {
        offset += (index % size) as i64 * stride;
        index /= size;
    }
    offset
}

struct Shape {
    m: usize,
    n: usize,
    k: usize,
    batch: usize,
}

/// Queues `d = a b` (`+ c` at the address `add`, `+ bias`) for row-major `d` of packed rows. cuBLASLt is column-major, in which `d` is its own
/// transpose, so the operands trade places.
///
/// # Safety
/// The addresses and layouts must describe device memory; `d` must not overlap the inputs.
unsafe fn gemm(
    gpu: &'static crate::device::Gpu,
    shape: &Shape,
    [
        (a, a_type, a_matrix, a_stride),
        (b, b_type, b_matrix, b_stride),
    ]: [(u64, DType, Matrix, i64); 2],
    (d, d_type, d_stride): (u64, DType, i64),
    add: Option<u64>,
    bias: Option<&CudaTensor>,
) -> crate::error::Result<()> {
    let Shape { m, n, k, batch } = *shape;
    let layout = |dtype, rows: usize, columns: usize, matrix: Matrix, batch_stride| {
        let (rows, columns) = if matrix.transposed {
            (rows, columns)
        } else {
            (columns, rows)
        };
        Layout {
            dtype,
            rows,
            columns,
            ld: matrix.ld,
            batch_stride,
        }
    };
    let product = Product {
        a: layout(b_type, k, n, b_matrix, b_stride),
        transpose_a: b_matrix.transposed,
        b: layout(a_type, m, k, a_matrix, a_stride),
        transpose_b: a_matrix.transposed,
        d: Layout {
            dtype: d_type,
            rows: n,
            columns: m,
            ld: n,
            batch_stride: d_stride,
        },
        batch,
        accumulate: add.is_some(),
        bias: bias.map(|bias| bias.dtype()),
    };
    let operands = Operands {
        a: b,
        b: a,
        c: add.unwrap_or(d),
        d,
        bias: bias.map_or(0, CudaTensor::address),
    };
    // SAFETY: as the caller promises.
    unsafe { gpu.blas()?.run(&product, &operands) }
}

/// `out = a b (+ add) (+ bias)` for matrices, into a packed tensor that the caller may write. `add` is packed and like
/// `out`, or `out` itself. Types may differ as far as cuBLASLt allows: bf16 inputs with an f32 result accumulate a
/// gradient.
#[track_caller]
pub(crate) fn matmul_into(
    out: &CudaTensor,
    a: CudaTensor,
    b: CudaTensor,
    add: Option<&CudaTensor>,
    bias: Option<&CudaTensor>,
) {
    let (m, k, n) = (a.dims()[0], a.dims()[1], b.dims()[1]);
    assert_eq!(
        b.dims()[0],
        k,
        "matmul: operands disagree on the inner dimension"
    );
    assert_eq!(
        out.dims(),
        [m, n],
        "matmul: the result has the operands' outer dimensions"
    );
    assert!(out.is_packed(), "matmul: results are packed");
    if let Some(add) = add {
        let alike = add.is_packed() && add.dims() == out.dims() && add.dtype() == out.dtype();
        assert!(alike, "matmul: what is added lies like the result");
    }
    if m * n == 0 {
        return;
    }
    if k == 0 {
        match add {
            Some(add) => crate::elementwise::copy_into(out, add),
            None => crate::elementwise::run("Fill", out, &[], [0.0.into(), 0.0.into()]),
        }
        return;
    }
    let ((a, a_matrix), (b, b_matrix)) = (operand(a), operand(b));
    let bias = bias.map(CudaTensor::packed);
    let inputs = [
        (a.address(), a.dtype(), a_matrix, 0),
        (b.address(), b.dtype(), b_matrix, 0),
    ];
    let shape = Shape { m, n, k, batch: 1 };
    // SAFETY: the layouts come from the views themselves; `out` is packed and the caller's to write.
    unsafe {
        gemm(
            out.gpu(),
            &shape,
            inputs,
            (out.address(), out.dtype(), 0),
            add.map(CudaTensor::address),
            bias.as_ref(),
        )
        .or_panic()
    };
}

/// Integers: operands packed, one thread per output.
fn integer(a: CudaTensor, b: CudaTensor, out: CudaTensor) -> CudaTensor {
    let rank = a.dims().len();
    let (m, k, n) = (a.dims()[rank - 2], a.dims()[rank - 1], b.dims()[rank - 1]);
    let (a, b) = (a.packed(), cast(b, out.dtype()).packed());
    let gpu = out.gpu();
    let kernel = gpu
        .kernel("matmul_int", &[("TYPE", type_name(out.dtype()))], "matmul")
        .or_panic();
    let total = out.count();
    let shape = Launch::linear(blocks(gpu, total, 1), 256);
    // SAFETY: packed operands of the sizes given.
    unsafe {
        launch!(gpu, kernel, shape; out.address(), a.address(), b.address(), total as i64, m as i64, n as i64, k as i64)
            .or_panic();
    }
    out
}

/// Lets products of f32 round their inputs to tf32, which is several times faster and accurate to about 3 digits.
///
/// # Errors
/// The device or cuBLASLt cannot be opened.
pub fn allow_tf32(device: crate::device::CudaDevice, allow: bool) -> crate::error::Result<()> {
    crate::device::Gpu::get(device.ordinal)?
        .blas()?
        .allow_tf32(allow);
    Ok(())
}

/// Lets large products measure cuBLASLt's candidates when they first run, and keep the fastest on disk. On unless
/// turned off; results then depend on the measurements in their last bits.
///
/// # Errors
/// The device or cuBLASLt cannot be opened.
pub fn allow_tuning(device: crate::device::CudaDevice, allow: bool) -> crate::error::Result<()> {
    crate::device::Gpu::get(device.ordinal)?
        .blas()?
        .allow_tuning(allow);
    Ok(())
}
