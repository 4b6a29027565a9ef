//! Named sizes. The numbers are those of the published `config.json` files.

use bridge_core::DecoderConfig;
use bridge_core::config::{AttentionLayer, Ffn, LayerConfig, Mixer, RopeConfig};

use super::config::base;
use crate::families::spec::Preset;

pub(super) const ALL: &[Preset] = &[
    Preset {
        name: "qwen3_next_80b_a3b",
        hub_id: "Qwen/Qwen3-Next-80B-A3B-Instruct",
        config: qwen3_next_80b_a3b,
    },
    Preset {
        name: "qwen3_next_tiny",
        hub_id: "",
        config: tiny,
    },
];

/// Every fourth layer has attention, and every layer experts.
fn layers(count: usize) -> Vec<LayerConfig> {
    let layer = |index: usize| LayerConfig {
        mixer: if (index + 1).is_multiple_of(4) {
            Mixer::Attention(AttentionLayer::default())
        } else {
            Mixer::GatedDeltaNet
        },
        ffn: Ffn::Moe,
    };
    (0..count).map(layer).collect()
}

/// Qwen3-Next 80B, of which 3B work on each token.
pub fn qwen3_next_80b_a3b() -> DecoderConfig {
    let mut config = base();
    config.hidden_size = 2048;
    config.intermediate_size = 5120;
    config.layers = layers(48);
    config.num_hidden_layers = 48;
    config.num_attention_heads = 16;
    config.num_key_value_heads = 2;
    config.head_dim = 256;
    config.vocab_size = 151_936;
    config.max_position_embeddings = 262_144;
    config.rope = Some(RopeConfig::new(10_000_000.0));
    config.partial_rotary_factor = 0.25;
    config.bos_token_id = Some(151_643);
    config.eos_token_ids = vec![151_645];
    if let Some(delta_net) = &mut config.gated_delta_net {
        delta_net.num_key_heads = 16;
        delta_net.num_value_heads = 32;
        delta_net.key_head_dim = 128;
        delta_net.value_head_dim = 128;
        delta_net.conv_kernel = 4;
    }
    if let Some(moe) = &mut config.moe {
        moe.num_experts = 512;
        moe.num_experts_per_tok = 10;
        moe.intermediate_size = 512;
        moe.shared_intermediate_size = Some(512);
        moe.router.normalize = true;
    }
    config
}

/// A toy with all dimensions different and small, for tests.
pub fn tiny() -> DecoderConfig {
    let mut config = qwen3_next_80b_a3b();
    config.hidden_size = 48;
    config.intermediate_size = 80;
    config.layers = layers(4);
    config.num_hidden_layers = 4;
    config.num_attention_heads = 6;
    config.num_key_value_heads = 2;
    config.head_dim = 16;
    config.vocab_size = 131;
    config.max_position_embeddings = 96;
    if let Some(delta_net) = &mut config.gated_delta_net {
        delta_net.num_key_heads = 2;
        delta_net.num_value_heads = 4;
        delta_net.key_head_dim = 10;
        delta_net.value_head_dim = 7;
        delta_net.conv_kernel = 3;
    }
    if let Some(moe) = &mut config.moe {
        moe.num_experts = 8;
        moe.num_experts_per_tok = 3;
        moe.intermediate_size = 20;
        moe.shared_intermediate_size = Some(28);
    }
    config
}
