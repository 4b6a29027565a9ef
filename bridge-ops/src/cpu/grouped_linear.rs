//! One product per expert. Maths: `moe/grouped_linear.rs`.

use burn_flex::{Flex, FlexTensor};

use super::gemm::{Element, Matrix, Output, gemm, gemm_on};
use super::linear::{accumulate, widened};
use super::reduce::add_column_sums;
use super::storage::{Weight, contiguous_f32, values, with_weight};
use super::threads::{SharedMut, num_threads, run_jobs};
use super::{fast_path, gemv, pool};
use crate::grad_slot::GradSlot;
use crate::moe::ExpertOffsets;
use crate::moe::grouped_linear::occupied;
use crate::primitive::dims;

/// With this many experts per thread at work, threads take experts; with fewer they share each product.
const EXPERTS_PER_THREAD: usize = 4;

/// Whether threads should take whole experts.
fn by_expert(active: usize) -> bool {
    num_threads() > 1 && active >= EXPERTS_PER_THREAD * num_threads()
}

/// `None` when the dtypes are not covered.
pub(super) fn forward(
    x: &FlexTensor,
    weight: &FlexTensor,
    bias: Option<&FlexTensor>,
    offsets: &ExpertOffsets<Flex>,
) -> Option<FlexTensor> {
    let x = contiguous_f32(x)?;
    let weight_values = Weight::of(weight)?;
    let bias = match bias {
        Some(bias) => Some(widened(bias)?),
        None => None,
    };
    fast_path::took("grouped_linear_forward");
    let (rows, out, inner) = (dims(&x)[0], dims(weight)[1], dims(weight)[2]);
    let x = values(&x);
    let active: Vec<_> = occupied(offsets.host()).collect();
    Some(pool::new_f32(&[rows, out], |y| {
        with_weight!(weight_values, w => {
            let product = |threads_take_experts: bool, expert: usize, start: usize, count: usize, y: &mut [f32]| {
                let (x, w) = (&x[start * inner..][..count * inner], &w[expert * out * inner..][..out * inner]);
                let bias = bias.as_ref().map(|bias| &bias[expert * out..][..out]);
                if !threads_take_experts && count <= gemv::MAX_ROWS && inner > 0 {
                    return gemv::gemv(x, w, bias, y, inner);
                }
                let output = match bias {
                    Some(bias) => {
                        y.chunks_exact_mut(out).for_each(|row| row.copy_from_slice(bias));
                        Output::Add
                    }
                    None => Output::Overwrite,
                };
                let (x, w) = (Matrix::row_major(x, count, inner), Matrix::row_major(w, out, inner).t());
                multiply(threads_take_experts, x, w, y, out, output);
            };
            if by_expert(active.len()) {
                let y = SharedMut::new(y);
                run_jobs(active.len(), |job| {
                    let (expert, start, count) = active[job];
                    // SAFETY: experts have different rows.
                    let y = unsafe { y.slice(start * out..(start + count) * out) };
                    product(true, expert, start, count, y);
                });
            } else {
                for &(expert, start, count) in &active {
                    product(false, expert, start, count, &mut y[start * out..(start + count) * out]);
                }
            }
        });
        zero_unused(y, offsets, out);
    }))
}

/// `None` when the dtypes are not covered.
pub(super) fn backward_input(
    dy: &FlexTensor,
    weight: &FlexTensor,
    offsets: &ExpertOffsets<Flex>,
) -> Option<FlexTensor> {
    let dy = contiguous_f32(dy)?;
    let weight_values = Weight::of(weight)?;
    fast_path::took("grouped_linear_backward_input");
    let (rows, out, inner) = (dims(&dy)[0], dims(weight)[1], dims(weight)[2]);
    let dy = values(&dy);
    let active: Vec<_> = occupied(offsets.host()).collect();
    Some(pool::new_f32(&[rows, inner], |dx| {
        with_weight!(weight_values, w => {
            let product = |alone: bool, expert: usize, start: usize, count: usize, dx: &mut [f32]| {
                let dy = Matrix::row_major(&dy[start * out..][..count * out], count, out);
                let w = Matrix::row_major(&w[expert * out * inner..][..out * inner], out, inner);
                multiply(alone, dy, w, dx, inner, Output::Overwrite);
            };
            if by_expert(active.len()) {
                let dx = SharedMut::new(dx);
                run_jobs(active.len(), |job| {
                    let (expert, start, count) = active[job];
                    // SAFETY: experts have different rows.
                    let dx = unsafe { dx.slice(start * inner..(start + count) * inner) };
                    product(true, expert, start, count, dx);
                });
            } else {
                for &(expert, start, count) in &active {
                    product(false, expert, start, count, &mut dx[start * inner..(start + count) * inner]);
                }
            }
        });
        zero_unused(dx, offsets, inner);
    }))
}

