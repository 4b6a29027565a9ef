//! The gated delta net (Yang, Kautz and Hatamizadeh 2024), as Qwen3-Next has it.
//!
//! ```text
//! q, k, v, z, b, a = projections of the input         q, k, v go through a short convolution and SiLU
//! o = delta_rule(q / |q|, k / |k|, v, -exp(a_log) softplus(a + dt_bias), sigmoid(b))
//! output = out_proj(norm(o) silu(z))                  the norm works within each head
//! ```

use bridge_core::DecoderConfig;
use bridge_core::config::GatedDeltaNetConfig;
use bridge_ops::{
    Activation, DeltaRuleInputs, GatedNormSpec, Ops, Param, ScanSpec, Tape, Var, activation,
    gated_delta_rule, gated_delta_rule_with_state, gated_rms_norm, l2_norm, log_decay, reshape,
    time_step,
};
use bridge_parallel::{ContextParallel, TensorRegion, rows_of_params};

use super::mamba2::{groups_of, groups_only};
use super::{Linear, ShortConv};
use crate::context::ForwardContext;
use crate::error::Result;
use crate::weights::ParamBuilder;

/// Tokens per chunk of the delta rule, which no config file says. Changes speed and rounding only.
const CHUNK_SIZE: usize = 64;
/// Added to the squared length of queries and keys.
const LENGTH_EPS: f64 = 1e-6;

/// The gated delta net of one layer.
#[derive(Debug, Clone)]
pub struct GatedDeltaNet<B: Ops> {
    layer: usize,
    config: GatedDeltaNetConfig,
    norm_eps: f64,
    q_proj: Linear<B>,
    k_proj: Linear<B>,
    v_proj: Linear<B>,
    z_proj: Linear<B>,
    b_proj: Linear<B>,
    a_proj: Linear<B>,
    q_conv: ShortConv<B>,
    k_conv: ShortConv<B>,
    v_conv: ShortConv<B>,
    /// `[value_heads]`.
    dt_bias: Param<B>,
    /// `[value_heads]`: logarithm of the rate of decay.
    a_log: Param<B>,
    /// `[value_head_dim]`, shared by all heads. Scales by itself whatever the config says of other norms.
    gated_norm: Param<B>,
    out_proj: Linear<B>,
    /// As many as this rank has.
    key_heads: usize,
    value_heads: usize,
    region: TensorRegion<B>,
    context_parallel: ContextParallel<B>,
}

impl<B: Ops> GatedDeltaNet<B> {
    /// The mixer of layer `layer`, called `name`.
    ///
    /// # Errors
    /// If the weights' source fails.
    pub fn build(
        params: &mut ParamBuilder<'_, B>,
        name: &str,
        config: &DecoderConfig,
        layer: usize,
        own: &GatedDeltaNetConfig,
    ) -> Result<Self> {
        let (hidden, heads) = (config.hidden_size, own.num_value_heads);
        let (key, value) = (own.key_size(), own.value_size());
        let mut project = |part: &str, rows: usize| {
            Linear::build(
                params,
                &format!("{name}.{part}_proj"),
                [rows, hidden],
                false,
            )
        };
        let q_proj = project("q", key)?;
        let k_proj = project("k", key)?;
        let v_proj = project("v", value)?;
        let z_proj = project("z", value)?;
        let b_proj = project("b", heads)?;
        let a_proj = project("a", heads)?;
        let mut conv = |part: &str, channels: usize| {
            let shape = [channels, own.conv_kernel];
            ShortConv::build(params, &format!("{name}.{part}_conv"), shape, false)
        };
        let (q_conv, k_conv, v_conv) = (conv("q", key)?, conv("k", key)?, conv("v", value)?);
        let mut vector = |leaf: &str, size: usize| params.param(&format!("{name}.{leaf}"), &[size]);
        let (dt_bias, a_log) = (vector("dt_bias", heads)?, vector("a_log", heads)?);
        let gated_norm = {
            // Shared by all heads, of which each rank has its own.
            let name = format!("{name}.gated_norm.weight");
            params.inside().param(&name, &[own.value_head_dim])?
        };
        let out_proj = Linear::build(params, &format!("{name}.out_proj"), [hidden, value], false)?;
        Ok(Self {
            layer,
            key_heads: k_proj.weight.shape()[0] / own.key_head_dim,
            value_heads: a_log.numel(),
            region: params.region(),
            context_parallel: params.context_parallel(),
            config: own.clone(),
            norm_eps: config.norm.eps,
            q_proj,
            k_proj,
            v_proj,
            z_proj,
            b_proj,
            a_proj,
            q_conv,
            k_conv,
            v_conv,
            dt_bias,
            a_log,
            gated_norm,
            out_proj,
        })
    }

