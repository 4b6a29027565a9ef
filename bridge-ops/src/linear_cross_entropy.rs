//! The output layer and the loss in one, so that the logits of all tokens never exist at once: for a vocabulary of
//! 128,256 they would be the largest tensor of a training step by far.
//!
//! ```text
//! z    = x W^T                              x: [tokens, h], W: [vocab, h]
//! loss = cross_entropy(z, targets)          see cross_entropy.rs
//! dx   = dz W,  dW = dz^T x                 dz from the log-sum-exp, piece by piece
//! ```
//!
//! Tokens are taken in pieces of [`Ops::tokens_per_piece`]. The forward pass keeps the log-sum-exp of each token; the
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
    /// Where the weight's gradient goes, if it is wanted, of any dtype.
    pub weight: Option<GradSlot<B>>,
}

/// The gradients a kernel was asked for.
#[derive(Debug)]
pub struct LossGrads<B: Ops> {
    /// [tokens, h] in the dtype of the input.
    pub input: Option<Float<B>>,
    /// [vocab, h] in the slot's dtype, what the slot held included.
    pub weight: Option<Float<B>>,
}

/// The loss of each token. x: [tokens, h], weight: [vocab, h], targets: `[tokens]` -> `[tokens]` fp32, 0 where the target
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

/// [`linear_cross_entropy`] for a known `dloss`: `[tokens]` fp32, the gradient that the result will be seeded with. On a
/// recording tape the gradients are computed at once (the weight's is added to its slot now), and the backward pass
/// only hands on the input's.
///
/// The result must be seeded with exactly `dloss`; another seed gives wrong gradients.
///
/// # Panics
/// As [`linear_cross_entropy`], or when `dloss` is not of shape `[tokens]`.
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
    param.accumulate_in_dtype_with(|slot| {
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
    let kept = request.weight.as_ref().map_or(DType::F32, GradSlot::dtype);
    let mut slot = request.weight.map(GradSlot::widened);
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
            GradSlot::Sum(grad) => to_dtype::<B>(grad, kept),
            GradSlot::Empty | GradSlot::Stale(_) => {
                let device = B::float_device(&weight);
                B::float_zeros(weight.shape(), &device, kept.into())
            }
        }),
    };
    (output, grads)
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{DEVICE, Outcome, ROUNDING, assert_close, random, random_bf16, run};
    use crate::{cross_entropy, int_from_i64, linear};

    const TOKENS: usize = 11;
    const VOCAB: usize = 131;

    fn targets() -> Int<Flex> {
        let targets: Vec<i64> = (0..TOKENS as i64)
            .map(|t| if t % 4 == 1 { -100 } else { t * 13 % 131 })
            .collect();
        int_from_i64::<Flex>(&targets, &[TOKENS], &DEVICE)
    }

    /// The seed that `run` uses.
    fn dloss() -> Float<Flex> {
        random(&[TOKENS], 999)
    }

    #[track_caller]
    fn assert_same(found: &Outcome, expected: &Outcome) {
        assert_close("loss", &found.output, &expected.output, ROUNDING);
        assert_close(
            "dx",
            &found.input_grads[0],
            &expected.input_grads[0],
            ROUNDING,
        );
        assert_close(
            "dW",
            &found.param_grads[0],
            &expected.param_grads[0],
            ROUNDING,
        );
    }

    #[test]
    fn both_ways_match_linear_then_cross_entropy() {
        for (logit_softcap, weight) in [
            (None, random(&[VOCAB, 24], 2)),
            (Some(2.0), random_bf16(&[VOCAB, 24], 2)),
        ] {
            let spec = CrossEntropySpec {
                logit_softcap,
                ..Default::default()
            };
            let (x, w) = ([random(&[TOKENS, 24], 1)], [weight]);
            let expected = run(&x, &w, |tape, x, p| {
                cross_entropy(
                    tape,
                    &linear(tape, &x[0], &p[0], None),
                    &targets(),
                    spec.clone(),
                )
            });
            let recomputing = run(&x, &w, |tape, x, p| {
                linear_cross_entropy(tape, &x[0], &p[0], &targets(), spec.clone())
            });
            assert_same(&recomputing, &expected);
            let at_once = run(&x, &w, |tape, x, p| {
                linear_cross_entropy_weighted(tape, &x[0], &p[0], &targets(), dloss(), spec.clone())
            });
            assert_same(&at_once, &expected);
        }
    }

    #[test]
    fn tokens_are_taken_in_pieces_of_like_size() {
        assert_eq!(tokens_per_piece(512, 49152), 256);
        assert_eq!(tokens_per_piece(100, 49152), 100);
        assert_eq!(tokens_per_piece(1, 1 << 30), 1);
        let pieces: Vec<_> = pieces(1000, 128_256).collect();
        assert_eq!(pieces.last().unwrap().end, 1000);
        assert!(
            pieces
                .iter()
                .all(|piece| piece.len() * 128_256 * 4 <= 64 << 20)
        );
    }

    #[test]
    fn several_pieces_give_the_result_of_one() {
        // A vocabulary so large that a piece is the least of 16 tokens.
        let (tokens, vocab) = (37, 1 << 20);
        assert_eq!(pieces(tokens, vocab).count(), 3);
        let targets: Vec<i64> = (0..tokens as i64).collect();
        let targets = int_from_i64::<Flex>(&targets, &[tokens], &DEVICE);
        let (x, w) = ([random(&[tokens, 2], 1)], [random(&[vocab, 2], 2)]);
        let spec = CrossEntropySpec::default();
        let found = run(&x, &w, |tape, x, p| {
            linear_cross_entropy(tape, &x[0], &p[0], &targets, spec.clone())
        });
        let expected = run(&x, &w, |tape, x, p| {
            cross_entropy(
                tape,
                &linear(tape, &x[0], &p[0], None),
                &targets,
                spec.clone(),
            )
        });
        assert_same(&found, &expected);
    }

    #[test]
    fn a_frozen_weight_still_passes_a_gradient_on() {
        let param = Param::<Flex>::new("w", random(&[VOCAB, 24], 2));
        param.set_requires_grad(false);
        for weighted in [false, true] {
            let tape = Tape::new();
            let x = tape.leaf(random(&[TOKENS, 24], 1));
            let spec = CrossEntropySpec::default();
            let loss = if weighted {
                linear_cross_entropy_weighted(&tape, &x, &param, &targets(), dloss(), spec)
            } else {
                linear_cross_entropy(&tape, &x, &param, &targets(), spec)
            };
            let grads = tape.backward(vec![(loss, dloss())], &[&x]);
            assert!(grads[0].is_some() && param.grad().is_none());
        }
    }

    #[test]
    fn inference_accumulates_nothing() {
        let param = Param::<Flex>::new("w", random(&[VOCAB, 24], 2));
        let tape = Tape::inference();
        let x = tape.constant(random(&[TOKENS, 24], 1));
        linear_cross_entropy_weighted(
            &tape,
            &x,
            &param,
            &targets(),
            dloss(),
            CrossEntropySpec::default(),
        );
        assert!(param.grad().is_none());
    }
}
