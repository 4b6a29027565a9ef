//! A matrix product with an optional bias.

use bridge_ops::{Ops, Param, Tape, Var, linear};

use crate::error::Result;
use crate::weights::ParamBuilder;

/// `y = x W^T + b`.
#[derive(Debug, Clone)]
pub struct Linear<B: Ops> {
    /// `[out_features, in_features]`.
    pub weight: Param<B>,
    /// `[out_features]`.
    pub bias: Option<Param<B>>,
}

impl<B: Ops> Linear<B> {
    /// The layer called `name`, with `name.weight` of `[out_features, in_features]` and, if asked for, `name.bias`.
    ///
    /// # Errors
    /// If the weights' source fails.
    pub fn build(
        params: &mut ParamBuilder<'_, B>,
        name: &str,
        [out_features, in_features]: [usize; 2],
        bias: bool,
    ) -> Result<Self> {
        let weight = params.param(&format!("{name}.weight"), &[out_features, in_features])?;
        let bias = if bias {
            Some(params.param(&format!("{name}.bias"), &[out_features])?)
        } else {
            None
        };
        Ok(Self { weight, bias })
    }

    /// `x`: `[.., in_features]` -> `[.., out_features]`.
    pub fn forward(&self, tape: &Tape<B>, x: &Var<B>) -> Var<B> {
        linear(tape, x, &self.weight, self.bias.as_ref())
    }

    /// Appends the weights, in the order of their canonical names.
    pub fn collect(&self, params: &mut Vec<Param<B>>) {
        params.push(self.weight.clone());
        params.extend(self.bias.clone());
    }
}
