//! The kernel trait. Maths, gradients and tests of each method are in the file named after it.

use std::ops::Range;

use burn_backend::{Backend, DType};

use crate::activation::{self, Activation};
use crate::adamw::{self, AdamWStep, AdamWTensors};
use crate::attention::{self, AttentionGrads, AttentionOutput, AttentionRule};
use crate::causal_conv1d::{self, ConvGrads, ConvSpec};
use crate::clamped_swiglu::{self, SwigluClamp};
use crate::cross_entropy::{self, CrossEntropyOutput, CrossEntropySpec};
use crate::gated_delta_rule::{self, DeltaRuleInputs};
use crate::gated_rms_norm::{self, GatedNormGrads, GatedNormSpec};
use crate::grad_slot::GradSlot;
use crate::linear_cross_entropy::{self, LossGradRequest, LossGrads};
use crate::moe::{
    ExpertOffsets, ExpertOrder, RouterOutput, RouterSpec, SortedExperts, grouped_linear, permute,
    router,
};
use crate::primitive::{self, Float, Int};
use crate::rms_norm::{self, NormSpec};
use crate::rotary::{self, RotaryDirection, RotaryStyle};
use crate::ssd_scan::{self, ScanSpec, SsdGrads, SsdInputs};
use crate::{
    cache, elementwise, embedding, l2_norm, latent_heads, layer_norm, linear, random, reduce,
    time_step,
};

/// Kernels of a language model over the primitives of a backend.
///
/// Every method has a portable body, so `impl Ops for MyBackend {}` is a complete implementation; an override should
/// fall back to the portable function for dtypes and layouts it does not cover. Tensors are passed by value: a kernel
/// may reuse the buffer of an argument of which it holds the only handle. `[.., h]` means any number of leading
/// dimensions. Norms, softmax, losses and weight gradients are computed in fp32 whatever the dtype of the inputs;
/// outputs have the dtype of the activations. A weight may have a lower precision than the activations it meets.
pub trait Ops: Backend {
    /// Whether gradient buffers are kept from one step to the next. Worth it where fresh memory costs (page faults on a
    /// CPU); a backend with a pool of its own does better to lend the memory to activations meanwhile.
    const KEEPS_GRADIENT_BUFFERS: bool = true;

    /// Whether an optimizer should keep, of the fp32 weight behind a bf16 one, the lower half alone
    /// ([`split_halves`](Self::split_halves)): 2 bytes less for each weight, nothing lost.
    const SPLITS_MASTER_WEIGHTS: bool = false;

    /// The dtype in which activations are computed for weights of `weight_dtype`: that dtype, unless the backend has
    /// no fast arithmetic in it.
    fn activation_dtype(weight_dtype: DType) -> DType {
        weight_dtype
    }

    /// `y = x W^T + b`. x: [.., in], weight: [out, in], bias: `[out]` -> [.., out].
    fn linear_forward(
        x: Float<Self>,
        weight: Float<Self>,
        bias: Option<Float<Self>>,
    ) -> Float<Self> {
        linear::portable::<Self>(x, weight, bias)
    }

    /// [`linear_forward`](Self::linear_forward) of the factors widened to fp32, -> [.., out] fp32.
    fn linear_forward_f32(
        x: Float<Self>,
        weight: Float<Self>,
        bias: Option<Float<Self>>,
    ) -> Float<Self> {
        linear::portable_f32::<Self>(x, weight, bias)
    }

    /// `dx = dy W`. dy: [.., out], weight: [out, in] -> [.., in].
    fn linear_backward_input(dy: Float<Self>, weight: Float<Self>) -> Float<Self> {
        linear::portable_backward_input::<Self>(dy, weight)
    }

    /// `dx = so_far + dy W`: [`linear_backward_input`](Self::linear_backward_input) added to what the input's gradient is
    /// so far, in place where nobody else has that.
    fn linear_backward_input_add(
        dy: Float<Self>,
        weight: Float<Self>,
        so_far: Option<Float<Self>>,
    ) -> Float<Self> {
        linear::portable_backward_input_add::<Self>(dy, weight, so_far)
    }

