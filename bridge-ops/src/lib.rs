//! The operations a language model is made of, with their gradients, over any Burn backend.
//!
//! Three layers, each usable alone:
//!
//! 1. [`Ops`]: kernels over plain tensor primitives, forward and backward as separate functions. Every kernel has a
//!    portable body written in ordinary Burn operations, which is the reference; a backend overrides what it can do
//!    faster. [`Flex`](burn_flex::Flex), the CPU backend, is implemented here (see [`cpu`]).
//! 2. [`Tape`], [`Var`] and [`Param`]: a small reverse-mode tape whose nodes are hand-written backward closures over
//!    those kernels. Weights live outside the tape, and their gradients are accumulated in fp32 by the kernel that
//!    computes them.
//! 3. Free functions ([`linear`], [`rms_norm`], [`attention`], ...): what models call. On an inference tape they record
//!    nothing, so training and generation share one code path.
//!
//! ```
//! use bridge_ops::{Param, Tape, float_from_f32, linear, to_f32_vec};
//! use burn_flex::Flex;
//!
//! let device = Default::default();
//! let weight = Param::<Flex>::new("weight", float_from_f32::<Flex>(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[2, 3], &device));
//!
//! let tape = Tape::<Flex>::new();
//! let x = tape.leaf(float_from_f32::<Flex>(&[1.0, 0.0, -1.0], &[1, 3], &device));
//! let y = linear(&tape, &x, &weight, None); // [1, 3] x [2, 3]^T -> [1, 2]
//! assert_eq!(to_f32_vec::<Flex>(y.value()), [-2.0, -2.0]);
//!
//! let seed = float_from_f32::<Flex>(&[1.0, 1.0], &[1, 2], &device);
//! let grads = tape.backward(vec![(y, seed)], &[&x]);
//! assert_eq!(to_f32_vec::<Flex>(grads[0].clone().unwrap()), [5.0, 7.0, 9.0]);
//! assert_eq!(to_f32_vec::<Flex>(weight.grad().unwrap()), [1.0, 0.0, -1.0, 1.0, 0.0, -1.0]);
//! ```

mod activation;
mod adamw;
mod attention;
mod burn_fn;
mod cache;
mod causal_conv1d;
mod chunks;
mod clamped_swiglu;
mod cross_entropy;
mod data;
mod deferred;
mod elementwise;
mod embedding;
mod gated_delta_rule;
mod gated_rms_norm;
mod grad_slot;
mod l2_norm;
mod latent_heads;
mod layer_norm;
mod linear;
mod linear_cross_entropy;
mod moe;
mod ops;
mod param;
mod primitive;
mod reduce;
mod rms_norm;
mod rotary;
mod saved;
mod shape;
mod ssd_scan;
mod tape;
mod time_step;

pub mod cpu;
pub mod random;

/// Portable bodies of kernels of [`Ops`], for an override to fall back to where it does not cover the dtype or the sizes.
pub mod portable {
    pub use crate::causal_conv1d::{
        portable as causal_conv1d, portable_backward as causal_conv1d_backward,
    };
    pub use crate::gated_delta_rule::{
        portable as gated_delta_rule, portable_backward as gated_delta_rule_backward,
    };
    pub use crate::latent_heads::portable_rotary_tail as rotary_tail;
    pub use crate::moe::grouped_linear::portable as grouped_linear_forward;
    pub use crate::moe::grouped_linear::portable_accumulate_bias_grad as grouped_linear_accumulate_bias_grad;
    pub use crate::moe::grouped_linear::portable_accumulate_weight_grad as grouped_linear_accumulate_weight_grad;
    pub use crate::moe::grouped_linear::portable_backward_input as grouped_linear_backward_input;
    pub use crate::moe::permute::portable_sort as sort_by_expert;
    pub use crate::moe::router::portable as router_forward;
    pub use crate::moe::router::portable_backward as router_backward;
    pub use crate::ssd_scan::{portable as ssd_scan, portable_backward as ssd_scan_backward};
}

pub use activation::{Activation, UnknownActivation, activation, gated_activation};
pub use adamw::{AdamWStep, AdamWTensors};
pub use attention::{AttentionGrads, AttentionOutput, AttentionRule, AttentionSpec, attention};
pub use burn_fn::{TrackedTensor, burn_fn};
pub use cache::KvCache;
pub use causal_conv1d::{ConvGrads, ConvSpec, causal_conv1d, causal_conv1d_with_history};
pub use clamped_swiglu::{SwigluClamp, clamped_swiglu};
pub use cross_entropy::{CrossEntropyOutput, CrossEntropySpec, TARGET_ELSEWHERE, cross_entropy};
pub use data::{
    float_from_bytes, float_from_f32, float_from_vec, float_zeros, int_from_i64, to_f32_vec,
    to_i64_vec, to_scalar,
};
pub use deferred::Deferred;
pub use elementwise::{add, add_bias, cast, mul, scale, scale_rows, softcap, sub};
pub use embedding::{embedding, embedding_as};
pub use gated_delta_rule::{DeltaRuleInputs, gated_delta_rule, gated_delta_rule_with_state};
pub use gated_rms_norm::{GatedNormGrads, GatedNormSpec, gated_rms_norm};
pub use grad_slot::GradSlot;
pub use l2_norm::l2_norm;
pub use latent_heads::{latent_heads, rotary_tail};
pub use layer_norm::layer_norm;
pub use linear::{linear, linear_f32};
pub use linear_cross_entropy::{
    LossGradRequest, LossGrads, linear_cross_entropy, linear_cross_entropy_weighted,
};
pub use moe::{
    BalanceLoss, CountsAcross, DropPolicy, ExpertOffsets, ExpertOrder, GroupScore, RouterGroups,
    RouterLossSpec, RouterLosses, RouterOutput, RouterScore, RouterSpec, Routing, SortedExperts,
    ValidTokens, count_assignments, drop_over_capacity, expert_capacity, grouped_linear,
    grouped_linear_pair, permute, route, route_to, unpermute, with_router_losses,
};
pub use ops::Ops;
pub use param::{GradReduction, Param, ParamShard};
pub use primitive::{Float, Int};
pub use reduce::sum;
pub use rms_norm::{NormSpec, rms_norm};
pub use rotary::{RotaryDirection, RotaryStyle, RotaryTable, rotary};
pub use saved::Saved;
pub use shape::{concat, matmul, repeat, reshape, slice, transpose};
pub use ssd_scan::{ScanSpec, SsdGrads, SsdInputs, ssd_scan, ssd_scan_with_state};
pub use tape::{Tape, Var};
pub use time_step::{log_decay, time_step};

pub use burn_backend::{DType, FloatDType, IntDType};

#[cfg(test)]
mod testing;
