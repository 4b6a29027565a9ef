//! The config map. Defaults are those of transformers' `NemotronHConfig`.

use bridge_core::DecoderConfig;
use bridge_core::config::{
    Activation, AttentionLayer, ConfigReader, Ffn, LayerConfig, LayerRope, MAX_LAYERS,
    Mamba2Config, Mixer, MlpLayer, NormConfig,
};

use crate::families::keys::{BOS, EOS, KEY_VALUE_HEADS, plain_decoder};
use crate::families::spec::{ConfigKey, activation, constant, flag, number, size};

pub(super) fn base() -> DecoderConfig {
    let plain = plain_decoder();
    DecoderConfig {
        norm: NormConfig {
            eps: 1e-5,
            ..plain.norm
        },
        gated_mlp: false,
        rope: None,
        mamba2: Some(Mamba2Config {
            num_heads: 0,
            head_dim: 0,
            num_groups: 0,
            state_size: 0,
            conv_kernel: 4,
            conv_bias: true,
            proj_bias: false,
            chunk_size: 128,
            time_step_min: 0.001,
        }),
        ..plain
    }
}

/// A key of the Mamba-2 layers: `mamba!(key, field, |keys| value)`.
macro_rules! mamba {
    ($key:literal, $field:ident, $read:expr) => {
        ConfigKey {
            key: $key,
            read: |keys, config| {
                let read: fn(&ConfigReader<'_>) -> _ = $read;
                if let Some(mamba2) = &mut config.mamba2 {
                    mamba2.$field = read(keys);
                }
            },
            write: |config| config.mamba2.as_ref().map(|mamba2| mamba2.$field.into()),
        }
    };
}

pub(super) const MAP: &[ConfigKey] = &[
    size!("hidden_size", hidden_size, |_| 4096),
    size!("intermediate_size", intermediate_size, |_| 21_504),
    ConfigKey {
        key: "hybrid_override_pattern",
        read: read_layers,
        write: |config| Some(pattern(config).into()),
    },
    // For readers that count on it; the pattern says the same.
    ConfigKey {
        key: "num_hidden_layers",
        read: |_, _| (),
        write: |config| Some(config.num_hidden_layers.into()),
    },
    size!("num_attention_heads", num_attention_heads, |_| 32),
    KEY_VALUE_HEADS,
    ConfigKey {
        key: "head_dim",
        read: |keys, config| {
            config.head_dim = either(keys, "head_dim", "attention_head_dim", 128);
        },
        write: |config| Some(config.head_dim.into()),
    },
    size!("vocab_size", vocab_size, |_| 131_072),
    size!("max_position_embeddings", max_position_embeddings, |_| 4096),
    activation!("mlp_hidden_act", Activation::Relu2),
    number!("layer_norm_epsilon", norm.eps, 1e-5),
    flag!(
        "attention_bias",
        false,
        attention_bias,
        attention_output_bias
    ),
    flag!("mlp_bias", false, mlp_bias),
    mamba!("mamba_num_heads", num_heads, |keys| keys
        .size_or("mamba_num_heads", 128)),
    mamba!("mamba_head_dim", head_dim, |keys| keys
        .size_or("mamba_head_dim", 64)),
    mamba!("n_groups", num_groups, |keys| either(
        keys,
        "n_groups",
        "mamba_n_groups",
        8
    )),
    mamba!("ssm_state_size", state_size, |keys| either(
        keys,
        "ssm_state_size",
        "mamba_state_dim",
        128
    )),
    mamba!("conv_kernel", conv_kernel, |keys| either(
        keys,
        "conv_kernel",
        "mamba_d_conv",
        4
    )),
    mamba!("use_conv_bias", conv_bias, |keys| keys.flag_or(
        "use_conv_bias",
        keys.flag_or("mamba_conv_bias", true)
    )),
    mamba!("use_bias", proj_bias, |keys| keys
        .flag_or("use_bias", false)),
    mamba!("chunk_size", chunk_size, |keys| either(
        keys,
        "chunk_size",
        "mamba_chunk_size",
        128
    )),
    mamba!("time_step_min", time_step_min, |keys| keys.number_or(
        "time_step_min",
        keys.number_or("mamba_dt_min", 0.001)
    )),
    ConfigKey {
        key: "mamba_hidden_act",
        read: |keys, _| {
            let found = keys.activation_or("mamba_hidden_act", Activation::Silu);
            if found != Activation::Silu {
                keys.problem(format!(
                    "mamba_hidden_act is {:?}, expected silu",
                    found.hf_name()
                ));
            }
        },
        write: |_| Some("silu".into()),
    },
    flag!("tie_word_embeddings", false, tie_word_embeddings),
    number!("initializer_range", initializer_range, 0.02),
    BOS,
    EOS,
    constant!("attention_dropout", 0.0),
    constant!("hidden_dropout", 0.0),
    constant!("residual_in_fp32", false),
    constant!("use_cache", true),
];

/// A size under the usual key, or under the name that other files have for it.
fn either(keys: &ConfigReader<'_>, key: &str, other: &str, default: usize) -> usize {
    keys.size_opt(key)
        .unwrap_or_else(|| keys.size_or(other, default))
}

/// The kinds of layer: letter of the pattern, and the names in lists.
static KINDS: [(char, &[&str]); 4] = [
    ('M', &["linear_attention", "mamba", "mamba2"]),
    ('*', &["full_attention", "attention"]),
    ('-', &["mlp"]),
    ('E', &["moe"]),
];

/// A layer of the kind with letter `letter`.
pub(super) fn layer(letter: char) -> Option<LayerConfig> {
    let (mixer, ffn) = match letter {
        'M' => (Mixer::Mamba2, Ffn::None),
        '*' => (
            Mixer::Attention(AttentionLayer {
                rope: LayerRope::None,
                ..AttentionLayer::default()
            }),
            Ffn::None,
        ),
        '-' => (Mixer::None, Ffn::Mlp(MlpLayer::default())),
        _ => return None,
    };
    Some(LayerConfig { mixer, ffn })
}

/// The layers, from the list of newer files or the pattern of older ones; a list wins.
fn read_layers(keys: &ConfigReader<'_>, config: &mut DecoderConfig) {
    let list = ["layers_block_type", "layer_types"]
        .into_iter()
        .find(|key| keys.has(key));
    let letters: Vec<char> = match list {
        Some(key) => {
            let names = keys.texts_opt(key).unwrap_or_default();
            let letter_of = |(index, name): (usize, &&str)| {
                let kind = KINDS.iter().find(|(_, names)| names.contains(name));
                if kind.is_none() {
                    let known: Vec<&str> = KINDS.iter().map(|(_, names)| names[0]).collect();
                    keys.problem(format!(
                        "{key}[{index}] is {name:?}, expected one of {}",
                        known.join(", ")
                    ));
                }
                kind.map(|(letter, _)| *letter)
            };
            names.iter().enumerate().filter_map(letter_of).collect()
        }
        None => {
            if !keys.has("hybrid_override_pattern") {
                keys.problem("neither hybrid_override_pattern nor layers_block_type is there");
            }
            let pattern = keys.text_opt("hybrid_override_pattern").unwrap_or_default();
            let known = |(index, letter): (usize, char)| {
                let known = KINDS.iter().any(|(kind, _)| *kind == letter);
                if !known {
                    keys.problem(format!(
                        "hybrid_override_pattern has {letter:?} at position {index}, expected M, *, - or E"
                    ));
                }
                known.then_some(letter)
            };
            pattern.chars().enumerate().filter_map(known).collect()
        }
    };
    if letters.len() > MAX_LAYERS {
        keys.problem(format!(
            "{} layers are listed, expected at most {MAX_LAYERS}",
            letters.len()
        ));
        return;
    }
    let layers = letters.iter().enumerate().filter_map(|(index, letter)| {
        let layer = layer(*letter);
        if layer.is_none() {
            keys.problem(format!(
                "layer {index} is a mixture of experts, which this family does not run yet"
            ));
        }
        layer
    });
    config.layers = layers.collect();
    config.num_hidden_layers = config.layers.len();
}

/// `hybrid_override_pattern` of a new file.
fn pattern(config: &DecoderConfig) -> String {
    let letter = |own: &LayerConfig| {
        let known = KINDS.iter().map(|(letter, _)| *letter);
        // What no letter says is found when the file is read back.
        known
            .into_iter()
            .find(|letter| layer(*letter).as_ref() == Some(own))
            .unwrap_or('?')
    };
    config.layers.iter().map(letter).collect()
}
