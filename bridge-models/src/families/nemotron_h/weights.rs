//! The weight map.

use bridge_core::mapping::{Fused, View, ViewError};
use bridge_core::{DecoderConfig, WeightMap};

pub(super) fn map(config: &DecoderConfig) -> WeightMap {
    let proj = |leaf: &str| {
        ["z", "x", "b", "c", "dt"].map(|part| format!("layers.{{l}}.mamba.{part}_proj.{leaf}"))
    };
    let conv =
        |leaf: &str| ["x", "b", "c"].map(|part| format!("layers.{{l}}.mamba.{part}_conv.{leaf}"));
    let fused = |foreign: &str, parts: &[String]| {
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        Fused::new(&format!("backbone.layers.{{l}}.mixer.{foreign}"), &parts)
    };
    WeightMap::new()
        .copy("embedding.weight", "backbone.embeddings.weight")
        .copy(
            "layers.{l}.input_norm.weight",
            "backbone.layers.{l}.norm.weight",
        )
        .copy(
            "layers.{l}.mlp_norm.weight",
            "backbone.layers.{l}.norm.weight",
        )
        .copy(
            "layers.{l}.attention.{part}.{leaf}",
            "backbone.layers.{l}.mixer.{part}.{leaf}",
        )
        .copy(
            "layers.{l}.mlp.{part}.{leaf}",
            "backbone.layers.{l}.mixer.{part}.{leaf}",
        )
        .fuse(fused("in_proj.weight", &proj("weight")))
        .fuse(fused("in_proj.bias", &proj("bias")))
        .fuse(fused("conv1d.weight", &conv("weight")).arrange(one_input_channel))
        .fuse(fused("conv1d.bias", &conv("bias")))
        .copy(
            "layers.{l}.mamba.dt_bias",
            "backbone.layers.{l}.mixer.dt_bias",
        )
        .copy("layers.{l}.mamba.a_log", "backbone.layers.{l}.mixer.A_log")
        .copy("layers.{l}.mamba.d", "backbone.layers.{l}.mixer.D")
        .copy(
            "layers.{l}.mamba.gated_norm.weight",
            "backbone.layers.{l}.mixer.norm.weight",
        )
        .copy(
            "layers.{l}.mamba.out_proj.{leaf}",
            "backbone.layers.{l}.mixer.out_proj.{leaf}",
        )
        .copy("final_norm.weight", "backbone.norm_f.weight")
        .copy("lm_head.weight", "lm_head.weight")
        .tied(
            "lm_head.weight",
            "embedding.weight",
            config.tie_word_embeddings,
        )
}

/// Filters `[channels, taps]` as a convolution's weight `[channels, 1, taps]`.
fn one_input_channel(filters: View) -> Result<View, ViewError> {
    let channels = filters.shape().first().copied().unwrap_or(0);
    filters.split(0, &[channels, 1])
}
