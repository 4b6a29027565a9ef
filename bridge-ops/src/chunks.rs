//! Sequences cut into chunks, for recurrences that are computed chunk by chunk as matrix products, and packed documents
//! taken one by one. What the portable bodies of [`ssd_scan`](crate::ssd_scan) and
//! [`gated_delta_rule`](crate::gated_delta_rule) share.

use burn::tensor::{Bool, Tensor};
use burn_backend::TensorMetadata;

use crate::ops::Ops;
use crate::primitive::{Float, dims, float, tensor, to_f32};
use crate::shape::slices_along;

/// Score of a pair whose later token comes first. Its exponential is 0, and unlike an infinity it makes no NaN.
const FUTURE: f32 = -1e30;

/// How `[batch, seq, heads, ..]` is cut: each head of each row is a sequence of `count` chunks of `len` tokens, the last
/// one filled up with zeros.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chunks {
    batch: usize,
    seq: usize,
    heads: usize,
    len: usize,
    count: usize,
}

impl Chunks {
    /// Chunks of `chunk_size` tokens, or fewer when the sequence is shorter.
    pub(crate) fn new(batch: usize, seq: usize, heads: usize, chunk_size: usize) -> Self {
        let len = chunk_size.clamp(1, seq.max(1));
        Self {
            batch,
            seq,
            heads,
            len,
            count: seq.div_ceil(len),
        }
    }

    /// Number of chunks.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Number of sequences: `batch * heads`.
    pub(crate) fn sequences(&self) -> usize {
        self.batch * self.heads
    }

    /// [batch, seq, groups, d] -> fp32 [batch * heads, count, len, d], each group repeated for its heads.
    pub(crate) fn split<B: Ops>(&self, x: Float<B>) -> Tensor<B, 4> {
        let x = tensor::<B, 4>(to_f32::<B>(x)).swap_dims(1, 2); // [batch, groups, seq, d]
        let [batch, groups, seq, d] = x.dims();
        let share = self.heads / groups;
        let x = if share == 1 {
            x
        } else {
            x.unsqueeze_dim::<5>(2)
                .expand([batch, groups, share, seq, d])
                .reshape([batch, self.heads, seq, d])
        };
        let filled = self.count * self.len;
        let x = if filled == seq {
            x
        } else {
            let zeros = Tensor::zeros([batch, self.heads, filled - seq, d], &x.device());
            Tensor::cat(vec![x, zeros], 2)
        };
        x.reshape([self.sequences(), self.count, self.len, d])
    }

    /// [batch, seq, heads] -> fp32 [batch * heads, count, len, 1].
    pub(crate) fn split_scalars<B: Ops>(&self, x: Float<B>) -> Tensor<B, 4> {
        let x = tensor::<B, 3>(to_f32::<B>(x)).unsqueeze_dim::<4>(3);
        self.split::<B>(float(x))
    }

    /// The reverse of [`Self::split`] for gradients and outputs: what the heads of a group hold is added up.
    pub(crate) fn join<B: Ops>(&self, x: Tensor<B, 4>, groups: usize) -> Tensor<B, 4> {
        let d = x.dims()[3];
        let filled = self.count * self.len;
        let x = x
            .reshape([self.batch, self.heads, filled, d])
            .narrow(2, 0, self.seq);
        let x = if groups == self.heads {
            x
        } else {
            x.reshape([self.batch, groups, self.heads / groups, self.seq, d])
                .sum_dim(2)
                .squeeze_dim::<4>(2)
        };
        x.swap_dims(1, 2)
    }

    /// The reverse of [`Self::split_scalars`]: [batch, seq, heads].
    pub(crate) fn join_scalars<B: Ops>(&self, x: Tensor<B, 4>) -> Tensor<B, 3> {
        self.join(x, self.heads).squeeze_dim::<3>(3)
    }

    /// The state that each chunk starts from, and the one that the last chunk ends with. With `s` the state before
    /// chunk `k`, the state after it is `step(k, s)`. [batch * heads, rows, columns] each.
    pub(crate) fn scan<B: Ops>(
        &self,
        first: Tensor<B, 3>,
        mut step: impl FnMut(usize, Tensor<B, 3>) -> Tensor<B, 3>,
    ) -> (Tensor<B, 4>, Tensor<B, 3>) {
        let mut state = first;
        let mut entering = Vec::with_capacity(self.count);
        for chunk in 0..self.count {
            entering.push(state.clone());
            state = step(chunk, state);
        }
        (Tensor::stack(entering, 1), state)
    }

