//! The config map. Defaults are those of transformers' `Qwen3NextConfig`.

use bridge_core::DecoderConfig;
use bridge_core::config::{
    Activation, AttentionLayer, ConfigReader, GatedDeltaNetConfig, LayerConfig, Mixer, MoeConfig,
    NormConfig, QkNorm,
};
use serde_json::{Value, json};

use crate::families::keys::{BOS, EOS, LAYERS, ROPE_SCALING, read_rope};
use crate::families::moe_keys::{DENSE_LAYERS, SPARSE_STEP, moe, moe_size, normalize};
use crate::families::spec::{ConfigKey, activation, constant, flag, number, size};

/// A layer with a gated delta net, in `layer_types`.
const LINEAR: &str = "linear_attention";
/// A layer with attention, in `layer_types`.
const FULL: &str = "full_attention";
/// Share of each head that is rotated where the file is silent.
const PARTIAL_ROTARY_FACTOR: f64 = 0.25;

pub(super) fn base() -> DecoderConfig {
    let plain = DecoderConfig::plain();
    DecoderConfig {
        norm: NormConfig {
            unit_offset: true,
            ..plain.norm
        },
        qk_norm: Some(QkNorm::PerHead),
        attention_output_gate: true,
        gated_delta_net: Some(GatedDeltaNetConfig {
            num_key_heads: 0,
            num_value_heads: 0,
            key_head_dim: 0,
            value_head_dim: 0,
            conv_kernel: 0,
        }),
        moe: Some(MoeConfig {
            shared_expert_gate: true,
            ..MoeConfig::plain()
        }),
        ..plain
    }
}

/// A size of the gated delta nets: `delta_net!(key, field, default)`.
macro_rules! delta_net {
    ($key:literal, $field:ident, $default:expr) => {
        ConfigKey {
            key: $key,
            read: |keys, config| {
                if let Some(delta_net) = &mut config.gated_delta_net {
                    delta_net.$field = keys.size_or($key, $default);
                }
            },
            write: |config| {
                let delta_net = config.gated_delta_net.as_ref();
                delta_net.map(|delta_net| delta_net.$field.into())
            },
        }
    };
}

pub(super) const MAP: &[ConfigKey] = &[
    size!("hidden_size", hidden_size, |_| 2048),
    size!("intermediate_size", intermediate_size, |_| 5632),
    LAYERS,
    ConfigKey {
        key: "layer_types",
        read: read_mixers,
        write: |config| {
            let kind = |layer: &LayerConfig| match layer.mixer {
                Mixer::GatedDeltaNet => LINEAR,
                _ => FULL,
            };
            Some(json!(config.layers.iter().map(kind).collect::<Vec<_>>()))
        },
    },
    // For readers that do not know `layer_types`.
    ConfigKey {
        key: "full_attention_interval",
        read: |_, _| (),
        write: |config| interval(config).map(Value::from),
    },
    DENSE_LAYERS,
    SPARSE_STEP,
    size!("num_attention_heads", num_attention_heads, |_| 16),
    size!("num_key_value_heads", num_key_value_heads, |_| 2),
    size!("head_dim", head_dim, |_| 256),
    size!("vocab_size", vocab_size, |_| 151_936),
    size!("max_position_embeddings", max_position_embeddings, |_| {
        32_768
    }),
    delta_net!("linear_num_key_heads", num_key_heads, 16),
    delta_net!("linear_num_value_heads", num_value_heads, 32),
    delta_net!("linear_key_head_dim", key_head_dim, 128),
    delta_net!("linear_value_head_dim", value_head_dim, 128),
    delta_net!("linear_conv_kernel_dim", conv_kernel, 4),
    moe_size!("num_experts", num_experts, 512),
    moe_size!("num_experts_per_tok", num_experts_per_tok, 10),
    moe_size!("moe_intermediate_size", intermediate_size, 512),
    ConfigKey {
        key: "shared_expert_intermediate_size",
        read: |keys, config| {
            moe(config).shared_intermediate_size =
                Some(keys.size_or("shared_expert_intermediate_size", 512));
        },
        write: |config| Some(config.moe.as_ref()?.shared_intermediate_size?.into()),
    },
    normalize!(true),
    activation!("hidden_act", Activation::Silu),
    number!("rms_norm_eps", norm.eps, 1e-6),
    flag!(
        "attention_bias",
        false,
        attention_bias,
        attention_output_bias
    ),
    ConfigKey {
        key: "rope_theta",
        read: |keys, config| read_rope(keys, config, PARTIAL_ROTARY_FACTOR),
        write: |config| config.rope.as_ref().map(|rope| rope.to_hf().0),
    },
    ROPE_SCALING,
    ConfigKey {
        key: "partial_rotary_factor",
        read: |_, _| (),
        write: |config| Some(config.partial_rotary_factor.into()),
    },
    ConfigKey {
        key: "num_nextn_predict_layers",
        read: |keys, config| {
            config.num_mtp_layers = keys.size_or("num_nextn_predict_layers", 0);
            if config.num_mtp_layers > 1 {
                keys.problem(format!(
                    "num_nextn_predict_layers is {}, expected 0 or 1",
                    config.num_mtp_layers
                ));
                config.num_mtp_layers = 1;
            }
        },
        write: |config| (config.num_mtp_layers > 0).then(|| config.num_mtp_layers.into()),
    },
    flag!("tie_word_embeddings", false, tie_word_embeddings),
    number!("initializer_range", initializer_range, 0.02),
    BOS,
    EOS,
    constant!("attention_dropout", 0.0),
    constant!("output_router_logits", false),
    constant!("router_aux_loss_coef", 0.001),
    constant!("use_cache", true),
];

/// Which layers have attention: as `layer_types` says, or every so many as `full_attention_interval` says.
fn read_mixers(keys: &ConfigReader<'_>, config: &mut DecoderConfig) {
    let layers = config.num_hidden_layers;
    let listed = keys.has("layer_types");
    let full: Vec<bool> = if listed {
        let types = keys
            .layer_types(layers, &[LINEAR, FULL])
            .unwrap_or_default();
        types.into_iter().map(|kind| kind == FULL).collect()
    } else {
        let interval = keys.size_or("full_attention_interval", 4);
        if interval == 0 {
            keys.problem("full_attention_interval is 0, expected at least 1");
            return;
        }
        (0..layers)
            .map(|layer| (layer + 1) % interval == 0)
            .collect()
    };
    for (layer, full) in config.layers.iter_mut().zip(full) {
        layer.mixer = if full {
            Mixer::Attention(AttentionLayer::default())
        } else {
            Mixer::GatedDeltaNet
        };
    }
}

/// The distance between layers with attention, if they come at one distance.
fn interval(config: &DecoderConfig) -> Option<usize> {
    let full = |layer: usize| config.layers[layer].mixer != Mixer::GatedDeltaNet;
    let layers = config.layers.len();
    let interval = (0..layers).find(|layer| full(*layer))? + 1;
    (0..layers)
        .all(|layer| full(layer) == ((layer + 1) % interval == 0))
        .then_some(interval)
}
