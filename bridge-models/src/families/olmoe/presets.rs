//! Named sizes. The numbers are those of the published `config.json` files.

use bridge_core::DecoderConfig;
use bridge_core::config::MoeConfig;

use super::config::base;
use crate::families::moe_keys::set_first_dense;
use crate::families::sizes::Size;
use crate::families::spec::Preset;

pub(super) const ALL: &[Preset] = &[
    Preset {
        name: "olmoe_1b_7b",
        hub_id: "allenai/OLMoE-1B-7B-0924",
        config: olmoe_1b_7b,
    },
    Preset {
        name: "olmoe_tiny",
        hub_id: "",
        config: tiny,
    },
];

fn olmoe(dims: Size, experts: usize, per_token: usize) -> DecoderConfig {
    let mut config = dims.of(base());
    set_first_dense(&mut config, 0);
    let mut moe = MoeConfig::plain();
    moe.num_experts = experts;
    moe.num_experts_per_tok = per_token;
    moe.intermediate_size = config.intermediate_size;
    config.moe = Some(moe);
    config.norm.eps = 1e-5;
    config.vocab_size = 50_304;
    config.max_position_embeddings = 4096;
    config.eos_token_ids = vec![50_279];
    config
}

/// OLMoE 7B with 1B active.
pub fn olmoe_1b_7b() -> DecoderConfig {
    olmoe(Size::new(2048, 1024, 16, 16, 16, 128), 64, 8)
}

/// A toy with all dimensions different and small, for tests.
pub fn tiny() -> DecoderConfig {
    DecoderConfig {
        vocab_size: 131,
        max_position_embeddings: 64,
        eos_token_ids: vec![7],
        ..olmoe(Size::new(48, 24, 3, 6, 2, 8), 8, 3)
    }
}
