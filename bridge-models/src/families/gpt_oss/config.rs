//! The config map. Defaults are those of transformers' `GptOssConfig`.

use bridge_core::DecoderConfig;
use bridge_core::config::{
    Activation, ClampedSwiglu, Ffn, LayerRope, MoeConfig, RopeConfig, RopeDefaults, RopeScaling,
};
use serde_json::{Value, json};

use crate::families::keys::{BOS, EOS, LAYERS, ROPE_SCALING};
use crate::families::moe_keys::{moe, moe_size};
use crate::families::spec::{ConfigKey, activation, constant, flag, number, size};
use crate::families::windows::{layer_types, set_windows, sliding_layers, window, window_of};

pub(super) fn base() -> DecoderConfig {
    let mut moe = MoeConfig::plain();
    moe.router.normalize = true;
    moe.router.bias = true;
    moe.expert_projection_bias = true;
    DecoderConfig {
        attention_sinks: true,
        moe: Some(moe),
        ..DecoderConfig::plain()
    }
}

pub(super) const MAP: &[ConfigKey] = &[
    size!("hidden_size", hidden_size),
    EXPERT_SIZE,
    LAYERS,
    WINDOW,
    LAYER_TYPES,
    size!("num_attention_heads", num_attention_heads),
    size!("num_key_value_heads", num_key_value_heads, |_| 8),
    size!("head_dim", head_dim, |_| 64),
    size!("vocab_size", vocab_size),
    size!("max_position_embeddings", max_position_embeddings, |_| {
        131_072
    }),
    moe_size!("num_local_experts", num_experts, 128),
    EXPERTS_PER_TOKEN,
    SWIGLU_LIMIT,
    SWIGLU_ALPHA,
    activation!("hidden_act", Activation::Silu),
    number!("rms_norm_eps", norm.eps, 1e-5),
    flag!(
        "attention_bias",
        true,
        attention_bias,
        attention_output_bias
    ),
    ROPE_THETA,
    ROPE_SCALING,
    flag!("tie_word_embeddings", false, tie_word_embeddings),
    number!("initializer_range", initializer_range, 0.02),
    BOS,
    EOS,
    constant!("attention_dropout", 0.0),
    constant!("output_router_logits", false),
    constant!("router_aux_loss_coef", 0.9),
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

/// `sliding_window`, which reads `layer_types` as well: without it layers 0, 2, 4, ... slide.
const WINDOW: ConfigKey = ConfigKey {
    key: "sliding_window",
    read: |keys, config| {
        let sliding = sliding_layers(keys, config, |layer| layer % 2 == 0);
        if sliding.contains(&true) {
            let window = window(keys, 128);
            set_windows(config, &sliding, window, LayerRope::Global);
        }
        for layer in &mut config.layers {
            layer.ffn = Ffn::Moe;
        }
    },
    write: |config| Some(window_of(config).into()),
};

const LAYER_TYPES: ConfigKey = ConfigKey {
    key: "layer_types",
    read: |_, _| (),
    write: |config| Some(layer_types(config)),
};

/// `num_experts_per_tok`; OpenAI's files say `experts_per_token` as well.
const EXPERTS_PER_TOKEN: ConfigKey = ConfigKey {
    key: "num_experts_per_tok",
    read: |keys, config| {
        let count = keys.size_opt("num_experts_per_tok");
        moe(config).num_experts_per_tok =
            count.unwrap_or_else(|| keys.size_or("experts_per_token", 4));
    },
    write: |config| {
        let moe = config.moe.as_ref()?;
        Some(moe.num_experts_per_tok.into())
    },
};

/// `swiglu_limit`, which reads `swiglu_alpha` as well.
const SWIGLU_LIMIT: ConfigKey = ConfigKey {
    key: "swiglu_limit",
    read: |keys, config| {
        moe(config).clamped_swiglu = Some(ClampedSwiglu {
            alpha: keys.number_or("swiglu_alpha", 1.702),
            limit: keys.number_or("swiglu_limit", 7.0),
        });
    },
    write: |config| clamp(config).map(|clamp| clamp.limit.into()),
};

/// `swiglu_alpha`, which files leave out where it is 1.702.
const SWIGLU_ALPHA: ConfigKey = ConfigKey {
    key: "swiglu_alpha",
    read: |_, _| (),
    write: |config| {
        clamp(config)
            .filter(|clamp| clamp.alpha != 1.702)
            .map(|clamp| clamp.alpha.into())
    },
};

fn clamp(config: &DecoderConfig) -> Option<&ClampedSwiglu> {
    config.moe.as_ref()?.clamped_swiglu.as_ref()
}

/// The rotary embedding of the published models, which is also that of a file without a word on it.
pub(super) fn published_rope() -> RopeConfig {
    RopeConfig {
        theta: 150_000.0,
        scaling: RopeScaling::Yarn {
            factor: 32.0,
            original_max_position_embeddings: 4096,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: None,
            mscale_all_dim: None,
            attention_factor: None,
            truncate: false,
        },
    }
}

/// `rope_theta`, read with the rest of the rotary embedding.
const ROPE_THETA: ConfigKey = ConfigKey {
    key: "rope_theta",
    read: |keys, config| {
        let defaults = RopeDefaults {
            theta: 150_000.0,
            ..RopeDefaults::new(config.max_position_embeddings)
        };
        let said = |key: &str| keys.has(key) || keys.is_null(key);
        let (rope, partial) = keys.rope(defaults);
        let silent = !said("rope_scaling") && !said("rope_parameters");
        let theta = rope.theta;
        config.rope = Some(if silent {
            RopeConfig {
                theta,
                ..published_rope()
            }
        } else {
            rope
        });
        config.partial_rotary_factor = partial;
    },
    write: |config| -> Option<Value> { config.rope.as_ref().map(|rope| json!(rope.to_hf().0)) },
};
