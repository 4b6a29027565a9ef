//! `block_configs`: what each layer is made of.
//!
//! A list with an entry per layer:
//!
//! ```json
//! {"attention": {"n_heads_in_group": 8, "no_op": false, "replace_with_linear": false},
//!  "ffn": {"ffn_mult": 5.25, "no_op": false, "replace_with_linear": false}}
//! ```
//!
//! `n_heads_in_group` query heads share a key and a value head. An MLP is `2/3 * ffn_mult * hidden_size` wide, rounded
//! down to a whole number and then up to a multiple of 256; `intermediate_size` in its place says the width itself.

use bridge_core::DecoderConfig;
use bridge_core::config::{
    AttentionLayer, ConfigReader, Ffn, LayerConfig, MAX_LAYERS, Mixer, MlpLayer,
};
use serde_json::{Value, json};

/// MLPs are made this multiple wide.
const ROUNDED_TO: usize = 256;

/// Reads `block_configs` into the layers. The model's own numbers of key-value heads and of MLP channels, which only
/// layers that say nothing else would use, are those of the first layer that has one.
pub(super) fn read(keys: &ConfigReader<'_>, config: &mut DecoderConfig) {
    let blocks = match keys.get("block_configs") {
        Some(Value::Array(blocks)) if blocks.len() <= MAX_LAYERS => blocks,
        Some(Value::Array(blocks)) => {
            keys.problem(format!(
                "block_configs has {} entries, expected at most {MAX_LAYERS}",
                blocks.len()
            ));
            return;
        }
        Some(_) => {
            keys.problem("block_configs is no list, expected an entry per layer");
            return;
        }
        None => {
            keys.problem("key block_configs is missing");
            return;
        }
    };
    let mut layers = Vec::with_capacity(blocks.len());
    for (index, block) in blocks.iter().enumerate() {
        let problem = |text: String| keys.problem(format!("block_configs[{index}]{text}"));
        layers.push(LayerConfig {
            mixer: attention(block, config, &problem),
            ffn: ffn(block, config, &problem),
        });
    }
    let kv_heads = layers
        .iter()
        .find_map(|layer| layer.attention()?.num_key_value_heads);
    config.num_key_value_heads = kv_heads.unwrap_or(config.num_attention_heads);
    let width = layers.iter().find_map(|layer| match layer.ffn {
        Ffn::Mlp(mlp) => mlp.intermediate_size,
        _ => None,
    });
    config.intermediate_size = width.unwrap_or(config.hidden_size);
    config.num_hidden_layers = layers.len();
    config.layers = layers;
}

fn attention(block: &Value, config: &DecoderConfig, problem: &dyn Fn(String)) -> Mixer {
    let Some(own) = section(block, "attention", problem) else {
        return Mixer::None;
    };
    if flag(own, "no_op", ".attention", problem) {
        return Mixer::None;
    }
    if flag(own, "replace_with_linear", ".attention", problem) {
        return Mixer::Linear;
    }
    for key in ["num_sink_tokens", "window_length", "sparsify"] {
        if let Some(value) = present(own, key) {
            problem(format!(
                ".attention.{key} is {value}, which is not supported; expected null"
            ));
        }
    }
    let heads = config.num_attention_heads;
    let kv_heads = match (
        present(own, "num_key_value_heads"),
        present(own, "n_heads_in_group"),
    ) {
        (Some(kv_heads), _) => whole(kv_heads),
        (None, Some(group)) => whole(group)
            .filter(|group| *group > 0 && heads.is_multiple_of(*group))
            .map(|group| heads / group),
        (None, None) => None,
    };
    if kv_heads.is_none() {
        problem(format!(
            ".attention.n_heads_in_group is {}, expected a divisor of num_attention_heads={heads}",
            own.get("n_heads_in_group").unwrap_or(&Value::Null)
        ));
    }
    Mixer::Attention(AttentionLayer {
        num_key_value_heads: Some(kv_heads.unwrap_or(heads)),
        ..AttentionLayer::default()
    })
}

