//! The weight names of mixtures of experts, latent attention and multi-token prediction.

use bridge_core::mapping::Fused;
use bridge_core::{DecoderConfig, WeightMap};

use super::maps::pre_norm_weights;

/// [`pre_norm_weights`] of a model with experts, named as most families name them: one tensor per expert and projection
/// on the hub; one per layer, gate and up together, where a transformers 5 model was saved as it lies in memory.
pub(super) fn moe_weights(config: &DecoderConfig) -> WeightMap {
    let stacked = "model.layers.{l}.mlp.experts.gate_up_proj";
    with_mtp(config, expert_weights().then(pre_norm_weights(config))).when_stored(
        stacked,
        with_mtp(
            config,
            stacked_expert_weights().then(pre_norm_weights(config)),
        ),
    )
}

/// [`moe_weights`] with latent attention.
pub(super) fn latent_moe_weights(config: &DecoderConfig) -> WeightMap {
    let latent = || latent_attention_weights().then(pre_norm_weights(config));
    let stacked = "model.layers.{l}.mlp.experts.gate_up_proj";
    with_mtp(config, expert_weights().then(latent())).when_stored(
        stacked,
        with_mtp(config, stacked_expert_weights().then(latent())),
    )
}

/// Routers and shared experts.
fn router_weights() -> WeightMap {
    WeightMap::new()
        .copy(
            "layers.{l}.mlp.router.correction_bias",
            "model.layers.{l}.mlp.gate.e_score_correction_bias",
        )
        .copy(
            "layers.{l}.mlp.router.weight",
            "model.layers.{l}.mlp.gate.weight",
        )
        .copy(
            "layers.{l}.mlp.shared_expert.{part}.{leaf}",
            "model.layers.{l}.mlp.shared_experts.{part}.{leaf}",
        )
}

fn expert_weights() -> WeightMap {
    router_weights().unstacked_experts(
        "layers.{l}.mlp.experts.{p}_proj.weight",
        "model.layers.{l}.mlp.experts.{e}.{p}_proj.weight",
    )
}

fn stacked_expert_weights() -> WeightMap {
    router_weights()
        .fuse(
            Fused::new(
                "model.layers.{l}.mlp.experts.gate_up_proj",
                &[
                    "layers.{l}.mlp.experts.gate_proj.weight",
                    "layers.{l}.mlp.experts.up_proj.weight",
                ],
            )
            .dim(1),
        )
        .copy(
            "layers.{l}.mlp.experts.down_proj.weight",
            "model.layers.{l}.mlp.experts.down_proj",
        )
}

fn latent_attention_weights() -> WeightMap {
    WeightMap::new()
        .copy(
            "layers.{l}.attention.kv_a_proj.{leaf}",
            "model.layers.{l}.self_attn.kv_a_proj_with_mqa.{leaf}",
        )
        .copy(
            "layers.{l}.attention.{p:q|kv}_a_norm.weight",
            "model.layers.{l}.self_attn.{p:q|kv}_a_layernorm.weight",
        )
}

/// `map` and the multi-token prediction modules, which the hub counts as layers after the last. Their embedding and head
/// are stored again and are the model's own.
fn with_mtp(config: &DecoderConfig, map: WeightMap) -> WeightMap {
    let mut all = WeightMap::new();
    for index in 0..config.num_mtp_layers {
        let foreign = format!("model.layers.{}.", config.num_hidden_layers + index);
        let layer = map.relocated(
            ("layers.{l}.", &format!("mtp.{index}.layer.")),
            ("model.layers.{l}.", &foreign),
        );
        let head = if config.tie_word_embeddings {
            "embedding.weight"
        } else {
            "lm_head.weight"
        };
        let (own_embedding, own_head) = (
            format!("mtp.{index}.embedding.weight"),
            format!("mtp.{index}.lm_head.weight"),
        );
        let pairs = [
            ("embedding_norm.{leaf}", "enorm.{leaf}"),
            ("hidden_norm.{leaf}", "hnorm.{leaf}"),
            ("proj.weight", "eh_proj.weight"),
            ("final_norm.{leaf}", "shared_head.norm.{leaf}"),
            ("embedding.weight", "embed_tokens.weight"),
            ("lm_head.weight", "shared_head.head.weight"),
        ];
        all = all.then(layer);
        for (own, stored) in pairs {
            all = all.copy(&format!("mtp.{index}.{own}"), &format!("{foreign}{stored}"));
        }
        all = all
            .tied(&own_embedding, "embedding.weight", true)
            .tied(&own_head, head, true);
    }
    all.then(map)
}
