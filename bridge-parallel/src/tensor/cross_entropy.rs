//! The output layer and the loss in one, with the vocabulary divided among ranks: no rank ever has a whole row of logits.
//!
//! ```text
//! z_r  = x W_r^T                          rank r's part of the vocabulary
//! lse  = log sum over r of exp(lse_r)     lse_r of z_r; gathered, one number per token and rank
//! loss = lse - z[target]                  the one rank that has the target contributes its logit
//! dz_r = (softmax part - onehot part) dloss,   dx = sum over r of dz_r W_r (where the region was entered),  dW_r = dz_r^T x
//! ```
//!
//! Tokens are taken in pieces, as on one rank. Where the gradient of the losses is known beforehand, a piece's gradients
//! are computed from the logits at hand; otherwise the backward pass computes them again, without talking to anybody.

use std::ops::Range;

use bridge_ops::{
    CrossEntropySpec, DType, Float, GradSlot, Int, Ops, Param, TARGET_ELSEWHERE, Tape, Var,
};
use burn::tensor::{Int as IntKind, Tensor};
use burn_backend::{Slice, TensorMetadata};

use crate::comm::Group;
use crate::tensors::{dims, float, narrow, replaced, reshaped, tensor, zeros};

/// Log-sum-exp of no logits; finite, so that differences are.
const NOTHING: f32 = -1e30;

/// The loss of each token. x: [tokens, h], the same on all ranks and inside of the region (its gradient is this rank's
/// contribution); weight: local [vocab / tp, h]; targets: `[tokens]` ids of the whole vocabulary -> `[tokens]` f32, the
/// same on all ranks, 0 where the target is ignored.
///
/// `loss_gradient`: what the result will be seeded with, if that is known, as for
/// [`linear_cross_entropy_weighted`](bridge_ops::linear_cross_entropy_weighted).
pub fn vocab_parallel_linear_cross_entropy<B: Ops>(
    tape: &Tape<B>,
    x: &Var<B>,
    weight: &Param<B>,
    targets: &Int<B>,
    loss_gradient: Option<Float<B>>,
    spec: CrossEntropySpec,
    group: &Group<B>,
) -> Var<B> {
    let recorded = tape.needs_grad(&[x], &[weight]);
    let known = loss_gradient.filter(|_| recorded);
    let part = Part::new(x.value(), weight, targets, spec);
    let (mut losses, mut lses, mut dx) = (Vec::new(), Vec::new(), Vec::new());
    for piece in part.pieces() {
        let logits = part.logits(piece.clone());
        let own = part.own_terms(logits.clone(), piece.clone()); // [1, 2, tokens]
        let terms = tensor::<B, 3>(group.all_gather(own, 0)); // [tp, 2, tokens]
        let (loss, lse) = part.join(terms, piece.clone());
        losses.push(loss);
        if let Some(dloss) = &known {
            let dloss = narrow::<B>(dloss.clone(), 0, piece.clone());
            dx.push(part.gradients(logits, piece, lse, dloss, x.is_tracked()));
        } else {
            lses.push(lse);
        }
    }
    let losses = B::float_cat(losses, 0);
    if !recorded {
        return tape.constant(losses);
    }
    let tracked = x.is_tracked();
    tape.record_with_params(losses, &[x], &[weight], move |dloss| {
        if known.is_none() {
            for (piece, lse) in part.pieces().zip(lses) {
                let dloss = narrow::<B>(dloss.clone(), 0, piece.clone());
                let logits = part.logits(piece.clone());
                dx.push(part.gradients(logits, piece, lse, dloss, tracked));
            }
        }
        let dx: Option<Vec<Float<B>>> = dx.into_iter().collect();
        vec![dx.map(|pieces| B::float_cat(pieces, 0))]
    })
}

/// The rows of the whole vocabulary that a rank's matrix holds, padding not counted.
pub(super) fn held_rows<B: Ops>(weight: &Param<B>) -> Range<usize> {
    match weight.shard() {
        Some(shard) => shard.ranges[0].clone(),
        None => 0..weight.shape()[0],
    }
}

/// A rank's part of the output layer.
struct Part<B: Ops> {
    x: Float<B>,
    weight: Param<B>,
    /// Rows of the matrix that stand for tokens; more are padding.
    held: usize,
    /// Targets counted in this part: [`TARGET_ELSEWHERE`] for tokens of others.
    targets: Int<B>,
    /// `[tokens]` f32: 1, or 0 where the target is ignored.
    kept: Float<B>,
    spec: CrossEntropySpec,
}

impl<B: Ops> Part<B> {
    fn new(x: Float<B>, weight: &Param<B>, targets: &Int<B>, spec: CrossEntropySpec) -> Self {
        let held = held_rows(weight);
        let (start, end) = (held.start as i64, held.end as i64);
        let targets = Tensor::<B, 1, IntKind>::from_primitive(targets.clone());
        let ignored = targets.clone().equal_elem(spec.ignore_index);
        let elsewhere = targets
            .clone()
            .lower_elem(start)
            .bool_or(targets.clone().greater_equal_elem(end));
        let kept = float(ignored.clone().bool_not().float());
        let targets = targets
            .sub_scalar(start)
            .mask_fill(elsewhere, TARGET_ELSEWHERE)
            .mask_fill(ignored, spec.ignore_index);
        Self {
            x,
            weight: weight.clone(),
            held: held.len(),
            targets: targets.into_primitive(),
            kept: crate::tensors::to_dtype::<B>(kept, DType::F32),
            spec,
        }
    }