    /// `dW += dy^T x`, summed in fp32. x: [.., in], dy: [.., out] -> [out, in] in the slot's dtype.
    fn linear_accumulate_weight_grad(
        x: Float<Self>,
        dy: Float<Self>,
        slot: GradSlot<Self>,
    ) -> Float<Self> {
        linear::portable_accumulate_weight_grad::<Self>(x, dy, slot)
    }

    /// `db += sum of the rows of dy` in fp32. dy: [.., out] -> `[out]`.
    fn linear_accumulate_bias_grad(dy: Float<Self>, slot: GradSlot<Self>) -> Float<Self> {
        linear::portable_accumulate_bias_grad::<Self>(dy, slot)
    }

    /// Does `work`, which queues products while the device exchanges data with others: they should leave it the room to do
    /// so. The default just does it.
    fn beside_exchange<T>(work: impl FnOnce() -> T) -> T {
        work()
    }

    /// Rows of `weight`. ids: [..] with values in `0..vocab`, weight: [vocab, h] -> [.., h] in `dtype`.
    fn embedding_forward(ids: Int<Self>, weight: Float<Self>, dtype: DType) -> Float<Self> {
        embedding::portable::<Self>(ids, weight, dtype)
    }

    /// Adds each row of `dy` to the row of the gradient that its id names, summed in fp32. ids: [..], dy: [.., h]
    /// -> [vocab, h] in the slot's dtype.
    fn embedding_accumulate_grad(
        ids: Int<Self>,
        dy: Float<Self>,
        vocab_size: usize,
        slot: GradSlot<Self>,
    ) -> Float<Self> {
        embedding::portable_accumulate_grad::<Self>(ids, dy, vocab_size, slot)
    }

    /// `y = x / sqrt(mean(x^2) + eps) * weight`. x: [.., h], weight: `[h]` -> [.., h].
    fn rms_norm_forward(x: Float<Self>, weight: Float<Self>, spec: NormSpec) -> Float<Self> {
        rms_norm::portable::<Self>(x, weight, spec)
    }

    /// Returns (dx, dweight): dx like x, dweight: `[h]` fp32.
    fn rms_norm_backward(
        x: Float<Self>,
        weight: Float<Self>,
        dy: Float<Self>,
        spec: NormSpec,
    ) -> (Float<Self>, Float<Self>) {
        rms_norm::portable_backward::<Self>(x, weight, dy, spec)
    }

    /// [`rms_norm_backward`](Self::rms_norm_backward) with `so_far`, what the input's gradient is so far, added to dx.
    fn rms_norm_backward_add(
        x: Float<Self>,
        weight: Float<Self>,
        dy: Float<Self>,
        spec: NormSpec,
        so_far: Option<Float<Self>>,
    ) -> (Float<Self>, Float<Self>) {
        rms_norm::portable_backward_add::<Self>(x, weight, dy, spec, so_far)
    }

    /// `y = (x - mean) / sqrt(var + eps) * weight + bias`. x: [.., h], weight, bias: `[h]` -> [.., h].
    fn layer_norm_forward(
        x: Float<Self>,
        weight: Float<Self>,
        bias: Option<Float<Self>>,
        spec: NormSpec,
    ) -> Float<Self> {
        layer_norm::portable::<Self>(x, weight, bias, spec)
    }

    /// Returns (dx, dweight, dbias): dx like x, the others `[h]` fp32.
    fn layer_norm_backward(
        x: Float<Self>,
        weight: Float<Self>,
        dy: Float<Self>,
        spec: NormSpec,
    ) -> (Float<Self>, Float<Self>, Float<Self>) {
        layer_norm::portable_backward::<Self>(x, weight, dy, spec)
    }

