//! Cross-entropy of the next token, from logits.
//!
//! ```text
//! z       = logits, or cap tanh(logits / cap)
//! loss_t  = logsumexp(z_t) - z_t[target_t]            0 where the target is ignored
//! dz_t    = (softmax(z_t) - onehot(target_t)) dloss_t
//! ```
//!
//! Where the logits are one rank's part of the vocabulary, targets of other parts are [`TARGET_ELSEWHERE`]; the caller
//! joins the parts' log-sum-exps, and the backward pass gets the joined one.
//!
//! The log-sum-exp is that of fp32 values, with the row's maximum subtracted.

use burn::tensor::{Bool, Int as IntKind, Tensor};
use burn_backend::{DType, TensorMetadata};

use crate::ops::Ops;
use crate::primitive::{Float, Int, dims, float, tensor, to_dtype, to_f32};
use crate::tape::{Tape, Var};

/// A target that lies in another part of the vocabulary than these logits (vocabulary parallelism): no logit is
/// subtracted from the log-sum-exp, and the gradient has no onehot.
pub const TARGET_ELSEWHERE: i64 = -1;

/// What a token's loss is.
#[derive(Debug, Clone, PartialEq)]
pub struct CrossEntropySpec {
    /// Targets of this value have loss 0 and no gradient.
    pub ignore_index: i64,
    /// Caps the logits to `-cap..cap` by a tanh (Gemma 2).
    pub logit_softcap: Option<f64>,
}

impl Default for CrossEntropySpec {
    fn default() -> Self {
        Self {
            ignore_index: -100,
            logit_softcap: None,
        }
    }
}

/// What a cross-entropy kernel returns.
#[derive(Debug, Clone)]
pub struct CrossEntropyOutput<B: Ops> {
    /// `[tokens]` fp32: the loss, 0 where the target is ignored.
    pub loss: Float<B>,
    /// `[tokens]` fp32: log-sum-exp of each row of (capped) logits.
    pub lse: Float<B>,
}

/// The loss of each token. logits: [tokens, vocab], targets: `[tokens]` -> `[tokens]` fp32.
///
/// # Panics
/// When the shapes do not fit, or (on backends that check) a target is neither a token, the ignored value nor
/// [`TARGET_ELSEWHERE`].
#[track_caller]
pub fn cross_entropy<B: Ops>(
    tape: &Tape<B>,
    logits: &Var<B>,
    targets: &Int<B>,
    spec: CrossEntropySpec,
) -> Var<B> {
    let (l, t) = (logits.shape(), dims(targets));
    assert!(
        l.len() == 2 && t == [l[0]],
        "cross_entropy: logits of shape {l:?} ([tokens, vocab]) do not fit targets of shape {t:?}"
    );
    let CrossEntropyOutput { loss, lse } =
        B::cross_entropy_forward(logits.value(), targets.clone(), &spec);
    let (logits_value, targets) = (logits.value(), targets.clone());
    tape.record(loss, &[logits], move |dloss| {
        vec![Some(B::cross_entropy_backward(
            logits_value,
            targets,
            lse,
            dloss,
            &spec,
        ))]
    })
}

pub(crate) fn portable<B: Ops>(
    logits: Float<B>,
    targets: Int<B>,
    spec: &CrossEntropySpec,
) -> CrossEntropyOutput<B> {
    let logits = capped(tensor::<B, 2>(to_f32::<B>(logits)), spec);
    let Targets { index, kept, here } = Targets::new(targets, spec);

    let max = logits.clone().max_dim(1); // [tokens, 1]
    let lse = (logits.clone() - max.clone()).exp().sum_dim(1).log() + max;
    let target_logit = logits.gather(1, index) * here;
    let loss = (lse.clone() - target_logit) * kept;
    CrossEntropyOutput {
        loss: float(loss.squeeze_dim::<1>(1)),
        lse: float(lse.squeeze_dim::<1>(1)),
    }
}