    /// `x`: `[batch, seq, hidden]` -> the same shape.
    pub fn forward(&self, tape: &Tape<B>, x: &Var<B>, ctx: &ForwardContext<'_, B>) -> Var<B> {
        let x = &self.region.enter(tape, x);
        let (batch, own, cp) = (ctx.batch(), &self.config, &self.context_parallel);
        // Of a sequence in parts each rank runs some of the heads over all of it.
        let heads = cp.own_heads(self.value_heads);
        let key_heads = groups_of(&heads, self.value_heads / self.key_heads);
        let mut past = ctx.cache().map(|cache| cache.recurrent(self.layer));

        let mut keys = |index: usize, proj: &Linear<B>, conv: &ShortConv<B>| {
            // They may be fewer than ranks: all of them go everywhere.
            let projected = cp.whole_sequence(tape, &proj.forward(tape, x));
            let history = past.as_mut().map(|past| &mut past.histories[index]);
            let convolved = conv.forward(tape, &projected, history, ctx);
            let seq = convolved.shape()[1];
            let by_head = [batch, seq, self.key_heads, own.key_head_dim];
            let by_head = reshape(tape, &convolved, &by_head);
            l2_norm(tape, &groups_only(tape, &by_head, &key_heads), LENGTH_EPS)
        };
        let q = keys(0, &self.q_proj, &self.q_conv);
        let k = keys(1, &self.k_proj, &self.k_conv);
        let v = cp.to_own_heads(tape, &self.v_proj.forward(tape, x), self.value_heads);
        let channels = heads.start * own.value_head_dim..heads.end * own.value_head_dim;
        let (v, conv) = self.v_conv.of_channels(tape, &v, channels);
        let history = past.as_mut().map(|past| &mut past.histories[2]);
        let v = conv.forward(tape, &v, history, ctx);

        let a = cp.to_own_heads(tape, &self.a_proj.forward(tape, x), self.value_heads);
        let b = cp.to_own_heads(tape, &self.b_proj.forward(tape, x), self.value_heads);
        let of_heads = [&self.dt_bias, &self.a_log].map(|param| (param, heads.clone()));
        let (a, parts) = rows_of_params(tape, &a, &of_heads);
        let [dt_bias, a_log] = &parts[..] else {
            unreachable!("two weights were given");
        };
        let dt = time_step(tape, &a, dt_bias, 0.0);
        let seq = dt.shape()[1];
        let inputs = DeltaRuleInputs {
            q,
            k,
            v: reshape(tape, &v, &[batch, seq, heads.len(), own.value_head_dim]),
            log_decay: log_decay(tape, &dt, a_log),
            beta: activation(tape, &b, Activation::Sigmoid),
        };
        let scale = (own.key_head_dim as f64).sqrt().recip();
        let spec = ScanSpec::new(CHUNK_SIZE).with_documents(ctx.cu_seqlens().cloned());
        let o = match past {
            None => gated_delta_rule(tape, &inputs, scale, &spec),
            Some(mut past) => {
                let state = past.state.take();
                let (o, next) = gated_delta_rule_with_state(tape, &inputs, state, scale, &spec);
                past.advance(next, seq);
                o
            }
        }; // [batch, seq, own heads, value_head_dim]
        let o = reshape(tape, &o, &[batch, seq, heads.len() * own.value_head_dim]);
        let o = cp.to_own_tokens(tape, &o, self.value_heads);
        let values = [batch, ctx.seq(), self.value_heads, own.value_head_dim];
        let o = reshape(tape, &o, &values);
        let z = reshape(tape, &self.z_proj.forward(tape, x), &values);
        let norm = GatedNormSpec {
            eps: self.norm_eps,
            group_size: own.value_head_dim,
            gate_first: false,
        };
        let o = gated_rms_norm(tape, &o, &z, &self.gated_norm, norm);
        let o = reshape(
            tape,
            &o,
            &[batch, ctx.seq(), self.value_heads * own.value_head_dim],
        );
        self.out_proj.forward(tape, &o)
    }

    /// Hands each linear layer to `visit`, in the order of their canonical names.
    pub fn visit_linears(&mut self, visit: &mut dyn FnMut(&mut Linear<B>)) {
        for linear in [
            &mut self.q_proj,
            &mut self.k_proj,
            &mut self.v_proj,
            &mut self.z_proj,
            &mut self.b_proj,
            &mut self.a_proj,
            &mut self.out_proj,
        ] {
            visit(linear);
        }
    }

    /// Appends the weights, in the order of their canonical names.
    pub fn collect(&self, params: &mut Vec<Param<B>>) {
        for proj in [
            &self.q_proj,
            &self.k_proj,
            &self.v_proj,
            &self.z_proj,
            &self.b_proj,
            &self.a_proj,
        ] {
            proj.collect(params);
        }
        for conv in [&self.q_conv, &self.k_conv, &self.v_conv] {
            conv.collect(params);
        }
        for vector in [&self.dt_bias, &self.a_log, &self.gated_norm] {
            params.push(vector.clone());
        }
        self.out_proj.collect(params);
    }
}