    /// Rotates pairs of channels by the angles whose cosine and sine are given. x: [batch, seq, heads, d],
    /// cos, sin: [batch or 1, seq, rotary_dim / 2] -> like x. The gradient is the same in the other direction.
    fn rotary(
        x: Float<Self>,
        cos: Float<Self>,
        sin: Float<Self>,
        style: RotaryStyle,
        direction: RotaryDirection,
    ) -> Float<Self> {
        rotary::portable::<Self>(x, cos, sin, style, direction)
    }

    /// [`rotary`](Self::rotary) of the channels from `start` on; those before it pass through. x: [batch, seq, heads, d].
    fn rotary_tail(
        x: Float<Self>,
        cos: Float<Self>,
        sin: Float<Self>,
        style: RotaryStyle,
        direction: RotaryDirection,
        start: usize,
    ) -> Float<Self> {
        latent_heads::portable_rotary_tail::<Self>(x, cos, sin, style, direction, start)
    }

    /// `k_h = [kv_h up to channel nope, rotated]`. kv: [batch, seq, heads, nope + value], rotated: [batch, seq, 1, r]
    /// -> [batch, seq, heads, nope + r].
    fn latent_keys(kv: Float<Self>, rotated: Float<Self>, nope: usize) -> Float<Self> {
        latent_heads::portable_keys::<Self>(kv, rotated, nope)
    }

    /// Returns (dkv, drotated), like the inputs of [`latent_keys`](Self::latent_keys). dk: like the keys,
    /// dv: [batch, seq, heads, value], the gradient of the channels of kv from `nope` on.
    fn latent_keys_backward(
        dk: Float<Self>,
        dv: Float<Self>,
        nope: usize,
    ) -> (Float<Self>, Float<Self>) {
        latent_heads::portable_keys_backward::<Self>(dk, dv, nope)
    }

    /// Softmax attention. q: [batch, s, heads, d], k: [batch, t, kv_heads, d], v: [batch, t, kv_heads, dv],
    /// sinks: `[heads]` -> output [batch, s, heads, dv] and the log-sum-exp of each row of scores.
    fn attention_forward(
        q: Float<Self>,
        k: Float<Self>,
        v: Float<Self>,
        sinks: Option<Float<Self>>,
        rule: &AttentionRule,
    ) -> AttentionOutput<Self> {
        attention::portable::<Self>(q, k, v, sinks, rule)
    }

    /// Gradients of [`attention_forward`](Self::attention_forward), from its inputs, what it returned, and `dout` like the output.
    fn attention_backward(
        q: Float<Self>,
        k: Float<Self>,
        v: Float<Self>,
        sinks: Option<Float<Self>>,
        output: AttentionOutput<Self>,
        dout: Float<Self>,
        rule: &AttentionRule,
    ) -> AttentionGrads<Self> {
        attention::portable_backward::<Self>(q, k, v, sinks, output, dout, rule)
    }

    /// `y = act(x)`, elementwise.
    fn activation_forward(x: Float<Self>, activation: Activation) -> Float<Self> {
        activation::portable::<Self>(x, activation)
    }

    /// `dx = act'(x) dy`, elementwise.
    fn activation_backward(x: Float<Self>, dy: Float<Self>, activation: Activation) -> Float<Self> {
        activation::portable_backward::<Self>(x, dy, activation)
    }

    /// `y = act(gate) * up`, elementwise.
    fn gated_activation_forward(
        gate: Float<Self>,
        up: Float<Self>,
        activation: Activation,
    ) -> Float<Self> {
        activation::portable_gated::<Self>(gate, up, activation)
    }

    /// Returns (dgate, dup).
    fn gated_activation_backward(
        gate: Float<Self>,
        up: Float<Self>,
        dy: Float<Self>,
        activation: Activation,
    ) -> (Float<Self>, Float<Self>) {
        activation::portable_gated_backward::<Self>(gate, up, dy, activation)
    }

