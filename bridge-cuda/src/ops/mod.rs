//! The kernels of language models: `bridge_ops::Ops` for [`Cuda`](crate::Cuda), one file per kernel file.
//!
//! Every kernel takes any float dtype and any strides; views without a layout that a kernel understands are packed first.

mod activation;
mod adamw;
mod attention;
mod causal_conv1d;
mod chunks;
mod cross_entropy;
mod embedding;
mod gated_delta_rule;
mod gated_norm;
mod latent_heads;
mod linear;
mod moe;
mod norm;
mod random;
mod rotary;
mod ssd_scan;
mod time_step;

use std::ops::Range;

use bridge_ops::{
    Activation, AdamWStep, AdamWTensors, AttentionGrads, AttentionOutput, AttentionRule, ConvGrads,
    ConvSpec, CrossEntropyOutput, CrossEntropySpec, DeltaRuleInputs, ExpertOffsets, ExpertOrder,
    GatedNormGrads, GatedNormSpec, GradSlot, LossGradRequest, LossGrads, NormSpec, Ops,
    RotaryDirection, RotaryStyle, RouterOutput, RouterSpec, ScanSpec, SortedExperts, SsdGrads,
    SsdInputs, SwigluClamp,
};
use burn_backend::DType;

use crate::backend::Cuda;
use crate::device::Gpu;
use crate::elementwise::cast;
use crate::error::OrPanic;
use crate::tensor::CudaTensor;

pub use attention::{
    AttentionCalls, AttentionPath, attention_calls, attention_refusals, force_attention_path,
    set_deterministic_attention,
};
pub use moe::grouped_linear::{GroupedPath, force_grouped_path};

impl Ops for Cuda {
    const KEEPS_GRADIENT_BUFFERS: bool = false;
    const SPLITS_MASTER_WEIGHTS: bool = true;

    fn linear_forward(x: CudaTensor, weight: CudaTensor, bias: Option<CudaTensor>) -> CudaTensor {
        linear::forward(x, weight, bias)
    }

    fn linear_forward_f32(
        x: CudaTensor,
        weight: CudaTensor,
        bias: Option<CudaTensor>,
    ) -> CudaTensor {
        linear::forward_f32(x, weight, bias)
    }

    fn linear_backward_input(dy: CudaTensor, weight: CudaTensor) -> CudaTensor {
        linear::backward_input(dy, weight, None)
    }

    fn linear_backward_input_add(
        dy: CudaTensor,
        weight: CudaTensor,
        so_far: Option<CudaTensor>,
    ) -> CudaTensor {
        linear::backward_input(dy, weight, so_far)
    }

    fn linear_accumulate_weight_grad(
        x: CudaTensor,
        dy: CudaTensor,
        slot: GradSlot<Self>,
    ) -> CudaTensor {
        linear::accumulate_weight_grad(x, dy, slot)
    }

    fn linear_accumulate_bias_grad(dy: CudaTensor, slot: GradSlot<Self>) -> CudaTensor {
        linear::accumulate_bias_grad(dy, slot)
    }

    fn beside_exchange<T>(work: impl FnOnce() -> T) -> T {
        crate::cublaslt::beside_exchange(work)
    }

    fn embedding_forward(ids: CudaTensor, weight: CudaTensor, dtype: DType) -> CudaTensor {
        embedding::lookup(ids, weight, dtype)
    }

    fn embedding_accumulate_grad(
        ids: CudaTensor,
        dy: CudaTensor,
        vocab_size: usize,
        slot: GradSlot<Self>,
    ) -> CudaTensor {
        embedding::accumulate_grad(ids, dy, vocab_size, slot)
    }

    fn rms_norm_forward(x: CudaTensor, weight: CudaTensor, spec: NormSpec) -> CudaTensor {
        norm::rms_forward(x, weight, spec)
    }

    fn rms_norm_backward(
        x: CudaTensor,
        weight: CudaTensor,
        dy: CudaTensor,
        spec: NormSpec,
    ) -> (CudaTensor, CudaTensor) {
        norm::rms_backward(x, weight, dy, spec, None)
    }

