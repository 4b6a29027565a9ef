//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).
//!
//! ```text
//! c = norm(x W_kva)[.., latent]        r = rotate(x W_kva)[.., rope]           one of each per token, for all heads
//! k_h = [W_kb_h c, r]                  v_h = W_vb_h c
//! q_h = [q_nope_h, rotate(q_rope_h)]   from x, or from a normalised latent of its own
//! ```
//!
//! A cache holds c and r alone. Decoding never makes keys and values from them: `q . W_kb c = (W_kb^T q) . c`, so the
//! heads' queries are taken to the latent space, attend there as many query heads over one key-value head, and what they
//! gather is taken to values at the end.

use bridge_core::DecoderConfig;
use bridge_core::config::{
    AttentionLayer, LayerRope, MlaConfig, NormConfig, NormKind, RopeConfig, RopeStyle,
};
use bridge_ops::{
    AttentionSpec, Ops, Param, Tape, Var, attention, cast, concat, latent_heads, matmul, reshape,
    rotary, rotary_tail, slice, transpose,
};
use bridge_parallel::{ContextParallel, TensorRegion, context_attention};

use super::{Linear, Norm};
use crate::context::ForwardContext;
use crate::error::Result;
use crate::weights::ParamBuilder;

/// The latent attention of one layer.
#[derive(Debug, Clone)]
pub struct LatentAttention<B: Ops> {
    layer: usize,
    query: Query<B>,
    kv_a_proj: Linear<B>,
    kv_a_norm: Norm<B>,
    kv_b_proj: Linear<B>,
    o_proj: Linear<B>,
    sizes: MlaConfig,
    heads: usize,
    rope: Option<(RopeConfig, RopeStyle)>,
    scale: f64,
    window: Option<usize>,
    softcap: Option<f64>,
    region: TensorRegion<B>,
    context_parallel: ContextParallel<B>,
}

/// Where queries come from.
#[derive(Debug, Clone)]
enum Query<B: Ops> {
    Hidden(Linear<B>),
    Latent {
        a_proj: Linear<B>,
        a_norm: Norm<B>,
        b_proj: Linear<B>,
    },
}

