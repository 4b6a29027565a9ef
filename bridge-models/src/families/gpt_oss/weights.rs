//! The weight map. Gate and up of an expert lie in one matrix, row by row in turns. Files in bf16 hold it transposed;
//! OpenAI's own hold it in MXFP4, not transposed, which is a form of its own.

use bridge_core::mapping::Fused;
use bridge_core::{DecoderConfig, WeightMap};

use crate::families::maps::pre_norm_weights;

const GATE_AND_UP: [&str; 2] = [
    "layers.{l}.mlp.experts.gate_proj.weight",
    "layers.{l}.mlp.experts.up_proj.weight",
];
const DOWN: &str = "layers.{l}.mlp.experts.down_proj.weight";
const STORED_GATE_UP: &str = "model.layers.{l}.mlp.experts.gate_up_proj";
const STORED_DOWN: &str = "model.layers.{l}.mlp.experts.down_proj";

pub(super) fn map(config: &DecoderConfig) -> WeightMap {
    let inner = config.moe.as_ref().map_or(0, |moe| moe.intermediate_size);
    let transposed = WeightMap::new()
        .fuse(
            Fused::new(STORED_GATE_UP, &GATE_AND_UP)
                .arrange(|view| view.transpose(1, 2))
                .dim(2)
                .groups(inner),
        )
        .map(DOWN, STORED_DOWN, |view| view.transpose(1, 2));
    let packed = WeightMap::new()
        .fuse(
            Fused::new(STORED_GATE_UP, &GATE_AND_UP)
                .dim(1)
                .groups(inner),
        )
        .copy(DOWN, STORED_DOWN);
    transposed.then(shared_weights(config, inner)).when_stored(
        "model.layers.{l}.mlp.experts.gate_up_proj_blocks",
        packed.then(shared_weights(config, inner)),
    )
}

/// What both forms have in common.
fn shared_weights(config: &DecoderConfig, inner: usize) -> WeightMap {
    WeightMap::new()
        .fuse(
            Fused::new(
                "model.layers.{l}.mlp.experts.gate_up_proj_bias",
                &[
                    "layers.{l}.mlp.experts.gate_proj.bias",
                    "layers.{l}.mlp.experts.up_proj.bias",
                ],
            )
            .dim(1)
            .groups(inner),
        )
        .copy(
            "layers.{l}.mlp.experts.down_proj.bias",
            "model.layers.{l}.mlp.experts.down_proj_bias",
        )
        .copy(
            "layers.{l}.mlp.router.{leaf}",
            "model.layers.{l}.mlp.router.{leaf}",
        )
        .copy(
            "layers.{l}.attention.sinks",
            "model.layers.{l}.self_attn.sinks",
        )
        .then(pre_norm_weights(config))
}
