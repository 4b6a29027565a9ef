//! Element-wise operations. Kernels: `kernels/elementwise.cu`, where each operation is a structure of the name used here.

use burn_backend::{BoolStore, DType, Scalar, TensorMetadata};

use crate::device::{Gpu, Launch, launch};
use crate::error::OrPanic;
use crate::tensor::CudaTensor;
use crate::view::Views;

const THREADS: u32 = 256;

/// Name of an element type in the kernels.
pub(crate) fn type_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "double",
        DType::F32 | DType::Flex32 => "float",
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        DType::I64 => "i64",
        DType::I32 => "i32",
        DType::I16 => "i16",
        DType::I8 => "i8",
        DType::U64 => "u64",
        DType::U32 => "u32",
        DType::U16 => "u16",
        DType::U8 | DType::Bool(BoolStore::Native | BoolStore::U8) => "u8",
        DType::Bool(BoolStore::U32) | DType::QFloat(_) => {
            panic!("dtype {dtype:?} is not supported on cuda")
        }
    }
}

/// The 8 bytes in which a scalar travels to a kernel whose first input has type `dtype`.
fn scalar_bits(scalar: Scalar, dtype: DType) -> u64 {
    match dtype {
        DType::F64 | DType::F32 | DType::Flex32 | DType::F16 | DType::BF16 => {
            scalar.elem::<f64>().to_bits()
        }
        DType::U64 => scalar.elem::<u64>(),
        _ => match scalar {
            Scalar::UInt(value) => value,
            other => other.elem::<i64>() as u64,
        },
    }
}

/// Blocks for `count` elements at `per_thread` each: enough to fill the GPU several times, then a loop.
pub(crate) fn blocks(gpu: &Gpu, count: usize, per_thread: usize) -> usize {
    count
        .div_ceil(per_thread * THREADS as usize)
        .clamp(1, gpu.multiprocessors * 32)
}

/// `out = op(inputs...; scalars)`. All operands have `out`'s shape; `out` may be one of the inputs.
#[track_caller]
pub(crate) fn run(
    op: &'static str,
    out: &CudaTensor,
    inputs: &[&CudaTensor],
    scalars: [Scalar; 2],
) {
    for input in inputs {
        assert_eq!(
            input.dims(),
            out.dims(),
            "{op}: operands have the output's shape"
        );
        assert_eq!(
            input.device(),
            out.device(),
            "{op}: operands are on one device"
        );
    }
    let count = out.count();
    if count == 0 {
        return;
    }
    let gpu = out.gpu();
    let first = inputs.first().unwrap_or(&out).dtype();
    let dtype = |position: usize| inputs.get(position).map_or(first, |input| input.dtype());
    let arity = ["0", "1", "2", "3"][inputs.len()];
    let defines = [
        ("OP", op),
        ("ARITY", arity),
        ("TYPE_O", type_name(out.dtype())),
        ("TYPE_A", type_name(first)),
        ("TYPE_B", type_name(dtype(1))),
        ("TYPE_C", type_name(dtype(2))),
    ];
    let [s0, s1] = scalars.map(|scalar| scalar_bits(scalar, first));
    let address = |position: usize| inputs.get(position).map_or(0, |input| input.address());
    let widest = inputs
        .iter()
        .map(|input| input.dtype().size())
        .chain([out.dtype().size()])
        .max()
        .unwrap_or(1);
    let vector = 16 / widest;
    let fits = |tensor: &CudaTensor| {
        tensor.is_packed()
            && tensor
                .address()
                .is_multiple_of((vector * tensor.dtype().size()) as u64)
    };
    // SAFETY: the kernels read `count` elements of each input and write as many of the output, at the views' offsets,
    // all of which lie inside their buffers.
    unsafe {
        if fits(out) && inputs.iter().all(|input| fits(input)) {
            let kernel = gpu.kernel("elementwise", &defines, "contiguous").or_panic();
            let shape = Launch::linear(blocks(gpu, count, vector), THREADS);
            launch!(gpu, kernel, shape; out.address(), address(0), address(1), address(2), s0, s1, count as i64)
        } else {
            let views = match inputs {
                [] => Views::of(&[out]),
                [a] => Views::of(&[out, a]),
                [a, b] => Views::of(&[out, a, b]),
                [a, b, c] => Views::of(&[out, a, b, c]),
                _ => unreachable!("arity was looked up above"),
            };
            let entry = if count < 1 << 31 { "strided32" } else { "strided64" };
            let kernel = gpu.kernel("elementwise", &defines, entry).or_panic();
            let shape = Launch::linear(blocks(gpu, count, 4), THREADS);
            launch!(gpu, kernel, shape; out.address(), address(0), address(1), address(2), views, s0, s1, count as i64)
        }
        .or_panic();
    }
}

const NONE: [Scalar; 2] = [Scalar::Int(0), Scalar::Int(0)];

/// Copies `from` into the view `to` of equal shape, converting if the dtypes differ.
#[track_caller]
pub(crate) fn copy_into(to: &CudaTensor, from: &CudaTensor) {
    assert_eq!(to.dims(), from.dims(), "a copy keeps the shape");
    let op = if to.dtype().is_bool() && !from.dtype().is_bool() {
        "IsTrue"
    } else {
        "Copy"
    };
    let same_type = op == "Copy" && type_name(to.dtype()) == type_name(from.dtype());
    if same_type && to.is_packed() && from.is_packed() {
        if to.count() > 0 {
            // SAFETY: both are packed, of one size, and distinct tensors.
            unsafe {
                to.gpu()
                    .copy(from.address(), to.address(), to.count() * to.dtype().size())
                    .or_panic()
            };
        }
        return;
    }
    run(op, to, &[from], NONE);
}