    /// [`gated_activation_backward`](Self::gated_activation_backward) that makes the forward pass's result as well:
    /// (dgate, dup, y).
    fn gated_activation_backward_with_output(
        gate: Float<Self>,
        up: Float<Self>,
        dy: Float<Self>,
        activation: Activation,
    ) -> (Float<Self>, Float<Self>, Float<Self>) {
        activation::portable_gated_backward_with_output::<Self>(gate, up, dy, activation)
    }

    /// `y = glu(min(gate, limit)) * (clamp(up) + 1)`, elementwise; see [`clamped_swiglu`](crate::clamped_swiglu()).
    fn clamped_swiglu_forward(
        gate: Float<Self>,
        up: Float<Self>,
        clamp: SwigluClamp,
    ) -> Float<Self> {
        clamped_swiglu::portable::<Self>(gate, up, clamp)
    }

    /// Returns (dgate, dup).
    fn clamped_swiglu_backward(
        gate: Float<Self>,
        up: Float<Self>,
        dy: Float<Self>,
        clamp: SwigluClamp,
    ) -> (Float<Self>, Float<Self>) {
        clamped_swiglu::portable_backward::<Self>(gate, up, dy, clamp)
    }

    /// Chooses each token's experts. logits: [tokens, E], correction_bias: `[E]` -> weights [tokens, k] fp32 and
    /// experts [tokens, k].
    fn router_forward(
        logits: Float<Self>,
        correction_bias: Option<Float<Self>>,
        spec: &RouterSpec,
    ) -> RouterOutput<Self> {
        router::portable::<Self>(logits, correction_bias, spec)
    }

    /// `dlogits` like the logits, from the experts that were chosen and `dweights` [tokens, k].
    fn router_backward(
        logits: Float<Self>,
        experts: Int<Self>,
        dweights: Float<Self>,
        spec: &RouterSpec,
    ) -> Float<Self> {
        router::portable_backward::<Self>(logits, experts, dweights, spec)
    }

    /// Sorts assignments by expert, stably. experts: [tokens, k]; a value outside `0..num_experts` means none and goes
    /// to the end.
    fn sort_by_expert(experts: Int<Self>, num_experts: usize) -> SortedExperts<Self> {
        permute::portable_sort::<Self>(experts, num_experts)
    }

    /// `rows[i] = x[order[i] / k]`, times `weights[order[i]]` if given. x: [tokens, h], weights: [tokens, k]
    /// -> [tokens * k, h].
    fn permute_rows(
        x: Float<Self>,
        order: &ExpertOrder<Self>,
        weights: Option<Float<Self>>,
    ) -> Float<Self> {
        permute::portable_permute::<Self>(x, order, weights)
    }

    /// `y[t] = sum over s of rows[inverse[t, s]]`, times `weights[t, s]` if given, over the rows before the last of
    /// `offsets`. rows: [n, h], inverse, weights: [tokens, k], offsets: `[E + 1]` -> [tokens, h].
    fn unpermute_rows(
        rows: Float<Self>,
        inverse: Int<Self>,
        weights: Option<Float<Self>>,
        offsets: Int<Self>,
    ) -> Float<Self> {
        permute::portable_unpermute::<Self>(rows, inverse, weights, offsets)
    }

    /// `dweights[t, s] = rows[inverse[t, s]] . dy[t]`, 0 for rows that are not used. rows: [n, h], inverse: [tokens, k],
    /// dy: [tokens, h] -> [tokens, k] fp32.
    fn unpermute_weight_grad(
        rows: Float<Self>,
        inverse: Int<Self>,
        dy: Float<Self>,
        offsets: Int<Self>,
    ) -> Float<Self> {
        permute::portable_weight_grad::<Self>(rows, inverse, dy, offsets)
    }

