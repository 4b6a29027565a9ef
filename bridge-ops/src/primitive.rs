//! Primitive tensors: the untyped-rank values that kernels take, and the bridge to Burn's `Tensor<B, D>`.

use burn::tensor::{Tensor, TensorPrimitive};
use burn_backend::{Backend, BackendTypes, DType, FloatDType, Shape, TensorMetadata};

/// A float tensor of backend `B`: any rank, dtype known at run time. Cloning shares the buffer.
pub type Float<B> = <B as BackendTypes>::FloatTensorPrimitive;
/// An integer tensor of backend `B`: any rank, dtype known at run time. Cloning shares the buffer.
pub type Int<B> = <B as BackendTypes>::IntTensorPrimitive;

/// Views a primitive as a Burn tensor of rank `D`, which must be its rank.
#[track_caller]
pub(crate) fn tensor<B: Backend, const D: usize>(x: Float<B>) -> Tensor<B, D> {
    assert_eq!(
        x.rank(),
        D,
        "expected a tensor of rank {D}, found shape {:?}",
        dims(&x)
    );
    Tensor::from_primitive(TensorPrimitive::Float(x))
}

/// Views a primitive `[.., last]` as a matrix `[rows, last]`.
pub(crate) fn matrix<B: Backend>(x: Float<B>) -> Tensor<B, 2> {
    let (rows, last) = rows_and_last(&dims(&x));
    tensor(B::float_reshape(x, Shape::from(vec![rows, last])))
}

/// The primitive inside a Burn tensor.
pub(crate) fn float<B: Backend, const D: usize>(x: Tensor<B, D>) -> Float<B> {
    x.into_primitive().tensor()
}

/// Gives a tensor the shape `dims`.
pub(crate) fn reshaped<B: Backend>(x: Float<B>, dims: &[usize]) -> Float<B> {
    B::float_reshape(x, Shape::from(dims.to_vec()))
}

/// The dimensions of a primitive.
pub(crate) fn dims<T: TensorMetadata>(x: &T) -> Vec<usize> {
    x.shape().to_vec()
}

/// `[.., last]` seen as a matrix: product of the leading dimensions, and the last one.
pub(crate) fn rows_and_last(dims: &[usize]) -> (usize, usize) {
    let (last, leading) = dims
        .split_last()
        .expect("a tensor of rank 0 has no last dimension");
    (leading.iter().product(), *last)
}

/// Casts to `dtype`; no work when it has that dtype already.
pub(crate) fn to_dtype<B: Backend>(x: Float<B>, dtype: DType) -> Float<B> {
    if x.dtype() == dtype {
        x
    } else {
        B::float_cast(x, FloatDType::from(dtype))
    }
}

/// Casts to fp32, in which norms, softmax and losses are computed whatever the storage dtype.
pub(crate) fn to_f32<B: Backend>(x: Float<B>) -> Float<B> {
    to_dtype::<B>(x, DType::F32)
}
