//! One linear layer per expert, over rows that are sorted by expert.
//!
//! ```text
//! y[r] = W[e] x[r] + b[e]     for rows r in offsets[e]..offsets[e + 1]
//! ```
//!
//! Rows from `offsets[E]` on belong to no expert: what comes out for them is not specified, and what goes in is not
//! looked at.

use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::Tensor;
use burn_backend::{DType, TensorMetadata};

use super::permute::ExpertOffsets;
use crate::deferred::{Deferred, now_or_later};
use crate::grad_slot::GradSlot;
use crate::ops::Ops;
use crate::param::Param;
use crate::primitive::{Float, dims, float, matrix, rows_and_last, tensor, to_dtype, to_f32};
use crate::saved::Saved;
use crate::tape::{Tape, Var};

/// x: [rows, in], weight: [E, out, in], bias: [E, out] -> [rows, out].
///
/// # Panics
/// When the shapes do not fit.
#[track_caller]
pub fn grouped_linear<B: Ops>(
    tape: &Tape<B>,
    x: &Var<B>,
    weight: &Param<B>,
    bias: Option<&Param<B>>,
    offsets: &ExpertOffsets<B>,
) -> Var<B> {
    check(&x.shape(), weight, bias, offsets.num_experts());
    let output =
        B::grouped_linear_forward(x.value(), weight.value(), bias.map(Param::value), offsets);
    let params: Vec<&Param<B>> = std::iter::once(weight).chain(bias).collect();
    let gradients = WeightGradients::new(tape, x, weight, bias, offsets);
    let (input_tracked, weight, offsets) = (x.is_tracked(), weight.clone(), offsets.clone());
    tape.record_accumulating(output, x, &params, move |dy, so_far| {
        let dx = input_tracked.then(|| {
            B::grouped_linear_backward_input_add(dy.clone(), weight.value(), &offsets, so_far)
        });
        gradients.accumulate(dy);
        dx
    })
}

/// Two layers of the same rows, such as the gate and the other half of a gated MLP: [`grouped_linear`] of each, and one product
/// for the gradient of the rows. x: [rows, in], weights: [E, out, in] each, biases: [E, out] -> [rows, out] of each.
///
/// Whoever uses the second result must use the first as well: the gradient of the rows waits for both.
///
/// # Panics
/// When the shapes do not fit.
#[track_caller]
pub fn grouped_linear_pair<B: Ops>(
    tape: &Tape<B>,
    x: &Var<B>,
    weights: [&Param<B>; 2],
    biases: [Option<&Param<B>>; 2],
    offsets: &ExpertOffsets<B>,
) -> [Var<B>; 2] {
    let [first, second] = weights;
    assert_eq!(
        first.shape(),
        second.shape(),
        "grouped_linear_pair: `{}` and `{}` differ in shape",
        first.name(),
        second.name()
    );
    let layer = |i: usize| {
        check(&x.shape(), weights[i], biases[i], offsets.num_experts());
        let (weight, bias) = (weights[i], biases[i]);
        let output =
            B::grouped_linear_forward(x.value(), weight.value(), bias.map(Param::value), offsets);
        let params: Vec<&Param<B>> = std::iter::once(weight).chain(bias).collect();
        (
            output,
            params,
            WeightGradients::new(tape, x, weight, bias, offsets),
        )
    };
    let (tracked, offsets_of_rows) = (x.is_tracked(), offsets.clone());
    let values = [first.clone(), second.clone()];
    // The second node comes later, and so earlier on the way back.
    let kept: Arc<Mutex<Option<Float<B>>>> = Arc::default();
    let from_second = Arc::clone(&kept);
    let (output, params, gradients) = layer(0);
    let a = tape.record_accumulating(output, x, &params, move |dy, so_far| {
        let other = from_second
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let dx = tracked.then(|| {
            let [first, second] = values.map(|weight| weight.value());
            let offsets = &offsets_of_rows;
            match other {
                Some(other) => B::grouped_linear_backward_input_pair(
                    [dy.clone(), other],
                    [first, second],
                    offsets,
                    so_far,
                ),
                None => B::grouped_linear_backward_input_add(dy.clone(), first, offsets, so_far),
            }
        });
        gradients.accumulate(dy);
        dx
    });
    let (output, params, gradients) = layer(1);
    let b = tape.record_with_params(output, &[x], &params, move |dy| {
        if tracked {
            *kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(dy.clone());
        }
        gradients.accumulate(dy);
        vec![None]
    });
    [a, b]
}