    /// `y = x W[e]^T + b[e]` for the rows of each expert. x: [n, in], weight: [E, out, in], bias: [E, out] -> [n, out].
    fn grouped_linear_forward(
        x: Float<Self>,
        weight: Float<Self>,
        bias: Option<Float<Self>>,
        offsets: &ExpertOffsets<Self>,
    ) -> Float<Self> {
        grouped_linear::portable::<Self>(x, weight, bias, offsets)
    }

    /// `dx = dy W[e]`. dy: [n, out], weight: [E, out, in] -> [n, in].
    fn grouped_linear_backward_input(
        dy: Float<Self>,
        weight: Float<Self>,
        offsets: &ExpertOffsets<Self>,
    ) -> Float<Self> {
        grouped_linear::portable_backward_input::<Self>(dy, weight, offsets)
    }

    /// `dx = so_far + dy W[e]`: [`grouped_linear_backward_input`](Self::grouped_linear_backward_input) added to what the
    /// input's gradient is so far, in place where nobody else has that.
    fn grouped_linear_backward_input_add(
        dy: Float<Self>,
        weight: Float<Self>,
        offsets: &ExpertOffsets<Self>,
        so_far: Option<Float<Self>>,
    ) -> Float<Self> {
        grouped_linear::portable_backward_input_add::<Self>(dy, weight, offsets, so_far)
    }

    /// `dx = so_far + dy[0] W[0][e] + dy[1] W[1][e]`: [`grouped_linear_backward_input_add`](Self::grouped_linear_backward_input_add)
    /// of two layers of the same rows.
    fn grouped_linear_backward_input_pair(
        dy: [Float<Self>; 2],
        weight: [Float<Self>; 2],
        offsets: &ExpertOffsets<Self>,
        so_far: Option<Float<Self>>,
    ) -> Float<Self> {
        grouped_linear::portable_backward_input_pair::<Self>(dy, weight, offsets, so_far)
    }

    /// `dW[e] += dy^T x`, summed in fp32. x: [n, in], dy: [n, out] -> [E, out, in] in the dtype of the slot.
    fn grouped_linear_accumulate_weight_grad(
        x: Float<Self>,
        dy: Float<Self>,
        offsets: &ExpertOffsets<Self>,
        slot: GradSlot<Self>,
    ) -> Float<Self> {
        grouped_linear::portable_accumulate_weight_grad::<Self>(x, dy, offsets, slot)
    }

    /// `db[e] += sum of the rows of dy` in fp32. dy: [n, out] -> [E, out].
    fn grouped_linear_accumulate_bias_grad(
        dy: Float<Self>,
        offsets: &ExpertOffsets<Self>,
        slot: GradSlot<Self>,
    ) -> Float<Self> {
        grouped_linear::portable_accumulate_bias_grad::<Self>(dy, offsets, slot)
    }

    /// Loss per token from logits. logits: [tokens, vocab], targets: `[tokens]` -> loss and log-sum-exp, both `[tokens]`
    /// fp32.
    fn cross_entropy_forward(
        logits: Float<Self>,
        targets: Int<Self>,
        spec: &CrossEntropySpec,
    ) -> CrossEntropyOutput<Self> {
        cross_entropy::portable::<Self>(logits, targets, spec)
    }

    /// Gradient with respect to the logits. lse, dloss: `[tokens]` fp32 -> [tokens, vocab] in the dtype of the logits.
    fn cross_entropy_backward(
        logits: Float<Self>,
        targets: Int<Self>,
        lse: Float<Self>,
        dloss: Float<Self>,
        spec: &CrossEntropySpec,
    ) -> Float<Self> {
        cross_entropy::portable_backward::<Self>(logits, targets, lse, dloss, spec)
    }

    /// How many tokens' logits to hold at once where there are `tokens` in all: enough for efficient products, which must
    /// also make up for reading and writing the weight's gradient once for each piece.
    fn tokens_per_piece(tokens: usize, vocab: usize, _dtype: DType) -> usize {
        linear_cross_entropy::tokens_per_piece(tokens, vocab)
    }

