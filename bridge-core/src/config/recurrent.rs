//! Dimensions and canonical tensors of layers that carry a state of fixed size from token to token: Mamba-2 and the
//! gated delta net.

use serde::{Deserialize, Serialize};

use crate::bridge::CanonicalTensor;
use crate::error::Problems;
use crate::layout::ShardRule;

/// The Mamba-2 layers of a model (Dao and Gu 2024, "Transformers are SSMs").
///
/// Each head carries a state `[head_dim, state_size]`. The matrices B and C, which write to and read from the state, are
/// shared by the heads of a group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mamba2Config {
    /// Number of heads.
    pub num_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Number of groups; divides `num_heads`. The norm before the output projection works within a group as well.
    pub num_groups: usize,
    /// Columns of a head's state.
    pub state_size: usize,
    /// Taps of the causal convolution over x, B and C.
    pub conv_kernel: usize,
    /// Whether the convolution has a bias.
    pub conv_bias: bool,
    /// Whether the input and output projections have biases.
    pub proj_bias: bool,
    /// Tokens per chunk of the scan. Changes speed and rounding only.
    pub chunk_size: usize,
    /// Steps are clamped to at least this.
    pub time_step_min: f64,
}

impl Mamba2Config {
    /// Width of all heads together.
    pub fn inner_size(&self) -> usize {
        self.num_heads.saturating_mul(self.head_dim)
    }

    /// Width of B (or C): all groups together.
    pub fn group_size(&self) -> usize {
        self.num_groups.saturating_mul(self.state_size)
    }

    pub(super) fn problems(&self, max_width: usize) -> Problems {
        let mut problems = sizes_within(
            max_width,
            &[
                ("num_heads", self.num_heads),
                ("head_dim", self.head_dim),
                ("num_groups", self.num_groups),
                ("state_size", self.state_size),
                ("conv_kernel", self.conv_kernel),
                ("chunk_size", self.chunk_size),
                ("num_heads*head_dim", self.inner_size()),
                ("num_groups*state_size", self.group_size()),
            ],
        );
        if self.num_groups > 0 && !self.num_heads.is_multiple_of(self.num_groups) {
            problems.push(format!(
                "num_heads={} is not a multiple of num_groups={}",
                self.num_heads, self.num_groups
            ));
        }
        if !(self.time_step_min.is_finite() && self.time_step_min >= 0.0) {
            problems.push(format!(
                "time_step_min is {}, expected a finite number of at least 0",
                self.time_step_min
            ));
        }
        problems
    }

    /// The tensors of the layer called `name`, in the order in which the model lists them.
    pub(super) fn tensors(&self, name: &str, hidden: usize, tensors: &mut Vec<CanonicalTensor>) {
        let heads = |dim| ShardRule::Heads {
            dim,
            heads: self.num_heads,
        };
        let groups = || ShardRule::Heads {
            dim: 0,
            heads: self.num_groups,
        };
        let (inner, group) = (self.inner_size(), self.group_size());
        let mut push = |leaf: &str, shape: &[usize], rule| {
            tensors.push(CanonicalTensor::new(format!("{name}.{leaf}"), shape, rule));
        };
        for (part, rows) in [("z", inner), ("x", inner), ("b", group), ("c", group)] {
            let rule = || {
                if rows == inner && matches!(part, "z" | "x") {
                    heads(0)
                } else {
                    groups()
                }
            };
            push(&format!("{part}_proj.weight"), &[rows, hidden], rule());
            if self.proj_bias {
                push(&format!("{part}_proj.bias"), &[rows], rule());
            }
        }
        push("dt_proj.weight", &[self.num_heads, hidden], heads(0));
        if self.proj_bias {
            push("dt_proj.bias", &[self.num_heads], heads(0));
        }
        for (part, rows) in [("x", inner), ("b", group), ("c", group)] {
            let rule = || if part == "x" { heads(0) } else { groups() };
            push(
                &format!("{part}_conv.weight"),
                &[rows, self.conv_kernel],
                rule(),
            );
            if self.conv_bias {
                push(&format!("{part}_conv.bias"), &[rows], rule());
            }
        }
        for leaf in ["dt_bias", "a_log", "d"] {
            push(leaf, &[self.num_heads], heads(0));
        }
        push("gated_norm.weight", &[inner], heads(0));
        push("out_proj.weight", &[hidden, inner], heads(1));
        if self.proj_bias {
            push("out_proj.bias", &[hidden], ShardRule::Replicated);
        }
    }
}