/// What the gradients of a layer's weight and bias are made from.
struct WeightGradients<B: Ops> {
    input: Option<Saved<B>>,
    weight: Param<B>,
    bias: Option<Param<B>>,
    offsets: ExpertOffsets<B>,
    /// Where the weight's waits, if it is put off.
    later: Option<Deferred>,
}

impl<B: Ops> WeightGradients<B> {
    fn new(
        tape: &Tape<B>,
        x: &Var<B>,
        weight: &Param<B>,
        bias: Option<&Param<B>>,
        offsets: &ExpertOffsets<B>,
    ) -> Self {
        Self {
            // A frozen weight needs no x, which may then be freed early.
            input: weight.requires_grad().then(|| x.saved()),
            weight: weight.clone(),
            bias: bias.filter(|bias| bias.requires_grad()).cloned(),
            offsets: offsets.clone(),
            later: tape.deferred(),
        }
    }

    /// Adds them to the weights' slots, now or later.
    fn accumulate(self, dy: Float<B>) {
        let Self {
            input,
            weight,
            bias,
            offsets,
            later,
        } = self;
        if let Some(bias) = bias {
            bias.accumulate_with(|slot| {
                B::grouped_linear_accumulate_bias_grad(dy.clone(), &offsets, slot)
            });
        }
        if let Some(input) = input {
            let (rows, out) = rows_and_last(&dims(&dy));
            input.use_when_made(move |input| {
                let flops = 2.0 * (rows * out) as f64 * rows_and_last(&dims(&input)).1 as f64;
                now_or_later(later, flops, move || {
                    weight.accumulate_in_dtype_with(|slot| {
                        B::grouped_linear_accumulate_weight_grad(input, dy, &offsets, slot)
                    });
                });
            });
        }
    }
}

#[track_caller]
fn check<B: Ops>(x: &[usize], weight: &Param<B>, bias: Option<&Param<B>>, experts: usize) {
    let w = weight.shape();
    assert!(
        w.len() == 3 && w[0] == experts && x.len() == 2 && x[1] == w[2],
        "grouped_linear: `{}` has shape {w:?} ([experts, out, in]), which does not fit rows {x:?} of {experts} experts",
        weight.name()
    );
    if let Some(bias) = bias {
        let b = bias.shape();
        assert_eq!(
            b,
            [w[0], w[1]],
            "grouped_linear: bias `{}` has shape {b:?}, the weight {w:?}",
            bias.name()
        );
    }
}

/// The rows of each expert that has any: (expert, first row, number of rows).
pub(crate) fn occupied(offsets: &[usize]) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
    offsets
        .windows(2)
        .enumerate()
        .map(|(expert, pair)| (expert, pair[0], pair[1] - pair[0]))
        .filter(|(_, _, rows)| *rows > 0)
}

/// Matrix `expert` of a stack.
fn member<B: Ops>(stack: &Tensor<B, 3>, expert: usize) -> Tensor<B, 2> {
    let [_, rows, cols] = stack.dims();
    stack.clone().narrow(0, expert, 1).reshape([rows, cols])
}

/// Puts the products of each expert's rows together; zeros for rows of no expert.
fn assemble<B: Ops>(
    mut parts: Vec<Tensor<B, 2>>,
    rows: usize,
    cols: usize,
    like: (&B::Device, DType),
) -> Float<B> {
    let done: usize = parts.iter().map(|part| part.dims()[0]).sum();
    if done < rows || parts.is_empty() {
        parts.push(Tensor::zeros([rows - done, cols], like));
    }
    float(Tensor::cat(parts, 0))
}

