//! The output layer and the loss in one, so that the logits of all tokens never exist at once: for a vocabulary of
//! 128,256 they would be the largest tensor of a training step by far.
//!
//! ```text
//! z    = x W^T                              x: [tokens, h], W: [vocab, h]
//! loss = cross_entropy(z, targets)          see cross_entropy.rs
//! dx   = dz W,  dW = dz^T x                 dz from the log-sum-exp, piece by piece
//! ```
//!
//! Tokens are taken in pieces of [`tokens_per_piece`]. The forward pass keeps the log-sum-exp of each token; the
//! backward pass computes a piece's logits again. A caller that knows the gradient of each token's loss beforehand, as
//! a training step does (one over the number of tokens), can have everything in one pass:
//! [`linear_cross_entropy_weighted`] computes three products instead of four.

use std::ops::Range;

use burn::tensor::Tensor;
use burn_backend::{DType, TensorMetadata};

use crate::cross_entropy::{CrossEntropyOutput, CrossEntropySpec};
use crate::grad_slot::GradSlot;
use crate::ops::Ops;
use crate::param::Param;
use crate::primitive::{Float, Int, dims, float, tensor, to_dtype};
use crate::shape::slices_along;
use crate::tape::{Tape, Var};

/// Which gradients a kernel is to compute.
#[derive(Debug)]
pub struct LossGradRequest<B: Ops> {
    /// Whether the input's gradient is wanted.
    pub input: bool,
    /// Where the weight's gradient goes, if it is wanted.
    pub weight: Option<GradSlot<B>>,
}

/// The gradients a kernel was asked for.
#[derive(Debug)]
pub struct LossGrads<B: Ops> {
    /// [tokens, h] in the dtype of the input.
    pub input: Option<Float<B>>,
    /// [vocab, h] fp32, what the slot held included.
    pub weight: Option<Float<B>>,
}

/// The loss of each token. x: [tokens, h], weight: [vocab, h], targets: [tokens] -> [tokens] fp32, 0 where the target
/// is ignored.
///
/// # Panics
/// When the shapes do not fit, or (on backends that check) a target is neither a token nor the ignored value.
#[track_caller]
pub fn linear_cross_entropy<B: Ops>(
    tape: &Tape<B>,
    x: &Var<B>,
    weight: &Param<B>,
    targets: &Int<B>,
    spec: CrossEntropySpec,
) -> Var<B> {
    check_shapes(&x.shape(), weight, targets);
    let CrossEntropyOutput { loss, lse } =
        B::linear_cross_entropy_forward(x.value(), weight.value(), targets.clone(), &spec);

    let (input, input_tracked) = (x.value(), x.is_tracked());
    let (param, targets) = (weight.clone(), targets.clone());
    tape.record_with_params(loss, &[x], &[weight], move |dloss| {
        let dx = with_slot(&param, input_tracked, |request| {
            let grads = B::linear_cross_entropy_backward(
                input,
                param.value(),
                targets,
                lse,
                dloss,
                &spec,
                request,
            );
            ((), grads)
        });
        vec![dx.1]
    })
}

/// [`linear_cross_entropy`] for a known `dloss`: [tokens] fp32, the gradient that the result will be seeded with. On a
/// recording tape the gradients are computed at once (the weight's is added to its slot now), and the backward pass
/// only hands on the input's.
///
/// The result must be seeded with exactly `dloss`; another seed gives wrong gradients.
///
/// # Panics
/// As [`linear_cross_entropy`], or when `dloss` is not of shape [tokens].
#[track_caller]
pub fn linear_cross_entropy_weighted<B: Ops>(
    tape: &Tape<B>,
    x: &Var<B>,
    weight: &Param<B>,
    targets: &Int<B>,
    dloss: Float<B>,
    spec: CrossEntropySpec,
) -> Var<B> {
    check_shapes(&x.shape(), weight, targets);
    let (expected, found) = (dims(targets), dims(&dloss));
    assert_eq!(
        expected, found,
        "linear_cross_entropy: targets have shape {expected:?}, dloss {found:?}"
    );
    if !tape.needs_grad(&[x], &[weight]) {
        return tape.constant(
            B::linear_cross_entropy_forward(x.value(), weight.value(), targets.clone(), &spec).loss,
        );
    }
    let (output, dx) = with_slot(weight, x.is_tracked(), |request| {
        B::linear_cross_entropy_with_grads(
            x.value(),
            weight.value(),
            targets.clone(),
            dloss,
            &spec,
            request,
        )
    });
    tape.record_with_params(output.loss, &[x], &[weight], move |_dloss| vec![dx])
}

/// Runs a kernel with the gradient slot of `param`, if it requires a gradient; returns the input's gradient.
fn with_slot<B: Ops, R>(
    param: &Param<B>,
    input: bool,
    kernel: impl FnOnce(LossGradRequest<B>) -> (R, LossGrads<B>),
) -> (R, Option<Float<B>>) {
    if !param.requires_grad() {
        let (result, grads) = kernel(LossGradRequest {
            input,
            weight: None,
        });
        return (result, grads.input);
    }
    let mut outcome = None;
    param.accumulate_with(|slot| {
        let (result, grads) = kernel(LossGradRequest {
            input,
            weight: Some(slot),
        });
        outcome = Some((result, grads.input));
        grads
            .weight
            .expect("a kernel returns the weight gradient it is asked for")
    });
    outcome.expect("the kernel ran")
}

