//! The config map. Defaults are those of transformers' `Qwen3Config`.

use bridge_core::DecoderConfig;
use bridge_core::config::{Activation, QkNorm};

use crate::families::keys::{BOS, EOS, LAYERS, ROPE_SCALING, ROPE_THETA, plain_decoder};
use crate::families::qwen_windows::{
    LAYER_TYPES, MAX_WINDOW_LAYERS, SLIDING_WINDOW, USE_SLIDING_WINDOW,
};
use crate::families::spec::{ConfigKey, activation, constant, flag, number, size};

pub(super) fn base() -> DecoderConfig {
    DecoderConfig {
        qk_norm: Some(QkNorm::PerHead),
        ..plain_decoder()
    }
}

pub(super) const MAP: &[ConfigKey] = &[
    size!("hidden_size", hidden_size),
    size!("intermediate_size", intermediate_size),
    LAYERS,
    size!("num_attention_heads", num_attention_heads),
    size!("num_key_value_heads", num_key_value_heads),
    size!("head_dim", head_dim, |_| 128),
    size!("vocab_size", vocab_size),
    size!("max_position_embeddings", max_position_embeddings, |_| {
        32_768
    }),
    activation!("hidden_act", Activation::Silu),
    number!("rms_norm_eps", norm.eps, 1e-6),
    flag!(
        "attention_bias",
        false,
        attention_bias,
        attention_output_bias
    ),
    USE_SLIDING_WINDOW,
    SLIDING_WINDOW,
    MAX_WINDOW_LAYERS,
    LAYER_TYPES,
    ROPE_THETA,
    ROPE_SCALING,
    flag!("tie_word_embeddings", false, tie_word_embeddings),
    number!("initializer_range", initializer_range, 0.02),
    BOS,
    EOS,
    constant!("attention_dropout", 0.0),
    constant!("use_cache", true),
];
