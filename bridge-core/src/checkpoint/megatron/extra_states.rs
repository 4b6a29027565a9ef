//! The `_extra_state` objects, which hold nothing, and without which Megatron-Core does not load.

use super::weights::{MegatronForm, final_norm};
use crate::config::{DecoderConfig, Ffn, LayerConfig, Mixer};

/// The keys of the objects: one for each linear layer, and those that Transformer Engine's layers ask for besides. What a
/// model does not ask for, it passes over.
pub(crate) fn extra_states(config: &DecoderConfig, form: MegatronForm) -> Vec<String> {
    let count = config.layers.len();
    let mut keys = Keys::default();
    for (index, layer) in config.layers.iter().enumerate() {
        let place = if form.layer_names {
            Place::alone(format!("decoder.layers.{index}"))
        } else {
            Place {
                prefix: "decoder.layers".to_owned(),
                stacked: Some((index, count)),
            }
        };
        keys.layer(config, layer, &place);
    }
    for index in 0..config.num_mtp_layers {
        let module = Place::alone(format!("mtp.layers.{index}"));
        keys.push(&module, &["enorm", "hnorm", "eh_proj", "final_layernorm"]);
        let place = Place::alone(format!("{}.{}", module.prefix, form.mtp_layer));
        keys.layer(config, &config.mtp_layer(), &place);
    }
    keys.push(&Place::alone("decoder".to_owned()), &[final_norm(config)]);
    keys.0
        .push("output_layer._extra_state/shard_0_1".to_owned());
    keys.0
}

/// Where a layer is.
struct Place {
    prefix: String,
    /// Its number and that of all, where they are stacked.
    stacked: Option<(usize, usize)>,
}

impl Place {
    fn alone(prefix: String) -> Self {
        Self {
            prefix,
            stacked: None,
        }
    }
}

#[derive(Default)]
struct Keys(Vec<String>);

impl Keys {
    fn push(&mut self, place: &Place, parts: &[&str]) {
        let (at, of) = place.stacked.unwrap_or((0, 1));
        for part in parts {
            let prefix = &place.prefix;
            let key = format!("{prefix}.{part}._extra_state/shard_{at}_{of}");
            self.0.push(key);
        }
    }

    fn layer(&mut self, config: &DecoderConfig, layer: &LayerConfig, place: &Place) {
        match (&layer.mixer, &config.mla) {
            (Mixer::Attention(_), None) => {
                self.push(
                    place,
                    &[
                        "self_attention.linear_qkv",
                        "self_attention.linear_proj",
                        "self_attention.core_attention",
                    ],
                );
                if config.qk_norm.is_some() {
                    let norms = ["self_attention.q_layernorm", "self_attention.k_layernorm"];
                    self.push(place, &norms);
                }
            }
            (Mixer::Attention(_), Some(mla)) => {
                self.push(
                    place,
                    &[
                        "input_layernorm",
                        "self_attention.linear_kv_down_proj",
                        "self_attention.linear_kv_up_proj",
                        "self_attention.linear_proj",
                        "self_attention.core_attention",
                    ],
                );
                let query: &[&str] = match mla.q_lora_rank {
                    Some(_) => &[
                        "self_attention.linear_q_down_proj",
                        "self_attention.linear_q_up_proj",
                    ],
                    None => &["self_attention.linear_q_proj"],
                };
                self.push(place, query);
            }
            (Mixer::Mamba2, _) => self.push(place, &["mixer.in_proj", "mixer.out_proj"]),
            (Mixer::Linear, _) => self.push(place, &["self_attention"]),
            (Mixer::GatedDeltaNet, _) => self.push(
                place,
                &[
                    "self_attention.in_proj",
                    "self_attention.out_norm",
                    "self_attention.out_proj",
                ],
            ),
            (Mixer::None, _) => {}
        }
        if config.attention_output_norm {
            self.push(place, &["self_attention.linear_proj.post_layernorm"]);
        }
        match &layer.ffn {
            Ffn::Moe => self.experts(config, place),
            Ffn::Mlp(_) => self.push(place, &["mlp.linear_fc1", "mlp.linear_fc2"]),
            Ffn::Linear => self.push(place, &["mlp"]),
            Ffn::None => {}
        }
        if config.mlp_output_norm {
            self.push(place, &["mlp.linear_fc2.post_layernorm"]);
        }
    }

    fn experts(&mut self, config: &DecoderConfig, place: &Place) {
        let Some(moe) = &config.moe else { return };
        self.push(place, &["pre_mlp_layernorm"]);
        if moe.shared_intermediate_size.is_some() {
            self.push(
                place,
                &[
                    "mlp.shared_experts.linear_fc1",
                    "mlp.shared_experts.linear_fc2",
                ],
            );
        }
        let (prefix, count) = (&place.prefix, moe.num_experts);
        for linear in ["linear_fc1", "linear_fc2"] {
            for expert in 0..count {
                let shard = match place.stacked {
                    Some((at, of)) => format!("shard_{at}.{expert}_{of}.{count}"),
                    None => format!("shard_{expert}_{count}"),
                };
                self.0.push(format!(
                    "{prefix}.mlp.experts.experts.{linear}._extra_state/{shard}"
                ));
            }
        }
    }
}

/// How many leading dims of a tensor count layers or experts.
pub(crate) fn stacked_dims(name: &str, layer_names: bool) -> usize {
    let layers = usize::from(!layer_names && name.starts_with("decoder.layers."));
    layers + usize::from(name.contains(".mlp.experts.experts."))
}
