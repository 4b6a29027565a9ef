//! Named sizes. The numbers are those of the published `config.json` files.

use bridge_core::DecoderConfig;
use bridge_core::config::{MoeConfig, QkNorm, RopeConfig};

use super::config::base;
use crate::families::moe_keys::set_first_dense;
use crate::families::sizes::Size;
use crate::families::spec::Preset;

pub(super) const ALL: &[Preset] = &[
    Preset {
        name: "glm45_air",
        hub_id: "zai-org/GLM-4.5-Air",
        config: glm45_air,
    },
    Preset {
        name: "glm45",
        hub_id: "zai-org/GLM-4.5",
        config: glm45,
    },
    Preset {
        name: "glm4_moe_tiny",
        hub_id: "",
        config: tiny,
    },
];

fn glm(
    dims: Size,
    [experts, per_token, inner]: [usize; 3],
    first_dense: usize,
    scaling: f64,
) -> DecoderConfig {
    let mut config = dims.of(base());
    set_first_dense(&mut config, first_dense);
    let mut moe = config.moe.take().unwrap_or_else(MoeConfig::plain);
    moe.num_experts = experts;
    moe.num_experts_per_tok = per_token;
    moe.intermediate_size = inner;
    moe.shared_intermediate_size = Some(inner);
    moe.router.normalize = true;
    moe.router.scaling_factor = scaling;
    config.moe = Some(moe);
    config.norm.eps = 1e-5;
    config.attention_bias = true;
    config.vocab_size = 151_552;
    config.max_position_embeddings = 131_072;
    config.rope = Some(RopeConfig::new(1_000_000.0));
    config.num_mtp_layers = 1;
    config.eos_token_ids = vec![151_329, 151_336, 151_338];
    config
}

/// GLM-4.5-Air, 106B with 12B active, with its multi-token prediction module.
pub fn glm45_air() -> DecoderConfig {
    let dims = Size::new(4096, 10_944, 46, 96, 8, 128);
    glm(dims, [128, 8, 1408], 1, 1.0)
}

/// GLM-4.5, 355B with 32B active, with its multi-token prediction module.
pub fn glm45() -> DecoderConfig {
    let dims = Size::new(5120, 12_288, 92, 96, 8, 128);
    DecoderConfig {
        qk_norm: Some(QkNorm::PerHead),
        ..glm(dims, [160, 8, 1536], 3, 2.5)
    }
}

/// A toy with all dimensions different and small, for tests.
pub fn tiny() -> DecoderConfig {
    DecoderConfig {
        vocab_size: 131,
        max_position_embeddings: 64,
        qk_norm: Some(QkNorm::PerHead),
        eos_token_ids: vec![7],
        ..glm(Size::new(48, 80, 3, 6, 2, 16), [8, 3, 24], 1, 2.5)
    }
}
