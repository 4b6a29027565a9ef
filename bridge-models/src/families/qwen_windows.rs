//! The four keys by which Qwen2 and Qwen3 speak of sliding windows. Published checkpoints have them switched off.

use bridge_core::config::LayerRope;
use serde_json::Value;

use super::spec::ConfigKey;
use super::windows::{layer_types, set_windows, slides, sliding_layers, window, window_of};

/// `use_sliding_window`, which reads all four: without it no layer slides, whatever the others say.
pub(super) const USE_SLIDING_WINDOW: ConfigKey = ConfigKey {
    key: "use_sliding_window",
    read: |keys, config| {
        let first = keys.size_or("max_window_layers", 28);
        let wanted = keys.flag_or("use_sliding_window", false);
        let sliding = sliding_layers(keys, config, |layer| {
            wanted && !keys.is_null("sliding_window") && layer >= first
        });
        if !sliding.contains(&true) {
            return;
        }
        if !wanted {
            keys.problem("layer_types has sliding layers, but use_sliding_window is false");
            return;
        }
        let window = window(keys, 4096);
        set_windows(config, &sliding, window, LayerRope::Global);
    },
    write: |config| Some(window_of(config).is_some().into()),
};

/// `sliding_window`, in tokens.
pub(super) const SLIDING_WINDOW: ConfigKey = ConfigKey {
    key: "sliding_window",
    read: |_, _| (),
    write: |config| Some(window_of(config).into()),
};

/// `max_window_layers`: the first layer that slides, for readers that do not know `layer_types`.
pub(super) const MAX_WINDOW_LAYERS: ConfigKey = ConfigKey {
    key: "max_window_layers",
    read: |_, _| (),
    write: |config| {
        let first = (0..config.layers.len()).find(|layer| slides(config, *layer));
        Some(first.unwrap_or(config.layers.len()).into())
    },
};

/// `layer_types`, which is left out where no layer slides.
pub(super) const LAYER_TYPES: ConfigKey = ConfigKey {
    key: "layer_types",
    read: |_, _| (),
    write: |config| {
        window_of(config)
            .map(|_| layer_types(config))
            .filter(Value::is_array)
    },
};
