//! Attention with keys and values travelling around the ring of ranks.
//!
//! Each rank attends to one rank's keys at a time while the next ones are on their way. Results of several blocks of keys
//! join by their log-sum-exps:
//!
//! ```text
//! lse = log(exp(lse_a) + exp(lse_b)),   out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b
//! ```
//!
//! Backward goes around once more: with the joined output and log-sum-exp, the ordinary backward kernel gives a block's
//! share of every gradient. The gradients of keys and values travel with them, in fp32, and end where they belong.

use std::ops::Range;

use bridge_ops::{
    AttentionGrads, AttentionOutput, AttentionRule, AttentionSpec, DType, Float, Ops, Param, Tape,
    Var,
};
use burn::tensor::Tensor;
use burn_backend::TensorMetadata;

use super::blocks::{Block, Chunks};
use crate::comm::{Group, Pending};
use crate::tensor::SEQ_DIM;
use crate::tensors::{dims, float, narrow, replaced, tensor, to_dtype, zeros};

/// Stands for the log-sum-exp of no keys; finite, so that differences are.
const NOTHING: f32 = -1e30;

pub(super) fn attend<B: Ops>(
    tape: &Tape<B>,
    q: &Var<B>,
    k: &Var<B>,
    v: &Var<B>,
    spec: &AttentionSpec<B>,
    chunks: Chunks,
    group: &Group<B>,
) -> Var<B> {
    let ring = Ring {
        chunks,
        group: group.clone(),
        rule: spec.rule.clone(),
        sinks: spec.sinks.clone(),
    };
    let (q_value, k_value, v_value) = (q.value(), k.value(), v.value());
    let result = ring.forward(&q_value, k_value.clone(), v_value.clone());
    let output = result.output.clone();
    let params: Vec<&Param<B>> = spec.sinks.iter().collect();
    tape.record_with_params(output, &[q, k, v], &params, move |dout| {
        let [dq, dk, dv] = ring.backward(q_value, k_value, v_value, &result, dout);
        vec![Some(dq), Some(dk), Some(dv)]
    })
}

struct Ring<B: Ops> {
    chunks: Chunks,
    group: Group<B>,
    rule: AttentionRule,
    sinks: Option<Param<B>>,
}

impl<B: Ops> Ring<B> {
    /// The rank whose keys are here after `step` moves.
    fn origin(&self, step: usize) -> usize {
        (self.group.rank() + self.group.size() - step) % self.group.size()
    }

    /// Starts handing `x` to the next rank and taking what the one before has.
    fn pass(&self, x: Float<B>) -> Pending<B> {
        let (rank, size, rows) = (self.group.rank(), self.group.size(), dims(&x)[0]);
        let (mut send, mut recv) = (vec![0; size], vec![0; size]);
        send[(rank + 1) % size] = rows;
        recv[(rank + size - 1) % size] = rows;
        self.group.start_all_to_all(x, &send, &recv)
    }

    fn sinks_of(&self, block: &Block) -> Option<Float<B>> {
        self.sinks.as_ref().filter(|_| block.own).map(Param::value)
    }

    fn forward(&self, q: &Float<B>, mut k: Float<B>, mut v: Float<B>) -> AttentionOutput<B> {
        let dtype = q.dtype();
        let size = self.chunks.size;
        // Of each half of the queries.
        let mut joined: [Option<Joined<B>>; 2] = [None, None];
        let steps = self.group.size();
        for step in 0..steps {
            let next = (step + 1 < steps).then(|| [self.pass(k.clone()), self.pass(v.clone())]);
            for block in self
                .chunks
                .blocks(self.group.rank(), self.origin(step), &self.rule)
            {
                let found = B::attention_forward(
                    narrow::<B>(q.clone(), SEQ_DIM, block.queries.clone()),
                    narrow::<B>(k.clone(), SEQ_DIM, block.keys.clone()),
                    narrow::<B>(v.clone(), SEQ_DIM, block.keys.clone()),
                    self.sinks_of(&block),
                    &block.rule,
                );
                for (half, rows) in halves(&block.queries, size) {
                    let part = Joined::<B>::new(&found, rows);
                    joined[half] = Some(match joined[half].take() {
                        None => part,
                        Some(so_far) => so_far.join(part),
                    });
                }
            }
            if let Some([next_k, next_v]) = next {
                (k, v) = (next_k.wait(), next_v.wait());
            }
        }
        let halves = joined.map(|half| half.expect("queries see their own keys"));
        let (outputs, lses): (Vec<_>, Vec<_>) = halves
            .into_iter()
            .map(|half| (to_dtype::<B>(float(half.output), dtype), float(half.lse)))
            .unzip();
        AttentionOutput {
            output: B::float_cat(outputs, SEQ_DIM),
            lse: B::float_cat(lses, 2),
        }
    }

