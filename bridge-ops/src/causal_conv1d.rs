//! The short causal convolution in front of a recurrent layer, one filter per channel (Gu and Dao 2023, "Mamba").
//!
//! ```text
//! u_t = b + sum over j of w_{taps-1-j} x_{t-j}      x: [batch, seq, channels], w: [channels, taps], b: [channels]
//! y_t = u_t, or silu(u_t)
//! ```
//!
//! Tokens before the first one count as zero, or are those of a history carried over from the text so far. With
//! `du = dy`, or `dy silu'(u)`:
//!
//! ```text
//! dx_t = sum over j of w_{taps-1-j} du_{t+j},   dw_{taps-1-j} = sum over t of x_{t-j} du_t,   db = sum over t of du_t
//! ```

use std::sync::Arc;

use burn::tensor::{Tensor, TensorData, activation::sigmoid};
use burn_backend::TensorMetadata;

use crate::chunks::{check_documents, shape_of};
use crate::ops::Ops;
use crate::param::Param;
use crate::primitive::{Float, float, reshaped, tensor, to_dtype, to_f32};
use crate::shape::slices_along;
use crate::tape::{Tape, Var};

/// What a causal convolution does besides multiplying. Plain data, the same for every backend.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ConvSpec {
    /// Whether SiLU follows.
    pub silu: bool,
    /// Packed documents: offsets `[0, l1, l1 + l2, .., batch * seq]` into the batch's tokens in row-major order. The
    /// convolution does not reach from one into another.
    pub documents: Option<Arc<[usize]>>,
}

/// What the backward kernel returns.
#[derive(Debug, Clone)]
pub struct ConvGrads<B: Ops> {
    /// Like x.
    pub dx: Float<B>,
    /// [channels, taps] fp32.
    pub dweight: Float<B>,
    /// `[channels]` fp32.
    pub dbias: Float<B>,
}

/// The causal convolution. x: [batch, seq, channels], weight: [channels, taps], bias: `[channels]` -> like x.
///
/// # Panics
/// When the shapes do not fit.
#[track_caller]
pub fn causal_conv1d<B: Ops>(
    tape: &Tape<B>,
    x: &Var<B>,
    weight: &Param<B>,
    bias: Option<&Param<B>>,
    spec: &ConvSpec,
) -> Var<B> {
    check(&x.value(), weight, bias, spec);
    let output = B::causal_conv1d_forward(
        x.value(),
        weight.value(),
        bias.map(Param::value),
        None,
        spec,
    );
    let params: Vec<&Param<B>> = std::iter::once(weight).chain(bias).collect();
    let (weight, bias, spec, input) = (weight.clone(), bias.cloned(), spec.clone(), x.value());
    tape.record_with_params(output, &[x], &params, move |dy| {
        let value = bias.as_ref().map(Param::value);
        let grads = B::causal_conv1d_backward(input, weight.value(), value, dy, &spec);
        if weight.requires_grad() {
            weight.accumulate_grad(grads.dweight);
        }
        if let Some(bias) = bias.filter(|bias| bias.requires_grad()) {
            bias.accumulate_grad(grads.dbias);
        }
        vec![Some(grads.dx)]
    })
}

/// [`causal_conv1d`] that goes on from a history and returns the next, for generation: `history` is the last taps - 1
/// inputs, [batch, taps - 1, channels], `None` at the start of a text.
///
/// # Panics
/// When the tape records (there is no gradient through the history), or the shapes do not fit.
#[track_caller]
pub fn causal_conv1d_with_history<B: Ops>(
    tape: &Tape<B>,
    x: &Var<B>,
    weight: &Param<B>,
    bias: Option<&Param<B>>,
    history: Option<Float<B>>,
    spec: &ConvSpec,
) -> (Var<B>, Float<B>) {
    assert!(
        !tape.is_recording() && spec.documents.is_none(),
        "causal_conv1d: a history has no gradient and belongs to one document per row"
    );
    check(&x.value(), weight, bias, spec);
    let [batch, seq, channels] = shape_of::<B, 3>("causal_conv1d", "x", &x.value());
    let past = weight.shape()[1] - 1;
    let history = history.unwrap_or_else(|| {
        let shape = vec![batch, past, channels];
        let value = x.value();
        B::float_zeros(shape.into(), &B::float_device(&value), value.dtype().into())
    });
    let next = if past == 0 {
        history.clone()
    } else {
        let all = B::float_cat(vec![history.clone(), x.value()], 1);
        B::float_slice(all, &slices_along(3, 1, seq..seq + past))
    };
    let bias = bias.map(Param::value);
    let output = B::causal_conv1d_forward(x.value(), weight.value(), bias, Some(history), spec);
    (tape.constant(output), next)
}

