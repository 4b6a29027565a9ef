//! The CPU: [`Ops`] for Burn's `Flex` backend.
//!
//! Kernels work on contiguous fp32 activations and on fp32, bf16 or f16 weights; everything else takes the portable
//! body. They use as many threads as the rayon pool they are called in has. Results do not depend on that number.

mod activation;
mod adamw;
mod attention;
mod cache;
mod cross_entropy;
mod elementwise;
mod embedding;
pub(crate) mod fast_path;
mod gemm;
mod gemv;
mod grouped_linear;
mod linear;
mod math;
mod moe;
mod norm;
mod pool;
mod reduce;
mod rotary;
mod simd;
mod storage;
mod team;
mod threads;

use burn_backend::DType;
use burn_flex::{Flex, FlexTensor};

use crate::activation::Activation;
use crate::adamw::AdamWStep;
use crate::attention::{AttentionGrads, AttentionOutput, AttentionRule};
use crate::clamped_swiglu::SwigluClamp;
use crate::cross_entropy::{CrossEntropyOutput, CrossEntropySpec};
use crate::grad_slot::GradSlot;
use crate::moe::{ExpertOffsets, ExpertOrder, RouterOutput, RouterSpec, SortedExperts};
use crate::ops::Ops;
use crate::rms_norm::NormSpec;
use crate::rotary::{RotaryDirection, RotaryStyle};
use elementwise::{Add, Mul, Sub};

impl Ops for Flex {
    /// Half precision is a storage format here: weights are widened on the fly and all arithmetic is fp32.
    fn activation_dtype(weight_dtype: DType) -> DType {
        match weight_dtype {
            DType::F16 | DType::BF16 => DType::F32,
            dtype => dtype,
        }
    }

    fn linear_forward(x: FlexTensor, weight: FlexTensor, bias: Option<FlexTensor>) -> FlexTensor {
        linear::forward(&x, &weight, bias.as_ref())
            .unwrap_or_else(|| crate::linear::portable::<Self>(x, weight, bias))
    }

    fn linear_backward_input(dy: FlexTensor, weight: FlexTensor) -> FlexTensor {
        linear::backward_input(&dy, &weight)
            .unwrap_or_else(|| crate::linear::portable_backward_input::<Self>(dy, weight))
    }

    fn linear_accumulate_weight_grad(
        x: FlexTensor,
        dy: FlexTensor,
        slot: GradSlot<Self>,
    ) -> FlexTensor {
        slot.rounded_once(|slot| {
            linear::accumulate_weight_grad(&x, &dy, slot).unwrap_or_else(|slot| {
                crate::linear::portable_accumulate_weight_grad::<Self>(x, dy, slot)
            })
        })
    }

    fn linear_accumulate_bias_grad(dy: FlexTensor, slot: GradSlot<Self>) -> FlexTensor {
        linear::accumulate_bias_grad(&dy, slot)
            .unwrap_or_else(|slot| crate::linear::portable_accumulate_bias_grad::<Self>(dy, slot))
    }

    fn embedding_forward(ids: FlexTensor, weight: FlexTensor, dtype: DType) -> FlexTensor {
        embedding::forward(&ids, &weight, dtype)
            .unwrap_or_else(|| crate::embedding::portable::<Self>(ids, weight, dtype))
    }

    fn embedding_accumulate_grad(
        ids: FlexTensor,
        dy: FlexTensor,
        vocab_size: usize,
        slot: GradSlot<Self>,
    ) -> FlexTensor {
        slot.rounded_once(|slot| {
            embedding::accumulate_grad(&ids, &dy, vocab_size, slot).unwrap_or_else(|slot| {
                crate::embedding::portable_accumulate_grad::<Self>(ids, dy, vocab_size, slot)
            })
        })
    }

    fn rms_norm_forward(x: FlexTensor, weight: FlexTensor, spec: NormSpec) -> FlexTensor {
        norm::rms_norm(&x, &weight, spec)
            .unwrap_or_else(|| crate::rms_norm::portable::<Self>(x, weight, spec))
    }

    fn rms_norm_backward(
        x: FlexTensor,
        weight: FlexTensor,
        dy: FlexTensor,
        spec: NormSpec,
    ) -> (FlexTensor, FlexTensor) {
        norm::rms_norm_backward(&x, &weight, &dy, spec)
            .unwrap_or_else(|| crate::rms_norm::portable_backward::<Self>(x, weight, dy, spec))
    }

    fn layer_norm_forward(
        x: FlexTensor,
        weight: FlexTensor,
        bias: Option<FlexTensor>,
        spec: NormSpec,
    ) -> FlexTensor {
        norm::layer_norm(&x, &weight, bias.as_ref(), spec)
            .unwrap_or_else(|| crate::layer_norm::portable::<Self>(x, weight, bias, spec))
    }

    fn layer_norm_backward(
        x: FlexTensor,
        weight: FlexTensor,
        dy: FlexTensor,
        spec: NormSpec,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        norm::layer_norm_backward(&x, &weight, &dy, spec)
            .unwrap_or_else(|| crate::layer_norm::portable_backward::<Self>(x, weight, dy, spec))
    }

