//! The weight map.

use bridge_core::{DecoderConfig, WeightMap};

use crate::families::moe_maps::latent_moe_weights;

pub(super) fn map(config: &DecoderConfig) -> WeightMap {
    latent_moe_weights(config)
}
