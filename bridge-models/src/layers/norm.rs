//! RMSNorm and LayerNorm behind one front.

use bridge_core::config::{NormConfig, NormKind};
use bridge_ops::{NormSpec, Ops, Param, Tape, Var, layer_norm, rms_norm};
use bridge_parallel::{TensorRegion, rms_norm_across};

use crate::error::Result;
use crate::weights::ParamBuilder;

/// A normalisation over the last dimension, of the kind that a [`NormConfig`] names.
#[derive(Debug, Clone)]
pub struct Norm<B: Ops> {
    kind: NormKind,
    spec: NormSpec,
    /// `[size]`. Scales by itself, or by one more than itself where the config says `unit_offset`.
    pub weight: Param<B>,
    /// `[size]`.
    pub bias: Option<Param<B>>,
    /// The ranks that divide the width, where they do.
    divided: Option<TensorRegion<B>>,
}

impl<B: Ops> Norm<B> {
    /// The norm called `name` over `size` elements.
    ///
    /// # Errors
    /// If the weights' source fails.
    pub fn build(
        params: &mut ParamBuilder<'_, B>,
        name: &str,
        size: usize,
        config: &NormConfig,
    ) -> Result<Self> {
        let weight = params.param(&format!("{name}.weight"), &[size])?;
        let bias = if config.bias {
            Some(params.param(&format!("{name}.bias"), &[size])?)
        } else {
            None
        };
        Ok(Self {
            kind: config.kind,
            spec: NormSpec {
                eps: config.eps,
                unit_offset: config.unit_offset,
            },
            divided: (weight.numel() != size).then(|| params.region()),
            weight,
            bias,
        })
    }

    /// `x`: `[.., size]` -> the same shape.
    pub fn forward(&self, tape: &Tape<B>, x: &Var<B>) -> Var<B> {
        match self.kind {
            NormKind::RmsNorm => match &self.divided {
                Some(region) => rms_norm_across(tape, x, &self.weight, self.spec, region),
                None => rms_norm(tape, x, &self.weight, self.spec),
            },
            NormKind::LayerNorm => layer_norm(tape, x, &self.weight, self.bias.as_ref(), self.spec),
        }
    }

    /// Appends the weights, in the order of their canonical names.
    pub fn collect(&self, params: &mut Vec<Param<B>>) {
        params.push(self.weight.clone());
        params.extend(self.bias.clone());
    }
}
