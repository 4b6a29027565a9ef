//! The config map. Defaults are those of the published `DeciLMConfig`.

use bridge_core::config::Activation;

use super::blocks;
use crate::families::keys::{BOS, EOS, HEAD_DIM, ROPE_SCALING, ROPE_THETA};
use crate::families::spec::{ConfigKey, activation, constant, flag, number, size};

pub(super) const MAP: &[ConfigKey] = &[
    size!("hidden_size", hidden_size),
    size!("num_attention_heads", num_attention_heads),
    HEAD_DIM,
    ConfigKey {
        key: "block_configs",
        read: blocks::read,
        write: |config| Some(blocks::written(config)),
    },
    ConfigKey {
        key: "num_hidden_layers",
        read: |keys, config| {
            let (stated, listed) = (keys.size_opt("num_hidden_layers"), config.layers.len());
            if let Some(stated) = stated.filter(|stated| *stated != listed) {
                keys.problem(format!(
                    "num_hidden_layers is {stated}, but block_configs lists {listed} layers"
                ));
            }
        },
        write: |config| Some(config.num_hidden_layers.into()),
    },
    size!("vocab_size", vocab_size),
    size!("max_position_embeddings", max_position_embeddings, |_| 2048),
    activation!("hidden_act", Activation::Silu),
    number!("rms_norm_eps", norm.eps, 1e-6),
    flag!(
        "attention_bias",
        false,
        attention_bias,
        attention_output_bias
    ),
    flag!("mlp_bias", false, mlp_bias),
    ROPE_THETA,
    ROPE_SCALING,
    flag!("tie_word_embeddings", false, tie_word_embeddings),
    number!("initializer_range", initializer_range, 0.02),
    BOS,
    EOS,
    // Both are said per layer.
    constant!("intermediate_size", serde_json::Value::Null),
    constant!("num_key_value_heads", serde_json::Value::Null),
    constant!("attention_dropout", 0.0),
    constant!("use_cache", true),
];
