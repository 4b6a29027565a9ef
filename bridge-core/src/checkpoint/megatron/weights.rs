//! How canonical tensors lie in a checkpoint of Megatron-Core's GPT model: one table for all families, since canonical
//! names are the same in all of them.

use serde_json::{Map, Value};

use super::reader::MegatronCheckpoint;
use crate::bridge::{CanonicalTensor, ModelBridge};
use crate::config::{DecoderConfig, Ffn, HfConfig, LayerConfig, Mixer};
use crate::error::{Error, Problems, Result};
use crate::mapping::{Fused, WeightMap};

/// What may differ between checkpoints of one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MegatronForm {
    /// Whether each layer's tensors have names of their own; otherwise those of all layers are stacked along a first
    /// dim.
    pub layer_names: bool,
    /// Whether the norm before a mixture of experts is called `pre_mlp_layernorm`, as Transformer Engine's layers have
    /// it, and not `mlp.linear_fc1.layer_norm`, as Megatron-Core's own have it.
    pub pre_mlp_norm: bool,
    /// Whether the norms of latent attention belong to the projection after them, as Transformer Engine's layers have
    /// it.
    pub fused_latent_norms: bool,
    /// What the decoder layer in a multi-token prediction module is called.
    pub mtp_layer: &'static str,
}

impl MegatronForm {
    /// The form that training runs write: that of Transformer Engine's layers.
    pub fn to_write(config: &DecoderConfig) -> Self {
        Self {
            layer_names: !layers_are_alike(config),
            pre_mlp_norm: true,
            fused_latent_norms: true,
            mtp_layer: "mtp_model_layer",
        }
    }

