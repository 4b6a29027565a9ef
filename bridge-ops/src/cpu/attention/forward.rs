//! The forward pass: an online softmax over blocks of keys.

use burn_flex::Flex;

use super::super::cross_entropy::maximum;
use super::super::elementwise::softcap_values;
use super::super::gemm::{Isa, Matrix, Output, block};
use super::super::math::exp;
use super::super::pool;
use super::super::simd::{lane_sum, vectorized};
use super::super::threads::{SharedMut, run_jobs};
use super::{KEYS, Problem, Scratch, key_blocks};
use crate::attention::{AttentionDims, AttentionOutput};

/// Rows (queries times heads of a group) per job: enough that packing a block of keys is a small part of the work, few
/// enough that scores and sums fit in a usual L2 cache.
const ROWS: usize = 192;

pub(super) fn run(problem: &Problem<'_>) -> AttentionOutput<Flex> {
    let AttentionDims {
        batch,
        s,
        kv_len,
        heads,
        kv_heads,
        d,
        dv,
        ..
    } = problem.dims;
    let isa = Isa::detect();
    let blocks = kv_len.div_ceil(KEYS);
    let (k_len, v_len) = (block::right_len(d, KEYS), block::right_len(KEYS, dv));

    // Keys as a right operand [d, keys], values as one [keys, dv].
    let packed_lens = [
        batch * kv_heads * blocks * k_len,
        batch * kv_heads * blocks * v_len,
    ];
    let mut packed = Scratch::new(&packed_lens);
    let [packed_k, packed_v] = packed.split(packed_lens);
    {
        let (packed_k, packed_v) = (SharedMut::new(packed_k), SharedMut::new(packed_v));
        run_jobs(batch * kv_heads * blocks, |job| {
            let (pair, number) = (job / blocks, job % blocks);
            let (b, kv_head) = (pair / kv_heads, pair % kv_heads);
            let first = number * KEYS;
            let len = KEYS.min(kv_len - first);
            let k_at = problem.key_index(b, first, kv_head, d);
            let v_at = problem.key_index(b, first, kv_head, dv);
            let keys = Matrix::new(problem.k, k_at, (d, len), (1, kv_heads * d));
            let vals = Matrix::new(problem.v, v_at, (len, dv), (kv_heads * dv, 1));
            // SAFETY: jobs write different blocks.
            unsafe {
                block::pack_right(isa, &keys, packed_k.slice(job * k_len..(job + 1) * k_len));
                block::pack_right(isa, &vals, packed_v.slice(job * v_len..(job + 1) * v_len));
            }
        });
    }
    let (packed_k, packed_v) = (&*packed_k, &*packed_v);

    let queries = (ROWS / problem.dims.group()).clamp(1, s.max(1));
    let runs = s.div_ceil(queries);
    let mut lse = None;
    let output = pool::new_f32(&[batch, s, heads, dv], |output| {
        lse = Some(pool::new_f32(&[batch, heads, s], |lse| {
            let (output, lse) = (SharedMut::new(output), SharedMut::new(lse));
            run_jobs(batch * kv_heads * runs, |job| {
                // Late queries see the most keys when attention is causal: they go first.
                let (pair, run) = (
                    job % (batch * kv_heads),
                    runs - 1 - job / (batch * kv_heads),
                );
                let (b, kv_head) = (pair / kv_heads, pair % kv_heads);
                let tile = Tile {
                    problem,
                    isa,
                    b,
                    kv_head,
                    queries: run * queries..((run + 1) * queries).min(s),
                    packed_k: &packed_k[pair * blocks * k_len..][..blocks * k_len],
                    packed_v: &packed_v[pair * blocks * v_len..][..blocks * v_len],
                };
                // SAFETY: jobs have different queries or heads.
                unsafe { tile.run(output, lse) };
            });
        }));
    });
    AttentionOutput {
        output,
        lse: lse.expect("filled with the output"),
    }
}

/// Some queries of the heads that share a key-value head.
struct Tile<'a> {
    problem: &'a Problem<'a>,
    isa: Isa,
    b: usize,
    kv_head: usize,
    queries: std::ops::Range<usize>,
    packed_k: &'a [f32],
    packed_v: &'a [f32],
}

