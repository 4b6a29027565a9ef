//! A few queries over many keys, as in generation: keys and values are read once where they lie.
//!
//! Keys are cut into chunks of fixed size, so that a long cache is shared among threads; each chunk yields its own
//! maximum, sum of weights and weighted sum of values, and these are combined in order.

use burn_flex::Flex;

use super::super::pool;
use super::super::simd::{fma, lane_sum, vectorized};
use super::super::threads::{SharedMut, run_jobs};
use super::forward::{cap_scores, weights_above};
use super::{KEYS, Problem};
use crate::attention::{AttentionDims, AttentionOutput};

/// Up to this many rows (queries times heads of a group), reading keys in place beats packing them.
const MAX_ROWS: usize = 16;
/// Keys per chunk.
const CHUNK: usize = 4 * KEYS;

pub(super) fn suits(dims: &AttentionDims) -> bool {
    dims.s * dims.group() <= MAX_ROWS
}

pub(super) fn run(problem: &Problem<'_>) -> AttentionOutput<Flex> {
    let AttentionDims {
        batch,
        s,
        kv_len,
        heads,
        kv_heads,
        dv,
        ..
    } = problem.dims;
    let rows = s * problem.dims.group();
    let chunks = kv_len.div_ceil(CHUNK).max(1);
    // Of each chunk and row: maximum, sum of weights, weighted sum of values.
    let state = dv + 2;
    let mut states = vec![0.0; batch * kv_heads * chunks * rows * state];
    {
        let states = SharedMut::new(&mut states);
        run_jobs(batch * kv_heads * chunks, |job| {
            let (pair, chunk) = (job / chunks, job % chunks);
            let keys = chunk * CHUNK..((chunk + 1) * CHUNK).min(kv_len);
            // SAFETY: each job has its own states.
            let states = unsafe { states.slice(job * rows * state..(job + 1) * rows * state) };
            run_chunk(problem, (pair / kv_heads, pair % kv_heads), keys, states);
        });
    }

    let mut lse = vec![0.0; batch * heads * s];
    let output = pool::new_f32(&[batch, s, heads, dv], |output| {
        for pair in 0..batch * kv_heads {
            let (b, kv_head) = (pair / kv_heads, pair % kv_heads);
            problem.for_rows(0..s, kv_head, |row, i, head| {
                let of_chunk = |chunk: usize| {
                    &states[((pair * chunks + chunk) * rows + row) * state..][..state]
                };
                let sink = problem
                    .sinks
                    .as_ref()
                    .map_or(f32::NEG_INFINITY, |sinks| sinks[head]);
                let max = (0..chunks)
                    .map(|chunk| of_chunk(chunk)[0])
                    .fold(sink, f32::max);
                let mut total = (sink - max).exp();
                let at = problem.query_index(b, i, head, dv);
                let output = &mut output[at..at + dv];
                output.fill(0.0);
                for chunk in (0..chunks)
                    .map(of_chunk)
                    .filter(|chunk| chunk[0] > f32::NEG_INFINITY)
                {
                    let factor = (chunk[0] - max).exp();
                    total += factor * chunk[1];
                    output
                        .iter_mut()
                        .zip(&chunk[2..])
                        .for_each(|(out, sum)| *out += factor * sum);
                }
                let inverse = if total > 0.0 { 1.0 / total } else { 0.0 };
                output.iter_mut().for_each(|out| *out *= inverse);
                lse[problem.lse_index(b, i, head)] = max + total.ln();
            });
        }
    });
    let lse = pool::new_f32(&[batch, heads, s], |out| out.copy_from_slice(&lse));
    AttentionOutput { output, lse }
}

fn run_chunk(
    problem: &Problem<'_>,
    (b, kv_head): (usize, usize),
    keys: std::ops::Range<usize>,
    states: &mut [f32],
) {
    let AttentionDims {
        s,
        kv_len,
        kv_heads,
        d,
        dv,
        ..
    } = problem.dims;
    let group = problem.dims.group();
    let rows = s * group;
    let mut q = vec![0.0; rows * d];
    problem.for_rows(0..s, kv_head, |row, i, head| {
        let source = &problem.q[problem.query_index(b, i, head, d)..][..d];
        q[row * d..][..d]
            .iter_mut()
            .zip(source)
            .for_each(|(q, x)| *q = x * problem.scale);
    });

    let mut scores = vec![0.0; rows * keys.len()];
    let k = &problem.k[problem.key_index(b, keys.start, kv_head, d)..];
    scores_of(&q, k, d, kv_heads * d, &mut scores);
    for (row, (scores, state)) in scores
        .chunks_exact_mut(keys.len())
        .zip(states.chunks_exact_mut(dv + 2))
        .enumerate()
    {
        let visible = problem.rule.visible(b, row / group, s, kv_len);
        let start = visible.start.clamp(keys.start, keys.end) - keys.start;
        let end = (visible.end.clamp(keys.start, keys.end) - keys.start).max(start);
        scores[..start].fill(0.0);
        scores[end..].fill(0.0);
        let scores = &mut scores[start..end];
        if let Some(cap) = problem.softcap {
            scores
                .chunks_mut(KEYS)
                .for_each(|scores| cap_scores(scores, cap));
        }
        let (max, total) = weights_above(scores, f32::NEG_INFINITY);
        (state[0], state[1]) = (max, total);
        state[2..].fill(0.0);
    }
    let v = &problem.v[problem.key_index(b, keys.start, kv_head, dv)..];
    add_values(&scores, v, dv, kv_heads * dv, keys.len(), states);
}

vectorized! {
    /// scores: [rows, keys] = q: [rows, d] times keys that are `stride` apart.
    fn scores_of(q: &[f32], k: &[f32], d: usize, stride: usize, scores: &mut [f32]) {
        let rows = q.len() / d;
        let keys = scores.len() / rows;
        for j in 0..keys {
            let k = &k[j * stride..][..d];
            for (row, q) in q.chunks_exact(d).enumerate() {
                scores[row * keys + j] = lane_sum([q, k], |[q, k], sum| fma::<FMA>(q, k, sum));
            }
        }
    }
}

vectorized! {
    /// Adds weights: [rows, keys] times values that are `stride` apart to the sums in `states`: [rows, 2 + dv].
    fn add_values(weights: &[f32], v: &[f32], dv: usize, stride: usize, keys: usize, states: &mut [f32]) {
        for j in 0..keys {
            let v = &v[j * stride..][..dv];
            for (row, state) in states.chunks_exact_mut(dv + 2).enumerate() {
                let weight = weights[row * keys + j];
                for (sum, v) in state[2..].iter_mut().zip(v) {
                    *sum = fma::<FMA>(weight, *v, *sum);
                }
            }
        }
    }
}
