//! A matrix product with an optional bias.

use std::fmt::Debug;
use std::sync::Arc;

use bridge_ops::{Float, Ops, Param, Tape, Var, add_bias, linear};
use bridge_parallel::TensorRegion;

use crate::error::Result;
use crate::weights::ParamBuilder;

/// What stands in the place of a linear layer's product: the frozen weight and something small that is trained.
///
/// `bridge-peft` has the usual ones (LoRA, DoRA) and attaches them, or any other.
pub trait LinearAdapter<B: Ops>: Debug + Send + Sync {
    /// The product `x W'^T` with the adapted weight. x: [.., in] -> [.., out]; a rank's part of either. Of a row-parallel
    /// weight it is the rank's contribution to a sum; the bias is none of its business.
    fn forward(&self, tape: &Tape<B>, x: &Var<B>, weight: &Param<B>) -> Var<B>;

    /// The adapted weight `W'` as one matrix, of the weight's shape and dtype: what decoding over a latent cache needs.
    fn adapted_weight(&self, weight: &Param<B>) -> Float<B>;

    /// What it trains. Names begin with that of the layer.
    fn params(&self) -> Vec<Param<B>>;
}

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
    adapter: Option<Arc<dyn LinearAdapter<B>>>,
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
            adapter: None,
        })
    }

    /// `x`: `[.., in_features]` -> `[.., out_features]`; a rank's part of either.
    pub fn forward(&self, tape: &Tape<B>, x: &Var<B>) -> Var<B> {
        let y = match (&self.adapter, &self.row_parallel) {
            (None, None) => return linear(tape, x, &self.weight, self.bias.as_ref()),
            (None, Some(_)) => linear(tape, x, &self.weight, None),
            (Some(adapter), _) => adapter.forward(tape, x, &self.weight),
        };
        let y = match &self.row_parallel {
            Some(region) => region.leave(tape, &y),
            None => y,
        };
        match &self.bias {
            Some(bias) => add_bias(tape, &y, bias),
            None => y,
        }
    }

    /// Its canonical name, without `.weight`.
    pub fn name(&self) -> &str {
        let name = self.weight.name();
        name.strip_suffix(".weight").unwrap_or(name)
    }

    /// The region to leave, if ranks divide the weight along its inputs.
    pub fn row_parallel(&self) -> Option<&TensorRegion<B>> {
        self.row_parallel.as_ref()
    }

    /// The adapter, if one is attached.
    pub fn adapter(&self) -> Option<&Arc<dyn LinearAdapter<B>>> {
        self.adapter.as_ref()
    }

    /// Attaches an adapter, or takes one off.
    pub fn set_adapter(&mut self, adapter: Option<Arc<dyn LinearAdapter<B>>>) {
        self.adapter = adapter;
    }

    /// The matrix that the layer multiplies by, adapter included.
    pub fn adapted_weight(&self) -> Float<B> {
        match &self.adapter {
            Some(adapter) => adapter.adapted_weight(&self.weight),
            None => self.weight.value(),
        }
    }

    /// Appends the weights, in the order of their canonical names, and those of an adapter.
    pub fn collect(&self, params: &mut Vec<Param<B>>) {
        params.push(self.weight.clone());
        params.extend(self.bias.clone());
        params.extend(self.adapter.iter().flat_map(|adapter| adapter.params()));
    }
}
