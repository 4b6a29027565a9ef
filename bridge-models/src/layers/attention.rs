//! Softmax attention with everything that dense decoders vary: grouped heads, biases, normalised queries and keys,
//! partial rotary embeddings, windows, soft caps and caches.

use bridge_core::DecoderConfig;
use bridge_core::config::{AttentionLayer, LayerRope, QkNorm, RopeConfig, RopeStyle};
use bridge_ops::{
    Activation, AttentionSpec, Ops, Param, Tape, Var, attention, gated_activation, reshape, rotary,
};
use bridge_parallel::{ContextParallel, TensorRegion, context_attention};

use super::{Linear, Norm};
use crate::context::ForwardContext;
use crate::error::Result;
use crate::weights::ParamBuilder;

/// The attention of one layer.
///
/// Query heads are in groups of `heads / kv_heads`, each of which shares a key and a value head (GQA; one group is
/// MHA, one key-value head MQA).
#[derive(Debug, Clone)]
pub struct Attention<B: Ops> {
    layer: usize,
    q_proj: Linear<B>,
    k_proj: Linear<B>,
    v_proj: Linear<B>,
    /// Scales the output, element by element, by its sigmoid.
    gate_proj: Option<Linear<B>>,
    o_proj: Linear<B>,
    qk_norm: Option<QkNorm>,
    q_norm: Option<Norm<B>>,
    k_norm: Option<Norm<B>>,
    rope: Option<Rope>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scale: f64,
    window: Option<usize>,
    softcap: Option<f64>,
    /// `[heads]`: logits that take part in the softmax and have no value.
    sinks: Option<Param<B>>,
    region: TensorRegion<B>,
    context_parallel: ContextParallel<B>,
}

#[derive(Debug, Clone)]
struct Rope {
    config: RopeConfig,
    rotary_dim: usize,
    style: RopeStyle,
}

impl<B: Ops> Attention<B> {
    /// The attention of layer `layer`, called `name`.
    ///
    /// # Errors
    /// If the weights' source fails.
    pub fn build(
        params: &mut ParamBuilder<'_, B>,
        name: &str,
        config: &DecoderConfig,
        layer: usize,
        own: &AttentionLayer,
    ) -> Result<Self> {
        let kv_heads = own
            .num_key_value_heads
            .unwrap_or(config.num_key_value_heads);
        let (hidden, query, key_value) = (
            config.hidden_size,
            config.query_size(),
            kv_heads * config.head_dim,
        );
        let mut project = |proj: &str, shape, bias| {
            Linear::build(params, &format!("{name}.{proj}_proj"), shape, bias)
        };
        let q_proj = project("q", [query, hidden], config.attention_bias)?;
        let k_proj = project("k", [key_value, hidden], config.attention_bias)?;
        let v_proj = project("v", [key_value, hidden], config.attention_bias)?;
        let gate_proj = if config.attention_output_gate {
            Some(project("gate", [query, hidden], config.attention_bias)?)
        } else {
            None
        };
        let mut norm = |head: &str, full: usize| {
            let size = match config.qk_norm {
                None => return Ok(None),
                Some(QkNorm::PerHead) => config.head_dim,
                Some(QkNorm::FullWidth) => full,
            };
            let norm = bridge_core::config::NormConfig {
                bias: false,
                ..config.norm
            };
            // Shared by all heads, of which each rank has its own.
            let mut params = params.inside();
            Norm::build(&mut params, &format!("{name}.{head}_norm"), size, &norm).map(Some)
        };
        let (q_norm, k_norm) = (norm("q", query)?, norm("k", key_value)?);
        let o_proj = Linear::build(
            params,
            &format!("{name}.o_proj"),
            [hidden, query],
            config.attention_output_bias,
        )?;
        let sinks = if config.attention_sinks {
            Some(params.param(&format!("{name}.sinks"), &[config.num_attention_heads])?)
        } else {
            None
        };
        let rope = match own.rope {
            LayerRope::Global => config.rope.clone(),
            LayerRope::Local => config.rope_local.clone(),
            LayerRope::None => None,
        };
        Ok(Self {
            layer,
            // As many as this rank has of each.
            heads: q_proj.weight.shape()[0] / config.head_dim,
            kv_heads: k_proj.weight.shape()[0] / config.head_dim,
            region: params.region(),
            context_parallel: params.context_parallel(),
            q_proj,
            k_proj,
            v_proj,
            gate_proj,
            o_proj,
            qk_norm: config.qk_norm,
            q_norm,
            k_norm,
            rope: rope.map(|rope| Rope {
                config: rope,
                rotary_dim: config.rotary_dim(),
                style: config.rope_style,
            }),
            head_dim: config.head_dim,
            scale: config.attention_scale(),
            window: own.window,
            softcap: config.attention_softcap,
            sinks,
        })
    }

