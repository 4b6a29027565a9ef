//! Putting adapters on a model.

use std::collections::BTreeSet;
use std::sync::Arc;

use bridge_models::Decoder;
use bridge_models::layers::{Linear, LinearAdapter};
use bridge_ops::Ops;

use crate::config::AdapterConfig;
use crate::error::{Error, Result};
use crate::low_rank::LowRank;
use crate::target::select;
use crate::weights::{AdapterWeights, Factors};

/// Makes the adapter of one layer. Implement it for an adapter of your own, and [`LinearAdapter`] for what it makes.
pub trait Adapter<B: Ops> {
    /// An adapter for `layer`, whose weights are there. On several ranks every rank calls this for the same layers in the
    /// same order, each with its part; the new parameters must say which part they are
    /// ([`ParamShard`](bridge_ops::ParamShard)).
    ///
    /// # Errors
    /// If the layer cannot have such an adapter.
    fn adapt(&self, layer: &Linear<B>) -> Result<Arc<dyn LinearAdapter<B>>>;
}

impl<B: Ops> Adapter<B> for AdapterConfig {
    fn adapt(&self, layer: &Linear<B>) -> Result<Arc<dyn LinearAdapter<B>>> {
        Ok(Arc::new(LowRank::fresh(layer, self)))
    }
}

/// Freezes `model` and puts fresh adapters on the layers that `config` names. Returns the names of those that are on this
/// rank. Weights must be there, since DoRA starts from them.
///
/// # Errors
/// If a setting makes no sense or a pattern matches no layer of the model.
pub fn attach<B: Ops>(model: &mut Decoder<B>, config: &AdapterConfig) -> Result<Vec<String>> {
    let targets = select(model.config(), config)?;
    attach_with(model, &targets, config)
}

/// As [`attach`] with adapters of one's own on the layers called `targets`.
///
/// # Errors
/// The first error of `adapter`.
pub fn attach_with<B: Ops>(
    model: &mut Decoder<B>,
    targets: &BTreeSet<String>,
    adapter: &dyn Adapter<B>,
) -> Result<Vec<String>> {
    let mut attached = Vec::new();
    let mut failure = None;
    for param in model.params() {
        param.set_requires_grad(false);
    }
    model.visit_linears(&mut |linear| {
        if failure.is_some() || !targets.contains(linear.name()) {
            return;
        }
        match adapter.adapt(linear) {
            Ok(adapter) => {
                linear.set_adapter(Some(adapter));
                attached.push(linear.name().to_owned());
            }
            Err(error) => failure = Some(error),
        }
    });
    match failure {
        Some(error) => Err(error),
        None => Ok(attached),
    }
}

/// As [`attach`] with adapters that were trained before.
///
/// # Errors
/// If a layer is none of the model's, or the adapter has another shape.
pub fn attach_weights<B: Ops>(
    model: &mut Decoder<B>,
    weights: &AdapterWeights,
) -> Result<Vec<String>> {
    weights.check(model.config())?;
    let targets = weights.layers.keys().cloned().collect();
    attach_with(model, &targets, &Trained(weights))
}

struct Trained<'a>(&'a AdapterWeights);

impl<B: Ops> Adapter<B> for Trained<'_> {
    fn adapt(&self, layer: &Linear<B>) -> Result<Arc<dyn LinearAdapter<B>>> {
        let name = layer.name();
        let factors: &Factors =
            self.0.layers.get(name).ok_or_else(|| {
                Error::DoesNotFit(vec![format!("the adapter has no layer `{name}`")])
            })?;
        Ok(Arc::new(LowRank::trained(layer, &self.0.config, factors)))
    }
}