#[track_caller]
fn check<B: Ops>(x: &Float<B>, weight: &Param<B>, bias: Option<&Param<B>>, spec: &ConvSpec) {
    let shape: [usize; 3] = shape_of::<B, 3>("causal_conv1d", "x", x);
    let [batch, seq, channels] = shape;
    let w = weight.shape();
    assert!(
        w.len() == 2 && w[0] == channels && w[1] > 0,
        "causal_conv1d: `{}` has shape {w:?} ([channels, taps]), which does not fit an input of shape {shape:?}",
        weight.name()
    );
    if let Some(bias) = bias {
        let b = bias.shape();
        assert_eq!(
            b,
            [channels],
            "causal_conv1d: `{}` has shape {b:?}",
            bias.name()
        );
    }
    check_documents("causal_conv1d", spec.documents.as_deref(), batch * seq);
}

/// [`Ops::causal_conv1d_forward`] in plain Burn operations.
pub fn portable<B: Ops>(
    x: Float<B>,
    weight: Float<B>,
    bias: Option<Float<B>>,
    history: Option<Float<B>>,
    spec: &ConvSpec,
) -> Float<B> {
    let dtype = x.dtype();
    let u = before_silu::<B>(x, weight, bias, history, spec);
    let y = if spec.silu { u.clone() * sigmoid(u) } else { u };
    to_dtype::<B>(float(y), dtype)
}

/// [`Ops::causal_conv1d_backward`] in plain Burn operations.
pub fn portable_backward<B: Ops>(
    x: Float<B>,
    weight: Float<B>,
    bias: Option<Float<B>>,
    dy: Float<B>,
    spec: &ConvSpec,
) -> ConvGrads<B> {
    let dtype = x.dtype();
    let mut du = tensor::<B, 3>(to_f32::<B>(dy));
    if spec.silu {
        let u = before_silu::<B>(x.clone(), weight.clone(), bias, None, spec);
        let s = sigmoid(u.clone());
        // silu' = s + u s (1 - s)
        du = du * (s.clone() + u * s.clone() * s.neg().add_scalar(1.0));
    }
    let x = tensor::<B, 3>(to_f32::<B>(x));
    let weight = tensor::<B, 2>(to_f32::<B>(weight));
    let [batch, seq, channels] = x.dims();
    let taps = weight.dims()[1];
    let reach = Reach::new(batch, seq, spec);

    let mut dx = Tensor::zeros([batch, seq, channels], &x.device());
    let mut dweight = Vec::with_capacity(taps);
    for tap in 0..taps {
        let back = taps - 1 - tap;
        if back >= seq {
            dweight.push(Tensor::zeros([channels, 1], &x.device()));
            continue;
        }
        // du at token t for x at token t - back.
        let du = reach.masked(du.clone(), back).narrow(1, back, seq - back);
        let seen = x.clone().narrow(1, 0, seq - back);
        let product = (seen * du.clone()).sum_dim(1).sum_dim(0);
        dweight.push(product.reshape([channels, 1]));
        let w = weight.clone().narrow(1, tap, 1).reshape([1, 1, channels]);
        dx = dx + shifted(du * w, 0, back);
    }
    let dbias = du.sum_dim(1).sum_dim(0);
    ConvGrads {
        dx: to_dtype::<B>(float(dx), dtype),
        dweight: float(Tensor::cat(dweight, 1)),
        dbias: reshaped::<B>(float(dbias), &[channels]),
    }
}

/// u in fp32.
fn before_silu<B: Ops>(
    x: Float<B>,
    weight: Float<B>,
    bias: Option<Float<B>>,
    history: Option<Float<B>>,
    spec: &ConvSpec,
) -> Tensor<B, 3> {
    let x = tensor::<B, 3>(to_f32::<B>(x));
    let weight = tensor::<B, 2>(to_f32::<B>(weight));
    let [batch, seq, channels] = x.dims();
    let taps = weight.dims()[1];
    let reach = Reach::new(batch, seq, spec);
    let past = taps - 1;
    let all = match history {
        _ if past == 0 => x.clone(),
        Some(history) => Tensor::cat(vec![tensor::<B, 3>(to_f32::<B>(history)), x.clone()], 1),
        None => shifted(x.clone(), past, 0),
    };
    let mut u = Tensor::zeros([batch, seq, channels], &x.device());
    for tap in 0..taps {
        let w = weight.clone().narrow(1, tap, 1).reshape([1, 1, channels]);
        u = u + reach.masked(all.clone().narrow(1, tap, seq) * w, past - tap);
    }
    match bias {
        Some(bias) => u + tensor::<B, 1>(to_f32::<B>(bias)).reshape([1, 1, channels]),
        None => u,
    }
}

/// `x` with zeros before and after it along the sequence.
fn shifted<B: Ops>(x: Tensor<B, 3>, before: usize, after: usize) -> Tensor<B, 3> {
    let [batch, _, channels] = x.dims();
    let device = x.device();
    let zeros = |count| Tensor::zeros([batch, count, channels], &device);
    let mut parts = Vec::with_capacity(3);
    if before > 0 {
        parts.push(zeros(before));
    }
    parts.push(x);
    if after > 0 {
        parts.push(zeros(after));
    }
    Tensor::cat(parts, 1)
}

/// How far each token is from the start of its document; `None` where a row is one document.
struct Reach {
    batch: usize,
    seq: usize,
    positions: Option<Vec<usize>>,
}

