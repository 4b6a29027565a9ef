//! The backward pass: scores are computed again, block by block.
//!
//! Queries are cut into at most four chunks (how many depends on their number alone). Each chunk adds up gradients of
//! keys and values in a buffer of its own; these are summed in order at the end, so that chunks can run in parallel
//! and the result is still the same every time.

use std::ops::Range;

use burn_flex::Flex;

use super::super::gemm::{Isa, Matrix, Output, block};
use super::super::math::exp;
use super::super::pool;
use super::super::simd::{fma, lane_sum, vectorized};
use super::super::threads::{SharedMut, part, run_jobs};
use super::forward::cap_scores;
use super::{KEYS, KeyBlock, Problem, Scratch, key_blocks};
use crate::attention::{AttentionDims, AttentionGrads};

/// Rows (queries times heads of a group) at a time: scores and their gradients must fit in a usual L2 cache.
const ROWS: usize = 96;
/// Queries per chunk, at least.
const MIN_CHUNK: usize = 128;
const MAX_CHUNKS: usize = 4;

pub(super) fn run(
    problem: &Problem<'_>,
    out: &[f32],
    lse: &[f32],
    dout: &[f32],
) -> AttentionGrads<Flex> {
    let AttentionDims {
        batch,
        s,
        t,
        kv_len,
        heads,
        kv_heads,
        d,
        dv,
    } = problem.dims;
    let isa = Isa::detect();
    let blocks = kv_len.div_ceil(KEYS);
    let pairs = batch * kv_heads;
    let lens = PackedLens::new(d, dv);

    let packed_lens = [pairs * blocks * lens.total()];
    let mut packed = Scratch::new(&packed_lens);
    let [packed] = packed.split(packed_lens);
    {
        let packed = SharedMut::new(packed);
        run_jobs(pairs * blocks, |job| {
            // SAFETY: jobs write different blocks.
            let packed = unsafe { packed.slice(job * lens.total()..(job + 1) * lens.total()) };
            pack_block(problem, isa, (job / blocks, job % blocks), &lens, packed);
        });
    }
    let packed = &*packed;

    // D = dout . out of each row, [batch, heads, s].
    let mut row_dots = vec![0.0; batch * heads * s];
    row_dots_of(problem, out, dout, &mut row_dots);
    let dsinks = problem
        .sinks
        .as_ref()
        .map(|sinks| sink_grads(problem, sinks, lse, &row_dots));

    let chunks = s.div_ceil(MIN_CHUNK).clamp(1, MAX_CHUNKS);
    let partial_len = kv_len * (d + dv);
    let partial_lens = [pairs * chunks * partial_len];
    let mut partial = Scratch::new(&partial_lens);
    let [partial] = partial.split(partial_lens);
    let dq = pool::new_f32(&[batch, s, heads, d], |dq| {
        let (dq, partial) = (SharedMut::new(dq), SharedMut::new(partial));
        run_jobs(pairs * chunks, |job| {
            // Late chunks see the most keys when attention is causal: they go first.
            let (pair, chunk) = (job % pairs, chunks - 1 - job / pairs);
            let at = (pair * chunks + chunk) * partial_len;
            // SAFETY: jobs have different parts.
            let (dk, dv_sum) =
                unsafe { partial.slice(at..at + partial_len) }.split_at_mut(kv_len * d);
            let work = Chunk {
                problem,
                isa,
                b: pair / kv_heads,
                kv_head: pair % kv_heads,
                packed: &packed[pair * blocks * lens.total()..][..blocks * lens.total()],
                lens,
                dout,
                lse,
                row_dots: &row_dots,
                dk,
                dv: dv_sum,
            };
            // SAFETY: jobs have different queries or heads.
            unsafe { work.run(part(s, chunks, 1, chunk), dq) };
        });
    });
    let partial = &*partial;

    // The sum over chunks, put where the keys are.
    let collected = |width: usize, offset: usize| {
        pool::new_f32(&[batch, t, kv_heads, width], |grad| {
            let grad = SharedMut::new(grad);
            run_jobs(pairs, |pair| {
                let (b, kv_head) = (pair / kv_heads, pair % kv_heads);
                let touched: Vec<_> = (0..chunks)
                    .map(|chunk| problem.visible_to(b, part(s, chunks, 1, chunk)))
                    .collect();
                for j in 0..t {
                    let at = problem.key_index(b, j, kv_head, width);
                    // SAFETY: jobs have different heads.
                    let grad = unsafe { grad.slice(at..at + width) };
                    grad.fill(0.0);
                    for (chunk, _) in touched
                        .iter()
                        .enumerate()
                        .filter(|(_, keys)| keys.contains(&j))
                    {
                        let at = (pair * chunks + chunk) * partial_len + offset + j * width;
                        grad.iter_mut()
                            .zip(&partial[at..at + width])
                            .for_each(|(sum, x)| *sum += x);
                    }
                }
            });
        })
    };
    let dk = collected(d, 0);
    let dv = collected(dv, kv_len * d);
    let dsinks = dsinks.map(|dsinks| pool::new_f32(&[heads], |out| out.copy_from_slice(&dsinks)));
    AttentionGrads { dq, dk, dv, dsinks }
}

