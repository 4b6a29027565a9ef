//! How canonical tensors lie in a checkpoint of Megatron-Core's models: one table for all families, since canonical names
//! are the same in all of them.

use serde_json::{Map, Value};

use super::layer::Layer;
use super::reader::MegatronCheckpoint;
use crate::bridge::{CanonicalTensor, ModelBridge};
use crate::config::{DecoderConfig, Ffn, HfConfig, LayerConfig, Mixer};
use crate::error::{Error, Problems, Result};
use crate::mapping::WeightMap;

/// What may differ between checkpoints of one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MegatronForm {
    /// Whether each layer's tensors have names of their own; otherwise those of all layers are stacked along a first
    /// dim.
    pub layer_names: bool,
    /// Whether the norm before a mixture of experts is called `pre_mlp_layernorm`, as Transformer Engine's layers have
    /// it, and not `mlp.linear_fc1.layer_norm`, as Megatron-Core's own have it.
    pub pre_mlp_norm: bool,
    /// The same for the norm before a dense MLP, which Megatron-Core's own layers with latent attention call so, and
    /// Transformer Engine's do not.
    pub pre_dense_norm: bool,
    /// Whether the norm of a layer with a state space belongs to the projection after it, as Transformer Engine's layers
    /// have it.
    pub fused_mixer_norm: bool,
    /// Whether the norms of latent attention belong to the projection after them, as Transformer Engine's layers have
    /// it.
    pub fused_latent_norms: bool,
    /// Whether each expert's tensors have names of their own, and the halves of a gated MLP's first projection too, as
    /// `singleton_local_shards` has Megatron-Core save them; otherwise experts are stacked and halves lie in one tensor.
    pub singleton_shards: bool,
    /// What the decoder layer in a multi-token prediction module is called.
    pub mtp_layer: &'static str,
}

impl MegatronForm {
    /// The form that training runs write: that of Transformer Engine's layers.
    pub fn to_write(config: &DecoderConfig) -> Self {
        Self {
            layer_names: !layers_are_alike(config),
            pre_mlp_norm: true,
            pre_dense_norm: false,
            fused_mixer_norm: true,
            fused_latent_norms: true,
            singleton_shards: false,
            mtp_layer: "mtp_model_layer",
        }
    }

    /// The form that a checkpoint has.
    pub fn of(checkpoint: &MegatronCheckpoint) -> Self {
        let has = |part: &str| {
            let mut tensors = checkpoint.store().tensors().iter();
            tensors.any(|tensor| tensor.name.contains(part))
        };
        let pre_dense_norm = checkpoint.store().tensors().iter().any(|tensor| {
            let layer = tensor.name.strip_suffix(".pre_mlp_layernorm.weight");
            layer.is_some_and(|layer| {
                let dense = format!("{layer}.mlp.linear_fc1.weight");
                checkpoint.store().get(&dense).is_some()
            })
        });
        Self {
            layer_names: checkpoint.has_layer_names(),
            pre_mlp_norm: has(".pre_mlp_layernorm."),
            pre_dense_norm,
            fused_mixer_norm: !has(".mixer.") || has(".mixer.in_proj.layer_norm_"),
            fused_latent_norms: !has(".self_attention.kv_layernorm."),
            singleton_shards: has(".linear_fc1.weight_w")
                || has(".mlp.experts.experts.0.linear_fc1."),
            mtp_layer: if has(".transformer_layer.") {
                "transformer_layer"
            } else {
                "mtp_model_layer"
            },
        }
    }
}

/// A family with its weights where Megatron-Core puts them.
pub struct MegatronBridge<'a> {
    family: &'a dyn ModelBridge,
    form: MegatronForm,
}

impl<'a> MegatronBridge<'a> {
    /// `family` in a checkpoint of the given form.
    pub fn new(family: &'a dyn ModelBridge, form: MegatronForm) -> Self {
        Self { family, form }
    }

    /// Checks that a model of Megatron-Core can hold the weights.
    ///
    /// # Errors
    /// [`Error::Plan`] with everything that it cannot.
    pub fn check(&self, config: &DecoderConfig) -> Result<()> {
        let problems = unsupported(config);
        if problems.is_empty() {
            return Ok(());
        }
        let what = format!(
            "a Megatron-Core checkpoint cannot hold this {} model",
            self.family.name()
        );
        Err(Error::Plan { what, problems })
    }
}

