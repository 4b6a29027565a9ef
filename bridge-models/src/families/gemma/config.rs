//! The config map. Defaults are those of transformers' `GemmaConfig`.

use bridge_core::DecoderConfig;
use bridge_core::config::{Activation, ConfigReader};

use crate::families::keys::{
    BOS, CAUSAL_ONLY, EOS, LAYERS, ROPE_SCALING, ROPE_THETA, SCALED_HIDDEN_SIZE, plain_decoder,
};
use crate::families::spec::{ConfigKey, constant, flag, number, size};

pub(super) fn base() -> DecoderConfig {
    let mut config = plain_decoder();
    config.norm.unit_offset = true;
    config.activation = Activation::GeluTanh;
    config
}

pub(super) const MAP: &[ConfigKey] = &[
    SCALED_HIDDEN_SIZE,
    size!("intermediate_size", intermediate_size),
    LAYERS,
    size!("num_attention_heads", num_attention_heads),
    size!("num_key_value_heads", num_key_value_heads),
    size!("head_dim", head_dim, |_| 256),
    size!("vocab_size", vocab_size),
    size!("max_position_embeddings", max_position_embeddings, |_| 8192),
    // The first published files say "gelu" under `hidden_act` and mean the tanh approximation; later ones set them
    // right under `hidden_activation`.
    ConfigKey {
        key: "hidden_act",
        read: read_activation,
        write: |config| Some(config.activation.hf_name().into()),
    },
    ConfigKey {
        key: "hidden_activation",
        read: |_, _| (),
        write: |config| Some(config.activation.hf_name().into()),
    },
    number!("rms_norm_eps", norm.eps, 1e-6),
    flag!(
        "attention_bias",
        false,
        attention_bias,
        attention_output_bias
    ),
    CAUSAL_ONLY,
    ROPE_THETA,
    ROPE_SCALING,
    flag!("tie_word_embeddings", true, tie_word_embeddings),
    number!("initializer_range", initializer_range, 0.02),
    BOS,
    EOS,
    constant!("attention_dropout", 0.0),
    constant!("use_cache", true),
];

fn read_activation(keys: &ConfigReader<'_>, config: &mut DecoderConfig) {
    let key = if keys.has("hidden_activation") {
        "hidden_activation"
    } else {
        "hidden_act"
    };
    config.activation = match keys.activation_or(key, Activation::GeluTanh) {
        Activation::Gelu => Activation::GeluTanh,
        other => other,
    };
}
