//! Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2).

use bridge_core::DecoderConfig;
use bridge_ops::{Ops, Param, Tape, Var, concat};

use super::{DecoderLayer, Linear, Norm};
use crate::context::ForwardContext;
use crate::error::Result;
use crate::weights::ParamBuilder;

/// A module that, from the model's view of token `t` and the embedding of token `t + 1`, makes the view that predicts
/// token `t + 2`; the module after it goes one token further. Embedding and head are the model's own.
#[derive(Debug, Clone)]
pub struct MtpModule<B: Ops> {
    embedding_norm: Norm<B>,
    hidden_norm: Norm<B>,
    proj: Linear<B>,
    layer: DecoderLayer<B>,
    final_norm: Norm<B>,
}

impl<B: Ops> MtpModule<B> {
    /// Module `index` of the model that `config` describes.
    ///
    /// # Errors
    /// If the weights' source fails.
    pub fn build(
        params: &mut ParamBuilder<'_, B>,
        config: &DecoderConfig,
        index: usize,
    ) -> Result<Self> {
        let name = |part: &str| format!("mtp.{index}.{part}");
        let hidden = config.hidden_size;
        let layer = config.num_hidden_layers + index;
        Ok(Self {
            embedding_norm: Norm::build(params, &name("embedding_norm"), hidden, &config.norm)?,
            hidden_norm: Norm::build(params, &name("hidden_norm"), hidden, &config.norm)?,
            proj: Linear::build(params, &name("proj"), [hidden, 2 * hidden], false)?,
            layer: DecoderLayer::build_at(
                params,
                config,
                layer,
                &config.mtp_layer(),
                &name("layer"),
            )?,
            final_norm: Norm::build(params, &name("final_norm"), hidden, &config.norm)?,
        })
    }

    /// `hidden`: the view of each token after the final norm, of the model or of the module before; `next`: the
    /// embedding of the token after it; both `[batch, seq, hidden]` -> the new view, normalised, of the same shape.
    pub fn forward(
        &self,
        tape: &Tape<B>,
        hidden: &Var<B>,
        next: &Var<B>,
        ctx: &ForwardContext<'_, B>,
    ) -> Var<B> {
        let next = self.embedding_norm.forward(tape, next);
        let hidden = self.hidden_norm.forward(tape, hidden);
        let x = self.proj.forward(tape, &concat(tape, &[next, hidden], 2));
        let x = self.layer.forward(tape, &x, ctx);
        self.final_norm.forward(tape, &x)
    }

    /// Hands each linear layer to `visit`, in the order of their canonical names.
    pub fn visit_linears(&mut self, visit: &mut dyn FnMut(&mut Linear<B>)) {
        visit(&mut self.proj);
        self.layer.visit_linears(visit);
    }

    /// Appends the weights, in the order of their canonical names.
    pub fn collect(&self, params: &mut Vec<Param<B>>) {
        self.embedding_norm.collect(params);
        self.hidden_norm.collect(params);
        self.proj.collect(params);
        self.layer.collect(params);
        self.final_norm.collect(params);
    }
}
