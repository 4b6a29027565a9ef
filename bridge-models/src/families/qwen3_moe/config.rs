//! The config map. Defaults are those of transformers' `Qwen3MoeConfig`.

use bridge_core::DecoderConfig;
use bridge_core::config::{Activation, ConfigReader, Ffn, MoeConfig, QkNorm};
use serde_json::{Value, json};

use crate::families::keys::{BOS, EOS, HEAD_DIM, LAYERS, ROPE_SCALING, ROPE_THETA};
use crate::families::moe_keys::{NUM_EXPERTS, moe_size, normalize};
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

/// `mlp_only_layers` and `decoder_sparse_step`: a layer has experts unless it is listed, or its number counted from 1 is
/// no multiple of the step.
const DENSE_LAYERS: ConfigKey = ConfigKey {
    key: "mlp_only_layers",
    read: |keys, config| {
        let step = keys.size_or("decoder_sparse_step", 1);
        if step == 0 {
            keys.problem("decoder_sparse_step is 0, expected at least 1");
            return;
        }
        let dense = layer_numbers(keys, "mlp_only_layers");
        for (index, layer) in config.layers.iter_mut().enumerate() {
            if !dense.contains(&index) && (index + 1) % step == 0 {
                layer.ffn = Ffn::Moe;
            }
        }
    },
    write: |config| {
        let dense = config.layers.iter().enumerate();
        let dense = dense.filter(|(_, layer)| layer.ffn != Ffn::Moe);
        Some(json!(dense.map(|(index, _)| index).collect::<Vec<_>>()))
    },
};

/// Read with `mlp_only_layers`, which new files say everything by.
const SPARSE_STEP: ConfigKey = ConfigKey {
    key: "decoder_sparse_step",
    read: |_, _| (),
    write: |_| Some(json!(1)),
};

fn layer_numbers(keys: &ConfigReader<'_>, key: &str) -> Vec<usize> {
    let Some(value) = keys.get(key) else {
        return Vec::new();
    };
    let number = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
    let numbers = value
        .as_array()
        .and_then(|items| items.iter().map(number).collect());
    numbers.unwrap_or_else(|| {
        keys.problem(format!("{key} is no list of layer numbers"));
        Vec::new()
    })
}

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