    fn rotary(
        x: FlexTensor,
        cos: FlexTensor,
        sin: FlexTensor,
        style: RotaryStyle,
        direction: RotaryDirection,
    ) -> FlexTensor {
        rotary::rotary(x, &cos, &sin, style, direction)
            .unwrap_or_else(|x| crate::rotary::portable::<Self>(x, cos, sin, style, direction))
    }

    fn attention_forward(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        sinks: Option<FlexTensor>,
        rule: &AttentionRule,
    ) -> AttentionOutput<Self> {
        attention::attention(&q, &k, &v, sinks.as_ref(), rule)
            .unwrap_or_else(|| crate::attention::portable::<Self>(q, k, v, sinks, rule))
    }

    fn attention_backward(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        sinks: Option<FlexTensor>,
        output: AttentionOutput<Self>,
        dout: FlexTensor,
        rule: &AttentionRule,
    ) -> AttentionGrads<Self> {
        attention::attention_backward(&q, &k, &v, sinks.as_ref(), &output, &dout, rule)
            .unwrap_or_else(|| {
                crate::attention::portable_backward::<Self>(q, k, v, sinks, output, dout, rule)
            })
    }

    fn activation_forward(x: FlexTensor, act: Activation) -> FlexTensor {
        activation::forward(&x, act).unwrap_or_else(|| crate::activation::portable::<Self>(x, act))
    }

    fn activation_backward(x: FlexTensor, dy: FlexTensor, act: Activation) -> FlexTensor {
        activation::backward(&x, &dy, act)
            .unwrap_or_else(|| crate::activation::portable_backward::<Self>(x, dy, act))
    }

    fn gated_activation_forward(gate: FlexTensor, up: FlexTensor, act: Activation) -> FlexTensor {
        activation::gated_forward(&gate, &up, act)
            .unwrap_or_else(|| crate::activation::portable_gated::<Self>(gate, up, act))
    }

    fn gated_activation_backward(
        gate: FlexTensor,
        up: FlexTensor,
        dy: FlexTensor,
        act: Activation,
    ) -> (FlexTensor, FlexTensor) {
        activation::gated_backward(&gate, &up, &dy, act).unwrap_or_else(|| {
            crate::activation::portable_gated_backward::<Self>(gate, up, dy, act)
        })
    }

    fn clamped_swiglu_forward(gate: FlexTensor, up: FlexTensor, clamp: SwigluClamp) -> FlexTensor {
        activation::clamped_forward(&gate, &up, clamp)
            .unwrap_or_else(|| crate::clamped_swiglu::portable::<Self>(gate, up, clamp))
    }

    fn clamped_swiglu_backward(
        gate: FlexTensor,
        up: FlexTensor,
        dy: FlexTensor,
        clamp: SwigluClamp,
    ) -> (FlexTensor, FlexTensor) {
        activation::clamped_backward(&gate, &up, &dy, clamp).unwrap_or_else(|| {
            crate::clamped_swiglu::portable_backward::<Self>(gate, up, dy, clamp)
        })
    }

    fn router_forward(
        logits: FlexTensor,
        correction_bias: Option<FlexTensor>,
        spec: &RouterSpec,
    ) -> RouterOutput<Self> {
        moe::route(&logits, correction_bias.as_ref(), spec)
            .unwrap_or_else(|| crate::moe::router::portable::<Self>(logits, correction_bias, spec))
    }

    fn router_backward(
        logits: FlexTensor,
        experts: FlexTensor,
        dweights: FlexTensor,
        spec: &RouterSpec,
    ) -> FlexTensor {
        moe::route_backward(&logits, &experts, &dweights, spec).unwrap_or_else(|| {
            crate::moe::router::portable_backward::<Self>(logits, experts, dweights, spec)
        })
    }

    fn sort_by_expert(experts: FlexTensor, num_experts: usize) -> SortedExperts<Self> {
        moe::sort(&experts, num_experts)
            .unwrap_or_else(|| crate::moe::permute::portable_sort::<Self>(experts, num_experts))
    }

    fn permute_rows(
        x: FlexTensor,
        order: &ExpertOrder<Self>,
        weights: Option<FlexTensor>,
    ) -> FlexTensor {
        moe::permute(&x, order.order(), weights.as_ref(), order.top_k())
            .unwrap_or_else(|| crate::moe::permute::portable_permute::<Self>(x, order, weights))
    }

    fn unpermute_rows(
        rows: FlexTensor,
        inverse: FlexTensor,
        weights: Option<FlexTensor>,
        offsets: FlexTensor,
    ) -> FlexTensor {
        moe::unpermute(&rows, &inverse, weights.as_ref(), &offsets).unwrap_or_else(|| {
            crate::moe::permute::portable_unpermute::<Self>(rows, inverse, weights, offsets)
        })
    }

    fn unpermute_weight_grad(
        rows: FlexTensor,
        inverse: FlexTensor,
        dy: FlexTensor,
        offsets: FlexTensor,
    ) -> FlexTensor {
        moe::unpermute_weight_grad(&rows, &inverse, &dy, &offsets).unwrap_or_else(|| {
            crate::moe::permute::portable_weight_grad::<Self>(rows, inverse, dy, offsets)
        })
    }