impl Reach {
    fn new(batch: usize, seq: usize, spec: &ConvSpec) -> Self {
        let positions = spec.documents.as_ref().map(|documents| {
            let inside = documents.windows(2).flat_map(|pair| {
                let (start, end) = (pair[0], pair[1]);
                (start..end).map(move |token| token - start.max(token / seq * seq))
            });
            inside.collect()
        });
        Self {
            batch,
            seq,
            positions,
        }
    }

    /// `x` with zeros at the tokens whose `back`-th predecessor is in another document.
    fn masked<B: Ops>(&self, x: Tensor<B, 3>, back: usize) -> Tensor<B, 3> {
        let Some(positions) = self.positions.as_ref().filter(|_| back > 0) else {
            return x;
        };
        let mask: Vec<f32> = positions
            .iter()
            .map(|position| if *position >= back { 1.0 } else { 0.0 })
            .collect();
        let mask = TensorData::new(mask, [self.batch, self.seq, 1]);
        let device = x.device();
        x * Tensor::<B, 3>::from_data(mask, &device)
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{ROUNDING, assert_close, check, random};

    /// Token by token, tap by tap.
    fn formula(
        x: Tensor<Autodiff<Flex>, 3>,
        weight: Tensor<Autodiff<Flex>, 2>,
        bias: Option<Tensor<Autodiff<Flex>, 1>>,
        starts: &[usize],
        silu: bool,
    ) -> Tensor<Autodiff<Flex>, 3> {
        let ([batch, seq, channels], taps) = (x.dims(), weight.dims()[1]);
        let tokens = (0..seq).map(|t| {
            let start = *starts.iter().rfind(|start| **start <= t).unwrap();
            let mut u = Tensor::zeros([batch, 1, channels], &x.device());
            for tap in 0..taps {
                if let Some(seen) = (t + tap)
                    .checked_sub(taps - 1)
                    .filter(|seen| *seen >= start)
                {
                    let w = weight.clone().narrow(1, tap, 1).reshape([1, 1, channels]);
                    u = u + x.clone().narrow(1, seen, 1) * w;
                }
            }
            if let Some(bias) = &bias {
                u = u + bias.clone().reshape([1, 1, channels]);
            }
            if silu { u.clone() * sigmoid(u) } else { u }
        });
        Tensor::cat(tokens.collect(), 1)
    }

    #[test]
    fn matches_autodiff() {
        for (seq, taps, silu) in [(9, 4, true), (2, 4, true), (5, 1, false), (1, 3, false)] {
            check(
                &format!("{seq} tokens, {taps} taps"),
                &[random(&[2, seq, 7], 1)],
                &[random(&[7, taps], 2), random(&[7], 3)],
                |tape, x, p| {
                    let spec = ConvSpec {
                        silu,
                        documents: None,
                    };
                    causal_conv1d(tape, &x[0], &p[0], Some(&p[1]), &spec)
                },
                |x, p| {
                    let bias = Some(p[1].tensor());
                    formula(x[0].tensor(), p[0].tensor(), bias, &[0], silu)
                },
            );
        }
    }

    #[test]
    fn documents_are_kept_apart() {
        check(
            "three documents",
            &[random(&[1, 11, 5], 1)],
            &[random(&[5, 4], 2)],
            |tape, x, p| {
                let spec = ConvSpec {
                    silu: true,
                    documents: Some([0, 2, 7, 11].into()),
                };
                causal_conv1d(tape, &x[0], &p[0], None, &spec)
            },
            |x, p| formula(x[0].tensor(), p[0].tensor(), None, &[0, 2, 7], true),
        );
    }

    #[test]
    fn a_text_in_pieces_is_the_text() {
        let (x, weight) = (
            random(&[2, 9, 6], 1),
            Param::<Flex>::new("w", random(&[6, 4], 2)),
        );
        let spec = ConvSpec {
            silu: true,
            documents: None,
        };
        let tape = Tape::inference();
        let whole = causal_conv1d(&tape, &tape.constant(x.clone()), &weight, None, &spec);
        let (mut history, mut parts) = (None, Vec::new());
        for range in [0..2, 2..3, 3..4, 4..9] {
            use burn_backend::ops::FloatTensorOps;
            let part = Flex::float_slice(x.clone(), &slices_along(3, 1, range));
            let part = tape.constant(part);
            let (y, next) = causal_conv1d_with_history(&tape, &part, &weight, None, history, &spec);
            history = Some(next);
            parts.push(y);
        }
        let pieces = crate::concat(&tape, &parts, 1);
        assert_close("y", &pieces.value(), &whole.value(), ROUNDING);
    }

    #[test]
    #[should_panic(expected = "`w` has shape [6, 4] ([channels, taps])")]
    fn shapes_are_checked() {
        let weight = Param::<Flex>::new("w", random(&[6, 4], 2));
        let tape = Tape::inference();
        let x = tape.constant(random(&[2, 3, 7], 1));
        causal_conv1d(&tape, &x, &weight, None, &ConvSpec::default());
    }
}