impl<B: Ops> LatentAttention<B> {
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
        mla: &MlaConfig,
    ) -> Result<Self> {
        let (hidden, heads, rank) = (
            config.hidden_size,
            config.num_attention_heads,
            mla.kv_lora_rank,
        );
        let norm = NormConfig {
            kind: NormKind::RmsNorm,
            eps: mla.norm_eps,
            unit_offset: false,
            bias: false,
        };
        let part = |part: &str| format!("{name}.{part}");
        let bias = config.attention_bias;
        let query = match mla.q_lora_rank {
            None => {
                let shape = [config.query_size(), hidden];
                Query::Hidden(Linear::build(params, &part("q_proj"), shape, false)?)
            }
            Some(rank) => Query::Latent {
                a_proj: {
                    let shape = [rank, hidden];
                    Linear::build(&mut params.inside(), &part("q_a_proj"), shape, bias)?
                },
                a_norm: Norm::build(&mut params.inside(), &part("q_a_norm"), rank, &norm)?,
                b_proj: Linear::build(
                    params,
                    &part("q_b_proj"),
                    [config.query_size(), rank],
                    false,
                )?,
            },
        };
        let kv_a = [rank + mla.qk_rope_head_dim, hidden];
        let kv_b = [heads * (mla.qk_nope_head_dim + mla.v_head_dim), rank];
        let rope = match own.rope {
            LayerRope::Global => config.rope.clone(),
            LayerRope::Local => config.rope_local.clone(),
            LayerRope::None => None,
        };
        // What leads to the latent is whole on every rank, each of which uses it for its own heads.
        let inside = &mut params.inside();
        let kv_a_proj = Linear::build(inside, &part("kv_a_proj"), kv_a, bias)?;
        let kv_a_norm = Norm::build(inside, &part("kv_a_norm"), rank, &norm)?;
        let kv_b_proj = Linear::build(params, &part("kv_b_proj"), kv_b, false)?;
        Ok(Self {
            layer,
            query,
            kv_a_proj,
            kv_a_norm,
            heads: kv_b_proj.weight.shape()[0] / (mla.qk_nope_head_dim + mla.v_head_dim),
            kv_b_proj,
            o_proj: Linear::build(
                params,
                &part("o_proj"),
                [hidden, heads * mla.v_head_dim],
                config.attention_output_bias,
            )?,
            sizes: mla.clone(),
            region: params.region(),
            context_parallel: params.context_parallel(),
            rope: rope.map(|rope| (rope, config.rope_style)),
            scale: config.attention_scale(),
            window: own.window,
            softcap: config.attention_softcap,
        })
    }

    /// `x`: `[batch, seq, hidden]` -> the same shape.
    pub fn forward(&self, tape: &Tape<B>, x: &Var<B>, ctx: &ForwardContext<'_, B>) -> Var<B> {
        let x = &self.region.enter(tape, x);
        let (batch, seq, heads) = (ctx.batch(), ctx.seq(), self.heads);
        let MlaConfig {
            kv_lora_rank: rank,
            qk_nope_head_dim: nope,
            qk_rope_head_dim: rotated,
            v_head_dim: value,
            ..
        } = self.sizes;
        let q = match &self.query {
            Query::Hidden(proj) => proj.forward(tape, x),
            Query::Latent {
                a_proj,
                a_norm,
                b_proj,
            } => b_proj.forward(tape, &a_norm.forward(tape, &a_proj.forward(tape, x))),
        };
        let q = reshape(tape, &q, &[batch, seq, heads, nope + rotated]);
        let q = match &self.rope {
            Some((rope, style)) => {
                let table = ctx.rotary_table(rope, rotated, *style);
                rotary_tail(tape, &q, &table, nope)
            }
            None => q,
        };

        let kv = self.kv_a_proj.forward(tape, x); // [batch, seq, rank + rotated]
        let latent = self.kv_a_norm.forward(tape, &slice(tape, &kv, 2, 0..rank));
        let k_rope = slice(tape, &kv, 2, rank..rank + rotated);
        let k_rope = reshape(tape, &k_rope, &[batch, seq, 1, rotated]);
        let k_rope = self.rotated(tape, k_rope, ctx);

        let spec = AttentionSpec::causal()
            .with_scale(self.scale)
            .with_window(self.window)
            .with_softcap(self.softcap)
            .with_cu_seqlens(ctx.cu_seqlens().cloned());
        if let Some(cache) = ctx.cache() {
            let latent = reshape(tape, &latent, &[batch, seq, 1, rank]);
            let key = concat(tape, &[latent.clone(), k_rope.clone()], 3);
            let mut own = cache.layer(self.layer);
            let earlier = own.len();
            let (keys, values) = own.append(tape, key, latent, cache.capacity());
            if earlier > 0 {
                let spec = spec.clone().with_q_offset(earlier).with_kv_len(own.len());
                let q_nope = slice(tape, &q, 3, 0..nope);
                let q_rope = slice(tape, &q, 3, nope..nope + rotated);
                let output = self.in_latent_space(tape, q_nope, q_rope, &keys, &values, &spec);
                return self.o_proj.forward(tape, &output);
            }
        }

        let kv = self.kv_b_proj.forward(tape, &latent);
        let kv = reshape(tape, &kv, &[batch, seq, heads, nope + value]);
        let (k, v) = latent_heads(tape, &kv, &k_rope, nope);
        // [batch, seq, heads, value]
        let output = context_attention(tape, &q, &k, &v, &spec, &self.context_parallel);
        let output = reshape(tape, &output, &[batch, seq, heads * value]);
        self.o_proj.forward(tape, &output)
    }

    /// Attention of new tokens over a cache. q_nope: [batch, s, heads, nope], q_rope: [batch, s, heads, rotated],
    /// keys: [batch, t, 1, rank + rotated], values: [batch, t, 1, rank] -> [batch, s, heads * value].
    fn in_latent_space(
        &self,
        tape: &Tape<B>,
        q_nope: Var<B>,
        q_rope: Var<B>,
        keys: &Var<B>,
        values: &Var<B>,
        spec: &AttentionSpec<B>,
    ) -> Var<B> {
        let shape = q_nope.shape();
        let (batch, seq, heads) = (shape[0], shape[1], self.heads);
        let (rank, nope, value) = (
            self.sizes.kv_lora_rank,
            self.sizes.qk_nope_head_dim,
            self.sizes.v_head_dim,
        );
        let weight = tape.constant(self.kv_b_proj.adapted_weight());
        let weight = cast(tape, &weight, q_nope.dtype());
        let weight = reshape(tape, &weight, &[heads, nope + value, rank]);
        let to_latent = slice(tape, &weight, 1, 0..nope); // [heads, nope, rank]
        let to_value = slice(tape, &weight, 1, nope..nope + value); // [heads, value, rank]

        let by_head = |x: &Var<B>, width: usize| {
            let x = reshape(tape, x, &[batch * seq, heads, width]);
            transpose(tape, &x, 0, 1)
        };
        let by_token = |x: &Var<B>, width: usize| {
            let x = transpose(tape, x, 0, 1);
            reshape(tape, &x, &[batch, seq, heads, width])
        };
        let q = matmul(tape, &by_head(&q_nope, nope), &to_latent); // [heads, tokens, rank]
        let q = concat(tape, &[by_token(&q, rank), q_rope], 3);
        let gathered = attention(tape, &q, keys, values, spec); // [batch, s, heads, rank]
        let to_value = transpose(tape, &to_value, 1, 2);
        let output = matmul(tape, &by_head(&gathered, rank), &to_value); // [heads, tokens, value]
        let output = by_token(&output, value);
        reshape(tape, &output, &[batch, seq, heads * value])
    }

    fn rotated(&self, tape: &Tape<B>, x: Var<B>, ctx: &ForwardContext<'_, B>) -> Var<B> {
        match &self.rope {
            Some((rope, style)) => {
                let table = ctx.rotary_table(rope, self.sizes.qk_rope_head_dim, *style);
                rotary(tape, &x, &table)
            }
            None => x,
        }
    }

    /// Hands each linear layer to `visit`, in the order of their canonical names.
    pub fn visit_linears(&mut self, visit: &mut dyn FnMut(&mut Linear<B>)) {
        match &mut self.query {
            Query::Hidden(proj) => visit(proj),
            Query::Latent { a_proj, b_proj, .. } => {
                visit(a_proj);
                visit(b_proj);
            }
        }
        visit(&mut self.kv_a_proj);
        visit(&mut self.kv_b_proj);
        visit(&mut self.o_proj);
    }

    /// Appends the weights, in the order of their canonical names.
    pub fn collect(&self, params: &mut Vec<Param<B>>) {
        match &self.query {
            Query::Hidden(proj) => proj.collect(params),
            Query::Latent {
                a_proj,
                a_norm,
                b_proj,
            } => {
                a_proj.collect(params);
                a_norm.collect(params);
                b_proj.collect(params);
            }
        }
        self.kv_a_proj.collect(params);
        self.kv_a_norm.collect(params);
        self.kv_b_proj.collect(params);
        self.o_proj.collect(params);
    }
}
