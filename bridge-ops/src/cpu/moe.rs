//! Routing and the order of rows by expert. Maths: `moe/router.rs`, `moe/permute.rs`.

use burn_backend::DType;
use burn_flex::{Flex, FlexTensor};

use super::embedding::integers;
use super::storage::{contiguous_f32, values};
use super::threads::{SharedMut, num_parts, part, run_jobs};
use super::{fast_path, pool};
use crate::data::int_from_i64;
use crate::moe::permute::sort_on_host;
use crate::moe::router::SUM_FLOOR;
use crate::moe::{GroupScore, RouterGroups, RouterOutput, RouterScore, RouterSpec, SortedExperts};
use crate::primitive::dims;

/// A job handles at least this many elements.
const MIN_PART: usize = 16 << 10;

/// `None` when the dtypes are not covered; so for all functions here.
pub(super) fn route(
    logits: &FlexTensor,
    correction_bias: Option<&FlexTensor>,
    spec: &RouterSpec,
) -> Option<RouterOutput<Flex>> {
    let logits = contiguous_f32(logits)?;
    let bias = match correction_bias {
        Some(bias) => Some(super::linear::widened(bias)?),
        None => None,
    };
    fast_path::took("router_forward");
    let &[tokens, experts] = dims(&logits).as_slice() else {
        return None;
    };
    let logits = values(&logits);
    let mut chosen = vec![0i64; tokens * spec.top_k];
    let weights = pool::new_f32(&[tokens, spec.top_k], |weights| {
        let jobs = num_parts(logits.len(), MIN_PART).min(tokens.max(1));
        let (weights, chosen) = (SharedMut::new(weights), SharedMut::new(&mut chosen));
        run_jobs(jobs, |job| {
            let mut choice = vec![0.0; experts];
            for token in part(tokens, jobs, 1, job) {
                let row = &logits[token * experts..][..experts];
                let slots = token * spec.top_k..(token + 1) * spec.top_k;
                // SAFETY: each token has slots of its own.
                let (w, ids) =
                    unsafe { (weights.slice(slots.clone()), chosen.slice(slots.clone())) };
                route_token(row, bias.as_deref(), spec, &mut choice, w, ids);
            }
        });
    });
    let experts = int_from_i64::<Flex>(&chosen, &[tokens, spec.top_k], &Default::default());
    Some(RouterOutput { weights, experts })
}

fn route_token(
    logits: &[f32],
    bias: Option<&[f32]>,
    spec: &RouterSpec,
    choice: &mut [f32],
    weights: &mut [f32],
    chosen: &mut [i64],
) {
    scores(logits, spec.score, choice);
    // The scores themselves are worked out again for the few that are chosen; what is kept is what they compete by.
    let softmax = softmax_of(logits);
    if let Some(bias) = bias {
        choice.iter_mut().zip(bias).for_each(|(c, b)| *c += b);
    }
    if let Some(groups) = &spec.groups {
        leave_best_groups(choice, groups);
    }
    for slot in chosen.iter_mut() {
        let best = argmax(choice);
        choice[best] = f32::NEG_INFINITY;
        *slot = best as i64;
    }
    let picked = chosen.iter().map(|&expert| logits[expert as usize]);
    match (spec.score, spec.normalize) {
        (RouterScore::Softmax, false) => {
            let (max, sum) = softmax;
            weights
                .iter_mut()
                .zip(picked)
                .for_each(|(w, x)| *w = (x - max).exp() / sum);
        }
        (RouterScore::Softmax, true) => {
            let max = picked.clone().fold(f32::NEG_INFINITY, f32::max);
            weights
                .iter_mut()
                .zip(picked)
                .for_each(|(w, x)| *w = (x - max).exp());
            let sum: f32 = weights.iter().sum();
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        (RouterScore::Sigmoid, normalize) => {
            weights
                .iter_mut()
                .zip(picked)
                .for_each(|(w, x)| *w = sigmoid(x));
            if normalize {
                let sum = weights.iter().sum::<f32>() + SUM_FLOOR;
                weights.iter_mut().for_each(|w| *w /= sum);
            }
        }
    }
    let scale = spec.scale as f32;
    weights.iter_mut().for_each(|w| *w *= scale);
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// The largest logit, and the sum of the exponentials of the differences to it.
fn softmax_of(logits: &[f32]) -> (f32, f32) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    (max, logits.iter().map(|x| (x - max).exp()).sum())
}

fn scores(logits: &[f32], score: RouterScore, out: &mut [f32]) {
    match score {
        RouterScore::Softmax => {
            let (max, sum) = softmax_of(logits);
            out.iter_mut()
                .zip(logits)
                .for_each(|(p, x)| *p = (x - max).exp() / sum);
        }
        RouterScore::Sigmoid => out
            .iter_mut()
            .zip(logits)
            .for_each(|(p, x)| *p = sigmoid(*x)),
    }
}

/// The first of the largest values; the first of all where none is a number.
fn argmax(values: &[f32]) -> usize {
    let mut best = 0;
    for (index, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = index;
        }
    }
    best
}

