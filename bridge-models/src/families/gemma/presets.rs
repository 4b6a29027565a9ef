//! Named sizes. The numbers are those of the published `config.json` files.

use bridge_core::DecoderConfig;

use super::config::base;
use crate::families::sizes::Size;
use crate::families::spec::Preset;

pub(super) const ALL: &[Preset] = &[
    Preset {
        name: "gemma_2b",
        hub_id: "google/gemma-2b",
        config: gemma_2b,
    },
    Preset {
        name: "gemma_7b",
        hub_id: "google/gemma-7b",
        config: gemma_7b,
    },
    Preset {
        name: "gemma_tiny",
        hub_id: "",
        config: tiny,
    },
];

fn gemma(dims: Size) -> DecoderConfig {
    let mut config = dims.of(base());
    config.embedding_scale = Some((config.hidden_size as f64).sqrt());
    config.vocab_size = 256_000;
    config.max_position_embeddings = 8192;
    config.tie_word_embeddings = true;
    config.bos_token_id = Some(2);
    config.eos_token_ids = vec![1];
    config
}

/// Gemma 2B: one key-value head for all.
pub fn gemma_2b() -> DecoderConfig {
    gemma(Size::new(2048, 16_384, 18, 8, 1, 256))
}

/// Gemma 7B.
pub fn gemma_7b() -> DecoderConfig {
    gemma(Size::new(3072, 24_576, 28, 16, 16, 256))
}

/// A toy with all dimensions different and small, for tests.
pub fn tiny() -> DecoderConfig {
    DecoderConfig {
        vocab_size: 131,
        max_position_embeddings: 96,
        ..gemma(Size::new(48, 80, 3, 6, 2, 16))
    }
}
