//! A matrix product with an optional bias.

use bridge_ops::{Ops, Param, Tape, Var, add_bias, linear};
use bridge_parallel::TensorRegion;

use crate::error::Result;
use crate::weights::ParamBuilder;

/// `y = x W^T + b`.
///
/// Where ranks divide a model, each has some of the outputs (column-parallel) or some of the inputs (row-parallel) of the
/// weight, whichever the weight's shard rule says. Products of the second kind are summed over the ranks: the forward
/// pass leaves the tensor-parallel region, and adds the bias after that, once.
#[derive(Debug, Clone)]
pub struct Linear<B: Ops> {
    /// `[out_features, in_features]`.
    pub weight: Param<B>,
    /// `[out_features]`.
    pub bias: Option<Param<B>>,
    /// The region to leave, if the weight is row-parallel.
    row_parallel: Option<TensorRegion<B>>,
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
        let row_parallel = params
            .is_row_parallel(weight.name())
            .then(|| params.region());
        Ok(Self {
            weight,
            bias,
            row_parallel,
        })
    }

    /// `x`: `[.., in_features]` -> `[.., out_features]`; a rank's part of either.
    pub fn forward(&self, tape: &Tape<B>, x: &Var<B>) -> Var<B> {
        let Some(region) = &self.row_parallel else {
            return linear(tape, x, &self.weight, self.bias.as_ref());
        };
        let y = region.leave(tape, &linear(tape, x, &self.weight, None));
        match &self.bias {
            Some(bias) => add_bias(tape, &y, bias),
            None => y,
        }
    }

    /// Appends the weights, in the order of their canonical names.
    pub fn collect(&self, params: &mut Vec<Param<B>>) {
        params.push(self.weight.clone());
        params.extend(self.bias.clone());
    }
}
