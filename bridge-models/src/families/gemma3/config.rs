//! The config map. Defaults are those of transformers' `Gemma3TextConfig`.

use bridge_core::DecoderConfig;
use bridge_core::config::{Activation, ConfigReader, LayerRope, QkNorm, RopeConfig, RopeDefaults};

use crate::families::keys::{
    BOS, CAUSAL_ONLY, EOS, LAYERS, QUERY_SCALAR, ROPE_SCALING, SCALED_HIDDEN_SIZE, plain_decoder,
    read_softcap,
};
use crate::families::spec::{ConfigKey, activation, constant, flag, number, size};
use crate::families::windows::{
    layer_types, set_windows, slides, sliding_layers, window, window_of,
};

/// Base of the rotary embedding of layers that see everything.
const GLOBAL_THETA: f64 = 1_000_000.0;
/// Base of the rotary embedding of layers that slide.
const LOCAL_THETA: f64 = 10_000.0;
/// Every so many layers one sees everything, unless the file says otherwise.
const PATTERN: usize = 6;

pub(super) fn base() -> DecoderConfig {
    let mut config = plain_decoder();
    config.norm.unit_offset = true;
    config.attention_output_norm = true;
    config.mlp_output_norm = true;
    config.qk_norm = Some(QkNorm::PerHead);
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
    size!("max_position_embeddings", max_position_embeddings, |_| {
        131_072
    }),
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
            config.attention_softcap = read_softcap(keys, "attn_logit_softcapping", None)
        },
        write: |config| Some(config.attention_softcap.into()),
    },
    ConfigKey {
        key: "final_logit_softcapping",
        read: |keys, config| {
            config.final_logit_softcap = read_softcap(keys, "final_logit_softcapping", None)
        },
        write: |config| Some(config.final_logit_softcap.into()),
    },
    ConfigKey {
        key: "sliding_window",
        read: read_layers,
        write: |config| Some(window_of(config).into()),
    },
    ConfigKey {
        key: "layer_types",
        read: |_, _| (),
        write: |config| Some(layer_types(config)),
    },
    // For readers that do not know `layer_types`.
    ConfigKey {
        key: "sliding_window_pattern",
        read: |_, _| (),
        write: |config| {
            let layers = config.layers.len();
            let pattern = (0..layers)
                .find(|layer| !slides(config, *layer))
                .unwrap_or(layers)
                + 1;
            let regular =
                (0..layers).all(|layer| slides(config, layer) == ((layer + 1) % pattern != 0));
            regular.then(|| pattern.into())
        },
    },
    ConfigKey {
        key: "rope_theta",
        read: read_ropes,
        write: |config| config.rope.as_ref().map(|rope| rope.to_hf().0),
    },
    ROPE_SCALING,
    ConfigKey {
        key: "rope_local_base_freq",
        read: |_, _| (),
        write: |config| config.rope_local.as_ref().map(|rope| rope.theta.into()),
    },
    flag!("tie_word_embeddings", true, tie_word_embeddings),
    number!("initializer_range", initializer_range, 0.02),
    BOS,
    EOS,
    constant!("attention_dropout", 0.0),
    constant!("use_cache", true),
];

fn read_layers(keys: &ConfigReader<'_>, config: &mut DecoderConfig) {
    let pattern = keys.size_or("sliding_window_pattern", PATTERN);
    if pattern == 0 {
        keys.problem("sliding_window_pattern is 0, expected at least 1");
        return;
    }
    let sliding = sliding_layers(keys, config, |layer| (layer + 1) % pattern != 0);
    if sliding.contains(&true) {
        let window = window(keys, 4096);
        set_windows(config, &sliding, window, LayerRope::Local);
    }
}

/// The file's `rope_scaling` is the global embedding's alone; the newer spelling says both in full.
fn read_ropes(keys: &ConfigReader<'_>, config: &mut DecoderConfig) {
    let plain = RopeDefaults::new(config.max_position_embeddings);
    let global = RopeDefaults {
        theta: GLOBAL_THETA,
        ..plain
    };
    let split = keys.rope_of_layer_type("full_attention", global);
    let (rope, partial) = split.unwrap_or_else(|| keys.rope(global));
    config.rope = Some(rope);
    config.partial_rotary_factor = partial;
    let local = RopeDefaults {
        theta: LOCAL_THETA,
        ..plain
    };
    config.rope_local = Some(match keys.rope_of_layer_type("sliding_attention", local) {
        Some((rope, _)) => rope,
        None => RopeConfig::new(keys.number_or("rope_local_base_freq", LOCAL_THETA)),
    });
}
