//! Sliding windows: which layers have one, as the keys `sliding_window` and `layer_types` say it.

use bridge_core::DecoderConfig;
use bridge_core::config::{AttentionLayer, ConfigReader, LayerConfig, LayerRope, Mixer};
use serde_json::Value;

/// A layer that sees a window only, in `layer_types`.
const SLIDING: &str = "sliding_attention";
/// A layer that sees everything before it, in `layer_types`.
const FULL: &str = "full_attention";

/// Whether each layer slides: as `layer_types` says, or by `rule` where the key is absent.
pub(super) fn sliding_layers(
    keys: &ConfigReader<'_>,
    config: &DecoderConfig,
    rule: impl Fn(usize) -> bool,
) -> Vec<bool> {
    let layers = config.num_hidden_layers;
    match keys
        .has("layer_types")
        .then(|| keys.layer_types(layers, &[FULL, SLIDING]))
        .flatten()
    {
        Some(types) => types.into_iter().map(|kind| kind == SLIDING).collect(),
        None => (0..layers).map(rule).collect(),
    }
}

/// Gives the layers that slide a window of `window` tokens and the rotary embedding `rope`.
pub(super) fn set_windows(
    config: &mut DecoderConfig,
    sliding: &[bool],
    window: usize,
    rope: LayerRope,
) {
    let layer = |sliding: &bool| match sliding {
        true => LayerConfig {
            mixer: Mixer::Attention(AttentionLayer {
                window: Some(window),
                rope,
                ..AttentionLayer::default()
            }),
            ..LayerConfig::dense()
        },
        false => LayerConfig::dense(),
    };
    config.layers = sliding.iter().map(layer).collect();
}

/// Reads `sliding_window` where at least one layer needs it; a finding if it is not there.
pub(super) fn window(keys: &ConfigReader<'_>, default: usize) -> usize {
    if keys.is_null("sliding_window") {
        keys.problem("sliding_window is null, but layers are to slide; give it, or make every layer full_attention");
        return default;
    }
    keys.size_or("sliding_window", default)
}

/// The window of the first layer that has one.
pub(super) fn window_of(config: &DecoderConfig) -> Option<usize> {
    config
        .layers
        .iter()
        .find_map(|layer| layer.attention()?.window)
}

/// Whether layer `layer` of the config has a window.
pub(super) fn slides(config: &DecoderConfig, layer: usize) -> bool {
    config
        .layers
        .get(layer)
        .and_then(LayerConfig::attention)
        .is_some_and(|attention| attention.window.is_some())
}

/// `layer_types` of a new file.
pub(super) fn layer_types(config: &DecoderConfig) -> Value {
    let kind = |layer| if slides(config, layer) { SLIDING } else { FULL };
    (0..config.layers.len())
        .map(kind)
        .collect::<Vec<_>>()
        .into()
}