    fn grouped_linear_forward(
        x: FlexTensor,
        weight: FlexTensor,
        bias: Option<FlexTensor>,
        offsets: &ExpertOffsets<Self>,
    ) -> FlexTensor {
        grouped_linear::forward(&x, &weight, bias.as_ref(), offsets).unwrap_or_else(|| {
            crate::moe::grouped_linear::portable::<Self>(x, weight, bias, offsets)
        })
    }

    fn grouped_linear_backward_input(
        dy: FlexTensor,
        weight: FlexTensor,
        offsets: &ExpertOffsets<Self>,
    ) -> FlexTensor {
        grouped_linear::backward_input(&dy, &weight, offsets).unwrap_or_else(|| {
            crate::moe::grouped_linear::portable_backward_input::<Self>(dy, weight, offsets)
        })
    }

    fn grouped_linear_accumulate_weight_grad(
        x: FlexTensor,
        dy: FlexTensor,
        offsets: &ExpertOffsets<Self>,
        slot: GradSlot<Self>,
    ) -> FlexTensor {
        slot.rounded_once(|slot| {
            grouped_linear::accumulate_weight_grad(&x, &dy, offsets, slot).unwrap_or_else(|slot| {
                crate::moe::grouped_linear::portable_accumulate_weight_grad::<Self>(
                    x, dy, offsets, slot,
                )
            })
        })
    }

    fn grouped_linear_accumulate_bias_grad(
        dy: FlexTensor,
        offsets: &ExpertOffsets<Self>,
        slot: GradSlot<Self>,
    ) -> FlexTensor {
        grouped_linear::accumulate_bias_grad(&dy, offsets, slot).unwrap_or_else(|slot| {
            crate::moe::grouped_linear::portable_accumulate_bias_grad::<Self>(dy, offsets, slot)
        })
    }

    fn cross_entropy_forward(
        logits: FlexTensor,
        targets: FlexTensor,
        spec: &CrossEntropySpec,
    ) -> CrossEntropyOutput<Self> {
        cross_entropy::forward(&logits, &targets, spec)
            .unwrap_or_else(|| crate::cross_entropy::portable::<Self>(logits, targets, spec))
    }

    fn cross_entropy_backward(
        logits: FlexTensor,
        targets: FlexTensor,
        lse: FlexTensor,
        dloss: FlexTensor,
        spec: &CrossEntropySpec,
    ) -> FlexTensor {
        cross_entropy::backward(logits, &targets, &lse, &dloss, spec).unwrap_or_else(|logits| {
            crate::cross_entropy::portable_backward::<Self>(logits, targets, lse, dloss, spec)
        })
    }

    fn add(a: FlexTensor, b: FlexTensor) -> FlexTensor {
        elementwise::binary::<Add>(a, b)
            .unwrap_or_else(|(a, b)| crate::elementwise::portable_add::<Self>(a, b))
    }

    fn sub(a: FlexTensor, b: FlexTensor) -> FlexTensor {
        elementwise::binary::<Sub>(a, b)
            .unwrap_or_else(|(a, b)| crate::elementwise::portable_sub::<Self>(a, b))
    }

    fn mul(a: FlexTensor, b: FlexTensor) -> FlexTensor {
        elementwise::binary::<Mul>(a, b)
            .unwrap_or_else(|(a, b)| crate::elementwise::portable_mul::<Self>(a, b))
    }

    fn scale(x: FlexTensor, factor: f64) -> FlexTensor {
        elementwise::scale(x, factor as f32)
            .unwrap_or_else(|x| crate::elementwise::portable_scale::<Self>(x, factor))
    }

    fn softcap_forward(x: FlexTensor, cap: f64) -> FlexTensor {
        elementwise::softcap(&x, cap as f32)
            .unwrap_or_else(|| crate::elementwise::portable_softcap::<Self>(x, cap))
    }

    fn softcap_backward(x: FlexTensor, dy: FlexTensor, cap: f64) -> FlexTensor {
        elementwise::softcap_backward(&x, &dy, cap as f32)
            .unwrap_or_else(|| crate::elementwise::portable_softcap_backward::<Self>(x, dy, cap))
    }

    fn sum_squares(x: FlexTensor) -> FlexTensor {
        reduce::sum_squares(&x).unwrap_or_else(|| crate::reduce::portable_sum_squares::<Self>(x))
    }

    fn adamw_step(
        param: FlexTensor,
        grad: FlexTensor,
        m: FlexTensor,
        v: FlexTensor,
        step: &AdamWStep,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        match adamw::step(param, &grad, m, v, step) {
            Ok([param, m, v]) => (param, m, v),
            Err([param, m, v]) => crate::adamw::portable::<Self>(param, grad, m, v, step),
        }
    }

    fn cache_write(cache: FlexTensor, x: FlexTensor, start: usize) -> FlexTensor {
        cache::write(cache, &x, start)
            .unwrap_or_else(|cache| crate::cache::portable_write::<Self>(cache, x, start))
    }
}
