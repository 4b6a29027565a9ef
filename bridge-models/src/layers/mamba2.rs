//! Mamba-2 (Dao and Gu 2024): a state space layer whose decay, input and output depend on the token.
//!
//! ```text
//! z, x, B, C, dt = projections of the input           x, B, C go through a short convolution and SiLU
//! y = scan(x, softplus(dt + bias), -exp(a_log), B, C) + D x
//! output = out_proj(norm(y silu(z)))                  the norm works within each group of heads
//! ```

use std::ops::Range;

use bridge_core::DecoderConfig;
use bridge_core::config::Mamba2Config;
use bridge_ops::{
    GatedNormSpec, Ops, Param, ScanSpec, SsdInputs, Tape, Var, gated_rms_norm, log_decay, reshape,
    slice, ssd_scan, ssd_scan_with_state, time_step,
};
use bridge_parallel::{ContextParallel, TensorRegion, rows_of_params};

use super::{Linear, ShortConv};
use crate::context::ForwardContext;
use crate::error::Result;
use crate::weights::ParamBuilder;

/// The Mamba-2 mixer of one layer.
#[derive(Debug, Clone)]
pub struct Mamba2<B: Ops> {
    layer: usize,
    config: Mamba2Config,
    norm_eps: f64,
    z_proj: Linear<B>,
    x_proj: Linear<B>,
    b_proj: Linear<B>,
    c_proj: Linear<B>,
    dt_proj: Linear<B>,
    x_conv: ShortConv<B>,
    b_conv: ShortConv<B>,
    c_conv: ShortConv<B>,
    /// `[heads]`.
    dt_bias: Param<B>,
    /// `[heads]`: logarithm of the rate of decay.
    a_log: Param<B>,
    /// `[heads]`: the skip connection.
    d: Param<B>,
    /// `[heads * head_dim]`.
    gated_norm: Param<B>,
    out_proj: Linear<B>,
    /// As many as this rank has.
    heads: usize,
    groups: usize,
    region: TensorRegion<B>,
    context_parallel: ContextParallel<B>,
}

impl<B: Ops> Mamba2<B> {
    /// The mixer of layer `layer`, called `name`.
    ///
    /// # Errors
    /// If the weights' source fails.
    pub fn build(
        params: &mut ParamBuilder<'_, B>,
        name: &str,
        config: &DecoderConfig,
        layer: usize,
        own: &Mamba2Config,
    ) -> Result<Self> {
        let (hidden, heads) = (config.hidden_size, own.num_heads);
        let (inner, group) = (own.inner_size(), own.group_size());
        let mut project = |part: &str, rows: usize| {
            let name = format!("{name}.{part}_proj");
            Linear::build(params, &name, [rows, hidden], own.proj_bias)
        };
        let z_proj = project("z", inner)?;
        let x_proj = project("x", inner)?;
        let b_proj = project("b", group)?;
        let c_proj = project("c", group)?;
        let dt_proj = project("dt", heads)?;
        let mut conv = |part: &str, channels: usize| {
            let shape = [channels, own.conv_kernel];
            ShortConv::build(params, &format!("{name}.{part}_conv"), shape, own.conv_bias)
        };
        let (x_conv, b_conv, c_conv) = (conv("x", inner)?, conv("b", group)?, conv("c", group)?);
        let mut vector = |leaf: &str, size: usize| params.param(&format!("{name}.{leaf}"), &[size]);
        let (dt_bias, a_log, d) = (
            vector("dt_bias", heads)?,
            vector("a_log", heads)?,
            vector("d", heads)?,
        );
        let gated_norm = vector("gated_norm.weight", inner)?;
        let out_proj = Linear::build(
            params,
            &format!("{name}.out_proj"),
            [hidden, inner],
            own.proj_bias,
        )?;
        Ok(Self {
            layer,
            heads: a_log.numel(),
            groups: b_proj.weight.shape()[0] / own.state_size,
            region: params.region(),
            context_parallel: params.context_parallel(),
            config: own.clone(),
            norm_eps: config.norm.eps,
            z_proj,
            x_proj,
            b_proj,
            c_proj,
            dt_proj,
            x_conv,
            b_conv,
            c_conv,
            dt_bias,
            a_log,
            d,
            gated_norm,
            out_proj,
        })
    }

