//! The weight map.

use bridge_core::{DecoderConfig, WeightMap};

use crate::families::maps::pre_norm_weights;

pub(super) fn map(config: &DecoderConfig) -> WeightMap {
    pre_norm_weights(config)
}
