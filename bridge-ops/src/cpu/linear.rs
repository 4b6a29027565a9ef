//! The linear layer and its gradients. Maths: `linear.rs`.

use burn_flex::{Flex, FlexTensor};

use super::gemm::{Matrix, Output, gemm};
use super::gemv::{self, gemv};
use super::reduce::add_column_sums;
use super::storage::{Weight, contiguous_f32, unique_values, values, with_weight};
use super::{fast_path, pool};
use crate::grad_slot::GradSlot;
use crate::primitive::{dims, rows_and_last};

/// `None` when the dtypes are not covered.
pub(super) fn forward(
    x: &FlexTensor,
    weight: &FlexTensor,
    bias: Option<&FlexTensor>,
) -> Option<FlexTensor> {
    let x = contiguous_f32(x)?;
    let weight_values = Weight::of(weight)?;
    let bias = match bias {
        Some(bias) => Some(widened(bias)?),
        None => None,
    };
    fast_path::took("linear_forward");

    let mut shape = dims(&x);
    let (rows, inner) = rows_and_last(&shape);
    let out = dims(weight)[0];
    *shape.last_mut()? = out;
    let x = values(&x);
    Some(pool::new_f32(&shape, |y| {
        if rows <= gemv::MAX_ROWS && inner > 0 {
            return with_weight!(weight_values, w => gemv(x, w, bias.as_deref(), y, inner));
        }
        let output = match &bias {
            Some(bias) => {
                y.chunks_exact_mut(out)
                    .for_each(|row| row.copy_from_slice(bias));
                Output::Add
            }
            None => Output::Overwrite,
        };
        let x = Matrix::row_major(x, rows, inner);
        with_weight!(weight_values, w => gemm(x, Matrix::row_major(w, out, inner).t(), y, out, output));
    }))
}

/// `None` when the dtypes are not covered.
pub(super) fn backward_input(dy: &FlexTensor, weight: &FlexTensor) -> Option<FlexTensor> {
    let dy = contiguous_f32(dy)?;
    let weight_values = Weight::of(weight)?;
    fast_path::took("linear_backward_input");

    let mut shape = dims(&dy);
    let (rows, out) = rows_and_last(&shape);
    let inner = dims(weight)[1];
    *shape.last_mut()? = inner;
    let dy = Matrix::row_major(values(&dy), rows, out);
    Some(pool::new_f32(&shape, |dx| {
        with_weight!(weight_values, w => gemm(dy, Matrix::row_major(w, out, inner), dx, inner, Output::Overwrite));
    }))
}

/// `Err` gives the slot back when the dtypes are not covered.
pub(super) fn accumulate_weight_grad(
    x: &FlexTensor,
    dy: &FlexTensor,
    slot: GradSlot<Flex>,
) -> Result<FlexTensor, GradSlot<Flex>> {
    let (Some(x), Some(dy)) = (contiguous_f32(x), contiguous_f32(dy)) else {
        return Err(slot);
    };
    fast_path::took("linear_accumulate_weight_grad");

    let (rows, inner) = rows_and_last(&dims(&x));
    let (_, out) = rows_and_last(&dims(&dy));
    let x = Matrix::row_major(values(&x), rows, inner);
    let dy = Matrix::row_major(values(&dy), rows, out);
    Ok(accumulate(slot, &[out, inner], |grad, output| {
        gemm(dy.t(), x, grad, inner, output)
    }))
}

/// `Err` gives the slot back when the dtype is not covered.
pub(super) fn accumulate_bias_grad(
    dy: &FlexTensor,
    slot: GradSlot<Flex>,
) -> Result<FlexTensor, GradSlot<Flex>> {
    let Some(dy) = contiguous_f32(dy) else {
        return Err(slot);
    };
    fast_path::took("linear_accumulate_bias_grad");

    let (_, out) = rows_and_last(&dims(&dy));
    Ok(accumulate(slot, &[out], |grad, output| {
        if output == Output::Overwrite {
            grad.fill(0.0);
        }
        add_column_sums(values(&dy), grad);
    }))
}

/// Runs a kernel that writes a gradient of `shape` or adds to it, in the slot's buffer when nobody shares it.
pub(super) fn accumulate(
    slot: GradSlot<Flex>,
    shape: &[usize],
    kernel: impl FnOnce(&mut [f32], Output),
) -> FlexTensor {
    let (mut buffer, output) = match slot {
        GradSlot::Empty => return pool::new_f32(shape, |grad| kernel(grad, Output::Overwrite)),
        GradSlot::Stale(buffer) => (buffer, Output::Overwrite),
        GradSlot::Sum(buffer) => (buffer, Output::Add),
    };
    let len = shape.iter().product::<usize>();
    if let Some(grad) = unique_values(&mut buffer) {
        assert_eq!(
            grad.len(),
            len,
            "the gradient slot has another size than the gradient"
        );
        kernel(grad, output);
        return buffer;
    }
    let sum = contiguous_f32(&buffer).expect("a gradient slot is fp32");
    pool::new_f32(shape, |grad| {
        if output == Output::Add {
            grad.copy_from_slice(values(&sum));
        }
        kernel(grad, output);
    })
}

/// A small vector as fp32.
pub(super) fn widened(x: &FlexTensor) -> Option<Vec<f32>> {
    use super::simd::Element as _;
    Some(with_weight!(Weight::of(x)?, x => x.iter().map(|x| x.widen()).collect()))
}