impl Tile<'_> {
    /// # Safety
    /// Nobody else may access these queries and heads of the outputs.
    unsafe fn run(&self, output: SharedMut<'_, f32>, lse: SharedMut<'_, f32>) {
        let Problem { dims, rule, .. } = self.problem;
        let AttentionDims {
            s, kv_len, d, dv, ..
        } = *dims;
        let group = dims.group();
        let rows = self.queries.len() * group;
        let (k_len, v_len) = (block::right_len(d, KEYS), block::right_len(KEYS, dv));
        let left_len = block::left_len(rows, d.max(KEYS));
        let lens = [
            rows * d,
            block::left_len(rows, d),
            rows * KEYS,
            left_len,
            rows * dv,
            rows,
            rows,
        ];
        let mut scratch = Scratch::new(&lens);
        let [q, packed_q, scores, packed_p, sums, max, total] = scratch.split(lens);

        // Rows of queries, scaled.
        self.problem
            .for_rows(self.queries.clone(), self.kv_head, |row, i, head| {
                let source = &self.problem.q[self.problem.query_index(self.b, i, head, d)..][..d];
                q[row * d..][..d]
                    .iter_mut()
                    .zip(source)
                    .for_each(|(q, x)| *q = x * self.problem.scale);
                // A sink is a key with this score and no value.
                let sink = self.problem.sinks.as_ref().map(|sinks| sinks[head]);
                max[row] = sink.unwrap_or(f32::NEG_INFINITY);
                total[row] = if sink.is_some() { 1.0 } else { 0.0 };
            });
        block::pack_left(self.isa, &Matrix::row_major(q, rows, d), packed_q);
        sums.fill(0.0);

        let visible: Vec<_> = self
            .queries
            .clone()
            .map(|i| rule.visible(self.b, i, s, kv_len))
            .collect();
        for keys in key_blocks(
            self.problem.visible_to(self.b, self.queries.clone()),
            kv_len,
        ) {
            let right = &self.packed_k[keys.number * k_len..][..k_len];
            block::multiply(
                self.isa,
                packed_q,
                (right, d),
                (rows, d, keys.len),
                (scores, KEYS),
                Output::Overwrite,
            );
            for row in 0..rows {
                let scores = &mut scores[row * KEYS..][..keys.len];
                let columns = keys.columns(&visible[row / group]);
                let rescale = softmax_step(
                    scores,
                    columns,
                    self.problem.softcap,
                    &mut max[row],
                    &mut total[row],
                );
                if rescale != 1.0 {
                    sums[row * dv..][..dv]
                        .iter_mut()
                        .for_each(|sum| *sum *= rescale);
                }
            }
            let p = Matrix::with_row_stride(scores, rows, keys.len, KEYS);
            block::pack_left(self.isa, &p, packed_p);
            let right = &self.packed_v[keys.number * v_len..][..v_len];
            block::multiply(
                self.isa,
                packed_p,
                (right, keys.packed),
                (rows, keys.len, dv),
                (sums, dv),
                Output::Add,
            );
        }

        self.problem
            .for_rows(self.queries.clone(), self.kv_head, |row, i, head| {
                let at = self.problem.query_index(self.b, i, head, dv);
                let lse_at = self.problem.lse_index(self.b, i, head);
                // SAFETY: the caller's promise.
                let (output, lse) =
                    unsafe { (output.slice(at..at + dv), lse.slice(lse_at..lse_at + 1)) };
                let inverse = if total[row] > 0.0 {
                    1.0 / total[row]
                } else {
                    0.0
                };
                output
                    .iter_mut()
                    .zip(&sums[row * dv..])
                    .for_each(|(out, sum)| *out = sum * inverse);
                lse[0] = max[row] + total[row].ln();
            });
    }
}

/// Turns scores into weights relative to the greatest score so far, 0 outside `columns`, and updates that maximum and
/// the sum of weights. Returns the factor by which earlier sums are too large.
fn softmax_step(
    scores: &mut [f32],
    columns: std::ops::Range<usize>,
    softcap: Option<f32>,
    max: &mut f32,
    total: &mut f32,
) -> f32 {
    let (start, end) = (columns.start, columns.end);
    scores[..start].fill(0.0);
    scores[end..].fill(0.0);
    let scores = &mut scores[start..end];
    if scores.is_empty() {
        return 1.0;
    }
    if let Some(cap) = softcap {
        cap_scores(scores, cap);
    }
    let (new_max, sum) = weights_above(scores, *max);
    let rescale = (*max - new_max).exp();
    *total = *total * rescale + sum;
    *max = new_max;
    rescale
}

/// [`softcap_values`] in place.
pub(super) fn cap_scores(scores: &mut [f32], cap: f32) {
    let mut capped = [0.0; KEYS];
    softcap_values(scores, cap, &mut capped[..scores.len()]);
    scores.copy_from_slice(&capped[..scores.len()]);
}

vectorized! {
    /// `x = exp(x - m)` with m the greatest of x and `max`; returns m and the sum.
    pub(super) fn weights_above(x: &mut [f32], max: f32) -> (f32, f32) {
        let block_max = maximum(x);
        let max = if block_max > max { block_max } else { max };
        for x in x.iter_mut() {
            *x = exp::<FMA>(*x - max);
        }
        (max, lane_sum([&*x], |[x], sum| sum + x))
    }
}
