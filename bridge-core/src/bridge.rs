//! What a model family tells this crate: how to read its config, which tensors it has, and how they are called
//! elsewhere.
//!
//! # Adding a model
//!
//! Say a research model is a plain decoder, but its files fuse q, k and v into one tensor (grouped by key-value head),
//! store the MLP's output projection transposed, and use names of their own. That is one [`ModelBridge`]:
//!
//! ```
//! use bridge_core::config::{Activation, DecoderConfig, LayerConfig, NormConfig, RopeDefaults};
//! use bridge_core::dtype::DType;
//! use bridge_core::mapping::Fused;
//! use bridge_core::plan::plan_from_shapes;
//! use bridge_core::{HfConfig, LayoutSpec, ModelBridge, Registry, Result, WeightMap};
//! use serde_json::{Map, Value, json};
//!
//! struct Heron;
//!
//! impl ModelBridge for Heron {
//!     fn name(&self) -> &'static str {
//!         "heron"
//!     }
//!
//!     fn architectures(&self) -> &'static [&'static str] {
//!         &["HeronForCausalLM"]
//!     }
//!
//!     fn config(&self, config: &HfConfig) -> Result<DecoderConfig> {
//!         let keys = config.reader();
//!         let (layers, heads) = (keys.num_layers("num_hidden_layers"), keys.size("num_attention_heads"));
//!         let max_position_embeddings = keys.size("max_position_embeddings");
//!         let (rope, partial_rotary_factor) = keys.rope(RopeDefaults::new(max_position_embeddings));
//!         let typed = DecoderConfig {
//!             hidden_size: keys.size("hidden_size"),
//!             intermediate_size: keys.size("intermediate_size"),
//!             num_hidden_layers: layers,
//!             num_attention_heads: heads,
//!             num_key_value_heads: keys.size_or("num_key_value_heads", heads),
//!             head_dim: keys.size("head_dim"),
//!             vocab_size: keys.size("vocab_size"),
//!             max_position_embeddings,
//!             norm: NormConfig { eps: keys.number_or("rms_norm_eps", 1e-6), ..DecoderConfig::plain().norm },
//!             activation: keys.activation_or("hidden_act", Activation::Silu),
//!             rope: Some(rope),
//!             partial_rotary_factor,
//!             layers: vec![LayerConfig::dense(); layers],
//!             tie_word_embeddings: keys.flag_or("tie_word_embeddings", false),
//!             initializer_range: keys.number_or("initializer_range", 0.02),
//!             bos_token_id: keys.token_id("bos_token_id"),
//!             eos_token_ids: keys.token_ids("eos_token_id"),
//!             ..DecoderConfig::plain()
//!         };
//!         keys.finish()?; // everything missing or wrong, in one error
//!         typed.validate(config.origin())?;
//!         Ok(typed)
//!     }
//!
//!     fn hf_config(&self, config: &DecoderConfig) -> Result<Map<String, Value>> {
//!         let (mut keys, rope) = (Map::new(), config.rope.as_ref().map(|rope| rope.to_hf()));
//!         let (theta, scaling) = rope.unwrap_or_default();
//!         for (key, value) in [
//!             ("architectures", json!(["HeronForCausalLM"])),
//!             ("model_type", json!("heron")),
//!             ("hidden_size", json!(config.hidden_size)),
//!             ("rope_theta", theta),
//!             ("rope_scaling", scaling),
//!             // ... and so on for the other keys that `config` reads.
//!         ] {
//!             keys.insert(key.to_owned(), value);
//!         }
//!         Ok(keys)
//!     }
//!
//!     // One line per kind of tensor, read in both directions.
//!     fn weights(&self, config: &DecoderConfig) -> WeightMap {
//!         let qkv = [
//!             "layers.{l}.attention.q_proj.weight",
//!             "layers.{l}.attention.k_proj.weight",
//!             "layers.{l}.attention.v_proj.weight",
//!         ];
//!         WeightMap::new()
//!             .copy("embedding.weight", "wte")
//!             .copy("final_norm.weight", "out_norm.gain")
//!             .copy("lm_head.weight", "head")
//!             .copy("layers.{l}.input_norm.weight", "blocks.{l}.norm1.gain")
//!             .copy("layers.{l}.mlp_norm.weight", "blocks.{l}.norm2.gain")
//!             .fuse(Fused::new("blocks.{l}.qkv", &qkv).groups(config.num_key_value_heads))
//!             .copy("layers.{l}.attention.o_proj.weight", "blocks.{l}.attn_out")
//!             .copy("layers.{l}.mlp.{p:gate|up}_proj.weight", "blocks.{l}.mlp.{p:gate|up}")
//!             .map("layers.{l}.mlp.down_proj.weight", "blocks.{l}.mlp.down", |view| view.transpose(0, 1))
//!             .tied("lm_head.weight", "embedding.weight", config.tie_word_embeddings)
//!             .ignore("blocks.{l}.rope.freqs", "recomputed from rope_theta")
//!     }
//! }
//!
//! let mut registry = Registry::new();
//! registry.register(&Heron);
//! let config = HfConfig::from_slice(
//!     br#"{"architectures": ["HeronForCausalLM"], "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
//!          "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 131,
//!          "max_position_embeddings": 64}"#,
//!     "config.json",
//! )?;
//! let bridge = registry.detect(&config)?;
//! // The plan proves that every element of every tensor is met exactly once, and says what each rank reads.
//! let plan = plan_from_shapes(bridge, &config, DType::BF16, &LayoutSpec::tp_pp(2, 1))?;
//! assert_eq!(plan.parameters, 84_336);
//! let qkv = plan.mapping().foreign_index("blocks.0.qkv").map(|index| &plan.mapping().foreign[index].shape);
//! assert_eq!(qkv, Some(&vec![(6 + 2 + 2) * 16, 48]));
//! println!("{plan}");
//! # Ok::<(), bridge_core::Error>(())
//! ```
//!
//! [`crate::convert::import`] and [`crate::convert::export`] take it from there. A model that is no plain decoder lists
//! its own tensors in [`ModelBridge::tensors`].

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
        Self {
            name,
            shape: shape.into(),
            shard,
            place,
        }
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
    let layer = name
        .strip_prefix("layers.")
        .and_then(|rest| rest.split_once('.'))
        .and_then(|(l, _)| l.parse().ok());
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
