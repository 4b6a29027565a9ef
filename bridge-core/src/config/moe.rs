//! Mixture-of-experts feed-forward parts: the experts, and how a router picks them.

use serde::{Deserialize, Serialize};

use crate::error::Problems;

/// What a mixture-of-experts part is made of, the same for all layers that have one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoeConfig {
    /// Number of routed experts.
    pub num_experts: usize,
    /// How many of them work on each token.
    pub num_experts_per_tok: usize,
    /// Inner width of a routed expert.
    pub intermediate_size: usize,
    /// Inner width of the expert that works on every token, all shared experts taken together; `None` where there is
    /// none.
    #[serde(default)]
    pub shared_intermediate_size: Option<usize>,
    /// Whether the shared expert's output is scaled by the sigmoid of one number per token (Qwen3-Next).
    #[serde(default)]
    pub shared_expert_gate: bool,
    /// Whether the routed experts' projections have biases (gpt-oss).
    #[serde(default)]
    pub expert_projection_bias: bool,
    /// The clamped activation of gpt-oss in place of the model's own.
    #[serde(default)]
    pub clamped_swiglu: Option<ClampedSwiglu>,
    /// How experts are picked.
    pub router: RouterConfig,
}

/// `min(gate, limit) * sigmoid(alpha * min(gate, limit)) * (clamp(up, -limit, limit) + 1)`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClampedSwiglu {
    /// Gain inside the sigmoid.
    pub alpha: f64,
    /// Largest gate, and largest magnitude of `up`.
    pub limit: f64,
}

/// How a router picks experts and weighs them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouterConfig {
    /// How logits become scores.
    pub score: RouterScoring,
    /// Whether the weights of a token's experts are divided by their sum. With softmax that is the softmax over the
    /// chosen logits.
    pub normalize: bool,
    /// Factor on the weights.
    pub scaling_factor: f64,
    /// Whether the router's projection has a bias (gpt-oss).
    #[serde(default)]
    pub bias: bool,
    /// Whether a number per expert, which the optimizer does not train, is added to the scores for the choice alone
    /// (DeepSeek-V3's `e_score_correction_bias`).
    #[serde(default)]
    pub correction_bias: bool,
    /// Choice within groups of experts.
    #[serde(default)]
    pub groups: Option<RouterGroups>,
}

/// How router logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterScoring {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each.
    Sigmoid,
}

/// Experts are picked within the best `topk_group` of `n_group` equal groups of neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouterGroups {
    /// Number of groups.
    pub n_group: usize,
    /// How many of them are searched.
    pub topk_group: usize,
    /// What ranks them.
    pub score: GroupScoring,
}

/// What a group of experts is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupScoring {
    /// Its best expert (DeepSeek-V2).
    Max,
    /// The sum of its best two (DeepSeek-V3).
    SumOfTopTwo,
}

impl RouterConfig {
    /// Softmax over all experts, weights as they are.
    pub fn softmax() -> Self {
        Self {
            score: RouterScoring::Softmax,
            normalize: false,
            scaling_factor: 1.0,
            bias: false,
            correction_bias: false,
            groups: None,
        }
    }
}

impl MoeConfig {
    /// Experts of no size behind a softmax router. What a family's `base` starts from.
    pub fn plain() -> Self {
        Self {
            num_experts: 0,
            num_experts_per_tok: 0,
            intermediate_size: 0,
            shared_intermediate_size: None,
            shared_expert_gate: false,
            expert_projection_bias: false,
            clamped_swiglu: None,
            router: RouterConfig::softmax(),
        }
    }

    pub(super) fn problems(&self, problems: &mut Problems) {
        // Far above every published model.
        const MAX_EXPERTS: usize = 1 << 16;
        const MAX_WIDTH: usize = 1 << 21;
        let (experts, top_k) = (self.num_experts, self.num_experts_per_tok);
        for (key, value, max) in [
            ("number of experts", experts, MAX_EXPERTS),
            (
                "intermediate size of experts",
                self.intermediate_size,
                MAX_WIDTH,
            ),
            (
                "intermediate size of the shared expert",
                self.shared_intermediate_size.unwrap_or(1),
                MAX_WIDTH,
            ),
        ] {
            if value == 0 || value > max {
                problems.push(format!("{key} is {value}, expected 1 to {max}"));
            }
        }
        if self.shared_expert_gate && self.shared_intermediate_size.is_none() {
            problems.push("a gate of the shared expert without a shared expert".to_owned());
        }
        let mut reach = experts;
        if let Some(groups) = &self.router.groups {
            let RouterGroups {
                n_group,
                topk_group,
                ..
            } = *groups;
            if n_group == 0 || experts % n_group != 0 {
                problems.push(format!(
                    "n_group={n_group} does not divide the {experts} experts"
                ));
            } else if topk_group == 0 || topk_group > n_group {
                problems.push(format!(
                    "topk_group is {topk_group}, expected 1 to n_group={n_group}"
                ));
            } else {
                reach = experts / n_group * topk_group;
            }
        }
        if top_k == 0 || top_k > reach {
            problems.push(format!(
                "num_experts_per_tok is {top_k}, expected 1 to the {reach} experts that are searched"
            ));
        }
        let clamp = self.clamped_swiglu;
        for (key, value) in [
            ("routed_scaling_factor", Some(self.router.scaling_factor)),
            ("swiglu_alpha", clamp.map(|clamp| clamp.alpha)),
            ("swiglu_limit", clamp.map(|clamp| clamp.limit)),
        ] {
            if let Some(value) = value.filter(|value| !(value.is_finite() && *value > 0.0)) {
                problems.push(format!(
                    "{key} is {value}, expected a finite number above 0"
                ));
            }
        }
    }
}