/// Puts minus infinity into the groups that are not searched.
fn leave_best_groups(choice: &mut [f32], rule: &RouterGroups) {
    let size = choice.len() / rule.groups;
    let mut worth: Vec<f32> = choice
        .chunks(size)
        .map(|group| {
            let (first, second) =
                group
                    .iter()
                    .fold((f32::NEG_INFINITY, f32::NEG_INFINITY), |(a, b), &x| {
                        if x > a { (x, a) } else { (a, b.max(x)) }
                    });
            match rule.score {
                GroupScore::Max => first,
                GroupScore::SumOfTopTwo if size == 1 => first,
                GroupScore::SumOfTopTwo => first + second,
            }
        })
        .collect();
    let mut searched = vec![false; rule.groups];
    for _ in 0..rule.top_groups {
        let best = argmax(&worth);
        worth[best] = f32::NEG_INFINITY;
        searched[best] = true;
    }
    for (group, _) in choice
        .chunks_mut(size)
        .zip(searched)
        .filter(|(_, searched)| !searched)
    {
        group.fill(f32::NEG_INFINITY);
    }
}

pub(super) fn route_backward(
    logits: &FlexTensor,
    experts: &FlexTensor,
    dweights: &FlexTensor,
    spec: &RouterSpec,
) -> Option<FlexTensor> {
    let (logits, dweights) = (contiguous_f32(logits)?, contiguous_f32(dweights)?);
    let chosen = integers(experts)?;
    fast_path::took("router_backward");
    let shape = dims(&logits);
    let (num_experts, k, scale) = (shape[1], spec.top_k, spec.scale as f32);
    let (logits, dweights) = (values(&logits), values(&dweights));
    Some(pool::new_f32(&shape, |out| {
        let mut dscores = vec![0.0; k];
        for (token, (dlogits, x)) in out
            .chunks_mut(num_experts)
            .zip(logits.chunks(num_experts))
            .enumerate()
        {
            let ids = &chosen[token * k..][..k];
            let dw = &dweights[token * k..][..k];
            match (spec.score, spec.normalize) {
                (RouterScore::Softmax, true) => {
                    let max = ids
                        .iter()
                        .map(|&e| x[e as usize])
                        .fold(f32::NEG_INFINITY, f32::max);
                    let weight = |e: i64| (x[e as usize] - max).exp();
                    let sum: f32 = ids.iter().map(|&e| weight(e)).sum();
                    let mean = ids
                        .iter()
                        .zip(dw)
                        .map(|(&e, dw)| weight(e) * dw)
                        .sum::<f32>()
                        / sum;
                    dlogits.fill(0.0);
                    for (&e, dw) in ids.iter().zip(dw) {
                        dlogits[e as usize] = scale * weight(e) / sum * (dw - mean);
                    }
                }
                (RouterScore::Softmax, false) => {
                    scores(x, RouterScore::Softmax, dlogits);
                    let mean: f32 = ids
                        .iter()
                        .zip(dw)
                        .map(|(&e, dw)| dlogits[e as usize] * dw)
                        .sum();
                    for (slot, &e) in ids.iter().enumerate() {
                        dscores[slot] = dlogits[e as usize] * (dw[slot] - mean);
                    }
                    dlogits.iter_mut().for_each(|p| *p *= -mean * scale);
                    for (&e, d) in ids.iter().zip(&dscores) {
                        dlogits[e as usize] = d * scale;
                    }
                }
                (RouterScore::Sigmoid, normalize) => {
                    let p = |e: i64| sigmoid(x[e as usize]);
                    let (sum, mean) = if normalize {
                        let sum = ids.iter().map(|&e| p(e)).sum::<f32>() + SUM_FLOOR;
                        let dot: f32 = ids.iter().zip(dw).map(|(&e, dw)| p(e) * dw).sum();
                        (sum, dot / sum)
                    } else {
                        (1.0, 0.0)
                    };
                    dlogits.fill(0.0);
                    for (&e, dw) in ids.iter().zip(dw) {
                        let p = p(e);
                        dlogits[e as usize] = scale * (dw - mean) / sum * p * (1.0 - p);
                    }
                }
            }
        }
    }))
}

pub(super) fn sort(experts: &FlexTensor, num_experts: usize) -> Option<SortedExperts<Flex>> {
    let shape = dims(experts);
    let sorted = sort_on_host(&integers(experts)?, num_experts);
    fast_path::took("sort_by_expert");
    let int =
        |values: &[i64], shape: &[usize]| int_from_i64::<Flex>(values, shape, &Default::default());
    Some(SortedExperts {
        order: int(&sorted.order, &[sorted.order.len()]),
        inverse: int(&sorted.inverse, &shape),
        offsets: int(&sorted.offsets, &[num_experts + 1]),
    })
}