    /// Gradients of queries, keys and values; those of the sinks go to their slot.
    fn backward(
        &self,
        q: Float<B>,
        mut k: Float<B>,
        mut v: Float<B>,
        result: &AttentionOutput<B>,
        dout: Float<B>,
    ) -> [Float<B>; 3] {
        let device = B::float_device(&q);
        let dtypes = [q.dtype(), k.dtype(), v.dtype()];
        let wide = |x: &Float<B>| zeros::<B>(&dims(x), &device, DType::F32);
        let (mut dq, mut dk, mut dv) = (wide(&q), wide(&k), wide(&v));
        let steps = self.group.size();
        for step in 0..steps {
            let next = (step + 1 < steps).then(|| [self.pass(k.clone()), self.pass(v.clone())]);
            for block in self
                .chunks
                .blocks(self.group.rank(), self.origin(step), &self.rule)
            {
                let rows = |x: &Float<B>| narrow::<B>(x.clone(), SEQ_DIM, block.queries.clone());
                let grads: AttentionGrads<B> = B::attention_backward(
                    rows(&q),
                    narrow::<B>(k.clone(), SEQ_DIM, block.keys.clone()),
                    narrow::<B>(v.clone(), SEQ_DIM, block.keys.clone()),
                    self.sinks_of(&block),
                    AttentionOutput {
                        output: rows(&result.output),
                        lse: narrow::<B>(result.lse.clone(), 2, block.queries.clone()),
                    },
                    rows(&dout),
                    &block.rule,
                );
                dq = added::<B>(dq, &block.queries, grads.dq);
                dk = added::<B>(dk, &block.keys, grads.dk);
                dv = added::<B>(dv, &block.keys, grads.dv);
                let sinks = self.sinks.as_ref().filter(|sinks| sinks.requires_grad());
                if let (Some(sinks), Some(dsinks)) = (sinks, grads.dsinks) {
                    sinks.accumulate_grad(dsinks);
                }
            }
            // The gradients go where their keys go, and once more at the end: then they are home.
            let moved = [self.pass(dk), self.pass(dv)];
            if let Some([next_k, next_v]) = next {
                (k, v) = (next_k.wait(), next_v.wait());
            }
            [dk, dv] = moved.map(Pending::wait);
        }
        let [q, k, v] = dtypes;
        [(dq, q), (dk, k), (dv, v)].map(|(grad, dtype)| to_dtype::<B>(grad, dtype))
    }
}

/// The halves of a rank's queries that `queries` covers, with their rows among `queries`.
fn halves(queries: &Range<usize>, size: usize) -> Vec<(usize, Range<usize>)> {
    (queries.start / size..queries.end / size)
        .map(|half| {
            let start = half * size - queries.start;
            (half, start..start + size)
        })
        .collect()
}

/// `sum` with `grad` added to the part of the sequence in `range`.
fn added<B: Ops>(sum: Float<B>, range: &Range<usize>, grad: Float<B>) -> Float<B> {
    let grad = to_dtype::<B>(grad, DType::F32);
    if *range == (0..dims(&sum)[SEQ_DIM]) {
        return B::add(sum, grad);
    }
    let before = narrow::<B>(sum.clone(), SEQ_DIM, range.clone());
    replaced::<B>(sum, SEQ_DIM, range.clone(), B::add(before, grad))
}

/// The result for some queries over the keys seen so far.
struct Joined<B: Ops> {
    /// [batch, rows, heads, d] f32
    output: Tensor<B, 4>,
    /// [batch, heads, rows] f32
    lse: Tensor<B, 3>,
}

impl<B: Ops> Joined<B> {
    fn new(found: &AttentionOutput<B>, rows: Range<usize>) -> Self {
        let output = narrow::<B>(found.output.clone(), SEQ_DIM, rows.clone());
        let lse = tensor::<B, 3>(narrow::<B>(found.lse.clone(), 2, rows));
        Self {
            output: tensor(to_dtype::<B>(output, DType::F32)),
            // A query that sees none of these keys has a log-sum-exp of minus infinity.
            lse: lse.clamp_min(NOTHING),
        }
    }

    fn join(self, other: Self) -> Self {
        let max = self.lse.clone().max_pair(other.lse.clone());
        let weight = |lse: &Tensor<B, 3>| (lse.clone() - max.clone()).exp();
        let (own, others) = (weight(&self.lse), weight(&other.lse));
        let total = own.clone() + others.clone();
        let factor = |weight: Tensor<B, 3>| {
            (weight / total.clone())
                .swap_dims(1, 2)
                .unsqueeze_dim::<4>(3) // [batch, rows, heads, 1]
        };
        Self {
            output: self.output * factor(own) + other.output * factor(others),
            lse: total.log() + max,
        }
    }
}