fn ffn(block: &Value, config: &DecoderConfig, problem: &dyn Fn(String)) -> Ffn {
    let Some(own) = section(block, "ffn", problem) else {
        return Ffn::None;
    };
    if flag(own, "no_op", ".ffn", problem) {
        return Ffn::None;
    }
    if flag(own, "replace_with_linear", ".ffn", problem) {
        return Ffn::Linear;
    }
    if let Some(value) = present(own, "sparsify") {
        problem(format!(
            ".ffn.sparsify is {value}, which is not supported; expected null"
        ));
    }
    let width = match (present(own, "intermediate_size"), present(own, "ffn_mult")) {
        (Some(width), _) => whole(width),
        (None, Some(multiple)) => multiple
            .as_f64()
            .filter(|multiple| multiple.is_finite() && *multiple > 0.0)
            .map(|multiple| width(multiple, config.hidden_size)),
        (None, None) => None,
    };
    if width.is_none() {
        problem(format!(
            ".ffn.ffn_mult is {}, expected a number above 0",
            own.get("ffn_mult").unwrap_or(&Value::Null)
        ));
    }
    Ffn::Mlp(MlpLayer {
        intermediate_size: Some(width.unwrap_or(ROUNDED_TO)),
    })
}

/// The width of an MLP, in channels. A product that no width reaches saturates, and is refused with the config.
fn width(ffn_mult: f64, hidden_size: usize) -> usize {
    let exact = (2.0 * ffn_mult * hidden_size as f64 / 3.0) as usize;
    exact
        .checked_next_multiple_of(ROUNDED_TO)
        .unwrap_or(usize::MAX)
}

/// The multiple that [`width`] turns into `width`, if that is a multiple of 256. A rounding error that makes the product
/// fall short is hidden by rounding up to 256.
fn multiple(width: usize, hidden_size: usize) -> f64 {
    3.0 * width as f64 / (2.0 * hidden_size as f64)
}

/// `block_configs` of a new file. A layer that no entry can say is found when the file is read back.
pub(super) fn written(config: &DecoderConfig) -> Value {
    let entry = |index: usize, layer: &LayerConfig| {
        let attention = match layer.mixer {
            Mixer::Attention(_) => {
                let kv_heads = config.layer_key_value_heads(index).max(1);
                json!({"n_heads_in_group": config.num_attention_heads / kv_heads, "no_op": false,
                    "replace_with_linear": false})
            }
            Mixer::Linear => {
                json!({"n_heads_in_group": null, "no_op": false, "replace_with_linear": true})
            }
            _ => json!({"n_heads_in_group": null, "no_op": true, "replace_with_linear": false}),
        };
        let ffn = match layer.ffn {
            Ffn::Mlp(_) => {
                let width = config.mlp_intermediate_size(index);
                json!({"ffn_mult": multiple(width, config.hidden_size), "no_op": false,
                    "replace_with_linear": false})
            }
            Ffn::Linear => json!({"ffn_mult": null, "no_op": false, "replace_with_linear": true}),
            _ => json!({"ffn_mult": null, "no_op": true, "replace_with_linear": false}),
        };
        json!({"attention": attention, "ffn": ffn})
    };
    let layers = config.layers.iter().enumerate();
    layers.map(|(index, layer)| entry(index, layer)).collect()
}

fn section<'a>(block: &'a Value, key: &str, problem: &dyn Fn(String)) -> Option<&'a Value> {
    let own = block.get(key).filter(|own| own.is_object());
    if own.is_none() {
        problem(format!(".{key} is missing or no object"));
    }
    own
}

fn flag(own: &Value, key: &str, path: &str, problem: &dyn Fn(String)) -> bool {
    match own.get(key) {
        None | Some(Value::Null) => false,
        Some(Value::Bool(flag)) => *flag,
        Some(other) => {
            problem(format!("{path}.{key} is {other}, expected true or false"));
            false
        }
    }
}

fn present<'a>(own: &'a Value, key: &str) -> Option<&'a Value> {
    own.get(key).filter(|value| !value.is_null())
}

fn whole(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|value| usize::try_from(value).ok())
}