    fn rms_norm_backward_add(
        x: CudaTensor,
        weight: CudaTensor,
        dy: CudaTensor,
        spec: NormSpec,
        so_far: Option<CudaTensor>,
    ) -> (CudaTensor, CudaTensor) {
        norm::rms_backward(x, weight, dy, spec, so_far)
    }

    fn layer_norm_forward(
        x: CudaTensor,
        weight: CudaTensor,
        bias: Option<CudaTensor>,
        spec: NormSpec,
    ) -> CudaTensor {
        norm::layer_forward(x, weight, bias, spec)
    }

    fn layer_norm_backward(
        x: CudaTensor,
        weight: CudaTensor,
        dy: CudaTensor,
        spec: NormSpec,
    ) -> (CudaTensor, CudaTensor, CudaTensor) {
        norm::layer_backward(x, weight, dy, spec)
    }

    fn rotary(
        x: CudaTensor,
        cos: CudaTensor,
        sin: CudaTensor,
        style: RotaryStyle,
        direction: RotaryDirection,
    ) -> CudaTensor {
        rotary::rotary(x, cos, sin, style, direction)
    }

    fn rotary_tail(
        x: CudaTensor,
        cos: CudaTensor,
        sin: CudaTensor,
        style: RotaryStyle,
        direction: RotaryDirection,
        start: usize,
    ) -> CudaTensor {
        latent_heads::rotary_tail(x, cos, sin, style, direction, start)
    }

    fn latent_keys(kv: CudaTensor, rotated: CudaTensor, nope: usize) -> CudaTensor {
        latent_heads::keys(kv, rotated, nope)
    }

    fn latent_keys_backward(
        dk: CudaTensor,
        dv: CudaTensor,
        nope: usize,
    ) -> (CudaTensor, CudaTensor) {
        latent_heads::keys_backward(dk, dv, nope)
    }

    fn attention_forward(
        q: CudaTensor,
        k: CudaTensor,
        v: CudaTensor,
        sinks: Option<CudaTensor>,
        rule: &AttentionRule,
    ) -> AttentionOutput<Self> {
        attention::forward(q, k, v, sinks, rule)
    }

    fn attention_backward(
        q: CudaTensor,
        k: CudaTensor,
        v: CudaTensor,
        sinks: Option<CudaTensor>,
        output: AttentionOutput<Self>,
        dout: CudaTensor,
        rule: &AttentionRule,
    ) -> AttentionGrads<Self> {
        attention::backward(q, k, v, sinks, output, dout, rule)
    }

    fn activation_forward(x: CudaTensor, activation: Activation) -> CudaTensor {
        activation::forward(x, activation)
    }

    fn activation_backward(x: CudaTensor, dy: CudaTensor, activation: Activation) -> CudaTensor {
        activation::backward(x, dy, activation)
    }

    fn gated_activation_forward(
        gate: CudaTensor,
        up: CudaTensor,
        activation: Activation,
    ) -> CudaTensor {
        activation::gated_forward(gate, up, activation)
    }

    fn gated_activation_backward(
        gate: CudaTensor,
        up: CudaTensor,
        dy: CudaTensor,
        activation: Activation,
    ) -> (CudaTensor, CudaTensor) {
        let (dgate, dup, _) = activation::gated_backward(gate, up, dy, activation, false);
        (dgate, dup)
    }

    fn gated_activation_backward_with_output(
        gate: CudaTensor,
        up: CudaTensor,
        dy: CudaTensor,
        activation: Activation,
    ) -> (CudaTensor, CudaTensor, CudaTensor) {
        let (dgate, dup, y) = activation::gated_backward(gate, up, dy, activation, true);
        (dgate, dup, y.expect("asked for"))
    }

    fn clamped_swiglu_forward(gate: CudaTensor, up: CudaTensor, clamp: SwigluClamp) -> CudaTensor {
        activation::clamped_forward(gate, up, clamp)
    }

    fn clamped_swiglu_backward(
        gate: CudaTensor,
        up: CudaTensor,
        dy: CudaTensor,
        clamp: SwigluClamp,
    ) -> (CudaTensor, CudaTensor) {
        activation::clamped_backward(gate, up, dy, clamp)
    }

