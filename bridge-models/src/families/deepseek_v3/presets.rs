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
        name: "deepseek_v3",
        hub_id: "deepseek-ai/DeepSeek-V3",
        config: deepseek_v3,
    },
    Preset {
        name: "moonlight_16b_a3b",
        hub_id: "moonshotai/Moonlight-16B-A3B",
        config: moonlight_16b_a3b,
    },
    Preset {
        name: "deepseek_v3_tiny",
        hub_id: "",
        config: tiny,
    },
];

/// The experts of a model: how many, how many per token, their width, and that of the shared one in experts.
fn experts([count, per_token, inner, shared]: [usize; 4], scaling: f64) -> MoeConfig {
    let mut moe = base().moe.unwrap_or_else(MoeConfig::plain);
    moe.num_experts = count;
    moe.num_experts_per_tok = per_token;
    moe.intermediate_size = inner;
    moe.shared_intermediate_size = Some(shared * inner);
    moe.router.normalize = true;
    moe.router.scaling_factor = scaling;
    moe
}

fn deepseek(dims: Size, mla: MlaConfig, moe: MoeConfig, first_dense: usize) -> DecoderConfig {
    let mut config = dims.of(base());
    set_first_dense(&mut config, first_dense);
    config.mla = Some(mla);
    config.moe = Some(moe);
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

/// DeepSeek-V3 and R1, 671B with 37B active, with its multi-token prediction module.
pub fn deepseek_v3() -> DecoderConfig {
    let mut moe = experts([256, 8, 2048, 1], 2.5);
    moe.router.groups = Some(RouterGroups {
        n_group: 8,
        topk_group: 4,
        score: GroupScoring::SumOfTopTwo,
    });
    let dims = Size::new(7168, 18_432, 61, 128, 128, 192);
    let mut config = deepseek(dims, latent(Some(1536)), moe, 3);
    config.vocab_size = 129_280;
    config.max_position_embeddings = 163_840;
    config.rope = Some(RopeConfig {
        theta: 10_000.0,
        scaling: RopeScaling::Yarn {
            factor: 40.0,
            original_max_position_embeddings: 4096,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: Some(1.0),
            mscale_all_dim: Some(1.0),
            attention_factor: None,
            truncate: true,
        },
    });
    config.num_mtp_layers = 1;
    config.bos_token_id = Some(0);
    config.eos_token_ids = vec![1];
    settle_mla(&mut config);
    config
}

/// Moonlight 16B with 3B active.
pub fn moonlight_16b_a3b() -> DecoderConfig {
    let dims = Size::new(2048, 11_264, 27, 16, 16, 192);
    let mut config = deepseek(dims, latent(None), experts([64, 6, 1408, 2], 2.446), 1);
    config.norm.eps = 1e-5;
    config.vocab_size = 163_840;
    config.max_position_embeddings = 8192;
    config.rope = Some(RopeConfig::new(50_000.0));
    config.bos_token_id = Some(163_584);
    config.eos_token_ids = vec![163_585];
    config
}

/// A toy with all dimensions different and small, for tests.
pub fn tiny() -> DecoderConfig {
    let mut moe = experts([8, 3, 24, 1], 2.5);
    moe.router.groups = Some(RouterGroups {
        n_group: 4,
        topk_group: 2,
        score: GroupScoring::SumOfTopTwo,
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
        num_mtp_layers: 1,
        eos_token_ids: vec![7],
        ..deepseek(Size::new(48, 80, 3, 4, 4, 24), mla, moe, 1)
    }
}
