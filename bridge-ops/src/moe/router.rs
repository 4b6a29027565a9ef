//! From router logits to each token's experts and their weights.
//!
//! ```text
//! p = softmax(logits) or sigmoid(logits)                               over the E experts of a token
//! c = p + correction bias                                              for the choice alone
//! experts = the k largest c, among the groups whose scores are largest where there are groups
//! w = scale p[experts]                  or, normalised, scale p[experts] / sum p[experts]
//! ```
//!
//! Where the groups that are searched hold fewer than k experts, the reference implementations fill up with experts from
//! outside: with softmax at weight 0, with sigmoid at their own weight, in whatever order their library's selection
//! leaves equal scores. [`select`] leaves them in that order, so that such a model, which nobody would train but a test
//! may make up, gives the reference's numbers.
//!
//! A normalised softmax is the softmax over the k chosen logits, which is how it is computed. Sources: Qwen3-MoE and
//! OLMoE (softmax), gpt-oss (softmax after the choice), DeepSeek-V2 (arXiv 2405.04434, groups by their best expert),
//! DeepSeek-V3 (arXiv 2412.19437, sigmoid, correction bias, groups by the sum of their best two).

use burn::tensor::{IndexingUpdateOp, Int as IntKind, Tensor, activation};
use burn_backend::DType;

use crate::ops::Ops;
use crate::primitive::{Float, Int, dims, float, tensor, to_dtype, to_f32};
use crate::tape::{Tape, Var};

/// Keeps a sum of sigmoids from being a divisor of zero, as in the reference implementations.
pub(crate) const SUM_FLOOR: f32 = 1e-20;

/// How logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouterScore {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each by itself.
    Sigmoid,
}

/// What a group of experts is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// Its best expert (DeepSeek-V2).
    Max,
    /// The sum of its best two (DeepSeek-V3).
    SumOfTopTwo,
}

/// Experts are chosen within the best `top_groups` of `groups` equal groups of neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouterGroups {
    /// Number of groups; divides the number of experts.
    pub groups: usize,
    /// How many of them are searched.
    pub top_groups: usize,
    /// What ranks them.
    pub score: GroupScore,
}

/// The rule of one router.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RouterSpec {
    /// Experts per token.
    pub top_k: usize,
    /// How logits become scores.
    pub score: RouterScore,
    /// Whether the weights of a token's experts are divided by their sum.
    pub normalize: bool,
    /// Factor on the weights.
    pub scale: f64,
    /// Choice within groups.
    pub groups: Option<RouterGroups>,
}

/// What the forward kernel returns.
#[derive(Debug, Clone)]
pub struct RouterOutput<B: Ops> {
    /// [tokens, k] fp32.
    pub weights: Float<B>,
    /// [tokens, k], values in `0..E`, the best one first.
    pub experts: Int<B>,
}

/// Each token's experts.
#[derive(Debug, Clone)]
pub struct Routing<B: Ops> {
    /// [tokens, k] fp32.
    pub weights: Var<B>,
    /// [tokens, k], values in `0..E`.
    pub experts: Int<B>,
}

/// Chooses experts. logits: [tokens, E], correction_bias: `[E]`, which sways the choice and nothing else and gets no
/// gradient.
///
/// # Panics
/// When shapes and spec do not fit each other.
#[track_caller]
pub fn route<B: Ops>(
    tape: &Tape<B>,
    logits: &Var<B>,
    correction_bias: Option<Float<B>>,
    spec: &RouterSpec,
) -> Routing<B> {
    check(&logits.shape(), spec);
    let RouterOutput { weights, experts } =
        B::router_forward(logits.value(), correction_bias, spec);
    recorded(tape, logits, weights, experts, spec)
}

/// [`route`] to experts that have been chosen already: `experts`, [tokens, k], get the weights that their scores give them.
/// For a model that is compared with itself in another precision, where rounding would choose others. Not for a spec that
/// [fills up](RouterSpec::fills_up), whose experts from outside have other weights.
///
/// # Panics
/// When shapes and spec do not fit each other.
#[track_caller]
pub fn route_to<B: Ops>(
    tape: &Tape<B>,
    logits: &Var<B>,
    experts: Int<B>,
    spec: &RouterSpec,
) -> Routing<B> {
    check(&logits.shape(), spec);
    assert!(
        !spec.fills_up(logits.shape()[1]),
        "route_to: the groups hold fewer experts than a token is given"
    );
    let (found, expected) = (dims(&experts), [logits.shape()[0], spec.top_k]);
    assert_eq!(found, expected, "route_to: experts are [tokens, k]");
    let values = tensor::<B, 2>(to_f32::<B>(logits.value()));
    let scores = scores(values.clone(), spec.score);
    let chosen = Tensor::from_primitive(experts.clone());
    let weights = float(weights_of(values, scores, chosen, spec));
    recorded(tape, logits, weights, experts, spec)
}

