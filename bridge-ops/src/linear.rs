//! The linear layer.
//!
//! ```text
//! y  = x W^T + b         x: [.., in], W: [out, in], b: [out] -> y: [.., out]
//! dx = dy W
//! dW = dy^T x            accumulated in fp32
//! db = sum of rows of dy
//! ```

use burn_backend::TensorMetadata;

use crate::grad_slot::GradSlot;
use crate::ops::Ops;
use crate::param::Param;
use crate::primitive::{
    Float, dims, float, matrix, reshaped, rows_and_last, tensor, to_dtype, to_f32,
};
use crate::tape::{Tape, Var};

/// `y = x W^T + b`. x: [.., in], weight: [out, in], bias: [out] -> [.., out].
///
/// # Panics
/// When the shapes do not fit.
#[track_caller]
pub fn linear<B: Ops>(
    tape: &Tape<B>,
    x: &Var<B>,
    weight: &Param<B>,
    bias: Option<&Param<B>>,
) -> Var<B> {
    check_shapes(&x.shape(), weight, bias);
    let output = B::linear_forward(x.value(), weight.value(), bias.map(Param::value));

    let params: Vec<&Param<B>> = std::iter::once(weight).chain(bias).collect();
    let weight = weight.clone();
    let bias = bias.cloned();
    let input_tracked = x.is_tracked();
    // A frozen weight needs no x, which may then be freed early.
    let input = weight.requires_grad().then(|| x.value());
    tape.record_with_params(output, &[x], &params, move |dy| {
        if let Some(bias) = bias.filter(|bias| bias.requires_grad()) {
            bias.accumulate_with(|slot| B::linear_accumulate_bias_grad(dy.clone(), slot));
        }
        let dx = input_tracked.then(|| B::linear_backward_input(dy.clone(), weight.value()));
        if let Some(input) = input {
            weight.accumulate_with(|slot| B::linear_accumulate_weight_grad(input, dy, slot));
        }
        vec![dx]
    })
}

#[track_caller]
fn check_shapes<B: Ops>(x: &[usize], weight: &Param<B>, bias: Option<&Param<B>>) {
    let w = weight.shape();
    assert!(
        w.len() == 2 && x.last() == Some(&w[1]),
        "linear: `{}` has shape {w:?} ([out, in]), which does not fit an input of shape {x:?}",
        weight.name()
    );
    if let Some(bias) = bias {
        let b = bias.shape();
        assert_eq!(
            b,
            [w[0]],
            "linear: bias `{}` has shape {b:?}, the weight {w:?}",
            bias.name()
        );
    }
}

pub(crate) fn portable<B: Ops>(x: Float<B>, weight: Float<B>, bias: Option<Float<B>>) -> Float<B> {
    let mut shape = dims(&x);
    let dtype = x.dtype();
    let weight = tensor::<B, 2>(to_dtype::<B>(weight, dtype));
    let mut y = matrix::<B>(x).matmul(weight.transpose()); // [rows, out]
    if let Some(bias) = bias {
        y = y + tensor::<B, 1>(to_dtype::<B>(bias, dtype)).unsqueeze();
    }
    *shape.last_mut().expect("x has at least one dimension") = y.dims()[1];
    reshaped::<B>(float(y), &shape)
}

pub(crate) fn portable_backward_input<B: Ops>(dy: Float<B>, weight: Float<B>) -> Float<B> {
    let mut shape = dims(&dy);
    let weight = tensor::<B, 2>(to_dtype::<B>(weight, dy.dtype()));
    *shape.last_mut().expect("dy has at least one dimension") = weight.dims()[1];
    reshaped::<B>(float(matrix::<B>(dy).matmul(weight)), &shape)
}

pub(crate) fn portable_accumulate_weight_grad<B: Ops>(
    x: Float<B>,
    dy: Float<B>,
    slot: GradSlot<B>,
) -> Float<B> {
    let x = matrix::<B>(to_f32::<B>(x));
    let dy = matrix::<B>(to_f32::<B>(dy));
    slot.accumulate(float(dy.transpose().matmul(x)))
}

pub(crate) fn portable_accumulate_bias_grad<B: Ops>(dy: Float<B>, slot: GradSlot<B>) -> Float<B> {
    let (_, out) = rows_and_last(&dims(&dy));
    let sum = matrix::<B>(to_f32::<B>(dy)).sum_dim(0); // [1, out]
    slot.accumulate(reshaped::<B>(float(sum), &[out]))
}