#[track_caller]
fn check_shapes<B: Ops>(x: &[usize], weight: &Param<B>, targets: &Int<B>) {
    let (w, t) = (weight.shape(), dims(targets));
    assert!(
        x.len() == 2 && w.len() == 2 && x[1] == w[1] && t == [x[0]],
        "linear_cross_entropy: x {x:?} ([tokens, h]), `{}` {w:?} ([vocab, h]) and targets {t:?} ([tokens]) do not fit",
        weight.name()
    );
}

/// How many tokens to take at once, so that their fp32 logits fit in 64 MiB: large enough for efficient products.
pub(crate) fn tokens_per_piece(tokens: usize, vocab: usize) -> usize {
    const MAX_LOGITS: usize = 16 << 20;
    let most = (MAX_LOGITS / vocab.max(1)).max(16);
    // Pieces of like size, rather than a small one at the end.
    tokens.div_ceil(tokens.div_ceil(most).max(1)).max(1)
}

fn pieces(tokens: usize, vocab: usize) -> impl Iterator<Item = Range<usize>> {
    let piece = tokens_per_piece(tokens, vocab);
    (0..tokens)
        .step_by(piece)
        .map(move |start| start..(start + piece).min(tokens))
}

fn rows<B: Ops>(x: &Float<B>, range: Range<usize>) -> Float<B> {
    B::float_slice(x.clone(), &slices_along(dims(x).len(), 0, range))
}

fn int_rows<B: Ops>(x: &Int<B>, range: Range<usize>) -> Int<B> {
    B::int_slice(x.clone(), &slices_along(1, 0, range))
}

fn joined<B: Ops, const D: usize>(parts: Vec<Float<B>>) -> Float<B> {
    float(Tensor::cat(
        parts.into_iter().map(tensor::<B, D>).collect(),
        0,
    ))
}

pub(crate) fn portable<B: Ops>(
    x: Float<B>,
    weight: Float<B>,
    targets: Int<B>,
    spec: &CrossEntropySpec,
) -> CrossEntropyOutput<B> {
    let (mut loss, mut lse) = (Vec::new(), Vec::new());
    for piece in pieces(dims(&x)[0], dims(&weight)[0]) {
        let logits = B::linear_forward(rows::<B>(&x, piece.clone()), weight.clone(), None);
        let output = B::cross_entropy_forward(logits, int_rows::<B>(&targets, piece), spec);
        loss.push(output.loss);
        lse.push(output.lse);
    }
    CrossEntropyOutput {
        loss: joined::<B, 1>(loss),
        lse: joined::<B, 1>(lse),
    }
}

pub(crate) fn portable_backward<B: Ops>(
    x: Float<B>,
    weight: Float<B>,
    targets: Int<B>,
    lse: Float<B>,
    dloss: Float<B>,
    spec: &CrossEntropySpec,
    request: LossGradRequest<B>,
) -> LossGrads<B> {
    let known = Known {
        lse: Some(lse),
        dloss,
    };
    by_piece(x, weight, targets, known, spec, request).1
}

pub(crate) fn portable_with_grads<B: Ops>(
    x: Float<B>,
    weight: Float<B>,
    targets: Int<B>,
    dloss: Float<B>,
    spec: &CrossEntropySpec,
    request: LossGradRequest<B>,
) -> (CrossEntropyOutput<B>, LossGrads<B>) {
    let known = Known { lse: None, dloss };
    let (output, grads) = by_piece(x, weight, targets, known, spec, request);
    (
        output.expect("computed when the log-sum-exp is not known"),
        grads,
    )
}

/// What is known of each token before its logits are computed.
struct Known<B: Ops> {
    lse: Option<Float<B>>,
    dloss: Float<B>,
}

fn by_piece<B: Ops>(
    x: Float<B>,
    weight: Float<B>,
    targets: Int<B>,
    known: Known<B>,
    spec: &CrossEntropySpec,
    request: LossGradRequest<B>,
) -> (Option<CrossEntropyOutput<B>>, LossGrads<B>) {
    let dtype = x.dtype();
    let mut slot = request.weight;
    let (mut dx, mut loss, mut lse) = (Vec::new(), Vec::new(), Vec::new());
    for piece in pieces(dims(&x)[0], dims(&weight)[0]) {
        let x = rows::<B>(&x, piece.clone());
        let targets = int_rows::<B>(&targets, piece.clone());
        let logits = B::linear_forward(x.clone(), weight.clone(), None);
        let piece_lse = match &known.lse {
            Some(lse) => rows::<B>(lse, piece.clone()),
            None => {
                let output = B::cross_entropy_forward(logits.clone(), targets.clone(), spec);
                loss.push(output.loss);
                lse.push(output.lse.clone());
                output.lse
            }
        };
        let dlogits = B::cross_entropy_backward(
            logits,
            targets,
            piece_lse,
            rows::<B>(&known.dloss, piece),
            spec,
        );
        if request.input {
            dx.push(B::linear_backward_input(dlogits.clone(), weight.clone()));
        }
        slot = slot.map(|slot| GradSlot::Sum(B::linear_accumulate_weight_grad(x, dlogits, slot)));
    }
    let output = (!loss.is_empty()).then(|| CrossEntropyOutput {
        loss: joined::<B, 1>(loss),
        lse: joined::<B, 1>(lse),
    });
    let grads = LossGrads {
        input: request
            .input
            .then(|| to_dtype::<B>(joined::<B, 2>(dx), dtype)),
        weight: slot.map(|slot| match slot {
            GradSlot::Sum(grad) => grad,
            GradSlot::Empty | GradSlot::Stale(_) => {
                let device = B::float_device(&weight);
                B::float_zeros(weight.shape(), &device, DType::F32.into())
            }
        }),
    };
    (output, grads)
}