    /// Loss per token of the logits `x W^T`, which are never held all at once. x: [tokens, h], weight: [vocab, h],
    /// targets: `[tokens]` -> loss and log-sum-exp, both `[tokens]` fp32.
    fn linear_cross_entropy_forward(
        x: Float<Self>,
        weight: Float<Self>,
        targets: Int<Self>,
        spec: &CrossEntropySpec,
    ) -> CrossEntropyOutput<Self> {
        linear_cross_entropy::portable::<Self>(x, weight, targets, spec)
    }

    /// Gradients of [`linear_cross_entropy_forward`](Self::linear_cross_entropy_forward), recomputing the logits in pieces. lse, dloss:
    /// `[tokens]` fp32.
    fn linear_cross_entropy_backward(
        x: Float<Self>,
        weight: Float<Self>,
        targets: Int<Self>,
        lse: Float<Self>,
        dloss: Float<Self>,
        spec: &CrossEntropySpec,
        request: LossGradRequest<Self>,
    ) -> LossGrads<Self> {
        linear_cross_entropy::portable_backward::<Self>(
            x, weight, targets, lse, dloss, spec, request,
        )
    }

    /// [`linear_cross_entropy_forward`](Self::linear_cross_entropy_forward) and its gradients for a `dloss` known beforehand, which
    /// saves computing the logits a second time. dloss: `[tokens]` fp32.
    fn linear_cross_entropy_with_grads(
        x: Float<Self>,
        weight: Float<Self>,
        targets: Int<Self>,
        dloss: Float<Self>,
        spec: &CrossEntropySpec,
        request: LossGradRequest<Self>,
    ) -> (CrossEntropyOutput<Self>, LossGrads<Self>) {
        linear_cross_entropy::portable_with_grads::<Self>(x, weight, targets, dloss, spec, request)
    }

    /// `a + b` of equal shapes and dtypes.
    fn add(a: Float<Self>, b: Float<Self>) -> Float<Self> {
        elementwise::portable_add::<Self>(a, b)
    }

    /// `a - b` of equal shapes and dtypes.
    fn sub(a: Float<Self>, b: Float<Self>) -> Float<Self> {
        elementwise::portable_sub::<Self>(a, b)
    }

    /// `a * b`, elementwise, of equal shapes and dtypes.
    fn mul(a: Float<Self>, b: Float<Self>) -> Float<Self> {
        elementwise::portable_mul::<Self>(a, b)
    }

    /// `factor * x`.
    fn scale(x: Float<Self>, factor: f64) -> Float<Self> {
        elementwise::portable_scale::<Self>(x, factor)
    }

    /// `cap * tanh(x / cap)`.
    fn softcap_forward(x: Float<Self>, cap: f64) -> Float<Self> {
        elementwise::portable_softcap::<Self>(x, cap)
    }

    /// `dx = (1 - tanh(x / cap)^2) dy`.
    fn softcap_backward(x: Float<Self>, dy: Float<Self>, cap: f64) -> Float<Self> {
        elementwise::portable_softcap_backward::<Self>(x, dy, cap)
    }

    /// Converts to another float dtype, rounding to nearest even.
    fn cast(x: Float<Self>, dtype: DType) -> Float<Self> {
        primitive::to_dtype::<Self>(x, dtype)
    }

    /// The part within `ranges` (one per dimension) of a tensor of `shape` whose elements are, in row-major order, the
    /// [normal sequence](crate::random::normal) of `key` with deviation `std`; fp32. A device that draws the numbers
    /// itself may round some differently in the last bit.
    fn normal_region(
        key: u64,
        std: f64,
        shape: &[usize],
        ranges: &[Range<usize>],
        device: &Self::Device,
    ) -> Float<Self> {
        random::portable_normal_region::<Self>(key, std, shape, ranges, device)
    }

    /// The sum of the squares of all elements, `[1]` fp32.
    fn sum_squares(x: Float<Self>) -> Float<Self> {
        reduce::portable_sum_squares::<Self>(x)
    }