/// Sizes of what is packed of each block of keys.
#[derive(Clone, Copy)]
struct PackedLens {
    /// Keys as a right operand [d, keys].
    k_t: usize,
    /// Values as a right operand [dv, keys].
    v_t: usize,
    /// Keys as a right operand [keys, d].
    k: usize,
}

impl PackedLens {
    fn new(d: usize, dv: usize) -> Self {
        Self {
            k_t: block::right_len(d, KEYS),
            v_t: block::right_len(dv, KEYS),
            k: block::right_len(KEYS, d),
        }
    }

    fn total(&self) -> usize {
        self.k_t + self.v_t + self.k
    }

    /// (k_t, v_t, k) of a block.
    fn of<'a>(&self, packed: &'a [f32], number: usize) -> (&'a [f32], &'a [f32], &'a [f32]) {
        let packed = &packed[number * self.total()..][..self.total()];
        let (k_t, rest) = packed.split_at(self.k_t);
        let (v_t, k) = rest.split_at(self.v_t);
        (k_t, v_t, k)
    }
}

fn pack_block(
    problem: &Problem<'_>,
    isa: Isa,
    (pair, number): (usize, usize),
    lens: &PackedLens,
    packed: &mut [f32],
) {
    let AttentionDims {
        kv_len,
        kv_heads,
        d,
        dv,
        ..
    } = problem.dims;
    let (b, kv_head) = (pair / kv_heads, pair % kv_heads);
    let first = number * KEYS;
    let len = KEYS.min(kv_len - first);
    let keys = Matrix::new(
        problem.k,
        problem.key_index(b, first, kv_head, d),
        (len, d),
        (kv_heads * d, 1),
    );
    let vals = Matrix::new(
        problem.v,
        problem.key_index(b, first, kv_head, dv),
        (len, dv),
        (kv_heads * dv, 1),
    );
    let (k_t, rest) = packed.split_at_mut(lens.k_t);
    let (v_t, k) = rest.split_at_mut(lens.v_t);
    block::pack_right(isa, &keys.t(), k_t);
    block::pack_right(isa, &vals.t(), v_t);
    block::pack_right(isa, &keys, k);
}

fn row_dots_of(problem: &Problem<'_>, out: &[f32], dout: &[f32], row_dots: &mut [f32]) {
    let AttentionDims {
        batch,
        s,
        heads,
        dv,
        ..
    } = problem.dims;
    let shared = SharedMut::new(row_dots);
    run_jobs(batch * heads, |job| {
        let (b, head) = (job / heads, job % heads);
        // SAFETY: each job has its own head.
        let dots = unsafe { shared.slice(job * s..(job + 1) * s) };
        for (i, value) in dots.iter_mut().enumerate() {
            let at = problem.query_index(b, i, head, dv);
            *value = dot(&out[at..at + dv], &dout[at..at + dv]);
        }
    });
}

