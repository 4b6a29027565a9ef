//! What tests of this crate share.

use std::sync::Arc;
use std::time::Duration;

use bridge_core::LayoutSpec;
use burn_flex::Flex;

use crate::context::ParallelContext;
use crate::error::{Error, Result};

/// Runs `work` on `size` tensor-parallel ranks.
#[track_caller]
pub(crate) fn run_on<T: Send + 'static>(
    size: usize,
    work: impl Fn(Arc<ParallelContext<Flex>>) -> Result<T> + Send + Sync + 'static,
) -> Vec<T> {
    super::run_threads::<Flex, T, Error>(LayoutSpec::tp_pp(size, 1), Duration::from_secs(30), work)
        .expect("the ranks agree")
}

/// A number in -1 to 1 that looks random, the same for the same arguments.
pub(crate) fn number(seed: usize, index: usize) -> f32 {
    let mut bits = (seed as u64) << 32 | index as u64;
    for _ in 0..2 {
        bits = (bits ^ (bits >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    ((bits >> 40) as f32 / (1u64 << 23) as f32) - 1.0
}
