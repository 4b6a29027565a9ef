//! The config map. Defaults are those of transformers' `DeepseekV3Config`.

use bridge_core::DecoderConfig;
use bridge_core::config::{Activation, MoeConfig, RopeStyle, RouterScoring};
use serde_json::json;

use crate::families::keys::{BOS, EOS, KEY_VALUE_HEADS, LAYERS, ROPE_SCALING};
use crate::families::moe_keys::{
    MLA_ROPE_THETA, MTP_LAYERS, Q_LORA_RANK, SHARED_EXPERTS, SIGMOID, TOPK_GROUP, TOPK_METHOD,
    first_dense, grouped, mla, mla_size, moe_size, normalize, read_first_dense, scaling_factor,
};
use crate::families::spec::{ConfigKey, activation, constant, flag, number, size};

pub(super) fn base() -> DecoderConfig {
    let mut moe = MoeConfig::plain();
    moe.router.score = RouterScoring::Sigmoid;
    moe.router.correction_bias = true;
    let mut config = DecoderConfig {
        rope_style: RopeStyle::Pairs,
        moe: Some(moe),
        ..DecoderConfig::plain()
    };
    mla(&mut config);
    config
}

pub(super) const MAP: &[ConfigKey] = &[
    size!("hidden_size", hidden_size),
    size!("intermediate_size", intermediate_size, |_| 18_432),
    LAYERS,
    FIRST_DENSE,
    size!("num_attention_heads", num_attention_heads),
    KEY_VALUE_HEADS,
    Q_LORA_RANK,
    mla_size!("kv_lora_rank", kv_lora_rank, 512),
    mla_size!("qk_nope_head_dim", qk_nope_head_dim, 128),
    mla_size!("qk_rope_head_dim", qk_rope_head_dim, 64),
    mla_size!("v_head_dim", v_head_dim, 128),
    size!("vocab_size", vocab_size),
    size!("max_position_embeddings", max_position_embeddings, |_| 4096),
    moe_size!("n_routed_experts", num_experts, 256),
    moe_size!("num_experts_per_tok", num_experts_per_tok, 8),
    moe_size!("moe_intermediate_size", intermediate_size, 2048),
    SHARED_EXPERTS,
    grouped!([8, 4]),
    TOPK_GROUP,
    TOPK_METHOD,
    SIGMOID,
    normalize!(true),
    scaling_factor!(2.5),
    activation!("hidden_act", Activation::Silu),
    number!("rms_norm_eps", norm.eps, 1e-6),
    flag!(
        "attention_bias",
        false,
        attention_bias,
        attention_output_bias
    ),
    MLA_ROPE_THETA,
    ROPE_SCALING,
    INTERLEAVE,
    MTP_LAYERS,
    flag!("tie_word_embeddings", false, tie_word_embeddings),
    number!("initializer_range", initializer_range, 0.02),
    BOS,
    EOS,
    constant!("attention_dropout", 0.0),
    constant!("moe_layer_freq", 1),
    constant!("aux_loss_alpha", 0.001),
    constant!("seq_aux", true),
    constant!("use_cache", true),
];

const FIRST_DENSE: ConfigKey = ConfigKey {
    key: "first_k_dense_replace",
    read: |keys, config| read_first_dense(keys, config, 3),
    write: |config| Some(first_dense(config).into()),
};

/// `rope_interleave`, which files leave out where it is true: neighbouring elements are rotated together.
const INTERLEAVE: ConfigKey = ConfigKey {
    key: "rope_interleave",
    read: |keys, config| {
        config.rope_style = if keys.flag_or("rope_interleave", true) {
            RopeStyle::Pairs
        } else {
            RopeStyle::Halves
        };
    },
    write: |config| Some(json!(config.rope_style == RopeStyle::Pairs)),
};