    fn router_forward(
        logits: CudaTensor,
        correction_bias: Option<CudaTensor>,
        spec: &RouterSpec,
    ) -> RouterOutput<Self> {
        moe::router::forward(logits, correction_bias, spec)
    }

    fn router_backward(
        logits: CudaTensor,
        experts: CudaTensor,
        dweights: CudaTensor,
        spec: &RouterSpec,
    ) -> CudaTensor {
        moe::router::backward(logits, experts, dweights, spec)
    }

    fn sort_by_expert(experts: CudaTensor, num_experts: usize) -> SortedExperts<Self> {
        moe::permute::sort(experts, num_experts)
    }

    fn permute_rows(
        x: CudaTensor,
        order: &ExpertOrder<Self>,
        weights: Option<CudaTensor>,
    ) -> CudaTensor {
        moe::permute::permute(x, order, weights)
    }

    fn unpermute_rows(
        rows: CudaTensor,
        inverse: CudaTensor,
        weights: Option<CudaTensor>,
        offsets: CudaTensor,
    ) -> CudaTensor {
        moe::permute::unpermute(rows, inverse, weights, offsets)
    }

    fn unpermute_weight_grad(
        rows: CudaTensor,
        inverse: CudaTensor,
        dy: CudaTensor,
        offsets: CudaTensor,
    ) -> CudaTensor {
        moe::permute::weight_grad(rows, inverse, dy, offsets)
    }

    fn grouped_linear_forward(
        x: CudaTensor,
        weight: CudaTensor,
        bias: Option<CudaTensor>,
        offsets: &ExpertOffsets<Self>,
    ) -> CudaTensor {
        moe::grouped_linear::forward(x, weight, bias, offsets)
    }

    fn grouped_linear_backward_input(
        dy: CudaTensor,
        weight: CudaTensor,
        offsets: &ExpertOffsets<Self>,
    ) -> CudaTensor {
        moe::grouped_linear::backward_input(dy, weight, offsets, None)
    }

    fn grouped_linear_backward_input_add(
        dy: CudaTensor,
        weight: CudaTensor,
        offsets: &ExpertOffsets<Self>,
        so_far: Option<CudaTensor>,
    ) -> CudaTensor {
        moe::grouped_linear::backward_input(dy, weight, offsets, so_far)
    }

    fn grouped_linear_backward_input_pair(
        dy: [CudaTensor; 2],
        weight: [CudaTensor; 2],
        offsets: &ExpertOffsets<Self>,
        so_far: Option<CudaTensor>,
    ) -> CudaTensor {
        moe::grouped_linear::backward_input_pair(dy, weight, offsets, so_far)
    }

    fn grouped_linear_accumulate_weight_grad(
        x: CudaTensor,
        dy: CudaTensor,
        offsets: &ExpertOffsets<Self>,
        slot: GradSlot<Self>,
    ) -> CudaTensor {
        moe::grouped_linear::accumulate_weight_grad(x, dy, offsets, slot)
    }

    fn grouped_linear_accumulate_bias_grad(
        dy: CudaTensor,
        offsets: &ExpertOffsets<Self>,
        slot: GradSlot<Self>,
    ) -> CudaTensor {
        moe::grouped_linear::accumulate_bias_grad(dy, offsets, slot)
    }

    fn cross_entropy_forward(
        logits: CudaTensor,
        targets: CudaTensor,
        spec: &CrossEntropySpec,
    ) -> CrossEntropyOutput<Self> {
        cross_entropy::forward(logits, targets, spec)
    }

    fn cross_entropy_backward(
        logits: CudaTensor,
        targets: CudaTensor,
        lse: CudaTensor,
        dloss: CudaTensor,
        spec: &CrossEntropySpec,
    ) -> CudaTensor {
        cross_entropy::backward(logits, targets, lse, dloss, spec)
    }

    fn tokens_per_piece(tokens: usize, vocab: usize, dtype: DType) -> usize {
        cross_entropy::piece_rows(tokens, vocab, dtype.size())
    }

