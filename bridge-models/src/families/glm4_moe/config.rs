//! The config map. Defaults are those of transformers' `Glm4MoeConfig`.

use bridge_core::DecoderConfig;
use bridge_core::config::{Activation, MoeConfig, QkNorm, RouterScoring};

use crate::families::keys::{BOS, EOS, HEAD_DIM, LAYERS, ROPE_SCALING, read_rope};
use crate::families::moe_keys::{
    MTP_LAYERS, SHARED_EXPERTS, TOPK_GROUP, first_dense, grouped, moe_size, normalize,
    read_first_dense, scaling_factor,
};
use crate::families::spec::{ConfigKey, activation, constant, flag, number, size};

pub(super) fn base() -> DecoderConfig {
    let mut moe = MoeConfig::plain();
    moe.router.score = RouterScoring::Sigmoid;
    moe.router.correction_bias = true;
    DecoderConfig {
        partial_rotary_factor: 0.5,
        moe: Some(moe),
        ..DecoderConfig::plain()
    }
}

pub(super) const MAP: &[ConfigKey] = &[
    size!("hidden_size", hidden_size),
    size!("intermediate_size", intermediate_size, |_| 10_944),
    LAYERS,
    FIRST_DENSE,
    size!("num_attention_heads", num_attention_heads),
    size!("num_key_value_heads", num_key_value_heads, |_| 8),
    HEAD_DIM,
    size!("vocab_size", vocab_size),
    size!("max_position_embeddings", max_position_embeddings, |_| {
        131_072
    }),
    moe_size!("n_routed_experts", num_experts, 128),
    moe_size!("num_experts_per_tok", num_experts_per_tok, 8),
    moe_size!("moe_intermediate_size", intermediate_size, 1408),
    SHARED_EXPERTS,
    grouped!([1, 1]),
    TOPK_GROUP,
    normalize!(true),
    scaling_factor!(1.0),
    activation!("hidden_act", Activation::Silu),
    number!("rms_norm_eps", norm.eps, 1e-5),
    flag!("attention_bias", false, attention_bias),
    USE_QK_NORM,
    ROPE_THETA,
    ROPE_SCALING,
    PARTIAL_ROTARY,
    MTP_LAYERS,
    flag!("tie_word_embeddings", false, tie_word_embeddings),
    number!("initializer_range", initializer_range, 0.02),
    BOS,
    EOS,
    constant!("attention_dropout", 0.0),
    constant!("use_cache", true),
];

const FIRST_DENSE: ConfigKey = ConfigKey {
    key: "first_k_dense_replace",
    read: |keys, config| read_first_dense(keys, config, 1),
    write: |config| Some(first_dense(config).into()),
};

const USE_QK_NORM: ConfigKey = ConfigKey {
    key: "use_qk_norm",
    read: |keys, config| {
        config.qk_norm = keys
            .flag_or("use_qk_norm", false)
            .then_some(QkNorm::PerHead);
    },
    write: |config| Some((config.qk_norm == Some(QkNorm::PerHead)).into()),
};

/// `rope_theta`, read with the rest of the rotary embedding; half of each head is rotated where the file says nothing.
const ROPE_THETA: ConfigKey = ConfigKey {
    key: "rope_theta",
    read: |keys, config| read_rope(keys, config, 0.5),
    write: |config| config.rope.as_ref().map(|rope| rope.to_hf().0),
};

const PARTIAL_ROTARY: ConfigKey = ConfigKey {
    key: "partial_rotary_factor",
    read: |_, _| (),
    write: |config| Some(config.partial_rotary_factor.into()),
};