    /// The same pieces on all ranks: they go by the padded size, which is the same.
    fn pieces(&self) -> impl Iterator<Item = Range<usize>> + use<B> {
        let tokens = dims(&self.x)[0];
        let piece = B::tokens_per_piece(tokens, self.weight.shape()[0], self.x.dtype());
        (0..tokens)
            .step_by(piece)
            .map(move |start| start..(start + piece).min(tokens))
    }

    fn rows(&self, piece: Range<usize>) -> Float<B> {
        narrow::<B>(self.x.clone(), 0, piece)
    }

    fn targets(&self, piece: Range<usize>) -> Int<B> {
        B::int_slice(self.targets.clone(), &[Slice::from(piece)])
    }

    /// The matrix without padding.
    fn matrix(&self) -> Float<B> {
        narrow::<B>(self.weight.value(), 0, 0..self.held)
    }

    /// `None` where this rank holds nothing but padding.
    fn logits(&self, piece: Range<usize>) -> Option<Float<B>> {
        (self.held > 0).then(|| B::linear_forward(self.rows(piece), self.matrix(), None))
    }

    /// Log-sum-exp of these logits, and the target's logit (0 if elsewhere), of each token: [1, 2, tokens].
    fn own_terms(&self, logits: Option<Float<B>>, piece: Range<usize>) -> Float<B> {
        let tokens = piece.len();
        let device = B::float_device(&self.x);
        let Some(logits) = logits else {
            let lse = Tensor::<B, 1>::full([tokens], NOTHING, (&device, DType::F32));
            let nothing = Tensor::<B, 1>::zeros([tokens], (&device, DType::F32));
            return float(Tensor::stack::<2>(vec![lse, nothing], 0).unsqueeze::<3>());
        };
        let output = B::cross_entropy_forward(logits, self.targets(piece), &self.spec);
        let (lse, loss) = (tensor::<B, 1>(output.lse), tensor::<B, 1>(output.loss));
        let target = lse.clone() - loss;
        float(Tensor::stack::<2>(vec![lse, target], 0).unsqueeze::<3>())
    }

    /// Loss and log-sum-exp over the whole vocabulary from every rank's terms.
    fn join(&self, terms: Tensor<B, 3>, piece: Range<usize>) -> (Float<B>, Float<B>) {
        let tokens = piece.len();
        let lses = terms.clone().narrow(1, 0, 1); // [tp, 1, tokens]
        let max = lses.clone().max_dim(0);
        let sum = (lses - max.clone()).exp().sum_dim(0);
        let lse = (sum.log() + max).reshape([tokens]);
        let target = terms.narrow(1, 1, 1).sum_dim(0).reshape([tokens]);
        let kept = tensor::<B, 1>(narrow::<B>(self.kept.clone(), 0, piece));
        let loss = (lse.clone() - target) * kept;
        (float(loss), float(lse))
    }

    /// Adds a piece's share of the matrix's gradient to its slot; returns that of the piece's rows, if wanted.
    fn gradients(
        &self,
        logits: Option<Float<B>>,
        piece: Range<usize>,
        lse: Float<B>,
        dloss: Float<B>,
        input: bool,
    ) -> Option<Float<B>> {
        let x = self.rows(piece.clone());
        let Some(logits) = logits else {
            if self.weight.requires_grad() {
                self.weight.accumulate_with(|slot| self.padded(None, slot));
            }
            let device = B::float_device(&x);
            return input.then(|| zeros::<B>(&dims(&x), &device, x.dtype()));
        };
        let dlogits =
            B::cross_entropy_backward(logits, self.targets(piece), lse, dloss, &self.spec);
        let dx = input.then(|| B::linear_backward_input(dlogits.clone(), self.matrix()));
        if self.weight.requires_grad() {
            self.weight.accumulate_in_dtype_with(|slot| {
                if self.held == self.weight.shape()[0] {
                    return B::linear_accumulate_weight_grad(x, dlogits, slot);
                }
                let own = B::linear_accumulate_weight_grad(x, dlogits, GradSlot::Empty);
                slot.rounded_once(|slot| self.padded(Some(own), slot))
            });
        }
        dx
    }

    /// Adds the gradient of the rows that stand for tokens to a slot that has room for padding as well.
    fn padded(&self, own: Option<Float<B>>, slot: GradSlot<B>) -> Float<B> {
        let shape = self.weight.shape();
        let whole = zeros::<B>(&shape, &self.weight.device(), DType::F32);
        slot.accumulate(match own {
            Some(own) => replaced::<B>(
                whole,
                0,
                0..self.held,
                reshaped::<B>(own, &[self.held, shape[1]]),
            ),
            None => whole,
        })
    }
}