pub(crate) fn portable_backward<B: Ops>(
    logits: Float<B>,
    targets: Int<B>,
    lse: Float<B>,
    dloss: Float<B>,
    spec: &CrossEntropySpec,
) -> Float<B> {
    let dtype = logits.dtype();
    let raw = tensor::<B, 2>(to_f32::<B>(logits));
    let z = capped(raw, spec);
    let Targets { index, kept, here } = Targets::new(targets, spec);
    let lse = tensor::<B, 1>(lse).unsqueeze_dim::<2>(1); // [tokens, 1]
    let dloss = tensor::<B, 1>(to_f32::<B>(dloss)).unsqueeze_dim::<2>(1) * kept;

    let probability = (z.clone() - lse).exp();
    let mut dz = (probability * dloss.clone()).scatter(
        1,
        index,
        dloss.neg() * here,
        burn::tensor::IndexingUpdateOp::Add,
    );
    if let Some(cap) = spec.logit_softcap {
        dz = dz * z.div_scalar(cap).square().neg().add_scalar(1.0);
    }
    to_dtype::<B>(float(dz), dtype)
}

fn capped<B: Ops>(logits: Tensor<B, 2>, spec: &CrossEntropySpec) -> Tensor<B, 2> {
    match spec.logit_softcap {
        Some(cap) => logits.div_scalar(cap).tanh().mul_scalar(cap),
        None => logits,
    }
}

/// Targets in the form that tensor operations want.
struct Targets<B: Ops> {
    /// [tokens, 1]: the target, 0 where it is ignored or elsewhere.
    index: Tensor<B, 2, IntKind>,
    /// [tokens, 1] fp32: 1, or 0 where the target is ignored.
    kept: Tensor<B, 2>,
    /// [tokens, 1] fp32: 1, or 0 where the target is elsewhere.
    here: Tensor<B, 2>,
}