    /// `x`: `[batch, seq, hidden]` -> the same shape.
    pub fn forward(&self, tape: &Tape<B>, x: &Var<B>, ctx: &ForwardContext<'_, B>) -> Var<B> {
        let x = &self.region.enter(tape, x);
        let (batch, own, cp) = (ctx.batch(), &self.config, &self.context_parallel);
        // Of a sequence in parts each rank runs some of the heads over all of it.
        let heads = cp.own_heads(self.heads);
        let groups = groups_of(&heads, self.heads / self.groups);
        let mut past = ctx.cache().map(|cache| cache.recurrent(self.layer));

        let hidden = cp.to_own_heads(tape, &self.x_proj.forward(tape, x), self.heads);
        let channels = heads.start * own.head_dim..heads.end * own.head_dim;
        let (hidden, conv) = self.x_conv.of_channels(tape, &hidden, channels);
        let history = past.as_mut().map(|past| &mut past.histories[0]);
        let hidden = conv.forward(tape, &hidden, history, ctx);
        let mut shared = |index: usize, proj: &Linear<B>, conv: &ShortConv<B>| {
            // Groups are few and narrow, and may be fewer than ranks: all of them go everywhere.
            let projected = cp.whole_sequence(tape, &proj.forward(tape, x));
            let history = past.as_mut().map(|past| &mut past.histories[index]);
            let convolved = conv.forward(tape, &projected, history, ctx);
            let seq = convolved.shape()[1];
            let by_group = [batch, seq, self.groups, own.state_size];
            groups_only(tape, &reshape(tape, &convolved, &by_group), &groups)
        };
        let b = shared(1, &self.b_proj, &self.b_conv);
        let c = shared(2, &self.c_proj, &self.c_conv);
        let dt = cp.to_own_heads(tape, &self.dt_proj.forward(tape, x), self.heads);
        let of_heads = [&self.dt_bias, &self.a_log, &self.d].map(|param| (param, heads.clone()));
        let (dt, parts) = rows_of_params(tape, &dt, &of_heads);
        let [dt_bias, a_log, d] = &parts[..] else {
            unreachable!("three weights were given");
        };
        let dt = time_step(tape, &dt, dt_bias, own.time_step_min); // [batch, seq, own heads]
        let seq = dt.shape()[1];
        let inputs = SsdInputs {
            x: reshape(tape, &hidden, &[batch, seq, heads.len(), own.head_dim]),
            log_decay: log_decay(tape, &dt, a_log),
            dt,
            b,
            c,
        };
        let spec = ScanSpec::new(own.chunk_size).with_documents(ctx.cu_seqlens().cloned());
        let y = match past {
            None => ssd_scan(tape, &inputs, Some(d), &spec),
            Some(mut past) => {
                let state = past.state.take();
                let (y, next) = ssd_scan_with_state(tape, &inputs, Some(d), state, &spec);
                past.advance(next, seq);
                y
            }
        };
        let y = reshape(tape, &y, &[batch, seq, heads.len() * own.head_dim]);
        let y = cp.to_own_tokens(tape, &y, self.heads);
        let z = self.z_proj.forward(tape, x);
        let norm = GatedNormSpec {
            eps: self.norm_eps,
            group_size: own.inner_size() / own.num_groups,
            gate_first: true,
        };
        let y = gated_rms_norm(tape, &y, &z, &self.gated_norm, norm);
        self.out_proj.forward(tape, &y)
    }

    /// Hands each linear layer to `visit`, in the order of their canonical names.
    pub fn visit_linears(&mut self, visit: &mut dyn FnMut(&mut Linear<B>)) {
        for linear in [
            &mut self.z_proj,
            &mut self.x_proj,
            &mut self.b_proj,
            &mut self.c_proj,
            &mut self.dt_proj,
            &mut self.out_proj,
        ] {
            visit(linear);
        }
    }

    /// Appends the weights, in the order of their canonical names.
    pub fn collect(&self, params: &mut Vec<Param<B>>) {
        for proj in [
            &self.z_proj,
            &self.x_proj,
            &self.b_proj,
            &self.c_proj,
            &self.dt_proj,
        ] {
            proj.collect(params);
        }
        for conv in [&self.x_conv, &self.b_conv, &self.c_conv] {
            conv.collect(params);
        }
        for vector in [&self.dt_bias, &self.a_log, &self.d, &self.gated_norm] {
            params.push(vector.clone());
        }
        self.out_proj.collect(params);
    }
}

/// Groups `own` of x: [batch, seq, groups, size].
pub(super) fn groups_only<B: Ops>(tape: &Tape<B>, x: &Var<B>, own: &Range<usize>) -> Var<B> {
    if own.len() == x.shape()[2] {
        x.clone()
    } else {
        slice(tape, x, 2, own.clone())
    }
}

/// The groups that `heads` belong to, `per_group` heads each: whole ones, or a part of one.
pub(super) fn groups_of(heads: &Range<usize>, per_group: usize) -> Range<usize> {
    heads.start / per_group..heads.end.div_ceil(per_group)
}
