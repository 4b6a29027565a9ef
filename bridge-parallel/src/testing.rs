//! What tests of divided layers share: numbers, and comparisons with one rank.

use std::time::Duration;

use bridge_core::LayoutSpec;
use bridge_ops::{Float, float_from_f32, to_f32_vec};
use burn_flex::{Flex, FlexDevice};

use crate::tensors::dims;
use crate::{Error, ParallelContext, run_threads};

pub(crate) const DEVICE: FlexDevice = FlexDevice;

/// fp32 sums of some hundred terms of order one, taken in different orders.
pub(crate) const ROUNDING: f32 = 3e-5;

/// Values in -1..1 that depend on the seed alone.
pub(crate) fn random(shape: &[usize], seed: u64) -> Float<Flex> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    float_from_f32::<Flex>(&values, shape, &DEVICE)
}

/// Asserts equal shapes, and elements that differ by at most [`ROUNDING`] times the largest expected magnitude (at
/// least one).
#[track_caller]
pub(crate) fn assert_close(what: &str, found: &Float<Flex>, expected: &Float<Flex>) {
    assert_eq!(dims(found), dims(expected), "{what}: shapes differ");
    let (found, expected) = (
        to_f32_vec::<Flex>(found.clone()),
        to_f32_vec::<Flex>(expected.clone()),
    );
    let scale = expected.iter().fold(1.0_f32, |max, x| max.max(x.abs()));
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert!(
            (found - expected).abs() <= ROUNDING * scale,
            "{what}: element {i} is {found}, expected {expected}"
        );
    }
}

/// Runs `work` on every rank of `layout`; it asserts by itself.
#[track_caller]
pub(crate) fn on_ranks(
    layout: LayoutSpec,
    work: impl Fn(&ParallelContext<Flex>) + Send + Sync + 'static,
) {
    let outcome = run_threads::<Flex, _, Error>(layout, Duration::from_secs(60), move |ctx| {
        work(&ctx);
        ctx.health()
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
}
