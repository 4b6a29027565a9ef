//! The dense feed-forward part of a layer.

use bridge_core::DecoderConfig;
use bridge_ops::{Activation, Ops, Param, Tape, Var, activation, gated_activation};
use bridge_parallel::TensorRegion;

use super::Linear;
use crate::error::Result;
use crate::weights::ParamBuilder;

/// `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate.
#[derive(Debug, Clone)]
pub struct Mlp<B: Ops> {
    gate_proj: Option<Linear<B>>,
    up_proj: Linear<B>,
    down_proj: Linear<B>,
    activation: Activation,
    region: TensorRegion<B>,
}

impl<B: Ops> Mlp<B> {
    /// The MLP called `name`, `inner` wide inside.
    ///
    /// # Errors
    /// If the weights' source fails.
    pub fn build(
        params: &mut ParamBuilder<'_, B>,
        name: &str,
        config: &DecoderConfig,
        inner: usize,
    ) -> Result<Self> {
        let hidden = config.hidden_size;
        let mut project = |proj: &str, shape: [usize; 2]| {
            Linear::build(
                params,
                &format!("{name}.{proj}_proj"),
                shape,
                config.mlp_bias,
            )
        };
        Ok(Self {
            gate_proj: if config.gated_mlp {
                Some(project("gate", [inner, hidden])?)
            } else {
                None
            },
            up_proj: project("up", [inner, hidden])?,
            down_proj: project("down", [hidden, inner])?,
            activation: activation_op(config.activation),
            region: params.region(),
        })
    }

    /// `x`: `[batch, seq, hidden]` -> the same shape.
    pub fn forward(&self, tape: &Tape<B>, x: &Var<B>) -> Var<B> {
        let x = &self.region.enter(tape, x);
        let up = self.up_proj.forward(tape, x); // [batch, seq, intermediate]
        let inner = match &self.gate_proj {
            Some(gate_proj) => {
                gated_activation(tape, &gate_proj.forward(tape, x), &up, self.activation)
            }
            None => activation(tape, &up, self.activation),
        };
        self.down_proj.forward(tape, &inner)
    }

    /// Hands each linear layer to `visit`, in the order of their canonical names.
    pub fn visit_linears(&mut self, visit: &mut dyn FnMut(&mut Linear<B>)) {
        for linear in (self.gate_proj.iter_mut()).chain([&mut self.up_proj, &mut self.down_proj]) {
            visit(linear);
        }
    }

    /// Appends the weights, in the order of their canonical names.
    pub fn collect(&self, params: &mut Vec<Param<B>>) {
        if let Some(gate_proj) = &self.gate_proj {
            gate_proj.collect(params);
        }
        self.up_proj.collect(params);
        self.down_proj.collect(params);
    }
}

/// The operation of a config's activation.
pub(super) fn activation_op(activation: bridge_core::config::Activation) -> Activation {
    use bridge_core::config::Activation as Config;
    match activation {
        Config::Silu => Activation::Silu,
        Config::Gelu => Activation::Gelu,
        Config::GeluTanh => Activation::GeluTanh,
        Config::QuickGelu => Activation::QuickGelu,
        Config::Relu => Activation::Relu,
        Config::Relu2 => Activation::Relu2,
        Config::Sigmoid => Activation::Sigmoid,
        Config::Tanh => Activation::Tanh,
    }
}