pub(super) fn permute(
    x: &FlexTensor,
    order: &FlexTensor,
    weights: Option<&FlexTensor>,
    top_k: usize,
) -> Option<FlexTensor> {
    let x = contiguous_f32(x)?;
    let weights = match weights {
        Some(weights) => Some(contiguous_f32(weights)?),
        None => None,
    };
    let order = integers(order)?;
    fast_path::took("permute_rows");
    let hidden = dims(&x)[1];
    let (x, weights) = (values(&x), weights.as_ref().map(values));
    Some(pool::new_f32(&[order.len(), hidden], |rows| {
        let jobs = num_parts(rows.len(), MIN_PART).min(order.len().max(1));
        let rows = SharedMut::new(rows);
        run_jobs(jobs, |job| {
            for row in part(order.len(), jobs, 1, job) {
                let assignment = order[row] as usize;
                // SAFETY: each row is written once.
                let out = unsafe { rows.slice(row * hidden..(row + 1) * hidden) };
                let source = &x[assignment / top_k * hidden..][..hidden];
                match weights {
                    None => out.copy_from_slice(source),
                    Some(weights) => {
                        let w = weights[assignment];
                        out.iter_mut().zip(source).for_each(|(y, x)| *y = w * x);
                    }
                }
            }
        });
    }))
}

pub(super) fn unpermute(
    rows: &FlexTensor,
    inverse: &FlexTensor,
    weights: Option<&FlexTensor>,
    offsets: &FlexTensor,
) -> Option<FlexTensor> {
    let rows = contiguous_f32(rows)?;
    let weights = match weights {
        Some(weights) => Some(contiguous_f32(weights)?),
        None => None,
    };
    let (tokens, top_k, hidden) = (dims(inverse)[0], dims(inverse)[1], dims(&rows)[1]);
    let (inverse, end) = (integers(inverse)?, used_rows(offsets)?);
    fast_path::took("unpermute_rows");
    let (rows, weights) = (values(&rows), weights.as_ref().map(values));
    Some(pool::new_f32(&[tokens, hidden], |out| {
        let jobs = num_parts(out.len() * top_k, MIN_PART).min(tokens.max(1));
        let out = SharedMut::new(out);
        run_jobs(jobs, |job| {
            for token in part(tokens, jobs, 1, job) {
                // SAFETY: each token's row is written by one job.
                let sum = unsafe { out.slice(token * hidden..(token + 1) * hidden) };
                sum.fill(0.0);
                for slot in token * top_k..(token + 1) * top_k {
                    let row = inverse[slot];
                    if row >= end {
                        continue;
                    }
                    let w = weights.map_or(1.0, |weights| weights[slot]);
                    let source = &rows[row as usize * hidden..][..hidden];
                    sum.iter_mut().zip(source).for_each(|(y, x)| *y += w * x);
                }
            }
        });
    }))
}

pub(super) fn unpermute_weight_grad(
    rows: &FlexTensor,
    inverse: &FlexTensor,
    dy: &FlexTensor,
    offsets: &FlexTensor,
) -> Option<FlexTensor> {
    let (rows, dy) = (contiguous_f32(rows)?, contiguous_f32(dy)?);
    let shape = dims(inverse);
    let (tokens, top_k, hidden) = (shape[0], shape[1], dims(&rows)[1]);
    let (inverse, end) = (integers(inverse)?, used_rows(offsets)?);
    fast_path::took("unpermute_weight_grad");
    let (rows, dy) = (values(&rows), values(&dy));
    Some(pool::new_f32(&shape, |dweights| {
        let jobs = num_parts(dweights.len() * hidden, MIN_PART).min(tokens.max(1));
        let dweights = SharedMut::new(dweights);
        run_jobs(jobs, |job| {
            for token in part(tokens, jobs, 1, job) {
                let slots = token * top_k..(token + 1) * top_k;
                // SAFETY: each token has slots of its own.
                let out = unsafe { dweights.slice(slots.clone()) };
                let dy = &dy[token * hidden..][..hidden];
                for (out, slot) in out.iter_mut().zip(slots) {
                    let row = inverse[slot];
                    *out = if row < end {
                        dot(dy, &rows[row as usize * hidden..][..hidden])
                    } else {
                        0.0
                    };
                }
            }
        });
    }))
}

/// A dot product in eight lanes.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 8;
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f32>() + rest
}

/// Number of rows that belong to an expert.
fn used_rows(offsets: &FlexTensor) -> Option<i64> {
    debug_assert!(matches!(offsets.dtype(), DType::I64 | DType::I32));
    integers(offsets)?.last().copied()
}
