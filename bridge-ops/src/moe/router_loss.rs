//! Auxiliary losses of a router, which keep its experts equally busy and its logits small.
//!
//! ```text
//! f_i = assignments to expert i / (tokens k)        P_i = mean over the tokens of p_i, their scores, of sum 1
//! balance = E sum over i of f_i P_i                 1 when all are equally busy (Fedus et al. 2022, arXiv 2101.03961)
//! z = mean over the tokens of logsumexp(logits)^2   (Zoph et al. 2022, arXiv 2202.08906)
//! ```
//!
//! `f` counts as a constant. The balance is taken over each sequence by itself (DeepSeek-V2), over the tokens of the
//! micro-batch, or over those of earlier micro-batches as well (arXiv 2501.11873). Padding has no part in them.
//!
//! The losses are no part of a segment's output, so their gradients join where the routing weights' gradients pass.

use std::fmt;
use std::sync::Arc;

use burn::tensor::{IndexingUpdateOp, Int as IntKind, Tensor, activation};
use burn_backend::DType;

use super::router::{RouterScore, SUM_FLOOR};
use crate::ops::Ops;
use crate::primitive::{Float, Int, float, reshaped, tensor, to_dtype, to_f32};
use crate::tape::{Tape, Var};

/// Over which tokens experts should be equally busy.
#[derive(Debug, Clone)]
pub enum BalanceLoss<B: Ops> {
    /// Each of this many sequences of equal length by itself; the loss is their mean.
    PerSequence(usize),
    /// All tokens at hand.
    PerBatch,
    /// All tokens at hand together with earlier ones, of which the assignments to each expert are known: `[E]` fp32.
    Since(Float<B>),
}

/// Which losses, and how much they count.
#[derive(Debug, Clone)]
pub struct RouterLossSpec<B: Ops> {
    /// How logits become scores. Sigmoids are divided by their sum over all experts.
    pub score: RouterScore,
    /// The kind of balance loss.
    pub balance: BalanceLoss<B>,
    /// Factor on the gradient of the balance loss; 0 for none.
    pub balance_weight: f64,
    /// Factor on the gradient of the z loss; 0 for none.
    pub z_weight: f64,
    /// Where several ranks have tokens over which experts should be equally busy: how their counts are summed.
    pub across_ranks: Option<CountsAcross<B>>,
    /// Where some of the tokens are padding, which has no part in any loss: which are not.
    pub valid: Option<ValidTokens<B>>,
}

/// Which rows are tokens of a text, and which are padding.
#[derive(Debug, Clone)]
pub struct ValidTokens<B: Ops> {
    /// 1 for a token, 0 for padding: `[tokens]` fp32.
    pub mask: Float<B>,
    /// Number of ones.
    pub count: usize,
}

/// Sums a tensor of counts over ranks.
#[derive(Clone)]
pub struct CountsAcross<B: Ops>(pub Arc<dyn Fn(Float<B>) -> Float<B> + Send + Sync>);

impl<B: Ops> fmt::Debug for CountsAcross<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CountsAcross")
    }
}

/// The losses, without their factors.
#[derive(Debug, Clone)]
pub struct RouterLosses<B: Ops> {
    /// `[1]` fp32.
    pub balance: Float<B>,
    /// `[1]` fp32.
    pub z: Float<B>,
    /// Assignments of tokens to each expert, `[E]` fp32.
    pub counts: Float<B>,
}

/// How often each of `num_experts` experts was chosen: `[E]` fp32. experts: [tokens, k]; `num_experts` stands for none.
pub fn count_assignments<B: Ops>(experts: &Int<B>, num_experts: usize) -> Float<B> {
    let counts = assignments::<B>(experts, num_experts).sum_dim(0);
    reshaped::<B>(float(counts), &[num_experts])
}

/// 1 where a token has an expert: [tokens, E] fp32. `num_experts` stands for none.
fn assignments<B: Ops>(experts: &Int<B>, num_experts: usize) -> Tensor<B, 2> {
    let chosen = Tensor::<B, 2, IntKind>::from_primitive(experts.clone());
    let ([tokens, top_k], device) = (chosen.dims(), chosen.device());
    let ones = Tensor::<B, 2>::ones([tokens, top_k], (&device, DType::F32));
    // One more column takes what has no expert.
    Tensor::<B, 2>::zeros([tokens, num_experts + 1], (&device, DType::F32))
        .scatter(1, chosen, ones, IndexingUpdateOp::Add)
        .narrow(1, 0, num_experts)
}

