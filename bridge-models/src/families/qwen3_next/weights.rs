//! The weight map.

use bridge_core::mapping::Fused;
use bridge_core::{DecoderConfig, WeightMap};

use crate::families::maps::{one_input_channel, pre_norm_weights};

pub(super) fn map(config: &DecoderConfig) -> WeightMap {
    let layers = mixers(config)
        .then(experts())
        .then(pre_norm_weights(config));
    if config.num_mtp_layers == 0 {
        return layers.ignore(
            "mtp.{rest*}",
            "multi-token prediction, which num_nextn_predict_layers does not ask for; kept for the export",
        );
    }
    let pairs = [
        ("embedding_norm.weight", "pre_fc_norm_embedding.weight"),
        ("hidden_norm.weight", "pre_fc_norm_hidden.weight"),
        ("proj.weight", "fc.weight"),
        ("final_norm.weight", "norm.weight"),
    ];
    let module = layers.relocated(
        ("layers.{l}.", "mtp.0.layer."),
        ("model.layers.{l}.", "mtp.layers.0."),
    );
    let module = pairs.iter().fold(module, |map, (own, stored)| {
        map.copy(&format!("mtp.0.{own}"), &format!("mtp.{stored}"))
    });
    module.then(layers)
}

fn mixers(config: &DecoderConfig) -> WeightMap {
    let key_heads = config
        .gated_delta_net
        .as_ref()
        .map_or(1, |delta_net| delta_net.num_key_heads);
    let fused = |foreign: &str, canonical: &dyn Fn(&str) -> String, parts: &[&str]| {
        let parts: Vec<String> = parts.iter().map(|part| canonical(part)).collect();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        Fused::new(&format!("model.layers.{{l}}.{foreign}"), &parts)
    };
    let proj = |part: &str| format!("layers.{{l}}.delta_net.{part}_proj.weight");
    let conv = |part: &str| format!("layers.{{l}}.delta_net.{part}_conv.weight");
    // Each head's query, then its gate.
    let gated_query = |leaf: &str| {
        let name = |part: &str| format!("layers.{{l}}.attention.{part}_proj.{leaf}");
        fused(&format!("self_attn.q_proj.{leaf}"), &name, &["q", "gate"])
            .groups(config.num_attention_heads)
    };
    WeightMap::new()
        .fuse(gated_query("weight"))
        .fuse(gated_query("bias"))
        // Each key head's query and key, then the values and gates of the value heads that share it.
        .fuse(
            fused(
                "linear_attn.in_proj_qkvz.weight",
                &proj,
                &["q", "k", "v", "z"],
            )
            .groups(key_heads),
        )
        .fuse(fused("linear_attn.in_proj_ba.weight", &proj, &["b", "a"]).groups(key_heads))
        .fuse(
            fused("linear_attn.conv1d.weight", &conv, &["q", "k", "v"]).arrange(one_input_channel),
        )
        .copy(
            "layers.{l}.delta_net.dt_bias",
            "model.layers.{l}.linear_attn.dt_bias",
        )
        .copy(
            "layers.{l}.delta_net.a_log",
            "model.layers.{l}.linear_attn.A_log",
        )
        .copy(
            "layers.{l}.delta_net.gated_norm.weight",
            "model.layers.{l}.linear_attn.norm.weight",
        )
        .copy(
            "layers.{l}.delta_net.out_proj.weight",
            "model.layers.{l}.linear_attn.out_proj.weight",
        )
}

fn experts() -> WeightMap {
    WeightMap::new()
        .copy(
            "layers.{l}.mlp.router.weight",
            "model.layers.{l}.mlp.gate.weight",
        )
        .unstacked_experts(
            "layers.{l}.mlp.experts.{p}_proj.weight",
            "model.layers.{l}.mlp.experts.{e}.{p}_proj.weight",
        )
        .copy(
            "layers.{l}.mlp.shared_expert.{part}.{leaf}",
            "model.layers.{l}.mlp.shared_expert.{part}.{leaf}",
        )
        .copy(
            "layers.{l}.mlp.shared_expert_gate.weight",
            "model.layers.{l}.mlp.shared_expert_gate.weight",
        )
}
