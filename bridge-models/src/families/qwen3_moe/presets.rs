//! Named sizes. The numbers are those of the published `config.json` files.

use bridge_core::DecoderConfig;
use bridge_core::config::{MoeConfig, RopeConfig};

use super::config::base;
use crate::families::moe_keys::set_first_dense;
use crate::families::sizes::Size;
use crate::families::spec::Preset;

pub(super) const ALL: &[Preset] = &[
    Preset {
        name: "qwen3_30b_a3b",
        hub_id: "Qwen/Qwen3-30B-A3B",
        config: qwen3_30b_a3b,
    },
    Preset {
        name: "qwen3_235b_a22b",
        hub_id: "Qwen/Qwen3-235B-A22B",
        config: qwen3_235b_a22b,
    },
    Preset {
        name: "qwen3_moe_tiny",
        hub_id: "",
        config: tiny,
    },
];

fn qwen3_moe(dims: Size, [experts, per_token, inner]: [usize; 3]) -> DecoderConfig {
    let mut config = dims.of(base());
    set_first_dense(&mut config, 0);
    let mut moe = MoeConfig::plain();
    moe.num_experts = experts;
    moe.num_experts_per_tok = per_token;
    moe.intermediate_size = inner;
    moe.router.normalize = true;
    config.moe = Some(moe);
    config.vocab_size = 151_936;
    config.max_position_embeddings = 40_960;
    config.rope = Some(RopeConfig::new(1_000_000.0));
    config.bos_token_id = Some(151_643);
    config.eos_token_ids = vec![151_645];
    config
}

/// Qwen3 30B with 3B active.
pub fn qwen3_30b_a3b() -> DecoderConfig {
    qwen3_moe(Size::new(2048, 6144, 48, 32, 4, 128), [128, 8, 768])
}

/// Qwen3 235B with 22B active.
pub fn qwen3_235b_a22b() -> DecoderConfig {
    qwen3_moe(Size::new(4096, 12_288, 94, 64, 4, 128), [128, 8, 1536])
}

/// A toy with all dimensions different and small, for tests.
pub fn tiny() -> DecoderConfig {
    DecoderConfig {
        vocab_size: 131,
        max_position_embeddings: 64,
        ..qwen3_moe(Size::new(48, 80, 3, 6, 2, 16), [8, 3, 24])
    }
}
