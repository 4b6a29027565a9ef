//! Attention after gathering the keys and values of the whole sequence.

use bridge_ops::{AttentionSpec, Ops, Tape, Var, attention, concat, slice};

use super::blocks::Chunks;
use crate::comm::Group;
use crate::tensor::SEQ_DIM;
use crate::tensors::{dims, narrow};

pub(super) fn attend<B: Ops>(
    tape: &Tape<B>,
    q: &Var<B>,
    k: &Var<B>,
    v: &Var<B>,
    spec: &AttentionSpec<B>,
    chunks: Chunks,
    group: &Group<B>,
) -> Var<B> {
    let (k, v) = (whole(tape, k, group), whole(tape, v, group));
    let size = chunks.size;
    let outputs: Vec<Var<B>> = chunks
        .of_rank(group.rank())
        .into_iter()
        .enumerate()
        .map(|(half, chunk)| {
            let queries = slice(tape, q, SEQ_DIM, half * size..(half + 1) * size);
            // Later keys are seen by nobody here.
            let end = if spec.causal {
                (chunk + 1) * size
            } else {
                chunks.seq()
            };
            let first = match spec.window {
                Some(window) => (chunk * size + 1).saturating_sub(window),
                None => 0,
            };
            let mut own = spec.clone();
            own.rule = chunks.rule_at(&spec.rule, chunk * size..(chunk + 1) * size, first);
            let [k, v] = [&k, &v].map(|x| slice(tape, x, SEQ_DIM, first..end));
            attention(tape, &queries, &k, &v, &own)
        })
        .collect();
    concat(tape, &outputs, SEQ_DIM)
}

/// The whole of a sequence of which each rank has two chunks. x: [batch, 2 chunk, ..] -> [batch, seq, ..]. Backward: each
/// rank's part of the sum of the gradients.
pub(super) fn whole<B: Ops>(tape: &Tape<B>, x: &Var<B>, group: &Group<B>) -> Var<B> {
    let order = chunk_order(group.size());
    let output = reordered::<B>(group.all_gather(x.value(), SEQ_DIM), &order);
    let group = group.clone();
    tape.record(output, &[x], move |dy| {
        let mut inverse = vec![0; order.len()];
        order
            .iter()
            .enumerate()
            .for_each(|(to, from)| inverse[*from] = to);
        let dy = reordered::<B>(dy, &inverse);
        vec![Some(group.reduce_scatter(dy, SEQ_DIM))]
    })
}

/// Where chunk 0, 1, .. of the sequence is among the chunks of the ranks one after another.
pub(super) fn chunk_order(ranks: usize) -> Vec<usize> {
    let place = |chunk: usize| {
        if chunk < ranks {
            2 * chunk
        } else {
            2 * (2 * ranks - 1 - chunk) + 1
        }
    };
    (0..2 * ranks).map(place).collect()
}

/// The chunks along the sequence dimension in another order: chunk `i` of the result is chunk `order[i]` of `x`.
pub(super) fn reordered<B: Ops>(x: bridge_ops::Float<B>, order: &[usize]) -> bridge_ops::Float<B> {
    let size = dims(&x)[SEQ_DIM] / order.len();
    let parts = order
        .iter()
        .map(|chunk| narrow::<B>(x.clone(), SEQ_DIM, chunk * size..(chunk + 1) * size))
        .collect();
    B::float_cat(parts, SEQ_DIM)
}