    fn linear_cross_entropy_forward(
        x: CudaTensor,
        weight: CudaTensor,
        targets: CudaTensor,
        spec: &CrossEntropySpec,
    ) -> CrossEntropyOutput<Self> {
        cross_entropy::linear_forward(x, weight, targets, spec)
    }

    fn linear_cross_entropy_backward(
        x: CudaTensor,
        weight: CudaTensor,
        targets: CudaTensor,
        lse: CudaTensor,
        dloss: CudaTensor,
        spec: &CrossEntropySpec,
        request: LossGradRequest<Self>,
    ) -> LossGrads<Self> {
        cross_entropy::linear_grads(x, weight, targets, Some(lse), dloss, spec, request).1
    }

    fn linear_cross_entropy_with_grads(
        x: CudaTensor,
        weight: CudaTensor,
        targets: CudaTensor,
        dloss: CudaTensor,
        spec: &CrossEntropySpec,
        request: LossGradRequest<Self>,
    ) -> (CrossEntropyOutput<Self>, LossGrads<Self>) {
        let (output, grads) =
            cross_entropy::linear_grads(x, weight, targets, None, dloss, spec, request);
        (
            output.expect("computed when the log-sum-exp is not known"),
            grads,
        )
    }

    fn cast(x: CudaTensor, dtype: DType) -> CudaTensor {
        cast(x, dtype)
    }

    fn normal_region(
        key: u64,
        std: f64,
        shape: &[usize],
        ranges: &[Range<usize>],
        device: &Self::Device,
    ) -> CudaTensor {
        random::normal_region(Gpu::get(device.ordinal).or_panic(), key, std, shape, ranges)
    }

    fn sum_squares(x: CudaTensor) -> CudaTensor {
        adamw::sum_squares(x)
    }

    fn adamw_step(
        param: CudaTensor,
        grad: CudaTensor,
        m: CudaTensor,
        v: CudaTensor,
        step: &AdamWStep,
    ) -> (CudaTensor, CudaTensor, CudaTensor) {
        adamw::step(param, grad, m, v, step)
    }

    fn adamw_step_many(
        tensors: Vec<AdamWTensors<Self>>,
        step: &AdamWStep,
    ) -> Vec<AdamWTensors<Self>> {
        adamw::step_many(tensors, step)
    }

    fn split_halves(weight: CudaTensor) -> (CudaTensor, CudaTensor) {
        adamw::split_halves(weight)
    }

    fn join_halves(upper: CudaTensor, lower: CudaTensor) -> CudaTensor {
        adamw::join_halves(upper, lower)
    }

    fn sum_squares_many(tensors: Vec<CudaTensor>) -> CudaTensor {
        adamw::sum_squares_many(&tensors)
    }

    fn causal_conv1d_forward(
        x: CudaTensor,
        weight: CudaTensor,
        bias: Option<CudaTensor>,
        history: Option<CudaTensor>,
        spec: &ConvSpec,
    ) -> CudaTensor {
        causal_conv1d::forward(x, weight, bias, history, spec)
    }

    fn causal_conv1d_backward(
        x: CudaTensor,
        weight: CudaTensor,
        bias: Option<CudaTensor>,
        dy: CudaTensor,
        spec: &ConvSpec,
    ) -> ConvGrads<Self> {
        causal_conv1d::backward(x, weight, bias, dy, spec)
    }

    fn time_step_forward(x: CudaTensor, bias: CudaTensor, min: f64) -> CudaTensor {
        time_step::step_forward(x, bias, min)
    }

    fn time_step_backward(
        x: CudaTensor,
        bias: CudaTensor,
        dy: CudaTensor,
        min: f64,
    ) -> (CudaTensor, CudaTensor) {
        time_step::step_backward(x, bias, dy, min)
    }

    fn log_decay_forward(dt: CudaTensor, a_log: CudaTensor) -> CudaTensor {
        time_step::decay_forward(dt, a_log)
    }