/// The weights with their way back to the logits.
fn recorded<B: Ops>(
    tape: &Tape<B>,
    logits: &Var<B>,
    weights: Float<B>,
    experts: Int<B>,
    spec: &RouterSpec,
) -> Routing<B> {
    let (logits_value, chosen, spec) = (logits.value(), experts.clone(), *spec);
    // An expert from outside the groups has the constant weight 0.
    let constant = spec.fills_up(logits.shape()[1]) && spec.score == RouterScore::Softmax;
    let kept = constant.then(|| {
        let weights = tensor::<B, 2>(weights.clone());
        float::<B, 2>(weights.not_equal_elem(0.0).float())
    });
    let weights = tape.record(weights, &[logits], move |dweights| {
        let dweights = match kept {
            Some(kept) => B::mul(dweights, to_dtype::<B>(kept, DType::F32)),
            None => dweights,
        };
        vec![Some(B::router_backward(
            logits_value,
            chosen,
            dweights,
            &spec,
        ))]
    });
    Routing { weights, experts }
}

#[track_caller]
fn check(logits: &[usize], spec: &RouterSpec) {
    let &[_, experts] = logits else {
        panic!("route: logits have shape {logits:?}, expected [tokens, experts]");
    };
    if let Some(RouterGroups {
        groups, top_groups, ..
    }) = spec.groups
    {
        assert!(
            groups > 0 && experts.is_multiple_of(groups) && (1..=groups).contains(&top_groups),
            "route: {experts} experts in {groups} groups of which {top_groups} are searched"
        );
    }
    assert!(
        (1..=experts).contains(&spec.top_k),
        "route: {} experts per token out of {experts}",
        spec.top_k
    );
}

impl RouterSpec {
    /// Whether the groups that are searched hold fewer experts than a token is given.
    pub fn fills_up(&self, experts: usize) -> bool {
        self.groups
            .is_some_and(|rule| experts / rule.groups.max(1) * rule.top_groups < self.top_k)
    }
}

/// The indices of the `k` largest scores, in no particular order, ties as `std::nth_element` of GNU's C++ library leaves
/// them, with which PyTorch selects on a CPU (Musser 1997, "Introspective Sorting and Selection Algorithms").
pub(crate) fn select(scores: &[f32], k: usize) -> Vec<usize> {
    let mut items: Vec<(f32, usize)> = scores.iter().copied().zip(0..).collect();
    let before = |a: (f32, usize), b: (f32, usize)| a.0 > b.0;
    let (mut first, mut last) = (0, items.len());
    while last - first > 3 {
        // The median of three goes to the front, and the rest is parted around it.
        let (a, b, c) = (first + 1, first + (last - first) / 2, last - 1);
        let (x, y, z) = (items[a], items[b], items[c]);
        let median = if before(x, y) {
            if before(y, z) {
                b
            } else if before(x, z) {
                c
            } else {
                a
            }
        } else if before(x, z) {
            a
        } else if before(y, z) {
            c
        } else {
            b
        };
        items.swap(first, median);
        let pivot = items[first];
        let (mut low, mut high) = (first + 1, last);
        let cut = loop {
            while before(items[low], pivot) {
                low += 1;
            }
            high -= 1;
            while before(pivot, items[high]) {
                high -= 1;
            }
            if low >= high {
                break low;
            }
            items.swap(low, high);
            low += 1;
        };
        if cut < k {
            first = cut;
        } else {
            last = cut;
        }
    }
    // Insertion sort, which leaves equal ones as they are.
    items[first..last].sort_by(|a, b| b.0.total_cmp(&a.0));
    items.truncate(k);
    items.into_iter().map(|(_, index)| index).collect()
}

/// The forward pass in plain tensor operations.
pub fn portable<B: Ops>(
    logits: Float<B>,
    correction_bias: Option<Float<B>>,
    spec: &RouterSpec,
) -> RouterOutput<B> {
    let logits = tensor::<B, 2>(to_f32::<B>(logits));
    let scores = scores(logits.clone(), spec.score);
    let choice = match correction_bias {
        Some(bias) => scores.clone() + tensor::<B, 1>(to_f32::<B>(bias)).unsqueeze::<2>(),
        None => scores.clone(),
    };
    let choice = match spec.groups {
        Some(groups) => within_groups(choice, &groups),
        None => choice,
    };
    let (chosen, experts) = if spec.fills_up(logits.dims()[1]) {
        filled_up::<B>(choice, spec.top_k)
    } else {
        choice.topk_with_indices(spec.top_k, 1)
    };
    let weights = weights_of(logits, scores, experts.clone(), spec);
    let weights = match spec.score {
        RouterScore::Softmax => weights.mask_fill(chosen.equal_elem(f32::NEG_INFINITY), 0.0),
        RouterScore::Sigmoid => weights,
    };
    RouterOutput {
        weights: float(weights),
        experts: experts.into_primitive(),
    }
}

