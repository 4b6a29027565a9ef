//! The weight map.

use bridge_core::{DecoderConfig, WeightMap};

use crate::families::maps::pre_norm_weights;

pub(super) fn map(config: &DecoderConfig) -> WeightMap {
    pre_norm_weights(config)
        .copy(
            "layers.{l}.attention_linear.weight",
            "model.layers.{l}.self_attn.linear_attn.weight",
        )
        .copy(
            "layers.{l}.mlp_linear.weight",
            "model.layers.{l}.mlp.linear_mlp.weight",
        )
}