    /// Like [`Self::scan`] from the last chunk to the first, starting from zeros: the gradient of the state that each
    /// chunk leaves behind.
    pub(crate) fn scan_back<B: Ops>(
        &self,
        zeros: Tensor<B, 3>,
        mut step: impl FnMut(usize, Tensor<B, 3>) -> Tensor<B, 3>,
    ) -> Tensor<B, 4> {
        let mut grad = zeros;
        let mut leaving = Vec::with_capacity(self.count);
        for chunk in (0..self.count).rev() {
            leaving.push(grad.clone());
            grad = step(chunk, grad);
        }
        leaving.reverse();
        Tensor::stack(leaving, 1)
    }

    /// From the running sums `[.., len, 1]` of the logarithms of decays within a chunk: the decay from token j (column)
    /// to token i (row), 0 where j comes after i. [.., len, len].
    pub(crate) fn pairwise_decay<B: Ops>(&self, sums: &Tensor<B, 4>) -> Tensor<B, 4> {
        let difference = sums.clone() - sums.clone().swap_dims(2, 3);
        let future = self.lower_mask(&sums.device(), 0);
        difference.mask_fill(future, FUTURE).exp()
    }

    /// True above diagonal `offset` (-1: on the main diagonal as well). [1, 1, len, len].
    pub(crate) fn lower_mask<B: Ops>(&self, device: &B::Device, offset: i64) -> Tensor<B, 4, Bool> {
        Tensor::<B, 2, Bool>::tril_mask([self.len, self.len], offset, device)
            .unsqueeze::<4>()
            .expand([self.sequences(), self.count, self.len, self.len])
    }
}

/// The last token of each chunk: [.., len, 1] -> [.., 1, 1].
pub(crate) fn last<B: Ops>(x: &Tensor<B, 4>) -> Tensor<B, 4> {
    let len = x.dims()[2];
    x.clone().narrow(2, len - 1, 1)
}

/// Chunk `index` of [sequences, count, rows, columns].
pub(crate) fn chunk<B: Ops>(x: &Tensor<B, 4>, index: usize) -> Tensor<B, 3> {
    x.clone().narrow(1, index, 1).squeeze_dim::<3>(1)
}

/// The gradient of the terms of running sums: the sum of the gradients from each token to the chunk's end. [.., len, 1].
pub(crate) fn sum_to_end<B: Ops>(x: Tensor<B, 4>) -> Tensor<B, 4> {
    x.flip([2]).cumsum(2).flip([2])
}

/// Runs `run` on each document by itself. `inputs` are `[batch, seq, ..]`, and so are the results, which are put
/// together again; `documents` are offsets into the batch's tokens in row-major order.
pub(crate) fn per_document<B: Ops, const I: usize, const O: usize>(
    inputs: [Float<B>; I],
    documents: &[usize],
    mut run: impl FnMut([Float<B>; I]) -> [Float<B>; O],
) -> [Float<B>; O] {
    let shape = dims(&inputs[0]);
    let (batch, seq) = (shape[0], shape[1]);
    let mut rows: [Vec<Float<B>>; O] = std::array::from_fn(|_| Vec::new());
    for row in 0..batch {
        let mut parts: [Vec<Float<B>>; O] = std::array::from_fn(|_| Vec::new());
        // A document without tokens is nothing.
        let inside = |offset: &&[usize]| {
            let (start, end) = (offset[0], offset[1]);
            start < end && start < (row + 1) * seq && end > row * seq
        };
        for offsets in documents.windows(2).filter(inside) {
            let (start, end) = (
                offsets[0].max(row * seq) - row * seq,
                offsets[1].min((row + 1) * seq) - row * seq,
            );
            let own = inputs.clone().map(|x| {
                let rank = dims(&x).len();
                let x = B::float_slice(x, &slices_along(rank, 0, row..row + 1));
                B::float_slice(x, &slices_along(rank, 1, start..end))
            });
            for (parts, output) in parts.iter_mut().zip(run(own)) {
                parts.push(output);
            }
        }
        for (rows, parts) in rows.iter_mut().zip(parts) {
            rows.push(B::float_cat(parts, 1));
        }
    }
    rows.map(|rows| B::float_cat(rows, 0))
}

/// Checks offsets of packed documents.
#[track_caller]
pub(crate) fn check_documents(op: &str, documents: Option<&[usize]>, tokens: usize) {
    if let Some(offsets) = documents {
        let rising = offsets.windows(2).all(|pair| pair[0] <= pair[1]);
        assert!(
            offsets.first() == Some(&0) && offsets.last() == Some(&tokens) && rising,
            "{op}: documents {offsets:?} do not run from 0 to the {tokens} tokens of the batch"
        );
    }
}

/// The dimensions of a primitive of rank `D`.
#[track_caller]
pub(crate) fn shape_of<B: Ops, const D: usize>(op: &str, name: &str, x: &Float<B>) -> [usize; D] {
    let shape = x.shape().to_vec();
    shape
        .as_slice()
        .try_into()
        .unwrap_or_else(|_| panic!("{op}: {name} has shape {shape:?}, expected {D} dimensions"))
}
