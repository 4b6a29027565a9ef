//! The weight map.

use bridge_core::{DecoderConfig, WeightMap};

use crate::families::moe_maps::moe_weights;

pub(super) fn map(config: &DecoderConfig) -> WeightMap {
    moe_weights(config)
}
