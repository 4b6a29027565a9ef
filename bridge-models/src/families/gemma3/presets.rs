//! Named sizes. The numbers are those of the published `config.json` files.

use bridge_core::DecoderConfig;
use bridge_core::config::{Activation, LayerRope, RopeConfig};

use super::config::base;
use crate::families::sizes::Size;
use crate::families::spec::Preset;
use crate::families::windows::set_windows;

pub(super) const ALL: &[Preset] = &[
    Preset {
        name: "gemma3_270m",
        hub_id: "google/gemma-3-270m",
        config: gemma3_270m,
    },
    Preset {
        name: "gemma3_1b",
        hub_id: "google/gemma-3-1b-pt",
        config: gemma3_1b,
    },
    Preset {
        name: "gemma3_text_tiny",
        hub_id: "",
        config: tiny,
    },
];

/// Every sixth layer sees everything; the others see `window` tokens.
fn gemma3(dims: Size, window: usize) -> DecoderConfig {
    let mut config = dims.of(base());
    config.activation = Activation::GeluTanh;
    config.embedding_scale = Some((config.hidden_size as f64).sqrt());
    config.attention_scale = Some(256f64.powf(-0.5));
    config.vocab_size = 262_144;
    config.max_position_embeddings = 32_768;
    config.rope = Some(RopeConfig::new(1_000_000.0));
    config.rope_local = Some(RopeConfig::new(10_000.0));
    config.tie_word_embeddings = true;
    config.bos_token_id = Some(2);
    config.eos_token_ids = vec![1];
    let sliding: Vec<bool> = (1..=config.num_hidden_layers)
        .map(|layer| layer % 6 != 0)
        .collect();
    set_windows(&mut config, &sliding, window, LayerRope::Local);
    config
}

/// Gemma 3 270M.
pub fn gemma3_270m() -> DecoderConfig {
    gemma3(Size::new(640, 2048, 18, 4, 1, 256), 512)
}

/// Gemma 3 1B.
pub fn gemma3_1b() -> DecoderConfig {
    gemma3(Size::new(1152, 6912, 26, 4, 1, 256), 512)
}

/// A toy with all dimensions different and small, for tests.
pub fn tiny() -> DecoderConfig {
    DecoderConfig {
        vocab_size: 131,
        max_position_embeddings: 96,
        ..gemma3(Size::new(48, 80, 7, 6, 2, 16), 5)
    }
}
