//! Named sizes. The numbers are those of the published `config.json` files.

use bridge_core::DecoderConfig;
use bridge_core::config::Activation;

use super::config::base;
use crate::families::sizes::Size;
use crate::families::spec::Preset;

pub(super) const ALL: &[Preset] = &[
    Preset {
        name: "minitron_4b",
        hub_id: "nvidia/Minitron-4B-Base",
        config: minitron_4b,
    },
    Preset {
        name: "minitron_8b",
        hub_id: "nvidia/Minitron-8B-Base",
        config: minitron_8b,
    },
    Preset {
        name: "nemotron_tiny",
        hub_id: "",
        config: tiny,
    },
];

fn nemotron(dims: Size) -> DecoderConfig {
    let mut config = dims.of(base());
    config.activation = Activation::Relu2;
    config.vocab_size = 256_000;
    config.max_position_embeddings = 4096;
    config.partial_rotary_factor = 0.5;
    config.initializer_range = 0.0134;
    config.bos_token_id = Some(2);
    config.eos_token_ids = vec![3];
    config
}

/// Minitron 4B, pruned from Nemotron-4 15B.
pub fn minitron_4b() -> DecoderConfig {
    nemotron(Size::new(3072, 9216, 32, 24, 8, 128))
}

/// Minitron 8B, pruned from Nemotron-4 15B in width but for its heads.
pub fn minitron_8b() -> DecoderConfig {
    nemotron(Size::new(4096, 16_384, 32, 48, 8, 128))
}

/// A toy with all dimensions different and small, for tests.
pub fn tiny() -> DecoderConfig {
    DecoderConfig {
        vocab_size: 131,
        max_position_embeddings: 96,
        ..nemotron(Size::new(48, 80, 3, 6, 2, 16))
    }
}