/// `Err` gives the slot back when the dtypes are not covered.
pub(super) fn accumulate_weight_grad(
    x: &FlexTensor,
    dy: &FlexTensor,
    offsets: &ExpertOffsets<Flex>,
    slot: GradSlot<Flex>,
) -> Result<FlexTensor, GradSlot<Flex>> {
    let (Some(x), Some(dy)) = (contiguous_f32(x), contiguous_f32(dy)) else {
        return Err(slot);
    };
    fast_path::took("grouped_linear_accumulate_weight_grad");
    let (inner, out) = (dims(&x)[1], dims(&dy)[1]);
    let (x, dy) = (values(&x), values(&dy));
    let experts = offsets.num_experts();
    let offsets = offsets.host();
    Ok(accumulate(slot, &[experts, out, inner], |grad, output| {
        let product = |alone: bool, expert: usize, grad: &mut [f32]| {
            let (start, count) = (offsets[expert], offsets[expert + 1] - offsets[expert]);
            if count == 0 {
                if output == Output::Overwrite {
                    grad.fill(0.0);
                }
                return;
            }
            let x = Matrix::row_major(&x[start * inner..][..count * inner], count, inner);
            let dy = Matrix::row_major(&dy[start * out..][..count * out], count, out);
            multiply(alone, dy.t(), x, grad, inner, output);
        };
        let size = out * inner;
        if by_expert(experts) {
            let grad = SharedMut::new(grad);
            run_jobs(experts, |expert| {
                // SAFETY: experts have gradients of their own.
                let grad = unsafe { grad.slice(expert * size..(expert + 1) * size) };
                product(true, expert, grad);
            });
        } else {
            for expert in 0..experts {
                product(false, expert, &mut grad[expert * size..(expert + 1) * size]);
            }
        }
    }))
}

/// `Err` gives the slot back when the dtype is not covered.
pub(super) fn accumulate_bias_grad(
    dy: &FlexTensor,
    offsets: &ExpertOffsets<Flex>,
    slot: GradSlot<Flex>,
) -> Result<FlexTensor, GradSlot<Flex>> {
    let Some(dy) = contiguous_f32(dy) else {
        return Err(slot);
    };
    fast_path::took("grouped_linear_accumulate_bias_grad");
    let out = dims(&dy)[1];
    let dy = values(&dy);
    let shape = [offsets.num_experts(), out];
    Ok(accumulate(slot, &shape, |grad, output| {
        if output == Output::Overwrite {
            grad.fill(0.0);
        }
        for (expert, start, count) in occupied(offsets.host()) {
            let rows = &dy[start * out..(start + count) * out];
            add_column_sums(rows, &mut grad[expert * out..(expert + 1) * out]);
        }
    }))
}

/// A product on this thread alone, or on all.
fn multiply<T: Element>(
    alone: bool,
    a: Matrix<'_, f32>,
    b: Matrix<'_, T>,
    c: &mut [f32],
    ldc: usize,
    output: Output,
) {
    if alone {
        gemm_on(1, a, b, c, ldc, output);
    } else {
        gemm(a, b, c, ldc, output);
    }
}

/// Rows of no expert must not hold what was in memory before: they meet further kernels.
fn zero_unused(rows: &mut [f32], offsets: &ExpertOffsets<Flex>, cols: usize) {
    let end = offsets.host().last().copied().unwrap_or(0) * cols;
    rows[end..].fill(0.0);
}
