//! A limit on how many tokens an expert takes.
//!
//! ```text
//! capacity = ceil(factor tokens k / E)
//! ```
//!
//! Assignments beyond it are dropped: the token goes on without that expert, its other weights unchanged. Without a limit
//! ("dropless") no token loses an expert, and the experts' products are as uneven as the routing. Sources: GShard
//! (arXiv 2006.16668), Switch Transformer (arXiv 2101.03961).

use std::cmp::Reverse;

use burn_backend::DType;

use crate::data::{int_from_i64, to_f32_vec, to_i64_vec};
use crate::ops::Ops;
use crate::primitive::{Float, Int, dims};

/// Which assignments stay when an expert has too many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DropPolicy {
    /// The first ones, in the order of the tokens.
    Position,
    /// Those with the largest weights.
    Weight,
}

/// Most tokens that an expert takes of `tokens` with `top_k` experts each: `factor` times its equal share, rounded up.
pub fn expert_capacity(factor: f64, tokens: usize, top_k: usize, num_experts: usize) -> usize {
    (factor * (tokens * top_k) as f64 / num_experts.max(1) as f64).ceil() as usize
}

/// The assignments with `num_experts` (no expert) in the place of those beyond `capacity`. experts, weights: [tokens, k].
/// Waits for the device.
pub fn drop_over_capacity<B: Ops>(
    experts: Int<B>,
    weights: Float<B>,
    num_experts: usize,
    capacity: usize,
    policy: DropPolicy,
) -> Int<B> {
    let (device, shape) = (B::int_device(&experts), dims(&experts));
    let mut ids = to_i64_vec::<B>(experts);
    let mut order: Vec<usize> = (0..ids.len()).collect();
    if policy == DropPolicy::Weight {
        let weights = to_f32_vec::<B>(B::cast(weights, DType::F32));
        // Weights are not negative, so their bits are in their order; ties stay in the order of the tokens.
        order.sort_by_key(|&at| Reverse(weights[at].max(0.0).to_bits()));
    }
    let mut taken = vec![0; num_experts];
    for at in order {
        let Some(taken) = usize::try_from(ids[at])
            .ok()
            .and_then(|expert| taken.get_mut(expert))
        else {
            continue;
        };
        if *taken < capacity {
            *taken += 1;
        } else {
            ids[at] = num_experts as i64;
        }
    }
    int_from_i64::<B>(&ids, &shape, &device)
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::float_from_f32;
    use crate::testing::DEVICE;

    #[test]
    fn what_is_beyond_an_experts_capacity_is_dropped() {
        let ids = [0, 1, 0, 2, 0, 1, 3, 0];
        let weights = [0.1, 0.9, 0.4, 0.6, 0.3, 0.7, 0.5, 0.5];
        let dropped = |capacity, policy| {
            let ids = int_from_i64::<Flex>(&ids, &[4, 2], &DEVICE);
            let weights = float_from_f32::<Flex>(&weights, &[4, 2], &DEVICE);
            let kept = drop_over_capacity::<Flex>(ids, weights, 3, capacity, policy);
            assert_eq!(dims(&kept), [4, 2]);
            to_i64_vec::<Flex>(kept)
        };
        // 3 was no expert to begin with.
        let position = dropped(2, DropPolicy::Position);
        assert_eq!(position, [0, 1, 0, 2, 3, 1, 3, 3]);
        assert_eq!(dropped(2, DropPolicy::Weight), [3, 1, 0, 2, 3, 1, 3, 0]);
        assert_eq!(dropped(4, DropPolicy::Weight), ids);
        assert_eq!(dropped(0, DropPolicy::Position), [3; 8]);
        assert_eq!(expert_capacity(1.0, 4, 2, 3), 3);
        assert_eq!(expert_capacity(1.25, 4096, 8, 128), 320);
    }
}