    fn log_decay_backward(
        dt: CudaTensor,
        a_log: CudaTensor,
        dy: CudaTensor,
    ) -> (CudaTensor, CudaTensor) {
        time_step::decay_backward(dt, a_log, dy)
    }

    fn ssd_scan_forward(
        inputs: SsdInputs<CudaTensor>,
        skip: Option<CudaTensor>,
        state: Option<CudaTensor>,
        spec: &ScanSpec,
    ) -> (CudaTensor, CudaTensor) {
        ssd_scan::forward(inputs, skip, state, spec)
    }

    fn ssd_scan_backward(
        inputs: SsdInputs<CudaTensor>,
        skip: Option<CudaTensor>,
        dy: CudaTensor,
        spec: &ScanSpec,
    ) -> SsdGrads<Self> {
        ssd_scan::backward(inputs, skip, dy, spec)
    }

    fn gated_delta_rule_forward(
        inputs: DeltaRuleInputs<CudaTensor>,
        state: Option<CudaTensor>,
        scale: f64,
        spec: &ScanSpec,
    ) -> (CudaTensor, CudaTensor) {
        gated_delta_rule::forward(inputs, state, scale, spec)
    }

    fn gated_delta_rule_backward(
        inputs: DeltaRuleInputs<CudaTensor>,
        dout: CudaTensor,
        scale: f64,
        spec: &ScanSpec,
    ) -> DeltaRuleInputs<CudaTensor> {
        gated_delta_rule::backward(inputs, dout, scale, spec)
    }

    fn gated_rms_norm_forward(
        x: CudaTensor,
        gate: CudaTensor,
        weight: CudaTensor,
        spec: GatedNormSpec,
    ) -> CudaTensor {
        gated_norm::gated_forward(x, gate, weight, spec)
    }

    fn gated_rms_norm_backward(
        x: CudaTensor,
        gate: CudaTensor,
        weight: CudaTensor,
        dy: CudaTensor,
        spec: GatedNormSpec,
    ) -> GatedNormGrads<Self> {
        gated_norm::gated_backward(x, gate, weight, dy, spec)
    }

    fn l2_norm_forward(x: CudaTensor, eps: f64) -> CudaTensor {
        gated_norm::l2_forward(x, eps)
    }

    fn l2_norm_backward(x: CudaTensor, dy: CudaTensor, eps: f64) -> CudaTensor {
        gated_norm::l2_backward(x, dy, eps)
    }
}

/// `[.., last]` as `[rows, last]`: packed, since the kernels want it so.
fn matrix(x: CudaTensor) -> CudaTensor {
    let last = *x
        .dims()
        .last()
        .expect("a tensor of rank 0 has no last dimension");
    let rows = x.dims()[..x.dims().len() - 1].iter().product();
    x.packed().reshape(&[rows, last])
}

/// Elements of `dtypes` that move at once in rows of `n` at `addresses`: 16-byte packs of the widest, or one by one.
fn vector(n: usize, operands: &[&CudaTensor]) -> usize {
    use burn_backend::TensorMetadata;
    let widest = operands.iter().map(|x| x.dtype().size()).max().unwrap_or(4);
    let vector = 16 / widest;
    let fits = |x: &&CudaTensor| {
        x.address()
            .is_multiple_of((vector * x.dtype().size()) as u64)
    };
    if n.is_multiple_of(vector) && operands.iter().all(fits) {
        vector
    } else {
        1
    }
}

/// The buffer of a gradient slot as something that may be written, and whether it holds a sum already.
fn open_slot(slot: GradSlot<Cuda>, like: &CudaTensor, shape: &[usize]) -> (CudaTensor, bool) {
    let usable = |x: &CudaTensor| x.is_packed() && x.is_unique() && x.dims() == shape;
    let dtype = slot.dtype();
    match slot {
        GradSlot::Sum(sum) => {
            let sum = if usable(&sum) { sum } else { sum.copied() };
            (sum, true)
        }
        GradSlot::Stale(buffer) if usable(&buffer) => (buffer, false),
        GradSlot::Stale(_) | GradSlot::Empty => {
            (CudaTensor::empty(like.gpu(), shape, dtype), false)
        }
    }
}
