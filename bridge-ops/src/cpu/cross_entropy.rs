//! Cross-entropy. Maths: `cross_entropy.rs`.
//!
//! The output layer with the loss (`linear_cross_entropy.rs`) needs no kernel of its own: its portable body calls these
//! on pieces of the logits, whose buffer the memory pool hands from piece to piece.

use burn_flex::{Flex, FlexTensor};

use super::elementwise::softcap_values;
use super::embedding::integers;
use super::math::exp;
use super::simd::{fma, lane_sum, vectorized};
use super::storage::{contiguous_f32, owned_f32, unique_values, values};
use super::threads::{SharedMut, num_parts, part, run_jobs};
use super::{fast_path, pool};
use crate::cross_entropy::{CrossEntropyOutput, CrossEntropySpec, TARGET_ELSEWHERE};
use crate::primitive::dims;

/// A job handles at least this many logits.
const MIN_PART: usize = 16 << 10;

/// `None` when the dtypes are not covered.
pub(super) fn forward(
    logits: &FlexTensor,
    targets: &FlexTensor,
    spec: &CrossEntropySpec,
) -> Option<CrossEntropyOutput<Flex>> {
    let logits = contiguous_f32(logits)?;
    let &[tokens, vocab] = dims(&logits).as_slice() else {
        return None;
    };
    let targets = checked_targets(targets, vocab, spec)?;
    fast_path::took("cross_entropy_forward");
    let logits = values(&logits);
    let mut lse = None;
    let loss = pool::new_f32(&[tokens], |loss| {
        lse = Some(pool::new_f32(&[tokens], |lse| {
            let (loss, lse) = (SharedMut::new(loss), SharedMut::new(lse));
            let jobs = num_parts(logits.len(), MIN_PART).min(tokens.max(1));
            run_jobs(jobs, |job| {
                let mut capped = Vec::new();
                for token in part(tokens, jobs, 1, job) {
                    let mut row = &logits[token * vocab..][..vocab];
                    if let Some(cap) = spec.logit_softcap {
                        capped.resize(vocab, 0.0);
                        softcap_values(row, cap as f32, &mut capped);
                        row = &capped;
                    }
                    let row_lse = log_sum_exp(row);
                    // SAFETY: each token is handled once.
                    unsafe {
                        lse.slice(token..token + 1)[0] = row_lse;
                        loss.slice(token..token + 1)[0] = match targets[token] {
                            Target::Ignored => 0.0,
                            Target::Elsewhere => row_lse,
                            Target::At(target) => row_lse - row[target],
                        };
                    }
                }
            });
        }));
    });
    Some(CrossEntropyOutput { loss, lse: lse? })
}

/// In place when the logits are not shared. `Err` gives them back when the dtypes are not covered.
pub(super) fn backward(
    logits: FlexTensor,
    targets: &FlexTensor,
    lse: &FlexTensor,
    dloss: &FlexTensor,
    spec: &CrossEntropySpec,
) -> Result<FlexTensor, FlexTensor> {
    let shape = dims(&logits);
    let &[tokens, vocab] = shape.as_slice() else {
        return Err(logits);
    };
    let (Some(targets), Some(lse), Some(dloss)) = (
        checked_targets(targets, vocab, spec),
        contiguous_f32(lse),
        contiguous_f32(dloss),
    ) else {
        return Err(logits);
    };
    let mut logits = owned_f32(logits)?;
    fast_path::took("cross_entropy_backward");

    let (lse, dloss) = (values(&lse), values(&dloss));
    let kernel = |source: Option<&[f32]>, out: &mut [f32]| {
        let jobs = num_parts(out.len(), MIN_PART).min(tokens.max(1));
        let out = SharedMut::new(out);
        run_jobs(jobs, |job| {
            for token in part(tokens, jobs, 1, job) {
                let range = token * vocab..(token + 1) * vocab;
                // SAFETY: each token is handled once.
                let row = unsafe { out.slice(range.clone()) };
                let target = match targets[token] {
                    Target::Ignored => {
                        row.fill(0.0);
                        continue;
                    }
                    Target::Elsewhere => None,
                    Target::At(target) => Some(target),
                };
                if let Some(source) = source {
                    row.copy_from_slice(&source[range]);
                }
                match spec.logit_softcap {
                    None => {
                        scaled_softmax(row, lse[token], dloss[token]);
                        if let Some(target) = target {
                            row[target] -= dloss[token];
                        }
                    }
                    Some(cap) => softcapped_row(row, lse[token], dloss[token], target, cap as f32),
                }
            }
        });
    };
    if let Some(out) = unique_values(&mut logits) {
        kernel(None, out);
        return Ok(logits);
    }
    Ok(pool::new_f32(&shape, |out| {
        kernel(Some(values(&logits)), out)
    }))
}

/// Gradient of one row of logits that are capped.
fn softcapped_row(row: &mut [f32], lse: f32, dloss: f32, target: Option<usize>, cap: f32) {
    let mut capped = vec![0.0; row.len()];
    softcap_values(row, cap, &mut capped);
    row.copy_from_slice(&capped);
    scaled_softmax(row, lse, dloss);
    if let Some(target) = target {
        row[target] -= dloss;
    }
    for (dz, z) in row.iter_mut().zip(capped) {
        let t = z / cap;
        *dz *= 1.0 - t * t;
    }
}

/// What a row of logits is compared with.
#[derive(Clone, Copy)]
enum Target {
    Ignored,
    /// In another part of the vocabulary.
    Elsewhere,
    At(usize),
}

/// The targets as indices. No result for integer types that are not covered.
///
/// # Panics
/// When a target is neither a token, the ignored value nor [`TARGET_ELSEWHERE`].
#[track_caller]
fn checked_targets(
    targets: &FlexTensor,
    vocab: usize,
    spec: &CrossEntropySpec,
) -> Option<Vec<Target>> {
    let checked = |(i, target): (usize, i64)| {
        if target == spec.ignore_index {
            return Target::Ignored;
        }
        if target == TARGET_ELSEWHERE {
            return Target::Elsewhere;
        }
        assert!(
            (0..vocab as i64).contains(&target),
            "cross_entropy: target {target} at {i} is neither in a vocabulary of {vocab} nor {} (ignored) nor {TARGET_ELSEWHERE} (elsewhere)",
            spec.ignore_index
        );
        Target::At(target as usize)
    };
    Some(
        integers(targets)?
            .into_iter()
            .enumerate()
            .map(checked)
            .collect(),
    )
}

vectorized! {
    fn log_sum_exp(row: &[f32]) -> f32 {
        let max = maximum(row);
        let sum = lane_sum([row], |[x], sum| sum + exp::<FMA>(x - max));
        max + sum.ln()
    }
}

/// The largest element, in any order since it makes no difference.
#[inline(always)]
pub(super) fn maximum(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 32];
    let chunks = row.chunks_exact(32);
    let rest = chunks
        .remainder()
        .iter()
        .fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = if *x > *lane { *x } else { *lane };
        }
    }
    lanes.iter().fold(rest, |a, &b| if b > a { b } else { a })
}

vectorized! {
    /// `z = exp(z - lse) * factor`.
    fn scaled_softmax(z: &mut [f32], lse: f32, factor: f32) {
        for z in z {
            *z = fma::<FMA>(exp::<FMA>(*z - lse), factor, 0.0);
        }
    }
}