/// Where a result of `input`'s type and shape may go: `input` itself if nobody else sees it, else new memory.
fn result_like(input: &CudaTensor, dtype: DType) -> CudaTensor {
    if input.dtype() == dtype && input.is_unique() && input.is_packed() {
        input.clone()
    } else {
        CudaTensor::empty(input.gpu(), input.dims(), dtype)
    }
}

/// One input, same type out, no scalars.
#[track_caller]
pub(crate) fn unary(op: &'static str, x: CudaTensor) -> CudaTensor {
    unary_to(op, x, NONE, None)
}

/// One input and a scalar, same type out.
#[track_caller]
pub(crate) fn scalar(op: &'static str, x: CudaTensor, scalar: Scalar) -> CudaTensor {
    unary_to(op, x, [scalar, scalar], None)
}

/// One input, two scalars, and a result of `dtype` (of the input's type if `None`).
#[track_caller]
pub(crate) fn unary_to(
    op: &'static str,
    x: CudaTensor,
    scalars: [Scalar; 2],
    dtype: Option<DType>,
) -> CudaTensor {
    let out = result_like(&x, dtype.unwrap_or(x.dtype()));
    run(op, &out, &[&x], scalars);
    out
}

/// Two inputs, broadcast against each other, and a result of `dtype` (of the first input's type if `None`).
#[track_caller]
pub(crate) fn binary(
    op: &'static str,
    a: CudaTensor,
    b: CudaTensor,
    dtype: Option<DType>,
) -> CudaTensor {
    let shape = broadcast(a.dims(), b.dims());
    let (a, b) = (a.expand_if(&shape), b.expand_if(&shape));
    let dtype = dtype.unwrap_or(a.dtype());
    let out = if a.dtype() == dtype && a.is_unique() && a.is_packed() {
        a.clone()
    } else {
        result_like(&b, dtype)
    };
    run(op, &out, &[&a, &b], NONE);
    out
}

/// `mask ? value : x`, broadcast.
#[track_caller]
pub(crate) fn mask_where(x: CudaTensor, mask: CudaTensor, value: CudaTensor) -> CudaTensor {
    let shape = broadcast(&broadcast(x.dims(), mask.dims()), value.dims());
    let [x, mask, value] = [x, mask, value].map(|tensor| tensor.expand_if(&shape));
    let out = result_like(&x, x.dtype());
    run("MaskWhere", &out, &[&x, &mask, &value], NONE);
    out
}

/// `mask ? value : x`, broadcast.
#[track_caller]
pub(crate) fn mask_fill(x: CudaTensor, mask: CudaTensor, value: Scalar) -> CudaTensor {
    let shape = broadcast(x.dims(), mask.dims());
    let (x, mask) = (x.expand_if(&shape), mask.expand_if(&shape));
    let out = result_like(&x, x.dtype());
    run("MaskFill", &out, &[&x, &mask], [value, value]);
    out
}

/// A packed tensor of one value.
#[track_caller]
pub(crate) fn full(gpu: &'static Gpu, shape: &[usize], value: Scalar, dtype: DType) -> CudaTensor {
    let out = CudaTensor::empty(gpu, shape, dtype);
    run("Fill", &out, &[], [value, value]);
    out
}

/// A packed tensor of another dtype; the tensor itself if it has it already.
#[track_caller]
pub(crate) fn cast(x: CudaTensor, dtype: DType) -> CudaTensor {
    let dtype = crate::tensor::storage_dtype(dtype);
    if x.dtype() == dtype {
        return x;
    }
    if !dtype.is_bool() && type_name(x.dtype()) == type_name(dtype) {
        return x.reinterpret(dtype);
    }
    let out = CudaTensor::empty(x.gpu(), x.dims(), dtype);
    copy_into(&out, &x);
    out
}

/// `tensors` one after the other along dimension `d`.
#[track_caller]
pub(crate) fn concatenate(tensors: &[CudaTensor], d: usize) -> CudaTensor {
    let first = tensors.first().expect("concatenating at least one tensor");
    let mut shape = first.dims().to_vec();
    shape[d] = tensors.iter().map(|tensor| tensor.dims()[d]).sum();
    let out = CudaTensor::empty(first.gpu(), &shape, first.dtype());
    let mut start = 0;
    for tensor in tensors {
        let length = tensor.dims()[d];
        copy_into(&out.clone().narrow(d, start, length), tensor);
        start += length;
    }
    out
}

/// The shape two shapes broadcast to.
#[track_caller]
pub(crate) fn broadcast(a: &[usize], b: &[usize]) -> Vec<usize> {
    let rank = a.len().max(b.len());
    let at = |shape: &[usize], d: usize| {
        (d + shape.len())
            .checked_sub(rank)
            .map_or(1, |own| shape[own])
    };
    (0..rank)
        .map(|d| match (at(a, d), at(b, d)) {
            (x, y) if x == y => x,
            (1, y) => y,
            (x, 1) => x,
            _ => panic!("shapes {a:?} and {b:?} do not broadcast"),
        })
        .collect()
}

impl CudaTensor {
    /// Expanded to `shape`, untouched if it has it.
    #[track_caller]
    fn expand_if(self, shape: &[usize]) -> Self {
        if self.dims() == shape {
            self
        } else {
            self.expand(shape)
        }
    }
}
