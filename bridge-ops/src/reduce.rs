//! Reductions to one number.

use burn_backend::TensorMetadata;

use crate::ops::Ops;
use crate::primitive::{Float, dims, float, reshaped, tensor, to_f32};
use crate::tape::{Tape, Var};

/// The sum of all elements, [1], in the dtype of `x`.
pub fn sum<B: Ops>(tape: &Tape<B>, x: &Var<B>) -> Var<B> {
    let shape = x.shape();
    let output = reshaped::<B>(B::float_sum(x.value()), &[1]);
    tape.record(output, &[x], move |dy| {
        let ones = reshaped::<B>(dy, &vec![1; shape.len()]);
        vec![Some(B::float_expand(ones, shape.into()))]
    })
}

pub(crate) fn portable_sum_squares<B: Ops>(x: Float<B>) -> Float<B> {
    let count = x.shape().num_elements();
    debug_assert_eq!(count, dims(&x).iter().product::<usize>());
    let x = tensor::<B, 1>(reshaped::<B>(to_f32::<B>(x), &[count]));
    float(x.square().sum())
}