/// Passes routing weights on unchanged, and adds the gradients of the losses to that of the logits on the way back.
/// weights: [tokens, k], logits: [tokens, E], experts: [tokens, k].
///
/// # Panics
/// When the shapes do not fit.
#[track_caller]
pub fn with_router_losses<B: Ops>(
    tape: &Tape<B>,
    weights: &Var<B>,
    logits: &Var<B>,
    experts: &Int<B>,
    spec: &RouterLossSpec<B>,
) -> (Var<B>, RouterLosses<B>) {
    let shape = logits.shape();
    let &[tokens, num_experts] = shape.as_slice() else {
        panic!("router losses: logits have shape {shape:?}, expected [tokens, experts]");
    };
    let dtype = burn_backend::TensorMetadata::dtype(&logits.value());
    let logits_value = tensor::<B, 2>(to_f32::<B>(logits.value()));
    let mut assigned = assignments::<B>(experts, num_experts);
    let mask = (spec.valid.as_ref()).map(|valid| reshaped::<B>(valid.mask.clone(), &[tokens, 1]));
    let mask = mask.map(tensor::<B, 2>); // [tokens, 1]
    if let Some(mask) = &mask {
        assigned = assigned * mask.clone();
    }
    let count = spec
        .valid
        .as_ref()
        .map_or(tokens, |valid| valid.count)
        .max(1);
    let counts = assigned.clone().sum_dim(0); // [1, E]

    let summed = |counts: Tensor<B, 2>| match &spec.across_ranks {
        Some(CountsAcross(sum)) => tensor::<B, 2>(sum(float(counts))),
        None => counts,
    };
    // Shares for each token: those of its sequence, or the same for all.
    let shares: Tensor<B, 2> = match &spec.balance {
        BalanceLoss::PerBatch => {
            let all = summed(counts.clone());
            shares_of(all).expand([tokens, num_experts])
        }
        BalanceLoss::PerSequence(sequences) => {
            assert!(
                *sequences > 0 && tokens.is_multiple_of(*sequences),
                "router losses: {tokens} tokens are not {sequences} sequences"
            );
            let seq = tokens / sequences;
            let own = assigned.reshape([*sequences, seq, num_experts]).sum_dim(1);
            let all = summed(own.reshape([*sequences, num_experts]));
            shares_of(all)
                .reshape([*sequences, 1, num_experts])
                .expand([*sequences, seq, num_experts])
                .reshape([tokens, num_experts])
        }
        BalanceLoss::Since(earlier) => {
            let earlier = reshaped::<B>(to_f32::<B>(earlier.clone()), &[1, num_experts]);
            let all = summed(tensor::<B, 2>(earlier) + counts.clone());
            shares_of(all).expand([tokens, num_experts])
        }
    };
    let factor = num_experts as f64 / count as f64;
    let mut dscores = shares.mul_scalar(factor);
    if let Some(mask) = &mask {
        dscores = dscores * mask.clone();
    }
    let (scores, raw) = normalised(logits_value.clone(), spec.score);
    let balance = (scores.clone() * dscores.clone()).sum();
    let lse = log_sum_exp(logits_value.clone());
    // Of each token its part in the mean.
    let lse_weight = |lse: Tensor<B, 2>| match &mask {
        Some(mask) => lse * mask.clone().div_scalar(count as f64),
        None => lse.div_scalar(count as f64),
    };
    let z = lse_weight(lse.clone().square()).sum();
    let weighted_lse = lse_weight(lse);

    let losses = RouterLosses {
        balance: float(balance),
        z: float(z),
        counts: reshaped::<B>(float(counts), &[num_experts]),
    };
    let (balance_weight, z_weight) = (spec.balance_weight, spec.z_weight);
    let output = tape.record(weights.value(), &[weights, logits], move |dweights| {
        let mut dlogits = None;
        if balance_weight != 0.0 {
            let mean = (scores.clone() * dscores.clone()).sum_dim(1);
            let inner = dscores - mean;
            let grad = match raw {
                None => scores * inner,
                Some((sigmoid, sum)) => {
                    inner / sum * sigmoid.clone() * sigmoid.neg().add_scalar(1.0)
                }
            };
            dlogits = Some(grad.mul_scalar(balance_weight));
        }
        if z_weight != 0.0 {
            let grad =
                activation::softmax(logits_value, 1) * weighted_lse.mul_scalar(2.0 * z_weight);
            dlogits = Some(match dlogits {
                Some(sum) => sum + grad,
                None => grad,
            });
        }
        let dlogits = dlogits.map(|grad| to_dtype::<B>(float(grad), dtype));
        vec![Some(dweights), dlogits]
    });
    (output, losses)
}

/// Counts, [rows, E], as shares of their row's sum; zeros where it has none.
fn shares_of<B: Ops>(counts: Tensor<B, 2>) -> Tensor<B, 2> {
    let sum = counts.clone().sum_dim(1).clamp_min(1.0);
    counts / sum
}

/// A sigmoid router's sigmoids, [tokens, E], and their sums, [tokens, 1].
type Sigmoids<B> = (Tensor<B, 2>, Tensor<B, 2>);

/// Scores of sum 1, [tokens, E], and of sigmoids what they were made from.
fn normalised<B: Ops>(
    logits: Tensor<B, 2>,
    score: RouterScore,
) -> (Tensor<B, 2>, Option<Sigmoids<B>>) {
    match score {
        RouterScore::Softmax => (activation::softmax(logits, 1), None),
        RouterScore::Sigmoid => {
            let sigmoid = activation::sigmoid(logits);
            let sum = sigmoid.clone().sum_dim(1).add_scalar(SUM_FLOOR);
            (sigmoid.clone() / sum.clone(), Some((sigmoid, sum)))
        }
    }
}

/// [tokens, E] -> [tokens, 1].
fn log_sum_exp<B: Ops>(logits: Tensor<B, 2>) -> Tensor<B, 2> {
    let max = logits.clone().max_dim(1);
    (logits - max.clone()).exp().sum_dim(1).log() + max
}