    /// The form that a checkpoint has.
    pub fn of(checkpoint: &MegatronCheckpoint) -> Self {
        let has = |part: &str| {
            let mut tensors = checkpoint.store().tensors().iter();
            tensors.any(|tensor| tensor.name.contains(part))
        };
        Self {
            layer_names: checkpoint.has_layer_names(),
            pre_mlp_norm: has(".pre_mlp_layernorm."),
            fused_latent_norms: !has(".self_attention.kv_layernorm."),
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

    /// Checks that Megatron-Core's GPT model can hold the model.
    ///
    /// # Errors
    /// [`Error::Plan`] with everything that it cannot.
    pub fn check(&self, config: &DecoderConfig) -> Result<()> {
        let problems = unsupported(config);
        if problems.is_empty() {
            return Ok(());
        }
        let what = format!(
            "a checkpoint of Megatron-Core's GPT model cannot hold this {} model",
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

/// Whether every layer is like every other, so that Megatron-Core stacks them.
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
    config
        .layers
        .windows(2)
        .enumerate()
        .all(|(index, pair)| alike(&pair[0], &pair[1]) && width(index) == width(index + 1))
}

/// What keeps Megatron-Core's GPT model from holding a model, in words.
fn unsupported(config: &DecoderConfig) -> Problems {
    let mut problems = Problems::new();
    for (index, layer) in config.layers.iter().enumerate() {
        if !matches!(layer.mixer, Mixer::Attention(_)) {
            problems.push(format!(
                "layer {index} mixes tokens by {:?}, which its GPT model has no layer for",
                layer.mixer
            ));
        }
        if !matches!(layer.ffn, Ffn::Mlp(_) | Ffn::Moe) {
            problems.push(format!(
                "layer {index} has {:?} in place of an MLP, which its GPT model has no layer for",
                layer.ffn
            ));
        }
    }
    if config
        .moe
        .as_ref()
        .is_some_and(|moe| moe.expert_projection_bias)
    {
        problems.push(
            "its experts have biases, whose place in a Megatron-Core checkpoint is not known here",
        );
    }
    problems
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
        .copy("final_norm.{leaf}", "decoder.final_layernorm.{leaf}");
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

/// One layer, or all of them where they are stacked.
struct Layer<'a> {
    config: &'a DecoderConfig,
    layer: &'a LayerConfig,
    form: MegatronForm,
    /// What canonical and foreign names begin with.
    own: &'a str,
    theirs: &'a str,
    stacked: bool,
}

impl<'a> Layer<'a> {
    fn new(
        config: &'a DecoderConfig,
        layer: &'a LayerConfig,
        form: MegatronForm,
        own: &'a str,
        theirs: &'a str,
        stacked: bool,
    ) -> Self {
        Self {
            config,
            layer,
            form,
            own,
            theirs,
            stacked,
        }
    }

    /// A renamed tensor.
    fn one(&self, map: WeightMap, own: &str, theirs: &str) -> WeightMap {
        let (own, theirs) = (
            format!("{}.{own}", self.own),
            format!("{}.{theirs}", self.theirs),
        );
        if self.stacked {
            map.fuse(Fused::new(&theirs, &[&own]))
        } else {
            map.copy(&own, &theirs)
        }
    }

    /// Tensors that lie in one, along `dim` and in turns of `groups`.
    fn fused(
        &self,
        map: WeightMap,
        parts: &[String],
        theirs: &str,
        dim: usize,
        groups: usize,
    ) -> WeightMap {
        let parts: Vec<String> = parts.iter().map(|p| format!("{}.{p}", self.own)).collect();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let theirs = format!("{}.{theirs}", self.theirs);
        map.fuse(Fused::new(&theirs, &parts).dim(dim).groups(groups))
    }

    fn add_to(&self, mut map: WeightMap) -> WeightMap {
        for leaf in ["weight", "bias"] {
            map = self.attention(map, leaf);
            map = self.one(
                map,
                &format!("attention_output_norm.{leaf}"),
                &format!("self_attention.linear_proj.post_layernorm.{leaf}"),
            );
            map = self.one(
                map,
                &format!("mlp_output_norm.{leaf}"),
                &format!("mlp.linear_fc2.post_layernorm.{leaf}"),
            );
            let separate = self.layer.ffn == Ffn::Moe && self.form.pre_mlp_norm;
            let norm = if separate {
                format!("pre_mlp_layernorm.{leaf}")
            } else {
                format!("mlp.linear_fc1.layer_norm_{leaf}")
            };
            map = self.one(map, &format!("mlp_norm.{leaf}"), &norm);
            map = match self.layer.ffn {
                Ffn::Moe => self.experts(map, leaf),
                _ => self.mlp(map, "mlp", "mlp", leaf),
            };
        }
        self.one(
            map,
            "attention.sinks",
            "self_attention.core_attention.softmax_offset",
        )
    }

    fn attention(&self, mut map: WeightMap, leaf: &str) -> WeightMap {
        map = self.one(
            map,
            &format!("attention.o_proj.{leaf}"),
            &format!("self_attention.linear_proj.{leaf}"),
        );
        if self.config.mla.is_some() {
            return self.latent_attention(map, leaf);
        }
        map = self.one(
            map,
            &format!("input_norm.{leaf}"),
            &format!("self_attention.linear_qkv.layer_norm_{leaf}"),
        );
        for head in ["q", "k"] {
            map = self.one(
                map,
                &format!("attention.{head}_norm.{leaf}"),
                &format!("self_attention.{head}_layernorm.{leaf}"),
            );
        }
        let names: &[&str] = if self.config.attention_output_gate {
            &["q", "gate", "k", "v"]
        } else {
            &["q", "k", "v"]
        };
        let parts: Vec<String> = names
            .iter()
            .map(|name| format!("attention.{name}_proj.{leaf}"))
            .collect();
        let own_heads = match &self.layer.mixer {
            Mixer::Attention(own) => own.num_key_value_heads,
            _ => None,
        };
        // A turn holds the query heads of one group, then its key and value head.
        let groups = own_heads.unwrap_or(self.config.num_key_value_heads);
        let theirs = format!("self_attention.linear_qkv.{leaf}");
        self.fused(map, &parts, &theirs, 0, groups)
    }

    fn latent_attention(&self, mut map: WeightMap, leaf: &str) -> WeightMap {
        map = self.one(
            map,
            &format!("input_norm.{leaf}"),
            &format!("input_layernorm.{leaf}"),
        );
        for (own, theirs) in [
            ("q_proj", "linear_q_proj"),
            ("q_a_proj", "linear_q_down_proj"),
            ("q_b_proj", "linear_q_up_proj"),
            ("kv_a_proj", "linear_kv_down_proj"),
            ("kv_b_proj", "linear_kv_up_proj"),
        ] {
            map = self.one(
                map,
                &format!("attention.{own}.{leaf}"),
                &format!("self_attention.{theirs}.{leaf}"),
            );
        }
        for part in ["q", "kv"] {
            let theirs = if self.form.fused_latent_norms {
                format!("self_attention.linear_{part}_up_proj.layer_norm_{leaf}")
            } else {
                format!("self_attention.{part}_layernorm.{leaf}")
            };
            map = self.one(map, &format!("attention.{part}_a_norm.{leaf}"), &theirs);
        }
        map
    }

    fn mlp(&self, mut map: WeightMap, own: &str, theirs: &str, leaf: &str) -> WeightMap {
        let up = format!("{own}.up_proj.{leaf}");
        let first = format!("{theirs}.linear_fc1.{leaf}");
        map = if self.config.gated_mlp {
            let gate = format!("{own}.gate_proj.{leaf}");
            self.fused(map, &[gate, up], &first, 0, 1)
        } else {
            self.one(map, &up, &first)
        };
        let down = format!("{own}.down_proj.{leaf}");
        self.one(map, &down, &format!("{theirs}.linear_fc2.{leaf}"))
    }

    fn experts(&self, mut map: WeightMap, leaf: &str) -> WeightMap {
        map = self.one(
            map,
            &format!("mlp.router.{leaf}"),
            &format!("mlp.router.{leaf}"),
        );
        if leaf == "weight" {
            map = self.one(map, "mlp.router.correction_bias", "mlp.router.expert_bias");
            map = self.one(
                map,
                "mlp.shared_expert_gate.weight",
                "mlp.shared_experts.gate_weight",
            );
            // [experts, rows, columns] on both sides: rows are along dim 1.
            let up = "mlp.experts.up_proj.weight".to_owned();
            let first = "mlp.experts.experts.linear_fc1.weight";
            map = if self.config.gated_mlp {
                let gate = "mlp.experts.gate_proj.weight".to_owned();
                self.fused(map, &[gate, up], first, 1, 1)
            } else {
                self.one(map, &up, first)
            };
            map = self.one(
                map,
                "mlp.experts.down_proj.weight",
                "mlp.experts.experts.linear_fc2.weight",
            );
        }
        self.mlp(map, "mlp.shared_expert", "mlp.shared_experts", leaf)
    }
}

/// The keys of the `_extra_state` objects, which hold nothing, and without which Megatron-Core does not load: one for
/// each linear layer, and those that Transformer Engine's layers ask for besides.
pub(crate) fn extra_states(config: &DecoderConfig, layer_names: bool) -> Vec<String> {
    let count = config.layers.len();
    let mut keys = Vec::new();
    for (index, layer) in config.layers.iter().enumerate() {
        let (prefix, at, of) = if layer_names {
            (format!("decoder.layers.{index}"), 0, 1)
        } else {
            ("decoder.layers".to_owned(), index, count)
        };
        let mut push = |part: &str| {
            keys.push(format!("{prefix}.{part}._extra_state/shard_{at}_{of}"));
        };
        push("self_attention.linear_proj");
        push("self_attention.core_attention");
        match &config.mla {
            None => push("self_attention.linear_qkv"),
            Some(mla) => {
                push("self_attention.linear_kv_down_proj");
                push("self_attention.linear_kv_up_proj");
                if mla.q_lora_rank.is_some() {
                    push("self_attention.linear_q_down_proj");
                    push("self_attention.linear_q_up_proj");
                } else {
                    push("self_attention.linear_q_proj");
                }
            }
        }
        match (&layer.ffn, &config.moe) {
            (Ffn::Moe, Some(moe)) => {
                if moe.shared_intermediate_size.is_some() {
                    push("mlp.shared_experts.linear_fc1");
                    push("mlp.shared_experts.linear_fc2");
                }
                for linear in ["linear_fc1", "linear_fc2"] {
                    for expert in 0..moe.num_experts {
                        let shard = if layer_names {
                            format!("shard_{expert}_{}", moe.num_experts)
                        } else {
                            format!("shard_{at}.{expert}_{of}.{}", moe.num_experts)
                        };
                        keys.push(format!(
                            "{prefix}.mlp.experts.experts.{linear}._extra_state/{shard}"
                        ));
                    }
                }
            }
            _ => {
                push("mlp.linear_fc1");
                push("mlp.linear_fc2");
            }
        }
    }
    keys
}

/// How many leading dims of a tensor count layers or experts.
pub(crate) fn stacked_dims(name: &str, layer_names: bool) -> usize {
    let layers = usize::from(!layer_names && name.starts_with("decoder.layers."));
    layers + usize::from(name.contains(".mlp.experts.experts."))
}
