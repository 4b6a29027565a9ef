//! Named sizes. The numbers are those of the published `config.json` files.

use bridge_core::DecoderConfig;
use bridge_core::config::{LayerRope, RopeConfig};

use super::config::base;
use crate::families::sizes::Size;
use crate::families::spec::Preset;
use crate::families::windows::set_windows;

pub(super) const ALL: &[Preset] = &[
    Preset {
        name: "mistral_7b_v01",
        hub_id: "mistralai/Mistral-7B-v0.1",
        config: mistral_7b_v01,
    },
    Preset {
        name: "mistral_7b_v03",
        hub_id: "mistralai/Mistral-7B-v0.3",
        config: mistral_7b_v03,
    },
    Preset {
        name: "mistral_nemo_12b",
        hub_id: "mistralai/Mistral-Nemo-Base-2407",
        config: mistral_nemo_12b,
    },
    Preset {
        name: "mistral_small_24b",
        hub_id: "mistralai/Mistral-Small-24B-Base-2501",
        config: mistral_small_24b,
    },
    Preset {
        name: "mistral_tiny",
        hub_id: "",
        config: tiny,
    },
];

fn mistral(dims: Size, vocab_size: usize, context: usize, theta: f64) -> DecoderConfig {
    let mut config = dims.of(base());
    config.vocab_size = vocab_size;
    config.max_position_embeddings = context;
    config.norm.eps = 1e-5;
    config.rope = Some(RopeConfig::new(theta));
    config.bos_token_id = Some(1);
    config.eos_token_ids = vec![2];
    config
}

const SIZE_7B: Size = Size::new(4096, 14_336, 32, 32, 8, 128);

/// Mistral 7B v0.1, the one with a sliding window.
pub fn mistral_7b_v01() -> DecoderConfig {
    let mut config = mistral(SIZE_7B, 32_000, 32_768, 10_000.0);
    set_windows(&mut config, &[true; 32], 4096, LayerRope::Global);
    config
}

/// Mistral 7B v0.3.
pub fn mistral_7b_v03() -> DecoderConfig {
    mistral(SIZE_7B, 32_768, 32_768, 1_000_000.0)
}

/// Mistral Nemo 12B.
pub fn mistral_nemo_12b() -> DecoderConfig {
    mistral(
        Size::new(5120, 14_336, 40, 32, 8, 128),
        131_072,
        128_000,
        1_000_000.0,
    )
}

/// Mistral Small 3 24B.
pub fn mistral_small_24b() -> DecoderConfig {
    mistral(
        Size::new(5120, 32_768, 40, 32, 8, 128),
        131_072,
        32_768,
        100_000_000.0,
    )
}

/// A toy with all dimensions different and small, for tests.
pub fn tiny() -> DecoderConfig {
    let mut config = mistral(Size::new(48, 80, 3, 6, 2, 16), 131, 96, 10_000.0);
    set_windows(&mut config, &[true; 3], 7, LayerRope::Global);
    config
}
