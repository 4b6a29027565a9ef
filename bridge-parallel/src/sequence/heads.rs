//! Attention with each rank taking some of the heads over the whole sequence.

use bridge_ops::{AttentionSpec, Float, Ops, Tape, Var, attention};

use super::gather::{chunk_order, reordered};
use crate::comm::Group;
use crate::tensors::{dims, float, reshaped, tensor};

pub(super) fn attend<B: Ops>(
    tape: &Tape<B>,
    q: &Var<B>,
    k: &Var<B>,
    v: &Var<B>,
    spec: &AttentionSpec<B>,
    group: &Group<B>,
) -> Var<B> {
    let (heads, kv_heads, n) = (q.shape()[2], k.shape()[2], group.size());
    assert!(
        heads.is_multiple_of(n) && (kv_heads.is_multiple_of(n) || n.is_multiple_of(kv_heads)),
        "context_attention: {heads} query and {kv_heads} key-value heads cannot be divided among {n} ranks"
    );
    assert!(
        spec.sinks.is_none(),
        "context_attention: sinks need cp_comm_type p2p or all_gather"
    );
    // Fewer key-value heads than ranks: each is given to all ranks whose query heads use it.
    let copies = n.div_ceil(kv_heads);
    let [k, v] = [k, v].map(|x| to_heads(tape, &repeat_heads(tape, x, copies), group));
    let output = attention(tape, &to_heads(tape, q, group), &k, &v, spec);
    to_sequence(tape, &output, group)
}

/// From a part of the sequence for all heads to the whole sequence for a part of the heads.
/// x: [batch, seq / n, heads, d] -> [batch, seq, heads / n, d]. Backward: the way back.
pub(super) fn to_heads<B: Ops>(tape: &Tape<B>, x: &Var<B>, group: &Group<B>) -> Var<B> {
    let output = heads_from_sequence::<B>(x.value(), group);
    let group = group.clone();
    tape.record(output, &[x], move |dy| {
        vec![Some(sequence_from_heads::<B>(dy, &group))]
    })
}

/// The inverse of [`to_heads`]. x: [batch, seq, heads / n, d] -> [batch, seq / n, heads, d].
pub(super) fn to_sequence<B: Ops>(tape: &Tape<B>, x: &Var<B>, group: &Group<B>) -> Var<B> {
    let output = sequence_from_heads::<B>(x.value(), group);
    let group = group.clone();
    tape.record(output, &[x], move |dy| {
        vec![Some(heads_from_sequence::<B>(dy, &group))]
    })
}

fn heads_from_sequence<B: Ops>(x: Float<B>, group: &Group<B>) -> Float<B> {
    let n = group.size();
    let [batch, local, heads, d] = tensor::<B, 4>(x.clone()).dims();
    let rows = vec![heads / n; n];
    let by_head = float(tensor::<B, 4>(x).permute([2, 0, 1, 3])); // [heads, batch, seq / n, d]
    let parts = group.all_to_all(contiguous::<B>(by_head), &rows, &rows);
    // [n, heads / n, batch, seq / n, d] -> [batch, n, seq / n, heads / n, d]
    let parts = reshaped::<B>(parts, &[n, heads / n, batch, local, d]);
    let parts = tensor::<B, 5>(parts).permute([2, 0, 3, 1, 4]);
    let whole = parts.reshape([batch, n * local, heads / n, d]);
    reordered::<B>(float(whole), &chunk_order(n))
}

fn sequence_from_heads<B: Ops>(x: Float<B>, group: &Group<B>) -> Float<B> {
    let n = group.size();
    let order = chunk_order(n);
    let mut inverse = vec![0; order.len()];
    order
        .iter()
        .enumerate()
        .for_each(|(to, from)| inverse[*from] = to);
    let x = tensor::<B, 4>(reordered::<B>(x, &inverse));
    let [batch, seq, own, d] = x.dims();
    let local = seq / n;
    // -> [n, heads / n, batch, seq / n, d]: what each rank gets.
    let parts = x
        .reshape([batch, n, local, own, d])
        .permute([1, 3, 0, 2, 4]);
    let parts = parts.reshape([n * own, batch, local, d]);
    let rows = vec![own; n];
    let by_head = group.all_to_all(float(parts), &rows, &rows); // [heads, batch, seq / n, d]
    let output = tensor::<B, 4>(by_head).permute([1, 2, 0, 3]);
    contiguous::<B>(float(output))
}

/// A permuted view laid out anew, since collectives send memory as it lies.
fn contiguous<B: Ops>(x: Float<B>) -> Float<B> {
    let shape = dims(&x);
    reshaped::<B>(reshaped::<B>(x, &[shape.iter().product()]), &shape)
}

/// Each key-value head `copies` times, one after another. Backward: the sum over copies.
fn repeat_heads<B: Ops>(tape: &Tape<B>, x: &Var<B>, copies: usize) -> Var<B> {
    if copies == 1 {
        return x.clone();
    }
    let [batch, seq, heads, d] = x.tensor::<4>().dims();
    let expanded = x
        .tensor::<4>()
        .unsqueeze_dim::<5>(3)
        .expand([batch, seq, heads, copies, d])
        .reshape([batch, seq, heads * copies, d]);
    tape.record(float(expanded), &[x], move |dy| {
        let dy = tensor::<B, 4>(dy).reshape([batch, seq, heads, copies, d]);
        vec![Some(float(dy.sum_dim(3).reshape([batch, seq, heads, d])))]
    })
}
