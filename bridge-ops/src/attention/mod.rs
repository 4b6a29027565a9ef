//! Softmax attention, with everything a decoder needs said in a spec instead of a mask tensor.
//!
//! ```text
//! s[i, j] = scale q_i . k_j                    or cap tanh(that / cap) with a softcap
//! p[i, .] = softmax over the visible j of s[i, j], and the head's sink if there is one
//! out_i   = sum over j of p[i, j] v_j
//! ```
//!
//! Query `i` has position `q_offset + i` among the keys. Which keys it sees is the [`AttentionRule`]'s matter. Query
//! heads share key-value heads in equal groups of neighbours (grouped-query attention, Ainslie et al. 2023). A sink is
//! a learned logit per head that takes part in the softmax and has no value (gpt-oss).
//!
//! Backward, with `D_i = dout_i . out_i` (Dao 2023, "FlashAttention-2", section 3):
//!
//! ```text
//! dv_j = sum over i of p[i, j] dout_i
//! ds[i, j] = p[i, j] (dout_i . v_j - D_i)      times 1 - (s / cap)^2 with a softcap
//! dq_i = scale sum over j of ds[i, j] k_j,     dk_j = scale sum over i of ds[i, j] q_i
//! dsink = - sum over i of p[i, sink] D_i
//! ```

mod portable;
mod spec;

#[cfg(test)]
mod tests;

pub(crate) use portable::{portable, portable_backward};
pub(crate) use spec::AttentionDims;
pub use spec::{AttentionRule, AttentionSpec};

use crate::ops::Ops;
use crate::primitive::Float;
use crate::tape::{Tape, Var};

/// What the forward kernel returns.
#[derive(Debug, Clone)]
pub struct AttentionOutput<B: Ops> {
    /// [batch, s, heads, dv].
    pub output: Float<B>,
    /// [batch, heads, s] fp32: log-sum-exp of each row of scores, the sink included.
    pub lse: Float<B>,
}

/// What the backward kernel returns.
#[derive(Debug, Clone)]
pub struct AttentionGrads<B: Ops> {
    /// Like q.
    pub dq: Float<B>,
    /// Like k.
    pub dk: Float<B>,
    /// Like v.
    pub dv: Float<B>,
    /// `[heads]` fp32, when there are sinks.
    pub dsinks: Option<Float<B>>,
}

/// Attention. q: [batch, s, heads, d], k: [batch, t, kv_heads, d], v: [batch, t, kv_heads, dv]
/// -> [batch, s, heads, dv].
///
/// # Panics
/// When shapes and spec do not fit each other.
#[track_caller]
pub fn attention<B: Ops>(
    tape: &Tape<B>,
    q: &Var<B>,
    k: &Var<B>,
    v: &Var<B>,
    spec: &AttentionSpec<B>,
) -> Var<B> {
    let rule = spec.rule.clone();
    let dims = AttentionDims::check(&q.shape(), &k.shape(), &v.shape(), &rule);
    let sinks = spec.sinks.clone();
    if let Some(sinks) = &sinks {
        let shape = sinks.shape();
        assert_eq!(
            shape,
            [dims.heads],
            "attention: sinks `{}` have shape {shape:?}",
            sinks.name()
        );
    }
    let result = B::attention_forward(
        q.value(),
        k.value(),
        v.value(),
        spec.sinks.as_ref().map(|s| s.value()),
        &rule,
    );

    let output = result.output.clone();
    let params: Vec<_> = spec.sinks.iter().collect();
    let (q_value, k_value, v_value) = (q.value(), k.value(), v.value());
    tape.record_with_params(output, &[q, k, v], &params, move |dout| {
        let sink_values = sinks.as_ref().map(|s| s.value());
        let grads =
            B::attention_backward(q_value, k_value, v_value, sink_values, result, dout, &rule);
        if let (Some(sinks), Some(dsinks)) = (sinks.filter(|s| s.requires_grad()), grads.dsinks) {
            sinks.accumulate_grad(dsinks);
        }
        vec![Some(grads.dq), Some(grads.dk), Some(grads.dv)]
    })
}
