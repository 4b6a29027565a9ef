//! Config keys that several families share and that take more than a field to say.

use bridge_core::DecoderConfig;
use bridge_core::config::{ConfigReader, LayerConfig, RopeDefaults};
use serde_json::{Value, json};

use super::spec::ConfigKey;

/// `num_hidden_layers`, all of them alike and with full attention.
pub(super) const LAYERS: ConfigKey = ConfigKey {
    key: "num_hidden_layers",
    read: |keys, config| {
        config.num_hidden_layers = keys.num_layers("num_hidden_layers");
        config.layers = vec![LayerConfig::dense(); config.num_hidden_layers];
    },
    write: |config| Some(config.num_hidden_layers.into()),
};

/// `num_key_value_heads`, which old files lack where there is one per query head.
pub(super) const KEY_VALUE_HEADS: ConfigKey =
    super::spec::size!("num_key_value_heads", num_key_value_heads, |config| config
        .num_attention_heads);

/// `head_dim`, which files lack where it is `hidden_size / num_attention_heads`.
pub(super) const HEAD_DIM: ConfigKey = super::spec::size!("head_dim", head_dim, |config| {
    config
        .hidden_size
        .checked_div(config.num_attention_heads)
        .unwrap_or(0)
});

/// `bos_token_id`.
pub(super) const BOS: ConfigKey = ConfigKey {
    key: "bos_token_id",
    read: |keys, config| config.bos_token_id = keys.token_id("bos_token_id"),
    write: |config| Some(config.bos_token_id.into()),
};

/// `eos_token_id`: one id or a list.
pub(super) const EOS: ConfigKey = ConfigKey {
    key: "eos_token_id",
    read: |keys, config| config.eos_token_ids = keys.token_ids("eos_token_id"),
    write: |config| {
        Some(match config.eos_token_ids.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            many => json!(many),
        })
    },
};

/// `rope_theta`, which reads the whole rotary embedding in either spelling.
pub(super) const ROPE_THETA: ConfigKey = ConfigKey {
    key: "rope_theta",
    read: |keys, config| read_rope(keys, config, 1.0),
    write: |config| config.rope.as_ref().map(|rope| rope.to_hf().0),
};

/// `rope_scaling`; reading is [`ROPE_THETA`]'s.
pub(super) const ROPE_SCALING: ConfigKey = ConfigKey {
    key: "rope_scaling",
    read: |_, _| (),
    write: |config| config.rope.as_ref().map(|rope| rope.to_hf().1),
};

/// `query_pre_attn_scalar`: scores are divided by its square root. 256 where absent.
pub(super) const QUERY_SCALAR: ConfigKey = ConfigKey {
    key: "query_pre_attn_scalar",
    read: |keys, config| {
        config.attention_scale = Some(keys.number_or("query_pre_attn_scalar", 256.0).powf(-0.5))
    },
    // Published values are whole numbers; the rounding undoes that of the square root.
    write: |config| {
        config
            .attention_scale
            .map(|scale| json!((scale.powi(-2) * 1e6).round() / 1e6))
    },
};

/// `hidden_size` of models that multiply embeddings by its square root.
pub(super) const SCALED_HIDDEN_SIZE: ConfigKey = ConfigKey {
    key: "hidden_size",
    read: |keys, config| {
        config.hidden_size = keys.size("hidden_size");
        config.embedding_scale = Some((config.hidden_size as f64).sqrt());
    },
    write: |config| Some(config.hidden_size.into()),
};

/// Refuses files that ask for attention in both directions, as encoders made from Gemma do.
pub(super) const CAUSAL_ONLY: ConfigKey = ConfigKey {
    key: "use_bidirectional_attention",
    read: |keys, _| {
        if keys.flag_or("use_bidirectional_attention", false) {
            keys.problem("use_bidirectional_attention is true; only causal attention is supported");
        }
    },
    write: |_| None,
};

/// A soft cap under `key`: `absent` where the key is not there, none where it is null.
pub(super) fn read_softcap(keys: &ConfigReader<'_>, key: &str, absent: Option<f64>) -> Option<f64> {
    if keys.is_null(key) {
        None
    } else {
        keys.number_opt(key).or(absent)
    }
}

/// Reads the one rotary embedding of a model and the share of each head that it rotates.
pub(super) fn read_rope(
    keys: &ConfigReader<'_>,
    config: &mut DecoderConfig,
    partial_rotary_factor: f64,
) {
    let defaults = RopeDefaults {
        partial_rotary_factor,
        ..RopeDefaults::new(config.max_position_embeddings)
    };
    let (rope, partial) = keys.rope(defaults);
    config.rope = Some(rope);
    config.partial_rotary_factor = partial;
}

/// What a family's `base` starts from.
pub(super) fn plain_decoder() -> DecoderConfig {
    DecoderConfig::plain()
}
