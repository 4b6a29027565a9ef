//! The config map. Defaults are those of transformers' `MistralConfig`.

use bridge_core::DecoderConfig;
use bridge_core::config::{Activation, LayerRope};

use crate::families::keys::{BOS, EOS, HEAD_DIM, LAYERS, ROPE_SCALING, ROPE_THETA, plain_decoder};
use crate::families::spec::{ConfigKey, activation, constant, flag, number, size};
use crate::families::windows::{set_windows, window_of};

pub(super) fn base() -> DecoderConfig {
    plain_decoder()
}

pub(super) const MAP: &[ConfigKey] = &[
    size!("hidden_size", hidden_size),
    size!("intermediate_size", intermediate_size),
    LAYERS,
    size!("num_attention_heads", num_attention_heads),
    size!("num_key_value_heads", num_key_value_heads),
    HEAD_DIM,
    size!("vocab_size", vocab_size),
    size!("max_position_embeddings", max_position_embeddings, |_| {
        131_072
    }),
    activation!("hidden_act", Activation::Silu),
    number!("rms_norm_eps", norm.eps, 1e-6),
    // In all layers or, where null, in none.
    ConfigKey {
        key: "sliding_window",
        read: |keys, config| {
            if !keys.is_null("sliding_window") {
                let window = keys.size_or("sliding_window", 4096);
                set_windows(
                    config,
                    &vec![true; config.num_hidden_layers],
                    window,
                    LayerRope::Global,
                );
            }
        },
        write: |config| Some(window_of(config).into()),
    },
    ROPE_THETA,
    ROPE_SCALING,
    flag!("tie_word_embeddings", false, tie_word_embeddings),
    number!("initializer_range", initializer_range, 0.02),
    BOS,
    EOS,
    constant!("attention_dropout", 0.0),
    constant!("use_cache", true),
];