/// The gated delta net layers of a model (Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks").
///
/// Each value head carries a state `[key_head_dim, value_head_dim]`; value heads share key heads in equal groups of
/// neighbours.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GatedDeltaNetConfig {
    /// Number of query and key heads; divides `num_value_heads`.
    pub num_key_heads: usize,
    /// Number of value heads, of output gates, of decays and of writing strengths.
    pub num_value_heads: usize,
    /// Width of one query or key head.
    pub key_head_dim: usize,
    /// Width of one value head.
    pub value_head_dim: usize,
    /// Taps of the causal convolution over queries, keys and values.
    pub conv_kernel: usize,
}

impl GatedDeltaNetConfig {
    /// Width of all query (or key) heads together.
    pub fn key_size(&self) -> usize {
        self.num_key_heads.saturating_mul(self.key_head_dim)
    }

    /// Width of all value heads together.
    pub fn value_size(&self) -> usize {
        self.num_value_heads.saturating_mul(self.value_head_dim)
    }

    pub(super) fn problems(&self, max_width: usize) -> Problems {
        let mut problems = sizes_within(
            max_width,
            &[
                ("num_key_heads", self.num_key_heads),
                ("num_value_heads", self.num_value_heads),
                ("key_head_dim", self.key_head_dim),
                ("value_head_dim", self.value_head_dim),
                ("conv_kernel", self.conv_kernel),
                ("num_key_heads*key_head_dim", self.key_size()),
                ("num_value_heads*value_head_dim", self.value_size()),
            ],
        );
        if self.num_key_heads > 0 && !self.num_value_heads.is_multiple_of(self.num_key_heads) {
            problems.push(format!(
                "num_value_heads={} is not a multiple of num_key_heads={}",
                self.num_value_heads, self.num_key_heads
            ));
        }
        problems
    }

    /// The tensors of the layer called `name`, in the order in which the model lists them.
    pub(super) fn tensors(&self, name: &str, hidden: usize, tensors: &mut Vec<CanonicalTensor>) {
        let keys = || ShardRule::Heads {
            dim: 0,
            heads: self.num_key_heads,
        };
        let values = |dim| ShardRule::Heads {
            dim,
            heads: self.num_value_heads,
        };
        let (key, value) = (self.key_size(), self.value_size());
        let mut push = |leaf: &str, shape: &[usize], rule| {
            tensors.push(CanonicalTensor::new(format!("{name}.{leaf}"), shape, rule));
        };
        push("q_proj.weight", &[key, hidden], keys());
        push("k_proj.weight", &[key, hidden], keys());
        push("v_proj.weight", &[value, hidden], values(0));
        push("z_proj.weight", &[value, hidden], values(0));
        push("b_proj.weight", &[self.num_value_heads, hidden], values(0));
        push("a_proj.weight", &[self.num_value_heads, hidden], values(0));
        push("q_conv.weight", &[key, self.conv_kernel], keys());
        push("k_conv.weight", &[key, self.conv_kernel], keys());
        push("v_conv.weight", &[value, self.conv_kernel], values(0));
        push("dt_bias", &[self.num_value_heads], values(0));
        push("a_log", &[self.num_value_heads], values(0));
        push(
            "gated_norm.weight",
            &[self.value_head_dim],
            ShardRule::Replicated,
        );
        push("out_proj.weight", &[hidden, value], values(1));
    }
}

fn sizes_within(max: usize, sizes: &[(&str, usize)]) -> Problems {
    let mut problems = Problems::new();
    for (name, value) in sizes {
        if *value == 0 || *value > max {
            problems.push(format!("{name} is {value}, expected 1 to {max}"));
        }
    }
    problems
}