    /// `x`: `[batch, seq, hidden]` -> the same shape.
    pub fn forward(&self, tape: &Tape<B>, x: &Var<B>, ctx: &ForwardContext<'_, B>) -> Var<B> {
        let x = &self.region.enter(tape, x);
        let (batch, seq) = (ctx.batch(), ctx.seq());
        let q = self.heads_of(
            tape,
            self.q_proj.forward(tape, x),
            self.q_norm.as_ref(),
            [batch, seq, self.heads],
        );
        let k = self.heads_of(
            tape,
            self.k_proj.forward(tape, x),
            self.k_norm.as_ref(),
            [batch, seq, self.kv_heads],
        );
        let v = reshape(
            tape,
            &self.v_proj.forward(tape, x),
            &[batch, seq, self.kv_heads, self.head_dim],
        );

        let (q, k) = match &self.rope {
            Some(rope) => {
                let table = ctx.rotary_table(&rope.config, rope.rotary_dim, rope.style);
                (rotary(tape, &q, &table), rotary(tape, &k, &table))
            }
            None => (q, k),
        };

        let spec = AttentionSpec::causal()
            .with_scale(self.scale)
            .with_window(self.window)
            .with_softcap(self.softcap)
            .with_sinks(self.sinks.clone())
            .with_cu_seqlens(ctx.cu_seqlens().cloned());
        let output = match ctx.cache() {
            None => context_attention(tape, &q, &k, &v, &spec, &self.context_parallel),
            Some(cache) => {
                let mut own = cache.layer(self.layer);
                let offset = own.len();
                let (k, v) = own.append(tape, k, v, cache.capacity());
                attention(
                    tape,
                    &q,
                    &k,
                    &v,
                    &spec.with_q_offset(offset).with_kv_len(own.len()),
                )
            }
        }; // [batch, seq, heads, head_dim]
        let output = reshape(tape, &output, &[batch, seq, self.heads * self.head_dim]);
        let output = match &self.gate_proj {
            Some(gate_proj) => gated_activation(
                tape,
                &gate_proj.forward(tape, x),
                &output,
                Activation::Sigmoid,
            ),
            None => output,
        };
        self.o_proj.forward(tape, &output)
    }

    /// Cuts a projection `[batch, seq, heads * head_dim]` into heads and normalises it, in the order that the kind of
    /// norm asks for.
    fn heads_of(
        &self,
        tape: &Tape<B>,
        x: Var<B>,
        norm: Option<&Norm<B>>,
        [batch, seq, heads]: [usize; 3],
    ) -> Var<B> {
        let shape = [batch, seq, heads, self.head_dim];
        match (norm, self.qk_norm) {
            (Some(norm), Some(QkNorm::FullWidth)) => reshape(tape, &norm.forward(tape, &x), &shape),
            (Some(norm), _) => norm.forward(tape, &reshape(tape, &x, &shape)),
            (None, _) => reshape(tape, &x, &shape),
        }
    }

    /// Hands each linear layer to `visit`, in the order of their canonical names.
    pub fn visit_linears(&mut self, visit: &mut dyn FnMut(&mut Linear<B>)) {
        let gate_proj = self.gate_proj.iter_mut();
        let projections = [&mut self.q_proj, &mut self.k_proj, &mut self.v_proj].into_iter();
        for linear in projections.chain(gate_proj).chain([&mut self.o_proj]) {
            visit(linear);
        }
    }

    /// Appends the weights, in the order of their canonical names.
    pub fn collect(&self, params: &mut Vec<Param<B>>) {
        for proj in [&self.q_proj, &self.k_proj, &self.v_proj] {
            proj.collect(params);
        }
        if let Some(gate_proj) = &self.gate_proj {
            gate_proj.collect(params);
        }
        for norm in [&self.q_norm, &self.k_norm].into_iter().flatten() {
            norm.collect(params);
        }
        params.extend(self.sinks.clone());
        self.o_proj.collect(params);
    }
}
