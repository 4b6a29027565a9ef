//! Between tensor primitives, which collectives and kernels take, and Burn's tensors, which have arithmetic.

use std::ops::Range;

use bridge_ops::{DType, Float, FloatDType, Ops};
use burn::tensor::{Tensor, TensorPrimitive};
use burn_backend::{Slice, TensorMetadata};

/// A primitive as a tensor of rank `D`, which must be its rank.
#[track_caller]
pub(crate) fn tensor<B: Ops, const D: usize>(x: Float<B>) -> Tensor<B, D> {
    assert_eq!(
        x.rank(),
        D,
        "expected a tensor of rank {D}, found {:?}",
        dims(&x)
    );
    Tensor::from_primitive(TensorPrimitive::Float(x))
}

/// The primitive inside a tensor.
pub(crate) fn float<B: Ops, const D: usize>(x: Tensor<B, D>) -> Float<B> {
    x.into_primitive().tensor()
}

/// The dimensions of a primitive.
pub(crate) fn dims<T: TensorMetadata>(x: &T) -> Vec<usize> {
    x.shape().to_vec()
}

/// A primitive `[.., last]` as a matrix `[rows, last]`.
pub(crate) fn matrix<B: Ops>(x: Float<B>) -> Tensor<B, 2> {
    let shape = dims(&x);
    let last = *shape.last().expect("a tensor of rank 0 is no matrix");
    let rows = shape[..shape.len() - 1].iter().product();
    tensor(reshaped::<B>(x, &[rows, last]))
}

/// The same elements in another shape.
pub(crate) fn reshaped<B: Ops>(x: Float<B>, shape: &[usize]) -> Float<B> {
    B::float_reshape(x, shape.to_vec().into())
}

/// Casts, where the dtype is another.
pub(crate) fn to_dtype<B: Ops>(x: Float<B>, dtype: DType) -> Float<B> {
    if x.dtype() == dtype {
        x
    } else {
        B::float_cast(x, FloatDType::from(dtype))
    }
}

/// Zeros.
pub(crate) fn zeros<B: Ops>(shape: &[usize], device: &B::Device, dtype: DType) -> Float<B> {
    B::float_zeros(shape.to_vec().into(), device, FloatDType::from(dtype))
}

/// The part of `x` whose index along `dim` is in `range`.
pub(crate) fn narrow<B: Ops>(x: Float<B>, dim: usize, range: Range<usize>) -> Float<B> {
    let shape = dims(&x);
    if range == (0..shape[dim]) {
        return x;
    }
    B::float_slice(x, &slices(shape.len(), dim, range))
}

/// `x` with `value` in place of the part whose index along `dim` is in `range`.
pub(crate) fn replaced<B: Ops>(
    x: Float<B>,
    dim: usize,
    range: Range<usize>,
    value: Float<B>,
) -> Float<B> {
    let rank = x.rank();
    B::float_slice_assign(x, &slices(rank, dim, range), value)
}

fn slices(rank: usize, dim: usize, range: Range<usize>) -> Vec<Slice> {
    let mut slices = vec![Slice::full(); rank];
    slices[dim] = range.into();
    slices
}
