//! One layer of a decoder: a part that mixes tokens and a part that works on each token alone, either of which may be
//! absent.

use bridge_core::DecoderConfig;
use bridge_core::config::{Ffn, LayerConfig, Mixer};
use bridge_ops::{Ops, Param, Tape, Var, add};

use super::{Attention, GatedDeltaNet, LatentAttention, Linear, Mamba2, Mlp, Moe, Norm};
use crate::context::ForwardContext;
use crate::error::{Error, Result};
use crate::weights::ParamBuilder;

/// One layer: each part stands behind a norm and inside a residual connection.
#[derive(Debug, Clone)]
pub struct DecoderLayer<B: Ops> {
    mixer: Option<Residual<B, TokenMixer<B>>>,
    ffn: Option<Residual<B, FeedForward<B>>>,
}

/// A part of a layer with its norms: `x + output_norm(part(norm(x)))`.
#[derive(Debug, Clone)]
struct Residual<B: Ops, P> {
    norm: Norm<B>,
    part: P,
    output_norm: Option<Norm<B>>,
}

/// The part of a layer that mixes tokens.
#[derive(Debug, Clone)]
enum TokenMixer<B: Ops> {
    Attention(Attention<B>),
    Latent(LatentAttention<B>),
    Mamba2(Mamba2<B>),
    GatedDeltaNet(GatedDeltaNet<B>),
    Linear(Linear<B>),
}

/// The part of a layer that works on each token alone.
#[derive(Debug, Clone)]
enum FeedForward<B: Ops> {
    Mlp(Mlp<B>),
    Moe(Box<Moe<B>>),
    Linear(Linear<B>),
}

/// Which layer is built.
#[derive(Clone, Copy)]
struct Site<'a> {
    config: &'a DecoderConfig,
    own: &'a LayerConfig,
    /// Its number; a module after the last layer counts on.
    layer: usize,
    /// What its weights' names start with.
    prefix: &'a str,
}

impl<B: Ops> DecoderLayer<B> {
    /// Layer `layer` of the model that `config` describes.
    ///
    /// # Errors
    /// If the weights' source fails, or the layer is of a kind that is not supported.
    pub fn build(
        params: &mut ParamBuilder<'_, B>,
        config: &DecoderConfig,
        layer: usize,
    ) -> Result<Self> {
        let prefix = format!("layers.{layer}");
        Self::build_at(params, config, layer, &config.layers[layer], &prefix)
    }

    /// A layer made of `own` whose weights' names start with `prefix`. `layer` is its place in a cache.
    ///
    /// # Errors
    /// If the weights' source fails, or the layer is of a kind that is not supported.
    pub fn build_at(
        params: &mut ParamBuilder<'_, B>,
        config: &DecoderConfig,
        layer: usize,
        own: &LayerConfig,
        prefix: &str,
    ) -> Result<Self> {
        let site = Site {
            config,
            own,
            layer,
            prefix,
        };
        Ok(Self {
            mixer: match own.mixer {
                Mixer::None => None,
                _ => Some(Residual::build(
                    params,
                    site,
                    ("input_norm", "attention_output_norm"),
                    config.attention_output_norm,
                    TokenMixer::build,
                )?),
            },
            ffn: match own.ffn {
                Ffn::None => None,
                _ => Some(Residual::build(
                    params,
                    site,
                    ("mlp_norm", "mlp_output_norm"),
                    config.mlp_output_norm,
                    FeedForward::build,
                )?),
            },
        })
    }

    /// `x`: `[batch, seq, hidden]` -> the same shape.
    pub fn forward(&self, tape: &Tape<B>, x: &Var<B>, ctx: &ForwardContext<'_, B>) -> Var<B> {
        let mut x = x.clone();
        if let Some(mixer) = &self.mixer {
            x = mixer.forward(tape, &x, |part, x| part.forward(tape, x, ctx));
        }
        if let Some(ffn) = &self.ffn {
            x = ffn.forward(tape, &x, |part, x| part.forward(tape, x, ctx));
        }
        x
    }

    /// Hands each linear layer to `visit`, in the order of their canonical names.
    pub fn visit_linears(&mut self, visit: &mut dyn FnMut(&mut Linear<B>)) {
        if let Some(mixer) = &mut self.mixer {
            mixer.part.visit_linears(visit);
        }
        if let Some(ffn) = &mut self.ffn {
            ffn.part.visit_linears(visit);
        }
    }

    /// Appends the weights, in the order of their canonical names.
    pub fn collect(&self, params: &mut Vec<Param<B>>) {
        if let Some(mixer) = &self.mixer {
            mixer.collect(params, TokenMixer::collect);
        }
        if let Some(ffn) = &self.ffn {
            ffn.collect(params, FeedForward::collect);
        }
    }
}

impl<B: Ops, P> Residual<B, P> {
    fn build(
        params: &mut ParamBuilder<'_, B>,
        site: Site<'_>,
        (norm, output_norm): (&str, &str),
        has_output_norm: bool,
        part: impl FnOnce(&mut ParamBuilder<'_, B>, Site<'_>) -> Result<P>,
    ) -> Result<Self> {
        let build_norm = |params: &mut ParamBuilder<'_, B>, name: &str| {
            let name = format!("{}.{name}", site.prefix);
            Norm::build(params, &name, site.config.hidden_size, &site.config.norm)
        };
        Ok(Self {
            norm: build_norm(params, norm)?,
            part: part(params, site)?,
            output_norm: if has_output_norm {
                Some(build_norm(params, output_norm)?)
            } else {
                None
            },
        })
    }

    fn forward(
        &self,
        tape: &Tape<B>,
        x: &Var<B>,
        run: impl FnOnce(&P, &Var<B>) -> Var<B>,
    ) -> Var<B> {
        let y = run(&self.part, &self.norm.forward(tape, x));
        let y = match &self.output_norm {
            Some(norm) => norm.forward(tape, &y),
            None => y,
        };
        add(tape, x, &y)
    }

    fn collect(&self, params: &mut Vec<Param<B>>, part: impl FnOnce(&P, &mut Vec<Param<B>>)) {
        self.norm.collect(params);
        part(&self.part, params);
        if let Some(norm) = &self.output_norm {
            norm.collect(params);
        }
    }
}

