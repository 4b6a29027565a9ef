//! The config map. Defaults are those of transformers' `Qwen3MoeConfig`.

use bridge_core::DecoderConfig;
use bridge_core::config::{Activation, MoeConfig, QkNorm};
use serde_json::json;

use crate::families::keys::{BOS, EOS, HEAD_DIM, LAYERS, ROPE_SCALING, ROPE_THETA};
use crate::families::moe_keys::{DENSE_LAYERS, NUM_EXPERTS, SPARSE_STEP, moe_size, normalize};
use crate::families::spec::{ConfigKey, activation, constant, flag, number, size};

pub(super) fn base() -> DecoderConfig {
    DecoderConfig {
        qk_norm: Some(QkNorm::PerHead),
        moe: Some(MoeConfig::plain()),
        ..DecoderConfig::plain()
    }
}

pub(super) const MAP: &[ConfigKey] = &[
    size!("hidden_size", hidden_size),
    size!("intermediate_size", intermediate_size, |_| 6144),
    LAYERS,
    DENSE_LAYERS,
    SPARSE_STEP,
    size!("num_attention_heads", num_attention_heads),
    size!("num_key_value_heads", num_key_value_heads, |_| 4),
    HEAD_DIM,
    size!("vocab_size", vocab_size),
    size!("max_position_embeddings", max_position_embeddings, |_| {
        32_768
    }),
    NUM_EXPERTS,
    moe_size!("num_experts_per_tok", num_experts_per_tok, 8),
    moe_size!("moe_intermediate_size", intermediate_size, 768),
    normalize!(false),
    activation!("hidden_act", Activation::Silu),
    number!("rms_norm_eps", norm.eps, 1e-6),
    flag!(
        "attention_bias",
        false,
        attention_bias,
        attention_output_bias
    ),
    NO_WINDOW,
    ROPE_THETA,
    ROPE_SCALING,
    flag!("tie_word_embeddings", false, tie_word_embeddings),
    number!("initializer_range", initializer_range, 0.02),
    BOS,
    EOS,
    constant!("attention_dropout", 0.0),
    constant!("output_router_logits", false),
    constant!("router_aux_loss_coef", 0.001),
    constant!("use_cache", true),
];

/// No published checkpoint has windows, and the reference implementation and its config disagree on which layers would.
const NO_WINDOW: ConfigKey = ConfigKey {
    key: "use_sliding_window",
    read: |keys, _| {
        if keys.flag_or("use_sliding_window", false) {
            keys.problem("use_sliding_window is true; only full attention is supported");
        }
    },
    write: |_| Some(json!(false)),
};