    /// One AdamW update; returns (param, m, v), each in its dtype. grad, m, v: like param; m may be narrower than fp32.
    /// In place where a buffer is not shared.
    fn adamw_step(
        param: Float<Self>,
        grad: Float<Self>,
        m: Float<Self>,
        v: Float<Self>,
        step: &AdamWStep,
    ) -> (Float<Self>, Float<Self>, Float<Self>) {
        adamw::portable::<Self>(param, grad, m, v, step)
    }

    /// One AdamW update of many weights, as [`adamw_step`](Self::adamw_step) does one: the fp32 weights and their state,
    /// and the copies that the model computes with. In place where a buffer is not shared.
    fn adamw_step_many(
        tensors: Vec<AdamWTensors<Self>>,
        step: &AdamWStep,
    ) -> Vec<AdamWTensors<Self>> {
        adamw::portable_many::<Self>(tensors, step)
    }

    /// Cuts an fp32 weight into two tensors of 16 bits each: the bf16 number nearest to it (away from zero where two are
    /// equally near), and what its bits lack to those of the weight, as a signed integer under the label of bf16.
    fn split_halves(weight: Float<Self>) -> (Float<Self>, Float<Self>) {
        adamw::portable_split_halves::<Self>(weight)
    }

    /// The fp32 weight that [`split_halves`](Self::split_halves) cut.
    fn join_halves(upper: Float<Self>, lower: Float<Self>) -> Float<Self> {
        adamw::portable_join_halves::<Self>(upper, lower)
    }

    /// Sums of squares, fp32, that add up to that of all elements of all `tensors`; how many there are is the backend's
    /// choice.
    ///
    /// # Panics
    /// When there is no tensor.
    fn sum_squares_many(tensors: Vec<Float<Self>>) -> Float<Self> {
        reduce::portable_sum_squares_many::<Self>(tensors)
    }

    /// Writes `x`: [batch, s, heads, d] over positions `start..start + s` of `cache`: [batch, capacity, heads, d], in
    /// place when the cache is not shared.
    fn cache_write(cache: Float<Self>, x: Float<Self>, start: usize) -> Float<Self> {
        cache::portable_write::<Self>(cache, x, start)
    }

    /// Causal convolution with one filter per channel. x: [batch, seq, channels], weight: [channels, taps], bias:
    /// `[channels]`, history: the tokens before x, [batch, taps - 1, channels], zeros if `None` -> like x.
    fn causal_conv1d_forward(
        x: Float<Self>,
        weight: Float<Self>,
        bias: Option<Float<Self>>,
        history: Option<Float<Self>>,
        spec: &ConvSpec,
    ) -> Float<Self> {
        causal_conv1d::portable::<Self>(x, weight, bias, history, spec)
    }

    /// Gradients of [`causal_conv1d_forward`](Self::causal_conv1d_forward) without a history.
    fn causal_conv1d_backward(
        x: Float<Self>,
        weight: Float<Self>,
        bias: Option<Float<Self>>,
        dy: Float<Self>,
        spec: &ConvSpec,
    ) -> ConvGrads<Self> {
        causal_conv1d::portable_backward::<Self>(x, weight, bias, dy, spec)
    }

    /// `max(softplus(x + bias), min)`. x: [.., heads], bias: `[heads]` -> [.., heads] fp32.
    fn time_step_forward(x: Float<Self>, bias: Float<Self>, min: f64) -> Float<Self> {
        time_step::portable_step::<Self>(x, bias, min)
    }

    /// Returns (dx, dbias): dx like x, dbias: `[heads]` fp32.
    fn time_step_backward(
        x: Float<Self>,
        bias: Float<Self>,
        dy: Float<Self>,
        min: f64,
    ) -> (Float<Self>, Float<Self>) {
        time_step::portable_step_backward::<Self>(x, bias, dy, min)
    }

