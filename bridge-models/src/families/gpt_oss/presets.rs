//! Named sizes. The numbers are those of the published `config.json` files.

use bridge_core::DecoderConfig;
use bridge_core::config::{ClampedSwiglu, LayerConfig, LayerRope, MoeConfig};

use super::config::{base, published_rope};
use crate::families::moe_keys::set_first_dense;
use crate::families::sizes::Size;
use crate::families::spec::Preset;
use crate::families::windows::set_windows;

pub(super) const ALL: &[Preset] = &[
    Preset {
        name: "gpt_oss_20b",
        hub_id: "openai/gpt-oss-20b",
        config: gpt_oss_20b,
    },
    Preset {
        name: "gpt_oss_120b",
        hub_id: "openai/gpt-oss-120b",
        config: gpt_oss_120b,
    },
    Preset {
        name: "gpt_oss_tiny",
        hub_id: "",
        config: tiny,
    },
];

fn gpt_oss(dims: Size, experts: usize, per_token: usize, window: usize) -> DecoderConfig {
    let mut config = dims.of(base());
    config.layers = vec![LayerConfig::dense(); config.num_hidden_layers];
    let sliding: Vec<bool> = (0..config.layers.len())
        .map(|layer| layer % 2 == 0)
        .collect();
    set_windows(&mut config, &sliding, window, LayerRope::Global);
    set_first_dense(&mut config, 0);
    let mut moe = config.moe.take().unwrap_or_else(MoeConfig::plain);
    moe.num_experts = experts;
    moe.num_experts_per_tok = per_token;
    moe.intermediate_size = config.intermediate_size;
    moe.clamped_swiglu = Some(ClampedSwiglu {
        alpha: 1.702,
        limit: 7.0,
    });
    config.moe = Some(moe);
    config.norm.eps = 1e-5;
    config.attention_bias = true;
    config.attention_output_bias = true;
    config.vocab_size = 201_088;
    config.max_position_embeddings = 131_072;
    config.rope = Some(published_rope());
    config.eos_token_ids = vec![200_002];
    config
}

/// gpt-oss-20b, 21B with 3.6B active.
pub fn gpt_oss_20b() -> DecoderConfig {
    gpt_oss(Size::new(2880, 2880, 24, 64, 8, 64), 32, 4, 128)
}

/// gpt-oss-120b, 117B with 5.1B active.
pub fn gpt_oss_120b() -> DecoderConfig {
    gpt_oss(Size::new(2880, 2880, 36, 64, 8, 64), 128, 4, 128)
}

/// A toy with all dimensions different and small, for tests.
pub fn tiny() -> DecoderConfig {
    DecoderConfig {
        vocab_size: 131,
        max_position_embeddings: 64,
        eos_token_ids: vec![7],
        ..gpt_oss(Size::new(64, 32, 3, 6, 2, 16), 8, 3, 9)
    }
}
