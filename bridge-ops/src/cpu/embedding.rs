//! The token embedding. Maths: `embedding.rs`.

use burn_backend::DType;
use burn_flex::{Flex, FlexTensor};

use super::gemm::Output;
use super::linear::accumulate;
use super::simd::Element as _;
use super::storage::{Weight, contiguous_f32, values, with_weight};
use super::threads::{SharedMut, num_parts, part, run_jobs};
use super::{fast_path, pool};
use crate::grad_slot::GradSlot;
use crate::primitive::{dims, rows_and_last};

/// A job handles at least this many elements.
const MIN_PART: usize = 32 << 10;

/// `None` when the dtypes are not covered.
///
/// # Panics
/// When an id is out of range.
pub(super) fn forward(ids: &FlexTensor, weight: &FlexTensor, dtype: DType) -> Option<FlexTensor> {
    let weight_values = Weight::of(weight)?;
    if dtype != DType::F32 {
        return None;
    }
    let &[vocab, hidden] = dims(weight).as_slice() else {
        return None;
    };
    let mut shape = dims(ids);
    let ids = token_ids(ids, vocab)?;
    fast_path::took("embedding_forward");
    shape.push(hidden);
    Some(pool::new_f32(&shape, |out| {
        let jobs = num_parts(out.len(), MIN_PART).min(ids.len().max(1));
        let out = SharedMut::new(out);
        run_jobs(jobs, |job| {
            for i in part(ids.len(), jobs, 1, job) {
                // SAFETY: each row is written once.
                let row = unsafe { out.slice(i * hidden..(i + 1) * hidden) };
                with_weight!(weight_values, w => {
                    let source = &w[ids[i] * hidden..][..hidden];
                    row.iter_mut().zip(source).for_each(|(out, w)| *out = w.widen());
                });
            }
        });
    }))
}

/// `Err` gives the slot back when the dtypes are not covered.
///
/// # Panics
/// When an id is out of range.
pub(super) fn accumulate_grad(
    ids: &FlexTensor,
    dy: &FlexTensor,
    vocab: usize,
    slot: GradSlot<Flex>,
) -> Result<FlexTensor, GradSlot<Flex>> {
    let (Some(ids), Some(dy)) = (token_ids(ids, vocab), contiguous_f32(dy)) else {
        return Err(slot);
    };
    fast_path::took("embedding_accumulate_grad");
    let (_, hidden) = rows_and_last(&dims(&dy));
    let dy = values(&dy);
    Ok(accumulate(slot, &[vocab, hidden], |grad, output| {
        if output == Output::Overwrite {
            super::elementwise::in_parts(grad, |grad, _| grad.fill(0.0));
        }
        // Each job adds all tokens, in order, to some of the columns.
        let jobs = num_parts(dy.len(), MIN_PART).min(hidden.div_ceil(64).max(1));
        let grad = SharedMut::new(grad);
        run_jobs(jobs, |job| {
            let columns = part(hidden, jobs, 16, job);
            for (i, &id) in ids.iter().enumerate() {
                let source = &dy[i * hidden..][columns.clone()];
                // SAFETY: jobs have different columns.
                let row =
                    unsafe { grad.slice(id * hidden + columns.start..id * hidden + columns.end) };
                row.iter_mut().zip(source).for_each(|(sum, dy)| *sum += dy);
            }
        });
    }))
}

/// The ids as indices. `None` for integer types that are not covered.
#[track_caller]
fn token_ids(ids: &FlexTensor, vocab: usize) -> Option<Vec<usize>> {
    let ids = integers(ids)?;
    for (i, &id) in ids.iter().enumerate() {
        assert!(
            (0..vocab as i64).contains(&id),
            "embedding: id {id} at {i} is not in a vocabulary of {vocab}"
        );
    }
    Some(ids.into_iter().map(|id| id as usize).collect())
}

/// The elements of an integer tensor, in row-major order. `None` for types that are not covered.
pub(super) fn integers(x: &FlexTensor) -> Option<Vec<i64>> {
    let x = x.to_contiguous();
    match x.dtype() {
        DType::I64 => x.as_slice::<i64>().map(<[i64]>::to_vec),
        DType::I32 => x
            .as_slice::<i32>()
            .map(|x| x.iter().map(|&x| i64::from(x)).collect()),
        _ => None,
    }
}
