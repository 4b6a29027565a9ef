//! Named sizes. The numbers are those of the published `config.json` files.

use bridge_core::DecoderConfig;
use bridge_core::config::RopeConfig;

use super::config::base;
use crate::families::sizes::Size;
use crate::families::spec::Preset;

pub(super) const ALL: &[Preset] = &[
    Preset {
        name: "qwen25_0_5b",
        hub_id: "Qwen/Qwen2.5-0.5B",
        config: qwen25_0_5b,
    },
    Preset {
        name: "qwen25_1_5b",
        hub_id: "Qwen/Qwen2.5-1.5B",
        config: qwen25_1_5b,
    },
    Preset {
        name: "qwen25_3b",
        hub_id: "Qwen/Qwen2.5-3B",
        config: qwen25_3b,
    },
    Preset {
        name: "qwen25_7b",
        hub_id: "Qwen/Qwen2.5-7B",
        config: qwen25_7b,
    },
    Preset {
        name: "qwen25_14b",
        hub_id: "Qwen/Qwen2.5-14B",
        config: qwen25_14b,
    },
    Preset {
        name: "qwen25_32b",
        hub_id: "Qwen/Qwen2.5-32B",
        config: qwen25_32b,
    },
    Preset {
        name: "qwen25_72b",
        hub_id: "Qwen/Qwen2.5-72B",
        config: qwen25_72b,
    },
    Preset {
        name: "qwen2_tiny",
        hub_id: "",
        config: tiny,
    },
];

/// Qwen2.5 up to 3B: the head is the embedding.
fn small(dims: Size, context: usize) -> DecoderConfig {
    let mut config = dims.of(base());
    config.vocab_size = 151_936;
    config.max_position_embeddings = context;
    config.rope = Some(RopeConfig::new(1_000_000.0));
    config.tie_word_embeddings = true;
    config.bos_token_id = Some(151_643);
    config.eos_token_ids = vec![151_643];
    config
}

/// Qwen2.5 from 7B on: a head of its own, and a vocabulary padded further.
fn large(dims: Size, eps: f64) -> DecoderConfig {
    let mut config = small(dims, 131_072);
    config.vocab_size = 152_064;
    config.tie_word_embeddings = false;
    config.norm.eps = eps;
    config
}

/// Qwen2.5 0.5B.
pub fn qwen25_0_5b() -> DecoderConfig {
    small(Size::new(896, 4864, 24, 14, 2, 64), 32_768)
}

/// Qwen2.5 1.5B.
pub fn qwen25_1_5b() -> DecoderConfig {
    small(Size::new(1536, 8960, 28, 12, 2, 128), 131_072)
}

/// Qwen2.5 3B.
pub fn qwen25_3b() -> DecoderConfig {
    small(Size::new(2048, 11_008, 36, 16, 2, 128), 32_768)
}

/// Qwen2.5 7B.
pub fn qwen25_7b() -> DecoderConfig {
    large(Size::new(3584, 18_944, 28, 28, 4, 128), 1e-6)
}

/// Qwen2.5 14B.
pub fn qwen25_14b() -> DecoderConfig {
    large(Size::new(5120, 13_824, 48, 40, 8, 128), 1e-5)
}

/// Qwen2.5 32B.
pub fn qwen25_32b() -> DecoderConfig {
    large(Size::new(5120, 27_648, 64, 40, 8, 128), 1e-5)
}

/// Qwen2.5 72B.
pub fn qwen25_72b() -> DecoderConfig {
    large(Size::new(8192, 29_568, 80, 64, 8, 128), 1e-5)
}

/// A toy with all dimensions different and small, for tests.
pub fn tiny() -> DecoderConfig {
    DecoderConfig {
        vocab_size: 131,
        ..small(Size::new(96, 80, 3, 6, 2, 16), 64)
    }
}