impl<B: Ops> Targets<B> {
    fn new(targets: Int<B>, spec: &CrossEntropySpec) -> Self {
        let targets = Tensor::<B, 1, IntKind>::from_primitive(targets).unsqueeze_dim::<2>(1);
        let ignored = targets.clone().equal_elem(spec.ignore_index);
        let elsewhere = targets.clone().equal_elem(TARGET_ELSEWHERE);
        let unless = |condition: &Tensor<B, 2, Bool>| {
            let ones = float(condition.clone().bool_not().float());
            tensor::<B, 2>(to_dtype::<B>(ones, DType::F32))
        };
        Self {
            kept: unless(&ignored),
            here: unless(&elsewhere),
            index: targets.mask_fill(ignored.bool_or(elsewhere), 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{DEVICE, ROUNDING, assert_close, assert_fast, check, random};
    use crate::{int_from_i64, to_f32_vec};

    const TARGETS: [i64; 5] = [3, -100, 0, 130, 7];

    fn targets() -> Int<Flex> {
        int_from_i64::<Flex>(&TARGETS, &[5], &DEVICE)
    }

    fn logits() -> Float<Flex> {
        Flex::scale(random(&[5, 131], 1), 8.0)
    }

    #[test]
    fn matches_autodiff() {
        for logit_softcap in [None, Some(5.0)] {
            let spec = CrossEntropySpec {
                logit_softcap,
                ..Default::default()
            };
            check(
                &format!("{spec:?}"),
                &[logits()],
                &[],
                |tape, x, _| cross_entropy(tape, &x[0], &targets(), spec.clone()),
                |x, _| {
                    let mut z = x[0].tensor::<2>();
                    if let Some(cap) = logit_softcap {
                        z = z.div_scalar(cap).tanh().mul_scalar(cap);
                    }
                    let log_p = burn::tensor::activation::log_softmax(z, 1);
                    let index = TARGETS.map(|t| t.max(0));
                    let kept = TARGETS.map(|t| if t < 0 { 0.0_f32 } else { 1.0 });
                    let index = Tensor::<_, 1, IntKind>::from_data(index, &DEVICE).unsqueeze_dim(1);
                    log_p.gather(1, index).squeeze_dim::<1>(1).neg()
                        * Tensor::from_data(kept, &DEVICE)
                },
            );
            assert_fast(&["cross_entropy_forward", "cross_entropy_backward"]);
        }
    }

    #[test]
    fn kernels_agree_with_portable_bodies() {
        for logit_softcap in [None, Some(5.0)] {
            let spec = CrossEntropySpec {
                logit_softcap,
                ..Default::default()
            };
            let found = Flex::cross_entropy_forward(logits(), targets(), &spec);
            let expected = portable::<Flex>(logits(), targets(), &spec);
            assert_close("loss", &found.loss, &expected.loss, ROUNDING);
            assert_close("lse", &found.lse, &expected.lse, ROUNDING);
            let dloss = random(&[5], 2);
            let found =
                Flex::cross_entropy_backward(logits(), targets(), found.lse, dloss.clone(), &spec);
            let expected =
                portable_backward::<Flex>(logits(), targets(), expected.lse, dloss, &spec);
            assert_close("dlogits", &found, &expected, ROUNDING);
        }
    }

    /// The vocabulary in two parts, joined by hand, gives the loss and gradient of the whole.
    #[test]
    fn parts_of_the_vocabulary_join_to_the_whole() {
        for logit_softcap in [None, Some(5.0)] {
            let spec = CrossEntropySpec {
                logit_softcap,
                ..Default::default()
            };
            let dloss = random(&[5], 2);
            let whole = Flex::cross_entropy_forward(logits(), targets(), &spec);
            let whole_grad = Flex::cross_entropy_backward(
                logits(),
                targets(),
                whole.lse.clone(),
                dloss.clone(),
                &spec,
            );
            let parts = [0..70usize, 70..131];
            let part = |x: Float<Flex>, range: &std::ops::Range<usize>| {
                float(tensor::<Flex, 2>(x).narrow(1, range.start, range.len()))
            };
            let mut exps = [0.0f64; 5];
            let mut target_logits = [0.0f64; 5];
            for range in &parts {
                let local: Vec<i64> = TARGETS
                    .iter()
                    .map(|&target| match usize::try_from(target) {
                        Ok(token) if range.contains(&token) => (token - range.start) as i64,
                        Ok(_) => TARGET_ELSEWHERE,
                        Err(_) => target,
                    })
                    .collect();
                let local = int_from_i64::<Flex>(&local, &[5], &DEVICE);
                let outputs = [
                    Flex::cross_entropy_forward(part(logits(), range), local.clone(), &spec),
                    portable::<Flex>(part(logits(), range), local.clone(), &spec),
                ];
                assert_close("loss", &outputs[0].loss, &outputs[1].loss, ROUNDING);
                let lse = to_f32_vec::<Flex>(outputs[0].lse.clone());
                let loss = to_f32_vec::<Flex>(outputs[0].loss.clone());
                for i in 0..5 {
                    exps[i] += f64::from(lse[i]).exp();
                    target_logits[i] += f64::from(lse[i] - loss[i]);
                }
                let grads = [
                    Flex::cross_entropy_backward(
                        part(logits(), range),
                        local.clone(),
                        whole.lse.clone(),
                        dloss.clone(),
                        &spec,
                    ),
                    portable_backward::<Flex>(
                        part(logits(), range),
                        local,
                        whole.lse.clone(),
                        dloss.clone(),
                        &spec,
                    ),
                ];
                for grad in &grads {
                    assert_close("dlogits", grad, &part(whole_grad.clone(), range), ROUNDING);
                }
            }
            for (i, loss) in to_f32_vec::<Flex>(whole.loss).into_iter().enumerate() {
                if TARGETS[i] >= 0 {
                    let joined = exps[i].ln() - target_logits[i];
                    assert!((joined - f64::from(loss)).abs() < 1e-4, "{joined} {loss}");
                }
            }
        }
    }

    #[test]
    fn large_logits_do_not_overflow() {
        let logits = crate::float_from_f32::<Flex>(&[1000.0, 0.0, -1000.0], &[1, 3], &DEVICE);
        let target = int_from_i64::<Flex>(&[1], &[1], &DEVICE);
        let loss = Flex::cross_entropy_forward(logits, target, &CrossEntropySpec::default()).loss;
        assert_eq!(to_f32_vec::<Flex>(loss), [1000.0]);
    }

    #[test]
    #[should_panic(
        expected = "target 131 at 0 is neither in a vocabulary of 131 nor -100 (ignored) nor -1 (elsewhere)"
    )]
    fn a_target_out_of_range_is_named() {
        let target = int_from_i64::<Flex>(&[131], &[1], &DEVICE);
        Flex::cross_entropy_forward(random(&[1, 131], 1), target, &CrossEntropySpec::default());
    }
}
