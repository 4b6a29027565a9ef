//! Vectors of length one.
//!
//! ```text
//! r  = 1 / sqrt(sum(x^2) + eps)     per row of x: [.., h]
//! y  = x r
//! dx = r (dy - y sum(dy y))
//! ```
//!
//! Computed in fp32 and rounded to the dtype of `x` at the end.

use burn::tensor::Tensor;
use burn_backend::TensorMetadata;

use crate::ops::Ops;
use crate::primitive::{Float, dims, float, matrix, reshaped, to_dtype, to_f32};
use crate::tape::{Tape, Var};

/// `x / sqrt(sum(x^2) + eps)` over the last dimension. x: [.., h] -> like x.
pub fn l2_norm<B: Ops>(tape: &Tape<B>, x: &Var<B>, eps: f64) -> Var<B> {
    let output = B::l2_norm_forward(x.value(), eps);
    let input = x.value();
    tape.record(output, &[x], move |dy| {
        vec![Some(B::l2_norm_backward(input, dy, eps))]
    })
}

pub(crate) fn portable<B: Ops>(x: Float<B>, eps: f64) -> Float<B> {
    let (shape, dtype) = (dims(&x), x.dtype());
    let x = matrix::<B>(to_f32::<B>(x));
    let y = x.clone() * inverse_length(&x, eps);
    reshaped::<B>(to_dtype::<B>(float(y), dtype), &shape)
}

pub(crate) fn portable_backward<B: Ops>(x: Float<B>, dy: Float<B>, eps: f64) -> Float<B> {
    let (shape, dtype) = (dims(&x), x.dtype());
    let (x, dy) = (matrix::<B>(to_f32::<B>(x)), matrix::<B>(to_f32::<B>(dy)));
    let r = inverse_length(&x, eps);
    let y = x * r.clone();
    let dx = (dy.clone() - y.clone() * (dy * y).sum_dim(1)) * r;
    reshaped::<B>(to_dtype::<B>(float(dx), dtype), &shape)
}

/// [rows, 1].
fn inverse_length<B: Ops>(x: &Tensor<B, 2>, eps: f64) -> Tensor<B, 2> {
    x.clone().square().sum_dim(1).add_scalar(eps).sqrt().recip()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, random};

    #[test]
    fn matches_autodiff() {
        for hidden in [1, 12, 37] {
            check(
                &format!("{hidden} elements"),
                &[random(&[3, 5, hidden], 1)],
                &[],
                |tape, x, _| l2_norm(tape, &x[0], 1e-3),
                |x, _| {
                    let x = x[0].tensor::<3>();
                    x.clone() / x.square().sum_dim(2).add_scalar(1e-3).sqrt()
                },
            );
        }
    }
}
