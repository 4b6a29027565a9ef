//! The config map. Defaults are those of transformers' `OlmoeConfig`.

use bridge_core::DecoderConfig;
use bridge_core::config::{Activation, MoeConfig, QkNorm};

use crate::families::keys::{
    BOS, EOS, HEAD_DIM, KEY_VALUE_HEADS, LAYERS, ROPE_SCALING, ROPE_THETA,
};
use crate::families::moe_keys::{moe, moe_size, normalize, set_first_dense};
use crate::families::spec::{ConfigKey, activation, constant, flag, number, size};

pub(super) fn base() -> DecoderConfig {
    DecoderConfig {
        qk_norm: Some(QkNorm::FullWidth),
        moe: Some(MoeConfig::plain()),
        ..DecoderConfig::plain()
    }
}

pub(super) const MAP: &[ConfigKey] = &[
    size!("hidden_size", hidden_size),
    EXPERT_SIZE,
    LAYERS,
    size!("num_attention_heads", num_attention_heads),
    KEY_VALUE_HEADS,
    HEAD_DIM,
    size!("vocab_size", vocab_size),
    size!("max_position_embeddings", max_position_embeddings, |_| 4096),
    NUM_EXPERTS,
    moe_size!("num_experts_per_tok", num_experts_per_tok, 8),
    normalize!(false),
    activation!("hidden_act", Activation::Silu),
    number!("rms_norm_eps", norm.eps, 1e-5),
    flag!(
        "attention_bias",
        false,
        attention_bias,
        attention_output_bias
    ),
    NO_CLIPPING,
    ROPE_THETA,
    ROPE_SCALING,
    flag!("tie_word_embeddings", false, tie_word_embeddings),
    number!("initializer_range", initializer_range, 0.02),
    BOS,
    EOS,
    constant!("attention_dropout", 0.0),
    constant!("output_router_logits", false),
    constant!("router_aux_loss_coef", 0.01),
    constant!("use_cache", true),
];

/// `intermediate_size` is that of an expert; no layer has a plain MLP.
const EXPERT_SIZE: ConfigKey = ConfigKey {
    key: "intermediate_size",
    read: |keys, config| {
        config.intermediate_size = keys.size("intermediate_size");
        moe(config).intermediate_size = config.intermediate_size;
    },
    write: |config| config.moe.as_ref().map(|moe| moe.intermediate_size.into()),
};

const NUM_EXPERTS: ConfigKey = ConfigKey {
    key: "num_experts",
    read: |keys, config| {
        let count = keys.size_opt("num_experts");
        moe(config).num_experts = count.unwrap_or_else(|| keys.size_or("num_local_experts", 64));
        set_first_dense(config, 0);
    },
    write: |config| config.moe.as_ref().map(|moe| moe.num_experts.into()),
};

/// `clip_qkv` is null in the published checkpoints.
const NO_CLIPPING: ConfigKey = ConfigKey {
    key: "clip_qkv",
    read: |keys, _| {
        if let Some(limit) = keys.number_opt("clip_qkv") {
            keys.problem(format!(
                "clip_qkv is {limit}; clipped queries, keys and values are not supported"
            ));
        }
    },
    write: |_| Some(serde_json::Value::Null),
};