impl<B: Ops> TokenMixer<B> {
    fn build(params: &mut ParamBuilder<'_, B>, site: Site<'_>) -> Result<Self> {
        let (config, layer) = (site.config, site.layer);
        let name = |part: &str| format!("{}.{part}", site.prefix);
        match (&site.own.mixer, &config.mamba2, &config.gated_delta_net) {
            (Mixer::Attention(own), ..) => match &config.mla {
                None => Attention::build(params, &name("attention"), config, layer, own)
                    .map(Self::Attention),
                Some(mla) => {
                    LatentAttention::build(params, &name("attention"), config, layer, own, mla)
                        .map(Self::Latent)
                }
            },
            (Mixer::Mamba2, Some(own), _) => {
                Mamba2::build(params, &name("mamba"), config, layer, own).map(Self::Mamba2)
            }
            (Mixer::GatedDeltaNet, _, Some(own)) => {
                GatedDeltaNet::build(params, &name("delta_net"), config, layer, own)
                    .map(Self::GatedDeltaNet)
            }
            (Mixer::Linear, ..) => {
                square(params, &name("attention_linear"), config).map(Self::Linear)
            }
            (other, ..) => Err(Error::UnsupportedLayer {
                layer,
                part: "mixer",
                found: format!("{other:?}"),
            }),
        }
    }

    fn forward(&self, tape: &Tape<B>, x: &Var<B>, ctx: &ForwardContext<'_, B>) -> Var<B> {
        match self {
            Self::Attention(attention) => attention.forward(tape, x, ctx),
            Self::Latent(attention) => attention.forward(tape, x, ctx),
            Self::Mamba2(mamba) => mamba.forward(tape, x, ctx),
            Self::GatedDeltaNet(delta_net) => delta_net.forward(tape, x, ctx),
            Self::Linear(linear) => linear.forward(tape, x),
        }
    }

    fn collect(&self, params: &mut Vec<Param<B>>) {
        match self {
            Self::Attention(attention) => attention.collect(params),
            Self::Latent(attention) => attention.collect(params),
            Self::Mamba2(mamba) => mamba.collect(params),
            Self::GatedDeltaNet(delta_net) => delta_net.collect(params),
            Self::Linear(linear) => linear.collect(params),
        }
    }

    fn visit_linears(&mut self, visit: &mut dyn FnMut(&mut Linear<B>)) {
        match self {
            Self::Attention(attention) => attention.visit_linears(visit),
            Self::Latent(attention) => attention.visit_linears(visit),
            Self::Mamba2(mamba) => mamba.visit_linears(visit),
            Self::GatedDeltaNet(delta_net) => delta_net.visit_linears(visit),
            Self::Linear(linear) => visit(linear),
        }
    }
}

impl<B: Ops> FeedForward<B> {
    fn build(params: &mut ParamBuilder<'_, B>, site: Site<'_>) -> Result<Self> {
        let config = site.config;
        let name = |part: &str| format!("{}.{part}", site.prefix);
        match (&site.own.ffn, &config.moe) {
            (Ffn::Mlp(own), _) => {
                let inner = own.intermediate_size.unwrap_or(config.intermediate_size);
                Mlp::build(params, &name("mlp"), config, inner).map(Self::Mlp)
            }
            (Ffn::Moe, Some(moe)) => {
                let moe = Moe::build(params, &name("mlp"), config, moe)?;
                Ok(Self::Moe(Box::new(moe)))
            }
            (Ffn::Linear, _) => square(params, &name("mlp_linear"), config).map(Self::Linear),
            (other, _) => Err(Error::UnsupportedLayer {
                layer: site.layer,
                part: "feed-forward part",
                found: format!("{other:?}"),
            }),
        }
    }

    fn forward(&self, tape: &Tape<B>, x: &Var<B>, ctx: &ForwardContext<'_, B>) -> Var<B> {
        match self {
            Self::Mlp(mlp) => mlp.forward(tape, x),
            Self::Moe(moe) => moe.forward(tape, x, ctx),
            Self::Linear(linear) => linear.forward(tape, x),
        }
    }

    fn collect(&self, params: &mut Vec<Param<B>>) {
        match self {
            Self::Mlp(mlp) => mlp.collect(params),
            Self::Moe(moe) => moe.collect(params),
            Self::Linear(linear) => linear.collect(params),
        }
    }

    fn visit_linears(&mut self, visit: &mut dyn FnMut(&mut Linear<B>)) {
        match self {
            Self::Mlp(mlp) => mlp.visit_linears(visit),
            Self::Moe(moe) => moe.visit_linears(visit),
            Self::Linear(linear) => visit(linear),
        }
    }
}

/// The matrix that stands for a whole part of a layer.
fn square<B: Ops>(
    params: &mut ParamBuilder<'_, B>,
    name: &str,
    config: &DecoderConfig,
) -> Result<Linear<B>> {
    Linear::build(params, name, [config.hidden_size; 2], false)
}
