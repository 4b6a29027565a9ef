//! Recurrent layers over sequences of which each rank has a part: each rank runs some of the heads over the whole sequence,
//! between two exchanges, as attention does by `a2a` (Jacobs et al. 2023, "DeepSpeed Ulysses").

use std::ops::Range;

use bridge_ops::{DType, Int, Ops, Param, Tape, Var, reshape};
use burn::tensor::{Int as IntKind, Tensor};
use burn_backend::TensorMetadata;

use super::attention::ContextParallel;
use super::gather::{chunk_order, reordered, whole};
use super::heads::{to_heads, to_sequence};
use crate::tensor::SEQ_DIM;
use crate::tensors::{dims, float, narrow, tensor, to_dtype, zeros};

impl<B: Ops> ContextParallel<B> {
    /// Which of `heads` heads this rank runs.
    ///
    /// # Panics
    /// If they cannot be divided among the ranks.
    #[track_caller]
    pub fn own_heads(&self, heads: usize) -> Range<usize> {
        let Some(group) = self.group() else {
            return 0..heads;
        };
        let n = group.size();
        assert!(
            heads.is_multiple_of(n),
            "{heads} recurrent heads cannot be divided among {n} context-parallel ranks"
        );
        let share = heads / n;
        group.rank() * share..(group.rank() + 1) * share
    }

    /// From this rank's part of the sequence for all heads to the whole sequence for its own heads.
    /// x: [batch, local seq, heads * d] -> [batch, seq, own heads * d]. Backward: the way back.
    ///
    /// # Panics
    /// If the heads cannot be divided among the ranks.
    #[track_caller]
    pub fn to_own_heads(&self, tape: &Tape<B>, x: &Var<B>, heads: usize) -> Var<B> {
        let Some(group) = self.group() else {
            return x.clone();
        };
        let own = self.own_heads(heads).len();
        let shape = x.shape();
        let (batch, local, channels) = (shape[0], shape[1], shape[2]);
        let x = reshape(tape, x, &[batch, local, heads, channels / heads]);
        let x = to_heads(tape, &x, group);
        reshape(
            tape,
            &x,
            &[batch, local * group.size(), channels / heads * own],
        )
    }

    /// The inverse of [`to_own_heads`](Self::to_own_heads), for `heads` heads of all ranks together.
    /// x: [batch, seq, own heads * d] -> [batch, local seq, heads * d].
    pub fn to_own_tokens(&self, tape: &Tape<B>, x: &Var<B>, heads: usize) -> Var<B> {
        let Some(group) = self.group() else {
            return x.clone();
        };
        let own = self.own_heads(heads).len();
        let shape = x.shape();
        let (batch, seq, channels) = (shape[0], shape[1], shape[2]);
        let x = reshape(tape, x, &[batch, seq, own, channels / own]);
        let x = to_sequence(tape, &x, group);
        reshape(
            tape,
            &x,
            &[batch, seq / group.size(), channels / own * heads],
        )
    }

    /// The token after each one in whole sequences, and `end` after the last. ids: [batch, local seq] -> the same shape.
    pub fn next_tokens(&self, ids: Int<B>, end: i64) -> Int<B> {
        let ids = Tensor::<B, 2, IntKind>::from_primitive(ids);
        let Some(group) = self.group() else {
            return moved_up(ids, end).into_primitive();
        };
        // Ids are far below 2^24, up to which fp32 holds whole numbers exactly.
        let n = group.size();
        let values = to_dtype::<B>(float(ids.clone().float()), DType::F32);
        let gathered = reordered::<B>(group.all_gather(values, SEQ_DIM), &chunk_order(n));
        let next = moved_up(tensor::<B, 2>(gathered).int(), end);
        let [_, seq] = next.dims();
        let chunk = seq / (2 * n);
        let own = [group.rank(), 2 * n - 1 - group.rank()];
        let own = own.map(|index| next.clone().narrow(SEQ_DIM, index * chunk, chunk));
        Tensor::cat(own.to_vec(), SEQ_DIM).into_primitive()
    }

    /// The whole sequence. x: [batch, local seq, ..] -> [batch, seq, ..]. Backward: this rank's part of the sum of all
    /// ranks' gradients.
    pub fn whole_sequence(&self, tape: &Tape<B>, x: &Var<B>) -> Var<B> {
        match self.group() {
            Some(group) => whole(tape, x, group),
            None => x.clone(),
        }
    }
}

/// Each row one place to the left, `end` in the last: [batch, seq].
fn moved_up<B: Ops>(ids: Tensor<B, 2, IntKind>, end: i64) -> Tensor<B, 2, IntKind> {
    let [_, seq] = ids.dims();
    let last = ids.clone().narrow(SEQ_DIM, 0, 1).full_like(end);
    if seq == 1 {
        return last;
    }
    Tensor::cat(vec![ids.narrow(SEQ_DIM, 1, seq - 1), last], SEQ_DIM)
}

/// The rows `range` of each of `params`, as weights for what `x` goes through next: `(x, the parts)`. Their gradients
/// reach the whole weights when the backward pass comes back to `x`; the other rows' are this rank's zeros, and ranks
/// that use them add theirs.
pub fn rows_of_params<B: Ops>(
    tape: &Tape<B>,
    x: &Var<B>,
    params: &[(&Param<B>, Range<usize>)],
) -> (Var<B>, Vec<Param<B>>) {
    let is_whole = |(param, range): &(&Param<B>, Range<usize>)| *range == (0..param.shape()[0]);
    if params.iter().all(is_whole) {
        let whole = params.iter().map(|(param, _)| (*param).clone());
        return (x.clone(), whole.collect());
    }
    let parts: Vec<Param<B>> = params
        .iter()
        .map(|(param, range)| {
            let value = narrow::<B>(param.value(), 0, range.clone());
            let part = Param::new(param.name(), value);
            part.set_requires_grad(param.requires_grad());
            part
        })
        .collect();
    let wholes: Vec<&Param<B>> = params.iter().map(|(param, _)| *param).collect();
    let owned: Vec<(Param<B>, Param<B>, usize)> = params
        .iter()
        .zip(&parts)
        .map(|((param, range), part)| ((*param).clone(), part.clone(), range.start))
        .collect();
    let x = tape.record_with_params(x.value(), &[x], &wholes, move |dx| {
        // Everything that used the parts has gone back by now.
        for (param, part, start) in owned {
            let Some(grad) = part.take_grad() else {
                continue;
            };
            let shape = param.shape();
            let (own, dtype, device) = (dims(&grad)[0], grad.dtype(), param.device());
            let rows = |count: usize| {
                let mut shape = shape.clone();
                shape[0] = count;
                zeros::<B>(&shape, &device, dtype)
            };
            let mut pieces = Vec::with_capacity(3);
            if start > 0 {
                pieces.push(rows(start));
            }
            pieces.push(grad);
            if start + own < shape[0] {
                pieces.push(rows(shape[0] - start - own));
            }
            param.accumulate_grad(B::float_cat(pieces, 0));
        }
        vec![Some(dx)]
    });
    (x, parts)
}