    /// `-exp(a_log) dt`. dt: [.., heads] fp32, a_log: `[heads]` -> [.., heads] fp32.
    fn log_decay_forward(dt: Float<Self>, a_log: Float<Self>) -> Float<Self> {
        time_step::portable_decay::<Self>(dt, a_log)
    }

    /// Returns (ddt, da_log): ddt like dt, da_log: `[heads]` fp32.
    fn log_decay_backward(
        dt: Float<Self>,
        a_log: Float<Self>,
        dy: Float<Self>,
    ) -> (Float<Self>, Float<Self>) {
        time_step::portable_decay_backward::<Self>(dt, a_log, dy)
    }

    /// The Mamba-2 scan. skip: `[heads]`, state: [batch, heads, head_dim, state] fp32, zeros if `None` -> output like
    /// x, and the state after the last token.
    fn ssd_scan_forward(
        inputs: SsdInputs<Float<Self>>,
        skip: Option<Float<Self>>,
        state: Option<Float<Self>>,
        spec: &ScanSpec,
    ) -> (Float<Self>, Float<Self>) {
        ssd_scan::portable::<Self>(inputs, skip, state, spec)
    }

    /// Gradients of [`ssd_scan_forward`](Self::ssd_scan_forward) from a state of zeros.
    fn ssd_scan_backward(
        inputs: SsdInputs<Float<Self>>,
        skip: Option<Float<Self>>,
        dy: Float<Self>,
        spec: &ScanSpec,
    ) -> SsdGrads<Self> {
        ssd_scan::portable_backward::<Self>(inputs, skip, dy, spec)
    }

    /// The gated delta rule. state: [batch, heads, key_dim, value_dim] fp32, zeros if `None` -> output like v, and the
    /// state after the last token.
    fn gated_delta_rule_forward(
        inputs: DeltaRuleInputs<Float<Self>>,
        state: Option<Float<Self>>,
        scale: f64,
        spec: &ScanSpec,
    ) -> (Float<Self>, Float<Self>) {
        gated_delta_rule::portable::<Self>(inputs, state, scale, spec)
    }

    /// Gradients of [`gated_delta_rule_forward`](Self::gated_delta_rule_forward) from a state of zeros.
    fn gated_delta_rule_backward(
        inputs: DeltaRuleInputs<Float<Self>>,
        dout: Float<Self>,
        scale: f64,
        spec: &ScanSpec,
    ) -> DeltaRuleInputs<Float<Self>> {
        gated_delta_rule::portable_backward::<Self>(inputs, dout, scale, spec)
    }

    /// RMSNorm over groups of channels with SiLU of `gate` as a factor. x, gate: [.., h], weight: `[h]` -> like x.
    fn gated_rms_norm_forward(
        x: Float<Self>,
        gate: Float<Self>,
        weight: Float<Self>,
        spec: GatedNormSpec,
    ) -> Float<Self> {
        gated_rms_norm::portable::<Self>(x, gate, weight, spec)
    }

    /// Gradients of [`gated_rms_norm_forward`](Self::gated_rms_norm_forward).
    fn gated_rms_norm_backward(
        x: Float<Self>,
        gate: Float<Self>,
        weight: Float<Self>,
        dy: Float<Self>,
        spec: GatedNormSpec,
    ) -> GatedNormGrads<Self> {
        gated_rms_norm::portable_backward::<Self>(x, gate, weight, dy, spec)
    }

    /// `x / sqrt(sum(x^2) + eps)` over the last dimension. x: [.., h] -> like x.
    fn l2_norm_forward(x: Float<Self>, eps: f64) -> Float<Self> {
        l2_norm::portable::<Self>(x, eps)
    }

    /// Returns dx, like x.
    fn l2_norm_backward(x: Float<Self>, dy: Float<Self>, eps: f64) -> Float<Self> {
        l2_norm::portable_backward::<Self>(x, dy, eps)
    }
}