/// `dsink = - sum of exp(sink - lse) D` over the rows of each head.
fn sink_grads(problem: &Problem<'_>, sinks: &[f32], lse: &[f32], row_dots: &[f32]) -> Vec<f32> {
    let AttentionDims {
        batch, s, heads, ..
    } = problem.dims;
    let grad = |(head, sink): (usize, &f32)| {
        let of_row = |b: usize| {
            let at = problem.lse_index(b, 0, head);
            let rows = lse[at..at + s].iter().zip(&row_dots[at..at + s]);
            rows.map(|(lse, dot)| f64::from((sink - lse).exp() * dot))
                .sum::<f64>()
        };
        -(0..batch).map(of_row).sum::<f64>() as f32
    };
    sinks.iter().enumerate().take(heads).map(grad).collect()
}

/// Some queries of the heads that share a key-value head, and what their gradients are added to.
struct Chunk<'a> {
    problem: &'a Problem<'a>,
    isa: Isa,
    b: usize,
    kv_head: usize,
    packed: &'a [f32],
    lens: PackedLens,
    dout: &'a [f32],
    lse: &'a [f32],
    row_dots: &'a [f32],
    /// [kv_len, d] and [kv_len, dv]; only keys that some query of the chunk sees are written.
    dk: &'a mut [f32],
    dv: &'a mut [f32],
}

impl Chunk<'_> {
    /// # Safety
    /// Nobody else may access these queries and heads of `dq`.
    unsafe fn run(mut self, queries: Range<usize>, dq: SharedMut<'_, f32>) {
        let AttentionDims { d, dv, .. } = self.problem.dims;
        let keys = self.problem.visible_to(self.b, queries.clone());
        self.dk[keys.start * d..keys.end * d].fill(0.0);
        self.dv[keys.start * dv..keys.end * dv].fill(0.0);
        let step = (ROWS / self.problem.dims.group()).max(1);
        for first in queries.clone().step_by(step) {
            // SAFETY: passed on.
            unsafe { self.run_tile(first..(first + step).min(queries.end), dq) };
        }
    }

    /// # Safety
    /// As [`run`](Self::run).
    unsafe fn run_tile(&mut self, queries: Range<usize>, dq: SharedMut<'_, f32>) {
        let (problem, isa) = (self.problem, self.isa);
        let AttentionDims {
            s, kv_len, d, dv, ..
        } = problem.dims;
        let group = problem.dims.group();
        let rows = queries.len() * group;
        let (left, right) = (block::left_len, block::right_len);
        let packed_len = left(rows, KEYS).max(left(KEYS, rows));
        let lens = [
            rows * d,
            rows * dv,
            rows * d,
            left(rows, d),
            left(rows, dv),
            right(rows, d),
            right(rows, dv),
            rows * KEYS,
            rows * KEYS,
            packed_len,
        ];
        let mut scratch = Scratch::new(&lens);
        let [
            q,
            dout,
            dq_sum,
            q_left,
            dout_left,
            q_right,
            dout_right,
            p,
            ds,
            packed,
        ] = scratch.split(lens);

        let mut row_lse = vec![0.0; rows];
        let mut row_dot = vec![0.0; rows];
        problem.for_rows(queries.clone(), self.kv_head, |row, i, head| {
            let source = &problem.q[problem.query_index(self.b, i, head, d)..][..d];
            q[row * d..][..d]
                .iter_mut()
                .zip(source)
                .for_each(|(q, x)| *q = x * problem.scale);
            let source = &self.dout[problem.query_index(self.b, i, head, dv)..][..dv];
            dout[row * dv..][..dv].copy_from_slice(source);
            row_lse[row] = self.lse[problem.lse_index(self.b, i, head)];
            row_dot[row] = self.row_dots[problem.lse_index(self.b, i, head)];
        });
        let (q_matrix, dout_matrix) = (
            Matrix::row_major(q, rows, d),
            Matrix::row_major(dout, rows, dv),
        );
        block::pack_left(isa, &q_matrix, q_left);
        block::pack_left(isa, &dout_matrix, dout_left);
        block::pack_right(isa, &q_matrix, q_right);
        block::pack_right(isa, &dout_matrix, dout_right);
        dq_sum.fill(0.0);

        let visible: Vec<_> = queries
            .clone()
            .map(|i| problem.rule.visible(self.b, i, s, kv_len))
            .collect();
        for keys in key_blocks(problem.visible_to(self.b, queries.clone()), kv_len) {
            let KeyBlock {
                number,
                first,
                packed: in_block,
                len,
            } = keys;
            let (k_t, v_t, k) = self.lens.of(self.packed, number);
            let size = (rows, d, len);
            block::multiply(isa, q_left, (k_t, d), size, (p, KEYS), Output::Overwrite);
            let size = (rows, dv, len);
            block::multiply(
                isa,
                dout_left,
                (v_t, dv),
                size,
                (ds, KEYS),
                Output::Overwrite,
            );
            for row in 0..rows {
                let (p, ds) = (&mut p[row * KEYS..][..len], &mut ds[row * KEYS..][..len]);
                let columns = keys.columns(&visible[row / group]);
                score_grads(p, ds, columns, problem.softcap, row_lse[row], row_dot[row]);
            }
            // dv += p^T dout, dk += ds^T q (q holds the scale), dq += ds k
            let p_matrix = Matrix::with_row_stride(p, rows, len, KEYS);
            let ds_matrix = Matrix::with_row_stride(ds, rows, len, KEYS);
            block::pack_left(isa, &p_matrix.t(), packed);
            let dv_block = &mut self.dv[first * dv..(first + len) * dv];
            let size = (len, rows, dv);
            block::multiply(
                isa,
                packed,
                (dout_right, rows),
                size,
                (dv_block, dv),
                Output::Add,
            );
            block::pack_left(isa, &ds_matrix.t(), packed);
            let dk_block = &mut self.dk[first * d..(first + len) * d];
            let size = (len, rows, d);
            block::multiply(
                isa,
                packed,
                (q_right, rows),
                size,
                (dk_block, d),
                Output::Add,
            );
            block::pack_left(isa, &ds_matrix, packed);
            let size = (rows, len, d);
            block::multiply(isa, packed, (k, in_block), size, (dq_sum, d), Output::Add);
        }

        problem.for_rows(queries, self.kv_head, |row, i, head| {
            let at = problem.query_index(self.b, i, head, d);
            // SAFETY: the caller's promise.
            let dq = unsafe { dq.slice(at..at + d) };
            dq.iter_mut()
                .zip(&dq_sum[row * d..])
                .for_each(|(dq, sum)| *dq = sum * problem.scale);
        });
    }
}

