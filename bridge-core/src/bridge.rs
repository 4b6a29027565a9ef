//! What a model family tells this crate: how to read its config, which tensors it has, and how they are called
//! elsewhere.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::{DecoderConfig, HfConfig};
use crate::error::Result;
use crate::layout::{Place, ShardRule};
use crate::mapping::WeightMap;

/// A weight of a model under its canonical name: whole, unfused, matrices as `[out_features, in_features]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CanonicalTensor {
    /// Name, such as `layers.3.attention.q_proj.weight`.
    pub name: String,
    /// Shape over all ranks.
    pub shape: Vec<usize>,
    /// How ranks divide it.
    pub shard: ShardRule,
    /// Which pipeline stage holds it.
    pub place: Place,
}

impl CanonicalTensor {
    /// A tensor whose place follows from its name: `layers.{l}.` is a layer's, `embedding.` the first stage's,
    /// anything else the last stage's.
    pub fn new(name: impl Into<String>, shape: impl Into<Vec<usize>>, shard: ShardRule) -> Self {
        let name = name.into();
        let place = place_of(&name);
        Self { name, shape: shape.into(), shard, place }
    }

    /// The same tensor in another place.
    pub fn at(mut self, place: Place) -> Self {
        self.place = place;
        self
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
}

fn place_of(name: &str) -> Place {
    if name.starts_with("embedding.") {
        return Place::First;
    }
    let layer = name.strip_prefix("layers.").and_then(|rest| rest.split_once('.')).and_then(|(l, _)| l.parse().ok());
    layer.map_or(Place::Last, Place::Layer)
}

/// A model family: the one thing to write to make a new kind of model convertible.
pub trait ModelBridge: Send + Sync {
    /// Name of the family, such as "llama".
    fn name(&self) -> &'static str;

    /// The `architectures` of a `config.json` that this family handles.
    fn architectures(&self) -> &'static [&'static str];

    /// Reads a `config.json`.
    ///
    /// # Errors
    /// If keys are missing, of the wrong type, or do not fit together.
    fn config(&self, config: &HfConfig) -> Result<DecoderConfig>;

    /// The keys of a `config.json` for a model that did not come from one, `architectures` and `model_type` included.
    ///
    /// # Errors
    /// If `config` holds something that this family's `config.json` cannot say.
    fn hf_config(&self, config: &DecoderConfig) -> Result<Map<String, Value>>;

    /// The model's tensors. The default fits every decoder that [`DecoderConfig`] describes in full.
    fn tensors(&self, config: &DecoderConfig) -> Vec<CanonicalTensor> {
        config.tensors()
    }

    /// How the tensors correspond to a Hugging Face checkpoint's.
    fn weights(&self, config: &DecoderConfig) -> WeightMap;
}
