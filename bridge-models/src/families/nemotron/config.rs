//! The config map. Defaults are those of transformers' `NemotronConfig`.

use bridge_core::DecoderConfig;
use bridge_core::config::{Activation, NormConfig, NormKind};

use crate::families::keys::{
    BOS, EOS, HEAD_DIM, KEY_VALUE_HEADS, LAYERS, ROPE_SCALING, plain_decoder, read_rope,
};
use crate::families::spec::{ConfigKey, activation, constant, flag, number, size};

/// Share of each head that is rotated where the file is silent.
const PARTIAL_ROTARY_FACTOR: f64 = 0.5;

pub(super) fn base() -> DecoderConfig {
    DecoderConfig {
        norm: NormConfig {
            kind: NormKind::LayerNorm,
            eps: 1e-5,
            unit_offset: true,
            bias: true,
        },
        gated_mlp: false,
        ..plain_decoder()
    }
}

pub(super) const MAP: &[ConfigKey] = &[
    size!("hidden_size", hidden_size),
    size!("intermediate_size", intermediate_size),
    LAYERS,
    size!("num_attention_heads", num_attention_heads),
    KEY_VALUE_HEADS,
    HEAD_DIM,
    size!("vocab_size", vocab_size),
    size!("max_position_embeddings", max_position_embeddings, |_| 4096),
    activation!("hidden_act", Activation::Relu2),
    number!("norm_eps", norm.eps, 1e-5),
    flag!(
        "attention_bias",
        false,
        attention_bias,
        attention_output_bias
    ),
    flag!("mlp_bias", false, mlp_bias),
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
    flag!("tie_word_embeddings", false, tie_word_embeddings),
    number!("initializer_range", initializer_range, 0.0134),
    BOS,
    EOS,
    constant!("attention_dropout", 0.0),
    constant!("use_cache", true),
];
