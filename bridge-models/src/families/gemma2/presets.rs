//! Named sizes. The numbers are those of the published `config.json` files.

use bridge_core::DecoderConfig;
use bridge_core::config::{Activation, LayerRope};

use super::config::base;
use crate::families::sizes::Size;
use crate::families::spec::Preset;
use crate::families::windows::set_windows;

pub(super) const ALL: &[Preset] = &[
    Preset {
        name: "gemma2_2b",
        hub_id: "google/gemma-2-2b",
        config: gemma2_2b,
    },
    Preset {
        name: "gemma2_9b",
        hub_id: "google/gemma-2-9b",
        config: gemma2_9b,
    },
    Preset {
        name: "gemma2_27b",
        hub_id: "google/gemma-2-27b",
        config: gemma2_27b,
    },
    Preset {
        name: "gemma2_tiny",
        hub_id: "",
        config: tiny,
    },
];

/// `query_scalar` is what scores are divided by the square root of.
fn gemma2(dims: Size, query_scalar: f64, window: usize) -> DecoderConfig {
    let mut config = dims.of(base());
    config.activation = Activation::GeluTanh;
    config.embedding_scale = Some((config.hidden_size as f64).sqrt());
    config.attention_scale = Some(query_scalar.powf(-0.5));
    config.attention_softcap = Some(50.0);
    config.final_logit_softcap = Some(30.0);
    config.vocab_size = 256_000;
    config.max_position_embeddings = 8192;
    config.tie_word_embeddings = true;
    config.bos_token_id = Some(2);
    config.eos_token_ids = vec![1];
    let sliding: Vec<bool> = (0..config.num_hidden_layers)
        .map(|layer| layer % 2 == 0)
        .collect();
    set_windows(&mut config, &sliding, window, LayerRope::Global);
    config
}

/// Gemma 2 2B.
pub fn gemma2_2b() -> DecoderConfig {
    gemma2(Size::new(2304, 9216, 26, 8, 4, 256), 256.0, 4096)
}

/// Gemma 2 9B.
pub fn gemma2_9b() -> DecoderConfig {
    gemma2(Size::new(3584, 14_336, 42, 16, 8, 256), 256.0, 4096)
}

/// Gemma 2 27B: scores are scaled by the width of a head that it does not have.
pub fn gemma2_27b() -> DecoderConfig {
    gemma2(Size::new(4608, 36_864, 46, 32, 16, 128), 144.0, 4096)
}

/// A toy with all dimensions different and small, for tests.
pub fn tiny() -> DecoderConfig {
    DecoderConfig {
        vocab_size: 131,
        max_position_embeddings: 96,
        ..gemma2(Size::new(48, 80, 3, 6, 2, 16), 40.0, 7)
    }
}
