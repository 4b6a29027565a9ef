//! Named sizes. The numbers are those of the published `config.json` files.

use bridge_core::DecoderConfig;
use bridge_core::config::{
    GroupScoring, MlaConfig, MoeConfig, RopeConfig, RopeScaling, RouterGroups,
};

use super::config::base;
use crate::families::moe_keys::{set_first_dense, settle_mla};
use crate::families::sizes::Size;
use crate::families::spec::Preset;

pub(super) const ALL: &[Preset] = &[
    Preset {
        name: "deepseek_v2_lite",
        hub_id: "deepseek-ai/DeepSeek-V2-Lite",
        config: deepseek_v2_lite,
    },
    Preset {
        name: "deepseek_v2",
        hub_id: "deepseek-ai/DeepSeek-V2",
        config: deepseek_v2,
    },
    Preset {
        name: "deepseek_v2_tiny",
        hub_id: "",
        config: tiny,
    },
];

/// YaRN by 40 from 4096 tokens.
fn yarn(mscale: f64) -> RopeConfig {
    RopeConfig {
        theta: 10_000.0,
        scaling: RopeScaling::Yarn {
            factor: 40.0,
            original_max_position_embeddings: 4096,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: Some(mscale),
            mscale_all_dim: Some(mscale),
            attention_factor: None,
            truncate: true,
        },
    }
}

fn deepseek(dims: Size, mla: MlaConfig, moe: MoeConfig, first_dense: usize) -> DecoderConfig {
    let mut config = dims.of(base());
    set_first_dense(&mut config, first_dense);
    config.vocab_size = 102_400;
    config.max_position_embeddings = 163_840;
    config.rope = Some(yarn(0.707));
    config.bos_token_id = Some(100_000);
    config.eos_token_ids = vec![100_001];
    config.mla = Some(mla);
    config.moe = Some(moe);
    settle_mla(&mut config);
    config
}

fn latent(q_lora_rank: Option<usize>) -> MlaConfig {
    MlaConfig {
        q_lora_rank,
        kv_lora_rank: 512,
        qk_nope_head_dim: 128,
        qk_rope_head_dim: 64,
        v_head_dim: 128,
        norm_eps: 1e-6,
    }
}

/// DeepSeek-V2-Lite, 16B with 2.4B active.
pub fn deepseek_v2_lite() -> DecoderConfig {
    let mut moe = MoeConfig::plain();
    moe.num_experts = 64;
    moe.num_experts_per_tok = 6;
    moe.intermediate_size = 1408;
    moe.shared_intermediate_size = Some(2 * 1408);
    let dims = Size::new(2048, 10_944, 27, 16, 16, 192);
    deepseek(dims, latent(None), moe, 1)
}

/// DeepSeek-V2, 236B with 21B active.
pub fn deepseek_v2() -> DecoderConfig {
    let mut moe = MoeConfig::plain();
    moe.num_experts = 160;
    moe.num_experts_per_tok = 6;
    moe.intermediate_size = 1536;
    moe.shared_intermediate_size = Some(2 * 1536);
    moe.router.scaling_factor = 16.0;
    moe.router.groups = Some(RouterGroups {
        n_group: 8,
        topk_group: 3,
        score: GroupScoring::Max,
    });
    let dims = Size::new(5120, 12_288, 60, 128, 128, 192);
    deepseek(dims, latent(Some(1536)), moe, 1)
}

/// A toy with all dimensions different and small, for tests.
pub fn tiny() -> DecoderConfig {
    let mut moe = MoeConfig::plain();
    moe.num_experts = 8;
    moe.num_experts_per_tok = 3;
    moe.intermediate_size = 24;
    moe.shared_intermediate_size = Some(48);
    moe.router.groups = Some(RouterGroups {
        n_group: 4,
        topk_group: 2,
        score: GroupScoring::Max,
    });
    let mla = MlaConfig {
        q_lora_rank: Some(28),
        kv_lora_rank: 20,
        qk_nope_head_dim: 16,
        qk_rope_head_dim: 8,
        v_head_dim: 12,
        norm_eps: 1e-6,
    };
    DecoderConfig {
        vocab_size: 131,
        max_position_embeddings: 64,
        bos_token_id: None,
        eos_token_ids: vec![7],
        ..deepseek(Size::new(48, 80, 3, 4, 4, 24), mla, moe, 1)
    }
}