/// The weights of given experts, `[tokens, k]`. logits, scores: [tokens, E].
fn weights_of<B: Ops>(
    logits: Tensor<B, 2>,
    scores: Tensor<B, 2>,
    experts: Tensor<B, 2, IntKind>,
    spec: &RouterSpec,
) -> Tensor<B, 2> {
    let weights = match (spec.score, spec.normalize) {
        (RouterScore::Softmax, true) => activation::softmax(logits.gather(1, experts), 1),
        (RouterScore::Sigmoid, true) => {
            let chosen = scores.gather(1, experts);
            let sum = chosen.clone().sum_dim(1).add_scalar(SUM_FLOOR);
            chosen / sum
        }
        (_, false) => scores.gather(1, experts),
    };
    weights.mul_scalar(spec.scale)
}

/// [`select`] for every token: the chosen scores and their experts, [tokens, k] each.
fn filled_up<B: Ops>(choice: Tensor<B, 2>, top_k: usize) -> (Tensor<B, 2>, Tensor<B, 2, IntKind>) {
    let ([tokens, experts], device) = (choice.dims(), choice.device());
    let scores = crate::data::to_f32_vec::<B>(float(choice.clone()));
    let chosen: Vec<i64> = scores
        .chunks(experts)
        .flat_map(|scores| select(scores, top_k))
        .map(|expert| expert as i64)
        .collect();
    let chosen = crate::data::int_from_i64::<B>(&chosen, &[tokens, top_k], &device);
    let chosen = Tensor::<B, 2, IntKind>::from_primitive(chosen);
    (choice.gather(1, chosen.clone()), chosen)
}

fn scores<B: Ops>(logits: Tensor<B, 2>, score: RouterScore) -> Tensor<B, 2> {
    match score {
        RouterScore::Softmax => activation::softmax(logits, 1),
        RouterScore::Sigmoid => activation::sigmoid(logits),
    }
}

/// The choice scores, minus infinity outside the groups that are searched.
fn within_groups<B: Ops>(choice: Tensor<B, 2>, rule: &RouterGroups) -> Tensor<B, 2> {
    let [tokens, experts] = choice.dims();
    let size = experts / rule.groups;
    let grouped = choice.clone().reshape([tokens, rule.groups, size]);
    let worth = match rule.score {
        GroupScore::Max => grouped.max_dim(2),
        GroupScore::SumOfTopTwo => grouped.topk(2.min(size), 2).sum_dim(2),
    }
    .reshape([tokens, rule.groups]);
    let (best, chosen) = worth.clone().topk_with_indices(rule.top_groups, 1);
    let searched = worth
        .zeros_like()
        .scatter(1, chosen, best.ones_like(), IndexingUpdateOp::Add);
    let outside = searched
        .equal_elem(0.0)
        .reshape([tokens, rule.groups, 1])
        .expand([tokens, rule.groups, size])
        .reshape([tokens, experts]);
    choice.mask_fill(outside, f32::NEG_INFINITY)
}

/// The gradient in plain tensor operations.
pub fn portable_backward<B: Ops>(
    logits: Float<B>,
    experts: Int<B>,
    dweights: Float<B>,
    spec: &RouterSpec,
) -> Float<B> {
    let dtype = burn_backend::TensorMetadata::dtype(&logits);
    let logits = tensor::<B, 2>(to_f32::<B>(logits));
    let experts = Tensor::<B, 2, IntKind>::from_primitive(experts);
    let dw = tensor::<B, 2>(to_f32::<B>(dweights)).mul_scalar(spec.scale);
    let spread = |chosen: Tensor<B, 2>| {
        logits
            .zeros_like()
            .scatter(1, experts.clone(), chosen, IndexingUpdateOp::Add)
    };
    let dlogits = match (spec.score, spec.normalize) {
        (RouterScore::Softmax, true) => {
            let w = activation::softmax(logits.clone().gather(1, experts.clone()), 1);
            let mean = (w.clone() * dw.clone()).sum_dim(1);
            spread(w * (dw - mean))
        }
        (RouterScore::Softmax, false) => {
            let p = activation::softmax(logits.clone(), 1);
            let dp = spread(dw);
            let mean = (p.clone() * dp.clone()).sum_dim(1);
            p * (dp - mean)
        }
        (RouterScore::Sigmoid, normalize) => {
            let p = activation::sigmoid(logits.clone().gather(1, experts.clone()));
            let dp = if normalize {
                let sum = p.clone().sum_dim(1).add_scalar(SUM_FLOOR);
                let mean = (p.clone() * dw.clone()).sum_dim(1) / sum.clone();
                (dw - mean) / sum
            } else {
                dw
            };
            spread(dp * p.clone() * p.neg().add_scalar(1.0))
        }
    };
    crate::primitive::to_dtype::<B>(float(dlogits), dtype)
}
