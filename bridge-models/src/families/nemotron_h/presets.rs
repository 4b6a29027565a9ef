//! Named sizes. The numbers are those of the published `config.json` files.

use bridge_core::DecoderConfig;
use bridge_core::config::Activation;

use super::config::{base, layer};
use crate::families::spec::Preset;

pub(super) const ALL: &[Preset] = &[
    Preset {
        name: "nemotron_h_4b",
        hub_id: "nvidia/Nemotron-H-4B-Base-8K",
        config: nemotron_h_4b,
    },
    Preset {
        name: "nemotron_h_8b",
        hub_id: "nvidia/Nemotron-H-8B-Base-8K",
        config: nemotron_h_8b,
    },
    Preset {
        name: "nemotron_h_47b",
        hub_id: "nvidia/Nemotron-H-47B-Base-8K",
        config: nemotron_h_47b,
    },
    Preset {
        name: "nemotron_h_56b",
        hub_id: "nvidia/Nemotron-H-56B-Base-8K",
        config: nemotron_h_56b,
    },
    Preset {
        name: "nemotron_nano_v2_9b",
        hub_id: "nvidia/NVIDIA-Nemotron-Nano-9B-v2",
        config: nemotron_nano_v2_9b,
    },
    Preset {
        name: "nemotron_nano_v2_12b",
        hub_id: "nvidia/NVIDIA-Nemotron-Nano-12B-v2",
        config: nemotron_nano_v2_12b,
    },
    Preset {
        name: "nemotron_h_tiny",
        hub_id: "",
        config: tiny,
    },
];

const PATTERN_8B: &str = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-";
const PATTERN_47B: &str = "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-\
                           M-M-M-M-M-";
const PATTERN_56B: &str = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-\
                           M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-";
const PATTERN_9B: &str = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-";
const PATTERN_12B: &str = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-";

/// The dimensions that tell sizes apart.
struct Size {
    pattern: &'static str,
    hidden_size: usize,
    intermediate_size: usize,
    heads: usize,
    mamba_heads: usize,
    mamba_head_dim: usize,
    state_size: usize,
}

fn nemotron_h(size: Size) -> DecoderConfig {
    let mut config = base();
    config.hidden_size = size.hidden_size;
    config.intermediate_size = size.intermediate_size;
    config.layers = size.pattern.chars().filter_map(layer).collect();
    config.num_hidden_layers = config.layers.len();
    config.num_attention_heads = size.heads;
    config.num_key_value_heads = 8;
    config.head_dim = 128;
    config.vocab_size = 131_072;
    config.max_position_embeddings = 8192;
    config.activation = Activation::Relu2;
    config.bos_token_id = Some(1);
    config.eos_token_ids = vec![2];
    if let Some(mamba2) = &mut config.mamba2 {
        mamba2.num_heads = size.mamba_heads;
        mamba2.head_dim = size.mamba_head_dim;
        mamba2.num_groups = 8;
        mamba2.state_size = size.state_size;
    }
    config
}

/// Nemotron-H 4B.
pub fn nemotron_h_4b() -> DecoderConfig {
    nemotron_h(Size {
        pattern: PATTERN_8B,
        hidden_size: 3072,
        intermediate_size: 12_288,
        heads: 32,
        mamba_heads: 112,
        mamba_head_dim: 64,
        state_size: 128,
    })
}

/// Nemotron-H 8B.
pub fn nemotron_h_8b() -> DecoderConfig {
    nemotron_h(Size {
        pattern: PATTERN_8B,
        hidden_size: 4096,
        intermediate_size: 21_504,
        heads: 32,
        mamba_heads: 128,
        mamba_head_dim: 64,
        state_size: 128,
    })
}

/// Nemotron-H 47B, pruned from 56B.
pub fn nemotron_h_47b() -> DecoderConfig {
    nemotron_h(Size {
        pattern: PATTERN_47B,
        hidden_size: 8192,
        intermediate_size: 30_720,
        heads: 64,
        mamba_heads: 256,
        mamba_head_dim: 64,
        state_size: 256,
    })
}

/// Nemotron-H 56B.
pub fn nemotron_h_56b() -> DecoderConfig {
    nemotron_h(Size {
        pattern: PATTERN_56B,
        hidden_size: 8192,
        intermediate_size: 32_768,
        heads: 64,
        mamba_heads: 256,
        mamba_head_dim: 64,
        state_size: 256,
    })
}

/// Nemotron Nano v2 9B, pruned from 12B.
pub fn nemotron_nano_v2_9b() -> DecoderConfig {
    DecoderConfig {
        max_position_embeddings: 131_072,
        ..nemotron_h(Size {
            pattern: PATTERN_9B,
            hidden_size: 4480,
            intermediate_size: 15_680,
            heads: 40,
            mamba_heads: 128,
            mamba_head_dim: 80,
            state_size: 128,
        })
    }
}

/// Nemotron Nano v2 12B.
pub fn nemotron_nano_v2_12b() -> DecoderConfig {
    DecoderConfig {
        max_position_embeddings: 131_072,
        ..nemotron_h(Size {
            pattern: PATTERN_12B,
            hidden_size: 5120,
            intermediate_size: 20_480,
            heads: 40,
            mamba_heads: 128,
            mamba_head_dim: 80,
            state_size: 128,
        })
    }
}

/// A toy with all dimensions different and small, for tests.
pub fn tiny() -> DecoderConfig {
    let mut config = nemotron_h(Size {
        pattern: "M-*M-",
        hidden_size: 48,
        intermediate_size: 80,
        heads: 6,
        mamba_heads: 4,
        mamba_head_dim: 10,
        state_size: 7,
    });
    config.num_key_value_heads = 3;
    config.head_dim = 16;
    config.vocab_size = 131;
    config.max_position_embeddings = 96;
    if let Some(mamba2) = &mut config.mamba2 {
        mamba2.num_groups = 2;
        mamba2.chunk_size = 8;
    }
    config
}
