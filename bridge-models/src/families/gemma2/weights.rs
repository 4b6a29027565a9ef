//! The weight map.

use bridge_core::{DecoderConfig, WeightMap};

use crate::families::maps::sandwich_norm_weights;

pub(super) fn map(config: &DecoderConfig) -> WeightMap {
    sandwich_norm_weights(config)
}
