//! Attention in plain Burn operations: the whole score matrix at once. The reference for the kernels.

use burn::tensor::{Bool, Tensor, TensorData};
use burn_backend::TensorMetadata;

use super::{AttentionDims, AttentionGrads, AttentionOutput, AttentionRule};
use crate::ops::Ops;
use crate::primitive::{Float, dims, float, reshaped, tensor, to_dtype, to_f32};

/// Score of a key that is not seen. The exponential of its difference to a real score is 0, and unlike an infinity it
/// makes no NaN.
const MASKED: f32 = -1e30;

pub(crate) fn portable<B: Ops>(
    q: Float<B>,
    k: Float<B>,
    v: Float<B>,
    sinks: Option<Float<B>>,
    rule: &AttentionRule,
) -> AttentionOutput<B> {
    let dtype = q.dtype();
    let operands = Operands::<B>::new(q, k, v, rule);
    let (scores, _) = operands.scores(rule);
    let sinks = sinks.map(|sinks| operands.broadcast_sinks(sinks));

    let mut max = scores.clone().max_dim(3); // [batch, heads, s, 1]
    if let Some(sinks) = &sinks {
        max = max.max_pair(sinks.clone());
    }
    // A query that sees no key has weights of 0, not equal ones.
    let max = max.clamp_min(MASKED / 10.0);
    let weights = (scores - max.clone()).exp();
    let mut total = weights.clone().sum_dim(3);
    if let Some(sinks) = sinks {
        total = total + (sinks - max.clone()).exp();
    }
    let output = (weights / total.clone().clamp_min(f32::MIN_POSITIVE))
        .matmul(operands.v)
        .swap_dims(1, 2);
    let lse = (total.log() + max).squeeze_dim::<3>(3);
    AttentionOutput {
        output: to_dtype::<B>(float(output), dtype),
        lse: float(lse),
    }
}

pub(crate) fn portable_backward<B: Ops>(
    q: Float<B>,
    k: Float<B>,
    v: Float<B>,
    sinks: Option<Float<B>>,
    output: AttentionOutput<B>,
    dout: Float<B>,
    rule: &AttentionRule,
) -> AttentionGrads<B> {
    let (q_dtype, k_dtype, v_dtype) = (q.dtype(), k.dtype(), v.dtype());
    let operands = Operands::<B>::new(q, k, v, rule);
    let scale = rule.scale_for(operands.dims.d);
    let (scores, slope) = operands.scores(rule);
    let lse = tensor::<B, 3>(output.lse).clamp_min(MASKED / 10.0);
    let lse = lse.unsqueeze_dim::<4>(3); // [batch, heads, s, 1]
    let out = heads_first::<B>(output.output);
    let dout = heads_first::<B>(dout);

    let p = (scores - lse.clone()).exp(); // [batch, heads, s, t]
    let row_dot = (dout.clone() * out).sum_dim(3); // D: [batch, heads, s, 1]
    let dsinks = sinks.map(|sinks| {
        let p_sink = (operands.broadcast_sinks(sinks) - lse).exp();
        let dsinks = (p_sink * row_dot.clone()).neg().sum_dim(2).sum_dim(0);
        reshaped::<B>(float(dsinks), &[operands.dims.heads])
    });

    let dv = p.clone().swap_dims(2, 3).matmul(dout.clone());
    let dp = dout.matmul(operands.v.clone().swap_dims(2, 3));
    let mut ds = p * (dp - row_dot);
    if let Some(slope) = slope {
        ds = ds * slope;
    }
    let ds = ds.mul_scalar(scale);
    let dq = ds.clone().matmul(operands.k.clone());
    let dk = ds.swap_dims(2, 3).matmul(operands.q.clone());

    AttentionGrads {
        dq: to_dtype::<B>(float(dq.swap_dims(1, 2)), q_dtype),
        dk: to_dtype::<B>(operands.sum_group(dk), k_dtype),
        dv: to_dtype::<B>(operands.sum_group(dv), v_dtype),
        dsinks,
    }
}

/// The inputs in fp32 with the head dimension second, keys and values repeated for the query heads that share them.
struct Operands<B: Ops> {
    dims: AttentionDims,
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
}

impl<B: Ops> Operands<B> {
    fn new(q: Float<B>, k: Float<B>, v: Float<B>, rule: &AttentionRule) -> Self {
        let dims = AttentionDims::check(&dims(&q), &dims(&k), &dims(&v), rule);
        let repeated = |x: Float<B>| {
            let x = heads_first::<B>(x); // [batch, kv_heads, t, d]
            let [batch, kv_heads, t, d] = x.dims();
            let group = dims.group();
            x.unsqueeze_dim::<5>(2)
                .expand([batch, kv_heads, group, t, d])
                .reshape([batch, dims.heads, t, d])
        };
        Self {
            dims,
            q: heads_first::<B>(q),
            k: repeated(k),
            v: repeated(v),
        }
    }

    /// Scores [batch, heads, s, t], masked; and their slope with respect to the uncapped scores if there is a softcap.
    fn scores(&self, rule: &AttentionRule) -> (Tensor<B, 4>, Option<Tensor<B, 4>>) {
        let scale = rule.scale_for(self.dims.d);
        let mut scores = self
            .q
            .clone()
            .matmul(self.k.clone().swap_dims(2, 3))
            .mul_scalar(scale);
        let mut slope = None;
        if let Some(cap) = rule.softcap {
            let tanh = scores.div_scalar(cap).tanh();
            slope = Some(tanh.clone().square().neg().add_scalar(1.0));
            scores = tanh.mul_scalar(cap);
        }
        let hidden = self.hidden_keys(rule).expand(scores.dims());
        (scores.mask_fill(hidden, MASKED), slope)
    }

    /// True where a query does not see a key: [batch or 1, 1, s, t].
    fn hidden_keys(&self, rule: &AttentionRule) -> Tensor<B, 4, Bool> {
        let AttentionDims { s, t, kv_len, .. } = self.dims;
        let batch = if rule.cu_seqlens.is_some() {
            self.dims.batch
        } else {
            1
        };
        let mut hidden = vec![true; batch * s * t];
        for (row, hidden) in hidden.chunks_exact_mut(t.max(1)).enumerate() {
            hidden[rule.visible(row / s, row % s, s, kv_len)].fill(false);
        }
        let device = self.q.device();
        Tensor::<B, 4, Bool>::from_data(TensorData::new(hidden, [batch, 1, s, t]), &device)
    }

    /// `[heads]` -> fp32 [batch, heads, s, 1].
    fn broadcast_sinks(&self, sinks: Float<B>) -> Tensor<B, 4> {
        let AttentionDims {
            batch, s, heads, ..
        } = self.dims;
        tensor::<B, 1>(to_f32::<B>(sinks))
            .reshape([1, heads, 1, 1])
            .expand([batch, heads, s, 1])
    }

    /// Adds up the gradients of the query heads that share a key-value head, and puts the head dimension back.
    fn sum_group(&self, grad: Tensor<B, 4>) -> Float<B> {
        let [batch, _, t, d] = grad.dims();
        let grad = grad
            .reshape([batch, self.dims.kv_heads, self.dims.group(), t, d])
            .sum_dim(2);
        float(grad.squeeze_dim::<4>(2).swap_dims(1, 2))
    }
}

/// [batch, seq, heads, d] -> fp32 [batch, heads, seq, d].
fn heads_first<B: Ops>(x: Float<B>) -> Tensor<B, 4> {
    tensor::<B, 4>(to_f32::<B>(x)).swap_dims(1, 2)
}
