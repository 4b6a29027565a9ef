//! The config map. Defaults are those of transformers' `Gemma2Config`.

use bridge_core::DecoderConfig;
use bridge_core::config::{Activation, LayerRope};

use crate::families::keys::{
    BOS, CAUSAL_ONLY, EOS, LAYERS, QUERY_SCALAR, ROPE_SCALING, ROPE_THETA, SCALED_HIDDEN_SIZE,
    plain_decoder, read_softcap,
};
use crate::families::spec::{ConfigKey, activation, constant, flag, number, size};
use crate::families::windows::{layer_types, set_windows, sliding_layers, window, window_of};

pub(super) fn base() -> DecoderConfig {
    let mut config = plain_decoder();
    config.norm.unit_offset = true;
    config.attention_output_norm = true;
    config.mlp_output_norm = true;
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
    activation!("hidden_activation", Activation::GeluTanh),
    number!("rms_norm_eps", norm.eps, 1e-6),
    flag!(
        "attention_bias",
        false,
        attention_bias,
        attention_output_bias
    ),
    CAUSAL_ONLY,
    QUERY_SCALAR,
    ConfigKey {
        key: "attn_logit_softcapping",
        read: |keys, config| {
            config.attention_softcap = read_softcap(keys, "attn_logit_softcapping", Some(50.0))
        },
        write: |config| Some(config.attention_softcap.into()),
    },
    ConfigKey {
        key: "final_logit_softcapping",
        read: |keys, config| {
            config.final_logit_softcap = read_softcap(keys, "final_logit_softcapping", Some(30.0))
        },
        write: |config| Some(config.final_logit_softcap.into()),
    },
    // Layers 0, 2, 4, .. slide unless the file says which do.
    ConfigKey {
        key: "sliding_window",
        read: |keys, config| {
            let sliding = sliding_layers(keys, config, |layer| layer % 2 == 0);
            if sliding.contains(&true) {
                let window = window(keys, 4096);
                set_windows(config, &sliding, window, LayerRope::Global);
            }
        },
        write: |config| Some(window_of(config).into()),
    },
    ConfigKey {
        key: "layer_types",
        read: |_, _| (),
        write: |config| Some(layer_types(config)),
    },
    ROPE_THETA,
    ROPE_SCALING,
    flag!("tie_word_embeddings", true, tie_word_embeddings),
    number!("initializer_range", initializer_range, 0.02),
    BOS,
    EOS,
    constant!("attention_dropout", 0.0),
    constant!("use_cache", true),
];
