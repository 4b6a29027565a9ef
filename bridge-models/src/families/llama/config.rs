//! The config map. Defaults are those of transformers' `LlamaConfig`.

use bridge_core::config::Activation;

use crate::families::keys::{
    BOS, EOS, HEAD_DIM, KEY_VALUE_HEADS, LAYERS, ROPE_SCALING, ROPE_THETA,
};
use crate::families::spec::{ConfigKey, activation, constant, flag, number, size};

pub(super) const MAP: &[ConfigKey] = &[
    size!("hidden_size", hidden_size),
    size!("intermediate_size", intermediate_size),
    LAYERS,
    size!("num_attention_heads", num_attention_heads),
    KEY_VALUE_HEADS,
    HEAD_DIM,
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
    constant!("attention_dropout", 0.0),
    constant!("use_cache", true),
];