/// The forward pass in plain tensor operations.
pub fn portable<B: Ops>(
    x: Float<B>,
    weight: Float<B>,
    bias: Option<Float<B>>,
    offsets: &ExpertOffsets<B>,
) -> Float<B> {
    let (dtype, device) = (x.dtype(), B::float_device(&x));
    let x = matrix::<B>(x);
    let weight = tensor::<B, 3>(to_dtype::<B>(weight, dtype));
    let bias = bias.map(|bias| tensor::<B, 2>(to_dtype::<B>(bias, dtype)));
    let (rows, out) = (x.dims()[0], weight.dims()[1]);
    let parts = occupied(offsets.host()).map(|(expert, start, count)| {
        let y = x
            .clone()
            .narrow(0, start, count)
            .matmul(member(&weight, expert).transpose());
        match &bias {
            Some(bias) => y + bias.clone().narrow(0, expert, 1),
            None => y,
        }
    });
    assemble::<B>(parts.collect(), rows, out, (&device, dtype))
}

/// The input's gradient in plain tensor operations.
pub fn portable_backward_input<B: Ops>(
    dy: Float<B>,
    weight: Float<B>,
    offsets: &ExpertOffsets<B>,
) -> Float<B> {
    let (dtype, device) = (dy.dtype(), B::float_device(&dy));
    let dy = matrix::<B>(dy);
    let weight = tensor::<B, 3>(to_dtype::<B>(weight, dtype));
    let (rows, inner) = (dy.dims()[0], weight.dims()[2]);
    let parts = occupied(offsets.host()).map(|(expert, start, count)| {
        dy.clone()
            .narrow(0, start, count)
            .matmul(member(&weight, expert))
    });
    assemble::<B>(parts.collect(), rows, inner, (&device, dtype))
}

pub(crate) fn portable_backward_input_pair<B: Ops>(
    [dy, other]: [Float<B>; 2],
    [weight, other_weight]: [Float<B>; 2],
    offsets: &ExpertOffsets<B>,
    so_far: Option<Float<B>>,
) -> Float<B> {
    let dx = B::grouped_linear_backward_input_add(dy, weight, offsets, so_far);
    B::grouped_linear_backward_input_add(other, other_weight, offsets, Some(dx))
}

pub(crate) fn portable_backward_input_add<B: Ops>(
    dy: Float<B>,
    weight: Float<B>,
    offsets: &ExpertOffsets<B>,
    so_far: Option<Float<B>>,
) -> Float<B> {
    let dx = B::grouped_linear_backward_input(dy, weight, offsets);
    match so_far {
        Some(so_far) => B::add(so_far, dx),
        None => dx,
    }
}

/// The weights' gradient in plain tensor operations.
pub fn portable_accumulate_weight_grad<B: Ops>(
    x: Float<B>,
    dy: Float<B>,
    offsets: &ExpertOffsets<B>,
    slot: GradSlot<B>,
) -> Float<B> {
    let device = B::float_device(&x);
    let (x, dy) = (matrix::<B>(to_f32::<B>(x)), matrix::<B>(to_f32::<B>(dy)));
    let (inner, out) = (x.dims()[1], dy.dims()[1]);
    let grads = offsets.host().windows(2).map(|pair| {
        let (start, count) = (pair[0], pair[1] - pair[0]);
        if count == 0 {
            return Tensor::<B, 3>::zeros([1, out, inner], (&device, DType::F32));
        }
        let rows = |x: &Tensor<B, 2>| x.clone().narrow(0, start, count);
        rows(&dy)
            .transpose()
            .matmul(rows(&x))
            .reshape([1, out, inner])
    });
    slot.accumulate(float(Tensor::cat(grads.collect(), 0)))
}

/// The biases' gradient in plain tensor operations.
pub fn portable_accumulate_bias_grad<B: Ops>(
    dy: Float<B>,
    offsets: &ExpertOffsets<B>,
    slot: GradSlot<B>,
) -> Float<B> {
    let device = B::float_device(&dy);
    let out = dims(&dy)[1];
    let dy = matrix::<B>(to_f32::<B>(dy));
    let grads = offsets.host().windows(2).map(|pair| {
        let (start, count) = (pair[0], pair[1] - pair[0]);
        if count == 0 {
            return Tensor::<B, 2>::zeros([1, out], (&device, DType::F32));
        }
        dy.clone().narrow(0, start, count).sum_dim(0)
    });
    slot.accumulate(float(Tensor::cat(grads.collect(), 0)))
}