/// Turns scores into weights (in `p`) and gradients of weights into gradients of scores (in `ds`), 0 outside
/// `columns`.
fn score_grads(
    p: &mut [f32],
    ds: &mut [f32],
    columns: Range<usize>,
    softcap: Option<f32>,
    lse: f32,
    dot: f32,
) {
    for hidden in [0..columns.start, columns.end..p.len()] {
        p[hidden.clone()].fill(0.0);
        ds[hidden].fill(0.0);
    }
    let (p, ds) = (&mut p[columns.clone()], &mut ds[columns]);
    match softcap {
        None => plain_score_grads(p, ds, lse, dot),
        Some(cap) => {
            cap_scores(p, cap);
            capped_score_grads(p, ds, lse, dot, 1.0 / cap);
        }
    }
}

vectorized! {
    fn plain_score_grads(p: &mut [f32], ds: &mut [f32], lse: f32, dot: f32) {
        for (p, ds) in p.iter_mut().zip(ds) {
            *p = exp::<FMA>(*p - lse);
            *ds = *p * (*ds - dot);
        }
    }
}

vectorized! {
    fn capped_score_grads(p: &mut [f32], ds: &mut [f32], lse: f32, dot: f32, inverse_cap: f32) {
        for (p, ds) in p.iter_mut().zip(ds) {
            let t = *p * inverse_cap;
            *p = exp::<FMA>(*p - lse);
            *ds = *p * (*ds - dot) * fma::<FMA>(-t, t, 1.0);
        }
    }
}

vectorized! {
    pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
        lane_sum([a, b], |[a, b], sum| fma::<FMA>(a, b, sum))
    }
}