impl ModelBridge for MegatronBridge<'_> {
    fn name(&self) -> &'static str {
        self.family.name()
    }

    fn architectures(&self) -> &'static [&'static str] {
        self.family.architectures()
    }

    fn config(&self, config: &HfConfig) -> Result<DecoderConfig> {
        self.family.config(config)
    }

    fn hf_config(&self, config: &DecoderConfig) -> Result<Map<String, Value>> {
        self.family.hf_config(config)
    }

    fn tensors(&self, config: &DecoderConfig) -> Vec<CanonicalTensor> {
        self.family.tensors(config)
    }

    fn weights(&self, config: &DecoderConfig) -> WeightMap {
        megatron_weights(config, self.form)
    }
}

/// Whether every layer is like every other, so that Megatron-Core stacks them. A model of layers with one part each is
/// built by its hybrid model, which never does.
pub fn layers_are_alike(config: &DecoderConfig) -> bool {
    let heads = |layer: &LayerConfig| match &layer.mixer {
        Mixer::Attention(own) => own.num_key_value_heads,
        _ => None,
    };
    let alike = |a: &LayerConfig, b: &LayerConfig| {
        std::mem::discriminant(&a.mixer) == std::mem::discriminant(&b.mixer)
            && std::mem::discriminant(&a.ffn) == std::mem::discriminant(&b.ffn)
            && heads(a) == heads(b)
    };
    let width = |layer: usize| config.mlp_intermediate_size(layer);
    let pairs = config.layers.windows(2).enumerate();
    !is_hybrid(config)
        && pairs
            .into_iter()
            .all(|(index, pair)| alike(&pair[0], &pair[1]) && width(index) == width(index + 1))
}

/// Whether it is Megatron-Core's hybrid model that has such layers, and not its GPT model: layers of one part each, some
/// of them state spaces.
pub(super) fn is_hybrid(config: &DecoderConfig) -> bool {
    let mut layers = config.layers.iter();
    layers.any(|layer| layer.mixer == Mixer::Mamba2)
}

/// What keeps Megatron-Core's models from holding a model, in words.
fn unsupported(config: &DecoderConfig) -> Problems {
    let mut problems = Problems::new();
    let hybrid = is_hybrid(config);
    for (index, layer) in config.layers.iter().enumerate() {
        if hybrid && layer.mixer != Mixer::None && layer.ffn != Ffn::None {
            problems.push(format!(
                "layer {index} has two parts, but a layer of its hybrid model, which alone has state spaces, has one"
            ));
        }
    }
    if config
        .mamba2
        .as_ref()
        .is_some_and(|mamba2| mamba2.proj_bias)
    {
        problems.push(
            "its state spaces have biases on their projections, which Megatron-Core keeps in an order that depends on \
             the number of ranks that wrote it",
        );
    }
    if config
        .mamba2
        .as_ref()
        .is_some_and(|mamba2| !mamba2.conv_bias)
    {
        problems.push(
            "its state spaces have convolutions without biases, and Megatron-Core's have them",
        );
    }
    problems
}

/// What the norm after the last layer is called.
pub(super) fn final_norm(config: &DecoderConfig) -> &'static str {
    if is_hybrid(config) {
        "final_norm"
    } else {
        "final_layernorm"
    }
}

/// The weight map between canonical tensors and a Megatron-Core checkpoint.
pub fn megatron_weights(config: &DecoderConfig, form: MegatronForm) -> WeightMap {
    let mut map = WeightMap::new()
        .copy("embedding.weight", "embedding.word_embeddings.weight")
        .copy("lm_head.weight", "output_layer.weight")
        .tied(
            "lm_head.weight",
            "embedding.weight",
            config.tie_word_embeddings,
        )
        .copy(
            "final_norm.{leaf}",
            &format!("decoder.{}.{{leaf}}", final_norm(config)),
        );
    if form.layer_names {
        for (index, layer) in config.layers.iter().enumerate() {
            let (own, theirs) = (format!("layers.{index}"), format!("decoder.layers.{index}"));
            map = Layer::new(config, layer, form, &own, &theirs, false).add_to(map);
        }
    } else if let Some(layer) = config.layers.first() {
        map = Layer::new(config, layer, form, "layers.{l}", "decoder.layers", true).add_to(map);
    }
    for (own, theirs) in [
        ("embedding_norm", "enorm"),
        ("hidden_norm", "hnorm"),
        ("proj", "eh_proj"),
        ("final_norm", "final_layernorm"),
    ] {
        let (own, theirs) = (
            format!("mtp.{{l}}.{own}.{{leaf}}"),
            format!("mtp.layers.{{l}}.{theirs}.{{leaf}}"),
        );
        map = map.copy(&own, &theirs);
    }
    let layer = config.mtp_layer();
    let theirs = format!("mtp.layers.{{l}}.{}", form.mtp_layer);
    Layer::new(config, &layer, form, "mtp.{l}.layer", &theirs, false).add_to(map)
}
