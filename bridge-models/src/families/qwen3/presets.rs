//! Named sizes. The numbers are those of the published `config.json` files.

use bridge_core::DecoderConfig;
use bridge_core::config::RopeConfig;

use super::config::base;
use crate::families::sizes::Size;
use crate::families::spec::Preset;

pub(super) const ALL: &[Preset] = &[
    Preset {
        name: "qwen3_0_6b",
        hub_id: "Qwen/Qwen3-0.6B",
        config: qwen3_0_6b,
    },
    Preset {
        name: "qwen3_1_7b",
        hub_id: "Qwen/Qwen3-1.7B",
        config: qwen3_1_7b,
    },
    Preset {
        name: "qwen3_4b",
        hub_id: "Qwen/Qwen3-4B",
        config: qwen3_4b,
    },
    Preset {
        name: "qwen3_8b",
        hub_id: "Qwen/Qwen3-8B",
        config: qwen3_8b,
    },
    Preset {
        name: "qwen3_14b",
        hub_id: "Qwen/Qwen3-14B",
        config: qwen3_14b,
    },
    Preset {
        name: "qwen3_32b",
        hub_id: "Qwen/Qwen3-32B",
        config: qwen3_32b,
    },
    Preset {
        name: "qwen3_tiny",
        hub_id: "",
        config: tiny,
    },
];

fn qwen3(dims: Size, tied: bool) -> DecoderConfig {
    let mut config = dims.of(base());
    config.vocab_size = 151_936;
    config.max_position_embeddings = 40_960;
    config.rope = Some(RopeConfig::new(1_000_000.0));
    config.tie_word_embeddings = tied;
    config.bos_token_id = Some(151_643);
    config.eos_token_ids = vec![151_645];
    config
}

/// Qwen3 0.6B.
pub fn qwen3_0_6b() -> DecoderConfig {
    qwen3(Size::new(1024, 3072, 28, 16, 8, 128), true)
}

/// Qwen3 1.7B.
pub fn qwen3_1_7b() -> DecoderConfig {
    qwen3(Size::new(2048, 6144, 28, 16, 8, 128), true)
}

/// Qwen3 4B.
pub fn qwen3_4b() -> DecoderConfig {
    qwen3(Size::new(2560, 9728, 36, 32, 8, 128), true)
}

/// Qwen3 8B.
pub fn qwen3_8b() -> DecoderConfig {
    qwen3(Size::new(4096, 12_288, 36, 32, 8, 128), false)
}

/// Qwen3 14B.
pub fn qwen3_14b() -> DecoderConfig {
    qwen3(Size::new(5120, 17_408, 40, 40, 8, 128), false)
}

/// Qwen3 32B.
pub fn qwen3_32b() -> DecoderConfig {
    qwen3(Size::new(5120, 25_600, 64, 64, 8, 128), false)
}

/// A toy with all dimensions different and small, for tests.
pub fn tiny() -> DecoderConfig {
    DecoderConfig {
        vocab_size: 131,
        max_position_embeddings: 64,
        ..qwen3(Size::new(48, 80, 3, 6, 2, 16), false)
    }
}
