//! The config map. Defaults are those of transformers' `DeepseekV2Config`.

use bridge_core::DecoderConfig;
use bridge_core::config::{Activation, GroupScoring, MoeConfig, RopeStyle};
use serde_json::json;

use crate::families::keys::{BOS, EOS, KEY_VALUE_HEADS, LAYERS, ROPE_SCALING};
use crate::families::moe_keys::{
    FIRST_DENSE, MLA_ROPE_THETA, Q_LORA_RANK, SHARED_EXPERTS, TOPK_GROUP, expect_text, mla,
    mla_size, moe, moe_size, n_group, read_groups, scaling_factor,
};
use crate::families::spec::{ConfigKey, activation, constant, flag, number, size};

pub(super) fn base() -> DecoderConfig {
    let mut config = DecoderConfig {
        rope_style: RopeStyle::Pairs,
        moe: Some(MoeConfig::plain()),
        ..DecoderConfig::plain()
    };
    mla(&mut config);
    config
}

pub(super) const MAP: &[ConfigKey] = &[
    size!("hidden_size", hidden_size),
    size!("intermediate_size", intermediate_size, |_| 11_008),
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
    size!("max_position_embeddings", max_position_embeddings, |_| 2048),
    moe_size!("n_routed_experts", num_experts, 64),
    moe_size!("num_experts_per_tok", num_experts_per_tok),
    moe_size!("moe_intermediate_size", intermediate_size, 1407),
    SHARED_EXPERTS,
    TOPK_METHOD,
    N_GROUP,
    TOPK_GROUP,
    NOT_NORMALIZED,
    SOFTMAX,
    scaling_factor!(1.0),
    activation!("hidden_act", Activation::Silu),
    number!("rms_norm_eps", norm.eps, 1e-6),
    flag!(
        "attention_bias",
        false,
        attention_bias,
        attention_output_bias
    ),
    flag!("mlp_bias", false, mlp_bias),
    MLA_ROPE_THETA,
    ROPE_SCALING,
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

/// `topk_method`: "greedy" over all experts, or "group_limited_greedy" within the groups whose best expert is best. Reads
/// the groups.
const TOPK_METHOD: ConfigKey = ConfigKey {
    key: "topk_method",
    read: |keys, config| {
        expect_text(keys, "topk_method", &["greedy", "group_limited_greedy"]);
        if keys.text_opt("topk_method") == Some("group_limited_greedy") {
            read_groups(keys, config, [1, 1], GroupScoring::Max);
        } else {
            moe(config).router.groups = None;
        }
    },
    write: |config| {
        let grouped = config.moe.as_ref()?.router.groups.is_some();
        Some(json!(if grouped {
            "group_limited_greedy"
        } else {
            "greedy"
        }))
    },
};

/// Read with `topk_method`.
const N_GROUP: ConfigKey = ConfigKey {
    key: "n_group",
    read: |_, _| (),
    write: n_group,
};

/// `norm_topk_prob` is false in the published checkpoints. Where it is true DeepSeek's own code drops the scaling factor
/// and that of transformers ignores the key.
const NOT_NORMALIZED: ConfigKey = ConfigKey {
    key: "norm_topk_prob",
    read: |keys, _| {
        if keys.flag_or("norm_topk_prob", false) {
            keys.problem("norm_topk_prob is true, of which the reference implementations make different things; only false is supported");
        }
    },
    write: |_| Some(json!(false)),
};

const SOFTMAX: ConfigKey = ConfigKey {
    key: "scoring_func",
    read: |keys, _| expect_text(keys, "scoring_func", &["softmax"]),
    write: |_| Some(json!("softmax")),
};
